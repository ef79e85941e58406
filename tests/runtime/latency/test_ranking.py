"""Settings, what they are worth, and the order in which they give way."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.runtime.core.options import FOLLOWS, SHRINKS
from penguin_edge.runtime.latency.forecast import Setting
from penguin_edge.runtime.latency.ranking import (
    FRAME_SHARES,
    LOST,
    SKIPPED,
    STEP,
    WORTH,
    Full,
    candidates,
    efficient,
    spaced,
    worth,
)


@given(
    native=st.integers(1, 4000),
    floor=st.integers(1, 40),
    budget=st.integers(1, 20_000),
    caches=st.integers(1, 2),
    shrinks=st.integers(1, 2),
    frames=st.floats(1, 1e4),
)
def test_settings_of_anything(native: int, floor: int, budget: int, caches: int, shrinks: int, frames: float) -> None:
    found = candidates(native, min(floor, native), budget, FOLLOWS[:caches], SHRINKS[:shrinks])
    assert found[0] == Setting(budget, min(native, budget))
    assert all(1 <= one.frame_tokens <= one.budget <= budget for one in found)
    assert len(found) == len(set(found)) < 1000
    assert max(one.stride for one in found) == 8
    least = min(found, key=lambda one: (one.budget, one.frame_tokens))
    assert least.budget == min(4 * min(floor, native), budget) and least.frame_tokens == min(floor, native, budget)
    asked = Full(min(native, budget), budget, native * frames)
    for one in found:
        # Nothing is worth more than what gives up less in every way, or less than what gives up more.
        assert worth(one, asked) <= worth(found[0], asked)
        assert worth(one, asked) >= worth(replace(one, stride=8, cache="rebase", shrink="pool"), asked)
        for less in (
            replace(one, budget=max(1, one.budget // 2)),
            replace(one, frame_tokens=one.frame_tokens // 2 + 1),
        ):
            assert worth(less, asked) <= worth(one, asked) or less.frame_tokens > one.frame_tokens


def test_what_was_measured_falls_with_every_step() -> None:
    for row in WORTH:
        assert all(after <= before for before, after in pairwise(row))
    for column in zip(*WORTH, strict=True):
        assert all(after <= before for before, after in pairwise(column))
    assert min(LOST.values()) == 0 and list(SKIPPED) == [1, 2, 4, 8] and min(SKIPPED.values()) == 0


def test_a_setting_is_worth_what_was_measured_of_it() -> None:
    """A window of 80 frames of 100 tokens."""
    whole = Full(100, 8000, 8000.0)
    for i in range(len(WORTH)):
        for j, share in enumerate(FRAME_SHARES):
            setting = Setting(round(8000 / 2 ** (i / 2)), round(100 * share))
            assert worth(setting, whole) == pytest.approx(WORTH[i][j], abs=8e-3)
    # All frames native, but every second one: as half of the budget, and what skipping loses.
    assert worth(Setting(8000, 100, 2), whole) == pytest.approx(0.717 - 0.05, abs=2e-3)
    # A budget far below the window begins where half of it fits.
    small = Full(100, 500, 8000.0)
    assert [worth(Setting(500 // by, 100), small) for by in (1, 2, 4)] == pytest.approx([0.717, 0.591, 0.434], abs=8e-3)
    # Nothing was measured below a sixteenth, and nothing there is free.
    assert worth(Setting(8, 100), small) < worth(Setting(16, 100), small) < worth(Setting(32, 100), small)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1)), min_size=1, max_size=60))
def test_nothing_in_the_order_is_beaten_in_both(rated: list[tuple[float, float]]) -> None:
    settings = [Setting(index + 1, 1) for index in range(len(rated))]
    load, value = ({one: row[i] for one, row in zip(settings, rated, strict=True)} for i in (0, 1))
    front = efficient(settings, load.__getitem__, value.__getitem__)
    assert value[front[0][1]] == max(value.values()) and front[-1][0] == min(load.values())
    for (more, before), (less, after) in pairwise(front):
        assert less < more and value[after] < value[before]
    for one in settings:
        assert any(load[other] <= load[one] and value[other] >= value[one] for _, other in front)
    kept = spaced(front)
    assert kept[0] == front[0][1] and kept[-1] == front[-1][1]
    assert all(load[after] <= STEP * load[before] for before, after in pairwise(kept[:-1]))
