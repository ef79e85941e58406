"""The automatic recipe: what layers cost, what is chosen within a limit, and bundles that keep it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import asked_pictures, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.cli import main
from penguin_edge.dataset.samples import Sample
from penguin_edge.errors import InputError, MemoryLimitError
from penguin_edge.evaluation.text import compare_piece
from penguin_edge.export.estimate import bundle_bytes, choose
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.apply import linears, load_quantized, quantize_part
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions, read_calibration
from penguin_edge.quantize.linear import QuantizedLinear, Scheme, quantize_weight
from penguin_edge.quantize.recipe import INT8_ROWS, Recipe
from penguin_edge.quantize.search.choice import (
    AutoOptions,
    Option,
    after,
    candidates,
    smallest,
    steps,
    steps_for,
    tightest,
    totals,
    within_size,
)
from penguin_edge.quantize.search.sensitivity import Measured, SensitivityWalk, parts_read

# --- choosing ---------------------------------------------------------------------------------------------------------

option = st.builds(
    Option, st.none(), st.integers(1, 60), st.floats(0, 1, allow_subnormal=False).map(lambda kl: round(kl, 6))
)
tables = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def least_kl(options: list[list[Option]], budget: int) -> float:
    """Smallest KL among all choices that fit the budget."""
    fitting = [totals(options, c) for c in itertools.product(*(range(len(row)) for row in options))]
    return min(kl for used, kl in fitting if used <= budget)


@settings(max_examples=200, deadline=None)
@given(tables, st.integers(0, 200))
def test_a_choice_keeps_the_size_and_is_near_the_best(options: list[list[Option]], more: int) -> None:
    budget = totals(options, smallest(options))[0] + more
    used, kl = totals(options, within_size(options, budget))
    assert used <= budget
    best, largest = least_kl(options, budget), max((step.saved for step in steps(options)), default=0.0)
    assert best - 1e-9 <= kl <= best + largest + 1e-9
    for other in range(budget, budget + 40, 5):
        assert totals(options, within_size(options, other))[1] <= kl + 1e-9
        kl = totals(options, within_size(options, other))[1]


@settings(max_examples=200, deadline=None)
@given(tables)
def test_steps_save_less_and_less_and_end_at_the_least_kl(options: list[list[Option]]) -> None:
    order = steps(options)
    slopes = [step.saved / step.bytes for step in order]
    assert slopes == sorted(slopes, reverse=True) and all(step.bytes > 0 and step.saved > 0 for step in order)
    kls = [totals(options, after(options, count))[1] for count in range(len(order) + 1)]
    assert all(later <= kl + 1e-9 for kl, later in itertools.pairwise(kls))
    assert math.isclose(kls[-1], sum(min(o.kl for o in row) for row in options), abs_tol=1e-9)
    for wanted in (0.0, 0.3, 1.0, 9.0):
        count = steps_for(options, wanted)
        assert kls[count] <= wanted + 1e-9 or count == len(order)
        assert count == 0 or kls[count - 1] > wanted - 1e-9


@settings(max_examples=100, deadline=None)
@given(tables, st.floats(0.001, 3), st.floats(0.3, 3))
def test_the_measured_kl_decides(options: list[list[Option]], wanted: float, factor: float) -> None:
    """Sums are off by a factor here, as they are where errors of layers meet."""
    asked: list[int] = []

    def measure(chosen: list[int]) -> float:
        asked.append(1)
        return factor * totals(options, chosen)[1]

    chosen, kl = tightest(options, wanted, measure)
    assert kl == factor * totals(options, chosen)[1] and len(asked) <= 8
    best = factor * totals(options, after(options, len(steps(options))))[1]
    assert kl <= wanted or best > wanted
    if best > wanted:
        assert math.isclose(kl, best, rel_tol=1e-6, abs_tol=1e-9)


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="at least 7"):
        within_size([[Option(None, 3, 1.0)], [Option(None, 4, 1.0), Option(None, 9, 0.0)]], 6)


def test_candidates_are_what_the_target_takes() -> None:
    layers = {"encoder.x": (8, 128), "encoder.patch": (8, 588), "decoder.a": (8, 64), "decoder.b": (8, 48)}

    def takes(target: str) -> Any:
        def check(layer: str, scheme: Scheme) -> bool:
            try:
                TARGETS[target].check_scheme(layer, scheme, "fp32")
            except InputError:
                return False
            return True

        return check

    onnx = candidates(layers, takes("onnx"), images=True)
    assert [scheme.label for scheme in onnx["decoder.a"] if scheme] == [
        "int4 group 64 mse", "int4 group 64 asymmetric mse", "int4 group 32 mse", "int8 per row mse",
    ]  # fmt: skip
    assert onnx["encoder.patch"] == (None,) and onnx["encoder.x"][-1] == INT8_ROWS
    assert onnx["decoder.b"] == (Scheme(4, 16), Scheme(8))
    executorch = candidates(layers, takes("executorch"), images=False)
    assert executorch["decoder.a"] == (Scheme(4, 64), Scheme(4, 32), Scheme(8))
    assert executorch["decoder.b"] == (Scheme(8),)
    assert executorch["encoder.x"] == (INT8_ROWS,)


# --- measuring --------------------------------------------------------------------------------------------------------


TEXT = str(Path(__file__).parents[2] / "LICENSE")
"""Says nothing of pictures, as the built-in set would."""


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.open("tiny", note=lambda line: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures with questions, in the training format."""
    return asked_pictures(tmp_path_factory.mktemp("auto"), 2)


