"""Times of live streams: they go on where the sender's clock breaks, and what is made of it is said."""

from __future__ import annotations

import http.server
import io
import itertools
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from penguin_edge.errors import InputError
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.live.live_clock import LiveClock
from penguin_edge.runtime.live.sources import LIVE, is_live, read_source, without_password

av = pytest.importorskip("av")


def played(
    stamps: list[float | None], fps: float | None = None, **begin: Any
) -> tuple[list[tuple[float, int]], list[str]]:
    """(due, number) of frames that come as fast as they can, and what was said."""
    notes: list[str] = []
    clock = LiveClock[int](fps, notes.append)
    clock.begin(**begin)
    found = list(itertools.chain.from_iterable(clock.take(i, at, 0.0) for i, at in enumerate(stamps)))
    return found + clock.end(), notes


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.booleans(),
            st.lists(st.tuples(st.one_of(st.none(), st.floats(-1e6, 1e6)), st.floats(0, 20)), max_size=120),
        ),
        max_size=4,
    ),
    st.one_of(st.none(), st.sampled_from([0.5, 2.0, 30.0])),
)
def test_whatever_a_stream_states(
    connections: list[tuple[bool, bool, list[tuple[float | None, float]]]], fps: float | None
) -> None:
    notes: list[str] = []
    clock = LiveClock[int](fps, notes.append)
    found: list[tuple[float, int]] = []
    number, now = itertools.count(), 0.0
    for by_arrival, gaps, frames in connections:
        clock.begin(by_arrival=by_arrival, gaps=gaps)
        for at, passed in frames:
            now += passed
            found += clock.take(next(number), at, now)
        found += clock.end()
    assert all(a[0] <= b[0] and a[1] < b[1] for a, b in pairwise(found)) and all(due >= 0 for due, _ in found)
    if fps:
        assert all(b[0] - a[0] >= 0.97 / fps for a, b in pairwise(found))
    else:
        assert len(found) + sum("dropped" in note for note in notes) == next(number)


STEP = 0.1
JUMPS = st.one_of(st.floats(-1e5, -2), st.floats(12, 1e5))


@given(st.lists(st.tuples(st.integers(2, 30), JUMPS), min_size=1, max_size=6))
def test_a_clock_that_jumps_goes_on_and_each_jump_is_said(parts: list[tuple[int, float]]) -> None:
    stamps, at = [], 5.0
    for count, jump in parts:
        stamps += [at + i * STEP for i in range(count)]
        at = stamps[-1] + jump
    found, notes = played(stamps)
    assert [number for _, number in found] == list(range(len(stamps)))
    assert [due for due, _ in found] == pytest.approx(
        [i * STEP for i in range(len(stamps))], abs=1e-6 * len(stamps) + 0.06
    )
    assert len(notes) == len(parts) - 1
    for note, (_, jump) in zip(notes, parts, strict=False):
        back = jump < 0 or 2**32 < 90_000 * jump < 2**33  # half of what the clock of MPEG-TS counts to: it came round
        assert ("started again" if back else "jumped ahead") in note


@given(st.integers(3, 60), st.sets(st.integers(1, 30), max_size=12), JUMPS, st.booleans())
def test_frames_alone_with_their_stamps_are_dropped(count: int, places: set[int], away: float, gaps: bool) -> None:
    outliers = {place for place in places if place < count - 1 and place - 1 not in places}
    stamps = [7 + i * STEP + (away if i in outliers else 0) for i in range(count)]
    found, notes = played(stamps, gaps=gaps)
    assert [number for _, number in found] == [i for i in range(count) if i not in outliers]
    assert [due for due, _ in found] == pytest.approx([number * STEP for _, number in found])
    assert len(notes) == len(outliers) and all("dropped" in note for note in notes)


def test_a_first_frame_may_be_the_wrong_one() -> None:
    found, notes = played([3600.0, *(i * STEP for i in range(9))])
    assert len(found) == 10 and found[-1][0] == pytest.approx(0.9, abs=0.1) and len(notes) == 1


