"""Decoding of video containers with PyAV: headers, exact times, sampling, orientation.

| tensor             | shape       | dtype | meaning                     |
|--------------------|-------------|-------|-----------------------------|
| result of `to_rgb` | `[H, W, 3]` | uint8 | RGB at native size, upright |

Times are exact fractions of a second from the start of the container, because sampling takes floors of them. What
comes out equals the frames of the `ffmpeg` program (`-ss`/`-t` before the input, filter `fps=N:round=down`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from penguin_edge.errors import InputError
from penguin_edge.media.clock import MICROSECONDS, FrameClock, Presentation, nearest
from penguin_edge.media.containers import MAX_FRAME_PIXELS, check_pixels, opened, restarts
from penguin_edge.media.places import named

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
EARLY_END = Fraction(1, 2)
"""A clip whose frames stop this many seconds before the stated end is reported as cut short."""
MAX_PACKETS = 2**24
"""Most packets of a clip's video stream, 16.8 million: 77 hours at 60 frames per second."""
MAX_REPEATS = 10**6
"""Most times that one frame is given again to fill the time until the next: 11 days at 1 per second."""

_FILE_LONG = {"asf", "asf_o", "flv", "live_flv", "matroska,webm"}
"""Containers that state how long the file lasts, not how long each stream does."""
_WRAPPING = {"mpegts", "mpeg", "hls"}
"""Containers with stamps of 33 bits."""
_FROM_START = {"mpeg"}
"""Containers that are never sought. Their decoder tells no presentation time of pictures that wait for others, and what
is taken instead depends on all frames before."""


@dataclass(frozen=True)
class Header:
    """What a pass over the packets of a clip tells, without decoding. Times are seconds from the container's start.

    `base` is the unit of the stream's clock; `offset` is when its first frame is due. `packets` are those that become
    frames. `first` and `last` bound their presentation times; they are None where no packet has a time stamp.
    `even` says that the frames follow each other at `rate` without a gap; `jumps` counts how often the clock starts
    again; `alone` says that the file has no other stream; `own_start` that the stream's first frame is time 0 of
    `decoded` without `begin`.
    """

    rate: Fraction
    base: Fraction
    duration: Fraction
    offset: Fraction
    packets: int
    first: Fraction | None
    last: Fraction | None
    even: bool = False
    jumps: int = 0
    alone: bool = True
    own_start: bool = False


def read_header(
    path: Path, end: float | None = None, max_pixels: int = MAX_FRAME_PIXELS, max_packets: int = MAX_PACKETS
) -> Header:
    """Rate, length and packet count of a clip; reads the whole file once.

    Raises:
        InputError: not a clip that can be opened, one without a video stream or packets, one beyond the limits, or one
            cut short before `end` (seconds; None is its stated end).
    """
    with opened(path, max_pixels) as (container, stream):
        base = _base(stream)
        origin = container.start_time or 0
        clock = _clock(container, stream, origin)
        stated = None if container.duration is None else Fraction(container.duration, MICROSECONDS)
        start = 0 if stream.start_time is None else stream.start_time - nearest(Fraction(origin, MICROSECONDS) / base)
        count, lasting, last, latest, ends, others = 0, 0, 0, 0, 0, Fraction(0)
        usual = max(1, nearest(_usual(stream) / base))
        shown = array("q")
        for packet in _packets(path, container):
            if packet is None or packet.stream is not stream:
                others = max(others, _end(packet) - Fraction(origin, MICROSECONDS))
                continue
            pts, dts = clock.take(packet.pts, packet.dts, packet.duration or 0)
            if not packet.size or packet.is_discard:
                continue
            count += 1
            if count > max_packets:
                raise InputError(
                    f"{named(path)}: more than {max_packets:,} packets; split the clip first, or raise the limit "
                    "(max_packets)"
                )
            lasting += packet.duration or 0
            at = dts if pts is None else pts
            if at is not None:
                shown.append(at)
                latest, ends = max(latest, at), max(ends, at + (packet.duration or usual))
                last = max(last, at + (packet.duration or 0))
        due = None if stream.duration is None else (stream.duration + start) * base
        kind, alone = container.format.name, len(container.streams) == 1
        stated_rates = [r for r in (stream.average_rate, stream.guessed_rate) if r]
    if shown and not clock.jumps and 0 < min(shown) + count * usual - ends <= 2 * usual:
        # Packets without a time count as of their decoding, and the last ones are shown after that.
        ends = min(shown) + count * usual
    if not count:
        raise InputError(f"{named(path)}: the video stream has no data; the file is cut short, copy it again")
    reached = whole = last * base
    if kind in _FILE_LONG:
        # The sound may last longer than the pictures.
        stated_end = None if stated is None else stated - max(Fraction(origin, MICROSECONDS), Fraction(0))
        due, whole = due or stated_end, max(reached, others)
    if shown and not clock.jumps:
        _check_whole(path, reached, whole, due, end)
    offset = max(start * base, Fraction(0))
    if not shown:
        # The frames' own lengths are all that is known, from the headers of an elementary stream.
        rate = count / (lasting * base) if lasting else [*stated_rates, UNKNOWN_RATE][0]
        return Header(rate, base, stated or count / rate, offset, count, None, None, even=True, alone=alone)
    first = min(shown)
    span = (last - first) * base
    # Some containers state the clock of the encoder as the rate: believe only what the packets bear out.
    measured = (count - 1) / span if count > 1 and span > 0 else None
    near = [r for r in stated_rates if measured is None or measured / 2 < r < measured * 2]
    rate = near[0] if near else measured or UNKNOWN_RATE
    even = len(shown) == count and _even(shown, rate * base)
    if clock.jumps and not even:
        rate = count / span  # what was joined may have rates of its own
    # Some containers state an end before the last frame, as MPEG-PS, or where that begins, as NUT.
    duration = ends * base if clock.jumps or not stated or stated <= latest * base else stated
    own_start = kind in _WRAPPING
    return Header(
        rate, base, duration, offset, count, first * base, reached, even, clock.jumps, alone, own_start=own_start
    )


