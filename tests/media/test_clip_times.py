"""Times of a clip's frames where the container's clock is no straight line: what comes out is what ffmpeg shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from golden_set import MEDIA
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frames import even, ffmpeg_filter, number_of, numbers, picture, write_clip

from penguin_edge.errors import InputError
from penguin_edge.media import video
from penguin_edge.media.clock import ABSURD_S, MICROSECONDS, FrameClock, Presentation
from penguin_edge.media.frames import probe_video, read_video, read_video_by_number

av = pytest.importorskip("av")

RATE = 10
"""Frames per second of the clips here."""
TICKS = Fraction(1, 90000)


def write(
    path: Path,
    shown: list[int],
    *,
    shift: float = 0,
    codec: str = "libx264",
    rate: int = RATE,
    sound_s: float = 0,
    delay_s: float = 0,
    size: tuple[int, int] | None = None,
    **options: str,
) -> Path:
    """A clip whose frames show the numbers `shown`, one every `1 / rate` s from `delay_s` on, beside `sound_s` s of
    sound."""
    base = Fraction(1, 1000)
    with av.open(str(path), "w", options={"output_ts_offset": str(shift)} if shift else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        height, width = picture(0).shape[:2] if size is None else size
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        sound = (
            container.add_stream("aac" if path.suffix != ".wmv" else "wmav2", rate=44100, layout="mono")
            if sound_s
            else None
        )
        if sound is not None:
            sound.bit_rate = 64000
        packets: list[Any] = []
        for i, number in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            if size is not None:
                frame = frame.reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = round(i * 1000 / rate + 1000 * delay_s), base
            packets += stream.encode(frame)
        packets += stream.encode()
        if sound is not None:
            for i in range(round(sound_s * 44100 / 1024)):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 44100, 1024 * i
                packets += sound.encode(silence)
            packets += sound.encode()
        packets.sort(key=lambda packet: packet.dts * packet.time_base if packet.dts is not None else 0)
        for packet in packets:
            container.mux(packet)
    return path


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Frames 0 … 29, and 30 … 59 twice: with the clock of the first half, and with one 1,000 s ahead."""
    folder = tmp_path_factory.mktemp("halves")
    first = write(folder / "0.ts", list(range(30)), bf="2", g="15")
    again = write(folder / "1.ts", list(range(30, 60)), bf="2", g="15")
    return first, again, write(folder / "2.ts", list(range(30, 60)), shift=1000, bf="2", g="15")


def is_whole(path: Path, count: int = 60) -> None:
    """The clip is `count` frames at 10 per second, in order and without a gap, whatever its stamps say."""
    for fps in (1, 2, 10):
        wanted = [min(i, count) - 1 for i in range(RATE // fps, count + 1, RATE // fps)]
        found = list(read_video(path, fps=fps, max_frames=None))
        assert numbers(found) == wanted
        assert [f.time for f in found] == pytest.approx([i / fps for i in range(len(wanted))])
    assert numbers(read_video(path, fps=None, max_frames=None)) == list(range(count))
    assert numbers(read_video_by_number(path, fps=None, max_frames=None)) == list(range(count))
    info = probe_video(path)
    assert info.duration == pytest.approx(count / RATE, abs=0.01) and info.fps == RATE
    span = list(read_video(path, fps=10, start=2.5, end=4.5, max_frames=None))
    assert numbers(span) == list(range(25, 45)) and span[0].time == 2.5


@pytest.mark.parametrize("ending", ["mpg", "vob"])
@pytest.mark.parametrize("between", ["0", "1", "2", "3"])
def test_a_start_gives_the_frames_that_reading_from_the_beginning_gives(
    tmp_path: Path, ending: str, between: str
) -> None:
    """MPEG-PS: pictures that wait for others have no time of their own, and the container states too short a length."""
    path = write(tmp_path / f"a.{ending}", list(range(80)), codec="mpeg2video", rate=25, bf=between, g="12")
    assert probe_video(path).duration == pytest.approx(3.2)
    whole = numbers(read_video(path, fps=25, max_frames=None))
    assert whole == list(range(80)) or between == "0"
    for first in range(0, 56, 3):
        found = list(read_video(path, fps=25, start=first / 25, max_frames=None))
        assert numbers(found) == whole[first:] and found[0].time == pytest.approx(first / 25)
    # Less than a second is read by numbers, of which the first is that before `start`.
    assert numbers(read_video(path, fps=25, start=3.12, max_frames=None)) == [77, 78, 79]
    assert numbers(read_video(path, fps=25, start=3.17, max_frames=None)) == [78, 79]
    with pytest.raises(InputError, match=r"start 3.2 s is not before the end at 3.2 s"):
        read_video(path, fps=25, start=3.2)


def test_a_start_in_a_joined_program_stream(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / f"{i}.mpg", list(range(40 * i, 40 * i + 40)), codec="mpeg2video", rate=25, bf="2", g="12")
        for i in (0, 1)
    ]
    path = joined(tmp_path / "joined.mpg", *parts)
    whole = numbers(read_video(path, fps=25, max_frames=None))
    assert whole == list(range(80))
    for first in (10, 37, 41, 50):
        assert numbers(read_video(path, fps=25, start=first / 25, max_frames=None)) == whole[first:]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.nut", "ffv1"), ("a.mpg", "mpeg2video"), ("a.ts", "libx264"), ("a.mkv", "libx264"), ("a.mp4", "libx264")],
)
def test_the_end_is_not_before_the_end_of_the_last_frame(tmp_path: Path, name: str, codec: str) -> None:
    path = write(tmp_path / name, list(range(60)), codec=codec, rate=25)
    assert probe_video(path).duration == pytest.approx(2.4, abs=0.01)
    assert numbers(read_video(path, fps=25, start=2.37))[-1] == 59


