"""Between a stream and its latency control: what frames and answers tell it, and when it chooses."""

from __future__ import annotations

import time

import pytest
from helpers import CountingEngine, picture, tiny_tokenizer

from penguin_edge.errors import BudgetError
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.latency.control import Decision, LatencyTarget
from penguin_edge.runtime.latency.cost import AXES, fit
from penguin_edge.runtime.latency.steering import Steering
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.clip import KEY


def test_the_first_choice_knows_how_many_frames_are_to_come() -> None:
    """At 200 ms for a frame, every second one of ten in a second would take all of the time."""
    cost = fit({stage: {(1.0, 1.0)[:axes]: [50.0]} for stage, axes in AXES.items()})
    for rate, stride in ((None, 1), (1.0, 1), (10.0, 4), (1000.0, 8)):
        session = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer(), budget=400)
        decisions: list[Decision] = []
        steering = Steering(session, LatencyTarget(60_000.0), cost, decisions.append, rate)
        steering.begin()
        steering.before(Frame(picture(0), 0.0))
        assert steering.control is not None and steering.control.setting.stride == steering.stride == stride, rate
        told = [one.to_json() for one in decisions]
        assert len(told) == (stride > 1)
        for one in told:
            assert (one["from"]["stride"], one["to"]["stride"]) == (1, stride) and one["predicted"] > 100
            assert one["observed"] is None and one["reason"].startswith("predicted to be slower")


def test_answers_of_before_count_as_long_as_they_would_take_now() -> None:
    cost = fit({stage: {(1.0, 1.0)[:axes]: [0.01]} for stage, axes in AXES.items()})
    session = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer())
    steering = Steering(session, LatencyTarget(60_000.0), cost, lambda decision: None)
    now, second = time.monotonic_ns(), 1_000_000_000
    for index in range(3):  # One alone would be an accident.
        frame = Frame(picture(0), float(index))
        steering.before(frame)
        session.push(frame)
        if index == 2:
            now = time.monotonic_ns()
            steering._begun = now - 10 * second
            steering._spoken.append((now - 3 * second, now - 2 * second, 1.0))
            steering._spoken.append((now - 2 * second, now - second, 2.0))
        steering.frame(now, now - second // 100, now, 0)
    control = steering.control
    assert control is not None and control.slower > 1.1
    assert control._answering == pytest.approx(min(0.15 * control.slower, 0.5))


def test_settings_are_foretold_before_the_first_frame_of_a_known_size() -> None:
    cost = fit({stage: {(1.0, 1.0)[:axes]: [0.01]} for stage, axes in AXES.items()})
    size = picture(0).shape[:2]
    told: list[Decision] = []
    with Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer()) as session:
        known = Steering(session, LatencyTarget(60_000.0), cost, told.append, 4.0, size)
        known.begin()
        control = known.control
        assert control is not None and not session.times, "before any frame, and of the engine's calls nothing is left"
        known.before(Frame(picture(0), 0.0))
        assert known.control is control and not told
    # A target that cannot be kept is said with the first frame, as without the size.
    with Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer()) as session:
        hopeless = Steering(session, LatencyTarget(1e-4), cost, told.append, 4.0, size)
        hopeless.begin()
        with pytest.raises(BudgetError, match="cannot be kept here"):
            hopeless.before(Frame(picture(0), 0.0))


def test_the_first_frame_does_not_make_more_key_frames_expected() -> None:
    """It is one whatever it shows: of a picture that stands still no other comes."""
    cost = fit({stage: {(1.0, 1.0)[:axes]: [0.01 if axes == 1 else 1.0]} for stage, axes in AXES.items()})
    with Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer(), budget=400) as session:
        steering = Steering(session, LatencyTarget(60_000.0), cost, lambda decision: None, 2.0)
        steering.begin()
        for index in range(12):
            frame = Frame(picture(0, 336, 448), index / 2)
            steering.before(frame)
            session.push(frame)
            now = time.monotonic_ns()
            steering.frame(now, now - 1_000_000, now, 0)
        assert next(one.kind for one in session.window) == KEY
        control = steering.control
        assert control is not None
        works = control._foresee([control.setting], 32)[0].works
        alone = session.last_work
        assert alone is not None
        assert {work.encoded[-1] for work in works} == {alone.encoded[-1]}, "only frames like the last ones"
