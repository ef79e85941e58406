"""A line through what was measured of a stage: milliseconds = constant + slopes x amounts of work.

A point counts by the lowest tenth of its samples, since other programs only ever add to a call's time. Those that keep
the cores busy add to every sample of a call that is longer than a slice of theirs, and nothing at that point tells what
it takes otherwise. But its threads then work at once less than those of smaller calls were seen to do: such a point
counts little, and the line through the others stands for it.

Errors are relative, so that a call of a millisecond counts as much as one of a second; their absolute values are made
least, not their squares, so that single points which a slow second has spoilt do not move the line. No term is
negative. The second amount is attention, whose slope few small calls do not tell: it is held to `RANGE` times the
first, and weakly to `ATTENTION` times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from penguin_edge.runtime.latency.operations import Amounts

ATTENTION, RANGE = 1.5, (0.5, 4.0)
"""Time of a multiply-add of the attention over that of one with weights: where measurements do not say, and its limits:
two calls that noise has spoilt could otherwise be foreseen to grow with the square of their size."""
HELD = 0.03
"""Weight of that among points of weight 1."""
STEPS, FLOOR = 25, 1e-4
"""Steps of the reweighting, and the relative error below which all errors count alike."""

LEAST = 1e-6
"""Milliseconds that every call takes, so that errors can be relative."""

QUANTILE = 0.1
"""Share of a point's samples below the value that counts."""
LEAST_SHARE, SHARPLY = 0.3, 4
"""Share of the threads at once below which all points count alike, and the power of it by which they count."""
OFTEN = 16
"""Samples beyond which a point's weight grows no more."""
LEANS = 4.0
"""Samples of a point with which half of its distance from the line is believed."""

Point = tuple[float, ...]
"""What a stage is given, one number for each of its axes."""
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call, and processor time of all threads meanwhile; 0: not known."""

    ms: float
    cpu_ms: float = 0.0

    @property
    def threads(self) -> float:
        """Threads that worked at once."""
        return self.cpu_ms / max(self.ms, LEAST)


@dataclass(frozen=True)
class Measured:
    """What a call at a point takes, from so many samples; `trust` is 1 where no other program ran."""

    ms: float
    count: int
    trust: float = 1.0

    @property
    def weight(self) -> float:
        return self.trust * math.sqrt(min(self.count, OFTEN))

    @property
    def believed(self) -> float:
        """Share of the distance from the line that is the point's own."""
        return self.trust * self.count / (self.count + LEANS)


def measured(samples: Sequence[Timing], threads: float = 0.0) -> Measured:
    """One point of its samples, of which there is at least one; `threads` of smaller calls work at once, 0: unknown."""
    ms = max(float(np.quantile([sample.ms for sample in samples], QUANTILE)), LEAST)
    fastest = sorted(samples, key=lambda sample: sample.ms)[: math.ceil(len(samples) / 4)]
    share = float(np.median([sample.threads for sample in fastest])) / threads if threads else 1.0
    return Measured(ms, len(samples), min(1.0, max(LEAST_SHARE, share)) ** SHARPLY)


def all_measured(points: Mapping[Point, Sequence[Timing]], work: Callable[[Point], float]) -> dict[Point, Measured]:
    """All points of a stage; `work` puts them in order."""
    found, threads = {}, 0.0
    for point in sorted(points, key=work):
        threads = max(threads, float(np.quantile([sample.threads for sample in points[point]], 0.9)))
        found[point] = measured(points[point], threads)
    return found


@dataclass(frozen=True)
class Line:
    """Milliseconds: at no work, and for each 10^9 of the two amounts."""

    constant: float
    slopes: Amounts

    def ms(self, amounts: Amounts) -> float:
        return max(LEAST, self.constant + self.slopes[0] * amounts[0] + self.slopes[1] * amounts[1])


def fit_line(amounts: Sequence[Amounts], points: Sequence[Measured]) -> Line:
    """The line through points of these amounts."""
    took, given = np.array([point.ms for point in points]), np.array(amounts)
    low, high = RANGE
    # Terms: once per call, and work whose attention is as cheap and as dear as it may be.
    terms = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, low], [0.0, 1.0, high]])
    rows = np.column_stack((np.ones(len(took)), given)) @ terms.T / took[:, None]
    wanted, base = np.ones(len(took)), np.array([point.weight for point in points])
    if given[:, 1].any():
        reach = given[:, 1].max() / took.max()
        rows = np.vstack((rows, terms @ (0.0, -ATTENTION * reach, reach)))
        wanted, base = np.append(wanted, 0.0), np.append(base, HELD)
    else:
        rows[:, 2] = 0.0
    error = np.ones(len(wanted))
    for _ in range(STEPS):
        found = _least(rows, wanted, np.sqrt(base / np.maximum(np.abs(error), FLOOR)))
        error = rows @ found - wanted
    constant, first, second = (float(value) for value in found @ terms)
    return Line(constant, (first, second if given[:, 1].any() else 0.0))


def _least(rows: F64, wanted: F64, weights: F64) -> F64:
    """Least squares without negative terms: the best of all choices of terms."""
    rows, wanted = rows * weights[:, None], wanted * weights
    best, least = np.zeros(3), np.inf
    scale = np.abs(rows).max(0)
    for count in (1, 2, 3):
        for terms in map(list, combinations(np.flatnonzero(scale), count)):
            found = np.linalg.lstsq(rows[:, terms] / scale[terms], wanted, rcond=None)[0] / scale[terms]
            missed = float(np.sum((rows[:, terms] @ found - wanted) ** 2))
            # More terms have to be better, not just as good.
            if (found >= 0).all() and missed < least * (1 - 1e-9):
                best, least = np.zeros(3), missed
                best[terms] = found
    return best
