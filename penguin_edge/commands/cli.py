"""The command line: `penguin-edge VERB …`. Results go to stdout, logs and progress to stderr.

Exit codes: 0 ok, 1 failed, 2 usage; stopped: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP (its terminal is gone).

Nothing is imported here before `main` has said what a signal does: the verbs' imports take their time, and Ctrl-C in
them is an end like any other.
"""

from __future__ import annotations

import sys

LONGEST = 2000
"""Characters of a message; what is longer repeats its input."""
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; every failure is one sentence on stderr.

    Args:
        argv: the arguments after the program's name; without them this is the program itself, and its reaction to
            signals is decided here.
    """
    from penguin_edge import stopping

    if argv is None:
        stopping.begin()
    try:
        code = _run(argv)
    except KeyboardInterrupt:  # while another failure was told
        code = stopping.code()
    if argv is None:
        stopping.end()
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    import argparse

    from penguin_edge import __version__
    from penguin_edge.commands import (
        bench,
        compare,
        convert,
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

    top = argparse.ArgumentParser(
        prog="penguin-edge", description="Penguin-VL from a PyTorch checkpoint to a phone or a Jetson."
    )
    top.add_argument("--version", action="version", version=f"penguin-edge {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in (doctor, info, plan, data, convert, train, export, verify, run, stream, profile, bench, compare, eval):
        verb.add(verbs)
    return top


def _run(argv: Sequence[str] | None) -> int:
    import warnings

    from penguin_edge import stopping

    debug = False
    try:
        args = parser().parse_args(argv)
        debug = args.debug
        warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
        stopping.let_finish()
        code = int(args.run(args))
        sys.stdout.flush()
        return stopping.code() if code == stopping.CTRL_C else code
    except SystemExit:  # argparse has said why
        _flush()
        raise
    except BaseException as error:
        # A library that a stop fell into may have made another error of it.
        if isinstance(error, KeyboardInterrupt) or stopping.asked():
            _tell("\nstopped" if sys.stderr.isatty() else "stopped")
            return stopping.code()
        if debug and not isinstance(error, BrokenPipeError):
            raise
        if not isinstance(error, BrokenPipeError):  # the reader is gone and wants no complaint
            _tell(f"penguin-edge: {_printable(_sentence(error))}")
        return 1
    finally:
        _flush()


def _tell(line: str) -> None:
    import contextlib

    with contextlib.suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)


def _flush() -> None:
    """Write what is left on stdout; where nothing can be written, the interpreter shall not try again when it ends."""
    import os

    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _printable(text: str) -> str:
    """One line for a terminal: control characters that a file or an address brought into a message are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogateescape").decode() for c in text)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _sentence(error: BaseException) -> str:
    from penguin_edge.errors import PenguinError

    if isinstance(error, PenguinError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, --max-seq-len or --budget"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}"
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if any("Traceback" in text for text in lines) else lines[0]
    if type(error) is ValueError:
        return line
    name = type(error).__name__
    return f"unexpected {name}{': ' * bool(line)}{line}; `penguin-edge --debug …` shows where it comes from"


if __name__ == "__main__":
    raise SystemExit(main())
