"""`penguin-edge profile`: what each stage takes on this machine, fitted and kept beside the bundle."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import Any

from penguin_edge.bundle.contract import PROFILE
from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import above_zero, emit, positive, say, status, table
from penguin_edge.commands.options import add_json, add_threads
from penguin_edge.errors import BundleError, WriteError
from penguin_edge.machine import describe, peak_mb
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.latency.profile import SECONDS, ProfileOptions, ProfileStopped, Progress, keep, profile
from penguin_edge.stopping import CTRL_C

NOISY = 1.0
"""Error of predictions, at the 95th percentile, above which the profile is said to mislead."""
REWRITTEN_S, SAID_S = 0.2, 10.0
"""Seconds between lines of progress: on a terminal, elsewhere."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("profile", help="measure every stage here and keep a cost model in the bundle")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "--seconds",
        type=above_zero,
        help=f"limit of the measurement; what does not fit is foreseen from the rest (default: {SECONDS:.0f}, or none "
        "with --repeat)",
    )
    parser.add_argument("--repeat", type=positive, help="rounds (default: as many as fit the seconds)")
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(run=run)


class ProfileLine:
    """Where a profile is, on stderr: rewritten on a terminal, else every ten seconds."""

    def __init__(self) -> None:
        self._rewrites = sys.stderr.isatty()
        self._last = time.monotonic() - (REWRITTEN_S if self._rewrites else 0.0)

    def __call__(self, at: Progress) -> None:
        now = time.monotonic()
        if now - self._last < (REWRITTEN_S if self._rewrites else SAID_S):
            return
        self._last = now
        line = f"round {at.round}, [{at.done}/{at.total}], about {at.left_s:.0f} s left, peak {peak_mb():.0f} MB"
        if self._rewrites:
            status(line[: shutil.get_terminal_size().columns - 1])
        else:
            say(line)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.read(args.bundle)
    options = ProfileOptions(args.seconds, args.repeat)
    engine = open_engine(bundle, threads=args.threads)
    try:
        result = profile(engine, options, progress=ProfileLine())
    except ProfileStopped as stop:
        # Told and kept while the stop is being answered: people press twice.
        return _finish(args, bundle, engine, stop.result)
    return _finish(args, bundle, engine, result)


def _finish(args: argparse.Namespace, bundle: Bundle, engine: Engine, result: dict[str, Any]) -> int:
    """Keep what was measured, and tell of it."""
    status("")
    result |= {"machine": describe(), "threads": args.threads, "engine": engine.name, "peak_mb": peak_mb()}
    rows: list[tuple[str, ...]] = [("stage", "least ms", "most ms", "error of sizes not fitted, median")]
    for stage, cost in result["cost"].items():
        least, most = cost["ms"][0][0], cost["ms"][-1][-1]
        missed = result["error_by_stage"].get(stage)
        rows.append((stage, f"{least:.2f}", f"{most:.2f}", "" if missed is None else f"{missed:.1%}"))
    print(table(rows, indent=""))
    error = result["error"]
    if error["p95"] is not None:
        if error["p95"] > NOISY:
            say(
                f"the machine was busy: predictions were off by up to {error['p95']:.0%}, which would mislead a "
                "controller; profile again on an idle machine"
            )
        print(f"error: median {error['median']:.1%}, p95 {error['p95']:.1%}")
    try:
        keep(bundle, result)
    except WriteError as failure:
        raise BundleError(
            f"{bundle.path(PROFILE)}: cannot be written ({failure.reason}); nothing was kept"
        ) from failure
    missing = sum(row.count(0) for rows in result["measured"].values() for row in rows)
    say(
        f"{result['seconds']:.0f} s, peak {result['peak_mb']:.0f} MB; {missing} points of the tables are foreseen, not "
        "measured"
    )
    if result["stopped"]:
        say(f"stopped: what was measured until then is kept in {bundle.path(PROFILE)}, and can be used")
    if args.json:
        emit(result)
    return CTRL_C if result["stopped"] else 0
