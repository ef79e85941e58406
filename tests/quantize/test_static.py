"""Static activations: one constant scale per layer, measured by calibration, in explicit Q/DQ."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import asked_pictures, products_of
from torch import nn

from penguin_edge.bundle.folder import Bundle
from penguin_edge.dataset.samples import Sample
from penguin_edge.errors import InputError
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.media.preprocess import positions
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.quantize.apply import check_layers, module_of, quantize_part
from penguin_edge.quantize.calibration.calibrate import (
    CalibrationOptions,
    calibrate,
    digest,
    read_calibration,
    ready_from,
)
from penguin_edge.quantize.linear import QuantizedLinear, Scheme, quantize_weight, rounded_static
from penguin_edge.quantize.recipe import Recipe, find_recipe
from penguin_edge.quantize.smooth import apply_factors
from penguin_edge.quantize.static import BINS, Spread, measure
from penguin_edge.runtime.engines.opening import open_engine

STATIC = Scheme(8, activations="static")
PLAIN = Scheme(8, method="rtn", activations="static")


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_rounding_is_that_of_quantize_linear() -> None:
    """Halves to even, cut off at -128 and 127, in ONNX's reference and in ONNX Runtime."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    helper = onnx.helper
    scale = np.float32(0.25)
    halves = (np.arange(-300, 300, dtype=np.float32) + 0.5) * scale
    noise = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 20
    x = np.concatenate((halves, noise, np.array([0, -0.0, 1e6, -1e6], np.float32)))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(a, n) for n, a in (("s", np.array(scale)), ("z", np.array(0, np.int8)))]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [len(x)])], [value("y", 1, [len(x)])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    got = rounded_static(torch.from_numpy(x), torch.tensor(scale)).numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(got, session.run(None, {"x": x})[0])
    assert np.array_equal(got, ReferenceEvaluator(model).run(None, {"x": x})[0])
    assert got[300] == 0 and got[301] == got[302] == 0.5 and (got.min(), got.max()) == (-32, 31.75)


def test_the_module_rounds_its_inputs() -> None:
    linear, x = nn.Linear(20, 6), torch.randn(3, 20) * 4
    integers = quantize_weight(linear.weight, STATIC)
    scale = torch.tensor(0.05)
    got = QuantizedLinear(integers, linear.bias, "static", scale)(x)
    levels = (x / 0.05).round().clamp(-128, 127)
    wanted = nn.functional.linear(levels * scale, integers.weight(), linear.bias)
    assert torch.equal(got, wanted) and (levels == 127).any()
    with pytest.raises(AssertionError, match="come with their scale"):
        QuantizedLinear(integers, linear.bias, "static")


# --- scales -----------------------------------------------------------------------------------------------------------


def test_the_plain_scale_is_that_of_the_largest_value() -> None:
    spread = Spread()
    for part in (torch.tensor([0.5, -0.1]), torch.tensor([[3.0, -12.7], [1, 2]]), torch.zeros(4)):
        spread.add(part)
    assert spread.scale(narrower=False) == torch.tensor(12.7) / 127
    assert int(spread.counts.sum()) == 10 and spread.reach == 16
    # A value that is never large: a narrower range would cut it off.
    even = Spread()
    even.add(torch.linspace(-2, 2, 1001))
    assert even.scale(narrower=True) == even.scale(narrower=False) == torch.tensor(2.0) / 127


def test_the_narrower_scale_has_the_least_error() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    x[7] = 30
    spread = Spread()
    spread.add(x)
    plain, found = spread.scale(narrower=False), spread.scale(narrower=True)
    assert found < 0.5 * plain

    def missed(scale: torch.Tensor) -> float:
        return float((rounded_static(x, scale) - x).double().square().mean())

    tried = [missed(plain * 2 ** (-step / 8)) for step in range(33)]
    assert missed(found) <= min(tried) * 1.02 < 0.5 * missed(plain)


def test_neither_order_nor_cuts_of_the_data_change_a_scale() -> None:
    parts = [torch.randn(50, 30, generator=torch.Generator().manual_seed(i)) * 3.0 ** (i - 4) for i in range(9)]

    def counted(tensors: list[torch.Tensor]) -> Spread:
        spread = Spread()
        for tensor in tensors:
            spread.add(tensor)
        return spread

    wanted = counted(parts)
    for other in (counted(parts[::-1]), counted([torch.cat(parts)]), counted([r for part in parts for r in part])):
        assert torch.equal(other.counts, wanted.counts) and other.reach == wanted.reach
        assert torch.equal(other.scale(narrower=True), wanted.scale(narrower=True))
    assert int(wanted.counts.sum()) == 9 * 1500 and len(wanted.counts) == BINS


def test_nothing_and_not_a_number() -> None:
    spread = Spread()
    spread.add(torch.zeros(3, 4))
    assert spread.scale(narrower=True) == spread.scale(narrower=False) == 1
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"decoder\.x: an activation of the calibration data is NaN"):
            spread.add(torch.tensor([0.0, bad]), "decoder.x")


