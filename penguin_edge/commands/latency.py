"""The flags of a latency target, and what they become: what `stream` and `bench --stream` share."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import above_zero, is_bundle, say
from penguin_edge.errors import InputError
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.latency.control import Decision, LatencyTarget
from penguin_edge.runtime.latency.cost import CostModel
from penguin_edge.runtime.latency.profile import ProfileOptions, differences, load, profile
from penguin_edge.runtime.live.events import Observer

AT_ONCE_S = 3.0
"""Limit of what is measured before a stream begins, beside loading the model, the calls without which there is no cost
model, and the few that tell what a pause costs."""


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of a target."""
    parser.add_argument(
        "--target-first-token",
        type=above_zero,
        metavar="MS",
        help="adapt sizes, budget and rate so that answers begin within MS",
    )
    parser.add_argument(
        "--target-frame", type=above_zero, metavar="MS", help="and frames are ready within MS (default: as for answers)"
    )
    parser.add_argument(
        "--target-tokens-per-s", type=above_zero, metavar="N", help="and answers come at N tokens per second"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.jsonl",
        help="write every change of the controller to this file, one per line",
    )


def target(args: argparse.Namespace) -> LatencyTarget | None:
    """The target that was asked for.

    Raises:
        InputError: a flag of a target without --target-first-token, or a trace that cannot be written.
    """
    if args.target_first_token is None:
        if args.target_frame or args.target_tokens_per_s or args.trace:
            raise InputError("--target-frame, --target-tokens-per-s and --trace need --target-first-token MS; add it")
        return None
    if args.trace and (args.trace.is_dir() or not args.trace.parent.is_dir()):
        raise InputError(f"{args.trace}: cannot be written; name a file in a folder that is there")
    # A late frame delays the answer that waits for it.
    return LatencyTarget(
        args.target_first_token, args.target_frame or args.target_first_token, args.target_tokens_per_s
    )


def cost(model: str, engine: Engine, threads: int | None) -> CostModel:
    """Cost model that is kept beside the bundle, or is measured now: a few calls, for a stream is to begin at once.

    Raises:
        BundleError: what is kept cannot be read.
    """
    bundle = Bundle.read(model) if is_bundle(model) else None
    kept = load(bundle) if bundle else None
    if kept is not None and bundle is not None:
        if other := differences(bundle, threads):
            say(
                f"the profile beside the model was measured with {other}: the first decisions will be off; "
                "run `penguin-edge profile` here"
            )
        return kept
    say(
        f"no profile of this machine is kept with the model: measuring a few calls, about {AT_ONCE_S:.0f} s "
        "(`penguin-edge profile` would measure it well, and keep it)"
    )
    result = profile(engine, ProfileOptions(seconds=AT_ONCE_S, tried=False), progress=lambda at: None)
    return CostModel.from_json(result["cost"])


class Trace(Observer):
    """Writes each decision to a file at once, as one line of JSON."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def decided(self, decision: Decision) -> None:
        print(json.dumps(decision.to_json()), file=self._file, flush=True)


def trace(args: argparse.Namespace, opened: ExitStack) -> Observer:
    """The observer that --trace asks for; `opened` closes its file.

    Raises:
        InputError: the file cannot be written.
    """
    if args.trace is None:
        return Observer()
    try:
        file = opened.enter_context(args.trace.open("w", encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{args.trace}: cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from error
    return Trace(file)
