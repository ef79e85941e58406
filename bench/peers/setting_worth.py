"""The worth of a stream's setting: the share of questions that it answers right, by a small table.

    worth = table(min(1, budget * stride), frame) * strides[stride] + rebase + pool

The table is read along straight lines in the logarithms of both shares. It is the mean over clips of several sizes, and
made monotone: more tokens are never worth less. A budget that has lost frames to the stride is as good as a larger one
of all frames, hence the product.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any

import numpy as np
from clip_questions import Way, mean
from numpy.typing import NDArray

BUDGETS = (1.0, 0.707, 0.5, 0.354, 0.25, 0.177, 0.125, 0.0625)
"""Between all native and anything less is the largest step, and then hardly one down to a third: close rows."""
FRAMES = (1.0, 25 / 36, 16 / 36, 9 / 36, 4 / 36)
"""Sizes of the ladder of a frame of 36 tokens; one of 9 has the first, third and last."""

Measured = dict[Way, float]
"""Accuracy of each way, for clips of one size."""


@dataclass(frozen=True)
class Worth:
    """Rows of `table` are budgets, columns sizes of frames, both as shares of native and falling; beyond the last one
    its value holds. `rebase` and `pool` are differences."""

    budgets: tuple[float, ...]
    frames: tuple[float, ...]
    table: tuple[tuple[float, ...], ...]
    strides: dict[int, float]
    rebase: float = 0.0
    pool: float = 0.0

    def __call__(self, way: Way) -> float:
        columns = [interpolated(row, self.frames, way.frame) for row in self.table]
        found = interpolated(columns, self.budgets, way.budget * way.stride) * self.strides[way.stride]
        return found + self.rebase * (way.cache == "rebase") + self.pool * (way.shrink == "pool")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interpolated(values: Sequence[float], shares: Sequence[float], share: float) -> float:
    """The value at a share, along straight lines in its logarithm; `shares` fall, and beyond them values hold."""
    at = min(max(-log2(share), -log2(shares[0])), -log2(shares[-1]))
    places = [-log2(one) for one in shares]
    i = min(max(bisect_right(places, at) - 1, 0), len(places) - 2)
    part = (at - places[i]) / (places[i + 1] - places[i])
    return values[i] + part * (values[i + 1] - values[i])


def monotone(table: NDArray[np.float64], rounds: int = 500) -> NDArray[np.float64]:
    """The nearest table, by squares, whose rows and columns never rise (Dykstra's projections)."""
    found = table.copy()
    rest = [np.zeros_like(table), np.zeros_like(table)]
    for _ in range(rounds):
        for axis in (0, 1):
            wanted = found + rest[axis]
            found = np.apply_along_axis(_falling, axis, wanted)
            rest[axis] = wanted - found
    return found


def _falling(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest sequence that never rises: neighbours that do are pooled."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        total, count = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] < total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    return np.concatenate([np.full(count, total / count) for total, count in blocks])


def fit(measured: Sequence[Measured], exact: Callable[[Way, int], float], real: Sequence[Measured] = ()) -> Worth:
    """The worth of settings from accuracies, one entry for each size of clip.

    Args:
        exact: share of native tokens that a way's largest frames have in clips of entry i: sizes are few.
        real: accuracies of real streams, which tell what `rebase` and `pool` make of the default.
    """
    tables = []
    for i, one in enumerate(measured):
        rows = []
        for budget in BUDGETS:
            # Several shares may be the same size.
            points = {exact(way, i): value for way, value in one.items() if _plain(way) and way.budget == budget}
            shares = sorted(points, reverse=True)
            rows.append([interpolated([points[share] for share in shares], shares, frame) for frame in FRAMES])
        tables.append(rows)
    table = monotone(np.mean(np.array(tables), axis=0)).tolist()
    found = tuple(tuple(row) for row in table)
    bare = Worth(BUDGETS, FRAMES, found, {stride: 1.0 for stride in (1, 2, 4, 8)})
    strides = {}
    for stride in bare.strides:
        pairs = [
            (value, bare(_at(way, exact(way, i))))
            for i, one in enumerate(measured)
            for way, value in one.items()
            if way.stride == stride and _planned(way)
        ]
        strides[stride] = sum(y * t for y, t in pairs) / sum(t * t for _, t in pairs) if stride > 1 else 1.0
    return Worth(BUDGETS, FRAMES, found, strides, _difference(real, cache="rebase"), _difference(real, shrink="pool"))


def errors(worth: Worth, measured: Sequence[Measured], exact: Callable[[Way, int], float]) -> dict[Way, list[float]]:
    """Worth minus accuracy of every planned adaptive way, by size of clip."""
    found: dict[Way, list[float]] = {}
    for i, one in enumerate(measured):
        for way, value in one.items():
            if _planned(way):
                found.setdefault(way, []).append(worth(_at(way, exact(way, i))) - value)
    return found


def _at(way: Way, frame: float) -> Way:
    return Way(way.budget, frame, way.stride, way.tra, way.cache, way.shrink)


def _planned(way: Way) -> bool:
    return not way.real and way.running and way.tra == "adaptive" and way.newest is None


def _plain(way: Way) -> bool:
    return _planned(way) and way.stride == 1


def _difference(measured: Sequence[Measured], **change: str) -> float:
    """Mean difference that one change makes to real streams that are otherwise as by default."""
    found = []
    for one in measured:
        for way, value in one.items():
            wanted = {"cache": "recompute", "shrink": "encode"} | change
            if way.real and (way.cache, way.shrink) == (wanted["cache"], wanted["shrink"]):
                found.append(value - one[Way(way.budget, way.frame, real=True)])
    return mean(found) if found else 0.0
