"""Visual tokens kept against a latency target: the controller beside the best fixed setting of every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penguin_edge.reports.figures import STAND_IN, Draw, Sheet, log_x, new_sheet

ALLOWED = 0.01
"""Share of deadlines that a setting may miss and still count."""
STEPS = 120
"""Targets that the line of fixed settings is drawn through."""


def best_fixed(samples: Sequence[Mapping[str, Any]], first_ms: float, frame_ms: float | None) -> float | None:
    """Most tokens that a fixed setting keeps within limits in milliseconds; None where none does.

    Args:
        samples: entries of `sweep_samples`.
    """
    kept = []
    for one in samples:
        late = [took > first_ms for took in one["first_ms"]]
        if frame_ms is not None:
            late += [age > frame_ms for age in one["age_ms"]] + [True] * one["lost"]
        if late and one["tokens"] and sum(late) <= ALLOWED * len(late):
            kept.append(float(np.mean(one["tokens"])))
    return max(kept, default=None)


def kept_against_target(result: Mapping[str, Any]) -> Draw:
    """The picture of a result that has `sweep`."""
    held = result["held"]
    samples = result["sweep_samples"][: len(result["sweep"])]
    limits = [one["target"] for one in held]
    # The line goes through targets of the same form: a frame's limit over a first token's.
    ratio = None if limits[0]["frame_ms"] is None else limits[0]["frame_ms"] / limits[0]["first_token_ms"]

    def draw(narrow: bool) -> Sheet:
        found = new_sheet(narrow, [290])
        axes = found.axes[0]
        at = [one["first_token_ms"] for one in limits]
        line = np.geomspace(min(at) / 1.5, max(at) * 1.5, STEPS)
        best = [best_fixed(samples, x, None if ratio is None else ratio * x) for x in line]
        axes.step(
            line,
            [np.nan if y is None else y for y in best],
            where="post",
            color=STAND_IN["c1"],
            linewidth=2,
            label="best fixed setting",
        )
        for late, role, name in ((False, "c2", "controlled"), (True, "late", "controlled, more than 1 % late")):
            some = [
                (x, one["visual_tokens"])
                for x, one in zip(at, held, strict=True)
                if one["visual_tokens"] is not None and ((one["miss_percent"] or 0) > 100 * ALLOWED) == late
            ]
            if some:
                xs, ys = zip(*some, strict=True)
                axes.plot(xs, ys, "D", color=STAND_IN[role], markersize=7, label=name)
        log_x(axes, [*line], narrow)
        axes.set_xlabel("target, milliseconds")
        axes.set_ylim(0, 1.08 * max([*(y or 0.0 for y in best), *(one["visual_tokens"] or 0.0 for one in held), 1.0]))
        axes.set_ylabel("visual tokens kept")
        axes.grid(axis="y", linewidth=0.8)
        found.figure.legend(loc="outside lower left", ncols=1 if narrow else 3)
        return found

    return draw
