"""Rotary positions with gaps: where they come from, and that every engine turns by them and masks by slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Alone, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.bundle.contract import POSITIONS_PER_SLOT, most_positions
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.engines.base import F32, I64
from penguin_edge.runtime.engines.cache import Caches, Key, Visual, positions_of
from penguin_edge.runtime.engines.kv_shift import move_positions
from penguin_edge.runtime.engines.opening import open_engine

BUNDLES = Path(__file__).parents[2] / "bundles"
LAST = np.array([-1])
PIECE = st.one_of(
    st.integers(1, 3),  # so many tokens of text
    st.tuples(
        st.sampled_from([Visual("a", 56, 84, 2), Visual("b", 28, 28, 2), Visual("a", 84, 84, 2)]),
        st.sets(st.integers(0, 8), min_size=1),
    ),
)


@given(pieces=st.lists(PIECE, max_size=12))
def test_a_token_stands_where_it_would_with_all_others(pieces: list[int | tuple[Visual, set[int]]]) -> None:
    """Against the prompt with nothing left out, in which positions are slots."""
    whole: list[Key] = []
    left: list[bool] = []
    kept: dict[Visual, list[int]] = {}
    for piece in pieces:
        if isinstance(piece, int):
            whole += range(piece)
            left += [True] * piece
            continue
        visual, numbers = piece
        # What is kept of a picture stays the same wherever it is shown.
        mine = kept.setdefault(visual, sorted({number % visual.tokens for number in numbers}))
        whole += [(visual, i) for i in range(visual.tokens)]
        left += [i in mine for i in range(visual.tokens)]
    assert positions_of(whole) == list(range(len(whole)))
    keys = [key for key, stays in zip(whole, left, strict=True) if stays]
    assert positions_of(keys) == [at for at, stays in enumerate(left) if stays]


def spaced(count: int, seed: int) -> I64:
    """Positions with gaps of up to ten after a few tokens, as text before pictures has them."""
    gaps = np.random.default_rng(seed).choice([0, 0, 0, 1, 10], count)
    gaps[:3] = 0
    return np.arange(count) + gaps.cumsum()


def run(one: Alone, embeds: F32, positions: I64 | None, cuts: tuple[int, ...]) -> F32:
    """Logits after each chunk, and after tokens that follow by themselves."""
    rows = []
    for begin, end in zip((0, *cuts), (*cuts, len(embeds)), strict=True):
        places = None if positions is None else positions[begin:end]
        rows.append(one.forward(embeds[begin:end], LAST, places)[0])
    rows += [one.forward(embeds[i : i + 1], LAST)[0] for i in range(3)]
    return np.stack(rows)


def test_the_cache_computes_what_the_model_does_without_one() -> None:
    model = tiny_model()
    assert model.decoder is not None
    engine = Alone(EagerEngine(model, max_seq_len=64))
    embeds, positions = engine.embed(np.arange(40) * 7), spaced(40, 0)
    got = run(engine, embeds, positions, (5, 6, 30))
    follow = positions[-1] + 1 + np.arange(3)
    both, places = np.concatenate((embeds, embeds[:3])), np.concatenate((positions, follow))
    assert engine.cache.positions == places.tolist() and engine.cache.following == places[-1] + 1
    with torch.no_grad():
        hidden = model.decoder(torch.from_numpy(both)[None], torch.from_numpy(places))
        wanted = model.decoder.logits(hidden, torch.tensor([4, 5, 29, 39, 40, 41, 42]))[0].numpy()
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_every_engine_takes_gaps_as_eager_does(nano_bundle: Callable[[str, str], Path], target: str) -> None:
    bundle = Bundle.read(nano_bundle(target, "fp32"))
    assert bundle.manifest.placed
    eager = Alone(EagerEngine(Checkpoint.open("nano", note=lambda line: None).load(), max_seq_len=512))
    engine = Alone(open_engine(bundle, threads=1))
    assert engine.can_place and eager.can_place
    embeds = eager.embed(np.random.default_rng(1).integers(0, 4000, 90))
    # An empty cache that is begun with gaps, chunks of many lengths, and single tokens.
    for seed, cuts in ((1, (50, 60)), (2, (2, 3, 40, 41)), (3, ())):
        positions = spaced(90, seed)
        found = []
        for one in (engine, eager):
            one.truncate(0)
            found.append(run(one, embeds, positions, cuts))
        size = np.abs(found[1]).max()
        assert np.abs(found[0] - found[1]).max() <= 1e-4 * size
        # And gaps are what makes a difference, or this test would see nothing.
        eager.truncate(0)
        assert np.abs(run(eager, embeds, None, cuts) - found[1]).max() > 1e-2 * size
    engine.cache.close()


@pytest.mark.parametrize("cuts", [(50, 51), (), (88,)])
def test_the_graph_for_prompts_turns_by_positions(
    nano_bundle: Callable[[str, str], Path], cuts: tuple[int, ...]
) -> None:
    """Rounding hides what gaps do to its logits. Keys of the first layer depend on nothing but token and position."""
    engine = Alone(open_engine(Bundle.read(nano_bundle("onnx", "int8-prefill")), threads=1))
    embeds, positions = engine.embed(np.random.default_rng(1).integers(0, 4000, 90)), spaced(90, 1)
    found = []
    for places in (None, positions):
        engine.truncate(0)
        run(engine, embeds, places, cuts)
        found.append({what: engine.state.buffers[0][what].copy() for what in ("key", "value")})
    plain, gaps = found
    for slot, at in enumerate(positions):
        move_positions(plain["key"], plain["value"], slot, slot + 1, slot, engine.config.text.rope_theta, by=at - slot)
    assert np.abs(plain["key"] - gaps["key"])[:, :, :90].max() <= 1e-5 * np.abs(gaps["key"]).max()
    assert np.array_equal(plain["value"][:, :, :90], gaps["value"][:, :, :90])


@pytest.mark.parametrize(("target", "quant"), [("onnx", "fp32"), ("onnx", "int8-prefill"), ("executorch", "fp32")])
def test_positions_that_are_slots_change_no_bit(
    nano_bundle: Callable[[str, str], Path], target: str, quant: str
) -> None:
    engine = Alone(open_engine(Bundle.read(nano_bundle(target, quant)), threads=1))
    embeds = engine.embed(np.random.default_rng(1).integers(0, 4000, 90))
    told = run(engine, embeds, np.arange(90), (50, 52))
    engine.truncate(0)
    assert np.array_equal(run(engine, embeds, None, (50, 52)), told)
    engine.cache.close()


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_moved_slot_turns_by_its_positions(nano_bundle: Callable[[str, str], Path], target: str) -> None:
    """Slots that move by one number, and positions by another, also of slots that stay."""
    eager = Alone(EagerEngine(Checkpoint.open("nano", note=lambda line: None).load(), max_seq_len=512))
    engine = Alone(open_engine(Bundle.read(nano_bundle(target, "fp32")), threads=1))
    embeds = eager.embed(np.random.default_rng(1).integers(0, 4000, 90))
    found = []
    for one in (engine, eager):
        one.forward(embeds, np.empty(0, np.int64), spaced(90, 4))
        before = one.cache.positions
        one.move(20, 60, 12, -30)
        one.move(14, 52, 14, 7)
        assert one.cache.positions == before[:12] + [at - 30 for at in before[20:22]] + [
            at - 23 for at in before[22:60]
        ]
        found.append(one.forward(embeds[:3], np.array([0, 2])))
        with pytest.raises(InputError, match="wanted a whole number"):
            one.move(10, 20, 5, 1.5)  # type: ignore[arg-type]
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[1]).max()
    engine.cache.close()


def test_turning_there_and_back_is_the_same_key() -> None:
    """Keys of the first layer see nothing of what stands before: those of a token at any position are known."""
    engine, there = (Alone(EagerEngine(tiny_model(), max_seq_len=64)) for _ in range(2))
    embeds, positions = engine.embed(np.arange(30)), spaced(30, 5)
    engine.forward(embeds, np.empty(0, np.int64), positions)
    engine.move(10, 30, 4, 11)
    there.forward(embeds[10:30], np.empty(0, np.int64), positions[10:30] + 11)
    got, wanted = engine.state.keys[0][:, :, 4:24], there.state.keys[0][:, :, :20]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_positions_that_cannot_be_are_refused() -> None:
    engine = Alone(EagerEngine(tiny_model(), max_seq_len=64))
    embeds, most = engine.embed(np.arange(4)), most_positions(engine.config, engine.bounds)
    assert most == POSITIONS_PER_SLOT * 64
    none = np.empty(0, np.int64)
    for wrong, error, told in (
        (np.arange(3), InputError, "positions: int64"),
        (np.arange(4.0), InputError, "positions: float64"),
        (np.arange(4) - 1, InputError, "position -1, wanted 0"),
        (np.arange(4) + most - 3, BudgetError, f"position {most}, but there are {most}"),
    ):
        with pytest.raises(error, match=told):
            engine.forward(embeds, none, wrong)
    assert engine.length == 0
    engine.forward(embeds, none, np.arange(4) + most - 4)
    with pytest.raises(BudgetError, match="keep more of"):
        engine.forward(embeds[:1], LAST)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_bundle_of_an_earlier_export_knows_slots_alone(target: str) -> None:
    bundle = Bundle.read(BUNDLES / target)
    assert not bundle.manifest.placed
    engine = Alone(open_engine(bundle, threads=1))
    assert not engine.can_place
    embeds = engine.embed(np.arange(100, 120))
    wanted = run(engine, embeds, None, (10,))
    engine.truncate(0)
    assert np.array_equal(run(engine, embeds, np.arange(20), (10,)), wanted)
    engine.truncate(0)
    with pytest.raises(InputError, match="export the model again"):
        engine.forward(embeds, LAST, np.arange(20) + 1)
    engine.forward(embeds, LAST)
    engine.move(10, 20, 8, -1)
    with pytest.raises(InputError, match="export the model again"):
        engine.forward(embeds[:1], LAST)
    engine.cache.close()


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans()),
            st.tuples(st.just("move"), st.integers(0, 9), st.integers(1, 5), st.integers(-3, 9), st.integers(0, 9)),
            st.tuples(st.just("truncate"), st.integers(0, 9)),
        ),
        max_size=15,
    )
)
def test_a_position_goes_where_its_slot_goes(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Beside a plain list: what was written, moved and cut off."""
    cache, held = Caches(None, object).new(), [-1] * 200
    length = written = 0
    for what, *how in steps:
        if what == "write":
            gaps, told = how
            follows = held[length - 1] + 1 if length else 0
            places = follows + np.cumsum(gaps) if told else follows + np.arange(len(gaps))
            with cache.writing(len(gaps), (), places if told else None):
                pass
            held[length : length + len(gaps)] = places.tolist()
            length += len(gaps)
            written = max(written, length)
        elif what == "move":
            begin, count, turn, down = how
            to = max(0, begin - down)
            if begin + count > written:
                continue
            moved = [at + turn for at in held[begin : begin + count]]
            with cache.moving(begin, begin + count, to, turn):
                pass
            held[to : to + count] = moved
            length = to + count
        elif how[0] <= length:
            length = how[0]
            cache.truncate(length)
        assert cache.positions == held[:length]
