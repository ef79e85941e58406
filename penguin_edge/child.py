"""Processes that penguin-edge starts: nothing in the working directory is a module to them, and they end with it.

    python -P -m penguin_edge.child PARENT MODULE ARGUMENTS…

`-P` keeps the working directory off the import path: a `token.py` there is a file of the user's and no module of ours.
A parent that is killed outright cannot end its children. Linux ends them for it; elsewhere, and should that fail, they
see the end of a pipe that the parent holds open.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

PR_SET_PDEATHSIG = 1


def command(module: str, *arguments: str) -> list[str]:
    """Command that runs a module in a child, whose stdin has to be a pipe that this process keeps open."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments]


def environment(defaults: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for a child: this process's own, over `defaults`. Python processes that it starts are as safe."""
    return {**(defaults or {}), **os.environ, "PYTHONSAFEPATH": "1"}


def end_with_parent(alive: Callable[[], bool]) -> None:
    """Have the system kill this process when its parent ends.

    Args:
        alive: whether the parent is there yet; asked afterwards, since it may have ended before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not alive():
        os._exit(1)


def quiet_worker() -> None:
    """Begin a worker of `multiprocessing`: it ends with its parent, which alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = _unless_cut_off
    parent = multiprocessing.parent_process()
    end_with_parent(lambda: parent is None or parent.is_alive())


def _unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error of the thread that hands tensors out, unless the parent stopped while it took one."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_with_pipe() -> None:
    """Wait for the end of stdin, then kill this process and what it started."""
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(arguments: list[str]) -> None:
    parent, module, *rest = arguments
    end_with_parent(lambda: os.getppid() == int(parent))
    threading.Thread(target=_end_with_pipe, daemon=True).start()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
