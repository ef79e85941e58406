"""Decoding of video containers with PyAV: headers, exact times, sampling, orientation.

| tensor | shape | dtype | meaning |
|---|---|---|---|
| result of `to_rgb` | `[H, W, 3]` | uint8 | RGB at native size, upright |

Times are exact fractions of a second from the start of the container, because sampling takes floors of them. What
comes out equals the frames of the `ffmpeg` program (`-ss`/`-t` before the input, filter `fps=N:round=down`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from penguin_edge.errors import InputError, TargetUnavailable

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.buffer import Buffer
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

    Timed: TypeAlias = tuple[Fraction, Fraction, VideoFrame]
    """When a frame is shown, for how long, and the frame."""

UNKNOWN_RATE = Fraction(25)
"""Frames per second of a stream without any time stamps."""
SEEK_LEAD = Fraction(1, 4)
"""Seconds to seek before the wanted time, because key frames are found by decoding time."""
SMALL_AREA = 256 * 256
"""Pictures up to this many pixels are decoded without threads, whose start costs more than they save."""
EARLY_END = Fraction(1, 2)
"""A clip whose frames stop this many seconds before the stated end is reported as cut short."""


@dataclass(frozen=True)
class Header:
    """What a pass over the packets of a clip tells, without decoding. Times are seconds from the container's start.

    `base` is the unit of the stream's clock; `offset` is when its first frame is due.
    `first` and `last` bound the packets' presentation times; they are None where a packet has no time stamp.
    """

    rate: Fraction
    base: Fraction
    duration: Fraction
    offset: Fraction
    packets: int
    first: Fraction | None
    last: Fraction | None


def read_header(path: Path, end: float | None = None) -> Header:
    """Rate, length and packet count of a clip; reads the whole file once.

    Raises:
        InputError: not a clip that can be opened, one without a video stream or packets, or one cut short before `end`
            (seconds; None is its stated end).
    """
    with opened(path) as (container, stream):
        base = _base(stream)
        origin = _origin(container)
        stated_rates = [r for r in (stream.average_rate, stream.guessed_rate) if r]
        stated = None if container.duration is None else Fraction(container.duration, 1_000_000)
        offset = Fraction(0) if stream.start_time is None else stream.start_time * base - origin
        count, times, last = 0, True, Fraction(0)
        first: Fraction | None = None
        for packet in _packets(path, container, stream):
            if not packet.size:
                continue
            count += 1
            if packet.pts is None:
                times = False
                continue
            at = packet.pts * base - origin
            first = at if first is None else min(first, at)
            last = max(last, at + (packet.duration or 0) * base)
        due = None if stream.duration is None else stream.duration * base + offset
    if not count:
        raise InputError(f"{path}: the video stream has no data; the file is cut short, copy it again")
    if times and due is not None and last + EARLY_END < (due if end is None else min(due, Fraction(end))):
        raise InputError(
            f"{path}: cut short, its pictures end at {float(last):.2f} s of {float(due):.2f} s; copy it again, or "
            "use what "
            f"is there with an end of at most {math.floor(float(last) * 10) / 10:g} s"
        )
    # Some containers state the clock of the encoder as the rate: believe only what the packets bear out.
    measured = (count - 1) / (last - first) if times and first is not None and count > 1 and last > first else None
    near = [r for r in stated_rates if measured is None or measured / 2 < r < measured * 2]
    rate = near[0] if near else measured or UNKNOWN_RATE
    duration = stated or (last if times else count / rate)
    return Header(
        rate, base, duration, max(offset, Fraction(0)), count, first if times else None, last if times else None
    )


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream (cover art is not one)."""
    try:
        import av
    except ImportError:
        raise TargetUnavailable("reading video needs PyAV: pip install av") from None
    try:
        # The prefix and the whitelist keep playlists and odd names from reaching the network.
        options = {"protocol_whitelist": "file,crypto,data"}
        container = av.open(f"file:{path}", metadata_errors="replace", options=options)
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: not a readable video; the file is damaged, cut short or of another kind") from error
    with container:
        kind = container.format.name
        if kind == "tty" or kind == "image2" or kind.endswith("_pipe"):
            raise InputError(f"{path}: not a video but {kind}; give an MP4, MKV, WebM, AVI or similar clip")
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic:
                if stream.codec_context is None:
                    raise InputError(f"{path}: the codec of the video stream is unknown here; convert it to H.264")
                small = stream.codec_context.width * stream.codec_context.height <= SMALL_AREA
                stream.thread_type = "NONE" if small else "AUTO"
                yield container, stream
                return
        raise InputError(f"{path}: has no video stream (format {kind}); give a clip with pictures")


