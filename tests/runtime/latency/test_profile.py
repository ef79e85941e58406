"""The cost model: never falling, right where costs are what it says, and kept beside the bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from helpers import CountingEngine, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.bundle.contract import Bounds
from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands import cli, latency
from penguin_edge.commands import profile as command
from penguin_edge.config import PRESETS
from penguin_edge.errors import BundleError, InputError
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.cache import Cache, Caches
from penguin_edge.runtime.latency.calls import Timer
from penguin_edge.runtime.latency.cost import AXES, CostModel, errors, fit
from penguin_edge.runtime.latency.operations import Operations
from penguin_edge.runtime.latency.profile import (
    PROFILE,
    SCHEMA,
    SECONDS,
    ProfileOptions,
    ProfileStopped,
    Progress,
    differences,
    load,
    profile,
    waking,
)

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


class Ticking:
    """A clock that simulated calls move, and the simulated machine's moods."""

    def __init__(self, slow: tuple[float, float] = (0.0, 0.0), noise: float = 0.0) -> None:
        self.seconds, self.slept, self.slow, self.noise = 0.0, 0.0, slow, noise
        self.random = np.random.default_rng(0)
        self.clock = Timer(now=lambda: self.seconds, sleep=self.sleep, worked=lambda: self.seconds)

    def sleep(self, seconds: float) -> None:
        self.slept = seconds
        self.seconds += seconds

    def passes(self, ms: float) -> None:
        """Time of a call that takes so many milliseconds when nothing disturbs."""
        slower = 4.0 if self.slow[0] <= self.seconds < self.slow[1] else 1.0
        self.seconds += 1e-3 * ms * slower * (1 + self.noise * abs(float(self.random.standard_normal())))


LINES = {
    "encode": (3.0, (20.0, 30.0)),
    "project": (0.5, (20.0, 0.0)),
    "prefill": (150.0, (25.0, 40.0)),
    "decode": (180.0, (60.0, 0.0)),
    "move": (5.0, (50.0, 0.0)),
}
"""Milliseconds per call, and for 10^9 of each amount: about the 2B shape in int4 on two cores."""
LOADING_MS = 2000.0


class Simulated:
    """An engine whose calls take what `LINES` say, and compute nothing."""

    name, can_move, can_place, moves_exactly, capacity = "simulated", True, True, True, None

    def __init__(self, time: Ticking, share: float = 1.0, *, stop_at: int | None = None, wake: float = 0.0) -> None:
        """
        Args:
            share: of the milliseconds of `LINES`.
            stop_at: the call that Ctrl-C falls into.
            wake: milliseconds more of an encoder's call after a pause.
        """
        self.config = PRESETS["2b"]
        self.bounds = Bounds(max_seq_len=4096, max_chunk=256)
        self.operations = Operations(self.config)
        self.time, self.share, self.stop_at, self.wake = time, share, stop_at, wake
        self.calls: list[tuple[str, tuple[float, ...]]] = []
        self._decodes = False
        self._caches = Caches(None, object)

    def truth(self, stage: str, *point: float) -> float:
        constant, slopes = LINES[stage]
        return self.share * (constant + float(np.dot(slopes, self.operations.amounts(stage, point))))

    def _call(self, stage: str, *point: float) -> None:
        loading = LOADING_MS * (stage not in {called for called, _ in self.calls})
        self.calls.append((stage, point))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.time.passes(self.truth(stage, *point) + loading)

    def new_cache(self) -> Cache:
        return self._caches.new()

    def embed(self, ids: Any) -> Any:
        self._decodes = len(ids) == 1
        return np.zeros((len(ids), 1), np.float32)

    def encode(self, pixels: Any, rows: Any, cols: Any) -> None:
        if self.time.slept >= 0.1:
            self.time.passes(self.wake)
        self.time.slept = 0.0
        self._call("encode", pixels.shape[1], len(pixels))

    def project(self, features: Any) -> None:
        self._call("project", features.shape[1])

    def forward(self, cache: Cache, embeds: Any, logits_at: Any, keys: Any = (), positions: Any = None) -> None:
        with cache.writing(len(embeds), keys):
            if self._decodes:
                self._call("decode", cache.length)
            else:
                self._call("prefill", len(embeds), cache.length)
        self._decodes = False

    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        with cache.moving(begin, end, to):
            self._call("move", end - begin)


USUAL = {"encode": (540, 1), "project": (135,), "prefill": (150, 300), "decode": (400,), "move": (900,)}


def simulated(engine: Simulated, options: ProfileOptions | None = None) -> tuple[CostModel, dict[str, Any]]:
    result = profile(cast(Engine, engine), options, progress=lambda at: None, clock=engine.time.clock)
    return CostModel.from_json(json.loads(json.dumps(result["cost"]))), result


