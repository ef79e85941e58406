"""Where frames of a stream come from: clips and folders, again and again if wanted, cameras, and network streams.

| source                                       | times                                                             |
|----------------------------------------------|-------------------------------------------------------------------|
| clip, animated picture, folder of pictures   | of the clip; a loop goes on where the last one ended              |
| /dev/video0 …                                | of the driver, from the first frame on                            |
| rtsp:// rtmp:// http:// https:// udp:// …    | of the stream, from the first frame on, going on after a break    |
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penguin_edge import video
from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.frames import Frame, read_video

Note = Callable[[str], None]
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each new attempt at a source that broke off; after the last one it is given up."""
STALL_S = 10.0
"""Seconds without data after which a live source counts as broken."""


def is_live(source: str) -> bool:
    """A camera or a network stream, which has no beginning and no end of its own."""
    return bool(re.match(r"[a-z][a-z0-9+]+://", source)) or source.startswith("/dev/video")


def read_source(
    source: str,
    *,
    fps: float | None = 1.0,
    loop: bool = False,
    note: Note = lambda line: None,
    pauses: tuple[float, ...] = PAUSES,
    stall_s: float = STALL_S,
) -> Iterator[Frame]:
    """Frames at `fps` per second (None: all), one at a time.

    Args:
        loop: begin a clip again when it ends; its times go on.
        note: is told when a live source breaks off and is opened again.
        pauses: seconds before each new attempt; a frame that arrives begins them anew.
        stall_s: seconds without data after which a live source counts as broken.
    Raises:
        InputError: a source that cannot be read, or that did not come back.
    """
    if is_live(source):
        return _live(source, fps, note, pauses, stall_s)
    if not Path(source).exists():
        raise InputError(f"{source}: no such file; name a clip, a folder of pictures, /dev/video0, or rtsp://…")
    return _clip(source, fps, loop)


def paced(frames: Iterator[Frame], sleep: Callable[[float], None] = time.sleep) -> Iterator[Frame]:
    """Each frame when its time has come, counted from the first one; late frames come at once."""
    begin: float | None = None
    for frame in frames:
        now = time.monotonic()
        if begin is None:
            begin = now - (frame.time or 0.0)
        wait = begin + (frame.time or 0.0) - now
        if wait > 0:
            sleep(wait)
        yield frame


def _clip(source: str, fps: float | None, loop: bool) -> Iterator[Frame]:
    offset, index = 0.0, 0
    while True:
        last, step = 0.0, 1.0 / fps if fps else 0.0
        for frame in read_video(source, fps=fps, max_frames=None):
            at = frame.time or 0.0
            if fps is None and at > last:
                step = at - last
            last = at
            yield replace(frame, time=offset + at, index=index)
            index += 1
        if not loop:
            return
        offset += last + step


@dataclass
class _Times:
    """Times of a stream that may break off: they never go back, and go on after a break."""

    fps: float | None
    last: float = -1.0
    first: float | None = None
    offset: float = 0.0
    index: int = 0

    def begin(self) -> None:
        """A new connection, whose clock begins anywhere."""
        self.first, self.offset = None, max(self.last, 0.0)

    def take(self, at: float) -> float | None:
        """When a frame is due, or None where the rate leaves it out."""
        if self.first is None:
            self.first = at
            self.offset += 1e-3 if self.last >= 0 else 0.0
        due = self.offset + at - self.first
        if due < self.last or (self.fps is not None and self.last >= 0 and due - self.last < 0.98 / self.fps):
            return None
        self.last = due
        return due


def _live(source: str, fps: float | None, note: Note, pauses: tuple[float, ...], stall_s: float) -> Iterator[Frame]:
    try:
        import av
    except ImportError:
        raise TargetUnavailable("reading video needs PyAV: pip install av") from None
    options: dict[str, str] = {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}
    kind = "v4l2" if source.startswith("/dev/video") else None
    times, failed = _Times(fps), 0
    while True:
        reason = "the stream ended"
        try:
            with av.open(source, format=kind, options=options, timeout=stall_s) as container:
                times.begin()
                for frame in _pictures(container, times):
                    failed = 0
                    yield frame
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        if failed == len(pauses):
            raise InputError(
                f"{source}: {reason}, and {failed} attempts to open it again failed; check the address and the network"
            )
        note(f"{source}: {reason}; opening it again in {pauses[failed]:g} s")
        time.sleep(pauses[failed])
        failed += 1


def _pictures(container: Any, times: _Times) -> Iterator[Frame]:
    if not container.streams.video:
        raise ValueError("it has no pictures")
    stream = container.streams.video[0]
    converter = video.rgb_converter()
    begin = time.monotonic()
    for frame in container.decode(stream):
        # A source without time stamps is as old as its arrival.
        at = frame.time if frame.time is not None else time.monotonic() - begin
        due = times.take(float(at))
        if due is not None:
            yield Frame(video.to_rgb(frame, converter), due, times.index)
            times.index += 1
