"""Images and clips in, frames out: content decides, times are exact, damage gives one sentence."""

from __future__ import annotations

import contextlib
import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from penguin_edge.errors import InputError
from penguin_edge.media import frames, video
from penguin_edge.media.frames import probe_video, read_image, read_video, read_video_by_number, sample_numbers

av = pytest.importorskip("av")

HEIGHT, WIDTH = 48, 64
CORNER = (slice(0, 16), slice(0, 16))
"""A red corner that shows every rotation and mirror."""


def picture(number: int) -> np.ndarray:
    """The number of the frame in eight black or white bars, which survive any codec."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels[CORNER] = (255, 0, 0)
    pixels[24:] = np.repeat([255 * (number >> bit & 1) for bit in range(8)], 8)[None, :, None]
    return pixels


def write_clip(
    path: Path,
    times: list[Fraction],
    codec: str = "libx264",
    rotation: tuple[int, bool, bool] | None = None,
    **options: str,
) -> Path:
    """A clip without audio whose frame i shows the number i, given at times[i]."""
    clock = Fraction(1, 25) if times == even(len(times)) else Fraction(1, 100)
    container_options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = clock
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = round(time / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def even(count: int) -> list[Fraction]:
    return [Fraction(i, 25) for i in range(count)]


def number_of(pixels: np.ndarray) -> int:
    """The number that `picture` drew."""
    bars = pixels[28:44].reshape(16, 8, 8, 3)[:, :, 2:6].mean(axis=(0, 2, 3))
    return sum(1 << bit for bit in range(8) if bars[bit] > 128)


def numbers(found: object) -> list[int]:
    return [number_of(frame.pixels) for frame in found]  # type: ignore[attr-defined]


def ffmpeg_filter(path: Path, fps: float) -> list[int]:
    """Frame numbers that libavfilter's own `fps` filter chooses: an implementation independent of ours."""
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        stream = container.streams.video[0]
        nodes = [graph.add_buffer(template=stream), graph.add("fps", f"fps={fps}:round=down"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        out: list[int] = []

        def drain() -> None:
            while True:
                try:
                    out.append(number_of(graph.pull().to_ndarray(format="rgb24")))
                except (av.error.BlockingIOError, av.error.EOFError):
                    return

        for frame in container.decode(stream):
            frame.pts -= stream.start_time or 0
            graph.push(frame)
            drain()
        graph.push(None)
        drain()
    return out


def test_a_rate_that_the_packets_deny_is_not_believed(tmp_path: Path) -> None:
    # the encoder's clock of 1/100 s is written as a rate of 100
    path = write_clip(tmp_path / "clock.ts", [Fraction(4 * i, 101) for i in range(60)])
    assert 24 < probe_video(path).fps < 27


UNEVEN = [Fraction(t, 100) for t in (0, 7, 11, 90, 99, 101, 150, 260, 261, 262, 300, 399, 410)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "b_frames.mp4": write_clip(folder / "b_frames.mp4", even(100), bf="3", g="25"),
        "b_frames.mkv": write_clip(folder / "b_frames.mkv", even(100), bf="3", g="25"),
        "variable.mp4": write_clip(folder / "variable.mp4", UNEVEN, bf="2"),
        "mpeg4.avi": write_clip(folder / "mpeg4.avi", even(80), codec="mpeg4"),
        "seek_late.ts": write_clip(folder / "seek_late.ts", even(100), g="25"),
    }


# --- images -----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_an_image_is_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(Image.fromarray(picture(90)), "PNG"))
    for source in (path, str(path), path.read_bytes(), Image.open(path), picture(90), picture(90).transpose(2, 0, 1)):
        np.testing.assert_array_equal(read_image(source).pixels, picture(90))


def test_alpha_is_discarded_not_blended() -> None:
    rgba = np.dstack([picture(77), np.zeros((HEIGHT, WIDTH), np.uint8)])
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(rgba), "PNG")).pixels, picture(77))
    np.testing.assert_array_equal(read_image(rgba).pixels, picture(77))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "YCbCr", "RGB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(np.full((5, 7, 3), 255, np.uint8)).convert(mode)
    frame = read_image(encoded(image, "TIFF"))
    assert frame.pixels.shape == (5, 7, 3) and frame.pixels.dtype == np.uint8 and frame.time is None
    assert frame.pixels.min() >= 254


