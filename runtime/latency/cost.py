"""What each stage will take on this machine: tables of what was measured, read along straight lines between points.

| stage      | milliseconds of                                | axes                                     |
|------------|------------------------------------------------|------------------------------------------|
| preprocess | one frame: label, name, resize, patches        | pixels as it came, patches               |
| encode     | one call                                       | patches of a frame, frames               |
| project    | one call                                       | tokens                                   |
| prefill    | one chunk; a prompt is the sum of its chunks   | positions, positions before              |
| decode     | one position                                   | positions before                         |
| move       | a part of the cache given another place        | positions                                |
| wake       | what an engine takes more after a pause        | none: one number                         |

Tables never fall along an axis, so that no stage gets faster when it has more to do: each is the middle between the
least one above what was found and the greatest one below. Below the first point of an axis its value holds; beyond the
last one of the first axis the value grows in proportion, beyond that of the second the last line goes on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import Bounds
from penguin_edge.errors import BundleError
from penguin_edge.runtime.engines.base import chunks
from penguin_edge.runtime.latency.fitting import Line, Measured, Point, Timing, fit_line, measured
from penguin_edge.runtime.latency.operations import Amounts, Operations

MOST = 1e12
"""Largest number in a cost model: 30 years in milliseconds."""
AXES = {"preprocess": 2, "encode": 2, "project": 1, "prefill": 2, "decode": 1, "move": 1, "wake": 1}


@dataclass(frozen=True)
class CostTable:
    """`ms[i][j]` at `axes[0][i]`, `axes[1][j]`; the second axis is one point where a stage has none."""

    axes: tuple[tuple[float, ...], tuple[float, ...]]
    ms: tuple[tuple[float, ...], ...]

    def at(self, x: float, y: float = 0.0) -> float:
        xs, ys = self.axes
        (i, u), (j, v) = _place(xs, x), _place(ys, y)
        # Beyond the last point lines may cross: what came before still holds.
        rows = self.ms if v > 1 or u > 1 else self.ms[i : i + 2]
        column = list(accumulate((row[j] + v * (row[min(j + 1, len(row) - 1)] - row[j]) for row in rows), max))
        if u > 1:
            return column[-1] * x / xs[-1]
        i = i if len(column) == len(self.ms) else 0
        return column[i] + u * (column[min(i + 1, len(column) - 1)] - column[i])


@dataclass(frozen=True)
class CostModel:
    """Tables by stage."""

    tables: Mapping[str, CostTable]

    def stage_ms(self, stage: str, *x: float) -> float:
        """One call of a stage."""
        return self.tables[stage].at(*x)

    @property
    def wake_ms(self) -> float:
        """What work after a pause takes more: threads and cores sleep, caches hold something else."""
        return self.stage_ms("wake", 0.0) if "wake" in self.tables else 0.0

    def prefill_ms(self, count: int, past: int, bounds: Bounds) -> float:
        """A prompt of `count` positions after `past`, in the engine's chunks."""
        return sum(
            self.stage_ms("prefill", rows.stop - rows.start, past + rows.start) for rows in chunks(count, bounds)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            stage: {"axes": [list(axis) for axis in table.axes], "ms": [list(row) for row in table.ms]}
            for stage, table in self.tables.items()
        }

    @classmethod
    def from_json(cls, data: Any) -> CostModel:
        """
        Raises:
            BundleError: not what `to_json` wrote.
        """
        try:
            found = {stage: _table(data[stage]) for stage in AXES if stage in data}
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"the cost model cannot be read ({type(error).__name__}: {error}); run `penguin-edge profile` again"
            ) from error
        needed = AXES.keys() - {"move"} if found.keys() & {"preprocess", "encode", "project"} else {"prefill", "decode"}
        if needed - found.keys():
            raise BundleError("the cost model is not one of this version; run `penguin-edge profile` again")
        return cls(found)


def line(points: Mapping[Point, Measured], amounts: Callable[[Point], Amounts]) -> Line:
    """Constant and slopes of a stage, from what was measured of it."""
    return fit_line([amounts(point) for point in points], list(points.values()))


