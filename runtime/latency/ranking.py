"""Which setting gives way to which: each step down loses as few right answers as it can for the time that it saves.

| what gives way | by                                                                                |
|----------------|-----------------------------------------------------------------------------------|
| key size       | the most tokens of one frame, in steps of about three tenths down to a fourth     |
| budget         | tokens of the window, in the same steps                                           |
| cache          | moved (`rebase`) instead of computed again (`recompute`)                          |
| shrink         | means of features (`pool`) instead of encoding smaller pixels (`encode`)          |
| rate           | every second, fourth or eighth frame                                              |

What each costs in answers was measured on penguin-nano (`WORTH`, docs/budgets.md); what it saves is foretold for the
machine at hand. So a machine with a slow encoder gives up other things first than one with a slow decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from penguin_edge.runtime.core.options import Follow, Shrink
from penguin_edge.runtime.latency.forecast import Setting

FRAME_SHARES = (1.0, 0.69, 0.44, 0.25, 0.11)
"""Shares of a frame's native tokens that `WORTH` was measured at."""
WORTH = (
    (0.969, 0.769, 0.678, 0.590, 0.405),
    (0.722, 0.722, 0.678, 0.590, 0.405),
    (0.717, 0.643, 0.643, 0.590, 0.405),
    (0.666, 0.636, 0.605, 0.571, 0.405),
    (0.591, 0.580, 0.580, 0.528, 0.405),
    (0.528, 0.528, 0.525, 0.491, 0.405),
    (0.434, 0.434, 0.434, 0.418, 0.405),
    (0.350, 0.350, 0.350, 0.342, 0.335),
    (0.265, 0.265, 0.265, 0.265, 0.265),
)
"""Share of answers that are right: a row for each half of a doubling of the window's native tokens over the budget, the
first where all fit, a column for each of `FRAME_SHARES`. The row before the last is between its neighbours."""
FURTHER = 0.75
"""What each further doubling leaves of them: not measured, but a small budget is not to be free."""
MORE = 1e-3
"""What each doubling of tokens is worth where nothing was measurable."""
BEGIN = 1.0
"""Doublings at which a window is put in the table whose budget has room for less than that of its native tokens: a
stream's is mostly far below what was measured, and what counts there is what a further step costs."""
LOST = {"recompute": 0.0, "rebase": 0.05, "encode": 0.0, "pool": 0.005}
"""What the ways to follow lose. Pooling lost nothing that was measurable; without a need it is not taken."""
SKIPPED = {1: 0.0, 2: 0.05, 4: 0.08, 8: 0.10}
"""What every second, fourth and eighth frame lose against as many tokens of all frames."""
STEP = 0.85
"""Load of a setting over that of the one before it, at most."""
FINE, COARSE = math.sqrt(2), 2.0
"""Steps of sizes down to a fourth, and below or where frames are left out."""


def candidates(
    native: int, floor: int, budget: int, caches: Sequence[Follow], shrinks: Sequence[Shrink], keep: float = 1.0
) -> list[Setting]:
    """All settings that there are, the one that gives up nothing first.

    Args:
        native, floor: tokens of one frame as encoded, at most and at least.
        caches, shrinks: ways to follow that may be taken, the ones that lose least first.
        keep: share of a frame's tokens that counts against the budget.
    """
    frame = min(native, max(1, int(budget / keep)))
    sizes = _steps(frame, min(floor, frame), FINE)
    budgets = _steps(budget, min(4 * floor, budget), FINE)
    found = [
        Setting(room, size, 1, cache, shrink)
        for room, size, cache, shrink in product(budgets, sizes, caches, shrinks)
        if size * keep <= max(room, keep)
    ]
    sizes, budgets = _steps(frame, min(floor, frame), COARSE), _steps(budget, min(4 * floor, budget), COARSE)
    found += [
        Setting(room, size, stride, caches[-1], shrinks[-1])
        for stride, room, size in product(tuple(SKIPPED)[1:], budgets, sizes)
        if size * keep <= max(room, keep)
    ]
    return found


@dataclass(frozen=True)
class Full:
    """Where nothing is given up: visual tokens of a frame, of the budget, and of the window if all were native."""

    frame: int
    budget: int
    window: float


def worth(setting: Setting, full: Full) -> float:
    """The share of answers that are right, by what was measured on penguin-nano."""
    least = max(0.0, math.log2(full.window / full.budget) - BEGIN)
    fewer = max(math.log2(full.window / setting.budget), math.log2(setting.stride)) - least
    i, u = _between(2 * fewer, len(WORTH))
    share = min(1.0, setting.frame_tokens / full.frame)
    at = np.interp(-math.log2(share), [-math.log2(one) for one in FRAME_SHARES], range(len(FRAME_SHARES)))
    j, v = _between(float(at), len(FRAME_SHARES))
    rows = [WORTH[row][j] + v * (WORTH[row][j + 1] - WORTH[row][j]) for row in (i, i + 1)]
    right = rows[0] + u * (rows[1] - rows[0])
    right *= FURTHER ** max(0.0, fewer - (len(WORTH) - 1) / 2)
    right -= MORE * (math.log2(full.budget / setting.budget) - math.log2(share))
    return right - LOST[setting.cache] - LOST[setting.shrink] - SKIPPED[setting.stride]


def efficient(
    settings: Iterable[Setting], load: Callable[[Setting], float], worth: Callable[[Setting], float]
) -> list[tuple[float, Setting]]:
    """The settings that no other one beats in both, with their loads, from the one that is worth most on.

    Args:
        load: what a setting asks of the machine.
    """
    rated = sorted(((load(one), -worth(one), i, one) for i, one in enumerate(settings)), key=lambda row: row[:3])
    front: list[tuple[float, Setting]] = []
    best = math.inf
    for asked, lost, _, one in rated:
        if lost < best:
            front.append((asked, one))
            best = lost
    return front[::-1]


def spaced(front: Sequence[tuple[float, Setting]]) -> list[Setting]:
    """Those of the efficient settings of which each asks for less than the one before by `STEP`, and the last one."""
    kept = [front[0]]
    for asked, one in front[1:]:
        if asked <= STEP * kept[-1][0] or one is front[-1][1]:
            kept.append((asked, one))
    return [one for _, one in kept]


def _steps(most: int, least: int, fine: float) -> list[int]:
    """Sizes from `most` down to `least`."""
    found = [most]
    while found[-1] > least:
        step = fine if found[-1] > most / 4 else COARSE
        found.append(max(least, min(found[-1] - 1, round(found[-1] / step))))
    return found


def _between(at: float, count: int) -> tuple[int, float]:
    """A place among `count` as the one before it, and how far it is from there to the next."""
    at = min(max(at, 0.0), count - 1.0)
    i = min(int(at), count - 2)
    return i, at - i
