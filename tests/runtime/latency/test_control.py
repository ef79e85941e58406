"""The latency controller on a simulated machine, whose speed is ours to change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import BOUNDS, Machine, Seen, Truth, model

from penguin_edge.errors import BudgetError, InputError
from penguin_edge.runtime.core.report import Work
from penguin_edge.runtime.latency.control import KEPT, LatencyControl, LatencyTarget
from penguin_edge.tra.clip import INTERMEDIATE, KEY

CALM = (KEY, *[INTERMEDIATE] * 5)
LIVELY = (KEY, INTERMEDIATE, INTERMEDIATE)
COST = model(0.3)
"""A machine of which the free run takes a third of a second at worst."""


def noise_of(seed: int, usual: float = 0.5, accidents: float = 0.01, worst: float = 30.0) -> Callable[[float], float]:
    """Half a millisecond, and now and then an accident."""
    random = np.random.default_rng(seed)
    return lambda t: abs(random.normal(0, usual)) + (random.uniform(0, worst) if random.random() < accidents else 0)


def machine(seed: int = 0, speed: Callable[[float], float] = lambda t: 1.0, **options) -> Machine:
    return Machine(Truth(COST, 3.0, speed, noise_of(seed)), **options)


def sum_of(free: Seen) -> float:
    """The slowest answer and the 99th percentile of a frame's age."""
    return free.quantile(0.99)[0] + max(ms for _, ms in free.firsts)


@pytest.mark.parametrize("fps", [2, 8])
@pytest.mark.parametrize("cache", ["recompute", "rebase"])
@pytest.mark.parametrize("kinds", [CALM, LIVELY])
def test_twice_the_time_that_is_needed_costs_nothing(fps: float, cache: str, kinds) -> None:
    options = {"fps": fps, "caches": [cache], "kinds": kinds}
    limit = 2 * sum_of(machine(**options).run(60))
    target = LatencyTarget(limit, limit)
    run = machine(1, **options)
    control = run.control(target)
    seen = run.run(65, control)
    assert [one for one in control.decisions if one.time > 5] == [] and seen.misses(target) == 0


@pytest.mark.parametrize("fps", [2, 8])
@pytest.mark.parametrize("cache", ["recompute", "rebase"])
@pytest.mark.parametrize("share", [1.2, 1.0, 0.7])
def test_a_tight_target_is_kept_with_about_the_tokens_of_the_best_fixed_setting(
    fps: float, cache: str, share: float
) -> None:
    options = {"fps": fps, "caches": [cache], "kinds": LIVELY}
    free = machine(**options).run(60)
    target = LatencyTarget(share * sum_of(free), share * max(60.0, free.quantile(0.99)[0]))
    run = machine(1, **options)
    control = run.control(target)
    seen = run.run(125, control)
    fixed = [(machine(1, **options).run(125, fixed=one), one) for one in run.choices if one.stride == 1]
    best = max((one.kept(20) for one, _ in fixed if one.misses(target, 5) <= 0.01), default=0.0)
    assert seen.misses(target, 5) <= 0.0125, "one in a hundred, and one more: there are few deadlines"
    assert seen.kept(20) >= 0.8 * best > 0


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize("fps", [2, 8])
@pytest.mark.parametrize("cache", ["recompute", "rebase"])
def test_it_follows_a_machine_that_slows_down_and_recovers(factor: float, fps: float, cache: str) -> None:
    options = {"fps": fps, "caches": [cache], "kinds": LIVELY}
    limit = 2 * sum_of(machine(**options).run(60))
    target = LatencyTarget(limit, limit)
    run = machine(0, lambda t: factor if 20 <= t < 60 else 1.0, **options)
    control = run.control(target)
    seen = run.run(100, control)
    assert seen.misses(target, 25) <= 0.01
    assert seen.kept(75, 80) >= 0.9 * seen.kept(10, 20)
    assert sum(25 < one.time < 60 for one in control.decisions) <= 3


def test_another_process_now_and_then_costs_little() -> None:
    """A fifth of a second every two, in which all takes twice as long."""
    free = machine(kinds=LIVELY, fps=8).run(60)
    limit = 1.5 * sum_of(free)
    run = machine(0, lambda t: 2.0 if t % 2 < 0.2 else 1.0, kinds=LIVELY, fps=8)
    control = run.control(LatencyTarget(limit, limit))
    assert run.run(90, control).kept(10) >= 0.8 * free.kept(10)
    assert len(control.decisions) <= 4


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), slope=st.floats(0, 2), level=st.floats(0.5, 3))
@pytest.mark.parametrize(("fps", "seconds", "flat", "most"), [(2, 400, 150, 8), (8, 150, 90, 5)])
def test_it_never_swings(
    fps: float, seconds: float, flat: float, most: int, seed: int, slope: float, level: float
) -> None:
    """A ramp to any level, with noise: few changes once it is flat, and no quick turns back."""
    run = machine(seed, lambda t: min(1 + slope * t / 30, max(level, 1.0)), fps=fps)
    control = run.control(LatencyTarget(700.0, 500.0))
    run.run(seconds, control)
    assert len([one for one in control.decisions if one.time > flat]) <= most
    rises = [one for one in control.decisions if one.reason == "room to spare"]
    assert all(after.time - before.time >= 3.0 for before, after in pairwise(rises))


