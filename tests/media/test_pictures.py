"""Pictures that somebody else made: which are read, how large they may be, and what their pixels mean."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from helpers import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from penguin_edge.config import ImageConfig
from penguin_edge.errors import InputError
from penguin_edge.media import images
from penguin_edge.media.frames import read_image, read_video
from penguin_edge.media.places import SHOWN
from penguin_edge.runtime.core.media import Library, open_media
from penguin_edge.runtime.core.report import Clock

CASES = Path(__file__).parents[1] / "cases" / "pictures"


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def blank_png(width: int, height: int) -> bytes:
    """A black 1-bit PNG, of which a thousand pixels take one byte."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_of(rows: bytes, *, width: int = 9, height: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    """A PNG of 8 bits whose chunks are whole, whatever its pixel data are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def blank_gif(side: int, count: int, *, corner: int = 0) -> bytes:
    """Frames of one pixel each on a screen of `side` x `side`, all but the first at (corner, corner)."""
    frame = b"!\xf9\x04\0\x01\0\0\0,%s\x02\x02D\x01\0"
    places = [struct.pack("<HHHHB", at, at, 1, 1, 0) for at in (0, corner)]
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + frame % places[0] + frame % places[1] * (count - 1) + b";"


def tiff(order: str, tags: dict[int, tuple[int, int]], data: bytes) -> bytes:
    """A TIFF of one strip: {tag: (type, value)}; values are SHORT (3) or LONG (4)."""
    data += b"\0" * (len(data) % 2)
    tags = {273: (4, 8), 277: (3, 1), 279: (4, len(data)), **tags}
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data)) + data
    out += struct.pack(order + "H", len(tags))
    for tag, (kind, value) in sorted(tags.items()):
        out += struct.pack(order + "HHI", tag, kind, 1) + struct.pack(
            order + ("HH" if kind == 3 else "I"), value, *[0][: kind == 3]
        )
    return out + b"\0" * 4


def grey_tiff(
    values: list[int], bits: int, data: bytes, *, order: str = "<", photometric: int = 1, sample: int = 1
) -> bytes:
    size = {256: (4, len(values)), 257: (4, 1), 278: (4, 1)}
    return tiff(order, {**size, 258: (3, bits), 259: (3, 1), 262: (3, photometric), 339: (3, sample)}, data)


# --- which formats ----------------------------------------------------------------------------------------------------


