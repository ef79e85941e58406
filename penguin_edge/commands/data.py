"""`penguin-edge data`: draw a data set."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import get_args

from penguin_edge.commands.common import positive
from penguin_edge.dataset.nano.build import build
from penguin_edge.dataset.nano.scenes import SIDE
from penguin_edge.dataset.nano.tasks import Split


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = verbs.add_parser("data", help="draw a data set with questions and answers")
    sets = parser.add_subparsers(dest="set", required=True, metavar="SET")
    nano = sets.add_parser(
        "nano",
        help="pictures and clips of emoji, words and photographs, made for penguin-nano",
        description="Draw pictures and clips with questions, in the published training format. The same seed gives "
        "the same files.",
    )
    nano.add_argument(
        "--split",
        choices=get_args(Split),
        required=True,
        help="train; heldout: only combinations that training never sees; shown: those of training, asked as heldout",
    )
    nano.add_argument("--seed", type=int, default=0)
    nano.add_argument("--count", type=positive, required=True, help="records in all, spread evenly over the tasks")
    nano.add_argument("--tasks", help="comma-separated names; default: all of the split")
    nano.add_argument(
        "--side", type=positive, default=SIDE, metavar="PIXELS",
        help="width and height of a frame; in a larger one the same objects are spread out (default: %(default)s)",
    )  # fmt: skip
    nano.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that draw")
    nano.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    nano.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the set and say where it is."""
    started = time.monotonic()

    def progress(done: int, count: int) -> None:
        left = (time.monotonic() - started) / done * (count - done)
        print(f"\r{done:,} of {count:,} records, {left:.0f} s left ", end="", file=sys.stderr, flush=True)

    tasks = args.tasks.split(",") if args.tasks else None
    build(
        args.out, split=args.split, count=args.count, seed=args.seed, tasks=tasks, side=args.side,
        workers=args.workers, progress=progress,
    )  # fmt: skip
    print(file=sys.stderr)
    print(f"{args.out}: {args.count:,} records of the {args.split} split, seed {args.seed}")
    return 0
