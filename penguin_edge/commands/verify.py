"""`penguin-edge verify BUNDLE`: does it compute what the eager model computes? The last line of stdout is JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import emit, require_torch, say, table
from penguin_edge.commands.options import add_allow_outside, add_json, add_threads
from penguin_edge.errors import BundleError, InputError
from penguin_edge.runtime.engines.opening import open_engine


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("verify", help="compare a bundle with the eager model, stage by stage")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="compute the reference again instead of using the check data"
    )
    parser.add_argument(
        "--calibration", metavar="DIR|FILE", help="with --against: the data that the bundle was calibrated with"
    )
    add_allow_outside(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of a preset's random weights (default: %(default)s)")
    add_threads(parser)
    add_json(parser, "print the JSON line only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not Path(args.bundle).is_dir():
        raise BundleError(f"{args.bundle}: no such folder; wanted a bundle made by `penguin-edge export`")
    bundle = Bundle.read(args.bundle)
    bundle.check_hashes()
    checkpoint = None
    if args.calibration and not args.against:
        raise InputError("--calibration is for --against, which makes the integers again; the check data needs none")
    if args.against:
        require_torch()
        from penguin_edge.model.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(args.against, seed=args.seed)
    from penguin_edge.export.verify import verify_bundle

    engine = open_engine(bundle, threads=args.threads)
    result = verify_bundle(
        bundle,
        engine,
        checkpoint,
        lambda line: say(f"  {line}"),
        args.calibration,
        allow_outside=args.allow_outside,
    )
    if not args.json:
        head = ("stage", "max abs", "relative", "cosine", "")
        rows = [
            (
                s["name"],
                f"{s['max_abs']:.2e}",
                f"{s['relative']:.2e}",
                f"{s['cosine']:.6f}",
                "ok" if s["passed"] else "FAILED",
            )
            for s in result["stages"]
        ]
        print(table([head, *rows], indent=""))
        limits = result["tolerance"]
        print(
            f"against {result['against']}; relative <= {limits['relative']:g}, cosine >= {limits['cosine']} "
            f"({limits['reason']})"
        )
    for stage in result["stages"]:
        if stage["passed"] and stage["detail"]:
            say(f"{stage['name']}: {stage['detail']}")
        elif not stage["passed"]:
            say(f"{stage['name']} failed: relative error {stage['relative']:.3g}. {stage['detail']}")
    emit(result)
    return 0 if result["passed"] else 1