def test_documented_formats_are_read_and_no_others(tmp_path: Path) -> None:
    kinds = [*images.known_formats(), "MPO"]
    for kind in kinds:
        assert read_image(encoded(picture(1), kind)).pixels.shape == picture(1).shape, kind
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"} <= set(kinds)
    for kind in ("ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "EPS"):
        with pytest.raises(InputError, match="formats PNG, JPEG"):
            read_image(encoded(picture(1), kind))


def test_postscript_that_pretends_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    ghost = tmp_path / "gs"
    ghost.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    path = tmp_path / "photo.png"
    path.write_bytes(page)
    for read in (read_image, lambda source: list(read_video(source))):
        with pytest.raises(InputError):
            read(path)
    assert not started.exists()


def test_every_place_that_opens_pictures_names_the_formats() -> None:
    root = Path(images.__file__).parent.parent
    folders = [root / name for name in ("penguin_edge", "runtime", "quantize", "export")]
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "Image.open(" not in line or "formats=" in line, f"{file}: {line}"


# --- how large --------------------------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from penguin_edge.errors import InputError
from penguin_edge.media.frames import read_image, read_video
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    path = sys.argv[1]
    frames = read_video(path, fps=25) if path.endswith("gif") else [read_image(path)]
    print(next(iter(frames)).pixels.shape)
except InputError as error:
    print("refused", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


def measured(path: Path) -> tuple[str, int]:
    """What became of a picture, and the megabytes that it took in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    said, megabytes = done.stdout.splitlines()
    return said, int(megabytes)


def test_formats_that_take_twice_the_memory_have_half_the_pixels() -> None:
    height, width = picture(3).shape[:2]
    for kind in {"WEBP", "AVIF"} & set(images.known_formats()):
        data = encoded(picture(3), kind)
        assert read_image(data, max_pixels=2 * height * width).pixels.shape == (height, width, 3)
        with pytest.raises(InputError, match="safety limit"):
            read_image(data, max_pixels=2 * height * width - 1)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    for name, data in (("a.png", blank_png(13_300, 13_300)), ("b.png", blank_png(30_000, 30_000))):
        path = tmp_path / name
        path.write_bytes(data)
        assert len(data) < 200_000
        said, megabytes = measured(path)
        # What opening a picture loads of Pillow itself takes some 10 MB.
        assert "safety limit" in said and megabytes < 40, (name, said, megabytes)
    for name, data in (("c.gif", blank_gif(13_000, 200)), ("d.gif", blank_gif(10, 3, corner=11_000))):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match="safety limit"):
            list(read_video(path, fps=25))


@pytest.mark.slow
def test_a_phones_largest_photo_is_read_in_bounded_memory(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (12_000, 9_000)).save(path, exif=exif)
    said, megabytes = measured(path)
    # Four bytes per pixel as decoded and three as RGB, 756 MB; no copy for turning or converting.
    assert said == "(12000, 9000, 3)" and megabytes < 900


def test_the_limit_is_an_argument(tmp_path: Path) -> None:
    data = encoded(picture(3))
    height, width = picture(3).shape[:2]
    assert read_image(data, max_pixels=height * width).pixels.shape == (height, width, 3)
    for source in (data, Image.fromarray(picture(3))):
        with pytest.raises(InputError, match="safety limit"):
            read_image(source, max_pixels=height * width - 1)
    Image.fromarray(picture(3)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match="safety limit"):
        list(read_video(tmp_path, max_pixels=height * width - 1))
    animated = tmp_path / "a.gif"
    animated.write_bytes(blank_gif(8, 100))
    assert len(list(read_video(animated, fps=None, max_pixels=4 * 64))) == 100
    with pytest.raises(InputError, match="safety limit"):
        list(read_video(animated, fps=None, max_pixels=4 * 64 - 1))


def test_an_animation_is_bounded_as_far_as_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(blank_gif(8, 100))
    monkeypatch.setattr(images, "CLIP_SHARE", 10)  # of 256 pixels each: 40 frames
    assert len(list(read_video(path, fps=25, end=1, max_pixels=256))) == 25
    with pytest.raises(InputError, match="100 frames of 8x8"):
        list(read_video(path, fps=25, max_pixels=256))
    path.write_bytes(blank_gif(1, 100_000))
    with pytest.raises(InputError, match="100000 frames"):
        read_video(path)


def test_a_sparse_file_behind_a_header_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "sparse.webp"
    path.write_bytes(encoded(picture(1), "WEBP"))
    os.truncate(path, 3 << 30)
    with pytest.raises(InputError):
        read_image(path)


def test_no_stray_warning(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 100)
    read_image(encoded(picture(1)))  # Pillow warns between its limit and twice that
    palette = Image.fromarray(picture(1)).quantize(4)
    assert np.array_equal(
        read_image(encoded(palette, transparency=bytes([0, 128, 255, 255]))).pixels, np.asarray(palette.convert("RGB"))
    )
    assert not recwarn.list


# --- orientation ------------------------------------------------------------------------------------------------------


def exif_of(orientation: Any, **others: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_orientation_equals_pillows(kind: str) -> None:
    if kind not in (*images.known_formats(), "MPO"):
        pytest.skip(f"this Pillow has no {kind}")
    turned = np.ascontiguousarray(picture(2)[:, :40])
    for orientation in range(1, 9):
        data = encoded(turned, kind, exif=exif_of(orientation))
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(read_image(data).pixels, wanted), orientation


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), st.integers(1, 200))
def test_turning_strip_by_strip_changes_nothing(orientation: int, width: int, height: int, strip: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    data = encoded(pixels, exif=exif_of(orientation))
    with pytest.MonkeyPatch.context() as patch, Image.open(io.BytesIO(data)) as image:
        patch.setattr(images, "_STRIP", strip)
        assert np.array_equal(images.to_rgb(image, "it"), np.asarray(ImageOps.exif_transpose(image)))


def raw_exif(kind: int, count: int, value: bytes, *more: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block with an orientation of any type, and other entries (tag, type, count, value)."""
    entries = sorted([(0x0112, kind, count, value), *more])
    out = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return b"Exif\0\0" + out + b"".join(struct.pack("<HHI", *e[:3]) + e[3].ljust(4, b"\0") for e in entries) + b"\0" * 4


def test_only_the_orientation_matters() -> None:
    upright, left = picture(5), np.ascontiguousarray(np.rot90(picture(5)))  # 6: stored turned left
    ill = [(0x011A, 2, 4, b"72\0\0"), (0x0128, 5, 1, b"\xff\xff\xff\x7f"), (0x8769, 2, 2, b"x\0\0\0")]
    for more in ([], ill[:1], ill[1:2], ill):
        data = encoded(left, exif=raw_exif(3, 1, b"\6\0", *more))
        assert np.array_equal(read_image(data).pixels, upright)
    for kind, count, value in (
        (2, 2, b"6\0"),  # text
        (1, 1, b"\6"),  # a byte
        (3, 1, b"\0\0"),
        (3, 1, b"\x09\0"),
        (3, 1, b"\xff\xff"),
        (9, 1, b"\xfa\xff\xff\xff"),
        (7, 4, b"\6\0\0\0"),
        (99, 1, b"\6\0"),
    ):
        data = encoded(left, exif=raw_exif(kind, count, value))
        assert np.array_equal(read_image(data).pixels, left), (kind, value)
    for junk in (b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", raw_exif(3, 1, b"\6\0")[:20]):
        assert np.array_equal(read_image(encoded(left, exif=junk)).pixels, left)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(left, "WEBP", xmp=xmp, lossless=True)
    assert np.array_equal(read_image(data).pixels, upright)


def test_an_orientation_beside_an_ill_typed_tag() -> None:
    path = CASES / "orientation_6_beside_text_resolution.jpg"
    with Image.open(path) as image:
        stored = np.asarray(image)
    assert np.array_equal(read_image(path).pixels, np.rot90(stored, -1))


# --- what pixels mean -------------------------------------------------------------------------------------------------


def test_32_bit_grey_is_taken_where_it_is_8_bit_already() -> None:
    grey = np.arange(256, dtype=np.int32).reshape(16, 16)
    data = encoded(Image.fromarray(grey), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I" and np.array_equal(read_image(data).pixels, np.asarray(image.convert("RGB")))
    assert np.array_equal(read_image(Image.fromarray(grey)).pixels[:, :, 1], grey)
    for beyond in (grey + 1, grey - 1, grey * 1000):
        with pytest.raises(InputError, match="fixed range"):
            read_image(encoded(Image.fromarray(beyond), "TIFF"))
    # A format that fixes the range is scaled, whatever mode Pillow opens it in.
    wide = b"P5 4 1 65535\n" + np.array([0, 257, 32768, 65535], ">u2").tobytes()
    assert read_image(wide).pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read_image(b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes()).pixels[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]


@pytest.mark.parametrize("order", ["<", ">"])
def test_wide_grey_of_tiff_keeps_its_range(order: str) -> None:
    values = [0, 257, 32768, 65535]
    data = np.array(values, order + "u2").tobytes()
    assert read_image(grey_tiff(values, 16, data, order=order)).pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    signed = np.array([-5, 0, 300, 7], order + "i2").tobytes()
    with pytest.raises(InputError, match="fixed range"):
        read_image(grey_tiff(values, 16, signed, order=order, sample=2))


def test_12_bits_and_white_that_is_zero() -> None:
    packed = bytes([0, 0, 0x10, 0x80, 0x0F, 0xFF])  # 0, 16, 2048, 4095
    assert read_image(grey_tiff([0] * 4, 12, packed)).pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    wide = np.array([0, 257, 32768, 65535], "<u2").tobytes()
    assert read_image(grey_tiff([0] * 4, 16, wide, photometric=0)).pixels[0, :, 0].tolist() == [255, 254, 127, 0]
    assert read_image(grey_tiff([0] * 3, 8, bytes([0, 1, 255]), photometric=0)).pixels[0, :, 0].tolist() == [
        255,
        254,
        0,
    ]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "La", "RGBa"]
)
def test_modes_of_pillow_give_what_pillow_gives(mode: str) -> None:
    source = Image.fromarray(picture(6))
    image = source.convert("RGBA" if mode in ("RGBa", "PA") else "LA" if mode == "La" else "RGB").convert(
        "P" if mode == "PA" else mode
    )
    image = image.convert("PA") if mode == "PA" else image
    through = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
    assert np.array_equal(read_image(image).pixels, np.asarray(image.convert(through).convert("RGB")))


def test_floating_point_has_no_range() -> None:
    with pytest.raises(InputError, match="fixed range"):
        read_image(Image.new("F", (4, 4)))


# --- places -----------------------------------------------------------------------------------------------------------


def ask(source: Any) -> list[Any]:
    """The media of a conversation that names one picture."""
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source}}]}]
    return open_media(messages, Library(ImageConfig(), "strict"), Clock())