def test_a_clock_that_starts_again_goes_on(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    is_whole(joined(tmp_path / "again.ts", halves[0], halves[1]))


def test_a_clock_that_leaps_goes_on(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    is_whole(joined(tmp_path / "ahead.ts", halves[0], halves[2]))
    thrice = joined(tmp_path / "thrice.ts", halves[0], halves[2], halves[0], halves[1])
    assert numbers(read_video(thrice, fps=None, max_frames=None)) == [*range(60), *range(60)]


def test_sound_may_begin_midway(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    spoken = write(tmp_path / "spoken.ts", list(range(30, 60)), sound_s=3, bf="2", g="15")
    is_whole(joined(tmp_path / "midway.ts", halves[0], spoken))


def test_a_playlist_with_a_discontinuity(halves: tuple[Path, Path, Path]) -> None:
    lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:3", "#EXTINF:3.0,", "0.ts", "#EXT-X-DISCONTINUITY"]
    path = halves[0].parent / "clip.m3u8"
    path.write_text("\n".join([*lines, "#EXTINF:3.0,", "1.ts", "#EXT-X-ENDLIST", ""]))
    is_whole(path)


def test_a_list_of_clips_is_one_clip(halves: tuple[Path, Path, Path]) -> None:
    path = halves[0].parent / "clip.ffconcat"
    path.write_text("ffconcat version 1.0\nfile 0.ts\nfile '1.ts'\n")
    is_whole(path)


def test_stamps_of_33_bits_wrap(tmp_path: Path) -> None:
    is_whole(write(tmp_path / "wrap.ts", list(range(60)), shift=2**33 / 90000 - 2, bf="2"))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_without_presentation_times_come_in_order(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path / "clip.avi", list(range(60)), codec=codec, bf="2")
    assert numbers(read_video(path, fps=None, max_frames=None)) == list(range(60))
    # AVI knows decoding times only, so that frames are shown as many intervals late as the decoder delays them
    late = {f for _, f in zip(range(5), numbers(read_video(path, fps=1)), strict=False)}
    assert late in ({9, 19, 29, 39, 49}, {8, 18, 28, 38, 48}, {7, 17, 27, 37, 47})


@pytest.mark.parametrize("rate", [10, 15, 24])
def test_an_elementary_stream_has_the_rate_of_its_headers(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "clip.h264", list(range(60)), rate=rate, bf="2")
    info = probe_video(path)
    assert info.fps == rate and info.duration == pytest.approx(60 / rate) and info.frames is None
    assert numbers(read_video(path, fps=None, max_frames=None)) == list(range(60))
    assert numbers(read_video(path, fps=1)) == [rate * i + rate - 1 for i in range(60 // rate)]
    assert numbers(read_video(path, fps=rate, start=1, end=2)) == list(range(rate, 2 * rate))


def test_packets_before_an_edit_list_are_not_counted() -> None:
    path = MEDIA / "edit_list.mp4"
    info = probe_video(path)
    assert info.frames == 6 and info.duration == pytest.approx(0.6)
    assert [f.time for f in read_video(path, fps=5)] == pytest.approx([0.1, 0.3, 0.5])
    assert len(list(read_video(path, fps=None))) == 6 and len(list(read_video(path))) == 1


@pytest.mark.parametrize("name", ["clip.wmv", "clip.flv", "clip.mkv", "clip.mp4", "clip.ts"])
def test_sound_may_last_longer_than_the_pictures(tmp_path: Path, name: str) -> None:
    codec = {"clip.wmv": "msmpeg4v3", "clip.flv": "flv"}.get(name, "libx264")
    codec = codec if codec in av.codecs_available else "mpeg4"
    path = write(tmp_path / name, list(range(30)), codec=codec, sound_s=9)
    assert len(list(read_video(path))) == 3
    every = list(read_video(path, fps=None, max_frames=None))
    assert numbers(every) == list(range(30))
    assert every[-1].time == pytest.approx(3, abs=0.2), "the times end with the pictures, not with the sound"


@pytest.mark.parametrize("name", ["clip.mkv", "clip.flv"])
def test_a_truncated_clip_is_refused_whatever_the_container(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, list(range(100)), codec="flv" if name == "clip.flv" else "libx264", sound_s=10)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"cut short|not a readable"):
        read_video(path, fps=10)


def test_a_late_picture_is_shown_from_the_beginning_beside_sound(tmp_path: Path) -> None:
    found = list(read_video(write(tmp_path / "late.mkv", list(range(40)), sound_s=6, delay_s=2), fps=1))
    assert numbers(found)[:4] == [9, 9, 9, 19] and [f.time for f in found][:4] == [0, 1, 2, 3]
    alone = list(read_video(write(tmp_path / "alone.mkv", list(range(40)), delay_s=2), fps=1))
    assert numbers(alone) == [9, 19, 29, 39]


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    small = write(tmp_path / "small.ts", list(range(30, 60)), size=(96, 128))
    path = joined(tmp_path / "sizes.ts", write(tmp_path / "big.ts", list(range(30))), small)
    for read in (read_video, read_video_by_number):
        every = list(read(path, fps=None, max_frames=None))
        assert {f.pixels.shape for f in every} == {picture(0).shape} and numbers(every) == list(range(60))
    # ffmpeg builds its filters anew for the new size; frame 29, which waits, is lost, and 39 stands in for it
    assert numbers(read_video(path, fps=1)) == [9, 19, 39, 39, 49, 59]
    assert numbers(read_video(path, fps=20, max_frames=None))[56:62] == [28, 28, 28, 30, 30, 30]


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.sampled_from([10, 10, 20, 40, 70, 130]), min_size=4, max_size=30),
    fps=st.sampled_from([0.5, 1, 3, 7, 25]),
    suffix=st.sampled_from([".mkv", ".mp4", ".ts"]),
)
def test_clips_of_any_rhythm_equal_the_fps_filter(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], fps: float, suffix: str
) -> None:
    times = [Fraction(t, 100) for t in itertools.accumulate([0, *gaps, 100])]
    path = write_clip(tmp_path_factory.mktemp("rhythm") / f"clip{suffix}", times, bf="0")
    found = list(read_video(path, fps=fps, max_frames=None))
    wanted = ffmpeg_filter(path, fps)
    assert numbers(found)[: len(wanted)] == wanted[: len(found)]
    assert abs(len(found) - len(wanted)) <= max(fps, 1), "but for how long the last frame lasts"


# --- the clock alone --------------------------------------------------------------------------------------------------


def ticks(seconds: Fraction | float) -> int:
    return round(seconds / TICKS)


def run(clock: FrameClock, stamps: list[int], duration: int) -> list[int]:
    return [clock.take(at, at, duration)[0] for at in stamps]  # type: ignore[misc]


@given(
    parts=st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(1, 40)), min_size=1, max_size=6),
    rate=st.sampled_from([5, 10, 25, 30]),
)
def test_joined_clocks_are_one_clock(parts: list[tuple[int, int]], rate: int) -> None:
    step = 90000 // rate
    stamps = [begin + i * step for begin, count in parts for i in range(count)]
    clock = FrameClock(TICKS, round(stamps[0] * TICKS * MICROSECONDS), restarts=True, usual=Fraction(1, rate))
    found = run(clock, stamps, step)
    # the clock is kept in microseconds, each of which is 0.09 ticks; a begin near the expected time is no new clock
    if all(abs(b - a - n * step) > ticks(11) for (a, n), (b, _) in itertools.pairwise(parts)):
        assert np.abs(np.array(found) - np.arange(len(found)) * step).max() <= len(parts)
        assert clock.jumps == len(parts) - 1
    backward = [a - b for a, b in itertools.pairwise(found)]
    assert all(back <= ticks(Fraction(1, 10)) + step + 1 for back in backward), "time does not go back"
    assert all(-back <= ticks(10) + step + 1 for back in backward), "nor leap"


