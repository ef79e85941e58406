"""What a clip may do to its reader: open files of its own folder, take so much memory, and fail with one sentence."""

from __future__ import annotations

import http.server
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden_set import MEDIA
from test_clip_times import write
from test_frames import numbers

from penguin_edge.errors import InputError
from penguin_edge.media import containers, video
from penguin_edge.media.frames import probe_video, read_image, read_video, read_video_by_number

av = pytest.importorskip("av")

SECRET = "/etc/passwd"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips for playlists, links that lead out of it, a pipe, and a clip outside."""
    folder = tmp_path_factory.mktemp("outside") / "home"
    (folder / "sub").mkdir(parents=True)
    clip = write(folder / "0.ts", list(range(20))).read_bytes()
    (folder / "sub" / "1.ts").write_bytes(clip)
    (folder.parent / "out.ts").write_bytes(clip)
    (folder / "link.ts").symlink_to(folder.parent / "out.ts")
    (folder / "up").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.ts")
    return folder


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def hls(*names: str, before: str = "", end: str = "#EXT-X-ENDLIST\n") -> str:
    head = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n{before}"
    return head + "".join(f"#EXTINF:2.0,\n{name}\n" for name in names) + end


def refusal(path: Path) -> str:
    """The sentence that every reader answers with."""
    said = set()
    for read in (read_video, read_video_by_number, probe_video):
        with pytest.raises(InputError) as caught:
            list(read(path))  # type: ignore[arg-type]
        said.add(str(caught.value))
    assert len(said) == 1 and "\n" not in min(said)
    return min(said)


def test_a_playlist_of_its_own_folder_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "v.m3u8").write_text(hls("0.ts", "sub/1.ts"))
    (home / "named.mp4").write_text(hls("0.ts", "file:sub/1.ts"))
    (home / "master.m3u8").write_text("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\nv.m3u8\n")
    (home / "list.ffconcat").write_text("ffconcat version 1.0\nfile '0.ts'\n# again\nduration 2\nfile sub/1.ts\n")
    (home.parent / "alias.m3u8").symlink_to(home / "v.m3u8")
    monkeypatch.chdir(home.parent)
    for name in ("home/v.m3u8", "home/named.mp4", "home/master.m3u8", "home/list.ffconcat", "alias.m3u8"):
        assert numbers(read_video(name)) == [9, 19, 9, 19], name


@pytest.mark.parametrize(
    "name",
    [
        SECRET,
        f"file://{SECRET}",
        f"FILE:{SECRET}",
        "../out.ts",
        "file:../out.ts",
        "sub/../../out.ts",
        ".//../out.ts",
        "link.ts",
        "up/out.ts",
        f"concat:{SECRET}|0.ts",
        f"subfile,,start,0,end,100,,:{SECRET}",
        "data:text/plain;base64,AAAA",
        "crypto+file:0.ts",
        "pipe:0",
        "WEB/x.ts",
    ],
)
def test_a_playlist_reaches_nothing_else(home: Path, web: tuple[str, list[str]], name: str) -> None:
    name = name.replace("WEB", web[0])
    lists = {
        "out.m3u8": hls("0.ts", name),
        "out.mp4": hls(name),
        "key.m3u8": hls("0.ts", before=f'#EXT-X-KEY:METHOD=AES-128,URI="{name}"\n'),
        "map.m3u8": hls("0.ts", before=f'#EXT-X-MAP:URI="{name}"\n'),
        "master.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\n{name}\n",
        "sound.m3u8": f'#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="a",URI="{name}"\n#EXT-X-STREAM-INF:'
        'BANDWIDTH=1000,AUDIO="a"\nout.m3u8\n',
        "out.ffconcat": f"ffconcat version 1.0\nfile 0.ts\nfile {name}\n",
        "quoted.ffconcat": f"ffconcat version 1.0\nfile '{name}'\n",
    }
    for file, text in lists.items():
        (home / file).write_text(text)
        said = refusal(home / file)
        assert "outside the playlist's own folder" in said or "is not understood" in said, (file, said)
    assert not web[1]


def test_a_playlist_with_a_gap_or_without_an_end_is_refused(home: Path) -> None:
    cases = {
        "missing": [hls("0.ts", "gone.ts"), hls("0.ts", "pipe.ts"), hls("0.ts?a=b"), hls("%2e%2e/out.ts")],
        "no name of a file": [hls("\0"), hls("x" * 5000)],
        "ENDLIST": [hls("0.ts", end="")],
        "not a readable video": [hls("end.m3u8"), "#EXTM3U\n"],
    }
    for words, texts in cases.items():
        for text in texts:
            (home / "end.m3u8").write_text(text)
            assert words in refusal(home / "end.m3u8")
    (home / "v.m3u8").write_text(hls("0.ts"))
    for line in ("file v.m3u8", "file end.ffconcat", "option safe 0", "file gone.ts", "file 'a b.ts'"):
        (home / "end.ffconcat").write_text(f"ffconcat version 1.0\nfile 0.ts\n{line}\n")
        refusal(home / "end.ffconcat")


def test_a_part_that_was_refused_is_the_reason_of_what_fails_later(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = containers._Folder(home / "late.m3u8")
    monkeypatch.setattr(containers, "_Folder", lambda path: folder)
    (home / "late.m3u8").write_text(hls("0.ts"))
    for failure in (InputError("damaged"), av.error.InvalidDataError(1, "damaged")):
        folder.refusal = None
        with pytest.raises(InputError, match="a part") as caught, containers.opened(home / "late.m3u8"):
            folder.refusal = InputError("a part is refused")
            raise failure
        assert caught.value.__cause__ is failure


def test_descriptions_of_streams_are_refused(tmp_path: Path, web: tuple[str, list[str]]) -> None:
    mpd = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    mpd += f'mimeType="video/mp4"><Representation id="1"><BaseURL>{web[0]}/a.mp4</BaseURL></Representation>'
    sdp = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    )
    for name, text, words in (
        ("a.mpd", mpd, "DASH"),
        ("a.sdp", sdp, "own address"),
        ("a.pls", "[playlist]", "address"),
    ):
        (tmp_path / name).write_text(text)
        assert words in refusal(tmp_path / name)
    assert not web[1]


# --- HEIF -------------------------------------------------------------------------------------------------------------


def box(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", 8 + len(data)) + kind + data


def test_a_heif_image_is_no_clip(tmp_path: Path) -> None:
    # the tiles of the image would be taken for frames
    meta = box(b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)), box(b"pitm", bytes(4), b"\0\1"))
    for brand in (b"heic", b"mif1", b"avif"):
        file = tmp_path / f"{brand.decode()}.mp4"
        file.write_bytes(box(b"ftyp", brand, bytes(4), b"mif1heic") + box(b"free") + meta + box(b"mdat", bytes(64)))
        assert "a single HEIF image, not a clip; convert it" in refusal(file)


def test_a_table_cannot_claim_more_frames_than_there_are_bytes(tmp_path: Path) -> None:
    # such a file of 23 kB would take 24 bytes of memory for each of its frames
    raw = (MEDIA / "edit_list.mp4").read_bytes()
    table = raw.index(b"stsz")
    size, count = struct.unpack_from(">II", raw, table + 8)
    assert size == 0 and count == 21
    path = tmp_path / "claims.mp4"
    for shape in (
        box(b"stsz", bytes(4), struct.pack(">II", 1, 2**27)),
        box(b"trun", bytes(4), struct.pack(">I", 2**28)),
    ):
        space = 8 + 4 + 8 + 4 * count  # what the table took is filled with an empty box
        path.write_bytes(
            raw[: table - 4] + shape + box(b"free", bytes(space - len(shape) - 8)) + raw[table - 4 + space :]
        )
        assert "frames in a file of" in refusal(path)


CUT = """
import os, struct, sys
from penguin_edge.errors import InputError
from penguin_edge.media.frames import read_video
unpack = struct.unpack_from
def cutting(*arguments):
    os.truncate(sys.argv[1], 0)
    return unpack(*arguments)