def test_addresses_of_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a b%.png"
    path.write_bytes(encoded(picture(8)))
    packed = base64.b64encode(path.read_bytes()).decode()
    sources = [
        str(path),
        f"file://{quote(str(path))}",
        f"FILE://localhost{quote(str(path))}",
        f"file:{quote(str(path))}",
        f"data:image/png;base64,{packed}",
        f"data:image/jpeg;name=x.jpg;BASE64,{packed.rstrip('=')}",  # the content decides, padding may lack
        f"DATA:;base64,{quote(packed)}",
        f"data:,{quote(path.read_bytes())}",
        "data:image/png;base64," + "\n".join(packed[i : i + 60] for i in range(0, len(packed), 60)),
    ]
    for source in sources:
        assert np.array_equal(read_image(source).pixels, picture(8)), source[:40]
        assert np.array_equal(ask(source)[0].frame.pixels, picture(8)), source[:40]


def test_a_clip_may_have_a_file_address(tmp_path: Path) -> None:
    folder = tmp_path / "a clip"
    folder.mkdir()
    Image.fromarray(picture(1)).save(folder / "0.png")
    assert len(list(read_video(f"file://{quote(str(folder))}"))) == 1


LONG = base64.b64encode(bytes(range(256)) * 40).decode()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (f"data:image/png;base64,{LONG}", "not a readable image"),
        (f"data:image/png;base64,{LONG[:-7]}!", "not base64"),
        (f"data:image/png;base64;{LONG}", "without a comma"),
        (LONG, "too long"),
        ("x/" * 5000, "too long"),
        (f"http://127.0.0.1:9/{LONG}", "download it"),
        ("HTTPS://host/a.png", "download it"),
        ("s3://bucket/a.png", "download it"),
        ("file://other/a.png", "machine"),
        ("file://a.png", "machine"),
        ("file:", "names nothing"),
        ("file:///a%00b", "null byte"),
        ("a\0b", "null byte"),
        ("a\nb\x1b[31m.png", "no such file"),
        ("", "empty"),
        ("/dev/zero", "device"),
        ("/dev/null/x", "no such file"),
    ],
)
def test_sources_that_name_no_picture_get_one_short_sentence(source: str, word: str) -> None:
    for read in (read_image, ask):
        with pytest.raises(InputError, match=word) as caught:
            read(source)
        said = str(caught.value)
        assert said.isprintable() and len(said) < SHOWN + 200, said
    with pytest.raises(InputError) as caught:
        list(read_video(source))
    assert str(caught.value).isprintable() and len(str(caught.value)) < SHOWN + 200


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    link = tmp_path / "link.png"
    link.symlink_to(pipe)
    for path in (pipe, link):
        for read in (read_image, ask, lambda source: list(read_video(source))):
            with pytest.raises(InputError, match="pipe"):
                read(str(path))


