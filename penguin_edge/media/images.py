"""Still pictures to RGB: which formats are read, how large they may be, and what their pixels mean.

| tensor                           | shape       | dtype | meaning                     |
|----------------------------------|-------------|-------|-----------------------------|
| result of `to_rgb`, `from_array` | `[H, W, 3]` | uint8 | RGB at native size, upright |

A picture is input, whoever made it. The format is one of a list, so that no other of Pillow's decoders (one starts
Ghostscript) is reached by a file that pretends. The size is read from the header and bounded before anything is
decoded: 20 kB of PNG can stand for gigabytes.
"""

from __future__ import annotations

import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from penguin_edge.errors import InputError
from penguin_edge.media.places import data_bytes, is_data, local_path, named, regular_file, shown
from penguin_edge.media.png_rows import first_short

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Pillow's names of the formats that are read; JPEG holds MPO, and AVIF needs a Pillow that was built with it."""
MAX_PIXELS = 1 << 27
"""Pixels of a picture that is still decoded: 134 million, so that the 108 of a phone fit. A progressive JPEG of that
size takes 1.3 GB of memory, other formats less."""
FORMAT_SHARE = {"WEBP": 2, "AVIF": 2}
"""A picture in these formats has at most `MAX_PIXELS` over this: their decoders keep twice as much."""
FRAME_SHARE = 4
"""A frame of an animation has at most `MAX_PIXELS` over this (33 million, 8K): Pillow keeps four of them at a time."""
CLIP_SHARE = 256
"""All frames of an animation, up to the last one asked for, have at most this many times `MAX_PIXELS`."""
MAX_FRAMES = 50_000
"""Frames of an animation: at 25 per second more than half an hour."""
MAX_WHOLE = 1 << 30
"""Bytes of a file in a format that Pillow reads whole before it says how large the picture is."""

_READ_WHOLE = {"WEBP", "AVIF"}
_ORIENTATION, _BITS, _PHOTOMETRIC, _PLANES = 0x112, 258, 262, 284
_STRIP = 1 << 20
"""Pixels converted at a time, so that a large picture is in memory once as decoded and once as the result."""


