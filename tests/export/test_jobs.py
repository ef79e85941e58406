"""Jobs of export workers and their outcomes: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from penguin_edge.bundle.contract import Bounds
from penguin_edge.bundle.manifest import TablePlace
from penguin_edge.errors import BundleError, PenguinError
from penguin_edge.export import worker
from penguin_edge.export.jobs import (
    CalibrationDone,
    CalibrationJob,
    ChoiceDone,
    ChoiceJob,
    Origin,
    Outcome,
    PartDone,
    PartJob,
    read_job,
    read_outcome,
    write_job,
)
from penguin_edge.files import write_json
from penguin_edge.quantize.apply import LayerRow
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.recipe import PRESETS, Recipe
from penguin_edge.quantize.search.choice import AutoOptions

ODD = Path(os.fsdecode(b"/data/\xff of a user"))
"""A name that is no UTF-8."""
ORIGIN = Origin(str(ODD), -1, False, "onnx")
MIXED = Recipe("mixed", encoder=Scheme(8), smooth={"encoder": 0.5}, layers={"decoder.layers.*": None})
PART = PartJob(ORIGIN, "prefill", MIXED, None, "int4", Bounds(128, patch_buckets=(64, 4096)), ODD)
JOBS = [
    ChoiceJob(ORIGIN, AutoOptions(CalibrationOptions("builtin"), max_kl=0.5), ODD / "kept.json", 10**30),
    ChoiceJob(ORIGIN, AutoOptions(CalibrationOptions(str(ODD), 1, 2, 2**64, True), max_size=10**9), ODD),
    CalibrationJob(ORIGIN, PRESETS["int4"], CalibrationOptions("builtin"), ODD, None),
    PART,
    PartJob(ORIGIN, "embedding", PRESETS["fp16"], ODD, "bf16", Bounds(min_chunk=2), ODD),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_job_is_read_as_it_was_written(job: Any, tmp_path: Path) -> None:
    write_job(tmp_path / "job.json", job)
    assert read_job(tmp_path / "job.json") == job


@pytest.mark.parametrize(
    ("job", "done"),
    [
        (JOBS[0], ChoiceDone(MIXED, {"bytes": 7, "layers": [{"layer": "a"}]})),
        (JOBS[2], CalibrationDone({"samples": 3, "sha256": "0"})),
        (
            PART,
            PartDone(
                "decoder.onnx", TablePlace("decoder.onnx.data", 0, 64, 32), (LayerRow("a", (2, 3), Scheme(4, 64)),)
            ),
        ),
        (PART, PartDone("embedding.bin", None, (LayerRow("a", (2, 3), None, "kept", 0.25),))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_outcome_is_read_as_it_was_written(job: Any, done: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "outcome.json", {"done": done.to_json(), "seconds": 1.5, "peak_mb": 9.0, "baseline_mb": 4.0})
    assert read_outcome(tmp_path / "outcome.json", job) == Outcome(done, 1.5, 9.0, 4.0)


def test_an_error_that_is_no_number_stays_one(tmp_path: Path) -> None:
    done = PartDone("a.onnx", None, (LayerRow("a", (2, 3), None, "", math.nan),))
    write_json(tmp_path / "outcome.json", {"done": done.to_json(), "seconds": 0, "peak_mb": 0, "baseline_mb": 0})
    assert math.isnan(read_outcome(tmp_path / "outcome.json", PART).done.layers[0].error)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("part", "head", 'part.part is "head", wanted one of encoder'),
        ("bounds.max_seq_len", 0, "part.bounds.max_seq_len is 0, wanted a whole number"),
        ("bounds.patch_buckets", [], "part.bounds.patch_buckets"),
        ("origin.random_weights", 1, "part.origin.random_weights is 1, wanted true or false"),
        ("embedding_dtype", "int2", "wanted one of fp32, fp16"),
        ("folder", None, "part.folder is null, wanted a string"),
        ("more", 1, "unknown field 'more'"),
        ("recipe.precision", "int2", "precision 'int2', wanted fp32 or fp16"),
    ],
)
def test_a_job_against_its_rule_is_refused(path: str, value: object, said: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(PART.to_json()))
    *above, last = path.split(".")
    place = data
    for name in above:
        place = place[name]
    place[last] = value
    (tmp_path / "job.json").write_text(json.dumps({"part": data}))
    with pytest.raises(PenguinError, match=said.replace(".", r"\.")):
        read_job(tmp_path / "job.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verify": {}}', '{"part": {}, "auto": {}}', "[" * 100_000])
def test_what_is_no_job_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(PenguinError, match=r"job\.json: (cannot be read as a job|wanted an object with one job)"):
        read_job(tmp_path / "job.json")
    # A worker says so where its parent looks.
    assert worker.main(str(tmp_path / "job.json"), str(tmp_path / "outcome.json")) == 1
    with pytest.raises(BundleError, match="job"):
        read_outcome(tmp_path / "outcome.json", PART)


def test_an_outcome_against_its_rule_is_refused(tmp_path: Path) -> None:
    good = {"done": asdict(PartDone("a.onnx")), "seconds": 0, "peak_mb": 0, "baseline_mb": 0}
    for bad in ([], {}, good | {"seconds": -1}, good | {"done": {**asdict(PartDone("../a.onnx"))}}, good | {"more": 1}):
        write_json(tmp_path / "outcome.json", bad)  # type: ignore[arg-type]
        with pytest.raises(PenguinError, match=r"prefill|the whole"):
            read_outcome(tmp_path / "outcome.json", PART)


def test_a_worker_says_what_is_wrong_with_its_job(tmp_path: Path) -> None:
    write_job(
        tmp_path / "job.json", PartJob(Origin("tiny", 0, True, "x"), "decoder", MIXED, None, "fp32", Bounds(), ODD)
    )
    assert worker.main(str(tmp_path / "job.json"), str(tmp_path / "outcome.json")) == 1
    with pytest.raises(BundleError, match="unknown target 'x'"):
        read_outcome(tmp_path / "outcome.json", PART)
