"""Visual tokens that are left out: answers, prefixes, budgets and positions of sessions and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Alone, CountingEngine, picture, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.preprocess import preprocess_image
from penguin_edge.model.eager import EagerEngine
from penguin_edge.prompt.chat import render
from penguin_edge.runtime.core.options import SessionOptions, StreamOptions
from penguin_edge.runtime.core.prune import least_alike
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.cache import Visual, positions_of
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream

BUNDLES = Path(__file__).parents[1] / "bundles"
SHORT = SamplingOptions(max_new_tokens=8)


def session(capacity: int = 2048, **options: Any) -> tuple[Session, CountingEngine]:
    engine = CountingEngine(max_seq_len=capacity)
    return Session(engine, tiny_tokenizer(), **options), engine


def answer(of: Session | Stream, question: str, **options: Any) -> list[int]:
    return [token.id for token in of.ask(question, options=SHORT, **options)]


def moved(seed: int, step: int) -> np.ndarray:
    """A frame like the one before it but for a square."""
    out = picture(seed, 140, 168)
    out[28:56, 28 * step : 28 * step + 28] = 250
    return out


def test_an_answer_is_that_of_the_model_without_these_tokens() -> None:
    """Two pictures, without any session, cache or plan: rows cut out, positions as they were."""
    images = [picture(1, 84, 112), picture(2, 112, 84)]
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    run, _ = session(keep_visual=0.3)
    got = [token.id for token in run.converse(messages, SHORT)]
    model, config = tiny_model(), tiny_model().config
    assert model.decoder is not None and model.embedding is not None
    patches = [preprocess_image(image, config.image, 1) for image in images]
    ids = torch.tensor([tiny_tokenizer().encode_pieces(render(messages, [one.tokens for one in patches]))])
    with torch.no_grad():
        rows = [model.visual([one]) for one in patches]
        embeds = model.splice(ids, torch.cat(rows))[0]
        stays = ids[0] != config.image_token_id
        places = iter((~stays).nonzero()[:, 0].split([one.tokens for one in patches]))
        for one, features in zip(patches, rows, strict=True):
            kept = least_alike(features.numpy(), one.grid, int(0.3 * one.tokens))
            stays[next(places)[kept]] = True
        embeds, at = embeds[stays], torch.arange(len(stays))[stays]
        wanted: list[int] = []
        while len(wanted) < 8 and not (wanted and wanted[-1] in config.eos_token_ids):
            logits = model.decoder.logits(model.decoder(embeds[None], at), torch.tensor([-1]))
            wanted.append(int(logits[0, 0].argmax()))
            embeds = torch.cat((embeds, model.embedding(torch.tensor(wanted[-1:]))))
            at = torch.cat((at, at[-1:] + 1))
    assert got == wanted
    counts = [one.tokens for one in patches]
    assert run.report.encoded_tokens == sum(counts) > run.report.visual_tokens == sum(int(0.3 * n) for n in counts)
    assert run.report.prompt_tokens == ids.shape[1] - run.report.encoded_tokens + run.report.visual_tokens


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_prefixes_stay_equal_and_are_what_is_computed_anew(keep: float) -> None:
    run, engine = session(keep_visual=keep, budget=90)
    for i in range(5):
        run.push(moved(i // 3, i), float(i))
    answer(run, "What is it?", keep=True)
    assert run.report.encoded_tokens > run.report.visual_tokens and run.report.visual_tokens <= 90
    held = run.cache.keys
    engine.reset()
    answer(run, "And now?")
    assert engine.encoded_frames == 0 and run.cache.keys[: run.report.reused_tokens] == held[: run.report.reused_tokens]
    assert run.report.reused_tokens >= max(i for i, key in enumerate(held) if isinstance(key, tuple))
    keys = [key for key in run.cache.keys if key is not None]
    assert run.cache.positions == positions_of(keys)
    fresh = Alone(EagerEngine(tiny_model(), max_seq_len=2048))
    wanted = fresh.forward(run.features.embeds(keys), np.array([-1]), np.array(positions_of(keys)))
    run.cache.truncate(len(keys) - 1)
    got = engine.forward(run.cache, run.features.embeds(keys[-1:]), np.array([-1]))
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_keeping_all_changes_nothing() -> None:
    answers, keys = [], []
    for keep in (None, 1.0):
        run, _ = session(keep_visual=keep, budget=120)
        for i in range(5):
            run.push(moved(i // 3, i), float(i))
        answers.append(answer(run, "What is it?"))
        keys.append(run.cache.keys)
        assert run.report.encoded_tokens == run.report.visual_tokens
        assert run.cache.positions == list(range(run.cache.length))
    assert answers[0] == answers[1] and keys[0] == keys[1]


@settings(deadline=None, max_examples=25)
@given(
    keep=st.floats(0.01, 1.0),
    budget=st.one_of(st.none(), st.integers(2, 200)),
    frames=st.integers(0, 5),
    images=st.integers(0, 2),
    tra=st.sampled_from(["strict", "adaptive"]),
    capacity=st.sampled_from([192, 512]),
)
def test_budgets_slots_and_positions_hold(
    keep: float, budget: int | None, frames: int, images: int, tra: Any, capacity: int
) -> None:
    run, _ = session(capacity, keep_visual=keep, budget=budget, tra=tra)
    for i in range(frames):
        run.push(moved(i // 2, i), float(i))
    content = [{"type": "image", "image": picture(i, 336, 448)} for i in range(images)]
    try:
        if frames:
            answer(run, "What?")
        else:
            list(run.converse([{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}], SHORT))
    except BudgetError as error:
        assert "each takes at least one token" in str(error) or "max_seq_len" in str(error)
        return
    report = run.report
    assert report.visual_tokens <= (budget or capacity) and report.visual_tokens <= report.encoded_tokens
    assert run.cache.length <= capacity and run.cache.following <= 4 * capacity
    native = {(140, 168)} if frames else {(336, 448)}
    for visual in run.features:
        assert visual.height <= max(h for h, _ in native) and visual.width <= max(w for _, w in native)


def test_positions_may_leave_the_slots_behind() -> None:
    run, engine = session(160, keep_visual=0.25)
    content = [{"type": "image", "image": picture(1, 336, 448)}, {"type": "text", "text": "What is it?"}]
    assert list(run.converse([{"role": "user", "content": content}], SHORT))
    assert run.cache.length <= engine.bounds.max_seq_len < run.report.encoded_tokens < run.cache.following


def test_what_is_kept_is_decided_once() -> None:
    """A frame by itself, and then before one that was its key frame elsewhere."""
    run, _ = session(keep_visual=0.3)
    shown = moved(0, 1)
    run.push(shown, 0.0)
    answer(run, "What is it?")
    alone = {visual: list(run.features.numbers(visual)) for visual in run.features}
    other, _ = session(keep_visual=0.3)
    for i in range(2):
        other.push(moved(0, i), float(i))
    answer(other, "What is it?")
    behind = {visual: list(other.features.numbers(visual)) for visual in other.features}
    assert all(visual in behind and behind[visual] != numbers for visual, numbers in alone.items())
    content = [{"type": "image", "image": shown}, {"type": "text", "text": "What?"}]
    list(run.converse([{"role": "user", "content": content}], SHORT))
    run.push(moved(0, 2), 1.0)
    answer(run, "What is it?")
    for visual, numbers in alone.items():
        assert run.features.numbers(visual) == numbers
    with pytest.raises(InputError, match="known once it is encoded"):
        run.features.numbers(Visual("unknown", 28, 28, 2))


def test_a_frame_that_becomes_key_is_computed_again_to_compare_with() -> None:
    """The first frame goes, the second one is key then; what it keeps stays, and a new frame is compared with it."""
    run, engine = session(keep_visual=0.3, max_frames=2)
    for i in range(2):
        run.push(moved(0, i), float(i))
    answer(run, "What is it?")
    before = {visual: list(run.features.numbers(visual)) for visual in run.features}
    run.push(moved(0, 2), 2.0)
    engine.reset()
    answer(run, "What is it?")
    assert run.report.keys == run.report.intermediates == 1
    assert engine.encoded_frames == 2, "the new frame, and the one that it is compared with"
    assert all(run.features.numbers(visual) == numbers for visual, numbers in before.items())
    engine.reset()
    answer(run, "And now?")
    assert engine.encoded_frames == 0


def test_a_later_frame_keeps_what_its_key_frame_does_not_show() -> None:
    run, _ = session(keep_visual=0.1)
    for i in range(2):
        run.push(moved(0, i + 1), float(i))
    answer(run, "What is it?")
    key, later = (visual for visual in run.features)
    rows = []
    for step, visual in ((1, key), (2, later)):
        patches = preprocess_image(moved(0, step), run.config.image, 2, size=(visual.height, visual.width))
        features = run.engine.encode(patches.pixels[None], patches.rows, patches.cols)
        rows.append(run.engine.project(features.reshape(1, patches.tokens, 4, -1))[0])
    assert list(run.features.numbers(key)) == least_alike(rows[0], (5, 6), 3)
    assert list(run.features.numbers(later)) == least_alike(rows[1], (5, 6), 3, (rows[0], (5, 6)))
    assert list(run.features.numbers(later)) != least_alike(rows[1], (5, 6), 3), "the key frame is what decides"
    assert np.allclose(run.features[later], rows[1][list(run.features.numbers(later))], atol=1e-5)


@pytest.mark.parametrize("cache", ["recompute", "rebase"])
def test_a_stream_holds_what_is_kept_and_no_more(cache: Any) -> None:
    engine = CountingEngine(max_seq_len=700)
    run = Stream(
        engine, tiny_tokenizer(), budget=60, cache=cache, keep_visual=0.4, window_s=5.0, question_tokens=32,
        answer_tokens=32,
    )  # fmt: skip
    for i in range(20):
        run.push(moved(i // 4, i % 6), i / 2)
        keys = run.prompt_keys()
        assert run.cache.keys == keys and run.cache.positions == positions_of(keys)
        assert run.visual_tokens == sum(isinstance(key, tuple) for key in keys) <= 60
    assert run.planner.encoded_tokens > 100 > 60 >= run.stats.max_visual_tokens
    assert (run.stats.moved_tokens > 0) == (cache == "rebase") and run.stats.reencoded > 0
    assert answer(run, "What is it?") and run.report.encoded_tokens == run.planner.encoded_tokens
    run.forget_features()
    with pytest.raises(InputError, match="push a frame or ask first"):
        run.prompt_keys()
    assert answer(run, "What is it?") and run.report.reused_tokens == 0


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_bundle_of_an_earlier_export_refuses_it_and_runs_without(target: str) -> None:
    for kind in (Session, Stream):
        with pytest.raises(InputError, match="export the model again, or leave out keep_visual"):
            kind.open(BUNDLES / target, keep_visual=0.5)
    with Session.open(BUNDLES / target) as run:
        run.push(picture(0), 0.0)
        assert answer(run, "What is it?")


def test_options_that_cannot_be_are_refused() -> None:
    for wrong in (0, -1, 1.5, True, "half", float("nan")):
        for kind in (SessionOptions, StreamOptions):
            with pytest.raises(InputError, match="wanted a share above 0 and at most 1"):
                kind(keep_visual=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="take shrink='encode'"):
        StreamOptions(keep_visual=0.5, shrink="pool")