def test_times_are_foreseen() -> None:
    """One of 20 frames takes longer than its 95th percentile."""
    run = machine(3, fps=8, kinds=LIVELY)
    control = run.control(LatencyTarget(5000.0))
    run.run(120, control)
    assert 0.03 <= np.mean([one.taken > one.p95 for one in control.frames_seen]) <= 0.08
    later = list(control.frames_seen)[200:]
    assert np.median([one.taken / one.predicted for one in later]) == pytest.approx(1.0, abs=0.05)


def test_a_wrong_profile_is_put_right() -> None:
    """One of another machine, three times as fast, which knows nothing of what each call takes besides."""
    options = {"fps": 8, "kinds": LIVELY}
    free = machine(**options).run(60)
    target = LatencyTarget(0.7 * sum_of(free), free.quantile(0.99)[0])
    right, wrong = machine(1, **options), machine(1, **options)
    kept = []
    for run, cost in ((right, COST), (wrong, model(0.1, 0.0))):
        control = run.control(target, cost)
        seen = run.run(125, control)
        assert seen.misses(target, 20) <= 0.0125
        kept.append(seen.kept(30))
    assert kept[1] >= 0.8 * kept[0]


def test_what_cannot_be_kept_is_said_at_once() -> None:
    for target, words in (
        (LatencyTarget(5.0), r"\d+ ms to a first token, \d+ ms for a frame"),
        (LatencyTarget(0.1), r"\d+ ms to a first token, \d+ ms for a frame"),
        (LatencyTarget(1e4, 1.0), "frames within 1 ms"),
        (LatencyTarget(1e4, None, 400.0), r"to give 1\d\d.* tokens per second"),
    ):
        with pytest.raises(BudgetError, match=words):
            machine().control(target)
    for wrong in (0.0, -5.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"first_token_ms is .*, wanted a finite number and above 0"):
            LatencyTarget(wrong)
    run = machine()
    assert run.control(LatencyTarget(1e9, 1e9)).setting == run.choices[0]


def test_decisions_are_told_and_bounded() -> None:
    told = []
    run = machine(0, lambda t: 1.0 if int(t / 40) % 2 else 8.0)
    target = LatencyTarget(900.0, 700.0)
    control = LatencyControl(target, COST, run.device, run.choices, run.worth, run.foresee, told.append)
    run.run(300, control)
    assert told == list(control.decisions) and told and control.decisions.maxlen == KEPT
    data = told[0].to_json()
    assert {"time", "from", "to", "predicted", "observed", "reason"} == data.keys()
    assert data["from"]["budget"] >= data["to"]["budget"]


def test_tokens_per_second_are_kept_by_a_smaller_window() -> None:
    run = machine(budget=3000)
    run.run(60, fixed=run.choices[0])  # a window that is full
    free = run.control(LatencyTarget(6e4))
    fast = run.control(LatencyTarget(6e4, None, 135.0))
    assert fast.predicted(fast.setting).token <= 1e3 / 135 < free.predicted(free.setting).token
    # A twentieth slower than what would just be kept.
    slower = 1.05 * 1e3 / 135 / fast.predicted(fast.setting).token
    for now in range(8):
        fast.observe_answer(float(now), 2000, 24, 80.0, slower * COST.stage_ms("decode", 2000))
    assert (found := fast.decide(10.0)) is not None and found.after.budget < found.before.budget


def steady(run: Machine, control: LatencyControl, seconds: int, factor: float = 1.0, **waits: float) -> None:
    """A frame each second as the first of the forecast, `factor` times as slow."""
    for now in range(seconds):
        work = run.foresee([control.setting], 32)[0].works[0]
        control.observe_frame(float(now), work, factor * control.work_ms(work), **waits)
        control.decide(float(now))


def test_frames_that_wait_for_answers_leave_less_time_for_themselves() -> None:
    run = machine()
    run.run(60, fixed=run.choices[0])
    target = LatencyTarget(6e4, 1.2 * run.control(LatencyTarget(6e4)).predicted(run.choices[0]).frame)
    control = run.control(target)
    assert control.setting == run.choices[0]
    steady(run, control, 6, held_up_ms=0.4 * (target.frame_ms or 0))
    assert control.setting != run.choices[0]
    # A wait that leaves nothing is not made good by asking for nothing.
    stuck = run.control(target)
    steady(run, stuck, 100, held_up_ms=1e6)
    assert stuck.setting.stride == 1
    # Frames that wait for frames: fewer of them are taken.
    busy = run.control(target)
    steady(run, busy, 6, queued_ms=3000.0)
    assert busy.setting.stride >= 2