class NotAnImage(InputError):
    """A file of none of the known formats."""


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Members of `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings about sizes and damaged metadata: both are judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


@contextmanager
def opened(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Image.Image, str]]:
    """A picture with its header read, and its name in messages; no pixel is decoded yet.

    `source` is a path, a `file:` or `data:` address, or the bytes of a file.

    Raises:
        InputError: missing, no regular file, of no known format, or larger than allowed.
    """
    name = "the image"
    if is_data(source):
        source, name = data_bytes(str(source)), "the image of the data: address"
    if isinstance(source, bytes):
        stream: io.BytesIO | io.BufferedReader = io.BytesIO(source)
        length = len(source)
    else:
        path = regular_file(local_path(source), "an image file")
        name = named(path)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror}); wanted an image file") from error
        length = os.fstat(stream.fileno()).st_size
    with stream:
        formats = [known for known in known_formats() if length <= MAX_WHOLE or known not in _READ_WHOLE]
        try:
            with quiet():
                image = Image.open(stream, formats=formats)
        except Image.DecompressionBombError as error:
            raise _beyond_pillow(name, error) from error
        except Exception as error:  # decoders of damaged headers raise many kinds, struct.error and IndexError too
            wanted = ", ".join(known_formats())
            raise NotAnImage(f"{name}: not a readable image; give a file in one of the formats {wanted}") from error
        with image:
            yield image, name


def check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuse a picture by its header.

    Raises:
        InputError: more pixels than allowed.
    """
    if image.width * image.height > max_pixels:
        raise _too_large(name, image.width * image.height, max_pixels)


def _too_large(name: str, pixels: int, limit: int) -> InputError:
    return InputError(
        f"{name}: {pixels:,} pixels, more than the safety limit of {limit:,}; reduce it first, or raise it (max_pixels)"
    )


def _beyond_pillow(name: str, error: Image.DecompressionBombError) -> InputError:
    """Error for a picture beyond Pillow's own limit, which is twice the size from which Pillow warns."""
    counted = re.search(r"\d+", str(error))
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return _too_large(name, int(counted[0]) if counted else limit + 1, limit)


def to_rgb(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`[H, W, 3]` uint8, upright by EXIF, alpha discarded.

    Raises:
        InputError: too large, damaged, or pixels without a fixed range.
    """
    check_size(image, name, max_pixels // FORMAT_SHARE.get(image.format or "", 1))
    return _decoded(image, name)


def _decoded(image: Image.Image, name: str, whole: bool = False) -> np.ndarray:
    """As `to_rgb`; `whole` says that the rows were counted already."""
    stream = getattr(image, "fp", None)  # which Pillow forgets when it has loaded
    try:
        with quiet():
            _check_strips(image, name)
            image.load()
            if not whole and stream is not None and _maybe_short(image) and first_short(stream, 1) is not None:
                raise _short(name)
            orientation = _orientation(image)
            pixels = _reader(image, name)
            width, height = image.size
            upright = np.empty((width, height, 3) if orientation > 4 else (height, width, 3), np.uint8)
            stored = _as_stored(upright, orientation)
            rows = max(1, _STRIP // width)
            for top in range(0, height, rows):
                strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
                stored[top : top + rows] = pixels(strip)
            return upright
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise _beyond_pillow(name, error) from error
    except Exception as error:  # as above: Pillow's decoders raise many kinds on damaged data
        raise InputError(f"{name}: the image is damaged or truncated ({shown(error)}); copy it again") from error


def _short(name: str) -> InputError:
    return InputError(f"{name}: the image is damaged or truncated (its pixel data end too soon); copy it again")


def _maybe_short(image: Image.Image) -> bool:
    """Whether a PNG's last row is one that Pillow leaves where the data ended before it."""
    if image.format != "PNG":
        return False
    last = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or not np.asarray(last).any()


def _check_strips(image: Image.Image, name: str) -> None:
    """Refuse what Pillow would read with black instead: a palette or strips that a file lacks.

    Raises:
        InputError: which of them.
    """
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise InputError(f"{name}: the image is damaged (its pixels have a palette, and there is none); copy it again")
    tiles = getattr(image, "tile", [])
    if image.format == "TIFF" and tiles:
        planes = len(image.getbands()) if getattr(image, "tag_v2", {}).get(_PLANES) == 2 and len(tiles) > 1 else 1
        stored = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in tiles)
        if stored < planes * image.width * image.height:
            raise _short(name)


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF numbers them. Only this tag is read: what ill-typed tags beside it say does not matter.

    Ask after loading: Pillow turns a TIFF itself while it loads, and reads EXIF behind the pixels of a PNG then.
    """
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata, of which Pillow raises many kinds, says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of the upright picture in the layout of the stored one."""
    if orientation == 6:  # stored turned left: its first row is the last column
        return upright[:, ::-1].transpose(1, 0, 2)
    if orientation == 8:
        return upright[::-1].transpose(1, 0, 2)
    flipped = upright[:: -1 if orientation in (3, 4, 7) else 1, :: -1 if orientation in (2, 3, 7) else 1]
    return flipped.transpose(1, 0, 2) if orientation in (5, 7) else flipped


def _reader(image: Image.Image, name: str) -> Callable[[Image.Image], np.ndarray]:
    """Function that makes RGB, or grey `[H, W, 1]`, of a strip of this picture.

    Wide grey is scaled by the range that its format fixes, because Pillow's own conversion clips at 255, which leaves
    most such pictures white. Where nothing fixes the range, only values that are 8-bit already are taken.
    """
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    if mode == "F":
        raise InputError(f"{name}: pixels of mode F have no fixed range; save it with 8 or 16 bits")
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        most = 4095 if tags.get(_BITS) == (12,) else 65535
        inverted = tags.get(_PHOTOMETRIC) == 0  # white is zero, which Pillow heeds for 8 bits alone

        def scaled(strip: Image.Image) -> np.ndarray:
            values = np.asarray(strip).astype(np.int64)[:, :, None]
            return ((most - values if inverted else values) * 255 + most // 2) // most

        return scaled
    if mode == "I":

        def narrow(strip: Image.Image) -> np.ndarray:
            values = np.asarray(strip)[:, :, None]
            if values.min() < 0 or values.max() > 255:
                raise InputError(f"{name}: 32-bit grey beyond 255 has no fixed range; save it with 8 or 16 bits")
            return values

        return narrow
    if mode == "La":  # which Pillow converts to its straight form alone
        return lambda strip: np.asarray(strip.convert("LA").convert("RGB"))
    return lambda strip: np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def from_array(array: np.ndarray) -> np.ndarray:
    """uint8 `[H, W]`, `[H, W, C]` or `[C, H, W]` as RGB; channels last is preferred where both fit.

    Raises:
        InputError: another dtype or shape.
    """
    channels = (1, 3, 4)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise InputError(f"got an array {array.dtype} {list(array.shape)}, wanted uint8 [H, W], [H, W, C] or [C, H, W]")
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] not in channels:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in channels:
        raise InputError(f"got an array {list(array.shape)} without a channel axis of 1, 3 or 4; wanted RGB or grey")
    rgb = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
    return np.ascontiguousarray(rgb)


def animation(image: Image.Image, name: str, numbers: list[int], max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """The frames of these ascending numbers, one at a time; every frame before them is decoded as well.

    Raises:
        InputError: damaged, or larger than allowed: each frame, or all up to the last number.
    """
    frame = max_pixels // FRAME_SHARE
    check_size(image, name, frame)
    total = image.width * image.height * (numbers[-1] + 1 if numbers else 0)
    if total > CLIP_SHARE * max_pixels:
        raise InputError(
            f"{name}: {numbers[-1] + 1} frames of {image.width}x{image.height} to decode, more pixels than the safety "
            "limit allows; reduce it, make a video of it, or raise the limit (max_pixels)"
        )
    stream, short = getattr(image, "fp", None), None
    if image.format == "PNG" and numbers and stream is not None:
        short = first_short(stream, numbers[-1] + 1)
    at = 0
    for number in numbers:
        if short is not None and short <= number:
            raise InputError(f"{name}: frame {short} of the animation is damaged (it ends too soon); copy it again")
        try:
            with quiet():
                while at <= number:
                    # One by one, because a frame may enlarge the picture.
                    image.seek(at)
                    check_size(image, name, frame)
                    at += 1
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds on damaged data
            raise InputError(f"{name}: frame {number} of the animation is damaged; copy it again") from error
        yield _decoded(image, name, whole=True)


def frame_count(image: Image.Image, name: str) -> int:
    """Frames of an animation, 1 of a still picture.

    Raises:
        NotAnImage: damaged before its end.
        InputError: more than `MAX_FRAMES`.
    """
    try:
        with quiet():
            count = getattr(image, "n_frames", 1)
    except Exception as error:  # of the many kinds that Pillow's decoders raise on damaged data
        raise NotAnImage(f"{name}: the animation is damaged; copy it again") from error
    if count > MAX_FRAMES:
        raise InputError(f"{name}: {count} frames, at most {MAX_FRAMES} are read; cut it, or make a video of it")
    return count
