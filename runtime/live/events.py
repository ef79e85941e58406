"""What a live stream tells whoever looks on: an `Observer`, which is told four kinds of events.

| event           | told                                                   | by                                      |
|-----------------|--------------------------------------------------------|-----------------------------------------|
| `frame_ready`   | each frame that was worked on, once it is prefilled    | the worker                              |
| `frame_dropped` | each frame that was given up unseen, and why           | the worker, or who pushed or closed     |
| `said`          | each answer as it comes, token by token                | the worker                              |
| `decided`       | each change of setting by the latency controller       | the worker                              |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penguin_edge.media.frames import Frame
from penguin_edge.runtime.core.report import Kept
from penguin_edge.runtime.latency.control import Decision


@dataclass(frozen=True)
class Ready:
    """A frame that was worked on. `frame` is as it was pushed and belongs to the stream: read it, do not write it."""

    frame: Frame
    number: int
    age_ms: float
    """From `push` to the end of its prefill, which a latency target is about."""
    work_ms: float
    """The part of it that was work; the rest was waiting."""
    window: tuple[Kept, ...]
    """All frames that are kept now, this one the last."""
    budget: int
    """Visual tokens that the window could have when the frame came."""
    kv_tokens: int
    """Positions of the KV cache that are taken now."""

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the window."""
        return sum(frame.tokens for frame in self.window)


@dataclass(frozen=True)
class Dropped:
    """A frame that was given up unseen; `time` is its own, in seconds."""

    time: float | None
    reason: str
    """`rate`, `queue`, `late`, `error` or `closed`: see `LiveStats.dropped`."""


@dataclass(frozen=True)
class Said:
    """A piece of an answer: the first has no text, the last is `done`, with an `error` if there was one."""

    number: int
    prompt: str
    time: float | None
    """Time stamp of the newest frame that the answer is about, in seconds."""
    text: str = ""
    done: bool = False
    error: str = ""
    first_token_ms: float | None = None
    """From asking; with the last piece."""


class Observer:
    """Whoever looks on: write the methods that you want, each quick, since the stream waits for it.

    What a method raises is raised once, by the next call to the stream, and the stream goes on; what it raises later
    is not repeated.
    """

    def frame_ready(self, ready: Ready) -> None:
        """A frame was worked on and is prefilled."""

    def frame_dropped(self, dropped: Dropped) -> None:
        """A frame was given up unseen."""

    def said(self, said: Said) -> None:
        """A piece of an answer."""

    def decided(self, decision: Decision) -> None:
        """The controller chose another setting."""


class Observers(Observer):
    """Several observers as one. Each is told, whatever another one raises; the first error is raised in the end."""

    def __init__(self, *observers: Observer) -> None:
        self._all = observers

    def frame_ready(self, ready: Ready) -> None:
        self._each(lambda one: one.frame_ready(ready))

    def frame_dropped(self, dropped: Dropped) -> None:
        self._each(lambda one: one.frame_dropped(dropped))

    def said(self, said: Said) -> None:
        self._each(lambda one: one.said(said))

    def decided(self, decision: Decision) -> None:
        self._each(lambda one: one.decided(decision))

    def _each(self, tell: Callable[[Observer], None]) -> None:
        errors = []
        for one in self._all:
            try:
                tell(one)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class Telling:
    """Tells an observer, and keeps from the stream what the observer raises; the first of it is reported."""

    def __init__(self, observer: Observer, fail: Callable[[BaseException], None]) -> None:
        self._observer, self._fail, self._failed = observer, fail, False

    def frame_ready(self, ready: Ready) -> None:
        self._safely(lambda: self._observer.frame_ready(ready))

    def frame_dropped(self, dropped: Dropped) -> None:
        self._safely(lambda: self._observer.frame_dropped(dropped))

    def said(self, said: Said) -> None:
        self._safely(lambda: self._observer.said(said))

    def decided(self, decision: Decision) -> None:
        self._safely(lambda: self._observer.decided(decision))

    def _safely(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                self._fail(error)
