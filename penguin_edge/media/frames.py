"""Pictures and clips to RGB frames, decided by content and never by the name of the file.

| tensor         | shape       | dtype | meaning                     |
|----------------|-------------|-------|-----------------------------|
| `Frame.pixels` | `[H, W, 3]` | uint8 | RGB at native size, upright |

A clip is decoded lazily: the decoder's own frames apart, one native-size picture is in memory at a time. Frames and
timestamps are those of the reference's two loaders (`penguinvl/mm_utils.py`): `ffmpeg` with `fps=N:round=down`, and
sampling by frame number for folders of pictures, animated pictures and spans below one second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from penguin_edge.errors import InputError
from penguin_edge.media import images, video
from penguin_edge.media.images import MAX_PIXELS
from penguin_edge.media.places import existing, local_path, named, regular_file, shown

MAX_ASPECT = 1000
"""Longest side over shortest side of an image that is still accepted."""
MAX_FPS, MAX_SECONDS = 1000, 10**9
"""Limits beyond which a request is taken for a typing error."""
FOLDER_FPS = 3
"""Rate that a folder of pictures is taken to have."""
ANIMATION_FPS = 25
"""Rate that an animated picture is taken to have, whatever delays it states."""
SHORT_SPAN = 1
"""Spans below this many seconds are sampled by frame number: one frame per second might find none."""

_ANIMATIONS = {"GIF", "WEBP", "PNG", "AVIF"}
_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Frame:
    """One picture: `pixels` `[H, W, 3]` uint8 RGB, `time` in seconds or None, `index` in the sampled sequence."""

    pixels: np.ndarray
    time: float | None = None
    index: int = 0


@dataclass(frozen=True)
class VideoInfo:
    """A clip in numbers: upright size in pixels, average frames per second, seconds.

    `rotation` is counter-clockwise, in degrees, and already applied to `width` and `height`; `frames` is None where
    the container has no time stamps.
    """

    width: int
    height: int
    fps: float
    duration: float
    rotation: int
    frames: int | None


# --- images -----------------------------------------------------------------------------------------------------------


def read_image(source: str | Path | bytes | Image.Image | np.ndarray, *, max_pixels: int | None = None) -> Frame:
    """One upright RGB frame from a file, its bytes, a `file:` or `data:` address, a Pillow image or an array.

    Formats are those of `images.FORMATS`. Alpha is discarded, not blended; 16-bit grey is scaled to 8 bits; EXIF
    orientation is applied; an animation gives its first frame. Arrays are uint8 `[H, W]`, `[H, W, C]` or `[C, H, W]`
    with 1, 3 or 4 channels (channels last is preferred where both fit).

    Args:
        max_pixels: the most that is decoded, `images.MAX_PIXELS` without it; beyond 178 million,
            `PIL.Image.MAX_IMAGE_PIXELS` must be raised too.
    Raises:
        InputError: missing, damaged or not an image of a known format, too large, or an aspect above 1000.
    """
    limit = _limit("max_pixels", max_pixels, MAX_PIXELS)
    if isinstance(source, np.ndarray):
        pixels = images.from_array(source)
    elif isinstance(source, Image.Image):
        pixels = images.to_rgb(source, "the image", limit)
    else:
        with images.opened(source, limit) as (image, name):
            pixels = images.to_rgb(image, name, limit)
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"got an image of {width}x{height}, wanted an aspect of at most {MAX_ASPECT}; crop it first")
    return Frame(pixels)


# --- clips ------------------------------------------------------------------------------------------------------------


def probe_video(path: str | Path, *, max_pixels: int | None = None, max_packets: int | None = None) -> VideoInfo:
    """Size, rate and length of a clip; decodes one frame.

    Raises:
        InputError: as `read_video`.
    """
    path, limit = local_path(path), _limit("max_pixels", max_pixels, video.MAX_FRAME_PIXELS)
    packets = _limit("max_packets", max_packets, video.MAX_PACKETS)
    pictures = _pictures(path, _limit("max_pixels", max_pixels, MAX_PIXELS))
    if pictures is not None:
        height, width = next(pictures.read([0])).shape[:2]
        return VideoInfo(width, height, pictures.rate, pictures.count / pictures.rate, 0, pictures.count)
    header = video.read_header(path, max_pixels=limit, max_packets=packets)
    for _, _, frame in video.decoded(path, max_pixels=limit):
        sides = (frame.height, frame.width) if video.orientation(frame)[0] else (frame.width, frame.height)
        count = None if header.first is None else header.packets
        return VideoInfo(*sides, float(header.rate), float(header.duration), frame.rotation, count)
    raise InputError(f"{named(path)}: no frame can be decoded; the clip is damaged or empty")


def read_video(
    path: str | Path,
    *,
    fps: float | None = 1,
    max_frames: int | None = 180,
    start: float | None = None,
    end: float | None = None,
    max_pixels: int | None = None,
    max_packets: int | None = None,
) -> Iterator[Frame]:
    """The frames of a clip at `fps` per second between `start` and `end` (seconds from its beginning), one at a time.

    `fps` None takes every frame (of a clip of variable rate: its average rate). Of more than `max_frames` an evenly
    spread selection is kept, which costs a first pass over the clip, because the count must be known. `Frame.time` is
    `start + i / fps`, or spread evenly over the span when `fps` is None. A frame shown for several sampling times is
    given several times. Frames of another size than the first are scaled to it; one of more than `max_pixels` pixels
    is refused before it is decoded. So is a clip of more than `max_packets` packets, whose times must all be known.

    A folder of pictures counts as 3 frames per second, an animated picture as 25. Without `max_pixels` the limits are
    those of `containers.py` for videos and of `images.py` for pictures and, in shares, animations.

    Raises:
        InputError: a path that is missing, is no clip or has no frame in the span; options out of range. Options and
            the header are checked at the call, damage shows while reading.
    """
    _check_options(fps, max_frames, start, end)
    path, limit = local_path(path), _limit("max_pixels", max_pixels, video.MAX_FRAME_PIXELS)
    packets = _limit("max_packets", max_packets, video.MAX_PACKETS)
    pictures = _pictures(path, _limit("max_pixels", max_pixels, MAX_PIXELS))
    if pictures is not None:
        numbers = _thin(_by_number(path, pictures.count, pictures.rate, fps, max_frames, start, end), max_frames)
        return (
            Frame(pixels, number / pictures.rate, i)
            for i, (number, pixels) in enumerate(zip(numbers, pictures.read(numbers), strict=True))
        )
    header = video.read_header(path, end, limit, packets)
    span = min(header.duration, _exact(end)) - _exact(start) if end is not None else header.duration - _exact(start)
    if span <= 0:
        raise InputError(f"{named(path)}: start {start or 0:g} s is not before the end at {float(header.duration):g} s")
    if span < SHORT_SPAN:
        numbers = _by_number(path, header.packets, float(header.rate), fps, max_frames, start, end)
        return _at_numbers(path, _thin(numbers, max_frames), float(header.rate), limit)
    return _at_rate(path, header, fps, max_frames, start, end, limit)


def read_video_by_number(
    path: str | Path,
    *,
    fps: float | None = 1,
    max_frames: int | None = 180,
    start: float | None = None,
    end: float | None = None,
    max_pixels: int | None = None,
    max_packets: int | None = None,
) -> Iterator[Frame]:
    """The reference's second loader (`load_video_from_ids`) on a video file: every k-th frame by its number.

    It begins at half an interval and stamps each frame with its number over the average rate. Like the reference it
    applies `max_frames` with `fps` only where the span in seconds reaches that number.

    Raises:
        InputError: as `read_video`.
    """
    _check_options(fps, max_frames, start, end)
    path = regular_file(local_path(path), "a video file")
    limit = _limit("max_pixels", max_pixels, video.MAX_FRAME_PIXELS)
    header = video.read_header(path, end, limit, _limit("max_packets", max_packets, video.MAX_PACKETS))
    numbers = _by_number(path, header.packets, float(header.rate), fps, max_frames, start, end)
    return _at_numbers(path, numbers, float(header.rate), limit)


def _at_rate(
    path: Path,
    header: video.Header,
    fps: float | None,
    max_frames: int | None,
    start: float | None,
    end: float | None,
    max_pixels: int,
) -> Iterator[Frame]:
    """Frames by time: the reference's `ffmpeg` loader."""
    begin = max(header.offset, _exact(start))
    # Without `start` and `end` nothing is dropped: frames before the nominal beginning then count too.
    origin = None if start is None and end is None else begin
    length = None if end is None else video.nearest((_exact(end) - begin) / header.base) * header.base
    # Beside another stream, ffmpeg shows the first frame from the beginning of the span on.
    padded = not header.alone
    rate = header.rate if fps is None else Fraction(str(fps)).limit_denominator(1_001_000)

    converter = video.rgb_converter()

    def frames() -> Iterator[video.VideoFrame]:
        decoded = _fitted(converter, video.decoded(path, origin, seek=not header.jumps, max_pixels=max_pixels))
        timed = decoded if length is None else video.trimmed(decoded, length)
        if fps is None:
            return (f for _, _, f in timed) if header.even else video.resampled(timed, rate, video.nearest)
        return video.resampled(timed, rate, form=video.form, padded=padded)

    if padded and origin is None and not header.own_start and begin * rate >= 1:
        begin = Fraction(0)  # the repeated first frame is the first one given

    count, wanted = None, None
    if fps is None or (max_frames is not None and _most(header, begin, length, rate) > max_frames):
        count = sum(1 for _ in frames())
        wanted = iter(_thin(range(count), max_frames))
    if fps is None:
        until = header.duration if end is None else min(header.duration, _exact(end))
        if header.last is not None and header.last + video.EARLY_END < until:
            until = header.last  # the sound lasts longer than the pictures
        step = float(until - begin) / max((count or 0) - 1, 1)
    else:
        step = 1 / fps
    index = 0
    target = 0 if wanted is None else next(wanted, -1)
    for i, frame in enumerate(frames()):
        if i != target:
            continue
        yield Frame(video.to_rgb(frame, converter), float(begin) + i * step, index)
        index += 1
        target = i + 1 if wanted is None else next(wanted, -1)
        if target < 0:
            break
    if not index:
        raise InputError(
            f"{named(path)}: no frame can be decoded between start and end; the clip is damaged there or empty"
        )


