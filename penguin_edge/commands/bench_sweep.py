"""`penguin-edge bench --stream CLIP --sweep`: fixed settings beside the latency controller, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from penguin_edge.commands.common import status, table
from penguin_edge.errors import InputError
from penguin_edge.runtime.bench.streams import StreamRun
from penguin_edge.runtime.bench.sweep import SETTLED_S, TIMES, Rig, bench_sweep, grid
from penguin_edge.runtime.latency.control import LatencyTarget
from penguin_edge.runtime.latency.steering import sizes, ways
from penguin_edge.runtime.live.live import Live

LEAST_S = 2 * SETTLED_S
"""Shortest run that says something."""


def check(args: argparse.Namespace) -> None:
    """Refuse a sweep that could not be made.

    Raises:
        InputError: no stream, or runs that are too short.
    """
    if args.sweep and not args.stream:
        raise InputError("--sweep is for --stream CLIP; add it")
    if args.sweep and args.duration < LEAST_S:
        raise InputError(f"--sweep with --duration {args.duration:g}: each run has to last {LEAST_S:g} s or more")


def sweep(rig: Rig, budget: int, options: StreamRun, target: LatencyTarget | None) -> dict[str, Any]:
    """The keys `sweep`, `held` and `sweep_samples` of the result; see docs/benchmarks/schema.md.

    Args:
        budget: visual tokens of the window where nothing is given up.
        target: None for several that follow from what the first setting takes.
    """
    with rig.stream(budget) as stream:
        first = next(rig.frames())
        settings = grid(*sizes(stream, first.pixels.shape[:2], budget), ways(stream)[0])
    runs, done = len(settings) + (1 if target else len(TIMES)), 0

    def progress(what: str) -> Callable[[float, Live], None]:
        nonlocal done
        done += 1
        number = done

        def told(at: float, live: Live) -> None:
            left = (runs - number + 1) * options.duration_s - at
            status(f"run {number} of {runs}, {what}: {at:.0f} of {options.duration_s:.0f} s, {left / 60:.0f} min left")

        return told

    return bench_sweep(rig, settings, options, [target] if target else [], progress)


def show(result: dict[str, Any]) -> None:
    """Print what a sweep found."""
    status("")
    shown: list[tuple[str, ...]] = [("fixed setting", "tokens kept", "missed", "first p99 ms", "frame p99 ms")]
    for one in result["sweep"]:
        name = f"budget {one['budget']}, {one['frame_tokens']} a frame, {one['cache']}"
        shown.append((name, *_cells(one)))
    print(table(shown, indent=""))
    shown = [("controlled", "tokens kept", "missed", "first p99 ms", "frame p99 ms", "of the best fixed", "decisions")]
    for one in result["held"]:
        share = "-" if one["share_of_best"] is None else f"{100 * one['share_of_best']:.0f} %"
        limit = one["target"]["first_token_ms"]
        shown.append((f"target {limit:.1f} ms", *_cells(one), share, str(len(one["decisions"]))))
    print(table(shown, indent=""))


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    tokens, missed = one["visual_tokens"], one["miss_percent"]
    p99 = (one["first_token_ms"]["p99"], one["frame_age_ms"]["p99"])
    return (
        "-" if tokens is None else f"{tokens:.0f}",
        "-" if missed is None else f"{missed:.1f} %",
        *("-" if value is None else f"{value:.1f}" for value in p99),
    )