def _check_whole(path: Path, reached: Fraction, whole: Fraction, due: Fraction | None, end: float | None) -> None:
    """Refuse a clip whose pictures end at `reached`, and all its streams at `whole`, before they are `due`."""
    if due is not None and whole + EARLY_END < (due if end is None else min(due, Fraction(end))):
        raise InputError(
            f"{named(path)}: cut short, its pictures end at {float(reached):.2f} s of {float(due):.2f} s; copy it "
            f"again, or use what is there with an end of at most {math.floor(float(reached) * 10) / 10:g} s"
        )


def _even(shown: array[int], frames_per_tick: Fraction) -> bool:
    """Whether frames at these ticks fill consecutive slots."""
    slots = np.sort(np.frombuffer(shown, np.int64))
    off = (slots - slots[0]) * float(frames_per_tick) - np.arange(len(slots))
    return bool(np.abs(off).max() < 0.5)


def decoded(
    path: Path, begin: Fraction | None = None, *, seek: bool = True, max_pixels: int = MAX_FRAME_PIXELS
) -> Iterator[Timed]:
    """Frames in the order of the decoder, with times relative to `begin`; none earlier than `begin`.

    Without `begin` nothing is left out, and times are relative to the start of the container, or of the stream where
    the container's clock may restart. Packets that cannot be decoded are skipped before the first picture, as after a
    seek; later ones are damage. Without `seek` the file is read from its beginning, as MPEG-PS always is: a clock that
    jumps needs it.

    Raises:
        InputError: the file is damaged, or a frame is too large.
    """
    import av

    with opened(path, max_pixels) as (container, stream):
        base = _base(stream)
        start = container.start_time or 0
        # The stream's own start counts where stamps have 33 bits, as ffmpeg corrects it.
        if begin is None and container.format.name in _WRAPPING and stream.start_time is not None:
            start = max(start, nearest(stream.start_time * base * MICROSECONDS))
        origin = start + nearest((begin or Fraction(0)) * MICROSECONDS)
        usual = _usual(stream)
        landed = True
        seek = seek and container.format.name not in _FROM_START and container.duration is not None
        if seek and begin is not None and begin > SEEK_LEAD:
            try:
                container.seek(math.floor(origin - SEEK_LEAD * MICROSECONDS))
                landed = False
            except av.FFmpegError:
                pass  # not seekable: decode from the beginning, the frames before `begin` are dropped below
        # The last packet may claim more time than the stream has.
        until = None
        if stream.duration is not None and container.format.name not in _FILE_LONG:
            until = (stream.start_time or 0) + stream.duration - nearest(Fraction(origin, MICROSECONDS) / base)
        clock, due = _clock(container, stream, origin), Presentation()
        if begin is not None:
            due.next = -nearest(begin / base)
        seen, ticks = False, 0
        for packet in _packets(path, container, stream):
            if packet is not None:
                packet.pts, packet.dts = clock.take(packet.pts, packet.dts, packet.duration or 0)
                if not packet.size:
                    continue
            try:
                frames = stream.decode(packet)
            except av.FFmpegError as error:
                check_pixels(path, stream, max_pixels)
                if not seen:
                    continue
                at = max(0.0, float(ticks * base + (begin or 0)))
                raise InputError(
                    f"{named(path)}: damaged after {at:.2f} s ({error.strerror}); copy it again, or end before that"
                ) from error
            seen = seen or bool(frames)
            for frame in frames:
                length = frame.duration if frame.duration > 0 else max(1, nearest(usual / base))
                ticks = due.take(frame.pts, frame.dts, length)
                if not landed and ticks > 0:  # some containers seek too far: read from the beginning instead
                    yield from decoded(path, begin, seek=False, max_pixels=max_pixels)
                    return
                landed = True
                if until is not None and ticks < until:
                    length = min(length, until - ticks)
                if begin is None or ticks >= 0:
                    yield ticks * base, length * base, frame
        if not landed:
            yield from decoded(path, begin, seek=False, max_pixels=max_pixels)
        elif not seen and not stream.codec_context.width:
            raise InputError(
                f"{named(path)}: no frame can be decoded; the clip is damaged, or a frame has more than {max_pixels:,} "
                "pixels; copy it again, or raise the limit (max_pixels)"
            )


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
    frames: Iterable[Timed],
    rate: Fraction,
    rounding: Callable[[Fraction], int] = math.floor,
    form: Callable[[VideoFrame], object] = lambda frame: None,
    padded: bool = False,
) -> Iterator[VideoFrame]:
    """One frame per slot of `1 / rate` seconds: with floor, the last frame that starts within the slot.

    A slot without a frame repeats the one before; `padded` also fills the slots from 0 to the first frame, with that of
    its slot. A clip too short for any slot gives its last frame.

    ffmpeg builds its filters anew where the `form` of the frames changes. The frame that waits for its slot to end is
    lost then: of the slots missing until the new frames, the last has the first of these, the others repeat.

    Raises:
        InputError: the next frame is more than `MAX_REPEATS` slots away.
    """
    slot: int | None = None
    end, missing = Fraction(0), 0
    given: VideoFrame | None = None
    held: VideoFrame | None = None

    def slots(until: int) -> Iterator[VideoFrame]:
        nonlocal slot, given, missing
        while held is not None and slot is not None and slot < until:
            for left in reversed(range(missing if padded or given is not None else 0)):
                yield held if given is None or not left else given
            given, missing = held, 0
            yield held
            slot += 1

    for at, lasts, frame in frames:
        index = rounding(at * rate)
        if held is None or slot is None:
            slot, missing = index, max(index, 0)
            _check_gap(0, missing, at)
        else:
            _check_gap(slot, index, at)
            if form(frame) == form(held):
                yield from slots(index)
            else:
                missing += max(index - slot, 0)
                slot = max(index, slot)
        held, end = frame, at + lasts
    if held is None or slot is None:
        return
    until = rounding(end * rate)
    _check_gap(slot, until, end)
    yield from slots(until if given is not None else max(until, slot + 1))


