"""Settings, what they are worth, and the order in which they give way."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.runtime.core.options import FOLLOWS, SHRINKS
from penguin_edge.runtime.latency.forecast import Setting
from penguin_edge.runtime.latency.ranking import LOST, SHARES, STEP, WORTH, candidates, efficient, spaced, worth


@given(
    native=st.integers(1, 4000),
    floor=st.integers(1, 40),
    budget=st.integers(1, 20_000),
    caches=st.integers(1, 2),
    shrinks=st.integers(1, 2),
)
def test_settings_of_anything(native: int, floor: int, budget: int, caches: int, shrinks: int) -> None:
    found = candidates(native, min(floor, native), budget, FOLLOWS[:caches], SHRINKS[:shrinks])
    assert found[0] == Setting(budget, min(native, budget))
    assert all(1 <= one.frame_tokens <= one.budget <= budget for one in found)
    assert len(found) == len(set(found)) < 1000
    assert max(one.stride for one in found) == 8
    least = min(found, key=lambda one: (one.budget, one.frame_tokens))
    assert least.budget == min(4 * min(floor, native), budget) and least.frame_tokens == min(floor, native, budget)
    for one in found:
        # Nothing is worth more than what gives up less in every way.
        value = worth(one, native, budget)
        assert value <= worth(found[0], native, budget)
        assert value >= worth(Setting(one.budget, one.frame_tokens, 8, "rebase", "pool"), native, budget)


def test_what_was_measured_falls_with_every_step() -> None:
    for row in WORTH:
        assert all(after <= before for before, after in pairwise(row))
    for column in zip(*WORTH, strict=True):
        assert all(after <= before for before, after in pairwise(column))
    assert min(LOST.values()) == 0
    for (i, budget), (j, frame) in product(enumerate(SHARES), enumerate(SHARES)):
        assert worth(Setting(round(800 * budget), round(80 * frame)), 80, 800) == pytest.approx(WORTH[i][j])


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