def test_16_bit_grey_keeps_its_range() -> None:
    wide = np.array([[0, 257, 32768, 65535]], np.uint16)
    pixels = read_image(encoded(Image.fromarray(wide), "PNG")).pixels
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(InputError, match="fixed range"):
        read_image(Image.fromarray(np.zeros((3, 3), np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {1: 0, 2: "m", 3: 2, 4: "f", 5: "t", 6: 1, 7: "a", 8: 3}[orientation]
    upright = picture(50)
    stored = {
        "m": upright[:, ::-1],
        "f": upright[::-1],
        "t": upright.transpose(1, 0, 2),
        "a": upright[::-1, ::-1].transpose(1, 0, 2),
    }.get(str(back), np.rot90(upright, back if isinstance(back, int) else 0))
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(data).pixels, upright)


def test_an_animation_gives_its_first_frame_and_one_pixel_is_enough() -> None:
    pages = [Image.fromarray(picture(v)) for v in (10, 200)]
    data = encoded(pages[0], "PNG", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(data).pixels, picture(10))
    assert read_image(np.full((1, 1), 9, np.uint8)).pixels.tolist() == [[[9, 9, 9]]]


def test_unusable_images_give_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(Image.effect_noise((64, 64), 90), "PNG")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    bad: list[object] = [tmp_path / "missing.png", tmp_path, text, b"", good[: len(good) // 2], good[:20]]
    bad += [np.zeros((2, 2001, 3), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4, 3), np.uint8)]
    bad += [np.zeros((5, 6, 7), np.uint8), np.zeros((2, 2, 2, 3), np.uint8)]
    for source in bad:
        with pytest.raises(InputError) as caught:
            read_image(source)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="safety limit"):
        read_image(good)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_never_escape_as_another_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    raw = bytearray(encoded(Image.fromarray(picture(100)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        assert read_image(bytes(raw[: data.draw(st.integers(0, len(raw)))])).pixels.ndim == 3


# --- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b_frames.mp4", "b_frames.mkv", "variable.mp4", "mpeg4.avi", "seek_late.ts"])
@pytest.mark.parametrize("fps", [1, 0.7, 4, 29.97])
def test_sampling_equals_the_fps_filter(clips: dict[str, Path], name: str, fps: float) -> None:
    found = list(read_video(clips[name], fps=fps, max_frames=None))
    assert numbers(found) == ffmpeg_filter(clips[name], fps)
    assert [f.time for f in found] == pytest.approx([i / fps for i in range(len(found))])
    assert [f.index for f in found] == list(range(len(found)))


def test_every_frame_comes_in_order(clips: dict[str, Path]) -> None:
    for name in ("b_frames.mp4", "b_frames.mkv", "seek_late.ts"):
        assert numbers(read_video(clips[name], fps=None, max_frames=None)) == list(range(100))


def test_max_frames_keeps_an_even_selection(clips: dict[str, Path]) -> None:
    path = clips["b_frames.mp4"]
    every = list(read_video(path, fps=5, max_frames=None))
    some = list(read_video(path, fps=5, max_frames=7))
    chosen = np.linspace(0, len(every) - 1, 7, dtype=int)
    assert [f.time for f in some] == [every[i].time for i in chosen]
    assert numbers(some) == [number_of(every[i].pixels) for i in chosen]
    assert [f.index for f in some] == list(range(7))
    assert len(list(read_video(path, fps=None, max_frames=1))) == 1


@pytest.mark.parametrize("name", ["b_frames.mp4", "b_frames.mkv", "seek_late.ts"])
@pytest.mark.parametrize(("start", "end"), [(1, 3), (1.3, None), (None, 2), (0.92, 2.6), (2.98, None)])
def test_a_span_gives_the_frames_inside_it(
    clips: dict[str, Path], name: str, start: float | None, end: float | None
) -> None:
    found = list(read_video(clips[name], fps=25, max_frames=None, start=start, end=end))
    first = math.ceil(round((start or 0) * 25, 6))
    last = min(100, math.ceil(round((end or 4) * 25, 6)))
    assert numbers(found)[0] == first
    assert set(numbers(found)) == set(range(first, last))
    assert found[0].time == (start or 0)


def test_a_short_span_is_sampled_by_number(clips: dict[str, Path], tmp_path: Path) -> None:
    found = list(read_video(clips["b_frames.mp4"], fps=10, start=2, end=2.5))
    # frames 49 ... 61, every second one from the second on
    assert numbers(found) == [50, 52, 54, 56, 58, 60]
    assert [f.time for f in found] == [i / 25 for i in numbers(found)]
    half = write_clip(tmp_path / "half.mp4", even(12))
    assert numbers(read_video(half)) == [6]
    one = write_clip(tmp_path / "one.mp4", even(1))
    assert numbers(read_video(one)) == [0]
    assert numbers(read_video(one, fps=None)) == [0]


def test_a_clip_shorter_than_one_interval_still_has_a_frame(clips: dict[str, Path]) -> None:
    assert len(list(read_video(clips["mpeg4.avi"], fps=0.1))) == 1


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_the_display_matrix_is_respected(tmp_path: Path, degrees: int, mirror: bool, flip: bool) -> None:
    path = write_clip(tmp_path / "turned.mp4", even(30), rotation=(degrees, mirror, flip))
    wanted = np.rot90(picture(0), degrees // 90)
    wanted = wanted[:: -1 if flip else 1, :: -1 if mirror else 1]
    frame = next(read_video(path, fps=25))
    assert frame.pixels.shape == wanted.shape
    red = (frame.pixels[..., 0] > 128) & (frame.pixels[..., 1] < 90)
    # chroma is stored at half resolution, so the corner's outline may be off by a pixel
    assert (red != (wanted[..., 0] > 128)).mean() < 0.02
    info = probe_video(path)
    assert (info.height, info.width) == wanted.shape[:2] and info.frames == 30
    assert info.fps == 25 and info.duration == pytest.approx(1.2)


def test_reading_is_lazy(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    convert = video.to_rgb

    def counted(frame: Any, converter: Any) -> np.ndarray:
        made.append(1)
        return convert(frame, converter)

    monkeypatch.setattr(video, "to_rgb", counted)
    clip = read_video(clips["b_frames.mp4"], fps=25, max_frames=10)
    assert not made
    next(clip)
    assert len(made) == 1
    assert len(list(clip)) == 9 and len(made) == 10, "frames that are not chosen are never converted"


def test_a_folder_is_a_clip_of_3_frames_per_second(tmp_path: Path) -> None:
    for i in range(9):
        Image.fromarray(picture(i)).save(tmp_path / f"{i:02}.png")
    found = list(read_video(tmp_path))
    assert numbers(found) == [1, 4, 7] and [f.time for f in found] == [1 / 3, 4 / 3, 7 / 3]
    assert numbers(read_video(tmp_path, fps=None, max_frames=4)) == [0, 2, 5, 8]
    assert probe_video(tmp_path) == frames.VideoInfo(WIDTH, HEIGHT, 3, 3.0, 0, 9)
    Image.fromarray(picture(0)[:-2]).save(tmp_path / "04.png")
    with pytest.raises(InputError, match="one size"):
        list(read_video(tmp_path))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_clip_of_25_frames_per_second(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "clip.mp4"
    pages = [Image.fromarray(picture(i)) for i in range(30)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    pages[0].save(path, kind, save_all=True, append_images=pages[1:], duration=40, **lossless)
    found = list(read_video(path))
    assert numbers(found) == [12] and found[0].time == 12 / 25
    assert numbers(read_video(path, fps=5)) == [2, 7, 12, 17, 22, 27]
    assert len(list(read_video(path, fps=25, max_frames=4))) == 4, "max_frames holds although the clip is short"
    assert probe_video(path).frames == 30


def test_unusable_clips_and_options_give_one_sentence(clips: dict[str, Path], tmp_path: Path) -> None:
    good = clips["b_frames.mp4"]
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "text.txt").write_text("not a video\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "none.mp4").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    Image.fromarray(picture(0)).save(tmp_path / "still.mp4", "PNG")
    raw = good.read_bytes()
    index = raw.index(b"moov")
    (tmp_path / "no_index.mp4").write_bytes(raw[: index + 200])
    names = ["text.mp4", "text.txt", "noise.mp4", "none.mp4", "empty", "still.mp4", "no_index.mp4", "missing.mp4"]
    for name in names:
        for read in (read_video, read_video_by_number, probe_video):
            with pytest.raises(InputError) as caught:
                list(read(tmp_path / name))  # type: ignore[arg-type]
            assert "\n" not in str(caught.value) and name in str(caught.value)
    options: list[dict[str, float]] = [
        {"fps": 0},
        {"fps": -1},
        {"fps": math.nan},
        {"max_frames": 0},
        {"start": -1},
        {"start": 100},
        {"start": 2, "end": 2},
        {"start": 3, "end": 1},
        {"end": math.inf},
    ]
    for wrong in options:
        with pytest.raises(InputError):
            read_video(good, **wrong)  # type: ignore[arg-type]


def test_a_damaged_clip_is_refused_but_for_what_is_whole(clips: dict[str, Path], tmp_path: Path) -> None:
    raw = clips["b_frames.mp4"].read_bytes()
    data = raw.index(b"mdat") + 4
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(raw[: data + (len(raw) - data) // 2])
    with pytest.raises(InputError, match="cut short"):
        read_video(cut, fps=25, max_frames=None)
    assert numbers(read_video(cut, fps=25, max_frames=None, end=1)) == list(range(25))
    gone = tmp_path / "gone.mp4"
    gone.write_bytes(raw[:data])
    with pytest.raises(InputError):
        list(read_video(gone))
    zeroed = tmp_path / "zeroed.mp4"
    zeroed.write_bytes(raw[:data] + bytes(len(raw) - data))
    with pytest.raises(InputError, match=r"no frame|damaged"):
        list(read_video(zeroed, max_frames=None))


def test_a_file_without_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="no video stream"):
        read_video(path)


def test_the_second_loader_reads_videos_by_number(clips: dict[str, Path]) -> None:
    found = list(read_video_by_number(clips["b_frames.mp4"], fps=1, start=1, end=3))
    # frames 24 ... 74, every 25th from the 12th on
    assert numbers(found) == [36, 61] and [f.time for f in found] == [36 / 25, 61 / 25]
    assert numbers(read_video_by_number(clips["b_frames.mp4"], fps=None, max_frames=3)) == [0, 49, 99]


@given(
    count=st.integers(1, 2000),
    rate=st.floats(0.5, 240),
    fps=st.one_of(st.none(), st.floats(0.05, 300)),
    most=st.one_of(st.none(), st.integers(1, 300)),
)
def test_sample_numbers_ascend_within_range(count: int, rate: float, fps: float | None, most: int | None) -> None:
    found = sample_numbers(count, rate, fps, most)
    assert found and found == sorted(set(found)) and found[0] >= 0 and found[-1] < count
    if most is not None and (fps is None or count / rate >= most):
        assert len(found) == min(most, count)


@given(
    gaps=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    rate=st.fractions(Fraction(1, 10), 20, max_denominator=10),
)
def test_resampling_shows_the_last_frame_of_each_slot(gaps: list[int], rate: Fraction) -> None:
    times = [Fraction(t, 10) for t in np.cumsum(gaps)]
    timed: Any = [(t, Fraction(1, 10), i) for i, t in enumerate(times)]
    found: Any = list(video.resampled(timed, rate))
    first, end = math.floor(times[0] * rate), math.floor((times[-1] + Fraction(1, 10)) * rate)
    slots = range(first, max(end, first + 1))
    wanted = [max((i for i, t in enumerate(times) if math.floor(t * rate) <= s), default=0) for s in slots]
    assert found == wanted or (end <= first and found == [len(times) - 1])
