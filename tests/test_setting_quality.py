"""What a stream gives up, in answers: how questions are asked, how the worth of a setting is read, and what a run of
the control held. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_questions import Clip, Outcome, Way, ask, capped, frames_of, over, read_questions, tokens_of, window
from hypothesis import given, settings
from hypothesis import strategies as st
from setting_quality import Answers
from setting_worth import BUDGETS, FRAMES, Worth, fit, interpolated, monotone
from stream_runs import Scene, held, missed

from penguin_edge.config import PRESETS
from penguin_edge.dataset.nano.build import write_clip
from penguin_edge.media.frames import Frame
from penguin_edge.tra.keyframes import INTERMEDIATE, KEY
from penguin_edge.tra.layout import cap_size

SHARES = st.floats(0.01, 1)
ROWS = st.lists(st.floats(0, 1), min_size=len(FRAMES), max_size=len(FRAMES))
TABLES = st.lists(ROWS, min_size=len(BUDGETS), max_size=len(BUDGETS)).map(lambda rows: monotone(np.array(rows)))
STRIDES = {1: 1.0, 2: 0.8, 4: 0.6, 8: 0.4}


def worth_of(table: Any) -> Worth:
    return Worth(BUDGETS, FRAMES, tuple(tuple(row) for row in table.tolist()), STRIDES, -0.01, 0.02)


def clips(count: int, frames: int = 8, side: int = 84) -> list[list[Frame]]:
    """Clips of noise, which changes in the middle of each."""
    found = []
    for number in range(count):
        random = np.random.default_rng(number)
        halves = [random.integers(0, 256, (side, side, 3), np.uint8) for _ in range(2)]
        found.append([Frame(halves[i * 2 // frames], float(i)) for i in range(frames)])
    return found


@settings(max_examples=50, deadline=None)
@given(table=TABLES)
def test_a_table_is_made_monotone_once(table: Any) -> None:
    assert (np.diff(table, axis=0) <= 1e-6).all() and (np.diff(table, axis=1) <= 1e-6).all()
    assert np.allclose(monotone(table), table, atol=1e-6)


def test_neighbours_that_rise_are_pooled_and_the_mean_stays() -> None:
    table = np.array([[0.9, 0.5], [0.6, 0.7]])
    assert monotone(table) == pytest.approx(np.array([[0.9, 0.6], [0.6, 0.6]]))
    assert monotone(table).mean() == pytest.approx(table.mean())


@given(values=st.lists(st.floats(0, 1), min_size=3, max_size=3), share=st.floats(0.001, 2))
def test_what_is_read_lies_between_its_neighbours(values: list[float], share: float) -> None:
    shares = (1.0, 0.5, 0.125)
    found = interpolated(values, shares, share)
    at = [value for value, place in zip(values, shares, strict=True) if place >= share][-1:] or values[:1]
    below = [value for value, place in zip(values, shares, strict=True) if place <= share][:1] or values[-1:]
    assert min(at + below) - 1e-9 <= found <= max(at + below) + 1e-9
    assert [interpolated(values, shares, place) for place in shares] == pytest.approx(values)


def test_half_of_the_way_is_so_in_the_logarithm() -> None:
    assert interpolated([1.0, 0.0], (1.0, 0.25), 0.5) == pytest.approx(0.5)


@settings(max_examples=50, deadline=None)
@given(table=TABLES, budget=SHARES, frame=SHARES, less=st.floats(0.1, 1), stride=st.sampled_from([1, 2, 4, 8]))
def test_less_is_never_worth_more(table: Any, budget: float, frame: float, less: float, stride: int) -> None:
    worth = worth_of(table)
    full = worth(Way(budget, frame, stride))
    assert worth(Way(budget * less, frame, stride)) <= full + 1e-6
    assert worth(Way(budget, frame * less, stride)) <= full + 1e-6
    assert worth(Way(budget, frame, stride, cache="rebase", shrink="pool")) == pytest.approx(full + 0.01)


@settings(max_examples=20, deadline=None)
@given(table=TABLES)
def test_a_worth_is_found_again_from_what_it_says(table: Any) -> None:
    """With the strides and the differences, where the questions were answered just so."""
    wanted = worth_of(table + 0.01)
    ways = [Way(budget, frame) for budget in BUDGETS for frame in FRAMES]
    ways += [Way(budget, frame, stride) for budget in (1.0, 0.25) for frame in FRAMES for stride in (2, 4, 8)]
    real = [Way(0.5, 1.0, cache=c, shrink=s, real=True) for c in ("recompute", "rebase") for s in ("encode", "pool")]
    found = fit(
        [{way: wanted(way) for way in ways}] * 2,
        lambda way, i: way.frame,
        [{way: wanted(way) for way in real}],
    )
    for way in (*ways, *real):
        assert found(way) == pytest.approx(wanted(way), abs=1e-6)


@given(height=st.integers(84, 700), wider=st.floats(0.5, 2), share=st.floats(0.1, 1), factor=st.sampled_from([14, 28]))
def test_a_cap_is_what_a_stream_makes_of_it(height: int, wider: float, share: float, factor: int) -> None:
    size = (height, round(height * wider))
    native = tokens_of(size, factor)
    limit, planned = capped(size, share * native, factor)
    assert tokens_of(planned, factor) <= max(1, share * native) + 1e-9
    assert tokens_of(cap_size(size, limit, factor), factor) == tokens_of(planned, factor)


@settings(max_examples=60, deadline=None)
@given(
    budget=st.sampled_from(BUDGETS),
    frame=st.sampled_from(FRAMES),
    stride=st.sampled_from([1, 2, 4]),
    phase=st.integers(0, 3),
    running=st.booleans(),
    tra=st.sampled_from(["strict", "adaptive"]),
    newest=st.sampled_from([None, 1, 3]),
    kinds=st.lists(st.sampled_from([KEY, INTERMEDIATE]), min_size=24, max_size=24),
)
def test_a_window_keeps_its_budget_and_shows_the_newest_frame(
    budget: float, frame: float, stride: int, phase: int, running: bool, tra: str, newest: int | None, kinds: list[str]
) -> None:
    way = Way(budget, frame, stride, tra, newest=newest, running=running)
    clip, phase = Clip.of(clips(3), 28), phase % stride
    seen = clip.seen(way, phase)
    assert [one.time for one in seen] == [float(i) for i in range(-16 * running + phase, 8, stride)]
    plan = window(PRESETS["nano"], clip, phase, kinds[: len(seen)], way)
    assert len(plan.frames) == len(clip.frames[phase::stride])
    assert plan.total_tokens <= clip.budget(way) and plan.frames[-1].tokens > 0
    assert max(one.tokens for one in plan.frames) <= max(1, frame * 9 + 0.01)
    assert sum(one.tokens > 0 for one in plan.frames) <= (newest or len(plan.frames))


def test_windows_answer_as_real_streams_do(tmp_path: Path) -> None:
    """Right or wrong; and a stride asks in each of its phases."""
    from penguin_edge.commands.common import open_model

    (tmp_path / "videos").mkdir()
    lines = []
    for number, frames in enumerate(clips(3)):
        write_clip(tmp_path / "videos" / f"{number}.mp4", [frame.pixels for frame in frames])
        asked = {"from": "human", "value": "<video>\nWhen does the scene change?"}
        turns = [asked, {"from": "gpt", "value": "4.0s"}]
        lines.append({"id": str(number), "video": [f"videos/{number}.mp4"], "conversations": turns, "tolerance": 1.0})
    (tmp_path / "annotations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    engine, tokenizer = open_model("nano", threads=1, max_seq_len=2048)
    questions = read_questions(tmp_path)
    assert [len(frames_of(question, engine.config)) for question in questions] == [8, 8, 8]
    planned = [Way(), Way(0.25), Way(0.5, 4 / 9), Way(stride=4), Way(newest=3)]
    streams = [Way(way.budget, way.frame, way.stride, newest=way.newest, real=True) for way in planned]
    found = ask(engine, tokenizer, questions, [*planned, *streams])
    for way, other in zip(planned, streams, strict=True):
        assert found[way] == found[other], way
    assert found[Way()].tokens == [72.0] * 3 and found[Way(newest=3)].frames == [3.0] * 3
    assert {4 * value for value in found[Way(stride=4)].right} <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_a_difference_is_that_of_the_same_questions() -> None:
    assert over([1, 0, 1, 1], [0, 0, 1, 1])[0] == pytest.approx(0.25)
    assert over([1, 0], [1, 0]) == [0.0, 0.0, 0.0]


def test_neighbours_give_up_one_step_less_of_one_thing() -> None:
    ways = [Way(budget, frame, stride) for budget in (1.0, 0.707) for frame in FRAMES[:2] for stride in (1, 2)]
    answers = Answers("clips", ["a"], [1.0], {way: Outcome([1.0], [9.0], [8.0]) for way in ways})
    assert answers.neighbours(Way()) == {}
    assert answers.neighbours(Way(0.707, FRAMES[1], 2)) == {
        "budget": Way(1.0, FRAMES[1], 2),
        "frame": Way(0.707, 1.0, 2),
        "stride": Way(0.707, FRAMES[1], 1),
    }


def decision(at: float, before: int, after: int) -> dict[str, Any]:
    both = ({"budget": budget, "frame_tokens": 36, "stride": 1} for budget in (before, after))
    return {"time": at, **dict(zip(("from", "to"), both, strict=True))}


@given(times=st.lists(st.floats(0, 25), max_size=6).map(sorted), last=st.floats(1, 25))
def test_what_was_held_adds_up_to_the_last_seconds(times: list[float], last: float) -> None:
    scene = Scene(Path("clip.mp4"), (168, 168), 8, 4.0, 28, 25.0)
    decisions = [decision(at, 288 - i, 287 - i) for i, at in enumerate(times)]
    found = held({"decisions": decisions, "seconds": 25.0, "budget": 288}, scene, last)
    assert sum(share for _, share in found) == pytest.approx(1)
    assert found[-1][0]["budget"] == 288 - len([at for at in times if at < 25])


def test_a_setting_without_a_decision_is_the_full_one() -> None:
    scene = Scene(Path("clip.mp4"), (168, 168), 8, 4.0, 28, 25.0)
    [(setting, share)] = held({"decisions": [], "seconds": 25.0, "budget": 288}, scene, 10.0)
    assert (setting, share) == ({"budget": 288, "frame_tokens": 36, "stride": 1}, 1.0)
    assert scene.way(setting, "strict", 25) == Way(1.0, 25 / 36, tra="strict")
    assert scene.way(setting | {"cache": "rebase"}, "strict", 25).real


def test_a_deadline_is_missed_by_age_by_first_token_and_by_being_pushed_out() -> None:
    line = {
        "frames": [{"time": at, "age_ms": age} for at, age in ((1.0, 50.0), (2.0, 5.0), (3.0, 5.0))],
        "questions": [{"time": 2.0, "first_token_ms": 20.0}],
        "dropped": [{"time": 2.5, "reason": "queue"}, {"time": 2.6, "reason": "rate"}],
    }
    assert missed({"timeline": line}, 10.0) == pytest.approx(60)
    assert missed({"timeline": line}, 10.0, begin=2.9) == 0
    assert missed({"timeline": line}, 10.0, begin=9.0) is None
