"""`bench` and `compare`: what is measured is what was asked for, and a change is told from noise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLIP, CountingEngine, picture, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.bench import traffic
from penguin_edge.errors import BudgetError, InputError, PenguinError
from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.bench.clips import VideoOptions, bench_video
from penguin_edge.runtime.bench.compare import change, compare, read
from penguin_edge.runtime.bench.stages import BenchOptions, Traffic, bench_model, percentiles
from penguin_edge.runtime.bench.streams import Brake, SlowedClock, SlowedEngine, _deadlines, slope
from penguin_edge.runtime.bench.timeline import Timeline
from penguin_edge.runtime.latency.control import LatencyTarget
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream


def cli(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_every_stage_is_measured_as_often_as_asked() -> None:
    engine = CountingEngine(EagerEngine(tiny_model(), max_seq_len=300))
    told: list[str] = []
    rows = bench_model(engine, BenchOptions((8, 200), 3, (0, 100), repeat=2, warmup=1), told.append)
    found = {row.test: row for row in rows}
    assert {"encode 64", "project 64", "pp8", "pp200", "tg3", "tg3 @ d100"} <= set(found)
    assert all(len(row.samples_ms) == (6 if name.startswith("tg") else 2) for name, row in found.items())
    assert all(sample > 0 for row in rows for sample in row.samples_ms)
    # Three rounds: prompts, and steps behind a cache that was filled for them.
    assert engine.forwarded_tokens == 3 * (8 + 200 + 3 + 100 + 3)
    data = found["pp200"].to_json()
    assert data["per_s"] == pytest.approx(200e3 / float(np.median(data["samples_ms"])), rel=1e-3)
    with pytest.raises(BudgetError, match="max_seq_len is 300"):
        bench_model(engine, BenchOptions((301,)), told.append)
    with pytest.raises(InputError, match="at least 1"):
        BenchOptions((0,))


def test_a_step_reads_the_decoder_and_what_the_cache_holds() -> None:
    engine = EagerEngine(tiny_model(), max_seq_len=300)
    text = engine.config.text
    read = traffic(None, engine)
    # The head is the tied table; what remains are the layers and the last norm.
    assert engine.model.decoder is not None and text.tie_word_embeddings
    layers = sum(4 * p.numel() for p in engine.model.decoder.layers.parameters())
    assert read == Traffic(
        layers + 4 * text.hidden_size * (text.vocab_size + 1),
        4 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim,
    )
    rows = {row.test: row for row in bench_model(engine, BenchOptions((8,), 3, (0, 100), 1, 0), str, read)}
    # Steps after 100 positions see 101, 102 and 103.
    assert (
        rows["tg3 @ d100"].bytes == read.weights + 102 * read.position
        and rows["tg3"].bytes == read.weights + 2 * read.position
    )
    data = rows["tg3"].to_json()
    assert data["gb_s"] == pytest.approx(data["bytes"] / (data["ms"]["p50"] * 1e6))
    assert rows["pp8"].to_json()["gb_s"] is None and rows["encode 64"].bytes is None
    assert traffic(None, CountingEngine()) is None


def test_a_bundle_reads_the_files_of_its_decoder(nano_bundle: Callable[[str, str], Path]) -> None:
    pytest.importorskip("onnxruntime")
    bundle = Bundle.read(nano_bundle("onnx", "int8-prefill"))
    files = {path.name: path.stat().st_size for path in bundle.folder.iterdir()}
    read = traffic(bundle, CountingEngine())
    assert read is not None and read.weights == files["decoder.onnx"] + files["decoder.onnx.data"]
    assert bundle.manifest.kv_dtype == "fp32"


def test_a_clip_is_asked_about_cold_and_warm() -> None:
    engine = CountingEngine(EagerEngine(tiny_model(), max_seq_len=1024))
    sessions: list[Session] = []
    encoded: list[int] = []

    def make() -> Session:
        sessions.append(Session(engine, tiny_tokenizer(), budget=100))
        return sessions[-1]

    options = VideoOptions(str(CLIP), "What?", fps=0.5, answer_tokens=4, repeat=3, warmup=1)
    found = bench_video(make, options, lambda line: encoded.append(engine.encoded_frames))
    per_round = encoded[1]
    assert len(sessions) == 4 and per_round > 0
    # Asking again encodes nothing, a new session everything.
    assert encoded == [0, *(n * per_round for n in (1, 1, 2, 2, 3, 3)), 4 * per_round]
    samples = found["samples"]
    assert len(samples["cold_ms"]) == len(samples["warm_ms"]) == 3 and len(samples["token_ms"]) == 2 * 3 * 3
    assert found["tpot_ms"] == pytest.approx(np.mean(samples["token_ms"])) == pytest.approx(1e3 / found["tokens_per_s"])
    for kind in ("cold", "warm"):
        # Three rounds: the one of the median is the median, and its parts are all of it.
        assert sum(found["phases_ms"][kind].values()) == pytest.approx(found["first_token_ms"][kind]["p50"])
        assert all(len(values) == 3 for values in found["phase_samples_ms"][kind].values())
    assert {"decode_video", "encode", "project", "prefill"} <= found["phases_ms"]["cold"].keys()
    assert not {"encode", "project", "preprocess"} & found["phases_ms"]["warm"].keys()
    assert 0 < found["visual_tokens"] <= 100 and found["reused_tokens"] == found["prompt_tokens"] - 1
    with pytest.raises(InputError, match="at least one"):
        VideoOptions(str(CLIP), repeat=0)


def test_an_engine_is_slowed_from_its_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []
    monkeypatch.setattr("penguin_edge.runtime.bench.streams.time.monotonic", lambda: now[0])
    monkeypatch.setattr("penguin_edge.runtime.bench.streams.time.sleep", slept.append)

    class Second(CountingEngine):
        def project(self, features: Any) -> Any:
            now[0] += 1.0
            return features

    brake = Brake(3.0, 2.5)
    engine, clock = SlowedEngine(Second(), brake), SlowedClock(brake)
    for _ in range(2):
        engine.project(np.zeros(1))
    brake.start()
    for _ in range(4):
        engine.project(np.zeros(1))
    assert slept == [2.0, 2.0]
    for phase in ("plan", "prefill"):  # An engine's work is slowed where it is done.
        with clock(phase):
            now[0] += 5.0
    assert slept == [2.0, 2.0, 10.0]
    brake.let_go()
    engine.project(np.zeros(1))
    assert len(slept) == 3


def test_deadlines_are_those_of_answers_and_of_frames_that_have_one() -> None:
    assert _deadlines(None, [1.0], [1.0], 3) == (0, 0)
    assert _deadlines(LatencyTarget(10.0), [9.0, 11.0], [99.0], 3) == (2, 1)
    assert _deadlines(LatencyTarget(10.0, 5.0), [9.0, 11.0], [4.0, 6.0, 7.0], 0) == (5, 3)
    # A frame that the queue gave up for a newer one was never ready.
    assert _deadlines(LatencyTarget(10.0, 5.0), [9.0], [4.0], 2) == (4, 2)


def test_memory_is_extrapolated_after_ten_minutes_alone() -> None:
    assert slope([]) is None and slope([(0.0, 5.0), (599.0, 6.0)]) is None
    # Growth while it warms up does not count.
    rising = [(float(t), 100 + min(t, 600) + (t - 600) * 3 / 3600) for t in range(0, 1201, 10)]
    assert slope(rising) == pytest.approx(3.0, rel=0.05)


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=30), st.floats(1.2, 5))
def test_a_change_is_told_from_noise(samples: list[float], factor: float) -> None:
    assert change(samples, samples, 0.0)["verdict"] in ("same", "unclear")  # Few of them may be too noisy to tell.
    steady = [10.0 + i % 3 / 100 for i in range(12)]
    slower = [value * factor for value in steady]
    assert change(steady, slower, 0.05)["verdict"] == "worse" and change(slower, steady, 0.05)["verdict"] == "better"
    assert change(steady, slower, factor)["verdict"] == change(steady, steady, 0.0)["verdict"] == "same"
    assert change(steady[:2], slower, 0.0)["verdict"] == "too few samples"
    noisy = [1.0, 1.0, 9.0]
    assert change(noisy, noisy, 0.05)["verdict"] == "unclear"


def test_percentiles_of_nothing_are_nothing() -> None:
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2.0


def test_bench_and_compare_from_the_command_line(tmp_path: Path) -> None:
    common = ("bench", "tiny", "-p", "16", "-n", 4, "-d", "0", "--repeat", 3, "--threads", 1, "--max-seq-len", 256)
    done = cli(*common, "-o", tmp_path / "a.json", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["schema"] == "penguin-bench/1" and result["read_gb_s"] > 0 and result == read(tmp_path / "a.json")
    slow = json.loads((tmp_path / "a.json").read_text())
    for row in slow["rows"]:
        row["samples_ms"] = [10 * value for value in row["samples_ms"]]
    slow["machine"]["processor"] = "another"
    (tmp_path / "b.json").write_text(json.dumps(slow))
    done = cli("compare", tmp_path / "a.json", tmp_path / "b.json", "--fail-above", "5%", "--json")
    assert done.returncode == 1 and "different machines" in done.stderr and "pp16" in done.stderr
    assert "pp16" in json.loads(done.stdout.splitlines()[-1])["worse"]
    assert cli("compare", tmp_path / "b.json", tmp_path / "a.json", "--fail-above", "5%").returncode == 0
    assert cli("compare", tmp_path / "a.json", tmp_path / "b.json").returncode == 0
    with pytest.raises(InputError, match="no test in common"):
        compare(result, {**result, "rows": []})
    for name, damage in (
        ("d", {"rows": [{"test": "pp16"}]}),
        ("e", {"machine": None}),
        ("f", {"samples": {"x": ["a"]}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, **damage}))
        with pytest.raises(InputError, match=r"name a file that `bench -o` wrote|missing or no number"):
            read(tmp_path / f"{name}.json")
    (tmp_path / "c.json").write_text("{}")
    for wrong, word in ((tmp_path / "c.json", "schema"), (tmp_path / "gone.json", "cannot be read"), (CLIP, "JSON")):
        done = cli("compare", tmp_path / "a.json", wrong)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_nothing_judged_is_no_pass(tmp_path: Path) -> None:
    result = {"schema": "penguin-bench/1", "machine": {}, "rows": [{"test": "pp8", "samples_ms": [1.0, 1.0]}]}
    (tmp_path / "a.json").write_text(json.dumps(result))
    done = cli("compare", tmp_path / "a.json", tmp_path / "a.json", "--fail-above", "5%", "--json")
    assert done.returncode == 1 and "nothing could be judged" in done.stderr and "--repeat 3" in done.stderr
    assert "not judged: too few samples (2 and 2, wanted 3)" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["not_judged"] == ["pp8"]
    assert cli("compare", tmp_path / "a.json", tmp_path / "a.json").returncode == 0
    # One that can be judged is enough, and a clip's samples count.
    result["video"] = {"samples": {"cold_ms": [5.0, 5.1, 5.2]}}
    (tmp_path / "b.json").write_text(json.dumps(result))
    done = cli("compare", tmp_path / "b.json", tmp_path / "b.json", "--fail-above", "5%", "--json")
    assert done.returncode == 0, done.stderr
    judged = json.loads(done.stdout.splitlines()[-1])
    assert judged["metrics"]["video cold_ms"]["verdict"] == "same" and judged["not_judged"] == ["pp8"]


def test_when_frames_were_given_up_is_told() -> None:
    timeline = Timeline()
    with Live(Stream(CountingEngine(), tiny_tokenizer()), fps=1.0, observer=timeline) as live:
        for i in range(4):
            live.push(picture(0), i / 2)
        live.wait()
        with pytest.raises(PenguinError):
            live.push(np.zeros((3, 3), np.uint8), 9.0)
            live.wait()
    assert live.stats.dropped == {"rate": 2, "error": 1}
    assert [why for _, why in timeline.dropped] == ["rate", "rate", "error"]
    assert timeline.age_ms == list(live.stats.age_ms) and len(timeline.frames) == 2
    times = [at for at, _ in timeline.dropped]
    assert times == sorted(times) and times[0] >= 0


def test_a_stream_is_measured(tmp_path: Path) -> None:
    done = cli(
        "bench", "tiny", "--stream", CLIP, "--fps", 2, "--duration", 7, "--budget", 120, "--target-first-token", 60000,
        "--slow-down", "2@3", "--threads", 1, "--max-seq-len", 1024, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["frames_in"] == result["frames_processed"] + result["frames_dropped"] and result["frames_in"] >= 12
    assert 0 < result["max_live_visual_tokens"] <= result["budget"] == 120 >= result["budget_at_end"]
    assert result["memory_slope_mb_per_h"] is None and result["live_kv_tokens"] > 0
    asked, ready = (len(result["samples"][name]) for name in ("warm_ms", "frame_age_ms"))
    assert result["deadlines"] == asked + ready and asked >= 2 and result["deadline_misses"] == 0
    for values in (result["frame_age_ms"], *result["first_token_ms"].values()):
        assert 0 < values["p50"] <= values["p95"] <= values["p99"]
    assert len(result["samples"]["cold_ms"]) == 3
    told = result["timeline"]
    assert [one["age_ms"] for one in told["frames"]] == result["samples"]["frame_age_ms"]
    assert [one["first_token_ms"] for one in told["questions"]] == result["samples"]["warm_ms"]
    assert all(0 < one["visual_tokens"] <= one["budget"] <= 120 and one["kv_tokens"] > 0 for one in told["frames"])
    assert max(one["visual_tokens"] for one in told["frames"]) == result["max_live_visual_tokens"]
    for times in ([one["time"] for one in told["frames"]], [at for at, _ in told["memory_mb"]]):
        assert times == sorted(times) and 0 <= times[0] <= times[-1] <= result["seconds"]
    assert len(told["memory_mb"]) == result["frames_in"]
    assert Counter(one["reason"] for one in told["dropped"]) == result["dropped"]
    assert result["fps_in"] == pytest.approx(result["frames_in"] / result["seconds"])
    assert result["fps_processed"] == pytest.approx(result["frames_processed"] / result["seconds"])
    assert result["deadline_miss_percent"] == 0 and result["options"]["slow_down"] == {"factor": 2, "after_s": 3}
    for arguments, word in (
        (("--slow-down", "2@3"), "--stream CLIP"),
        (("--stream", CLIP, "--slow-down", "fast"), "FACTOR@SECOND"),
        (("--stream", "rtsp://x/y"), "live source"),
        (("--stream", CLIP, "--target-frame", 5), "--target-first-token"),
        (("--stream", CLIP, "--target-first-token", 0.001, "--threads", 1, "--duration", 3), "cannot be kept here"),
        (("--stream", tmp_path / "gone.mp4", "--threads", 1), "no such file"),
        (("--video", tmp_path / "gone.mp4"), "no such file"),
        (("--video", CLIP, "--stream", CLIP), "one at a time"),
        (("--html", tmp_path / "gone" / "r.html"), "its folder is not there"),
        (("--csv", tmp_path), "a folder, wanted a file"),
        (("-o", tmp_path), "a folder, wanted a file"),
    ):
        done = cli("bench", "tiny", *arguments)
        assert "tg" not in done.stdout
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr, done.stderr
