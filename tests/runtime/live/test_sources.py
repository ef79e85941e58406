"""Sources of a stream, and `penguin-edge stream` over them."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import CLIP, picture
from PIL import Image

from penguin_edge.errors import InputError
from penguin_edge.media.frames import Frame, read_video
from penguin_edge.runtime.live.sources import Timed, is_live, paced, read_source


def cli(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def server() -> Iterator[str]:
    """The clips of the tests over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(CLIP.parent))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_a_clip_may_go_on_for_ever() -> None:
    once = list(read_video(CLIP, fps=1, max_frames=None))
    frames = list(islice(read_source(str(CLIP), fps=1.0, loop=True), 2 * len(once) + 1))
    times = [frame.time for frame in frames]
    assert times == [float(i) for i in range(len(frames))] and [f.index for f in frames] == list(range(len(frames)))
    assert np.array_equal(frames[len(once)].pixels, once[0].pixels)
    assert len(list(read_source(str(CLIP), fps=1.0))) == len(once)


def test_frames_come_when_their_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [100.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("penguin_edge.runtime.live.sources.time", clock)

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    frames = [Frame(picture(0), at) for at in (5.0, 5.5, 7.0, 7.5)]
    for i, _ in enumerate(paced(iter(frames), sleep)):
        now[0] += 1.75 if i == 2 else 0.25  # what is done with it; after the third the next one is late
    assert waited == [0.25, 1.25]


def test_a_stream_that_ends_is_opened_again_and_its_times_go_on(server: str) -> None:
    told: list[str] = []
    url = f"{server}/{CLIP.name}"
    assert is_live(url) and not is_live(str(CLIP))
    once = len(list(read_video(CLIP, fps=1, max_frames=None)))
    frames = list(islice(read_source(url, fps=1.0, note=told.append, pauses=(0.0, 0.0)), once + 5))
    times = [frame.time or 0.0 for frame in frames]
    assert all(0.97 <= b - a <= 2.0 for a, b in pairwise(times)) and len(told) == 1
    assert frames[0].pixels.shape == next(iter(read_video(CLIP, fps=1))).pixels.shape


@pytest.mark.parametrize("what", ["http://127.0.0.1:9/clip.mp4", "rtsp://127.0.0.1:9/x", "/dev/video77", "gone.mp4"])
def test_a_source_that_cannot_be_read_is_named(what: str, server: str) -> None:
    told: list[str] = []
    with pytest.raises(InputError, match=what.split("/")[-1]):
        list(read_source(what, note=told.append, pauses=(0.0, 0.0)))
    assert len(told) == (2 if is_live(what) else 0)
    with pytest.raises(InputError, match="failed"):
        list(read_source(f"{server}/README", note=told.append, pauses=()))


def test_stream_answers_while_a_clip_runs(tmp_path: Path) -> None:
    for i in range(12):
        Image.fromarray(picture(i % 2)).save(tmp_path / f"{i:02}.png")
    done = cli(
        "stream", "tiny", "--source", tmp_path, "--fps", 3, "--fast", "--budget", 40, "--prompt", "What is it?",
        "--every", 1, "--max-new-tokens", 4, "--max-seq-len", 512, "--threads", 1, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["frames_in"] == result["frames_processed"] == 12 and result["frames_dropped"] == {}
    assert result["max_live_visual_tokens"] <= 40 and result["kv_tokens"] <= result["capacity"] == 512
    assert [answer["time"] for answer in result["answers"]] == [0.0, 1.0, 2.0, 3.0]
    assert len([line for line in done.stdout.splitlines() if line.startswith("[")]) == 4
    # Paced, looped, and ended by the clock: nothing is answered but the question at the end.
    done = cli(
        "stream", "tiny", "--source", tmp_path, "--fps", 3, "--loop", "--duration", 5, "--prompt", "What?",
        "--max-new-tokens", 2, "--max-seq-len", 512, "--threads", 1, "--json",
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and result["frames_in"] == 15 and len(result["answers"]) == 1


def test_stream_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    def refused(*arguments: Any, word: str, code: int = 1) -> None:
        done = cli("stream", *arguments)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert word in done.stderr, done.stderr

    refused("tiny", "--source", tmp_path / "gone.mp4", word="no such file")
    refused("tiny", "--source", CLIP, "--every", 2, word="--prompt")
    refused("tiny", "--source", "rtsp://127.0.0.1:9/x", "--loop", word="no end")
    refused("tiny", "--source", CLIP, "--fps", 0, word="above 0", code=2)
    refused("tiny", "--source", CLIP, "--budget", 0, word="at least 1", code=2)
    refused("tiny", "--source", CLIP, "--max-seq-len", 100, "--threads", 1, word="for frames")
    refused(tmp_path, "--source", CLIP, word="config.json")
    (tmp_path / "empty").mkdir()
    refused("tiny", "--source", tmp_path / "empty", "--threads", 1, word="empty")


def test_the_size_of_the_next_frame_is_known_and_it_comes_all_the_same() -> None:
    frames = [Frame(picture(i), float(i)) for i in range(3)]
    timed = Timed(iter(frames))
    assert timed.size() == timed.size() == picture(0).shape[:2] and timed.count == 1
    assert [frame.time for frame in timed] == [0.0, 1.0, 2.0] and timed.count == 3
    assert timed.size() is None and list(timed) == []


def test_reading_a_clip_is_timed_where_it_is_read() -> None:
    """Decoding is in no frame's age; what it takes is told beside."""
    timed = Timed(read_source(str(CLIP), fps=2))
    first = next(timed)
    assert first.time == 0.0 and timed.count == 1 and timed.spent_ns > 0
    rest = len(list(timed))
    assert timed.count == 1 + rest > 10 and timed.ms_per_frame == timed.spent_ns / 1e6 / timed.count
    done = cli("stream", "tiny", "--source", CLIP, "--fps", 1, "--duration", 4, "--budget", 60, "--fast", "--json")
    parts = json.loads(done.stdout.splitlines()[-1])["phases_ms_per_frame"]
    assert parts["read"] > 0 and not [name for name in parts if name.startswith("decode")]