def test_what_is_no_break() -> None:
    slow, notes = played([30.0 * i for i in range(9)])  # a picture every half minute
    assert [due for due, _ in slow] == [30.0 * i for i in range(9)] and not notes
    still, notes = played([0.0, 0.1, 0.2, 300.0, 300.1], gaps=True)  # a recording of a scene without change
    assert [due for due, _ in still] == pytest.approx([0.0, 0.1, 0.2, 300.0, 300.1]) and not notes
    end, notes = played([0.0, 0.1, 0.2, 300.0], gaps=True)
    assert end[-1] == (300.0, 3) and not notes
    swapped, notes = played([0.0, STEP, *(STEP * (i ^ 1) for i in range(2, 200))])  # two and two out of order
    assert len(swapped) == 200 and swapped[-1][0] == pytest.approx(19.9) and not notes
    unstamped, notes = played([0.0, 0.1, None, 0.3, None, 0.5])
    assert [due for due, _ in unstamped] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5]) and not notes
    clock = LiveClock[int](None, notes.append)
    clock.begin()
    # A camera that sends nothing while nothing moves: its clock and ours both went on.
    paused = clock.take(0, 5.0, 100.0) + clock.take(1, 5.1, 100.1) + clock.take(2, 605.1, 700.1)
    assert [due for due, _ in paused] == pytest.approx([0.0, 0.1, 600.1]) and not notes


def test_a_loop_of_a_few_frames_is_not_swallowed() -> None:
    found, notes = played([STEP * (i % 4) for i in range(40)], fps=1)
    assert len(found) == 4 and len(notes) == 9
    assert [due for due, _ in found] == pytest.approx([0, 1, 2, 3])


@pytest.mark.parametrize(
    "stamps", [[5.0] * 300, [-STEP * i for i in range(300)], [1e4 * (i * i % 7) for i in range(300)]]
)
def test_what_is_no_clock_gives_way_to_arrival(stamps: list[float]) -> None:
    notes: list[str] = []
    clock = LiveClock[int](1.0, notes.append)
    clock.begin()
    found = list(itertools.chain.from_iterable(clock.take(i, at, i * STEP) for i, at in enumerate(stamps)))
    assert "arrival" in notes[-1] and len(notes) < 60
    # 250 frames of a tenth of a second at least come by arrival.
    late = [due for due, number in found if number > 60]
    assert len(late) >= 23 and all(0.97 < b - a < 1.2 for a, b in pairwise(late))


def test_a_format_without_a_clock_takes_arrival() -> None:
    clock = LiveClock[int](None)
    clock.begin(by_arrival=True)
    arrivals = [50.0, 50.2, 50.21, 51.0]
    found = [clock.take(i, i * 0.04, now)[0][0] for i, now in enumerate(arrivals)]
    assert found == pytest.approx([0.0, 0.2, 0.21, 1.0])
    clock.begin(by_arrival=True)
    assert clock.take(9, 0.0, 90.0)[0][0] == pytest.approx(1.04)


# --- real streams -----------------------------------------------------------------------------------------------------