@pytest.fixture(scope="module")
def samples(data: Path, tiny: Checkpoint) -> list[Sample]:
    pictures = read_calibration(CalibrationOptions(str(data), samples=2, length=200), tiny)
    return pictures + read_calibration(CalibrationOptions(TEXT, samples=1, length=24), tiny)


def direct_kl(got: PenguinModel, samples: list[Sample]) -> float:
    """By whole forward passes of two models, and the arithmetic of `eval --text`."""
    logits = []
    for model in (got, tiny_model()):
        assert model.decoder is not None
        with torch.no_grad():
            rows = [
                model.decoder.lm_head(model(torch.from_numpy(s.input_ids)[None], model.visual(s.visuals))[0]).numpy()
                for s in samples
            ]
        logits.append(np.concatenate(rows))
    return float(compare_piece(*logits, np.zeros(len(logits[0]), np.int64)).kl.mean())


LAYERS = (
    "encoder.layers.0.self_attn.v_proj",
    "projector.readout.2",
    "decoder.layers.0.mlp.down_proj",
    "decoder.layers.1.self_attn.q_proj",
    "decoder.lm_head",
)


@pytest.mark.parametrize("activations", ["block", "token"])
def test_a_layers_kl_is_that_of_a_model_with_that_layer_quantized(
    activations: Any, tiny: Checkpoint, samples: list[Sample]
) -> None:
    walk = SensitivityWalk(tiny.load(), samples, activations)
    rows = INT8_ROWS if activations == "block" else Scheme(8)
    offered = {layer: [Scheme(4, 32), rows if layer.startswith("encoder") else Scheme(8)] for layer in LAYERS}
    kept: list[Measured] = []
    marks: list[tuple[int, int]] = []
    found = walk.measure(offered, {}, lambda m: kept.append(copy.deepcopy(m)), lambda *at: marks.append(at[:2]))
    assert set(found) == {*LAYERS, "embedding"}
    for layer, schemes in offered.items():
        for scheme in schemes:
            model = copy.deepcopy(tiny_model())
            recipe = Recipe("one", layers={layer: scheme})
            quantize_part(model, layer.partition(".")[0], recipe, activations)
            changed = [name for name, child in model.named_modules() if isinstance(child, QuantizedLinear)]
            assert changed == [layer]
            wanted = direct_kl(model, samples)
            # fp32 sums in another order, and a logit that is rounded to fp32.
            assert found[layer][scheme.label] == pytest.approx(wanted, rel=1e-3, abs=1e-9), (layer, scheme.label)
            assert wanted > 1e-7
    table = tiny.load()
    quantized, _ = load_quantized(tiny, ("embedding",), Recipe("t", embedding="int8"), activations)
    assert table.embedding is not None and quantized.embedding is not None
    table.embedding.weight = quantized.embedding.weight
    if tiny.config.text.tie_word_embeddings:  # the head keeps its own
        assert table.decoder is not None
        table.decoder.lm_head.weight = tiny.load().decoder.lm_head.weight  # type: ignore[union-attr]
    assert found["embedding"]["int8"] == pytest.approx(direct_kl(table, samples), rel=1e-3, abs=1e-9)
    # The model is as it was, work is counted to its end, and what is known is not measured again.
    assert walk.whole({}, lambda stage: None) == found["embedding"]["int8"]
    assert all(done < total for done, total in marks) and marks[-1][0] == marks[-1][1] - 1
    marks.clear()
    assert walk.measure(offered, found, lambda m: None, lambda *at: marks.append(at[:2])) == found and not marks
    part = {layer: row for layer, row in kept[1].items() if layer != "embedding"}
    assert walk.measure(offered, part, lambda m: None, lambda *at: None) == found


