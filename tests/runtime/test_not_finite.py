"""NaN and infinity: none of it is told as an answer, and none of it outlives what brought it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Alone, CountingEngine, picture, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import PenguinError
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.core.answer import UnusablePicture
from penguin_edge.runtime.core.sampling import Sampler, SamplingOptions
from penguin_edge.runtime.engines.base import F32, I64
from penguin_edge.runtime.engines.cache import Cache, Key
from penguin_edge.runtime.engines.executorch import ExecutorchEngine
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream

GREEDY = SamplingOptions(max_new_tokens=6)
DRAWN = SamplingOptions(max_new_tokens=6, temperature=0.8, top_k=20, top_p=0.9, seed=4)
BAD = (np.nan, np.inf, -np.inf)
CLAMPED = float(np.finfo(np.float32).max)
"""What quantized linears of XNNPACK make of them."""
LAST = np.array([-1])


class Poisoned(CountingEngine):
    """An engine whose numbers are not finite when it is told so."""

    def __init__(self) -> None:
        super().__init__(max_seq_len=512)
        self.logits = self.features = 0.0
        """What is added to one of them."""
        self.after = 0
        """Calls of `forward` that are still right."""

    def forward(
        self, cache: Cache, embeds: F32, logit_index: I64, keys: Sequence[Key] = (), positions: I64 | None = None
    ) -> F32:
        # What is not finite lies in the cache, too, as it would in an engine.
        self.after -= 1
        bad = self.logits if self.after < 0 else 0.0
        out = super().forward(cache, embeds + np.float32(bad), logit_index, keys, positions)
        if bad:
            out[:, 7] += np.float32(bad)
        return out

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32:
        out = super().encode(pixels, rows, cols)
        out[-1, 0, 0] += np.float32(self.features)
        return out


@given(
    bad=st.sampled_from((*BAD, CLAMPED, -CLAMPED)),
    at=st.lists(st.integers(0, 49), min_size=1, max_size=50),
    options=st.sampled_from([GREEDY, DRAWN, SamplingOptions(temperature=1e-300), SamplingOptions(temperature=1e300)]),
)
def test_no_token_follows_from_numbers_that_are_none(bad: float, at: list[int], options: SamplingOptions) -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    assert 0 <= Sampler(options).pick(logits) < 50
    logits[at] = bad
    with pytest.raises(PenguinError, match=rf"^{len(set(at))} of 50 logits are NaN or infinite.*penguin-edge verify"):
        Sampler(options).pick(logits)


def answers(of: Session, how: str, options: SamplingOptions) -> list[int]:
    if how == "converse":
        image = {"type": "image", "image": picture(5)}
        message = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
        return [token.id for token in of.converse([message], options)]
    return [token.id for token in of.ask("What?", options=options)]


def make(kind: str, engine: Any) -> Session:
    made = Stream(engine, tiny_tokenizer()) if kind == "stream" else Session(engine, tiny_tokenizer())
    for i in range(3):
        made.push(picture(i), float(i))
    return made


@pytest.mark.parametrize("how", ["session", "stream", "converse"])
@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("bad", "after"), [(np.nan, 0), (np.inf, 2), (-np.inf, 1)])
def test_an_answer_ends_with_an_error_and_the_next_one_is_right(
    how: str, options: SamplingOptions, bad: float, after: int
) -> None:
    engine = Poisoned()
    run, fresh = make(how, engine), make(how, EagerEngine(tiny_model(), max_seq_len=512))
    right = answers(fresh, how, options)
    assert answers(run, how, options) == right
    engine.logits, engine.after = bad, after
    with pytest.raises(PenguinError, match="logits are NaN or infinite"):
        answers(run, how, options)
    assert run.report.finish_reason == "error" and run.report.token_ids == right[: len(run.report.token_ids)]
    engine.logits = 0.0
    assert answers(run, how, options) == right and run.report.finish_reason in ("stop", "length")
    run.push(picture(9), 9.0)
    fresh.push(picture(9), 9.0)
    assert answers(run, how, options) == answers(fresh, how, options)


def test_features_that_are_not_finite_are_never_kept() -> None:
    engine = Poisoned()
    run = Session(engine, tiny_tokenizer())
    content = [{"type": "image", "image": picture(i)} for i in range(3)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
    engine.features = np.nan
    with pytest.raises(UnusablePicture, match="1 of the pictures or frames") as told:
        list(run.converse(messages, GREEDY))
    # Only the last picture of the batch.
    assert len(told.value.visuals) == 1 and len(run.features) == 2 and run.report.finish_reason == "error"
    engine.features = 0.0
    fresh = Session(EagerEngine(tiny_model(), max_seq_len=512), tiny_tokenizer())
    right = [token.id for token in fresh.converse(messages, GREEDY)]
    assert [token.id for token in run.converse(messages, GREEDY)] == right
    assert run.features.rows == sum(len(run.features[one]) for one in run.features)


@pytest.mark.parametrize("cache", ["recompute", "rebase"])
def test_a_stream_goes_on_without_a_frame_that_cannot_be_used(cache: Any) -> None:
    engine = Poisoned()
    run = Stream(engine, tiny_tokenizer(), cache=cache, window_s=4.0)
    fresh = Stream(EagerEngine(tiny_model(), max_seq_len=512), tiny_tokenizer(), window_s=4.0)
    for i in range(8):
        engine.features = np.inf if i in (0, 5) else 0.0
        if i in (0, 5):
            with pytest.raises(UnusablePicture):
                run.push(picture(i), float(i))
        else:
            run.push(picture(i), float(i))
            fresh.push(picture(i), float(i))
        assert run.times == [float(at) for at in range(max(0, i - 4), i + 1) if at not in (0, 5)]
        assert run.cache.length == len(run.prompt_keys())
    assert run.stats.given_up["unusable"] == 2
    if cache == "recompute":
        assert answers(run, "stream", GREEDY) == answers(fresh, "stream", GREEDY)


def test_a_live_stream_tells_of_it_and_goes_on() -> None:
    engine = Poisoned()
    with Live(Stream(engine, tiny_tokenizer())) as live:
        live.push(picture(0), 0.0)
        live.wait()
        engine.features = np.nan
        live.push(picture(1), 1.0)
        with pytest.raises(UnusablePicture, match="NaN or infinite"):
            live.wait()
        engine.features, engine.logits = 0.0, np.nan
        with pytest.raises(PenguinError, match="logits are NaN"):
            list(live.ask("What?", options=GREEDY))
        engine.logits = 0.0
        live.push(picture(2), 2.0)
        live.wait()
        fresh = Stream(EagerEngine(tiny_model(), max_seq_len=512), tiny_tokenizer())
        for i in (0, 2):
            fresh.push(picture(i), float(i))
        assert [token.id for token in live.ask("What?", options=GREEDY)] == answers(fresh, "stream", GREEDY)
        assert live.stats.dropped == {"error": 1} and live.stats.processed == 2


ENGINES = [
    "eager",
    "onnx fp32",
    "executorch fp32",
    "executorch int4",
    pytest.param("onnx int4", marks=pytest.mark.slow),
    pytest.param("executorch fp16", marks=pytest.mark.slow),
    pytest.param("onnx int8-prefill", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", ENGINES)
def test_what_was_cut_off_the_cache_is_never_seen_again(nano_bundle: Callable[[str, str], Path], kind: str) -> None:
    """Not after a truncation to any length, not at any distance, not by one position or a chunk."""

    def opened() -> Alone:
        if kind == "eager":
            return Alone(EagerEngine(Checkpoint.open("nano", note=lambda line: None).load(), max_seq_len=512))
        return Alone(open_engine(Bundle.read(nano_bundle(*kind.split())), threads=1))

    clean, engine = opened(), opened()
    ids = np.random.default_rng(0).integers(0, 4000, 100)
    embeds = engine.embed(ids)
    lengths = ((0, 1), (0, 7), (3, 2), (5, 60), (40, 1), (63, 1), (64, 3), (0, 2), (30, 20))
    for bad, (keep, count) in zip(BAD * 3, lengths, strict=True):
        for one in (clean, engine):
            one.truncate(0)
            if keep:
                one.forward(embeds[:keep], np.empty(0, np.int64))
        # A whole chunk of it, and single values, which spread over what is computed from them.
        poison = np.full_like(embeds[:90], bad)
        engine.forward(poison, LAST)
        engine.truncate(keep)
        single = embeds[:90].copy()
        single[::7, 3] = bad
        engine.forward(single, np.empty(0, np.int64))
        engine.truncate(keep)
        for one in (clean, engine):
            rows = [one.forward(embeds[keep : keep + count], LAST)]
            rows += [one.forward(embeds[i : i + 1], LAST) for i in range(keep + count, keep + count + 3)]
            if one is clean:
                wanted = np.concatenate(rows)
        assert np.array_equal(np.concatenate(rows), wanted), (bad, keep, count)


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_numbers_that_are_none_come_out_as_such(nano_bundle: Callable[[str, str], Path], kind: str) -> None:
    """Whatever the graph rounds on the way: no engine makes a likely token of them."""
    engine = Alone(open_engine(Bundle.read(nano_bundle(*kind.split())), threads=1))
    embeds = engine.embed(np.arange(100, 130))
    for bad in BAD:
        for count in (1, 30):
            engine.truncate(0)
            wrong = embeds[:count].copy()
            wrong[count // 2] = bad
            with pytest.raises(PenguinError, match="logits are NaN or infinite"):
                Sampler(GREEDY).pick(engine.forward(wrong, LAST)[0])


@pytest.mark.parametrize("kind", ["onnx fp32", "executorch fp32"])
def test_what_is_moved_is_kept_and_what_was_bad_is_not(nano_bundle: Callable[[str, str], Path], kind: str) -> None:
    """Positions above the end of the cache may be moved down: they are not to be cleared with what is bad."""
    bundle = Bundle.read(nano_bundle(*kind.split()))
    engine, clean = (Alone(open_engine(bundle, threads=1)) for _ in range(2))
    embeds = engine.embed(np.random.default_rng(1).integers(0, 4000, 60))
    found = []
    for one in (clean, engine):
        one.forward(embeds[:40], np.empty(0, np.int64))
        if one is engine:
            one.forward(np.full_like(embeds[:10], np.nan), np.empty(0, np.int64))
        # What a stream does when a frame shrinks: 10 … 20 becomes 10 … 14, and 20 … 40 follows.
        one.truncate(10)
        one.forward(embeds[40:44], np.empty(0, np.int64))
        one.move(20, 40, 14)
        found.append(one.forward(embeds[44:47], np.array([0, 2])))
    assert np.isfinite(found[0]).all() and np.array_equal(found[0], found[1])
    # NaN that was moved into the cache is NaN in the answer, and gone with it.
    engine.truncate(10)
    engine.forward(np.full_like(embeds[:10], np.nan), np.empty(0, np.int64))
    engine.move(12, 20, 4)
    assert not np.isfinite(engine.forward(embeds[:1], LAST)).any()
    for one in (clean, engine):
        one.truncate(0)
        found.append(one.forward(embeds[:5], LAST))
    assert np.array_equal(found[2], found[3])


def test_a_program_that_does_not_name_its_buffers_is_loaded_again(
    nano_bundle: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier exports left it: nothing can be cleared in it."""
    monkeypatch.setattr(ExecutorchEngine, "can_move", False)
    engine = Alone(open_engine(Bundle.read(nano_bundle("executorch", "fp32")), threads=1))
    embeds = engine.embed(np.arange(20))
    want = engine.forward(embeds, LAST)
    with pytest.raises(PenguinError, match="its cache was emptied"):
        engine.forward(embeds * np.nan, LAST)
    assert engine.length == 0 and np.array_equal(engine.forward(embeds, LAST), want)


def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    """Weights that are not numbers: said, and not answered with exclamation marks."""
    checkpoint = Checkpoint.open("nano", note=lambda line: None)
    folder = Path(checkpoint.tokenizer).parent
    broken = tmp_path / "model"
    broken.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight") and "vision" not in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    command = [sys.executable, "-m", "penguin_edge", "run", str(broken), "--prompt", "What is it?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "!!!" not in done.stdout
    assert "Traceback" not in done.stderr and "NaN" in done.stderr