def test_layers_that_read_one_tensor_share_what_was_counted() -> None:
    """And so its scale: they are one product in the file."""
    model = nn.ModuleDict({name: nn.Linear(8, 2) for name in "abc"})
    x = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def run(index: int) -> torch.Tensor:
        return model["a"](x[index]) + model["b"](x[index]) + model["c"](2 * x[index])

    with torch.no_grad():
        spreads, out = measure(dict(model.items()), run, 2)
        assert all(torch.equal(out[i], run(i)) for i in range(2))
    assert spreads["a"] is spreads["b"] is not spreads["c"]
    largest = torch.stack(x).abs().max()
    assert spreads["a"].scale(narrower=False) == largest / 127
    assert spreads["c"].scale(narrower=False) == 2 * largest / 127


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"bits": 8, "group": 64}, {"bits": 8, "symmetric": False}])
def test_other_weights_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"encoder": {"activations": "static", **wrong}}))
    with pytest.raises(InputError, match=r"r\.json: encoder: int\d .*static activations, wanted 8 bits, symmetric"):
        find_recipe(str(path))


def test_targets_and_parts() -> None:
    TARGETS["onnx"].check_scheme("encoder.x", STATIC, "fp32")
    with pytest.raises(InputError, match=r"encoder\.x: int8 .*static activations, but XNNPACK rounds.*per token"):
        TARGETS["executorch"].check_scheme("encoder.x", STATIC, "fp32")
    layers = {"prefill.layers.0.mlp.up_proj": (128, 96), "encoder.patch_embedding": (64, 588)}
    with pytest.raises(InputError, match=r"prefill\.layers.*made for the decoder alone; take activations per token"):
        check_layers(Recipe("r", prefill=STATIC), layers)
    check_layers(Recipe("r", encoder=STATIC), layers)  # 588 inputs need no group
    assert Recipe("r", encoder=STATIC).calibrated and STATIC.calibrated and not Scheme(8).calibrated
    assert STATIC.label == "int8 per row mse, static activations"


def test_a_part_without_its_scales_is_refused() -> None:
    model = Checkpoint.open("tiny", random_weights=True, note=lambda line: None).load(("projector",))
    with pytest.raises(InputError, match=r"projector\.\S+: int8 .*static activations needs calibration data"):
        quantize_part(model, "projector", Recipe("r", projector=STATIC), "block")


# --- walking a model --------------------------------------------------------------------------------------------------

