"""A change of a stream's window that is made slice by slice, so that a question need not wait for all of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from penguin_edge.guard import Guard
from penguin_edge.tra.stream import Change

Steps = Generator[None, None, list[Change]]
"""Yields after each slice but the last; returns what became of earlier frames."""


class Slices(Iterator[None]):
    """A frame that is being added: each step is one slice of its work."""

    def __init__(self, guard: Guard, check: Callable[[], None], steps: Steps) -> None:
        """Use `Stream.slices`.

        Args:
            guard: is held during each slice.
            check: refuses the next slice where the stream is not ready for it; the frame is not lost by that.
        """
        self._guard, self._check, self._steps = guard, check, steps
        self.changes: list[Change] | None = None
        """What became of earlier frames, when the last slice is done."""

    def __next__(self) -> None:
        """One slice.

        Raises:
            BusyError: an answer is being read, or another thread uses the stream or its engine.
        """
        with self._guard:
            self._check()
            try:
                next(self._steps)
            except StopIteration as done:
                self.changes = done.value
                raise StopIteration from None

    def close(self) -> None:
        """Give the frame up: the stream is as it was before it, unless all slices were done."""
        with self._guard:
            self._steps.close()

    def finish(self) -> list[Change]:
        """All slices that are left."""
        for _ in self:
            pass
        return self.changes or []