def off(model: CostModel, engine: Simulated, places: dict[str, tuple[int, ...]] = USUAL) -> dict[str, float]:
    """Relative error of predictions."""
    return {stage: abs(model.stage_ms(stage, *at) / engine.truth(stage, *at) - 1) for stage, at in places.items()}


def test_operations_are_those_of_the_model() -> None:
    model, counted = tiny_model(), Operations(PRESETS["tiny"])

    def products(part: Any) -> int:
        return sum(p.numel() for name, p in part.named_parameters() if p.ndim > 1 and "embed_tokens" not in name)

    assert 1e9 * counted.amounts("prefill", (1.0, 0.0))[0] == pytest.approx(products(model.decoder.layers))
    assert 1e9 * counted.amounts("encode", (1.0, 1.0))[0] == pytest.approx(products(model.encoder))
    assert 1e9 * counted.amounts("project", (1.0,))[0] == pytest.approx(products(model.projector))
    # 3 layers, 4 heads of 32 numbers, a product for the score and one for the value, 7 rows that see 107 positions.
    assert 1e9 * counted.amounts("prefill", (7.0, 100.0))[1] == pytest.approx(2 * 3 * 4 * 32 * 7 * 107)
    with pytest.raises(ValueError, match="no size"):
        counted.amounts("wake", (0.0,))