# --- damage -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_gives_pixels_or_one_sentence(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*images.known_formats(), "MPO"]))
    extra: dict[str, Any] = {"exif": exif_of(6)} if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") else {}
    if kind in ("GIF", "WEBP", "PNG") and data.draw(st.booleans()):
        extra |= {"save_all": True, "append_images": [Image.fromarray(picture(2)[:24, :24])]}
    raw = bytearray(encoded(np.ascontiguousarray(picture(1)[:24, :24]), kind, **extra))
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(InputError):
            assert read_image(broken, max_pixels=1 << 20).pixels.dtype == np.uint8


def grey_tiff_of_strips(count: int) -> bytes:
    """16 x 16 pixels in strips of four rows, of which the file lists so many."""
    body = b"".join(bytes([100 + i]) * 64 for i in range(count))
    offsets = struct.pack(f"<{count}I", *(8 + 64 * i for i in range(count)))
    lengths = struct.pack(f"<{count}I", *[64] * count)
    head = 8 + len(body) + len(offsets) + len(lengths)
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 278: 4}
    rows = [(tag, 4, 1, value) for tag, value in tags.items()]
    rows += [(273, 4, count, 8 + len(body)), (279, 4, count, 8 + len(body) + len(offsets))]
    listed = b"".join(struct.pack("<HHII", *row) for row in sorted(rows))
    return b"II*\0" + struct.pack("<I", head) + body + offsets + lengths + struct.pack("<H", 9) + listed + b"\0" * 4


