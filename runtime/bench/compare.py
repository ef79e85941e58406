"""Two measurements of `penguin-bench/1` side by side: what got slower, and whether that is more than noise.

A metric's change is the ratio of the medians, B over A, of raw samples in milliseconds; its 95 % interval is a
bootstrap over both. It is `worse` when the interval is above 1 and the ratio above what may be tolerated, `better` when
the interval is below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penguin_edge.errors import InputError
from penguin_edge.files import read_json
from penguin_edge.runtime.bench.stages import SCHEMA
from penguin_edge.schema import Maybe, Real, Record, Rows, Table, Text

DRAWS = 2000
LEAST = 3
"""Samples on each side, below which nothing can be said."""
TELLING = 0.1
"""Where the interval ends further above 1 than this, and than what is tolerated, the verdict is `unclear`."""
_samples = Rows(Real(0))
RULES = Record(
    {"schema": Text()},
    {
        "machine": Record({}, open=True),
        "rows": Rows(Record({"test": Text(longest=200), "samples_ms": _samples}, open=True)),
        "video": Maybe(Record({}, {"samples": Table(Text(longest=200), _samples)}, open=True)),
        "samples": Table(Text(longest=200), _samples),
    },
    open=True,
)
"""What is read of a result."""
SAME = ("processor", "cores", "system")
"""Fields of the machine that ought to be equal."""


def read(path: str | Path) -> dict[str, Any]:
    """A result that `bench -o` wrote.

    Raises:
        InputError: no such file, no JSON, or another schema.
    """
    data = read_json(path, rule=RULES, advice="name a file that `bench -o` wrote")
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path}: its schema is {schema!r}, wanted {SCHEMA!r}; measure again with `bench -o`")
    try:
        machine, found = data["machine"], samples(data)
        whole = isinstance(machine, dict) and all(isinstance(x, (int, float)) for v in found.values() for x in v)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path}: a part of it is missing or no number; measure again with `bench -o`")
    return data


def samples(result: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds by metric."""
    found = {row["test"]: row["samples_ms"] for row in result.get("rows", [])}
    clip = (result.get("video") or {}).get("samples", {})
    return found | {f"video {name}": values for name, values in clip.items()} | result.get("samples", {})


def change(before: Sequence[float], after: Sequence[float], tolerated: float) -> dict[str, Any]:
    """One metric; `tolerated` is a share, such as 0.05."""
    if min(len(before), len(after)) < LEAST:
        return {"ratio": None, "ci95": None, "verdict": "too few samples", "samples": [len(before), len(after)]}
    random = np.random.default_rng(0)
    a, b = np.array(before, float), np.array(after, float)
    drawn = [np.median(x[random.integers(0, len(x), (DRAWS, len(x)))], axis=1) for x in (a, b)]
    ratio = float(np.median(b) / max(np.median(a), 1e-12))
    low, high = np.quantile(drawn[1] / np.maximum(drawn[0], 1e-12), (0.025, 0.975))
    verdict = "same" if high <= 1 + max(tolerated, TELLING) else "unclear"
    if low > 1 and ratio > 1 + tolerated:
        verdict = "worse"
    elif high < 1:
        verdict = "better"
    counts = [len(before), len(after)]
    return {"ratio": ratio, "ci95": [float(low), float(high)], "verdict": verdict, "samples": counts}


def compare(before: dict[str, Any], after: dict[str, Any], tolerated: float = 0.0) -> dict[str, Any]:
    """All metrics that both have.

    Raises:
        InputError: they have none in common.
    """
    left, right = samples(before), samples(after)
    common = [name for name in left if name in right]
    if not common:
        raise InputError("the two files have no test in common; measure both with the same options")
    metrics = {name: change(left[name], right[name], tolerated) for name in common}
    differing = [name for name in SAME if before["machine"].get(name) != after["machine"].get(name)]
    return {
        "metrics": metrics,
        "not_judged": [name for name, metric in metrics.items() if metric["ratio"] is None],
        "left_out": sorted(set(left) ^ set(right)),
        "machines_differ": differing,
    }
