"""Time stamps of a stream's packets and frames on one unbroken clock, as the `ffmpeg` program puts them there.

A clock that starts again or leaps, as in joined recordings, goes on where it was; packets without a presentation time
are shown in the order of decoding. Nothing here knows PyAV: ticks go in, ticks come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MICROSECONDS = 1_000_000
JUMP_S = 10
"""Seconds by which a packet may miss its expected time before that counts as a new clock (`-dts_delta_threshold`)."""
BACKWARD = MICROSECONDS // 10
"""Microseconds by which a decoding time may lie before the last one; more is a new clock."""
ABSURD_S = 30 * 3600
"""Seconds by which a time stamp may be off in containers whose clock cannot restart; beyond, the stamp is ignored
(`-dts_error_threshold`)."""
LARGEST_TICKS = 2**62
"""Stamps beyond this are no times."""


def nearest(value: Fraction) -> int:
    """Round to the nearest integer, halves away from zero, as ffmpeg rescales times."""
    return _ratio(value.numerator, value.denominator)


def _ratio(over: int, under: int) -> int:
    """`nearest` without fractions, which would cost more than the packets they time."""
    half = (2 * abs(over) + under) // (2 * under)
    return half if over >= 0 else -half


class FrameClock:
    """What a packet's stamps mean, packet after packet in the order of the file.

    `jumps` counts the new clocks met so far. Source: `process_input` and `process_input_packet` in ffmpeg 5.1.
    """

    def __init__(self, base: Fraction, begin: int, *, restarts: bool, usual: Fraction) -> None:
        """A clock in ticks of `base` seconds that reads 0 at the stamp `begin` (microseconds).

        Args:
            restarts: the container's clock may start again (MPEG-TS and the like).
            usual: seconds that a frame lasts where its packet does not say.
        """
        self.jumps = 0
        self._micros_over, self._micros_under = (base * MICROSECONDS).as_integer_ratio()
        self._restarts, self._usual = restarts, nearest(usual * MICROSECONDS)
        self._offset = -begin
        self._now = 0
        self._next: int | None = None
        self._last: int | None = None
        self._known = False

    def take(self, pts: int | None, dts: int | None, duration: int) -> tuple[int | None, int | None]:
        """Presentation and decoding time of the next packet, in ticks of the clock.

        The decoding time is estimated where the packet has none; it is None as long as no packet had one.
        """
        shift = self._ticks(self._offset)
        pts, dts = _moved(pts, shift), _moved(dts, shift)
        if dts is not None:
            at = self._micros(dts)
            if self._restarts and pts is not None and abs(self._micros(pts) - at) > JUMP_S * MICROSECONDS:
                # The standard has no picture wait that long. ffmpeg believes it, and fills hours with one picture.
                pts = None
            expected = self._next if self._next is not None or not self._restarts else self._last
            if expected is not None and self._restarts:
                late = at - expected
                backward = self._next is not None and at + BACKWARD < self._now
                if abs(late) > JUMP_S * MICROSECONDS or backward:
                    self._offset -= late
                    self.jumps += 1
                    dts, pts = _moved(dts, -self._ticks(late)), _moved(pts, -self._ticks(late))
            elif expected is not None:
                if pts is not None and abs(self._micros(pts) - expected) > ABSURD_S * MICROSECONDS:
                    pts = None
                if abs(at - expected) > ABSURD_S * MICROSECONDS:
                    dts = None
        if self._next is None:
            self._next = self._now
        if dts is not None:
            self._known = True
            self._next = self._last = self._micros(dts)
        self._now = self._next
        lasts = self._micros(duration) if duration > 0 else self._usual
        self._next = self._now + lasts if lasts else None
        return pts, self._ticks(self._now) if self._known else None

    def _ticks(self, micros: int) -> int:
        return _ratio(micros * self._micros_under, self._micros_over)

    def _micros(self, ticks: int) -> int:
        return _ratio(ticks * self._micros_over, self._micros_under)


@dataclass
class Presentation:
    """When decoded frames are due: the presentation time, or the decoding time where that is the more orderly one.

    Source: `guess_correct_pts` in libavcodec/decode.c. A frame with neither follows the one before.
    """

    next: int = 0
    _faulty_pts: int = 0
    _faulty_dts: int = 0
    _last_pts: int = -LARGEST_TICKS
    _last_dts: int = -LARGEST_TICKS

    def take(self, pts: int | None, dts: int | None, duration: int) -> int:
        """Ticks at which the next frame out of the decoder is due."""
        if dts is not None:
            self._faulty_dts += dts <= self._last_dts
            self._last_dts = dts
        elif pts is not None:
            self._last_dts = pts
        if pts is not None:
            self._faulty_pts += pts <= self._last_pts
            self._last_pts = pts
        elif dts is not None:
            self._last_pts = dts
        orderly = pts is not None and (self._faulty_pts <= self._faulty_dts or dts is None)
        due = pts if orderly else dts
        due = self.next if due is None else due
        self.next = due + duration
        return due


def _moved(stamp: int | None, ticks: int) -> int | None:
    if stamp is None or abs(stamp) > LARGEST_TICKS or abs(stamp + ticks) > LARGEST_TICKS:
        return None
    return stamp + ticks
