"""`penguin-edge compare`: what got slower between two measurements, for a person or for CI."""

from __future__ import annotations

import argparse

from penguin_edge.commands.common import emit, say, table
from penguin_edge.commands.options import add_json
from penguin_edge.runtime.bench.compare import LEAST, compare, read


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("compare", help="two results of `bench -o`: what got slower")
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument(
        "--fail-above",
        type=_share,
        metavar="5%",
        help="end with exit code 1 when a test is slower by this share, or none can be judged",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _share(text: str) -> float:
    """argparse type: 5% or 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, such as 5%")
    return value


def run(args: argparse.Namespace) -> int:
    before, after = read(args.before), read(args.after)
    result = compare(before, after, args.fail_above or 0.0)
    if result["machines_differ"]:
        say(f"warning: measured on different machines ({', '.join(result['machines_differ'])} differ)")
    if result["left_out"]:
        say(f"note: only in one of them: {', '.join(result['left_out'])}")
    rows: list[tuple[str, ...]] = [("", "B over A", "95 %", "")]
    for name, metric in result["metrics"].items():
        if metric["ratio"] is None:
            counts = " and ".join(map(str, metric["samples"]))
            rows.append((name, "-", "-", f"not judged: {metric['verdict']} ({counts}, wanted {LEAST})"))
        else:
            low, high = metric["ci95"]
            rows.append((name, f"{metric['ratio']:.3f}", f"{low:.3f} to {high:.3f}", metric["verdict"]))
    print(table(rows, indent=""))
    worse, unclear = (
        [name for name, metric in result["metrics"].items() if metric["verdict"] == verdict]
        for verdict in ("worse", "unclear")
    )
    if unclear:
        say(f"too noisy to tell: {', '.join(unclear)}; measure again with more rounds (--repeat), on an idle machine")
    if args.json:
        emit({**result, "worse": worse})
    if args.fail_above is not None and worse:
        say(f"slower by more than {args.fail_above:.1%}: {', '.join(worse)}")
        return 1
    if args.fail_above is not None and len(result["not_judged"]) == len(result["metrics"]):
        say(
            f"nothing could be judged: every metric has fewer than {LEAST} samples on one side; measure again with "
            f"`bench --repeat {LEAST}` or more, or a longer stream"
        )
        return 1
    return 0
