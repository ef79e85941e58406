"""`bench` and `compare`: what is measured is what was asked for, and a change is told from noise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLIP, CountingEngine, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.errors import BudgetError, InputError
from penguin_edge.generate import EagerEngine
from penguin_edge.runtime.bench import BenchOptions, bench_model, percentiles
from penguin_edge.runtime.bench_stream import Brake, SlowedClock, SlowedEngine, _deadlines, slope
from penguin_edge.runtime.compare import change, compare, read
from penguin_edge.runtime.control import LatencyTarget


def cli(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_every_stage_is_measured_as_often_as_asked() -> None:
    engine = CountingEngine(EagerEngine(tiny_model(), max_seq_len=300))
    told: list[str] = []
    rows = bench_model(engine, BenchOptions((8, 200), 3, (0, 100), repeat=2, warmup=1), told.append)
    found = {row.test: row for row in rows}
    assert {"encode 64", "project 64", "pp 8", "pp 200", "tg 3", "tg 3 @ d100"} <= set(found)
    assert all(len(row.samples_ms) == (6 if name.startswith("tg") else 2) for name, row in found.items())
    assert all(sample > 0 for row in rows for sample in row.samples_ms)
    # Three rounds: prompts, and steps behind a cache that was filled for them.
    assert engine.forwarded_tokens == 3 * (8 + 200 + 3 + 100 + 3) and engine.kv_len == 0
    data = found["pp 200"].to_json()
    assert data["per_s"] == pytest.approx(200e3 / float(np.median(data["samples_ms"])), rel=1e-3)
    with pytest.raises(BudgetError, match="max_seq_len is 300"):
        bench_model(engine, BenchOptions((301,)), told.append)
    with pytest.raises(InputError, match="at least 1"):
        BenchOptions((0,))


def test_an_engine_is_slowed_from_its_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []
    monkeypatch.setattr("penguin_edge.runtime.bench_stream.time.monotonic", lambda: now[0])
    monkeypatch.setattr("penguin_edge.runtime.bench_stream.time.sleep", slept.append)

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
    assert _deadlines(None, [1.0], [1.0]) == (0, 0)
    assert _deadlines(LatencyTarget(10.0), [9.0, 11.0], [99.0]) == (2, 1)
    assert _deadlines(LatencyTarget(10.0, 5.0), [9.0, 11.0], [4.0, 6.0, 7.0]) == (5, 3)


def test_memory_is_extrapolated_after_ten_minutes_alone() -> None:
    assert slope([]) is None and slope([(0.0, 5.0), (599.0, 6.0)]) is None
    # Growth while it warms up does not count.
    rising = [(float(t), 100 + min(t, 600) + (t - 600) * 3 / 3600) for t in range(0, 1201, 10)]
    assert slope(rising) == pytest.approx(3.0, rel=0.05)


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=30), st.floats(1.2, 5))
def test_a_change_is_told_from_noise(samples: list[float], factor: float) -> None:
    assert change(samples, samples, 0.0)["verdict"] == "same"
    steady = [10.0 + i % 3 / 100 for i in range(12)]
    slower = [value * factor for value in steady]
    assert change(steady, slower, 0.05)["verdict"] == "worse" and change(slower, steady, 0.05)["verdict"] == "better"
    assert change(steady, slower, factor)["verdict"] == "same"
    assert change(steady[:2], slower, 0.0)["verdict"] == "too few samples"


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
    assert done.returncode == 1 and "different machines" in done.stderr and "pp 16" in done.stderr
    assert "pp 16" in json.loads(done.stdout.splitlines()[-1])["worse"]
    assert cli("compare", tmp_path / "b.json", tmp_path / "a.json", "--fail-above", "5%").returncode == 0
    assert cli("compare", tmp_path / "a.json", tmp_path / "b.json").returncode == 0
    with pytest.raises(InputError, match="no test in common"):
        compare(result, {**result, "rows": []})
    (tmp_path / "c.json").write_text("{}")
    for wrong, word in ((tmp_path / "c.json", "schema"), (tmp_path / "gone.json", "cannot be read"), (CLIP, "JSON")):
        done = cli("compare", tmp_path / "a.json", wrong)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr, done.stderr


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
    assert all(one["reason"] for one in result["decisions"])
    for values in (result["frame_age_ms"], *result["first_token_ms"].values()):
        assert 0 < values["p50"] <= values["p95"] <= values["p99"]
    assert len(result["samples"]["cold_ms"]) == 3
    for arguments, word in (
        (("--slow-down", "2@3"), "--stream CLIP"),
        (("--stream", CLIP, "--slow-down", "fast"), "FACTOR@SECOND"),
        (("--stream", "rtsp://x/y"), "live source"),
        (("--stream", CLIP, "--target-frame", 5), "--target-first-token"),
        (("--stream", CLIP, "--target-first-token", 0.001, "--threads", 1, "--duration", 3), "cannot be kept here"),
        (("--stream", tmp_path / "gone.mp4", "--threads", 1), "no such file"),
    ):
        done = cli("bench", "tiny", *arguments)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr, done.stderr