def _check_gap(slot: int, index: int, at: Fraction) -> None:
    if index - slot > MAX_REPEATS:
        raise InputError(
            f"the next frame is stamped {float(at):,.0f} s, {index - slot:,} frames after the one before, the limit is "
            f"{MAX_REPEATS:,}; the clip's clock is broken: give an end before the gap, or a lower fps"
        )


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Read from the display matrix whether to transpose, then whether to mirror left-right and top-bottom."""
    side_data = cast("Mapping[str, Buffer]", frame.side_data)
    if "DISPLAYMATRIX" not in side_data:
        return False, False, False
    data = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32)
    # A point (x, y) is shown at (a x + c y, b x + d y).
    a, b, c, d = (int(data[i]) for i in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def form(frame: VideoFrame) -> tuple[int, int, str]:
    """What makes ffmpeg build its filters anew when it changes: size and pixel format."""
    return frame.width, frame.height, frame.format.name


@dataclass
class RgbConverter:
    """Converter of `to_rgb`: one per clip, since its tables serve all frames, and one per thread.

    `size` is that of the first frame, `(height, width)` upright; a clip whose size changes is scaled to it.
    """

    reformatter: VideoReformatter
    size: tuple[int, int] | None = None

    def fit(self, frame: VideoFrame) -> None:
        """Take the size of the first frame."""
        if self.size is None:
            self.size = (frame.width, frame.height) if orientation(frame)[0] else (frame.height, frame.width)


def rgb_converter() -> RgbConverter:
    """A converter that has seen no frame."""
    from av.video.reformatter import VideoReformatter

    return RgbConverter(VideoReformatter())


def to_rgb(frame: VideoFrame, converter: RgbConverter) -> np.ndarray:
    """`[H, W, 3]` uint8, upright, in the size of the converter's first frame."""
    converter.fit(frame)
    height, width = converter.size or (frame.height, frame.width)
    transpose, mirror, flip = orientation(frame)
    if transpose:
        height, width = width, height
    if frame.interlaced_frame or (width, height) != (frame.width, frame.height):
        pixels = _scaled(frame, width, height)
    else:
        pixels = converter.reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC").to_ndarray()
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])