def test_a_large_model_is_through_in_time_and_what_was_left_out_is_foreseen() -> None:
    engine = Simulated(Ticking())
    model, result = simulated(engine)
    assert result["seconds"] == pytest.approx(engine.time.seconds) and SECONDS / 2 < result["seconds"] < SECONDS + 0.1
    counts = {stage: np.array(rows) for stage, rows in result["measured"].items()}
    assert all(rows.any() for rows in counts.values()) and not counts["encode"].all() and not counts["prefill"].all()
    assert max(off(model, engine).values()) < 0.05
    # Points that nothing was measured of are on the line: neither 1,024 patches nor 256 positions fit.
    assert counts["encode"][-1, 0] == counts["prefill"][-1, -1] == 0
    assert max(off(model, engine, {"encode": (1024, 1), "prefill": (256, 3456)}).values()) < 0.02
    for stage, (constant, slopes) in LINES.items():
        found = result["lines"][stage]
        assert found["constant_ms"] == pytest.approx(constant, rel=0.02)
        assert found["ms_per_giga"] == pytest.approx(slopes, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_noise_a_slow_second_and_slow_first_calls_move_nothing_far(seed: int) -> None:
    engine = Simulated(Ticking(slow=(12.0 + seed, 13.0 + seed), noise=0.03))
    engine.time.random = np.random.default_rng(seed)
    model, _ = simulated(engine)
    assert max(off(model, engine).values()) < 0.1


def test_a_stream_begins_after_a_handful_of_calls() -> None:
    engine = Simulated(Ticking())
    model, result = simulated(engine, ProfileOptions(seconds=latency.AT_ONCE_S, tried=False))
    loading = 1e-3 * LOADING_MS * len({stage for stage, _ in engine.calls})
    assert result["seconds"] - loading < 2 * latency.AT_ONCE_S and result["error"]["median"] is None
    assert max(off(model, engine).values()) < 0.25


def test_ctrl_c_leaves_a_model_as_soon_as_there_is_one() -> None:
    whole = Simulated(Ticking())
    simulated(whole)
    last = len(whole.calls)
    for at in (1, 4):
        with pytest.raises(KeyboardInterrupt) as nothing:
            simulated(Simulated(Ticking(), stop_at=at))
        assert not isinstance(nothing.value, ProfileStopped)
    for at in (last // 2, last - 1):
        engine = Simulated(Ticking(), stop_at=at)
        with pytest.raises(ProfileStopped) as stop:
            simulated(engine)
        model = CostModel.from_json(stop.value.result["cost"])
        assert stop.value.result["stopped"] and max(off(model, engine).values()) < 0.25


def test_ctrl_c_before_a_stream_stops_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured for the stream alone is no reason to begin it."""
    whole = Simulated(Ticking())
    simulated(whole, ProfileOptions(seconds=latency.AT_ONCE_S, tried=False))
    engine = Simulated(Ticking(), stop_at=len(whole.calls) - 1)
    monkeypatch.setattr(latency, "profile", partial(profile, clock=engine.time.clock))
    with pytest.raises(KeyboardInterrupt):
        latency.cost(str(tmp_path), cast(Engine, engine), None)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"axes": [[-5, 0], [0]], "ms": [[1], [1]]}, "an axis of -5"),
        ({"axes": [["nan", 1], [0]], "ms": [[1], [1]]}, "an axis of 'nan'"),
        ({"axes": [[0, True], [0]], "ms": [[1], [1]]}, "an axis of True"),
        ({"axes": [[0, 1], [0]], "ms": [[-1.0], [1]]}, "a time of -1.0"),
        ({"axes": [[0, 1], [0]], "ms": [[1], [1.7e308]]}, "a time of 1.7e"),
        ({"axes": [[0, 1], [0]], "ms": [[1]]}, "1 rows for axes of 2 and 1 points"),
        ({"axes": [[0, 1], [0]], "ms": [[1], [1, 2]]}, "2 rows for axes of 2 and 1 points"),
        ({"axes": [[0, 1], [0]], "ms": [[2], [1]]}, "a table that falls"),
    ],
)
def test_a_cost_model_is_checked(table: dict[str, Any], words: str) -> None:
    good = simulated(Simulated(Ticking()), ProfileOptions(repeat=1))[0].to_json()
    assert CostModel.from_json(good).to_json() == good
    with pytest.raises(BundleError, match=words):
        CostModel.from_json(good | {"decode": table})


def test_what_waking_takes_is_measured_in_pairs() -> None:
    model, result = simulated(Simulated(Ticking(), share=0.05, wake=3.0), ProfileOptions(repeat=10))
    assert len(result["woken_ms"]) == 10 and model.wake_ms == pytest.approx(3, abs=0.01)
    # It is not worth the time for a frame that takes long.
    model, result = simulated(Simulated(Ticking(), wake=3.0), ProfileOptions(repeat=1))
    assert not result["woken_ms"] and model.wake_ms == 0
    assert waking([3.0] * 7) == 0.0 and waking([3.0] * 8) == 3.0
    assert waking([-1.0, 9.0] * 10) == 0.0 and waking([-1.0] + [3.0] * 9) == 3.0


def test_rounds_are_told_with_what_is_left() -> None:
    engine, told = Simulated(Ticking()), list[Progress]()
    profile(cast(Engine, engine), ProfileOptions(repeat=2), progress=told.append, clock=engine.time.clock)
    assert {at.round for at in told} == {1, 2} and all(0 <= at.done < at.total for at in told)
    ends = engine.time.seconds
    last = told[-1]
    assert 0 < last.left_s < told[len(told) // 2].left_s < ends
    for wrong in (
        {"repeat": 0},
        {"repeat": 1.5},
        {"repeat": "2"},
        {"seconds": -1.0},
        {"seconds": "5"},
        {"seconds": inf},
    ):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}.* wanted"):
            ProfileOptions(**cast(Any, wrong))


def test_all_stages_are_measured() -> None:
    engine = CountingEngine(max_seq_len=512)
    result = profile(engine, ProfileOptions(repeat=2), progress=lambda at: None)
    assert result["cost"].keys() == AXES.keys() == result["error_by_stage"].keys() | {"wake"}
    fitted, tried = (
        {stage: {tuple(p): v for p, v, _ in points} for stage, points in result["samples"][name].items()}
        for name in ("fitted", "tried")
    )
    for stage, points in fitted.items():
        assert all(len(samples) == 2 for samples in points.values())
        # No size that was fitted is tried.
        assert tried[stage] and not points.keys() & tried[stage].keys()


def test_a_cache_that_cannot_be_moved_is_filled() -> None:
    engine = CountingEngine(max_seq_len=300)
    engine.can_move = False
    result = profile(engine, ProfileOptions(repeat=1), progress=lambda at: None)
    assert "move" not in result["cost"] and len(result["cost"]["decode"]["axes"][0]) > 1
    CostModel.from_json(result["cost"])


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
        json.dumps({**result, "schema": "penguin-profile/3"}),
        json.dumps({**result, "cost": {"encode": [1]}}),
        json.dumps({**result, "cost": {"decode": {"axes": [[0, 9], [0]], "ms": [[2], [1]]}}}),
        json.dumps({**result, "cost": {"decode": {"axes": [[0, 9], [0]], "ms": [[2]]}}}),
    ):
        (folder / PROFILE).write_text(damage)
        with pytest.raises(BundleError, match="profile"):
            load(bundle)


@pytest.mark.parametrize(("frames", "kept"), [(0, False), (60, True)])
def test_a_profile_that_was_stopped_is_kept(
    frames: int,
    kept: bool,
    nano_bundle: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(nano_bundle("onnx", "int8"), tmp_path / "nano"))
    engine = CountingEngine(max_seq_len=256)
    encode = engine.encode

    def stopped(pixels: Any, rows: Any, cols: Any) -> Any:
        if engine.encoded_frames > frames:
            raise KeyboardInterrupt
        return encode(pixels, rows, cols)

    monkeypatch.setattr(engine, "encode", stopped)
    monkeypatch.setattr(command, "open_engine", lambda bundle, threads: engine)
    assert cli.main(["profile", str(folder)]) == 130
    said = capsys.readouterr().err
    assert "stopped" in said and ("is kept in" in said) == kept == (folder / PROFILE).exists()
    found = load(Bundle.read(folder))
    assert (found is not None) == kept
