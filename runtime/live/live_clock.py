"""When the frames of a live stream are due: its own clock, made to go on where that clock breaks.

Clocks of live streams start again when the sender does, jump at joints, stamp a frame wildly now and then, or are no
clocks at all: a demuxer that finds no times in a format makes them up. What comes out never goes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

GAP_S = 10.0
"""Seconds by which two frames that come at once may lie apart."""
USUAL_STEP_S = 0.04
"""Seconds between frames, until some have come."""
WRAP = 2**33 / 90_000
"""Seconds after which the clock of MPEG-TS comes round, 26.5 hours."""
RECENT, DISTRUST = 50, 38
"""Frames looked back at, and how many of them may fail to advance before the clock is distrusted."""

T = TypeVar("T")


@dataclass(frozen=True)
class Stamped(Generic[T]):
    """A frame, the seconds that its stream states, and the seconds at which it arrived."""

    frame: T
    at: float
    now: float


@dataclass
class LiveClock(Generic[T]):
    """Stream time of each frame, over all connections. `fps` leaves frames out, None none; `note` is told of breaks.

    A frame whose stamp does not follow is held until the next one says whether the clock has jumped or the frame is
    alone with its stamp; one that is alone is dropped.
    """

    fps: float | None
    note: Callable[[str], None] = lambda line: None
    last: float = -1.0
    """When the last frame was due that was not left out."""
    by_arrival: bool = False
    gaps: bool = False
    """Whether a long way to the next stamp is believed: in a recording it is a scene without change."""
    _due: float = 0.0
    _peak: Stamped[T] | None = None
    _held: Stamped[T] | None = None
    _begun: bool = False
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    _advanced: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    def begin(self, *, by_arrival: bool = False, gaps: bool = False) -> None:
        """A new connection, whose clock begins anywhere; `by_arrival` if its format has none."""
        self.by_arrival, self.gaps = by_arrival, gaps
        self._peak = self._held = None
        self._advanced.clear()

    def end(self) -> list[tuple[float, T]]:
        """What is due when the connection is over: a frame that is held, where a long way to it is believed."""
        peak, held, self._held = self._peak, self._held, None
        if peak is None or held is None:
            return []
        if self.gaps and held.at > peak.at:
            return self._go_on(peak, held)
        self._drop(held)
        return []

    def take(self, frame: T, at: float | None, now: float) -> list[tuple[float, T]]:
        """Frames that are due with this one, each with its time: none, one, or two when one was held.

        Args:
            at: what the stream states, None where it states nothing.
            now: seconds of a clock of this machine.
        """
        if at is None:
            at = now if self._peak is None else self._peak.at + self._step()
        new = Stamped(frame, at, now)
        if self.by_arrival:
            return self._arrived(new)
        peak, held, self._held = self._peak, self._held, None
        if peak is None:
            return self._start(new)
        if self._follows(peak, new):
            if held is not None:
                self._drop(held)
            return self._go_on(peak, new)
        if held is None:
            self._held = new
            return self._trusted()
        if self._follows(held, new):
            if held.at < peak.at or not self.gaps:
                self._say_jump(peak, held)
                return self._start(held) + self._go_on(held, new)
        elif not peak.at < held.at < new.at:  # else ever onward by long steps: a slow stream
            self._drop(held)
            self._held = new
            return self._trusted()
        return self._go_on(peak, held) + self._go_on(held, new)

    def _step(self) -> float:
        return median(self._steps) if self._steps else USUAL_STEP_S

    def _follows(self, before: Stamped[T], new: Stamped[T]) -> bool:
        """A little back, for stamps out of order, or ahead, by more where this machine waited too."""
        return -2 * self._step() <= new.at - before.at <= max(GAP_S, 4 * self._step()) + max(0.0, new.now - before.now)

    def _start(self, new: Stamped[T]) -> list[tuple[float, T]]:
        """A clock begins with this frame: a usual step after the last one, whatever it shows."""
        self._due += self._step() if self._begun else 0.0
        self._begun, self._peak = True, new
        return self._let(self._due, new.frame)

    def _go_on(self, before: Stamped[T], new: Stamped[T]) -> list[tuple[float, T]]:
        step = new.at - before.at
        self._advanced.append(step > 0)
        due = self._due + step
        if step > 0:
            self._steps.append(step)
            self._due, self._peak = due, new
        return self._let(due, new.frame) + self._trusted()

    def _arrived(self, new: Stamped[T]) -> list[tuple[float, T]]:
        if self._peak is None:
            return self._start(new)
        self._due += max(0.0, new.now - self._peak.now)
        self._peak = new
        return self._let(self._due, new.frame)

    def _let(self, due: float, frame: T) -> list[tuple[float, T]]:
        """The frame, unless the rate leaves it out. A little less than a period is enough: stamps are rounded."""
        due = max(due, self.last, 0.0)
        if self.fps is not None and self.last >= 0 and due - self.last < 0.98 / self.fps:
            return []
        self.last = due
        return [(due, frame)]

    def _trusted(self) -> list[tuple[float, T]]:
        """Nothing, after looking whether this is a clock at all; one that is not has no say any more."""
        if len(self._advanced) < RECENT or RECENT - sum(self._advanced) < DISTRUST:
            return []
        self.note("the clock of the stream cannot be followed; frames take the time of their arrival")
        self.by_arrival = True
        held, self._held = self._held, None
        return [] if held is None else self._arrived(held)

    def _drop(self, held: Stamped[T]) -> None:
        away = 0.0 if self._peak is None else held.at - self._peak.at
        self._advanced.append(False)
        self.note(f"a frame stamped {away:+.1f} s from the one before was dropped; the stream goes on")

    def _say_jump(self, peak: Stamped[T], held: Stamped[T]) -> None:
        self._advanced.append(False)
        away = held.at - peak.at
        if WRAP / 2 < away < WRAP:  # FFmpeg takes a clock that goes back for one that has come round.
            away -= WRAP
        what = "started again" if away < 0 else f"jumped ahead by {away:.1f} s"
        self.note(f"the clock of the stream {what} after {self._due:.1f} s; times go on")
