"""What ends the program from outside: SIGINT (Ctrl-C), SIGTERM, SIGHUP.

Until a verb runs, nothing has begun and the process ends at once. Then the first signal raises KeyboardInterrupt in the
main thread, so that files, children and threads are put away. Meanwhile a second signal is ignored, because people
press twice; a third ends the process where it is, and the next run clears what is left. A signal that was ignored when
the program started, as under `nohup`, stays so.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

CTRL_C = 128 + signal.SIGINT
"""What a verb returns that has been stopped and ended in its own way."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 1
"""Signals that are ignored while the first is being answered."""


class _Stopping:
    """The signals that this process has received, and what it does with them."""

    ours: tuple[signal.Signals, ...] = ()
    """The signals that are answered here."""
    finishing = False
    """Whether a stop is an exception, so that what was begun is put away."""
    first = 0
    """The signal that asked to stop; 0: none yet."""
    ignored = 0


def begin() -> None:
    """Answer signals from here on, and have three streams to write to."""
    for descriptor in (0, 1, 2):
        # The number of a closed stream goes to the next file that is opened: warnings would land in it.
        try:
            os.fstat(descriptor)
        except OSError:
            # A result that nobody can read is an error when it is written, not a success.
            os.open(os.devnull, os.O_RDONLY if descriptor == 1 else os.O_RDWR)
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):  # a sign that the terminal lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    _Stopping.ours = tuple(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
    for number in _Stopping.ours:
        signal.signal(number, _stop)
    sys.unraisablehook = _again


def let_finish() -> None:
    """From here on a stop is an exception: something has begun that has to be put away."""
    _Stopping.finishing = True


def end() -> None:
    """All is done: while the interpreter ends, a signal ends it at once."""
    for number in _Stopping.ours:
        signal.signal(number, signal.SIG_DFL)


def asked() -> bool:
    """Whether a signal has asked this process to stop."""
    return _Stopping.first != 0


def code() -> int:
    """The exit code of a process that was stopped; Ctrl-C unless another signal is known."""
    return 128 + (_Stopping.first or signal.SIGINT)


def _stop(number: int, frame: FrameType | None) -> None:
    _Stopping.first = _Stopping.first or number
    if not _Stopping.finishing:
        _exit()
    if _answering():
        _Stopping.ignored += 1
        if _Stopping.ignored > PATIENCE:
            _exit()
        return
    raise KeyboardInterrupt


def _answering() -> bool:
    """Whether a stop is being answered: the clean-up may be in the middle of another exception that it met itself."""
    found = sys.exception()
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return True
        seen.add(id(found))
        found = found.__context__
    return False


def _exit() -> NoReturn:
    try:
        os.write(2, b"stopped\n")
    finally:
        os._exit(code())


def _again(failure: sys.UnraisableHookArgs) -> None:
    """A stop that fell into a finalizer was lost there: raise it once more, outside."""
    if not issubclass(failure.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(failure)
        return
    import threading

    again = threading.Timer(0.05, os.kill, (os.getpid(), _Stopping.first or signal.SIGINT))
    again.daemon = True
    again.start()