def test_strips_that_a_tiff_lacks_do_not_become_black() -> None:
    assert read_image(grey_tiff_of_strips(4)).pixels[::4, 0, 0].tolist() == [100, 101, 102, 103]
    for count in (2, 3):
        with pytest.raises(InputError, match=r"its pixel data end too soon\); copy it again"):
            read_image(grey_tiff_of_strips(count))


def test_rows_that_a_png_lacks_do_not_become_black() -> None:
    """Black rows that are there stay black; the data may be longer than the picture."""
    row, black = b"\0" + bytes(range(100, 127)), b"\0" * 28
    whole = read_image(png_of(row * 3 + black * 5 + b"more")).pixels
    assert whole[:3].min() == 100 and not whole[3:].any()
    for short in (b"", row, row * 7, black * 7, row * 7 + black[:-1]):
        with pytest.raises(InputError, match="damaged or truncated"):
            read_image(png_of(short))


def test_an_interlaced_png_is_read_whole_or_not_at_all() -> None:
    """9 x 8 pixels of grey: rows of 2, 1, 3, 2, 5, 4 and 9 pixels, one pass after the other."""
    passes = [(2, 1), (1, 1), (3, 1), (2, 2), (5, 2), (4, 4), (9, 4)]
    rows = b"".join((b"\0" + b"\x50" * width) * height for width, height in passes)
    assert read_image(png_of(rows, colour=0, interlaced=1)).pixels.tolist() == [[[80] * 3] * 9] * 8
    for missing in (1, 10, 40, 60):
        with pytest.raises(InputError, match="damaged or truncated"):
            read_image(png_of(rows[:-missing], colour=0, interlaced=1))


def test_a_frame_of_an_animated_png_is_whole_or_refused(tmp_path: Path) -> None:
    """Up to the last one that is asked for, and the first also as a still picture."""
    frames = [Image.fromarray(picture(i)[:24, :24]) for i in range(3)]
    whole = encoded(frames[0], save_all=True, append_images=frames[1:], blend=0, disposal=0)

    def shortened(number: int) -> bytes:
        """The animation with half of one frame's rows."""
        out, at, seen = whole[:8], 8, -1
        while at < len(whole):
            length, kind = struct.unpack_from(">I4s", whole, at)
            data = whole[at + 8 : at + 8 + length]
            at += 12 + length
            if kind in (b"IDAT", b"fdAT"):
                seen += 1
                lead = data[: 4 * (kind == b"fdAT")]
                if seen == number:
                    rows = zlib.decompress(data[len(lead) :])
                    data = lead + zlib.compress(rows[: 73 * 12])
            out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        return out

    path = tmp_path / "a.png"
    path.write_bytes(shortened(-1))
    assert [(f.pixels == picture(i)[:24, :24]).all() for i, f in enumerate(read_video(path, fps=None))] == [True] * 3
    path.write_bytes(shortened(1))
    assert (read_image(path).pixels == picture(0)[:24, :24]).all()
    assert len(list(read_video(path, fps=25, end=0.04))) == 1
    with pytest.raises(InputError, match="frame 1 of the animation is damaged"):
        list(read_video(path, fps=None))
    path.write_bytes(shortened(0))
    with pytest.raises(InputError, match="its pixel data end too soon"):
        read_image(path)


def test_a_palette_that_is_missing_does_not_become_black() -> None:
    with pytest.raises(InputError, match="have a palette, and there is none"):
        read_image(png_of(b"\0\1\2\3" * 2, width=3, height=2, colour=3))
