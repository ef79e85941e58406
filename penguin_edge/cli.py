"""The command line: `penguin-edge VERB …`. Results go to stdout, logs and progress to stderr.

Exit codes: 0 ok, 1 failed, 2 usage, 130 stopped by the user.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from penguin_edge import __version__
from penguin_edge.commands import (
    bench,
    compare,
    data,
    doctor,
    eval,
    export,
    info,
    plan,
    profile,
    run,
    stream,
    train,
    verify,
)
from penguin_edge.errors import PenguinError

VERBS = (doctor, info, plan, data, train, export, verify, run, stream, profile, bench, compare, eval)


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="penguin-edge", description="Penguin-VL from a PyTorch checkpoint to a phone or a Jetson."
    )
    top.add_argument("--version", action="version", version=f"penguin-edge {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return top


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; every failure on purpose is one sentence on stderr."""
    args = parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone; leave without a second complaint at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PenguinError, ValueError, OSError, MemoryError) as error:
        if args.debug:
            raise
        print(f"penguin-edge: {_sentence(error)}", file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, --max-seq-len or --budget"
    if isinstance(error, OSError) and not isinstance(error, PenguinError):
        return f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}"
    return str(error)


if __name__ == "__main__":
    raise SystemExit(main())
