"""`penguin-edge profile`: what each stage takes on this machine, fitted and kept beside the bundle."""

from __future__ import annotations

import argparse

from penguin_edge.bundle.contract import PROFILE
from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import emit, positive, say, status, table
from penguin_edge.commands.options import add_json, add_threads
from penguin_edge.errors import BundleError, WriteError
from penguin_edge.machine import describe
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.live.profile import LONG_S, ROUNDS, keep, profile

NOISY = 1.0
"""Error of predictions, at the 95th percentile, above which the profile is said to mislead."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("profile", help="measure every stage here and keep a cost model in the bundle")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "--repeat", type=positive, help=f"rounds (default: {ROUNDS}, and more until {LONG_S:.0f} s have passed)"
    )
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.read(args.bundle)
    engine = open_engine(bundle, threads=args.threads)
    result = profile(engine, repeat=args.repeat, progress=status)
    status("")
    result |= {"machine": describe(), "threads": args.threads, "engine": engine.name}
    rows: list[tuple[str, ...]] = [("stage", "least ms", "most ms", "error of sizes not fitted, median")]
    for stage, cost in result["cost"].items():
        least, most = cost["ms"][0][0], cost["ms"][-1][-1]
        error = result["error_by_stage"].get(stage)
        rows.append((stage, f"{least:.2f}", f"{most:.2f}", "" if error is None else f"{error:.1%}"))
    print(table(rows, indent=""))
    if result["error"]["p95"] > NOISY:
        status("")
        say(
            f"the machine was busy: predictions were off by up to {result['error']['p95']:.0%}, which would mislead a "
            "controller; profile again on an idle machine"
        )
    print(f"error: median {result['error']['median']:.1%}, p95 {result['error']['p95']:.1%}")
    try:
        keep(bundle, result)
    except WriteError as error:
        raise BundleError(f"{bundle.path(PROFILE)}: cannot be written ({error.reason}); nothing was kept") from error
    if args.json:
        emit(result)
    return 0
