"""What is measured in which order, and what the samples mean: no clock, no process, no peer.

A round asks all contestants in turn for each of its orders. Prompts come first, the shortest first, for they begin
with an empty cache and leave the longest behind; then steps, those after the longest past first, for a cache is cut for
nothing and filled at the price of a prompt. A past beyond the longest prompt has rounds of its own at the end: each
contestant fills its cache once, in the round that warms up.

A ratio is the median over rounds of one round's speeds. The best peer of a length is the one with the highest median
there. Our engine of a geometric mean is one for all lengths, that with the highest mean: nobody changes the engine in
the middle of an answer, whereas the peers are given the best of each length. An interval is a bootstrap over rounds,
with peers and engine as chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PEERS = ("llama.cpp", "llama.cpp plain", "genai")
INT4, INT8_PREFILL = ("onnx int4", "executorch int4"), ("onnx int8-prefill",)
SMALL_CACHE = ("onnx int4 kv8",)
GEOMEANS = {
    "decode": ("decode", INT4 + SMALL_CACHE),
    "prefill_int4": ("prefill", INT4),
    "prefill_int8": ("prefill", INT8_PREFILL),
}
"""Name -> what is compared, and our contestants for it. `int8-prefill` decodes with the graph of `int4`: taking the
better of the two would count noise as a gain. An int8 KV cache makes decoding faster and prompts slower."""
DRAWS = 2000

Order = tuple[str, int] | tuple[str, int, int]
Speeds = dict[str, dict[tuple[str, int], list[float]]]
"""Contestant -> (`prefill` or `decode`, length) -> tokens/s, one for each round."""


@dataclass(frozen=True)
class Run:
    """What one shape gave at one number of threads."""

    shape: str
    threads: int
    speeds: Speeds
    bandwidth_gb_s: float
    int8_gop_s: float


def phases(prefill: Sequence[int], decode: Sequence[int], tokens: int) -> list[list[Order]]:
    """The orders of each phase's rounds; `tokens` steps are timed after each past of `decode`."""
    longest = max(prefill, default=0)
    short: list[Order] = [("prefill", count) for count in sorted(set(prefill))]
    short += [("decode", past, tokens) for past in sorted(set(decode), reverse=True) if past <= longest]
    long: list[list[Order]] = [[("decode", past, tokens)] for past in sorted(set(decode)) if past > longest]
    return [orders for orders in [short, *long] if orders]


def ratio(ours: Sequence[Sequence[float]], peers: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Geometric mean over lengths of medians over rounds, and its 95 % interval; both are [lengths, rounds]."""
    each = np.log(np.array(ours) / np.array(peers))
    draws = np.random.default_rng(0).integers(0, each.shape[1], (DRAWS, each.shape[1]))
    low, high = np.quantile(np.median(each[:, draws], axis=2).mean(0), (0.025, 0.975))
    return float(np.exp(np.median(each, axis=1).mean())), float(np.exp(low)), float(np.exp(high))


def best_peer(speeds: Speeds, at: tuple[str, int]) -> str:
    """The fastest peer that took part."""
    return max((peer for peer in PEERS if peer in speeds), key=lambda peer: statistics.median(speeds[peer][at]))


def rows(run: Run) -> list[dict[str, Any]]:
    """One row for each contestant and length."""
    found = []
    for at in next(iter(run.speeds.values())):
        best = run.speeds[best_peer(run.speeds, at)][at]
        for engine, measured in run.speeds.items():
            value, low, high = ratio([measured[at]], [best])
            found.append({"shape": run.shape, "threads": run.threads, "what": at[0], "length": at[1], "engine": engine,
                          "tokens_per_s": round(statistics.median(measured[at]), 3),
                          "ratio_to_best_peer": round(value, 4), "ci95": [round(low, 4), round(high, 4)]})  # fmt: skip
    return found


def geomeans(run: Run) -> dict[str, dict[str, Any] | None]:
    """Each of GEOMEANS: the better of our engines, its `ratio` and `ci95`; None where none of them took part."""
    found: dict[str, dict[str, Any] | None] = {}
    for name, (what, engines) in GEOMEANS.items():
        lengths = [at for at in next(iter(run.speeds.values())) if at[0] == what]
        best = [run.speeds[best_peer(run.speeds, at)][at] for at in lengths]
        each = {ours: ratio([run.speeds[ours][at] for at in lengths], best)
                for ours in engines if lengths and ours in run.speeds}  # fmt: skip
        if not each:
            found[name] = None
            continue
        winner = max(each, key=lambda ours: each[ours][0])
        value, low, high = (round(number, 4) for number in each[winner])
        found[name] = {"engine": winner, "ratio": value, "ci95": [low, high]}
    return found


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The last line of the output.

    `geomean` has the smallest ratio of all shapes and `geomean_by_shape` each of them; they, `bandwidth_gb_s` and
    `int8_gop_s` are of the runs with the most threads (the two rates: of the first of them). Unknown is None.
    """
    most = [run for run in runs if run.threads == max(run.threads for run in runs)]
    by_shape = {run.shape: geomeans(run) for run in most}
    smallest = {}
    for name in GEOMEANS:
        ratios = [entry["ratio"] for means in by_shape.values() if (entry := means[name])]
        smallest[name] = min(ratios) if ratios else None
    return {"rows": [row for run in runs for row in rows(run)], "geomean": smallest, "geomean_by_shape": by_shape,
            "bandwidth_gb_s": round(most[0].bandwidth_gb_s, 2), "int8_gop_s": round(most[0].int8_gop_s, 1)}  # fmt: skip


def bits_per_weight(weight_bytes: int, parameters: int) -> float:
    """Stored bits for each weight, scales and all."""
    return weight_bytes * 8 / parameters
