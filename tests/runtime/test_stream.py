"""Streams: what is in the cache is what a new session would compute, and a question pays for itself alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers import Alone, CountingEngine, picture, tiny_model, tiny_tokenizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penguin_edge.errors import BudgetError, BusyError, InputError
from penguin_edge.media.preprocess import preprocess_image
from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.core.pool import pooled
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.cache import positions_of
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream

SHORT = SamplingOptions(max_new_tokens=8)


def stream(capacity: int = 1024, **options: Any) -> tuple[Stream, CountingEngine]:
    engine = CountingEngine(max_seq_len=capacity)
    return Stream(engine, tiny_tokenizer(), **options), engine


def answer(of: Session, question: str, **options: Any) -> list[int]:
    return [token.id for token in of.ask(question, options=SHORT, **options)]


def from_nothing(of: Stream) -> tuple[np.ndarray, Alone]:
    """Logits after the window, by an engine that has not seen it before, and this engine."""
    keys = of.prompt_keys()
    engine = Alone(EagerEngine(tiny_model(), max_seq_len=of.engine.bounds.max_seq_len))
    embeds = of.features.embeds(keys)
    for begin in range(0, len(keys), 100):
        piece, places = embeds[begin : begin + 100], np.array(positions_of(keys)[begin : begin + 100])
        logits = engine.forward(piece, np.full(int(begin + 100 >= len(keys)), -1), places)
    return logits[0], engine


def test_frames_are_prefilled_as_they_come_and_a_question_pays_for_itself() -> None:
    run, engine = stream()
    for i in range(5):
        run.push(picture(i), float(i))
    assert engine.encoded_frames == 5 and run.cache.length == len(run.prompt_keys())
    engine.reset()
    asked = answer(run, "What is it?")
    assert engine.encoded_frames == 0 and run.report.reused_tokens == len(run.prompt_keys())
    # The same frames at the same sizes, all at once.
    cold, _ = stream()
    plain = Session(CountingEngine(max_seq_len=1024), tiny_tokenizer())
    for i in range(5):
        plain.push(picture(i), float(i))
        cold.push(picture(i), float(i))
    assert answer(plain, "What is it?") == asked == answer(cold, "What is it?")


def test_a_question_is_rolled_back_when_the_next_frame_comes_unless_it_is_kept() -> None:
    run, engine = stream()
    run.push(picture(0), 0.0)
    answer(run, "What is it?")
    run.push(picture(1), 1.0)
    assert run.cache.length == len(run.prompt_keys())
    again, _ = stream()
    for i in range(2):
        again.push(picture(i), float(i))
    assert run.prompt_keys() == again.prompt_keys() == run.cache.keys
    before = run.planner.limits.room
    answer(run, "And now?", keep=True)
    assert run.planner.limits.room is not None and before is not None and run.planner.limits.room < before
    run.push(picture(2), 2.0)
    engine.reset()
    answer(run, "Again?")
    assert run.report.reused_tokens == len(run.prompt_keys()) and run.report.frames == 3


@pytest.mark.parametrize("shrink", ["encode", "pool"])
def test_a_full_budget_shrinks_old_frames_and_the_cache_follows(shrink: Any) -> None:
    run, engine = stream(capacity=700, budget=90, shrink=shrink, question_tokens=32, answer_tokens=32)
    for i in range(14):
        run.push(picture(i, 140, 168), i / 2)
        assert run.visual_tokens <= 90
        assert run.cache.keys == run.prompt_keys()
    assert run.stats.reencoded > 0 and run.stats.reprefilled_tokens > 0 and run.stats.max_visual_tokens <= 90
    assert (engine.encoded_frames == run.stats.encoded) and (shrink == "encode" or engine.encoded_frames == 14)
    assert sum(visual.tokens for visual in run.features) == run.visual_tokens
    for frame, planned in zip(run.frames, run.planner.plan().frames, strict=True):
        assert frame.pixels.shape == (planned.height, planned.width, 3)


def test_equal_pictures_at_two_sizes_are_each_encoded_from_enough_pixels() -> None:
    run, _ = stream(budget=260)
    for i in range(4):
        run.push(picture(i % 2, 280, 280), float(i))
    visuals = list(dict.fromkeys(key[0] for key in run.cache.keys if isinstance(key, tuple)))
    sizes: dict[str, set[int]] = {}
    for frame, visual in zip(run.frames, visuals, strict=True):
        sizes.setdefault(visual.digest.split()[0], set()).add(visual.tokens)
        assert frame.pixels.shape[:2] == (visual.height, visual.width)
    assert any(len(found) > 1 for found in sizes.values()), "the clip was to have a picture at two sizes"
    newest = visuals[-1]
    patches = preprocess_image(picture(3 % 2, 280, 280), run.config.image, 2, size=(newest.height, newest.width))
    features = run.engine.encode(patches.pixels[None], patches.rows, patches.cols)
    assert np.array_equal(run.features[newest], run.engine.project(features.reshape(1, newest.tokens, 4, -1))[0])
    assert sum(frame.pixels.nbytes for frame in run.frames) <= 260 * 4 * 588


def test_a_moved_cache_computes_changed_frames_alone() -> None:
    told = {}
    for cache in ("recompute", "rebase"):
        run, engine = stream(capacity=700, budget=250, cache=cache, window_s=5.0, question_tokens=32, answer_tokens=32)
        for i in range(20):
            run.push(picture(i, 140, 168), i / 2)
        told[cache] = run.stats
        assert engine.forwarded_tokens == run.stats.prefilled_tokens
        assert answer(run, "What is it?")
    assert told["recompute"].moved_tokens == 0 < told["rebase"].moved_tokens
    assert told["rebase"].reprefilled_tokens < told["recompute"].reprefilled_tokens / 3
    assert told["rebase"].reencoded == told["recompute"].reencoded


def test_an_engine_that_fails_in_the_middle_is_asked_for_everything_again() -> None:
    run, engine = stream(budget=60, cache="rebase", window_s=3.0)
    for i in range(6):
        run.push(picture(i), float(i))
    forward = engine.inner.forward
    engine.inner.forward = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        run.push(picture(6), 6.0)
    engine.inner.forward = forward  # type: ignore[method-assign]
    run.push(picture(7), 7.0)
    again, _ = stream(budget=60, cache="rebase", window_s=3.0)
    for i in range(4, 8):
        again.push(picture(i), float(i))
    assert run.prompt_keys() == again.prompt_keys() == run.cache.keys
    assert answer(run, "What is it?") == answer(again, "What is it?")


@pytest.mark.parametrize("cache", ["recompute", "rebase"])
def test_a_question_between_two_slices_is_about_the_window_before(cache: Any) -> None:
    options: dict[str, Any] = {
        "budget": 90,
        "cache": cache,
        "question_tokens": 32,
        "answer_tokens": 32,
        "tra": "strict",
    }
    run, whole = stream(700, **options)[0], stream(700, **options)[0]
    most = 0
    for i in range(20):
        frame, at = picture(i // 3, 280, 280), i / 2
        before, count = run.prompt_keys(), len(run.times)
        slices, seen = run.slices(frame, at), 0
        for _ in slices:
            seen += 1
            assert run.prompt_keys() == before and len(run.times) == count
            if count:
                assert answer(run, "What is it?")
                assert run.report.frames == count and run.report.reused_tokens >= len(before)
            for refused in (
                lambda frame=frame, at=at: run.push(frame, at),  # type: ignore[misc]
                lambda: run.set_budget(50),
                lambda: run.restart(),
                lambda: list(run.ask("Kept?", keep=True)),
            ):
                with pytest.raises(BusyError, match="a frame is being added"):
                    refused()
        most = max(most, seen)
        assert slices.changes == whole.push(frame, at)
        assert run.cache.keys == run.prompt_keys() == whole.prompt_keys()
    assert most >= 2, "some frame was to make another one shrink"
    assert run.stats.reencoded == whole.stats.reencoded and run.stats.frames == whole.stats.frames


def test_a_frame_that_is_given_up_between_slices_or_fails_leaves_no_trace() -> None:
    run, engine = stream(budget=90)
    run.push(picture(0, 140, 168), 0.0)
    keys = run.prompt_keys()
    slices = run.slices(picture(1, 140, 168), 1.0)
    next(slices)
    reading = run.ask("What is it?", options=SHORT)
    next(reading)
    with pytest.raises(BusyError, match="an answer is being read"):
        next(slices)
    reading.close()
    slices.close()
    encode, engine.encode = engine.encode, lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        run.push(picture(2, 140, 168), 2.0)
    engine.encode = encode  # type: ignore[method-assign]
    assert run.prompt_keys() == keys and run.times == [0.0] and run.stats.frames == 1
    run.push(picture(3, 140, 168), 3.0)
    assert run.times == [0.0, 3.0] and run.cache.keys == run.prompt_keys()


def test_the_window_moves_on() -> None:
    run, _ = stream(window_s=3.0)
    for i in range(12):
        run.push(picture(i % 5), float(i))
    assert run.times == [8.0, 9.0, 10.0, 11.0] and run.stats.given_up == {"window": 8}
    assert len(run.frames) == len(run.window) == 4 and len(run.features) == 4
    assert run.cache.length == len(run.prompt_keys())


def test_another_size_or_a_time_before_begins_anew() -> None:
    run, _ = stream()
    for i in range(3):
        run.push(picture(i), float(i))
    changes = run.push(picture(3, 112, 84), 3.0)
    assert [change.reason for change in changes] == ["size"] * 3 and run.times == [3.0]
    run.push(picture(4, 112, 84), 4.0)
    changes = run.push(picture(5, 112, 84), 1.0)
    assert [change.reason for change in changes] == ["time"] * 2 and run.times == [1.0]
    assert answer(run, "What is it?")


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    run, _ = stream(capacity=400, question_tokens=16, answer_tokens=16)
    for i in range(20):
        run.push(picture(i), float(i))
    held, frames = run.cache.length, len(run.frames)
    with pytest.raises(BudgetError, match="shorten the question"):
        answer(run, "word " * 200)
    assert (run.cache.length, len(run.frames)) == (held, frames)
    assert answer(run, "What?")
    for wrong, word in (
        ((picture(0).astype(np.float32), 30.0), "uint8"),
        ((picture(0)[:, :, 0], 30.0), "RGB"),
        ((picture(0), None), "needs the time"),
        ((picture(0), float("nan")), "time is NaN, wanted a finite number"),
        ((picture(0), "1"), 'time is "1", wanted a finite number'),
        ((picture(0)[:0], 30.0), "112x0 pixels"),
        ((None, 30.0), "a frame is NoneType"),
    ):
        with pytest.raises(InputError, match=word):
            run.push(*wrong)
    assert len(run.frames) == frames
    with pytest.raises(BudgetError):
        run.set_budget(0)
    with pytest.raises(InputError, match="known: encode, pool"):
        stream(shrink="guess")
    with pytest.raises(InputError, match="known: recompute, rebase"):
        stream(cache="guess")
    still = CountingEngine()
    still.can_move = False
    with pytest.raises(InputError, match="cannot move positions"):
        Stream(still, tiny_tokenizer(), cache="rebase")
    with pytest.raises(BudgetError, match="shorten"):
        stream(capacity=128)


def test_the_stream_waits_while_an_answer_is_read() -> None:
    run, _ = stream()
    run.push(picture(0), 0.0)
    asked = run.ask("What is it?", options=SHORT)
    first = next(asked)
    for call in (lambda: run.push(picture(1), 1.0), lambda: run.set_budget(50), run.restart):
        with pytest.raises(InputError, match="is being read"):
            call()
    rest = [token.id for token in asked]
    run.push(picture(1), 1.0)
    again, _ = stream()
    again.push(picture(0), 0.0)
    assert [first.id, *rest] == answer(again, "What is it?") and run.cache.length == len(run.prompt_keys())


def test_what_is_kept_leaves_room_for_frames() -> None:
    run, _ = stream(capacity=300, question_tokens=16, answer_tokens=8)
    run.push(picture(0), 0.0)
    for _ in range(20):
        try:
            answer(run, "What is it, and why?", keep=True)
        except BudgetError as error:
            assert "restart" in str(error) or "shorten" in str(error)
            break
    else:
        pytest.fail("all of it was kept")
    kept = len(run.turns)
    assert kept >= 1
    run.push(picture(1), 1.0)
    run.restart()
    run.push(picture(2), 2.0)
    answer(run, "What is it, and why?", keep=True)


def test_pooling_keeps_means() -> None:
    random = np.random.default_rng(0)
    grid = random.standard_normal((6 * 8, 5)).astype(np.float32)
    assert np.allclose(pooled(grid, (6, 8), (6, 8)), grid, atol=1e-6)
    halves = grid.reshape(3, 2, 4, 2, 5).mean((1, 3)).reshape(12, 5)
    assert np.allclose(pooled(grid, (6, 8), (3, 4)), halves, atol=1e-6)
    for after in itertools.product((1, 2, 4, 5), (1, 3, 7)):
        assert np.allclose(pooled(grid, (6, 8), after).mean(0), grid.mean(0), atol=1e-6)


class Streaming(RuleBasedStateMachine):
    """Anything a user may do, in any order; the cache always is what it would be from nothing."""

    @initialize(
        budget=st.sampled_from([None, 20, 60]),
        shrink=st.sampled_from(["encode", "pool"]),
        cache=st.sampled_from(["recompute", "rebase"]),
        keep=st.sampled_from([None, 1.0, 0.5, 0.2]),
    )
    def begin(self, budget: int | None, shrink: Any, cache: Any, keep: float | None) -> None:
        self.cache, self.keep = cache, keep
        self.run, self.engine = stream(
            capacity=420,
            budget=budget,
            shrink="encode" if keep else shrink,
            cache=cache,
            window_s=6.0,
            question_tokens=24,
            answer_tokens=10,
            keep_visual=keep,
        )
        self.time, self.size = 0.0, (84, 112)

    @rule(seed=st.integers(0, 3), pause=st.sampled_from([0.1, 0.5, 2.0]), many=st.integers(1, 3))
    def push(self, seed: int, pause: float, many: int) -> None:
        for i in range(many):
            self.time += pause
            self.run.push(picture(seed + i, *self.size), self.time)

    @rule(question=st.sampled_from(["What?", "Who is it, and why?"]), keep=st.booleans())
    def ask(self, question: str, keep: bool) -> None:
        try:
            list(self.run.ask(question, keep=keep and len(self.run.turns) < 2, options=SamplingOptions(4)))
        except BudgetError:
            assert len(self.run.turns)  # Without turns that were kept there is always room.

    @rule()
    def cancel(self) -> None:
        asked = self.run.ask("What?", options=SamplingOptions(8))
        next(asked)
        asked.close()

    @rule(budget=st.sampled_from([10, 40, 80]))
    def set_budget(self, budget: int) -> None:
        self.run.set_budget(budget)

    @rule(size=st.sampled_from([(84, 112), (56, 140)]))
    def another_size(self, size: tuple[int, int]) -> None:
        self.size = size

    @rule()
    def back_in_time(self) -> None:
        self.time = max(0.0, self.time - 3)

    @rule()
    def restart(self) -> None:
        self.run.restart()

    @invariant()
    def all_is_bounded_and_in_step(self) -> None:
        if not hasattr(self, "run"):
            return
        run = self.run
        count = len(run.frames)
        assert count == len(run.window) == len(run.planner.numbers) == len(run.times)
        assert [kept.number for kept in run.window] == list(run.planner.numbers)
        assert run.visual_tokens <= (run.budget or 10**9) and run.cache.length <= 420
        assert run.times == sorted(run.times)
        keys = run.prompt_keys()
        assert run.cache.keys[: len(keys)] == keys
        # Keys alone say where everything stands, in a cache that was moved as well.
        assert run.cache.positions[: len(keys)] == positions_of(keys)
        held = sum(len(run.features[one]) for one in run.features)
        assert held == run.features.rows if self.keep in (None, 1.0) else held <= run.features.rows
        assert held == run.visual_tokens == sum(isinstance(key, tuple) for key in keys)

    def teardown(self) -> None:
        if not hasattr(self, "run") or not self.run.frames:
            return
        wanted, fresh = from_nothing(self.run)
        keys = self.run.prompt_keys()
        inner = self.engine.inner
        assert isinstance(inner, EagerEngine)
        state = inner._caches.state(self.run.cache)
        # The first layer sees nothing of what stands before: its keys and values always are those from nothing.
        for name in ("keys", "values"):
            found, first = (getattr(one, name)[0][:, :, : len(keys)] for one in (state, fresh.state))
            assert (found - first).abs().max() <= 2e-5 * first.abs().max()
        if self.cache == "recompute":
            self.run.cache.truncate(len(keys) - 1)
            last, embeds = np.array(positions_of(keys)[-1:]), self.run.features.embeds(keys[-1:])
            got = self.engine.forward(self.run.cache, embeds, np.array([-1]), positions=last)[0]
            # Chunks of other lengths: sums in another order.
            assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


TestStreaming = Streaming.TestCase
TestStreaming.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
