"""The cost model: never falling, right where costs are what it says, and kept beside the bundle."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CountingEngine
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.bundle.contract import Bounds
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BundleError
from penguin_edge.runtime.live.cost import AXES, CostModel, errors, fit
from penguin_edge.runtime.live.profile import PROFILE, SCHEMA, differences, load, profile

COUNTS, PASTS = (1.0, 8.0, 64.0, 256.0), (0.0, 512.0, 3000.0)
MS = st.floats(1e-3, 1e4)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda found: max(found) > 1e-3))
def test_what_grows_along_straight_lines_is_found_between_points_and_beyond(wanted: list[float]) -> None:
    def truth(n: float, past: float) -> float:
        return wanted[0] + wanted[1] * n + wanted[2] * n * past

    model = fit({"prefill": {(n, past): [truth(n, past) or 1e-9] * 3 for n in COUNTS for past in PASTS}})
    for n, past in ((1, 0), (33, 700), (256, 3000), (200, 6000)):
        assert model.stage_ms("prefill", n, past) == pytest.approx(truth(n, past), rel=1e-6, abs=1e-6)
    assert model.stage_ms("prefill", 512, 700) == pytest.approx(2 * truth(256, 700), rel=1e-6, abs=1e-6)
    assert model.prefill_ms(300, 10, Bounds(max_seq_len=4096, max_chunk=256)) == pytest.approx(
        model.stage_ms("prefill", 256, 10) + model.stage_ms("prefill", 44, 266)
    )
    # Below the first point, its value: no stage is free.
    assert model.stage_ms("prefill", 0.5, 0) == pytest.approx(truth(1, 0), abs=1e-6)


@given(
    st.lists(st.lists(MS, min_size=3, max_size=3), min_size=4, max_size=4),
    st.lists(st.tuples(st.floats(0, 600), st.floats(0, 5000)), min_size=2, max_size=2),
)
def test_no_stage_gets_faster_when_it_has_more_to_do(
    measured: list[list[float]], at: list[tuple[float, float]]
) -> None:
    points = {
        (n, past): [ms] for n, row in zip(COUNTS, measured, strict=True) for past, ms in zip(PASTS, row, strict=True)
    }
    model = fit({"prefill": points})
    (n, past), (more, later) = at
    least, most = (min(n, more), min(past, later)), (max(n, more), max(past, later))
    assert 0 < model.stage_ms("prefill", *least) <= model.stage_ms("prefill", *most) * (1 + 1e-9)
    whole = fit({"prefill": points, "decode": {(0.0,): [1.0]}})
    assert CostModel.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    # What is measured never fell: then it is kept as it is.
    rising = {point: [float(np.dot(point, (1, 0.1)) + 1)] for point in points}
    assert errors(fit({"prefill": rising}), {"prefill": rising})["prefill"] == pytest.approx([0] * 12, abs=1e-12)


def test_all_stages_are_measured() -> None:
    engine = CountingEngine(max_seq_len=512)
    told: list[str] = []
    result = profile(engine, repeat=2, progress=told.append)
    assert result["cost"].keys() == AXES.keys() == result["error_by_stage"].keys() | {"wake"}
    fitted, tried = (
        {stage: {tuple(p): v for p, v in points} for stage, points in result["samples"][name].items()}
        for name in ("fitted", "tried")
    )
    for stage, points in fitted.items():
        assert all(len(samples) == 2 for samples in points.values())
        # No size that was fitted is tried.
        assert stage == "wake" or (tried[stage] and not points.keys() & tried[stage].keys())
    assert len(told) == 3


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (8.0, 7)])
def test_short_rounds_are_made_more_often(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each round, that of warming up included, takes one second."""
    monkeypatch.setattr("penguin_edge.runtime.live.profile.LONG_S", seconds)
    monkeypatch.setattr("penguin_edge.runtime.live.profile.time.monotonic", itertools.count().__next__)
    told: list[str] = []
    result = profile(CountingEngine(max_seq_len=256), progress=told.append)
    assert {len(samples) for points in result["samples"]["fitted"].values() for _, samples in points} == {rounds}
    assert len(told) == rounds + 1 and told[-1] == f"round {rounds} of at least 5, {rounds} s of at least {seconds:.0f}"


def test_what_waking_takes_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that this engine moves: 2 ms to encode, and 3 more after a pause."""
    clock, asleep = [0.0], [False]

    def passes(seconds: float) -> float:
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr("penguin_edge.runtime.live.profile.time.perf_counter", lambda: passes(1e-6))
    monkeypatch.setattr("penguin_edge.runtime.live.profile.time.sleep", lambda seconds: asleep.append(True))

    class SleepyEngine(CountingEngine):
        def encode(self, pixels: Any, rows: Any, cols: Any) -> Any:
            passes(0.005 if asleep[-1] else 0.002)
            asleep.append(False)
            return super().encode(pixels, rows, cols)

        def forward(self, cache: Any, embeds: Any, logits_at: Any, keys: Any = ()) -> Any:
            passes(0.001)
            return super().forward(cache, embeds, logits_at, keys)

    cost = CostModel.from_json(profile(SleepyEngine(max_seq_len=256), repeat=3, progress=lambda line: None)["cost"])
    assert cost.wake_ms == pytest.approx(3, abs=0.01) and cost.stage_ms("encode", 100, 1) == pytest.approx(2, abs=0.01)
    assert cost.stage_ms("prefill", 8, 0) == pytest.approx(1, abs=0.01)


def test_a_profile_is_kept_beside_the_bundle(nano_bundle: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_bundle("onnx", "int8"), tmp_path / "nano"))
    assert load(Bundle.read(folder)) is None
    command = [sys.executable, "-m", "penguin_edge", "profile", str(folder)]
    command += ["--repeat", "1", "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {"cost", "error", "machine"} <= result.keys() and result["error"]["median"] >= 0
    bundle = Bundle.read(folder)  # Its own hash does not cover what was measured.
    found = load(bundle)
    assert found is not None and found.to_json() == result["cost"]
    assert differences(bundle, 1) == "" and differences(bundle, None) == "1 threads"
    without = {stage: cost for stage, cost in result["cost"].items() if stage != "project"}
    for damage in (
        json.dumps({"schema": SCHEMA}),
        json.dumps({**result, "cost": without}),
        "{",
        "[]",
        json.dumps({"schema": "penguin-profile/9"}),
        json.dumps({**result, "cost": {"encode": [1]}}),
        json.dumps({**result, "cost": {"decode": {"axes": [[0, 9], [0]], "ms": [[2], [1]]}}}),
        json.dumps({**result, "cost": {"decode": {"axes": [[0, 9], [0]], "ms": [[2]]}}}),
    ):
        (folder / PROFILE).write_text(damage)
        with pytest.raises(BundleError, match="profile"):
            load(bundle)