def _scaled(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """Scale as ffmpeg's own filter does: it places chroma by its rules, and takes interlaced frames as whole."""
    from av.filter import Graph

    base = frame.time_base or Fraction(1, MICROSECONDS)
    source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={base}:pixel_aspect=1/1"
    graph = Graph()
    nodes = [
        graph.add("buffer", source),
        graph.add("scale", f"w={width}:h={height}:flags=bicubic"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    return cast("VideoFrame", graph.pull()).to_ndarray()


def packets(container: InputContainer, stream: VideoStream | None = None) -> Iterator[Packet | None]:
    """All packets (of all streams without `stream`), then, for one stream, None, which flushes the decoder.

    Raises:
        FFmpegError: damage that the container cannot get past, or a connection that broke.
    """
    demuxed: Iterator[Packet] = iter(container.demux() if stream is None else container.demux(stream))
    while True:
        try:
            packet = next(demuxed, None)
        except IndexError:
            break  # PyAV has given all packets, and stumbles over streams that appeared midway when it ends
        if packet is None:
            break
        # PyAV ends with empty packets that have no stamps; those of the file have some.
        if packet.size or packet.pts is not None or packet.dts is not None:
            yield packet
    if stream is not None:
        yield None


def _packets(path: Path, container: InputContainer, stream: VideoStream | None = None) -> Iterator[Packet | None]:
    """Packets of a file, as `packets` gives them.

    Raises:
        InputError: damage that the container cannot get past.
    """
    import av

    try:
        yield from packets(container, stream)
    except av.FFmpegError as error:
        raise InputError(f"{named(path)}: the file is damaged ({error.strerror}); copy it again") from error


def _clock(container: InputContainer, stream: VideoStream, begin: int) -> FrameClock:
    return FrameClock(_base(stream), begin, restarts=restarts(container), usual=_usual(stream))


def _usual(stream: VideoStream) -> Fraction:
    """Seconds that a frame lasts where nothing says so. Without stamps the average rate is made up by the container."""
    known = stream.average_rate if stream.start_time is not None else None
    return 1 / (known or stream.guessed_rate or stream.average_rate or UNKNOWN_RATE)


def _end(packet: Packet | None) -> Fraction:
    """End of a packet's content, in seconds of the container's clock."""
    if packet is None:
        return Fraction(0)
    stamp = packet.dts if packet.pts is None else packet.pts
    return Fraction(0) if stamp is None else (stamp + (packet.duration or 0)) * Fraction(packet.time_base or 0)


def _base(stream: VideoStream) -> Fraction:
    return Fraction(stream.time_base or Fraction(1, MICROSECONDS))