RECIPE = Recipe(
    "r", encoder=PLAIN, projector=STATIC, decoder=PLAIN, lm_head=PLAIN, smooth={"encoder": 0.5, "decoder": 0.5}
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with questions, in the training format."""
    return asked_pictures(tmp_path_factory.mktemp("calibration"), 4)


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.open("tiny", random_weights=True, note=lambda line: None)


@pytest.fixture(scope="module")
def samples(data: Path, tiny: Checkpoint) -> list[Sample]:
    return read_calibration(CalibrationOptions(str(data), length=200), tiny)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_scales_are_of_what_the_smoothed_model_reads(tiny: Checkpoint, samples: list[Sample], tmp_path: Path) -> None:
    calibrate(tiny, RECIPE, samples, tmp_path, lambda stage: None)
    model, ready = tiny.load(dtype=torch.float32), ready_from(tmp_path)
    plain = tiny.load(dtype=torch.float32)
    for part, count in (("encoder", len(model.encoder.layers)), ("decoder", len(model.decoder.layers))):  # type: ignore[union-attr]
        for index in range(count):
            block = f"{part}.layers.{index}"
            with torch.no_grad():
                apply_factors(model.get_submodule(block), ready.factors(block))
    wanted: dict[str, float] = {}
    unsmoothed: dict[str, float] = {}

    def watch(module: nn.Module, key: str, seen: dict[str, float]) -> None:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[key] = max(seen.get(key, 0), float(inputs[0].abs().max()))

        module.register_forward_pre_hook(hook)

    for which, seen in ((model, wanted), (plain, unsmoothed)):
        for name, module in which.named_modules():
            if isinstance(module, nn.Linear):
                watch(module, name, seen)
        with torch.no_grad():
            for sample in samples:
                hidden = which(torch.from_numpy(sample.input_ids)[None], which.visual(sample.visuals))
                assert hidden.isfinite().all()
    for name, largest in wanted.items():
        scale = ready.input_scale(name)
        assert scale is not None and scale.dtype == torch.float32 and scale.shape == ()
        if not name.startswith("projector"):
            assert float(scale) == pytest.approx(largest / 127, rel=1e-4), name
    # Factors were applied before the scales were measured.
    name = "encoder.layers.0.mlp.down_proj"
    assert float(ready.input_scale(name)) != pytest.approx(unsmoothed[name] / 127, rel=1e-2)  # type: ignore[arg-type]
    # Nothing but scales and factors depends on what was read.
    assert all(name.endswith((".input.safetensors", ".factors.safetensors")) for name in contents(tmp_path))


def test_a_stopped_run_goes_on_and_other_data_is_no_use(
    tiny: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    made_for = calibrate(tiny, RECIPE, samples, tmp_path, lambda stage: None)
    first = contents(tmp_path)
    inputs = [name for name in first if name.endswith(".input.safetensors")]
    assert len(inputs) > 20
    for name in (*inputs[::3], "decoder.layers.1.factors.safetensors"):
        (tmp_path / name).unlink()
    assert calibrate(tiny, RECIPE, samples, tmp_path, lambda stage: None) == made_for
    assert contents(tmp_path) == first
    assert calibrate(tiny, RECIPE, samples[:2], tmp_path, lambda stage: None) != made_for
    assert contents(tmp_path) != first
    other = replace(RECIPE, encoder=Scheme(8, method="rtn"))
    assert digest(tiny, other, samples) != made_for == digest(tiny, RECIPE, samples)


def test_gptq_and_static_together(tiny: Checkpoint, samples: list[Sample], tmp_path: Path) -> None:
    both = Scheme(8, method="gptq", activations="static")
    calibrate(tiny, Recipe("r", projector=both), samples, tmp_path, lambda stage: None)
    model, ready = tiny.load(("projector",)), ready_from(tmp_path)
    rows = quantize_part(model, "projector", Recipe("r", projector=both), "block", ready)
    for row in rows:
        layer = model.get_submodule(row.layer)
        assert isinstance(layer, QuantizedLinear) and layer.activations == "static"
        found = ready.integers(row.layer, both)
        assert found is not None and torch.equal(found.levels, layer.levels)
        assert layer.input_scale is not None and torch.equal(layer.input_scale, ready.input_scale(row.layer))  # type: ignore[arg-type]


def test_activations_that_are_not_finite_are_named(
    tiny: Checkpoint, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoint.load

    def broken(self: Checkpoint, *arguments: Any, **named: Any) -> Any:
        model = load(self, *arguments, **named)
        if model.encoder is not None:
            model.encoder.layers[1].input_layernorm.weight.data[3] = float("nan")
        return model

    monkeypatch.setattr(Checkpoint, "load", broken)
    recipe = Recipe("r", encoder=STATIC)
    with pytest.raises(InputError, match=r"encoder\.layers\.1\.self_attn\.\w+: an activation of the calibration data"):
        calibrate(tiny, recipe, samples, tmp_path, lambda stage: None)


def test_text_alone_measures_no_encoder(tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text without any picture " * 100)
    texts = read_calibration(CalibrationOptions(str(tmp_path / "text.txt"), length=64), tiny)
    with pytest.raises(InputError, match=r"encoder\.\S+: int8 .* static activations reads images"):
        calibrate(tiny, Recipe("r", encoder=STATIC), texts, tmp_path / "work", lambda stage: None)
    calibrate(tiny, Recipe("r", decoder=STATIC), texts, tmp_path / "work", lambda stage: None)
    assert {name.split(".")[0] for name in contents(tmp_path / "work")} == {"decoder"}


# --- exported files ---------------------------------------------------------------------------------------------------


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def exported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """penguin-nano, all linear layers static, encoder and decoder smoothed; the export verifies it."""
    folder = tmp_path_factory.mktemp("static")
    scheme = {"bits": 8, "activations": "static"}
    parts = dict.fromkeys(("encoder", "projector", "decoder", "lm_head"), scheme)
    (folder / "static.json").write_text(json.dumps({**parts, "smooth": {"encoder": 0.5, "decoder": 0.5}}))
    common = ("--model", "nano", "--quant", folder / "static.json", "--max-seq-len", 256, "-o", folder / "out")
    done = cli("export", *common, "--calibration", data, "--calibration-samples", 4)
    assert done.returncode == 0, done.stderr
    return Bundle.read(folder / "out")


def expected(bundle: Bundle, part: str, data: Path, work: Path) -> dict[str, QuantizedLinear]:
    checkpoint = Checkpoint.open("nano")
    recipe = Recipe.from_json(bundle.manifest.quantization["recipe"], bundle.manifest.precision)
    made = bundle.manifest.quantization["calibration"]
    options = CalibrationOptions(str(data), **{name: made[name] for name in ("samples", "length", "seed")})
    assert calibrate(checkpoint, recipe, read_calibration(options, checkpoint), work, lambda s: None) == made["sha256"]
    model = checkpoint.load()
    quantize_part(model, part, recipe, TARGETS["onnx"].activations, ready_from(work))
    return {n: m for n, m in module_of(model, part).named_modules() if isinstance(m, QuantizedLinear)}


def test_the_bundle_verifies(exported: Bundle, data: Path) -> None:
    done = cli("verify", exported.folder, "--against", "nano", "--calibration", data, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout.splitlines()[-1])["stages"]}
    # The same rounding on both sides: what is left is the order of sums, and values at the border of two levels.
    assert max(stage["relative"] for stage in stages.values()) < 2e-2
    assert {row["scheme"]["activations"] for row in exported.manifest.quantization["layers"]} == {"static"}


@pytest.mark.parametrize("part", ["encoder", "projector", "decoder"])
def test_the_file_holds_explicit_roundings_integers_and_scales(
    exported: Bundle, part: str, data: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    layers = expected(exported, part, data, tmp_path)
    graph = onnx.load(exported.path(f"{part}.onnx")).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    found = {}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        rounded, weight = (made[name] for name in node.input)
        assert (rounded.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        quantize = made[rounded.input[0]]
        assert quantize.op_type == "QuantizeLinear" and list(quantize.input[1:]) == list(rounded.input[1:])
        scale, zero = (stored[name] for name in quantize.input[1:])
        assert zero.dtype == np.int8 and zero.shape == () and zero == 0
        assert {a.name: a.i for a in weight.attribute}["axis"] == 1 and len(weight.input) == 2
        levels, rows = (stored[name] for name in weight.input)
        assert levels.dtype == np.int8
        found[(levels.T.astype(np.int16) + 128).astype(np.uint8).tobytes()] = (scale, rows)
    products = products_of(layers)
    assert len(found) == len(products) > 0
    for name, parts in products.items():
        scale, rows = found[torch.cat([layer.levels for layer in parts]).numpy().tobytes()]
        assert np.array_equal(rows, torch.cat([layer.scales[:, 0] for layer in parts]).numpy()), name
        assert all(scale == layer.input_scale.numpy() for layer in parts if layer.input_scale is not None), name
    assert {node.domain for node in graph.node if "Linear" in node.op_type or node.op_type == "MatMul"} == {""}


@pytest.mark.parametrize("part", ["encoder", "projector", "decoder"])
def test_the_runtime_makes_integer_products(exported: Bundle, part: str, tmp_path: Path) -> None:
    """None is left in fp32, and no weight is turned into floats when the graph is loaded."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = exported.path(f"{part}.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    before = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    after = Counter(node.op_type for node in graph.node)
    assert after["MatMulIntegerToFloat"] == before["MatMul"] > 0
    assert after["MatMul"] == after["DequantizeLinear"] == 0
    tables = ("cos", "sin")  # of the rotary step
    weights = [t for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 2 and t.name not in tables]
    widths = {tensor.data_type for tensor in weights}
    assert widths == {onnx.TensorProto.INT8}


def test_a_processor_without_vnni_computes_the_same(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(1).standard_normal((1, 24, 588)).astype(np.float32)
    rows, cols = positions((4, 6), 1)
    run: Callable[[], np.ndarray] = lambda: open_engine(exported, threads=1).encode(pixels, rows, cols)  # noqa: E731
    wanted = run()
    monkeypatch.setattr("penguin_edge.runtime.engines.onnxruntime.int8_overflows", lambda: True)
    assert np.abs(run() - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_executorch_refuses_it_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"projector": {"bits": 8, "activations": "static"}}))
    done = cli("export", "--model", "nano", "--target", "executorch", "--quant", recipe, "-o", tmp_path / "out")
    assert done.returncode == 1 and "XNNPACK rounds activations per token" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == [recipe]