def test_the_whole_recipe_is_what_an_export_would_load(tiny: Checkpoint, samples: list[Sample]) -> None:
    layers = {name: Scheme(8) for part in ("encoder", "decoder") for name in linears(tiny_model(), part)}
    layers |= {"decoder.lm_head": Scheme(4, 32), "projector.readout.0": Scheme(4, 32)}
    del layers["encoder.patch_embedding"]
    schemes = {**layers, "encoder.patch_embedding": None}
    model, _ = load_quantized(
        tiny, ("encoder", "projector", "decoder", "embedding"), Recipe("r", embedding="int8", layers=layers), "block"
    )
    walk = SensitivityWalk(tiny.load(), samples, "block")
    assert walk.whole(schemes, lambda stage: None) == pytest.approx(direct_kl(model, samples), rel=1e-3)


def test_bf16_is_measured_in_fp32(tiny: Checkpoint, samples: list[Sample]) -> None:
    """A model that is stored in bf16 is compared with itself in fp32, a block at a time."""
    half = tiny.load(dtype=torch.bfloat16)
    whole = copy.deepcopy(half).float()
    offered = {"decoder.layers.0.mlp.up_proj": [Scheme(4, 32)], "encoder.layers.1.mlp.up_proj": [Scheme(4, 32)]}
    found, wanted = (
        SensitivityWalk(m, samples, "block").measure(offered, {}, lambda m: None, print) for m in (half, whole)
    )
    assert {layer: pytest.approx(row, rel=1e-4) for layer, row in wanted.items()} == found
    assert half.dtype == torch.bfloat16