def test_frames_that_are_late_behind_a_late_one_are_one_accident() -> None:
    """What waits for it tells nothing new; a frame that is late by itself does."""

    def leeway(*frames: tuple[float, float]) -> float:
        """A share of the limits that is left after frames that took and had waited so long, in limits of a frame."""
        run = machine()
        control = run.control(LatencyTarget(1300.0, 1000.0))
        work = run.foresee([control.setting], 32)[0].works[0]
        for now, (took, queued) in enumerate(frames):
            control.observe_frame(float(now), work, 1000 * took, queued_ms=1000 * queued)
        return control._leeway

    once = leeway((3.0, 0.0))
    assert once == pytest.approx(0.9505)
    assert leeway((3.0, 0.0), (0.1, 2.0), (0.1, 1.0)) == once
    assert leeway((3.0, 0.0), (1.1, 2.0)) < once
    assert leeway((0.1, 2.0)) == once, "the first that waits is judged"


def test_nothing_is_given_up_for_nothing() -> None:
    """Where even the least is too much, the best of those that take as long is kept."""
    run = machine()
    run.run(60, fixed=run.choices[0])
    control = run.control(LatencyTarget(6e4, 60.0))
    for now in range(30):
        work = run.foresee([control.setting], 32)[0].works[0]
        control.observe_frame(float(now), work, 100.0 + control.work_ms(work))
        control.decide(float(now))
    least = control.predicted(control.order()[-1][1])
    assert control.predicted(control.setting).frame <= 1.1 * least.frame and control.setting.stride == 1


@pytest.mark.parametrize("fps", [2, 8])
@pytest.mark.parametrize("cache", ["recompute", "rebase"])
def test_a_machine_that_is_too_slow_for_anything_makes_nothing_swing(fps: float, cache: str) -> None:
    options = {"fps": fps, "caches": [cache], "kinds": LIVELY}
    limit = 1.2 * sum_of(machine(**options).run(60))
    run = machine(0, lambda t: 30.0 if t > 20 else 1.0, **options)
    control = run.control(LatencyTarget(limit, limit))
    run.run(140, control)
    assert len([one for one in control.decisions if one.time > 25]) <= 8


@pytest.mark.parametrize("slow", [0, 2])
def test_one_slow_frame_is_no_reason(slow: int) -> None:
    """The very first one is none, either."""
    run = machine()
    run.run(60, fixed=run.choices[0])
    control = run.control(LatencyTarget(1300.0, 1000.0))
    begun = control.setting
    for now in range(40):
        work = run.foresee([control.setting], 32)[0].works[now % 8]
        control.observe_frame(float(now), work, (control.work_ms(work) + 5) * (20 if now == slow else 1))
        control.decide(float(now))
    assert control.setting == begun


def test_slow_answers_are_forgotten_when_they_are_fast_again() -> None:
    run = machine()
    run.run(60, fixed=run.choices[0])
    control = run.control(LatencyTarget(1300.0, 1000.0))
    begun = control.setting
    for now in range(10):
        control.observe_answer(float(now), 1000, 24, 5000.0, 500.0)
        control.decide(float(now))
    assert run.worth(control.setting) < run.worth(begun)
    for now in range(10, 300):
        control.observe_answer(float(now), 1000, 24, COST.prefill_ms(24, 1000, BOUNDS), 7.0)
        control.decide(float(now))
    assert control.setting == begun


def test_frames_that_come_faster_than_they_can_be_worked_on_are_left_out() -> None:
    """Each is in time by itself; nothing has had to wait yet."""
    run = machine(fps=8)
    run.run(60, fixed=run.choices[0])
    control = run.control(LatencyTarget(1e4, 8000.0))
    assert control.predicted(control.setting).busy <= 0.9
    steady(run, control, 12, 12.0)
    assert control.predicted(control.setting).busy <= 0.9 and control.setting != run.choices[0]


def test_a_stall_is_an_accident() -> None:
    """Ten seconds in which nothing moves, once: the setting of before is there again soon."""
    run = machine(0, fps=8, kinds=LIVELY)
    inner = run.truth.noise
    stalled = iter([10_000.0])
    run.truth.noise = lambda t: inner(t) + (next(stalled, 0.0) if t > 20 else 0.0)
    control = run.control(LatencyTarget(1300.0, 1000.0))
    seen = run.run(60, control)
    assert seen.kept(50) >= 0.9 * seen.kept(10, 20) and len(control.decisions) <= 4


def test_work_without_a_price_is_none() -> None:
    control = machine().control(LatencyTarget(1e4))
    assert control.work_ms(Work(0, (), 0, 0)) == pytest.approx(COST.stage_ms("preprocess", 0, 0))