def _most(header: video.Header, begin: Fraction, length: Fraction | None, rate: Fraction) -> float:
    """A bound on the number of sampled frames, from the packets' times alone."""
    if header.first is None or header.last is None:
        return math.inf
    span = header.last - min(header.first, begin)
    return float((span if length is None else min(span, length)) * rate) + 2


def _by_number(
    path: Path,
    count: int,
    rate: float,
    fps: float | None,
    max_frames: int | None,
    start: float | None,
    end: float | None,
) -> list[int]:
    """Frame numbers of the reference's second loader."""
    first = max(int((start or 0) * rate) - 1, 0)
    last = count - 1 if end is None else min(max(int(end * rate) - 1, first), count - 1)
    if first > last:
        raise InputError(f"{named(path)}: start {start or 0:g} s is not before the end at {count / rate:g} s")
    return [first + i for i in sample_numbers(last + 1 - first, rate, fps, max_frames)]


def sample_numbers(count: int, rate: float, fps: float | None, max_frames: int | None) -> list[int]:
    """Every k-th of `count` frames from k // 2 on, k = rate // fps; evenly spread ones where that is not asked for.

    Source: `frame_sample` and its caller in `penguinvl/mm_utils.py`. There `max_frames` is compared with seconds.
    """
    if fps is not None and (max_frames is None or count / rate < max_frames):
        step = max(1, int(min(rate // fps, count)))
        return list(range(step // 2, count, step))
    return _thin(range(count), max_frames)


def _thin(numbers: Sequence[int], most: int | None) -> list[int]:
    """At most `most` of the numbers, evenly spread, the first and the last among them (one: the first)."""
    if most is None or len(numbers) <= most:
        return list(numbers)
    return [numbers[i] for i in np.linspace(0, len(numbers) - 1, most, dtype=int)]


def _fitted(converter: video.RgbConverter, frames: Iterator[video.Timed]) -> Iterator[video.Timed]:
    """Convert all frames to the size of the first one."""
    for timed in frames:
        converter.fit(timed[2])
        yield timed


def _at_numbers(path: Path, numbers: list[int], rate: float, max_pixels: int) -> Iterator[Frame]:
    """Frames by their place in the order of presentation."""
    converter = video.rgb_converter()
    index = 0
    for i, (_, _, frame) in enumerate(_fitted(converter, video.decoded(path, max_pixels=max_pixels))):
        if i == numbers[index]:
            yield Frame(video.to_rgb(frame, converter), i / rate, index)
            index += 1
            if index == len(numbers):
                return
    if not index:
        raise InputError(
            f"{named(path)}: no frame can be decoded between start and end; the clip is damaged there or empty"
        )
    raise InputError(f"{named(path)}: ends early, {index} of {len(numbers)} frames could be read; copy it again")


@dataclass(frozen=True)
class _Pictures:
    """A clip made of still pictures: how many, at which rate, and how to read some of them in ascending order."""

    count: int
    rate: float
    read: Callable[[Sequence[int]], Iterator[np.ndarray]]


def _pictures(path: Path, max_pixels: int) -> _Pictures | None:
    """The pictures of a folder or an animation; None for anything else that may be a video."""
    if existing(path, "a video file").is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        if not files:
            raise InputError(f"{named(path)}: the folder has no pictures; give a folder of image files or a video file")
        return _Pictures(len(files), FOLDER_FPS, lambda numbers: _same_size((files[i] for i in numbers), max_pixels))
    try:
        with images.opened(path, max_pixels) as (image, name):
            kind, count = image.format, images.frame_count(image, name)
    except images.NotAnImage:  # for the video reader to judge
        return None
    if kind != "GIF" and (count == 1 or kind not in _ANIMATIONS):
        raise InputError(f"{named(path)}: a single {kind} image, not a clip; use read_image")
    return _Pictures(count, ANIMATION_FPS, lambda numbers: _animation(path, numbers, max_pixels))


def _same_size(files: Iterator[Path], max_pixels: int) -> Iterator[np.ndarray]:
    shape: tuple[int, ...] | None = None
    for file in files:
        pixels = read_image(file, max_pixels=max_pixels).pixels
        if shape is not None and pixels.shape != shape:
            raise InputError(
                f"{named(file)}: {pixels.shape[1]}x{pixels.shape[0]} pixels, wanted {shape[1]}x{shape[0]} like the "
                "pictures before it; a folder read as a clip holds pictures of one size"
            )
        shape = pixels.shape
        yield pixels


def _animation(path: Path, numbers: Sequence[int], max_pixels: int) -> Iterator[np.ndarray]:
    with images.opened(path, max_pixels) as (image, name):
        yield from images.animation(image, name, list(numbers), max_pixels)


def _check_options(fps: float | None, max_frames: int | None, start: float | None, end: float | None) -> None:
    if fps is not None and not (_is_number(fps) and 0 < fps <= MAX_FPS):
        raise InputError(f"got fps {shown(repr(fps))}, wanted a number above 0 and at most {MAX_FPS}, or None for all")
    if max_frames is not None and not (_is_number(max_frames) and isinstance(max_frames, int) and max_frames >= 1):
        raise InputError(f"got max_frames {shown(repr(max_frames))}, wanted at least 1, or None for no limit")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (_is_number(value) and 0 <= value <= MAX_SECONDS):
            raise InputError(f"got {name} {shown(repr(value))}, wanted seconds from the clip's beginning, 0 or more")
    if end is not None and end <= (start or 0):
        raise InputError(f"got end {end:g} s at start {start or 0:g} s, wanted an end after the start")


def _limit(name: str, value: int | None, usual: int) -> int:
    if value is None:
        return usual
    if not (_is_number(value) and isinstance(value, int) and value >= 1):
        raise InputError(f"got {name} {shown(repr(value))}, wanted at least 1, or None for the usual limit")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _exact(seconds: float | None) -> Fraction:
    """Seconds as the command line of ffmpeg holds them: whole microseconds."""
    return Fraction(round((seconds or 0) * _MICROSECONDS), _MICROSECONDS)
