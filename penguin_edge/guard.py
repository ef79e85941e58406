"""A door that lets one thread in at a time and refuses a second one instead of letting it wait.

Engines and sessions hold state that one call leaves for the next. Two threads at once would mix it up without a word.
"""

from __future__ import annotations

import threading
from types import TracebackType

from penguin_edge.errors import BusyError


class Guard:
    """`with guard:` around each call that reads or writes the state; the thread that is inside may enter again."""

    def __init__(self, what: str, inner: Guard | None = None) -> None:
        """
        Args:
            what: the name of what is guarded, for the reader: "engine", "session".
            inner: the guard of what this state describes, entered along with it: what a session believes of an engine's
                cache stays true until the session leaves.
        """
        self._what, self._lock, self._inner = what, threading.RLock(), inner

    def __enter__(self) -> None:
        """Enter.

        Raises:
            BusyError: another thread is inside.
        """
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                f"this {self._what} is at work for another thread; give each thread one of its own, or let the calls "
                "come one after the other"
            )
        if self._inner is not None:
            try:
                self._inner.__enter__()
            except BusyError:
                self._lock.release()
                raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._inner is not None:
            self._inner.__exit__(kind, error, at)
        self._lock.release()
