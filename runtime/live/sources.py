"""Where frames of a stream come from: clips and folders, again and again if wanted, cameras, and network streams.

| source                                       | times                                                             |
|----------------------------------------------|-------------------------------------------------------------------|
| clip, animated picture, folder of pictures   | of the clip; a loop goes on where the last one ended              |
| /dev/video0 …                                | of the driver, from the first frame on                            |
| rtsp:// rtmp:// http:// https:// udp:// …    | of the stream, from the first frame on, going on after a break;   |
|                                              | of arrival where its format has none (MJPEG, bare H.264)          |
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.media import video
from penguin_edge.media.clock import MICROSECONDS
from penguin_edge.media.containers import MAX_FRAME_PIXELS
from penguin_edge.media.frames import Frame, read_video
from penguin_edge.media.places import exists, local_path, scheme_of, shown
from penguin_edge.runtime.live.live_clock import LiveClock

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

Note = Callable[[str], None]
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each new attempt at a source that broke off; after the last one it is given up."""
STALL_S = 10.0
"""Seconds without data after which a live source counts as broken."""

_HTTP = "http,https,tls,tcp,httpproxy,crypto,data"
_RTSP = "rtsp,rtsps,rtp,srtp,udp,tcp,tls"
_RTMP = "rtmp,rtmps,rtmpt,rtmpts,ffrtmphttp,http,https,tls,tcp"
LIVE = {
    **dict.fromkeys(("http", "https"), _HTTP),
    **dict.fromkeys(("rtsp", "rtsps"), _RTSP),
    **dict.fromkeys(("rtmp", "rtmps"), _RTMP),
    "udp": "udp",
    "tcp": "tcp",
    "srt": "srt",
    "rtp": "rtp,udp",
}
"""Protocols of live sources, each with those that it may open in turn. None opens files: a playlist is input too."""

_NO_TIMES, _MAY_JUMP = 0x80, 0x200
"""Flags of libavformat for formats without times, and with times that may jump."""
_CAMERA = "/dev/video"
_CLOCKLESS = ("image2pipe", "ingenient")
"""Formats without times that do not say so, beside those whose name ends in `_pipe`."""
_SAME_SHAPE = 0.02
"""Aspects that differ by no more than this share are those of one picture in two sizes."""


def is_live(source: str) -> bool:
    """A camera or a network stream, which has no beginning and no end of its own."""
    return scheme_of(source) in LIVE or source.startswith(_CAMERA)


def without_password(source: str) -> str:
    """An address without the user and the password in it."""
    return re.sub(r"(?<=://)[^/?#]*@", "", source)


def read_source(
    source: str,
    *,
    fps: float | None = 1.0,
    loop: bool = False,
    note: Note = lambda line: None,
    pauses: tuple[float, ...] = PAUSES,
    stall_s: float = STALL_S,
    max_pixels: int | None = None,
    max_packets: int | None = None,
) -> Iterator[Frame]:
    """Frames at `fps` per second (None: all), one at a time.

    Args:
        source: a clip or a folder by its path or `file:` address, a camera, or the address of a stream (`LIVE`).
        loop: begin a clip again when it ends; its times go on.
        note: is told when a live source breaks off and is opened again, and what becomes of a broken clock.
        pauses: seconds before each new attempt; a frame that arrives begins them anew.
        stall_s: seconds without data after which a live source counts as broken.
        max_pixels: most pixels of a picture; None takes the limit of `read_video`, of a live source that of a clip.
        max_packets: most packets of a clip; None takes the limit of `read_video`. A live source has no end.
    Raises:
        InputError: a source that cannot be read, or that did not come back.
    """
    if is_live(source):
        return _live(source, fps, note, pauses, stall_s, max_pixels or MAX_FRAME_PIXELS)
    scheme = scheme_of(source)
    # What stands before a colon is taken for a protocol, unless there is such a file.
    if scheme and scheme != "file" and not exists(Path(source)):
        known = ", ".join(LIVE)
        raise InputError(f"{shown(source)}: {shown(scheme)} is no protocol of a stream here; wanted {known}, or a path")
    path = Path(source) if scheme != "file" else local_path(source)
    if not exists(path):
        raise InputError(f"{shown(path)}: no such file; name a clip, a folder of pictures, /dev/video0, or rtsp://…")
    return _clip(path, fps, loop, max_pixels, max_packets)


