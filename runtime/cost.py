"""What each stage will take on this machine, from measurements: a sum of a few terms, none of them negative.

| stage      | milliseconds                                   | of                                   |
|------------|------------------------------------------------|--------------------------------------|
| preprocess | a + b A                                        | A pixels of the frame                |
| encode     | a + b P + c P^2                                | P patches of one frame               |
| project    | a + b T                                        | T tokens of one frame                |
| prefill    | sum over its chunks of a + b n + c n past      | n positions of a chunk, `past` before|
| decode     | a + b past                                     | one position after `past`            |

No term is negative, so that no stage gets faster when it has more to do. Coefficients have the smallest squared
relative error, for a call of one millisecond is to be as right as one of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from penguin_edge.bundle import Bounds
from penguin_edge.errors import BundleError
from penguin_edge.runtime.engine import chunks

Point = tuple[float, ...]
"""What a stage is given: one number, for `prefill` (n, past)."""

TERMS: dict[str, Callable[[Point], list[float]]] = {
    "preprocess": lambda x: [1.0, x[0]],
    "encode": lambda x: [1.0, x[0], x[0] ** 2],
    "project": lambda x: [1.0, x[0]],
    "prefill": lambda x: [1.0, x[0], x[0] * x[1]],
    "decode": lambda x: [1.0, x[0]],
}


@dataclass(frozen=True)
class CostModel:
    """Coefficients by stage; `prefill` is of one chunk."""

    coefficients: Mapping[str, Sequence[float]]

    def stage_ms(self, stage: str, *x: float) -> float:
        """One call of a stage."""
        return float(np.dot(TERMS[stage](x), self.coefficients[stage]))

    def prefill_ms(self, count: int, past: int, bounds: Bounds) -> float:
        """A prompt of `count` positions after `past`, in the engine's chunks."""
        return sum(
            self.stage_ms("prefill", rows.stop - rows.start, past + rows.start) for rows in chunks(count, bounds)
        )

    def to_json(self) -> dict[str, list[float]]:
        return {stage: list(values) for stage, values in self.coefficients.items()}

    @classmethod
    def from_json(cls, data: Any) -> CostModel:
        """
        Raises:
            BundleError: not what `to_json` wrote.
        """
        try:
            found = {stage: [float(value) for value in data[stage]] for stage in TERMS if stage in data}
        except (TypeError, ValueError) as error:
            raise BundleError(f"the cost model cannot be read ({error}); run `penguin-edge profile` again") from error
        widths = {stage: len(TERMS[stage]((0.0, 0.0))) for stage in TERMS}
        if not found or any(len(v) != widths[stage] or min(v) < 0 for stage, v in found.items()):
            raise BundleError("the cost model is not one of this version; run `penguin-edge profile` again")
        return cls(found)


def fit(samples: Mapping[str, Mapping[Point, Sequence[float]]]) -> CostModel:
    """Coefficients for the medians of what was measured: stage -> point -> milliseconds."""
    return CostModel({stage: _fit(TERMS[stage], points) for stage, points in samples.items()})


def _fit(terms: Callable[[Point], list[float]], points: Mapping[Point, Sequence[float]]) -> list[float]:
    """Non-negative least squares of the relative error. With three terms all choices of them can be tried."""
    y = np.array([np.median(values) for values in points.values()])
    x = np.array([terms(point) for point in points]) / y[:, None]
    scale = np.maximum(np.abs(x).max(0), 1e-30)
    best, error = np.zeros(x.shape[1]), np.inf
    for count in range(1, x.shape[1] + 1):
        for chosen in map(list, combinations(range(x.shape[1]), count)):
            found, *_ = np.linalg.lstsq(x[:, chosen] / scale[chosen], np.ones(len(y)), rcond=None)
            missed = float(np.square(x[:, chosen] / scale[chosen] @ found - 1).sum())
            if (found >= 0).all() and missed < error:
                best, error = np.zeros(x.shape[1]), missed
                best[chosen] = found / scale[chosen]
    return best.tolist()


def errors(model: CostModel, samples: Mapping[str, Mapping[Point, Sequence[float]]]) -> dict[str, list[float]]:
    """Relative error of every point's prediction to its median, by stage."""
    return {
        stage: [abs(model.stage_ms(stage, *point) / float(np.median(values)) - 1) for point, values in points.items()]
        for stage, points in samples.items()
    }
