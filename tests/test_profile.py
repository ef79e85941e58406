"""The cost model: never falling, right where costs are what it says, and kept beside the bundle."""

from __future__ import annotations

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

from penguin_edge.bundle import Bounds, Bundle
from penguin_edge.errors import BundleError
from penguin_edge.runtime.cost import TERMS, CostModel, errors, fit
from penguin_edge.runtime.profile import PROFILE, load, profile

COEFFICIENTS = st.floats(0, 10).map(lambda x: x if x > 1e-3 else 0.0)


@given(st.lists(COEFFICIENTS, min_size=3, max_size=3).filter(any), st.integers(0, 1000))
def test_costs_of_the_models_form_are_found(wanted: list[float], seed: int) -> None:
    points = [(float(n), float(past)) for n in (1, 8, 64, 256) for past in (0, 512, 3000)]
    truth = {point: float(np.dot(TERMS["prefill"](point), wanted)) or 1e-6 for point in points}
    noise = np.random.default_rng(seed).uniform(0.98, 1.02, (len(points), 5))
    samples = {"prefill": {p: [truth[p] * f for f in row] for p, row in zip(points, noise, strict=True)}}
    model = fit(samples)
    if all(np.dot(TERMS["prefill"](point), wanted) for point in points):
        assert max(errors(model, samples)["prefill"]) < 0.05
    assert model.prefill_ms(300, 10, Bounds(max_seq_len=4096, max_chunk=256)) == pytest.approx(
        model.stage_ms("prefill", 256, 10) + model.stage_ms("prefill", 44, 266)
    )


@given(st.lists(st.floats(1e-3, 1e4), min_size=6, max_size=6))
def test_no_stage_gets_faster_when_it_has_more_to_do(measured: list[float]) -> None:
    sides = (16.0, 64.0, 144.0, 256.0, 576.0, 1024.0)
    model = fit({"encode": {(p,): [ms] for p, ms in zip(sides, measured, strict=True)}})
    costs = [model.stage_ms("encode", p) for p in sides]
    assert costs == sorted(costs) and costs[0] >= 0
    assert CostModel.from_json(json.loads(json.dumps(model.to_json()))).to_json() == model.to_json()


def test_all_stages_are_measured() -> None:
    engine = CountingEngine(max_seq_len=512)
    told: list[str] = []
    result = profile(engine, repeat=2, progress=told.append)
    assert result["cost"].keys() == TERMS.keys() == result["error_by_stage"].keys() and engine.kv_len == 0
    fitted, tried = (
        {stage: {tuple(p): v for p, v in points} for stage, points in result["samples"][name].items()}
        for name in ("fitted", "tried")
    )
    for stage, points in fitted.items():
        assert all(len(samples) == 2 for samples in points.values())
        # No size that was fitted is tried.
        assert not points.keys() & tried[stage].keys() and tried[stage]
    assert len(told) == 3


def test_a_profile_is_kept_beside_the_bundle(nano_bundle: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_bundle("onnx", "int8"), tmp_path / "nano"))
    assert load(Bundle.read(folder)) is None
    command = [
        sys.executable,
        "-m",
        "penguin_edge",
        "profile",
        str(folder),
        "--repeat",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {"cost", "error", "machine"} <= result.keys() and result["error"]["median"] >= 0
    bundle = Bundle.read(folder)  # Its own hash does not cover what was measured.
    found = load(bundle)
    assert found is not None and found.to_json() == result["cost"]
    for damage in (
        "{",
        "[]",
        json.dumps({"schema": "penguin-profile/9"}),
        json.dumps({**result, "cost": {"encode": [1]}}),
    ):
        (folder / PROFILE).write_text(damage)
        with pytest.raises(BundleError, match="profile"):
            load(bundle)