def fit(
    samples: Mapping[str, Mapping[Point, Sequence[float] | Measured]],
    operations: Operations | None = None,
    grids: Mapping[str, Collection[Point]] | None = None,
) -> CostModel:
    """Tables of what was measured: stage -> point -> milliseconds.

    Args:
        operations: of the model; with them, points that were measured seldom or disturbed lean on the line through all
            of their stage.
        grids: points of each stage that the tables are to have, beside those of `samples`; those that were not
            measured, and the rest of the grid that they make, are taken from the line.
    Raises:
        ValueError: without operations, a stage that was not measured at every point of its grid.
    """
    tables = {}
    for stage, given in samples.items():
        points = {point: _point(values) for point, values in given.items()}
        if stage == "wake" or operations is None:
            tables[stage] = _table_of({point: found.ms for point, found in points.items()})
        else:
            amounts = partial(operations.amounts, stage)
            tables[stage] = _table_of(_filled(points, amounts, {*points, *(grids or {}).get(stage, ())}))
    return CostModel(tables)


def errors(
    model: CostModel, samples: Mapping[str, Mapping[Point, Sequence[float] | Measured]]
) -> dict[str, list[float]]:
    """Relative error of every point's prediction to what was measured there, by stage."""
    return {
        stage: [abs(model.stage_ms(stage, *point) / _point(values).ms - 1) for point, values in points.items()]
        for stage, points in samples.items()
    }


def _point(values: Sequence[float] | Measured) -> Measured:
    return values if isinstance(values, Measured) else measured([Timing(ms) for ms in values])


def _filled(
    points: Mapping[Point, Measured], amounts: Callable[[Point], Amounts], grid: Collection[Point]
) -> dict[Point, float]:
    """The whole grid: the line, times the believed part of how far from it the nearest measured point lies."""
    found = line(points, amounts)
    size = {point: math.log(found.ms(amounts(point))) for point in points}
    off = {point: one.believed * (math.log(one.ms) - size[point]) for point, one in points.items()}
    out = {}
    for point in product(*(sorted({point[i] for point in grid}) for i in range(len(next(iter(grid)))))):
        ms = math.log(found.ms(amounts(point)))
        apart = {other: abs(there - ms) for other, there in size.items()}
        near = point if point in off else min(apart, key=apart.__getitem__)
        out[point] = math.exp(ms + off[near])
    return out


def _table_of(full: Mapping[Point, float]) -> CostTable:
    cells = {(point[0], point[1] if len(point) > 1 else 0.0): ms for point, ms in full.items()}
    xs, ys = (tuple(sorted({cell[i] for cell in cells})) for i in (0, 1))
    ms = np.array([[cells.get((x, y), np.nan) for y in ys] for x in xs])
    if np.isnan(ms).any():
        raise ValueError("a stage was not measured at every point of its grid")
    return CostTable((xs, ys), tuple(map(tuple, _rising(ms).tolist())))


def _rising(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The middle between the least table above that never falls, and the greatest below."""
    above, below = ms.copy(), ms.copy()
    for axis in (0, 1):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return (above + below) / 2


def _place(axis: Sequence[float], value: float) -> tuple[int, float]:
    """The interval of an axis, and where in it, in units of its length: above 1 beyond the last point."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0.0
    at = min(bisect_right(axis, value) - 1, len(axis) - 2)
    return at, (value - axis[at]) / (axis[at + 1] - axis[at])


def _table(data: Any) -> CostTable:
    xs, ys = (_numbers(axis, "an axis") for axis in data["axes"])
    ms = tuple(_numbers(row, "a time") for row in data["ms"])
    if len(ms) != len(xs) or {len(row) for row in ms} != {len(ys)}:
        raise ValueError(f"{len(ms)} rows for axes of {len(xs)} and {len(ys)} points")
    grid = np.array(ms)
    if any((np.diff(axis) <= 0).any() for axis in (xs, ys)) or (_rising(grid) != grid).any():
        raise ValueError("a table that falls")
    return CostTable((xs, ys), ms)


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
            raise ValueError(f"{what} of {value!r}"[:80])
    return tuple(float(value) for value in values)