@given(gaps=st.lists(st.integers(1, ticks(9)), min_size=1, max_size=40), restarts=st.booleans())
def test_a_well_formed_clock_is_left_alone(gaps: list[int], restarts: bool) -> None:
    stamps = list(itertools.accumulate([0, *gaps]))
    clock = FrameClock(TICKS, 0, restarts=restarts, usual=Fraction(1, 10))
    assert run(clock, stamps, 9000) == stamps and clock.jumps == 0


def test_an_absurd_stamp_of_a_clock_that_cannot_restart_is_no_stamp() -> None:
    clock = FrameClock(TICKS, 0, restarts=False, usual=Fraction(1, 10))
    hour = ticks(3600)
    assert clock.take(0, 0, 9000) == (0, 0)
    assert clock.take(hour, hour, 9000) == (hour, hour)
    assert clock.take(hour + ticks(ABSURD_S + 1), hour + 9000, 9000) == (None, hour + 9000)
    assert clock.take(2**63 - 1, -(2**63), 9000) == (None, hour + 18000)


def test_a_lone_stamp_hours_away_is_no_stamp_where_clocks_restart() -> None:
    stamps = [i * 9000 for i in range(20)]
    clock = FrameClock(TICKS, 0, restarts=True, usual=Fraction(1, 10))
    found = [clock.take(at + (ticks(4000) if i == 7 else 0), at, 9000) for i, at in enumerate(stamps)]
    assert found == [(None if i == 7 else at, at) for i, at in enumerate(stamps)] and clock.jumps == 0


