"""What is foretold of the next frames is what they then make a real stream do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers import CountingEngine, picture, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.runtime.core.options import FOLLOWS
from penguin_edge.runtime.latency.forecast import Around, Arrivals, Setting, forecast
from penguin_edge.runtime.latency.steering import around
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.clip import INTERMEDIATE, KEY, KeyFrameDetector
from penguin_edge.tra.stream import Limits, StreamPlanner

SIZE = (280, 392)


def stream_of(**options: Any) -> Stream:
    return Stream(CountingEngine(max_seq_len=2048), tiny_tokenizer(), **options)


def kinds_of(count: int) -> list[str]:
    """Labels of the frames that `push` shows."""
    detector = KeyFrameDetector("fast", stream_of().config.tra)
    return [detector.push(picture(index // 6, *SIZE)).kind for index in range(count)]


def push(stream: Stream, index: int) -> None:
    stream.push(picture(index // 6, *SIZE), float(index))


@pytest.mark.parametrize("cache", ["recompute", "rebase"])
@pytest.mark.parametrize(("shrink", "keep"), [("encode", None), ("pool", None), ("encode", 0.3)])
@pytest.mark.parametrize("begin", [1, 7, 40])
@pytest.mark.parametrize("choice", [0, 1])
def test_the_next_frames_are_foretold(cache: Any, shrink: Any, begin: int, choice: int, keep: float | None) -> None:
    count = 24
    kinds = kinds_of(begin + count)
    stream = stream_of(budget=400, cache=cache, shrink=shrink, window_s=30.0, keep_visual=keep)
    setting = Setting((400, 280)[choice], (60, 30)[choice], 1, cache, shrink)
    stream.set_budget(setting.budget)
    stream.frame_tokens = setting.frame_tokens
    for index in range(begin):
        push(stream, index)
    before = stream.planner.plan()
    arrivals = Arrivals(SIZE, 1.0, kinds[begin:])
    (found,) = forecast(stream.planner, [setting], arrivals, around(stream), frames=count, filling=0)
    assert stream.planner.plan() == before
    tokens = []
    for index, work in zip(range(begin, begin + count), found.works, strict=True):
        push(stream, index)
        real = stream.last_work
        assert real is not None
        tokens.append(stream.visual_tokens)
        assert work.pixels == real.pixels
        # Calls for frames of one size come in any order, and frames that differ in size share none.
        assert sorted(work.encoded) == sorted(real.encoded)
        # Text of time stamps differs by a token or two, and what stands before the place of a change stays.
        frames = len(stream.times)
        assert abs(work.prefilled - real.prefilled) <= 12 + 2 * frames, (index, work, real)
        assert abs(work.prefilled + work.past - stream.cache.length) <= 12 + 2 * frames
        assert cache == "recompute" or (abs(work.moved - real.moved) <= 12 + 2 * frames and work.pieces == real.pieces)
    assert found.tokens == pytest.approx(sum(tokens) / count)


@given(
    budget=st.integers(1, 900),
    frame_tokens=st.integers(1, 200),
    stride=st.sampled_from([1, 2, 4, 8]),
    interval=st.floats(1e-3, 1e5),
    kinds=st.lists(st.sampled_from([KEY, INTERMEDIATE]), min_size=1, max_size=6),
    window=st.sampled_from([1.0, 60.0, 86_400.0]),
    pushed=st.integers(0, 30),
)
def test_any_setting_is_foretold_within_its_budget(
    budget: int,
    frame_tokens: int,
    stride: int,
    interval: float,
    kinds: list[str],
    window: float,
    pushed: int,
) -> None:
    planner = StreamPlanner(Limits(900, 1500, window), tag_tokens=9)
    for index in range(pushed):
        planner.push(kinds[index % len(kinds)], SIZE, index * interval)
    was = planner.plan()
    settings = [Setting(budget, frame_tokens, stride, cache) for cache in FOLLOWS]
    arrivals, around = Arrivals(SIZE, interval, kinds), Around(5, 4, 2)
    both = forecast(planner, settings, arrivals, around)
    assert both == [one for setting in settings for one in forecast(planner, [setting], arrivals, around)]
    assert planner.plan() == was and planner.limits == Limits(900, 1500, window)
    for found in both:
        assert 1 <= found.tokens <= budget and len(found.works) == 32
        assert all(work.prefilled >= 1 and work.past >= 0 and work.encoded for work in found.works)
        assert found.past <= 5 + 1500


def test_a_copy_goes_its_own_way() -> None:
    planner = StreamPlanner(Limits(300))
    for index in range(9):
        planner.push(KEY, SIZE, float(index))
    other = planner.copy()
    assert other.plan() == planner.plan() and other.latest == planner.latest == 8.0
    was = planner.plan()
    other.set_limits(replace(other.limits, budget=40))
    other.push(KEY, SIZE, 9.0)
    assert planner.plan() == was and other.plan() != was