def test_what_is_not_finite_is_named(tiny: Checkpoint, samples: list[Sample]) -> None:
    model = tiny.load()
    layer = model.get_submodule("decoder.layers.1.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"decoder\.layers\.1: an activation is NaN"):
        SensitivityWalk(model, samples, "block")


# --- sizes, and the job -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 32, symmetric=False), Scheme(8), INT8_ROWS, None])
def test_bytes_are_those_that_onnx_packs(scheme: Scheme | None) -> None:
    from penguin_edge.export.targets.onnx.products import BlockProduct, Product, RowProduct

    linear = nn.Linear(192, 24, bias=False)
    module: nn.Module = Product(linear)
    if scheme is not None:
        integers = quantize_weight(linear.weight, scheme)
        rows = scheme.activations == "token"
        quantized = QuantizedLinear(integers, None, "row" if rows else "block")
        module = RowProduct(quantized) if rows else BlockProduct(quantized)
    stored = sum(t.nbytes for t in itertools.chain(module.parameters(), module.buffers()))
    assert TARGETS["onnx"].layer_bytes((24, 192), scheme) == stored


def job(tiny: Checkpoint, folder: Path, target: str = "onnx", **limit: Any) -> tuple[Recipe, dict[str, Any], list[str]]:
    stages: list[str] = []
    data = CalibrationOptions(TEXT, samples=2, length=32)
    recipe, report = choose(
        tiny, TARGETS[target], AutoOptions(data, **limit), folder / "kept.json", None, lambda *at: stages.append(at[2])
    )
    return recipe, report, stages


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_second_limit_measures_no_layer_again(target: str, tiny: Checkpoint, tmp_path: Path) -> None:
    _, first, stages = job(tiny, tmp_path, target, max_kl=1.0)
    assert any("mlp" in stage for stage in stages)
    recipe, again, stages = job(tiny, tmp_path, target, max_kl=1.0)
    assert again == first and stages and all(stage.startswith("recipe-") for stage in stages)
    assert json.loads(json.dumps(first)) == first
    assert Recipe.from_json(recipe.to_json(), "auto") == recipe
    # A file that is damaged, or of other data, is measured anew.
    kept = tmp_path / "kept.json"
    for text in ("{", kept.read_text().replace('"made_for": "', '"made_for": "0')):
        kept.write_text(text)
        _, again, stages = job(tiny, tmp_path, target, max_kl=1.0)
        assert again == first and any("mlp" in stage for stage in stages)
    # A smaller size costs KL, a larger one none.
    least = first["smallest_bytes"]
    kls = [job(tiny, tmp_path, target, max_size=least + more)[1]["predicted_kl"] for more in (0, 10_000, 10**7)]
    assert kls[0] > kls[1] > kls[2]


def test_limits_that_cannot_be_kept(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--max-size 10.0 kB: the smallest bundle of this model takes .* \(\d+ bytes"):
        job(tiny, tmp_path, max_size=10_000)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"--max-kl 1e-07 cannot be reached: .* measures [\d.e-]+ nats"):
        job(tiny, tmp_path, max_kl=1e-7)
    with pytest.raises(MemoryLimitError, match="measuring needs about"):
        data = CalibrationOptions(TEXT, samples=2, length=32)
        options = AutoOptions(data, max_kl=1.0)
        choose(tiny, TARGETS["onnx"], options, tmp_path / "kept.json", 1000, lambda *at: None)


def test_encoder_layers_are_measured_where_the_data_has_pictures(tiny: Checkpoint, data: Path, tmp_path: Path) -> None:
    options = AutoOptions(CalibrationOptions(str(data), samples=1, length=200), max_size=10**9)
    recipe, report = choose(tiny, TARGETS["onnx"], options, tmp_path / "kept.json", None, lambda *at: None)
    rows = {row["layer"]: row for row in report["layers"]}
    assert report["data"]["images"] == 1 and set(recipe.layers) == set(rows)
    assert len(rows["encoder.layers.0.mlp.up_proj"]["candidates"]) == 4
    assert all(c["kl"] > 0 for c in rows["encoder.layers.0.mlp.up_proj"]["candidates"])
    assert rows["encoder.patch_embedding"]["chosen"] == "fp32" and rows["encoder.patch_embedding"]["reason"]
    assert not rows["projector.readout.0"]["reason"]


# --- the command line -------------------------------------------------------------------------------------------------


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


FEW = ("--calibration", TEXT, "--calibration-samples", 2, "--calibration-length", 48, "--max-seq-len", 512)


def test_a_bundle_within_a_size(tmp_path: Path) -> None:
    out, size = tmp_path / "out", 3_365_000
    auto = ("--model", "nano", "--quant", "auto", "--max-size", "3.365MB")
    done = cli("export", *auto, *FEW, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert bundle_bytes(out) <= size
    manifest = Bundle.read(out).manifest
    report = manifest.quantization["auto"]
    assert json.loads(done.stdout.splitlines()[-1])["auto"] == report
    assert report["max_size"] == size and bundle_bytes(out) <= report["bytes"] <= size
    assert manifest.precision == "auto" and manifest.verified
    # What the table says is what the bundle holds.
    schemes = {row["layer"]: row["scheme"] for row in manifest.quantization["layers"]}
    assert {row["chosen"] for row in report["layers"]} >= {"int8 per row mse", "int4 group 64 mse"}
    for row in report["layers"]:
        chosen = next(c for c in row["candidates"] if c["label"] == row["chosen"])
        assert schemes[row["layer"]] == chosen["scheme"], row["layer"]
        measured = row["layer"].startswith("decoder.")
        assert all((c["kl"] is not None) == measured for c in row["candidates"])
    assert "not measured: no pictures in the data" in done.stderr and "decoder.lm_head" in done.stderr
    done = cli("verify", out, "--against", "nano")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_within_a_kl(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("export", "--model", "nano", "--quant", "auto", "--max-kl", 0.02, *FEW, "-o", out)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.read(out).manifest
    report = manifest.quantization["auto"]
    assert report["max_kl"] == 0.02 and 0 < report["measured_kl"] <= 0.02
    # The eager model of the bundle's recipe says the same.
    checkpoint = Checkpoint.open("nano", note=lambda line: None)
    samples = read_calibration(CalibrationOptions(TEXT, 2, 48), checkpoint)
    recipe = Recipe.from_json(manifest.quantization["recipe"], "auto")
    walk = SensitivityWalk(checkpoint.load(parts_read(samples)), samples, "block")
    assert walk.whole(recipe.layers, lambda stage: None) == pytest.approx(report["measured_kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("auto",), "wants one of --max-size and --max-kl, got none"),
        (("auto", "--max-size", "3MB", "--max-kl", "0.1"), "got --max-size and --max-kl"),
        (("int4", "--max-size", "3MB"), "--max-size is for --quant auto alone, got --quant int4"),
        (("fp16", "--max-kl", "0.1"), "--max-kl is for --quant auto alone, got --quant fp16"),
        (("auto", "--max-kl", "-1"), "'-1' is not a KL"),
        (("auto", "--max-kl", "0"), "'0' is not a KL"),
        (("auto", "--max-kl", "nan"), "'nan' is not a KL"),
        (("auto", "--max-kl", "small"), "'small' is not a KL"),
        (("auto", "--max-size", "3 quarts"), "'3 quarts' is not a size"),
        (("auto", "--max-size=-3MB"), "is not a size"),
    ],
)
def test_limits_are_usage(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quant, *more = arguments
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--model", "nano", "-o", str(tmp_path / "out"), "--quant", quant, *more])
    assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_refused_exports_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = set(tmp_path.iterdir())
    for more, says in (
        (("-o", tmp_path / "out", "--max-size", "1MB"), "the smallest bundle of this model takes"),
        (("-o", tmp_path / "out", "--max-kl", 1, "--calibration", tmp_path / "binary.txt"), "is not UTF-8 text"),
        (("-o", tmp_path / "there", "--max-kl", 1), "exists already"),
    ):
        done = cli("export", "--model", "nano", "--quant", "auto", *FEW, *more)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert set(tmp_path.iterdir()) == before