@given(order=st.permutations(range(8)), known=st.booleans())
def test_frames_without_stamps_follow_each_other(order: list[int], known: bool) -> None:
    due = Presentation()
    assert [due.take(None, 3 * i if known else None, 3) for i in range(8)] == [3 * i for i in range(8)]
    best = Presentation()
    found = [best.take(pts, dts, 1) for dts, pts in enumerate(order)]
    assert set(found) <= set(range(8)) and (order != sorted(order) or found == order)


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(-3, 40), min_size=1, max_size=40),
    fps=st.fractions(Fraction(1, 4), 30, max_denominator=4),
    last=st.integers(1, 30),
)
def test_resampling_equals_the_fps_filter(gaps: list[int], fps: Fraction, last: int) -> None:
    base = Fraction(1, 20)
    times = list(itertools.accumulate([0, *gaps]))
    graph = av.filter.Graph()
    source = graph.add("buffer", "video_size=16x16:pix_fmt=gray:time_base=1/20:pixel_aspect=1/1")
    graph.link_nodes(source, graph.add("fps", f"fps={fps}:round=down"), graph.add("buffersink")).configure()
    wanted: list[int] = []

    def drain() -> None:
        while True:
            try:
                wanted.append(int(graph.pull().to_ndarray()[0, 0]))
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for i, at in enumerate(times):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), i, np.uint8), format="gray")
        frame.pts, frame.time_base, frame.duration = at, base, last
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    timed: Any = [(at * base, last * base, i) for i, at in enumerate(times)]
    found: Any = list(video.resampled(timed, fps))
    assert found[: len(wanted)] == wanted or not wanted
    assert len(found) >= len(wanted)
    assert found == sorted(found), "frames come in the order of the decoder"


@given(
    shapes=st.lists(st.sampled_from("aab"), min_size=1, max_size=20),
    fps=st.sampled_from([Fraction(1), Fraction(3), Fraction(25)]),
    padded=st.booleans(),
)
def test_a_changed_form_keeps_the_order(shapes: list[str], fps: Fraction, padded: bool) -> None:
    frames = [SimpleNamespace(number=i, shape=shape) for i, shape in enumerate(shapes)]
    timed: Any = [(Fraction(i, 10), Fraction(1, 10), frame) for i, frame in enumerate(frames)]
    key: Callable[[Any], object] = lambda frame: frame.shape  # noqa: E731
    found: Any = list(video.resampled(timed, fps, form=key, padded=padded))
    plain: Any = list(video.resampled(timed, fps))
    # a slot is filled by what comes after the change; where nothing comes, it is not given, as in ffmpeg
    changes = sum(a != b for a, b in itertools.pairwise(shapes))
    assert len(found) <= len(plain) + 1 and (changes or found == plain)
    order = [frame.number for frame in found]
    assert order == sorted(order)


def test_a_gap_of_a_million_frames_is_refused() -> None:
    timed: Any = [(Fraction(0), Fraction(1, 10), 0), (Fraction(10**6 + 2), Fraction(1, 10), 1)]
    with pytest.raises(InputError, match="clock is broken"):
        list(video.resampled(timed, Fraction(1)))
    still: Any = video.resampled([timed[0], (Fraction(10**6), Fraction(1), 1)], Fraction(1))
    assert list(itertools.islice(still, 3)) == [0, 0, 0], "a long still is given lazily"
    assert number_of(picture(9)) == 9 and even(1) == [0]
