"""The latency controller on machines whose speed was recorded, or is that of a phone.

`traces.json` has how long the same work took every eighth of a second for 90 s, in units of its usual time on a quiet
machine: penguin-nano, 4-bit, ONNX Runtime on two cores of a server, a picture of 256 patches and three chunks of 64
positions. `quiet` with nothing else to do, `busy` beside two other programs that came and went. A phone was not at
hand: what heat and sleep do to one is made up here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from machine import Machine, Truth, model

from penguin_edge.runtime.core.options import FOLLOWS
from penguin_edge.runtime.latency.control import LatencyTarget
from penguin_edge.tra.clip import INTERMEDIATE, KEY

TRACES = json.loads((Path(__file__).parent / "traces.json").read_text(encoding="utf-8"))
STEP_S = 0.125
KINDS = (KEY, INTERMEDIATE, INTERMEDIATE)


def recorded(name: str) -> Callable[[float], float]:
    """Begins anew when it has ended."""
    return lambda t: TRACES[name][int(t / STEP_S) % len(TRACES[name])]


def throttled(t: float) -> float:
    """Heat: from second 30 on a step slower every ten seconds, down to 2.5 times, and back after second 120."""
    return 1 + 0.3 * min(5, max(0, (t - 30) // 10)) if t < 120 else 1.0


def machine(speed: Callable[[float], float], seed: int = 0, caches=FOLLOWS, **options) -> Machine:
    random = np.random.default_rng(seed)
    return Machine(Truth(model(0.1), 1.0, speed, lambda t: abs(random.normal(0, 0.5))), caches=caches, **options)


def needed(speed: Callable[[float], float], **options) -> float:
    """The slowest answer and the 99th percentile of a frame's age, where nothing is given up."""
    free = machine(speed, **options).run(90)
    return free.quantile(0.99)[0] + max(ms for _, ms in free.firsts)


@pytest.mark.parametrize("name", ["quiet", "busy"])
@pytest.mark.parametrize("fps", [2, 8])
@pytest.mark.parametrize("cache", FOLLOWS)
def test_enough_time_costs_nothing_whatever_else_the_machine_does(name: str, fps: float, cache: str) -> None:
    options = {"fps": fps, "kinds": KINDS, "caches": [cache]}
    limit = 2 * needed(recorded(name), **options)
    run = machine(recorded(name), 1, **options)
    control = run.control(LatencyTarget(limit, limit))
    seen = run.run(90, control)
    # The first seconds of `busy` are the slowest of it.
    assert not [one for one in control.decisions if one.time > 10] and seen.misses(control.target, 5) <= 0.002


@pytest.mark.parametrize("name", ["quiet", "busy"])
@pytest.mark.parametrize("fps", [2, 8])
def test_half_of_the_time_that_is_needed_is_kept(name: str, fps: float) -> None:
    options = {"fps": fps, "kinds": KINDS}
    limit = 0.5 * needed(recorded(name), **options)
    run = machine(recorded(name), 1, **options)
    control = run.control(LatencyTarget(limit, limit))
    seen = run.run(180, control)
    assert seen.misses(control.target, 10) <= 0.015
    assert len([one for one in control.decisions if one.time > 10]) <= (12 if name == "busy" else 6)
    assert seen.kept(20) >= 0.8 * 1000 * 0.85, "moving the cache leaves the budget whole"


@pytest.mark.parametrize("cache", FOLLOWS)
def test_heat_is_followed_step_by_step_and_forgotten(cache: str) -> None:
    options = {"fps": 8, "kinds": KINDS, "caches": [cache]}
    limit = 1.2 * needed(lambda t: 1.0, **options)
    run = machine(throttled, 1, **options)
    control = run.control(LatencyTarget(limit, limit))
    seen = run.run(180, control)
    assert seen.misses(control.target, 10) <= 0.02
    assert seen.kept(150) >= 0.9 * seen.kept(10, 30)


def test_a_phone_that_sleeps_wakes_up_with_the_setting_of_before() -> None:
    """Five seconds in which nothing runs, every half minute."""
    asleep = iter(range(20, 200, 30))
    run = machine(lambda t: 1.0, 1, fps=2, kinds=KINDS)
    usual, due = run.truth.noise, next(asleep)

    def noise(t: float) -> float:
        nonlocal due
        if t < due:
            return usual(t)
        due = next(asleep, 10_000)
        return 5000.0

    run.truth.noise = noise
    limit = 2 * needed(lambda t: 1.0, fps=2, kinds=KINDS)
    control = run.control(LatencyTarget(limit, limit))
    seen = run.run(180, control)
    assert seen.kept(10) >= 0.9 * seen.kept(5, 20)
    assert len(control.decisions) <= 12, "at most one down and one up for each"