def decoded(path: Path, begin: Fraction = Fraction(0), *, seek: bool = True) -> Iterator[Timed]:
    """Frames in the order of presentation, with times relative to `begin`; none earlier than `begin`.

    Packets that cannot be decoded are skipped before the first picture, as after a seek; later ones are damage.

    Raises:
        InputError: the file is damaged.
    """
    import av

    with opened(path) as (container, stream):
        base = _base(stream)
        origin = _origin(container)
        shift = nearest((origin + begin) / base)
        usual = stream.average_rate or stream.guessed_rate or UNKNOWN_RATE
        landed = True
        if seek and begin > SEEK_LEAD and container.duration is not None:
            try:
                container.seek(math.floor((origin + begin - SEEK_LEAD) * 1_000_000))
                landed = False
            except av.FFmpegError:
                pass  # not seekable: decode from the beginning, the frames before `begin` are dropped below
        seen, ticks, length = False, -shift, 1
        for packet in _packets(path, container, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if not seen:
                    continue
                at = max(0.0, float((ticks + shift) * base - origin))
                raise InputError(
                    f"{path}: damaged after {at:.2f} s ({error.strerror}); copy it again, or end before that"
                ) from error
            seen = seen or bool(frames)
            for frame in frames:
                ticks = ticks + length if frame.pts is None else frame.pts - shift
                length = frame.duration or max(1, nearest(1 / usual / base))
                if not landed and ticks > 0:  # some containers seek too far: read from the beginning instead
                    yield from decoded(path, begin, seek=False)
                    return
                landed = True
                if begin == 0 or ticks >= 0:
                    yield ticks * base, length * base, frame


def trimmed(frames: Iterable[Timed], length: Fraction) -> Iterator[Timed]:
    """The frames less than `length` seconds after the first; the last lasts until the one that was cut off."""
    first: Fraction | None = None
    held: Timed | None = None
    for timed in frames:
        first = timed[0] if first is None else first
        if held is not None and timed[0] - first >= length:
            yield held[0], timed[0] - held[0], held[2]
            return
        if held is not None:
            yield held
        held = timed
    if held is not None:
        yield held


def resampled(
    frames: Iterable[Timed], rate: Fraction, rounding: Callable[[Fraction], int] = math.floor
) -> Iterator[VideoFrame]:
    """One frame per slot of `1 / rate` seconds: with floor, the last frame that starts within the slot.

    A slot without a frame repeats the one before. A clip too short for any slot gives its last frame.
    """
    slot: int | None = None
    end = Fraction(0)
    given = 0
    held: VideoFrame | None = None
    for at, lasts, frame in frames:
        index = rounding(at * rate)
        if held is None or slot is None:
            slot = index
        else:
            while slot < index:
                yield held
                slot, given = slot + 1, given + 1
        held, end = frame, at + lasts
    if held is None or slot is None:
        return
    while slot < rounding(end * rate) or not given:
        yield held
        slot, given = slot + 1, given + 1


def nearest(value: Fraction) -> int:
    """Round to the nearest integer, halves away from zero, as ffmpeg rescales times."""
    return math.floor(value + Fraction(1, 2)) if value >= 0 else math.ceil(value - Fraction(1, 2))


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """From the display matrix: whether to transpose, then whether to mirror left-right and top-bottom."""
    side_data = cast("Mapping[str, Buffer]", frame.side_data)
    if "DISPLAYMATRIX" not in side_data:
        return False, False, False
    data = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32)
    # A point (x, y) is shown at (a x + c y, b x + d y).
    a, b, c, d = (int(data[i]) for i in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def rgb_converter() -> VideoReformatter:
    """What `to_rgb` converts with: one per clip, since its tables serve all frames, and per thread."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def to_rgb(frame: VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """`[H, W, 3]` uint8, upright."""
    pixels = converter.reformat(frame, format="rgb24", interpolation="BICUBIC").to_ndarray()
    transpose, mirror, flip = orientation(frame)
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])


def _packets(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """All packets, then the one that flushes.

    Raises:
        InputError: damage that the container cannot get past.
    """
    import av

    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise InputError(f"{path}: the file is damaged ({error.strerror}); copy it again") from error


def _base(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1_000_000)


def _origin(container: InputContainer) -> Fraction:
    return Fraction(container.start_time or 0, 1_000_000)
