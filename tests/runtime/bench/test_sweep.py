"""A sweep of fixed settings beside the latency controller."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.reports.bench import html_text
from penguin_edge.reports.kept_tokens import best_fixed
from penguin_edge.runtime.bench.sweep import SETTLED_S, Settled, grid
from penguin_edge.runtime.latency.control import LatencyTarget

CLIP = Path(__file__).parents[2] / "media" / "polar_bear.mp4"


@given(native=st.integers(1, 2000), floor=st.integers(1, 60), budget=st.integers(1, 20_000))
def test_fixed_settings_of_anything(native: int, floor: int, budget: int) -> None:
    found = grid(native, floor, budget, ("recompute", "rebase"))
    assert (found[0].budget, found[0].frame_tokens) == (budget, min(native, budget))
    assert len(set(found)) == len(found) <= 18
    assert all(1 <= one.frame_tokens <= one.budget <= budget for one in found)


def told(late: bool) -> dict:
    """What a run says: the first seconds are bad and do not count."""
    after = 30.0 if late else 10.0
    return {
        "timeline": {
            "frames": [
                {"time": t, "age_ms": 999.0 if t < SETTLED_S else after, "visual_tokens": 7 if t < SETTLED_S else 100}
                for t in np.arange(0, 20, 0.5)
            ],
            "questions": [{"time": t, "first_token_ms": 999.0 if t < SETTLED_S else 4.0} for t in range(0, 20, 2)],
            "dropped": [{"time": 1.0, "reason": "queue"}, {"time": 8.0, "reason": "rate"}],
        }
    }


def test_the_first_seconds_and_frames_left_out_on_purpose_do_not_count() -> None:
    good, slow = Settled.of(told(False)), Settled.of(told(True))
    assert good.visual_tokens == 100 and good.lost == 0 and len(good.first_ms) == 7
    assert good.missed(LatencyTarget(20.0, 20.0)) == 0
    assert slow.missed(LatencyTarget(20.0, 20.0)) == pytest.approx(30 / 37)
    assert slow.missed(LatencyTarget(20.0)) == 0 and slow.missed(LatencyTarget(3.0)) == 1
    assert Settled((), (), 0, ()).missed(LatencyTarget(3.0)) is None and Settled((), (), 0, ()).visual_tokens is None
    lost = Settled((4.0,), (10.0,), 2, (50,))
    assert lost.missed(LatencyTarget(20.0, 20.0)) == 0.5 and lost.missed(LatencyTarget(20.0)) == 0


def test_the_best_fixed_setting_follows_from_its_samples() -> None:
    samples = [
        {"first_ms": [5.0] * 50, "age_ms": [40.0] * 100, "lost": 0, "tokens": [300] * 100},
        {"first_ms": [4.0] * 50, "age_ms": [20.0] * 100, "lost": 0, "tokens": [150] * 100},
        {"first_ms": [1.0] * 50, "age_ms": [2.0] * 100, "lost": 30, "tokens": [500] * 100},
    ]
    assert [best_fixed(samples, 50, limit) for limit in (50, 30, 10)] == [300, 150, None]
    assert best_fixed(samples, 50, None) == 500 and best_fixed(samples, 0.5, None) is None


def test_a_sweep_from_the_command_line(nano_bundle: Callable[[str, str], Path], tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    command = [sys.executable, "-m", "penguin_edge", "bench", str(nano_bundle("onnx", "fp32")), "--stream", str(CLIP)]
    command += ["--fps", "4", "--duration", "10", "--budget", "40", "--cache", "rebase", "--threads", "1"]
    command += ["--sweep", "--target-first-token", "5000", "--json", "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    wanted = "budget frame_tokens stride cache miss_percent visual_tokens first_token_ms frame_age_ms"
    assert all(list(one) == wanted.split() for one in result["sweep"])
    first = result["sweep"][0]
    assert first["budget"] == first["frame_tokens"] == 40 and first["cache"] == "rebase"
    assert first["miss_percent"] == 0 and 0 < first["visual_tokens"] <= 40 and first["first_token_ms"]["p50"] > 0
    (held,) = result["held"]
    assert held["target"]["first_token_ms"] == 5000 and held["miss_percent"] == 0
    assert result["sweep"][held["best_fixed"]]["visual_tokens"] == max(one["visual_tokens"] for one in result["sweep"])
    assert len(result["sweep_samples"]) == len(result["sweep"]) + 1
    assert "Tokens kept" in page.read_text() and page.read_text() == html_text(result)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sweep"], "--sweep is for --stream CLIP"),
        (["--sweep", "--stream", str(CLIP), "--duration", "5"], "each run has to last 10 s or more"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(flags: list[str], words: str) -> None:
    command = [sys.executable, "-m", "penguin_edge", "bench", "nano", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
