"""Times predicted, corrected and taken: what is added, what multiplies, and what is noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.runtime.latency.pace import RUN, Pace

WORK = [2.0, 2.5, 2.0, 20.0, 2.2, 2.0, 9.0]
"""Predictions of usual frames, and of some that cost ten times as much."""


def watch(pace: Pace, taken, seconds: float = 40.0, fps: float = 4.0, work=WORK, begin: float = 0.0) -> list:
    """Observe frames; `taken` is a function of the time and the prediction."""
    found = []
    for turn in range(int(seconds * fps)):
        now, x = begin + turn / fps, work[turn % len(work)]
        found.append(pace.observe(now, x, taken(now, x)))
    return found


@given(added=st.floats(0, 50), factor=st.floats(0.2, 8), seed=st.integers(0, 99))
def test_what_is_added_and_what_multiplies_are_told_apart(added: float, factor: float, seed: int) -> None:
    random, pace = np.random.default_rng(seed), Pace()
    watch(pace, lambda now, x: added + factor * x + float(random.normal(0, 0.02 * factor)))
    assert pace.expect(20.0) == pytest.approx(added + 20 * factor, rel=0.1)
    assert pace.expect(60.0) == pytest.approx(added + 60 * factor, rel=0.1)
    assert pace.expect(2.0) == pytest.approx(added + 2 * factor, rel=0.15)


def test_accidents_move_neither() -> None:
    random, pace = np.random.default_rng(0), Pace()
    watch(pace, lambda now, x: 1.0 + x + (30.0 if random.random() < 0.1 else 0.0), seconds=60)
    assert pace.expect(20.0) == pytest.approx(21.0, rel=0.1) and pace.expect(2.0) == pytest.approx(3.0, rel=0.2)
    # One of ten is in the noise, whatever the work; one of a hundred would be left out. Those of frames that take a
    # little longer count in proportion.
    assert 25.0 <= pace.at_most(2.0, 0.95) <= 35.0 and 45.0 <= pace.at_most(20.0, 0.95) <= 55.0


def test_slow_frames_that_are_large_say_little_of_small_ones() -> None:
    """The first two, cold, take twice as long, and others of ten times less work follow."""
    pace = Pace()
    watch(pace, lambda now, x: 2 * x, seconds=0.5, work=[40.0])
    watch(pace, lambda now, x: x, seconds=5, work=[4.0], begin=0.5)
    assert pace.beyond(4.0, 0.95) <= 4.0 and pace.beyond(40.0, 0.95) >= 10.0


def test_what_disturbs_small_frames_disturbs_large_ones_as_much() -> None:
    random, pace = np.random.default_rng(3), Pace()
    watch(pace, lambda now, x: x + (8.0 if random.random() < 0.1 else 0.0), seconds=30, work=[2.0])
    assert pace.beyond(2.0, 0.95) == pytest.approx(8.0, rel=0.1)
    assert pace.beyond(60.0, 0.95) == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("factor", [2.0, 4.0, 0.25])
def test_another_speed_is_known_after_a_few(factor: float) -> None:
    random, pace = np.random.default_rng(1), Pace()
    watch(pace, lambda now, x: 1.0 + x * float(random.uniform(0.95, 1.05)))
    wide = pace.at_most(20.0, 0.99) / pace.expect(20.0)
    changes = []
    for turn in range(2 * RUN):
        pace.observe(40.0 + turn, 20.0, 1.0 + 20.0 * factor)
        changes += [pace.changed] if pace.changed is not None else []
    assert changes[0] == pytest.approx((1.0 + 20.0 * factor) / 21.0, rel=0.1)
    assert pace.expect(20.0) == pytest.approx(1.0 + 20.0 * factor, rel=0.1)
    assert pace.at_most(20.0, 0.99) / pace.expect(20.0) < 1.5 * wide, "the change itself is no noise"


def test_where_nothing_tells_them_apart_both_are_scaled() -> None:
    pace = Pace(3.0)
    watch(pace, lambda now, x: 10.0, work=[2.0])
    assert pace.expect(2.0) == pytest.approx(10.0)
    assert pace.added / pace.factor == pytest.approx(3.0)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e5)), min_size=1, max_size=300))
def test_it_is_always_finite_and_never_below_nothing(points: list[tuple[float, float]]) -> None:
    pace = Pace()
    for turn, (x, taken) in enumerate(points):
        seen = pace.observe(float(turn), x, taken)
        assert np.isfinite([seen.predicted, seen.p95]).all() and seen.predicted <= seen.p95 + 1e-9
        assert pace.added >= 0 and pace.factor > 0 and np.isfinite(pace.beyond(x, 0.95))
        assert pace.beyond(x, 0.05) <= pace.beyond(x, 0.95)


@pytest.mark.parametrize("growth", [1.05, 1.07, 1.1, 1.2, 0.9])
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.05])
def test_a_ramp_leaves_some_noise(growth: float, jitter: float) -> None:
    """Each change that is recognised takes residuals away."""
    random, pace = np.random.default_rng(0), Pace()
    for turn in range(120):
        taken = 10.0 * growth ** min(turn, 60) * float(random.uniform(1 - jitter, 1 + jitter))
        seen = pace.observe(turn / 2, 10.0, taken)
        assert np.isfinite([seen.predicted, seen.p95]).all()
    assert pace.expect(10.0) == pytest.approx(10.0 * growth**60, rel=0.1)
    # Half a minute after it, the noise is that of the machine as it is.
    assert 0.25 * jitter <= pace.beyond(10.0, 0.95) / pace.expect(10.0) <= 1.5 * jitter + 1e-6


@pytest.mark.parametrize("before", [5, 10, 18, 25, 60])
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_another_speed_is_known_as_soon_either_way(before: int, factor: float) -> None:
    random, pace = np.random.default_rng(4), Pace()
    for turn in range(before + RUN):
        level = factor if turn >= before else 1.0
        pace.observe(turn / 2, 10.0, 10.0 * level * float(random.uniform(0.97, 1.03)))
    assert pace.changed == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_one_of_twenty_takes_longer_than_the_95th_percentile(spread: float) -> None:
    random, pace = np.random.default_rng(2), Pace()
    seen = watch(pace, lambda now, x: 2.0 + x * float(random.lognormal(0, spread)), seconds=500)
    assert 0.03 <= np.mean([one.taken > one.p95 for one in seen[40:]]) <= 0.08


def test_as_few_do_while_the_noise_grows() -> None:
    """It doubles every 12 seconds, and is gone again after 80: what was seen of late is less than what comes."""
    random, pace = np.random.default_rng(1), Pace()

    def taken(now: float, x: float) -> float:
        return 2.0 + x * float(np.exp(abs(random.normal(0, 0.005 * 2 ** (now % 80 / 12)))))

    seen = watch(pace, taken, seconds=500)
    assert 0.03 <= np.mean([one.taken > one.p95 for one in seen[40:]]) <= 0.08