class Timed:
    """Frames of a source, and how long reading and decoding them takes; of a live source that is waiting, too."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames, self._ahead = frames, deque[Frame]()
        self.spent_ns, self.count = 0, 0

    def __iter__(self) -> Iterator[Frame]:
        return self

    def size(self) -> tuple[int, int] | None:
        """Pixels of the next frame, (height, width), which is read for it and comes all the same; None at the end."""
        if not self._ahead:
            self._ahead.extend(islice(self, 1))
        if not self._ahead:
            return None
        height, width = self._ahead[0].pixels.shape[:2]
        return height, width

    def __next__(self) -> Frame:
        if self._ahead:
            return self._ahead.popleft()
        begin = time.monotonic_ns()
        try:
            frame = next(self._frames)
        finally:
            self.spent_ns += time.monotonic_ns() - begin
        self.count += 1
        return frame

    @property
    def ms_per_frame(self) -> float:
        """Milliseconds for each frame that came."""
        return self.spent_ns / 1e6 / max(1, self.count)


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


def _clip(
    source: Path, fps: float | None, loop: bool, max_pixels: int | None, max_packets: int | None
) -> Iterator[Frame]:
    offset, index = 0.0, 0
    while True:
        last, step = 0.0, 1.0 / fps if fps else 0.0
        for frame in read_video(source, fps=fps, max_frames=None, max_pixels=max_pixels, max_packets=max_packets):
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
class _OneSize:
    """A stream that comes in another size now, as one does whose sender adapts to the network, in its first size.

    A picture of another shape (a telephone that was turned) is another picture, and stays as it is.
    """

    note: Note
    wanted: tuple[int, int] | None = None
    came: tuple[int, int] | None = None

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        came = (pixels.shape[1], pixels.shape[0])
        if self.wanted is None or abs(came[0] * self.wanted[1] / (came[1] * self.wanted[0]) - 1) > _SAME_SHAPE:
            self.wanted = came
        changed, self.came = came != self.came and came != self.wanted, came
        if came == self.wanted:
            return pixels
        if changed:
            size = f"{self.wanted[0]}x{self.wanted[1]}"
            self.note(f"pictures of {came[0]}x{came[1]} come now; they are scaled to {size} as before")
        return np.asarray(Image.fromarray(pixels).resize(self.wanted, Image.Resampling.BICUBIC))


def _live(
    source: str, fps: float | None, note: Note, pauses: tuple[float, ...], stall_s: float, max_pixels: int
) -> Iterator[Frame]:
    try:
        import av
    except ImportError:
        raise TargetUnavailable("reading video needs PyAV: pip install av") from None
    name, scheme = shown(without_password(source)), scheme_of(source)
    # Frames wait nowhere for a rate that nobody asks for.
    options = {"fpsprobesize": "0"}
    if scheme:
        options |= {"protocol_whitelist": LIVE[scheme]}
    if scheme in ("rtsp", "rtsps"):
        options |= {"rtsp_transport": "tcp"}
    address = scheme + source[len(scheme) :]  # the decoder knows protocols in lower case alone
    kind = "v4l2" if source.startswith(_CAMERA) else None

    def said(line: str) -> None:
        note(f"{name}: {line}")

    clock, sized, failed, index = LiveClock["VideoFrame"](fps, said), _OneSize(said), 0, 0
    while True:
        reason = "the stream ended"
        try:
            with av.open(address, format=kind, options=options, timeout=stall_s) as container:
                for due, pixels in _pictures(name, container, clock, max_pixels, recorded=scheme in ("http", "https")):
                    failed = 0
                    yield Frame(sized(pixels), due, index)
                    index += 1
        except InputError:
            raise  # one of the kinds below, but opening it again is of no use
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        if failed == len(pauses):
            raise InputError(
                f"{name}: {reason}, and {failed} attempts to open it again failed; check the address and the network"
            )
        said(f"{reason}; opening it again in {pauses[failed]:g} s")
        time.sleep(pauses[failed])
        failed += 1


def _pictures(
    name: str, container: InputContainer, clock: LiveClock[VideoFrame], max_pixels: int, *, recorded: bool
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """What one connection gives. `recorded` if it may be a file, where frames lie far apart in a still scene.

    Raises:
        InputError: pictures that are too large, from the beginning or later, or of an unknown codec.
    """
    import av

    if not container.streams.video:
        raise ValueError("it has no pictures")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise InputError(f"{name}: the codec of the pictures is unknown here; have the source send H.264")
    codec = stream.codec_context
    _check_pixels(name, codec.width, codec.height, max_pixels)
    known = codec.width > 0
    # A size that comes later counts, too. Decoders ask for margins, which may be as large again.
    codec.options = {"max_pixels": str(2 * max_pixels)}
    converter, size, base = video.rgb_converter(), (0, 0), stream.time_base or Fraction(1, MICROSECONDS)

    def rgb(frame: VideoFrame) -> NDArray[np.uint8]:
        """Pixels in the frame's own size, which `_OneSize` judges."""
        nonlocal converter, size
        if size != (frame.width, frame.height):
            converter, size = video.rgb_converter(), (frame.width, frame.height)
        return video.to_rgb(frame, converter)

    flags, kind = container.format.flags, container.format.name
    by_arrival = bool(flags & _NO_TIMES) or kind in _CLOCKLESS or kind.endswith("_pipe")
    clock.begin(by_arrival=by_arrival, gaps=recorded and not flags & _MAY_JUMP)
    for packet in video.packets(container, stream):
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            _check_pixels(name, codec.width, codec.height, max_pixels)
            if known and not codec.width:  # a decoder forgets a size that it refuses
                raise _too_large(name, "pictures come in a size that is not decoded", max_pixels) from None
            raise
        for frame in frames:
            _check_pixels(name, frame.width, frame.height, max_pixels)
            # Frames that the decoder gives up at the end have no unit of time of their own.
            at = None if frame.pts is None else float(frame.pts * base)
            for due, ready in clock.take(frame, at, time.monotonic()):
                yield due, rgb(ready)
    for due, ready in clock.end():
        yield due, rgb(ready)


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_large(name, f"pictures of {width}x{height} are {width * height:,} pixels", max_pixels)


def _too_large(name: str, found: str, max_pixels: int) -> InputError:
    return InputError(
        f"{name}: {found}, the limit is {max_pixels:,} pixels; have the source send smaller pictures, or raise the "
        "limit (max_pixels)"
    )
