"""A question that is asked again and again, and its answers."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from dataclasses import dataclass

from penguin_edge.runtime.core.report import Report
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.tra.clip import KEY


@dataclass(frozen=True)
class Answer:
    """What a watch said: about the stream up to `time` seconds."""

    time: float | None
    text: str
    report: Report


class Watch:
    """Answers to a question that is asked again and again; iterate over it, or `close` it."""

    def __init__(self, prompt: str, every: float | None, on_change: bool, options: SamplingOptions | None) -> None:
        self.prompt, self.every, self.on_change, self.options = prompt, every, on_change, options
        self._answers: queue.Queue[Answer | None] = queue.Queue(maxsize=16)
        self._last: float | None = None
        self.closed = False
        self.missed = 0
        """Answers given up because nobody read them."""

    def __iter__(self) -> Iterator[Answer]:
        while True:
            answer = self._answers.get()
            if answer is None:
                return
            yield answer

    def close(self) -> None:
        """No more answers; an iteration ends after those that are there."""
        self.closed = True
        self.put(None)

    def due(self, kind: str, now: float) -> bool:
        """Whether a frame of this kind at `now` seconds of the stream is one to speak about."""
        if self.closed or (self.on_change and kind != KEY):
            return False
        if self.every is not None and self._last is not None and 0 <= now - self._last < self.every:
            return False
        self._last = now
        return True

    def put(self, answer: Answer | None) -> None:
        """Hand an answer over, or None for the end; where there is no room the oldest one goes."""
        while True:
            try:
                self._answers.put_nowait(answer)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):  # read meanwhile: then there is room
                    self._answers.get_nowait()
                    self.missed += 1
