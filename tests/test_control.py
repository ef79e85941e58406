"""The latency controller on a simulated machine, whose speed is ours to change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penguin_edge.bundle import Bounds
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.runtime.control import Decision, Device, LatencyControl, LatencyTarget, Work
from penguin_edge.runtime.control import settings as all_settings
from penguin_edge.runtime.cost import CostModel

COST = CostModel(
    {
        "preprocess": [0.1, 1e-5],
        "encode": [2.0, 0.2, 1e-4],
        "project": [0.2, 0.01],
        "prefill": [5.0, 1.0, 2e-4],
        "decode": [20.0, 0.005],
    }
)
DEVICE = Device(Bounds(max_seq_len=4096, max_chunk=256), 2, 9, 24, recompute=False)
CHOICES = all_settings(391, 24, 2048)


def control(first: float = 900.0, frame: float | None = 600.0) -> LatencyControl:
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
        tokens = setting.frame_tokens if key else min(24, setting.frame_tokens)
        work = Work(tokens * 784, (4 * tokens,), tokens + 9, setting.budget)
        took = run.work_ms(work) * speed(now) * float(random.uniform(1 - noise, 1 + noise))
        if key:
            keys.append((now, took))
        run.observe_frame(work, took)
        if i % 4 == 0:
            question = COST.prefill_ms(24, setting.budget, DEVICE.bounds) * speed(now)
            run.observe_first(setting.budget, question * float(random.uniform(1 - noise, 1 + noise)))
        run.decide(now)
    return keys


def test_settings_ask_less_and_less() -> None:
    run = control()
    costs = [run.predicted(setting) for setting in CHOICES]
    assert all(b[0] <= a[0] and b[1] <= a[1] for a, b in pairwise(costs))
    assert CHOICES[0].frame_tokens == 391 and CHOICES[-1].stride == 8 and CHOICES[-1].budget == 96
    # In the stated order: frames, budget, drops.
    steps = [(b.frame_tokens < a.frame_tokens, b.budget < a.budget, b.stride > a.stride) for a, b in pairwise(CHOICES)]
    assert steps == [(True, False, False)] * 2 + [(False, True, False)] * 5 + [(False, False, True)] * 3


def test_a_steady_machine_is_left_alone() -> None:
    run = control()
    begun = run.index
    keys = simulate(run, lambda t: 1.0, 300)
    assert abs(run.index - begun) <= 1 and len(run.decisions) <= 2
    assert np.mean([took > 600 for _, took in keys]) <= 0.01


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_it_recovers_within_five_seconds_from_a_step_and_returns(factor: float) -> None:
    run = control()
    begun = run.index
    keys = simulate(run, lambda t: factor if 60 <= t < 180 else 1.0, 300)
    late = [now for now, took in keys if took > 600]
    assert all(60 <= now <= 65 for now in late), late
    assert max(CHOICES.index(d.after) for d in run.decisions) > begun
    assert abs(run.index - begun) <= 1, "the old speed is there again, and the old setting is not"


@settings(max_examples=40, deadline=None)
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
    with pytest.raises(BudgetError, match=r"predicted to need \d+ and \d+ ms"):
        control(first=20.0)
    with pytest.raises(BudgetError, match="frames within 1 ms"):
        control(frame=1.0)
    for wrong in (0.0, -5.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="wanted more than 0"):
            LatencyTarget(wrong)


def test_decisions_are_told_and_bounded() -> None:
    told: list[Decision] = []
    run = LatencyControl(LatencyTarget(900.0, 600.0), COST, DEVICE, CHOICES, told.append)
    simulate(run, lambda t: 1.0 if int(t / 40) % 2 else 6.0, 400)
    assert told == list(run.decisions) and told
    data = told[0].to_json()
    assert {"time", "from", "to", "predicted_ms", "observed_ms", "reason"} == data.keys()
    assert data["from"]["budget"] >= data["to"]["budget"]


def test_recomputing_costs_the_whole_window() -> None:
    recompute = Device(DEVICE.bounds, 2, 9, 24, recompute=True)
    run = LatencyControl(LatencyTarget(60_000.0), COST, recompute, CHOICES)
    assert run.predicted(CHOICES[0])[0] > 3 * control().predicted(CHOICES[0])[0]