def transport_stream(
    path: Path,
    begin: float,
    count: int,
    size: tuple[int, int] = (112, 84),
    *,
    codec: str = "mpeg2video",
    sound: bool = False,
) -> bytes:
    """`count` frames, 10 per second, of a clock that begins at `begin` seconds."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        voice = container.add_stream("mp2", rate=44100) if sound else None
        for i in range(count):
            image = Image.fromarray(picture(i)).resize(size)
            frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
            frame.pts, frame.time_base = round(begin * 10) + i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1152), np.int16), format="s16", layout="stereo")
            silence.sample_rate, silence.pts, silence.time_base = 44100, round(begin * 44100), Fraction(1, 44100)
            container.mux([*voice.encode(silence), *voice.encode()])
    return path.read_bytes()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("parts") / "part.ts"
    part = {
        name: transport_stream(path, begin, n) for name, begin, n in (("a", 9, 30), ("b", 12, 30), ("one", 4000, 1))
    }
    large = transport_stream(path, 12, 30, (224, 168))
    return {
        "again": part["b"] + part["a"],
        "ahead": part["a"] + transport_stream(path, 1000, 30),
        "alone": part["a"] + part["one"] + part["b"],
        "sizes": part["a"] + large,
        **{
            name: transport_stream(path, 9, 30, (320, 240), codec=codec)
            + transport_stream(path, 12, 9, (960, 720), codec=codec)
            for name, codec in (("large", "mpeg2video"), ("large4", "mpeg4"))
        },
        "sound": part["a"] + transport_stream(path, 12, 30, sound=True),
    }


class Handler(http.server.BaseHTTPRequestHandler):
    """What `served` holds under its name; motion JPEG, twelve pictures, under `/camera`."""

    served: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        if self.path == "/camera":
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=--next")
            self.end_headers()
            buffer = io.BytesIO()
            Image.fromarray(picture(1)).save(buffer, "JPEG")
            head = b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(buffer.getvalue())
            self.wfile.write((head + buffer.getvalue() + b"\r\n") * 12)
            return
        data = self.served.get(self.path[1:], b"")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(parts: dict[str, bytes]) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Here", (Handler,), {"served": dict(parts), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        serving.daemon_threads = True
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", handler
        serving.shutdown()


def read(source: str, fps: float | None = None) -> tuple[list[Frame], list[str]]:
    """All that one connection gives."""
    told: list[str] = []
    frames = []
    with pytest.raises(InputError, match="attempts to open"):
        for frame in read_source(source, fps=fps, note=told.append, pauses=(), stall_s=60):
            frames.append(frame)
    return frames, told


@pytest.mark.parametrize(
    ("name", "count", "word"), [("again", 60, "started again"), ("ahead", 60, "jumped ahead"), ("alone", 60, "dropped")]
)
def test_a_stream_goes_on_after_a_break_of_its_clock(
    server: tuple[str, type[Handler]], name: str, count: int, word: str
) -> None:
    frames, told = read(f"{server[0]}/{name}".replace("http", "HTTP"))
    times = [frame.time or 0.0 for frame in frames]
    assert len(frames) == count and times == pytest.approx([i * 0.1 for i in range(count)], abs=0.02)
    assert len(told) == 1 and word in told[0]
    assert [frame.index for frame in frames] == list(range(count))
    assert len(read(f"{server[0]}/{name}", fps=1)[0]) == 6


def test_sound_may_come_midway(server: tuple[str, type[Handler]]) -> None:
    told: list[str] = []
    frames = list(islice(read_source(f"{server[0]}/sound", fps=None, note=told.append, pauses=(0.0,), stall_s=60), 70))
    times = [frame.time or 0.0 for frame in frames]
    assert times == pytest.approx([i * 0.1 for i in range(70)], abs=0.07)
    assert len(told) == 1 and "the stream ended; opening it again" in told[0]


def test_a_change_of_size_is_scaled_away(server: tuple[str, type[Handler]]) -> None:
    frames, told = read(f"{server[0]}/sizes")
    # The decoder keeps one frame back, which a new size makes it give up.
    assert len(frames) >= 58 and {frame.pixels.shape for frame in frames} == {(84, 112, 3)}
    assert len(told) == 1 and "224x168" in told[0]
    away = [np.abs(frames[40].pixels.astype(int) - frame.pixels).mean() for frame in frames[:30]]
    assert min(away) < 30 < sorted(away)[1]  # the same picture, coded twice, and no other


@pytest.mark.parametrize("name", ["large", "large4"])
@pytest.mark.parametrize(("limit", "count"), [(320 * 240 - 1, 0), (2 * 320 * 240, 28), (960 * 720 - 1, 28)])
def test_pictures_that_are_too_large_are_not_asked_for_again(
    server: tuple[str, type[Handler]], limit: int, count: int, name: str
) -> None:
    told: list[str] = []
    frames = []
    options: dict[str, Any] = {"pauses": (0.0,) * 3, "stall_s": 60, "max_pixels": limit}
    with pytest.raises(InputError, match=rf"/{name}: pictures .*the limit is .*have the source send smaller"):
        for frame in read_source(f"{server[0]}/{name}", fps=None, note=told.append, **options):
            frames.append(frame)
    assert not told and len(server[1].asked) == 1
    assert count <= len(frames) <= (30 if count else 0)


def test_pictures_without_times_are_as_old_as_their_arrival(
    server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = itertools.count(500.0, 0.75)  # the demuxer makes up 25 per second
    clock = SimpleNamespace(monotonic=lambda: next(arrivals), sleep=lambda seconds: None)
    monkeypatch.setattr("penguin_edge.runtime.live.sources.time", clock)
    frames, _ = read(f"{server[0]}/camera")
    assert len(frames) >= 10 and [frame.time for frame in frames] == [i * 0.75 for i in range(len(frames))]


# --- what a source may be ---------------------------------------------------------------------------------------------


def test_schemes_in_any_case_and_the_password_is_not_told() -> None:
    assert all(is_live(f"{scheme.upper()}://host/x") and is_live(f"{scheme}://host/x") for scheme in LIVE)
    assert without_password("rtsp://user:secret@host/1") == "rtsp://host/1"
    for odd in ("p@ss", "@", "a:b@c@", "", "x" * 300):
        assert without_password(f"rtsp://user:{odd}@host/1") == "rtsp://host/1"
    for plain in ("http://host/a@b", "http://host?to=a@b", "http://host#a@b", "/dev/video0"):
        assert without_password(plain) == plain
    told: list[str] = []
    with pytest.raises(InputError) as caught:
        list(read_source("HTTP://user:secret@127.0.0.1:9/x", note=told.append, pauses=(0.0,)))
    assert told and "secret" not in "".join([*told, str(caught.value)])


def test_a_file_address_is_a_clip(tmp_path: Path) -> None:
    folder = tmp_path / "pic tures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    address = f"FILE://{str(folder).replace(' ', '%20')}"
    assert not is_live(address) and len(list(read_source(address, fps=3))) == 3
    odd = tmp_path / "a:b"
    folder.rename(odd)
    assert len(list(read_source(str(odd), fps=3))) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert len(list(read_source("a:b", fps=3))) == 3  # a file of that name is no protocol


@pytest.mark.parametrize(
    "source",
    [
        "concat:{file}|{file}",
        "subfile,,start,0,end,0,,:{file}",
        "pipe:0",
        "pipe://0",
        "data:video/mp4;base64,AAAA",
        "lavfi://color",
        "gopher://host/x",
        "unix:///tmp/x",
        "async:{file}",
        "cache:{file}",
        "crypto:{file}",
        "ffrtmpcrypt://host",
        "sftp://host/x",
        "ftp://host/x",
        "x" * 9000,
        "x:" + "y" * 9000,
        "file://other/clip.mp4",
        "a\0b",
    ],
)
def test_other_protocols_are_refused_by_one_sentence(source: str, tmp_path: Path, parts: dict[str, bytes]) -> None:
    path = tmp_path / "clip.ts"
    path.write_bytes(parts["again"])
    with pytest.raises(InputError) as caught:
        list(read_source(source.format(file=path), pauses=(), stall_s=2))
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable() and "attempts" not in str(caught.value)


def test_a_playlist_of_a_stream_opens_no_files(
    server: tuple[str, type[Handler]], tmp_path: Path, parts: dict[str, bytes]
) -> None:
    address, handler = server
    path = tmp_path / "secret.ts"
    path.write_bytes(parts["again"])
    names = [str(path), f"file://{path}", f"file:{path}", f"concat:{path}", f"subfile,,start,0,end,0,,:{path}"]
    names += [f"crypto:{path}", f"async:file:{path}", f"cache:{path}"]
    for name in names:
        play = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6.0,\n{name}\n#EXT-X-ENDLIST\n"
        joined = f"ffconcat version 1.0\nfile '{name}'\n"
        handler.served |= {"list.m3u8": play.encode(), "list.ffconcat": joined.encode()}
        for listed in ("list.m3u8", "list.ffconcat"):
            assert read(f"{address}/{listed}")[0] == [], name
    # The same by a protocol that has no names at all.
    with http.server.socketserver.TCPServer(("127.0.0.1", 0), Raw) as serving:
        Raw.sent = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6.0,\n{address}/again\n#EXT-X-ENDLIST\n".encode()
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        handler.asked.clear()
        assert read(f"tcp://127.0.0.1:{serving.server_address[1]}")[0] == [] and not handler.asked
        Raw.sent = Raw.sent.replace(f"{address}/again".encode(), str(path).encode())
        assert read(f"tcp://127.0.0.1:{serving.server_address[1]}")[0] == []
        serving.shutdown()
    # What a playlist is for still works.
    handler.served["list.m3u8"] = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6.0,\nagain.ts\n#EXT-X-ENDLIST\n"
    handler.served["again.ts"] = parts["again"]
    assert len(read(f"{address}/list.m3u8")[0]) == 60


class Raw(http.server.socketserver.BaseRequestHandler):
    """Sends what it holds and hangs up."""

    sent = b""

    def handle(self) -> None:
        self.request.sendall(self.sent)