struct.unpack_from = cutting
try:
    read_video(sys.argv[1])
except InputError as error:
    print(error)
"""


def test_a_file_that_is_cut_meanwhile_ends_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(box(b"ftyp", b"isom", bytes(4)) + box(b"free", bytes(2**16)) + box(b"moov", bytes(2**16)))
    done = subprocess.run([sys.executable, "-c", CUT, path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "not a readable video" in done.stdout, (done.returncode, done.stderr)


def test_boxes_and_their_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    raw = (MEDIA / "edit_list.mp4").read_bytes()
    path.write_bytes(raw)
    boxes = box(b"free") * 200
    monkeypatch.setattr(containers, "MAX_BOXES", 100)
    assert read_video(path)
    path.write_bytes(raw + boxes)
    assert "more than 100 boxes" in refusal(path)
    monkeypatch.undo()
    monkeypatch.setattr(containers, "MAX_TABLE_BYTES", 1000)
    path.write_bytes(raw + box(b"moof", bytes(1001)))
    assert "1,000 bytes of tables" in refusal(path)


@pytest.mark.parametrize("at", [0, 100, 2**20 - 40, 2**20 - 20, 2**20 - 12, 2**20 - 3, 2**20 + 5])
def test_a_claim_is_found_wherever_it_lies(tmp_path: Path, at: int) -> None:
    claim = box(b"trun", bytes(4), struct.pack(">I", 2**28))
    path = tmp_path / "a.mp4"
    path.write_bytes(box(b"ftyp", b"isom", bytes(4)) + box(b"moof", bytes(at), claim))
    assert "claims 268,435,456 frames" in refusal(path)


# --- limits -----------------------------------------------------------------------------------------------------------


def wide_clip(path: Path, codec: str, width: int, height: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "gray" if codec == "png" else "yuv420p"
        for i in range(12):
            frame = av.VideoFrame(width, height, stream.pix_fmt)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_8k_is_within_the_limit() -> None:
    assert 7680 * 4320 <= containers.MAX_FRAME_PIXELS < 12000 * 12000


@pytest.mark.parametrize(
    ("name", "codec"), [("a.avi", "png"), ("a.mov", "png"), ("a.mp4", "libx264"), ("a.ts", "libx264")]
)
def test_frames_beyond_the_limit_are_refused(tmp_path: Path, name: str, codec: str) -> None:
    path = wide_clip(tmp_path / name, codec, 320, 240)
    for read in (read_video, read_video_by_number, probe_video):
        with pytest.raises(InputError, match="max_pixels"):
            list(read(path, max_pixels=320 * 240 - 1))  # type: ignore[arg-type]
        assert read(path, max_pixels=320 * 240)
    assert next(read_video(path, max_pixels=320 * 240)).pixels.shape == (240, 320, 3)


def test_what_is_no_limit_and_no_path_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", list(range(3)))
    for wrong in (0, -1, 1.5, "many", True):
        for read in (read_video, read_video_by_number, probe_video, read_image):
            with pytest.raises(InputError, match="max_pixels"):
                read(path, max_pixels=wrong)  # type: ignore[operator]
    for wrong in (5, None, object()):
        for read in (read_video, read_video_by_number, probe_video, read_image):
            with pytest.raises(InputError, match="wanted its path"):
                read(wrong)  # type: ignore[operator]


def test_more_packets_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", list(range(20)))
    for read in (read_video, read_video_by_number, probe_video):
        with pytest.raises(InputError, match=r"more than 19 packets.*max_packets"):
            read(path, max_packets=19)
        assert read(path, max_packets=20)
    monkeypatch.setattr(video, "MAX_PACKETS", 19)
    with pytest.raises(InputError, match="more than 19 packets"):
        read_video(path)
    assert read_video(path, max_packets=20)


# --- damage -----------------------------------------------------------------------------------------------------------

KINDS = {"mp4": "libx264", "mkv": "libx264", "ts": "libx264", "avi": "mpeg4", "h264": "libx264", "mpg": "mpeg2video"}
KINDS |= {"flv": "flv", "webm": "libvpx", "wmv": "msmpeg4v3", "nut": "ffv1", "ogv": "libtheora"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    made = {}
    for kind, codec in KINDS.items():
        if codec in av.codecs_available:
            rate = 25 if kind == "mpg" else 10
            made[kind] = write(folder / f"clip.{kind}", list(range(30)), codec=codec, rate=rate, g="10").read_bytes()
    return made


def mutate(raw: bytes, chance: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(chance.choice([0, 1, 4, 30])):
        data[chance.randrange(min(len(data), chance.choice([200, 2000, len(data)])))] = chance.choice(
            [0, 0x7F, 0xFF, chance.randrange(256)]
        )
    if chance.random() < 0.5:
        del data[chance.randrange(1, len(data)) :]
    if chance.random() < 0.2:
        at = chance.randrange(len(data))
        data[at:at] = chance.randbytes(chance.randrange(1, 300))
    if chance.random() < 0.1:
        data += raw
    return bytes(data)


def survives(path: Path, chance: random.Random) -> None:
    options = chance.choice([{}, {"fps": None}, {"fps": 7}, {"start": 1}, {"end": 1.5}, {"start": 0.5, "end": 2}])
    for read in (read_video, read_video_by_number):
        try:
            for i, frame in enumerate(read(path, **options)):  # type: ignore[arg-type]
                assert frame.pixels.dtype == np.uint8 and frame.pixels.ndim == 3
                if i > 200:
                    break
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(("first", "count"), [(0, 44), pytest.param(44, 300, marks=pytest.mark.slow)])
def test_damage_gives_frames_or_one_sentence(whole: dict[str, bytes], tmp_path: Path, first: int, count: int) -> None:
    for seed in range(first, first + count):
        chance = random.Random(seed)
        kind = sorted(whole)[seed % len(whole)]
        path = tmp_path / f"clip.{kind}"
        path.write_bytes(mutate(whole[kind], chance))
        try:
            survives(path, chance)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}: {error!r}") from error
