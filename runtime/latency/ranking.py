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
from itertools import product

from penguin_edge.runtime.core.options import Follow, Shrink
from penguin_edge.runtime.latency.forecast import Setting

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of the budget, and of a frame's native tokens, that `WORTH` was measured at."""
WORTH = (
    (0.96, 0.80, 0.66, 0.55),
    (0.87, 0.78, 0.64, 0.53),
    (0.66, 0.62, 0.58, 0.48),
    (0.53, 0.50, 0.46, 0.42),
)
"""Share of answers that are right: `WORTH[i][j]` at `SHARES[i]` of the budget and `SHARES[j]` of a frame's tokens."""
LOST = {"recompute": 0.0, "rebase": 0.01, "encode": 0.0, "pool": 0.02}
"""What the ways to follow lose of them."""
SKIPPED = 0.08
"""What each halving of the rate loses of them."""
STEP = 0.85
"""Load of a setting over that of the one before it, at most."""
FINE, COARSE = math.sqrt(2), 2.0
"""Steps of sizes down to a fourth, and below or where frames are left out."""
STRIDES = (1, 2, 4, 8)


def candidates(
    native: int, floor: int, budget: int, caches: Sequence[Follow], shrinks: Sequence[Shrink]
) -> list[Setting]:
    """All settings that there are, the one that gives up nothing first.

    Args:
        native, floor: tokens of one frame, at most and at least.
        caches, shrinks: ways to follow that may be taken, the ones that lose least first.
    """
    frame = min(native, budget)
    sizes = _steps(frame, min(floor, frame), FINE)
    budgets = _steps(budget, min(4 * floor, budget), FINE)
    found = [
        Setting(room, size, 1, cache, shrink)
        for room, size, cache, shrink in product(budgets, sizes, caches, shrinks)
        if size <= room
    ]
    sizes, budgets = _steps(frame, min(floor, frame), COARSE), _steps(budget, min(4 * floor, budget), COARSE)
    found += [
        Setting(room, size, stride, caches[-1], shrinks[-1])
        for stride, room, size in product(STRIDES[1:], budgets, sizes)
        if size <= room
    ]
    return found


def worth(setting: Setting, native: int, budget: int) -> float:
    """The share of answers that are right, by what was measured on penguin-nano.

    Args:
        native, budget: tokens of a frame and of the window where nothing is given up.
    """
    i, u = _place(setting.budget / budget)
    j, v = _place(setting.frame_tokens / native)
    rows = [WORTH[row][j] + v * (WORTH[row][j + 1] - WORTH[row][j]) for row in (i, i + 1)]
    right = rows[0] + u * (rows[1] - rows[0])
    return right - LOST[setting.cache] - LOST[setting.shrink] - SKIPPED * math.log2(setting.stride)


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


def _place(share: float) -> tuple[int, float]:
    """Where a share lies between two of `SHARES`, on a scale of doublings."""
    at = min(max(-math.log2(max(share, 1e-9)), 0.0), len(SHARES) - 1.0)
    i = min(int(at), len(SHARES) - 2)
    return i, at - i
