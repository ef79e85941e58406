"""The latency controller on a simulated machine, whose speed is ours to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import CountingEngine, picture, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penguin_edge.bundle.contract import Bounds
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.runtime.core.report import Work
from penguin_edge.runtime.live.control import KEPT, Decision, Device, LatencyControl, LatencyTarget
from penguin_edge.runtime.live.control import settings as all_settings
from penguin_edge.runtime.live.cost import fit
from penguin_edge.runtime.live.steering import choices
from penguin_edge.runtime.live.steering import device as device_of
from penguin_edge.runtime.stream import Stream

SIDES = [4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0]
COST = fit(
    {
        "preprocess": {(x, p): [0.1 + 1e-5 * x + 1e-3 * p] for x in (3e3, 4e5) for p in (16.0, 1600.0)},
        "encode": {(s * s, b): [2 + b * (0.2 * s**2 + 1e-4 * s**4)] for s in SIDES for b in (1.0, 4.0)},
        "project": {(x,): [0.2 + 0.01 * x] for x in (4.0, 576.0)},
        "prefill": {(n, past): [5 + n + 2e-4 * n * past] for n in (1.0, 256.0) for past in (0.0, 4096.0)},
        "decode": {(x,): [20 + 0.005 * x] for x in (0.0, 4096.0)},
        "move": {(x,): [0.01 * x] for x in (0.0, 4096.0)},
    }
)
DEVICE = Device(Bounds(max_seq_len=4096, max_chunk=256), 2, 9, 24, False, pixels=391 * 784, floor_tokens=24, frames=120)
CHOICES = all_settings(391, 24, 2048)


def control(first: float = 1300.0, frame: float | None = 1000.0) -> LatencyControl:
    return LatencyControl(LatencyTarget(first, frame), COST, DEVICE, CHOICES)


def simulate(
    run: LatencyControl, speed: Callable[[float], float], seconds: float, noise: float = 0.1, seed: int = 0
) -> list[tuple[float, float]]:
    """Two frames a second, every sixth of them key, a question every 2 s; (time, what a key frame took)."""
    random = np.random.default_rng(seed)
    keys = []
    for i in range(int(2 * seconds)):
        now, setting = i / 2, run.setting
        if i % setting.stride:
            continue
        key = i % 6 == 0
        small = Work(391 * 784, ((1, 4 * 24),), 24 + 9, run.window(setting))
        work = run.costliest(setting) if key else small
        factor = speed(now) * float(random.uniform(1 - noise, 1 + noise))
        engine, took = run.engine_ms(work) * factor, (run.engine_ms(work) + 6.0) * factor
        if key:
            keys.append((now, took))
        run.observe_frame(work, took, engine)
        if i % 4 == 0:
            past = run.window(setting)
            question = COST.prefill_ms(24, past, DEVICE.bounds) * speed(now)
            run.observe_answer(past, 24, question * float(random.uniform(1 - noise, 1 + noise)))
        run.decide(now)
    return keys


def test_settings_ask_less_and_less() -> None:
    run = control()
    costs = [run.predicted(setting) for setting in CHOICES]
    assert all(b.frame <= a.frame and b.first <= a.first and b.token <= a.token for a, b in pairwise(costs))
    assert CHOICES[0].frame_tokens == 391 and CHOICES[-1].stride == 8 and CHOICES[-1].budget == 96
    # In the stated order: frames, budget, drops.
    steps = [(b.frame_tokens < a.frame_tokens, b.budget < a.budget, b.stride > a.stride) for a, b in pairwise(CHOICES)]
    assert steps == [(True, False, False)] * 3 + [(False, True, False)] * 5 + [(False, False, True)] * 3


def test_a_steady_machine_is_left_alone() -> None:
    run = control()
    begun = run.index
    keys = simulate(run, lambda t: 1.0, 300)
    assert abs(run.index - begun) <= 1 and len(run.decisions) <= 2
    assert np.mean([took > 1000 for _, took in keys]) <= 0.01


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_it_recovers_within_five_seconds_from_a_step_and_returns(factor: float) -> None:
    run = control()
    begun = run.index
    keys = simulate(run, lambda t: factor if 60 <= t < 180 else 1.0, 300)
    late = [now for now, took in keys if took > 1000]
    assert all(60 <= now <= 65 for now in late), late
    assert max(CHOICES.index(d.after) for d in run.decisions) > begun
    assert abs(run.index - begun) <= 1, "the old speed is there again, and the old setting is not"


@settings(max_examples=40, deadline=None)
@example(seed=895, noise=0.3, slope=0.0, level=1.0)  # 9 changes once
@given(
    seed=st.integers(0, 1000),
    noise=st.sampled_from([0.0, 0.1, 0.3]),
    slope=st.floats(0, 2),
    level=st.floats(0.5, 3),
)
def test_it_never_swings(seed: int, noise: float, slope: float, level: float) -> None:
    """A ramp to any level, with noise: few changes once it is flat, and no quick turns back."""
    run = control()
    simulate(run, lambda t: min(1 + slope * t / 30, max(level, 1.0)), 400, noise, seed)
    flat = [decision for decision in run.decisions if decision.time > 150]
    assert len(flat) <= 8
    rises = [d for d in run.decisions if d.reason == "room to spare"]
    assert all(b.time - a.time >= 3.0 for a, b in pairwise(rises))


def test_what_cannot_be_kept_is_said_at_once() -> None:
    with pytest.raises(BudgetError, match=r"\d+ ms to a first token, \d+ ms for a frame"):
        control(first=20.0)
    with pytest.raises(BudgetError, match="frames within 1 ms"):
        control(frame=1.0)
    for wrong in (0.0, -5.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"first_token_ms is .*, wanted a finite number and above 0"):
            LatencyTarget(wrong)


def test_decisions_are_told_and_bounded() -> None:
    told: list[Decision] = []
    run = LatencyControl(LatencyTarget(1300.0, 1000.0), COST, DEVICE, CHOICES, told.append)
    simulate(run, lambda t: 1.0 if int(t / 40) % 2 else 6.0, 400)
    assert told == list(run.decisions) and told and run.decisions.maxlen == KEPT
    data = told[0].to_json()
    assert {"time", "from", "to", "predicted", "observed", "reason"} == data.keys()
    assert data["from"]["budget"] >= data["to"]["budget"]


def test_recomputing_costs_the_whole_window() -> None:
    moving = control()
    run = LatencyControl(LatencyTarget(60_000.0), COST, replace(DEVICE, recompute=True), CHOICES)
    setting = CHOICES[0]
    more = run.predicted(setting).frame - moving.predicted(setting).frame
    assert more > 0.7 * COST.prefill_ms(run.window(setting), 0, DEVICE.bounds)


@pytest.mark.parametrize("cache", ["recompute", "rebase"])
def test_the_costliest_frame_of_a_real_stream_is_foreseen(cache: Any) -> None:
    """What frames make the engine do, priced by the same model: 95 of 100 cost no more, 98 at most half more."""
    engine = CountingEngine(max_seq_len=2048)
    for index in range(2):
        session = Stream(engine, tiny_tokenizer(), budget=400, cache=cache)
        device, setting = device_of(session, (280, 392)), choices(session, (280, 392), 400)[index]
        session.set_budget(setting.budget)
        session.frame_tokens = setting.frame_tokens
        run = LatencyControl(LatencyTarget(1e9), COST, device, [setting])
        costs, windows = [], []
        for i in range(60):
            session.push(picture(i // 6, 280, 392), float(i))
            run.device = device_of(session, (280, 392))
            assert session.last_work is not None
            costs.append(run.engine_ms(session.last_work))
            windows.append(session.cache.length)
        foreseen = run.engine_ms(run.costliest(setting))
        assert np.quantile(costs, 0.95) <= foreseen <= 4 * max(costs)
        assert np.quantile(costs, 0.98) <= 1.5 * foreseen
        assert 0.8 * max(windows) <= run.window(setting) <= 1.5 * max(windows)


def test_tokens_per_second_are_kept_by_a_smaller_window() -> None:
    free = control(first=60_000.0, frame=None)
    run = LatencyControl(LatencyTarget(60_000.0, None, 35.0), COST, DEVICE, CHOICES)
    assert run.predicted(run.setting).token <= 1e3 / 35 < free.predicted(free.setting).token
    with pytest.raises(BudgetError, match=r"to give 48.* tokens per second"):
        LatencyControl(LatencyTarget(60_000.0, None, 60.0), COST, DEVICE, CHOICES)
    for _ in range(8):
        run.observe_answer(run.window(run.setting), 24, 80.0, 2 * run.predicted(run.setting).token)
    assert (found := run.decide(10.0)) is not None and found.after.budget < found.before.budget


def test_frames_that_wait_for_answers_leave_less_time_for_themselves() -> None:
    run = control(first=60_000.0, frame=2000.0)
    begun = run.index
    work = run.costliest(run.setting)
    for now in range(3):
        run.observe_frame(work, run.engine_ms(work) + 5, run.engine_ms(work), 900.0)
        run.decide(float(now))
    assert run.index > begun and run.predicted(run.setting).frame <= 2000 - 900
    # A wait that leaves nothing is not made good by asking for nothing.
    stuck = control(first=60_000.0, frame=2000.0)
    for now in range(100):
        stuck.observe_frame(work, stuck.engine_ms(work) + 5, stuck.engine_ms(work), 1e6)
        stuck.decide(float(now))
    assert stuck.predicted(stuck.setting).frame > 500
    # Frames that wait for frames: fewer of them are taken.
    busy = control(first=60_000.0, frame=2000.0)
    for now in range(3):
        busy.observe_frame(work, busy.engine_ms(work) + 5, busy.engine_ms(work), queued_ms=3000.0)
        busy.decide(float(now))
    assert busy.setting.stride >= 2


def test_nothing_is_given_up_for_nothing() -> None:
    """Where even the least is too much, the best of those that take as long is kept."""
    run = control(frame=90.0)
    for now in range(20):
        work = run.costliest(run.setting)
        run.observe_frame(work, 3 * run.engine_ms(work) + 5, 3 * run.engine_ms(work))
        run.decide(float(now))
    least = run.predicted(CHOICES[-1])
    assert run.predicted(run.setting).frame <= 1.1 * least.frame and run.setting.stride == 1
    assert run.setting.budget > 2 * CHOICES[-1].budget


@pytest.mark.parametrize("slow", [0, 2])
def test_one_slow_frame_is_no_reason(slow: int) -> None:
    """The very first one is none, either."""
    run = control()
    work = run.costliest(run.setting)
    for now in range(40):
        factor = 20 if now % 5 == slow else 1
        late = 5000.0 if now % 5 == slow + 1 else 0.0  # for its turn, after the slow one
        run.observe_frame(work, (run.engine_ms(work) + 5) * factor, run.engine_ms(work) * factor, queued_ms=late)
        assert run.decide(float(now)) is None or run.decisions[-1].reason == "room to spare"


def test_what_takes_time_whatever_the_size_is_no_slowness() -> None:
    """A small frame that takes five times as long as its work says nothing of large ones."""
    run = control()
    begun = run.index
    small = Work(391 * 784, ((1, 4 * 24),), 24 + 9, 1000)
    for now in range(40):
        run.observe_frame(small, 5 * run.engine_ms(small), run.engine_ms(small))
        run.decide(float(now))
    assert run.index <= begun + 1 and run.setting.stride == 1
    grown = run.predicted(CHOICES[0], corrected=True).frame - run.predicted(CHOICES[0]).frame
    assert grown < 5 * run.engine_ms(small)


def test_what_waking_up_takes_is_no_slowness() -> None:
    """Between frames the engine sleeps: it is told of small frames as of large ones, once."""
    awake = replace(COST, tables={**COST.tables, "wake": fit({"wake": {(0.0,): [30.0]}}).tables["wake"]})
    run, plain = LatencyControl(LatencyTarget(1300.0, 1000.0), awake, DEVICE, CHOICES), control()
    small = Work(391 * 784, ((1, 4 * 24),), 24 + 9, 1000)
    for _ in range(40):
        run.observe_frame(small, plain.engine_ms(small) + 35, plain.engine_ms(small) + 30)
        run.observe_answer(1000, 24, COST.prefill_ms(24, 1000, DEVICE.bounds) + 30)
    assert run.slower == pytest.approx(1)
    more, less = (one.predicted(CHOICES[0], corrected=True) for one in (run, plain))
    assert more.frame - less.frame == pytest.approx(30, abs=10) and more.first - less.first == pytest.approx(60, abs=10)


def test_small_frames_tell_little_of_large_ones() -> None:
    """Three late ones, by what would be nothing for a large one, give no size up; when all are late one is, in time."""
    costliest = control().predicted(CHOICES[0])
    run = control(3 * costliest.first, 3 * costliest.frame)
    small = Work(391 * 784, ((1, 4 * 4),), 4, 200)
    assert run.index == 0 and 10 * run.engine_ms(small) < run.engine_ms(run.costliest(run.setting))
    for now in range(60):
        took = run.engine_ms(small) * (4 if now in (10, 11, 12) or now >= 30 else 1)
        run.observe_frame(small, took + 5, took)
        assert run.decide(now / 2) is None or now > 32
    assert run.decisions and run.decisions[0].reason == "slower than the target allows"


def test_slow_answers_are_forgotten_when_frames_are_fast_again() -> None:
    run = control()
    begun, work = run.index, run.costliest(run.setting)
    for now in range(10):
        run.observe_answer(run.window(run.setting), 24, 10_000.0, 500.0)
        run.decide(float(now))
    assert run.index > begun
    for now in range(10, 400):
        work = run.costliest(run.setting)
        run.observe_frame(work, run.engine_ms(work) + 5, run.engine_ms(work))
        run.decide(float(now))
    assert run.index <= begun + 1


def test_a_better_setting_is_taken_where_less_does_not_help() -> None:
    run = control()
    for now in range(60):
        factor = 12 if now < 10 else 40
        work = run.costliest(run.setting)
        run.observe_frame(work, run.engine_ms(work) * factor, run.engine_ms(work) * factor)
        run.decide(float(now))
    least = run.predicted(CHOICES[-1], corrected=True)
    assert least.frame > 1000, "the machine was to be too slow for anything"
    assert run.predicted(run.setting, corrected=True).frame <= 1.1 * least.frame and run.setting.stride == 1


def test_frames_that_come_faster_than_they_can_be_worked_on_are_left_out() -> None:
    """Each is in time by itself; nothing has had to wait yet."""
    run = LatencyControl(LatencyTarget(10_000.0, 8000.0), COST, replace(DEVICE, interval_ms=1000.0), CHOICES)
    assert run.predicted(run.setting).busy <= 0.9
    work = run.costliest(run.setting)
    for now in range(6):
        run.observe_frame(work, 4 * run.engine_ms(work), 4 * run.engine_ms(work))
        run.observe_share(0.3)
        run.decide(float(now))
    assert run.predicted(run.setting, corrected=True).busy <= 0.9
    busy = LatencyControl(LatencyTarget(10_000.0, 8000.0), COST, replace(DEVICE, interval_ms=100.0), CHOICES)
    assert busy.setting.stride == 1 and busy.predicted(busy.setting).busy <= 0.9
    for now in range(6):
        work = busy.costliest(busy.setting)
        busy.observe_frame(work, 4 * busy.engine_ms(work), 4 * busy.engine_ms(work))
        busy.decide(float(now))
    assert busy.setting.stride >= 2
