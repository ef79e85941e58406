"""Quantization: integers, recipes, and that every target is given the same integers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import products_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import nn

from penguin_edge.bundle.contract import CHECK, Bounds
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import InputError
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.export.verify import QUANTIZED, beyond_noise
from penguin_edge.media.preprocess import positions
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.quantize.apply import check_layers, linears, module_of, quantize_part, quantize_rows
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions, calibrate, read_calibration, ready_from
from penguin_edge.quantize.linear import (
    QuantizedLinear,
    Scheme,
    quantize_weight,
    rounded_blocks,
    rounded_rows,
    rounded_symmetric_rows,
)
from penguin_edge.quantize.recipe import PRESETS, Recipe, find_recipe
from penguin_edge.runtime.engines.base import chunks
from penguin_edge.runtime.engines.embedding import EmbeddingTable
from penguin_edge.runtime.engines.opening import open_engine

SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from((4, 8)),
    group=st.sampled_from((None, 16, 32, 64)),
    symmetric=st.booleans(),
    method=st.sampled_from(("rtn", "mse")),
    activations=st.sampled_from((None, "block", "token")),
)


def weights(seed: int, rows: int = 6, inputs: int = 128, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * scale


@given(scheme=SCHEMES, seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6))
def test_every_weight_is_near_its_level(scheme: Scheme, seed: int, scale: float) -> None:
    weight = weights(seed, scale=scale)
    found = quantize_weight(weight, scheme)
    assert found.levels.dtype == torch.uint8 and int(found.levels.max()) < 2**scheme.bits
    assert found.scales.shape == found.zeros.shape == (6, 128 // (scheme.group or 128))
    assert (found.scales > 0).all()
    group = weight.unflatten(1, (-1, scheme.group or 128))
    error = (found.weight() - weight).unflatten(1, (-1, scheme.group or 128))
    if scheme.method == "rtn":
        # Half a step; another half where the outermost level of a symmetric range or a rounded zero cuts the end off,
        # and bf16's rounding of a 4-bit scale, 2^-8 of the reach.
        slack = 1.0 if scheme.symmetric else 0.5
        reach = group.abs().amax(-1, keepdim=True)
        assert (error.abs() <= found.scales[..., None] * (0.5 + slack) + reach * 2**-8).all()
    else:
        plain = quantize_weight(weight, Scheme(scheme.bits, scheme.group, scheme.symmetric, "rtn"))
        missed = (plain.weight() - weight).unflatten(1, (-1, scheme.group or 128)).square().sum(-1)
        assert (error.square().sum(-1) <= missed * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_slabs_do_not_matter(bits: int, symmetric: bool) -> None:
    weight = weights(3)
    weight[:, :32] = 0
    found = quantize_weight(weight, Scheme(bits, 32, symmetric))
    assert (found.weight()[:, :32] == 0).all()
    wide = weights(4, rows=70, inputs=65536)
    whole = quantize_weight(wide, Scheme(bits, 64, symmetric, "rtn"))
    part = quantize_weight(wide[66:], Scheme(bits, 64, symmetric, "rtn"))
    assert torch.equal(whole.levels[66:], part.levels) and torch.equal(whole.scales[66:], part.scales)


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight = weights(5, rows=64, inputs=256)

    def loss(**scheme: Any) -> float:
        return float((quantize_weight(weight, Scheme(**scheme)).weight() - weight).norm() / weight.norm())

    assert loss(bits=8) < 0.01 < loss(bits=4, group=32) < loss(bits=4, group=64) < loss(bits=4, group=128) < 0.15
    assert loss(bits=4, group=64, method="mse") < loss(bits=4, group=64, method="rtn")


def test_bad_weights_and_groups_are_named() -> None:
    weight = weights(0, inputs=96)
    with pytest.raises(InputError, match=r"decoder\.x: 96 inputs .* group of 64; wanted one of 16, 32"):
        quantize_weight(weight, Scheme(4, 64), "decoder.x")
    for bad in (float("nan"), float("inf")):
        weight[1, 2] = bad
        with pytest.raises(InputError, match=r"decoder\.x: a weight is NaN or infinite"):
            quantize_weight(weight, Scheme(8), "decoder.x")
    for wrong in ({"bits": 3}, {"bits": 4, "group": 48}, {"bits": 4, "group": 8}, {"bits": 4, "method": "x"}):
        with pytest.raises(InputError, match=r"wanted|known"):
            Scheme(**wrong)  # type: ignore[arg-type]


def test_the_module_computes_with_its_integers() -> None:
    linear = nn.Linear(128, 6)
    x = weights(8, rows=3)
    with torch.no_grad():
        for scheme in (Scheme(4, 32), Scheme(4, 64, symmetric=False), Scheme(8)):
            integers = quantize_weight(linear.weight, scheme)
            wanted = nn.functional.linear(x, integers.weight(), linear.bias)
            assert torch.equal(QuantizedLinear(integers, linear.bias, "float")(x), wanted)
            for activations in ("block", "token", "row"):
                got = QuantizedLinear(integers, linear.bias, activations)(x)  # type: ignore[arg-type]
                assert 0 < (got - wanted).norm() / wanted.norm() < 0.02
            assert QuantizedLinear(integers, linear.bias, "float")(x.half()).dtype == torch.float16


def test_activations_are_rounded_as_the_engines_do() -> None:
    x = weights(9, rows=4)
    x[2] = 0
    assert torch.equal(rounded_blocks(x, 32)[2], x[2]) and torch.equal(rounded_rows(x)[2], x[2])
    assert torch.equal(rounded_symmetric_rows(x)[2], x[2])
    assert (rounded_symmetric_rows(x) - x).abs().amax(-1).le(x.abs().amax(-1) / 254 * 1.001).all()
    assert (rounded_blocks(x, 32) - x).abs().max() <= x.abs().max() / 254 * 1.001
    assert (rounded_rows(x) - x).abs().max() <= (x.max() - x.min()) / 254
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, (1, 128), torch.int8, zero_point_dtype=torch.int8)
    scale, zero = scale[:, None], zero[:, None]
    wanted = (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
    assert torch.allclose(rounded_rows(x), wanted, atol=1e-6)


# --- recipes ----------------------------------------------------------------------------------------------------------


@given(
    parts=st.fixed_dictionaries(
        {part: st.one_of(st.none(), SCHEMES) for part in ("encoder", "projector", "decoder", "lm_head")}
    ),
    layers=st.dictionaries(st.sampled_from(("decoder.layers.0.mlp.up_proj", "x")), st.one_of(st.none(), SCHEMES)),
    embedding=st.sampled_from((None, "int8", "int4")),
)
def test_a_recipe_survives_its_file(parts: dict[str, Any], layers: dict[str, Any], embedding: Any) -> None:
    recipe = Recipe("r", embedding=embedding, layers=layers, **parts)
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())), "r")
    assert again == recipe
    for layer, scheme in layers.items():
        assert again.scheme_of(layer) == scheme
    assert again.scheme_of("decoder.lm_head") == parts["lm_head"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "got list"),
        ({"version": 2}, "recipe version 2"),
        ({"vision": {"bits": 4}}, "unknown field 'vision'; known: decoder"),
        ({"decoder": {"bits": 5}}, "decoder: 5 bits, wanted one of 4, 8"),
        ({"decoder": {"bits": True}}, "bits is true"),
        ({"decoder": {"group": 64}}, "wanted null or an object of bits"),
        ({"decoder": {"bits": 8, "activations": "row"}}, "unknown activations 'row'; known: block, token"),
        ({"decoder": {"bits": 8, "activations": 8}}, "activations is 8"),
        ({"decoder": {"bits": 4, "groups": 64}}, "wanted null or an object of bits"),
        ({"decoder": "int4"}, "wanted null or an object of bits"),
        ({"precision": "fp8"}, "wanted fp32 or fp16"),
        ({"smooth": {"lm_head": 0.5}}, "wanted a strength for any of encoder, decoder, prefill"),
        ({"prefill": {"bits": 8}, "smooth": {"prefill": 2}}, "wanted 0 to 1, or awq"),
        ({"smooth": {"prefill": 0.5}}, "smooth: prefill is not quantized"),
        ({"embedding": "int2"}, "wanted int8, int4 or null"),
        ({"layers": ["a"]}, 'layers is ["a"]'),
        ({"layers": {"a": 4}}, "r.json: a: got 4"),
        ({"version": True}, "recipe version True"),
        ({"version": 1.0}, "recipe version 1.0"),
        ({"lenient": 1}, "lenient is 1, wanted true or false"),
        ({"name": 3}, "name is 3"),
        ({"precision": None}, "wanted fp32 or fp16"),
        ({"precision": ["fp16"]}, "wanted fp32 or fp16"),
        ({"kv": {}}, "wanted fp16, int8 or null"),
        ({"decoder": {"bits": 4, "group": 3 << 40}}, "a group of"),
        ({"layers": {"x" * 300: None}}, "layers is"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(data: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        find_recipe(str(path))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown quantization 'int3'; known: fp32, fp16, int8, int4, int8-prefill"):
        find_recipe("int3")
    with pytest.raises(InputError, match="cannot be read"):
        find_recipe(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        find_recipe(str(tmp_path / "broken.json"))


def test_a_recipe_must_fit_the_model() -> None:
    layers = {"encoder.patch_embedding": (64, 588), "decoder.layers.0.mlp.up_proj": (128, 96)}
    check_layers(PRESETS["int4"], layers)
    with pytest.raises(InputError, match=r"no linear layer 'decoder\.layer\.0'; known: encoder.patch_embedding"):
        check_layers(Recipe("r", layers={"decoder.layer.0": None}), layers)
    with pytest.raises(InputError, match=r"no linear layer 'encoder\.\*\.mlp'"):
        check_layers(Recipe("r", layers={"encoder.*.mlp": None}), layers)
    gptq = Recipe("r", decoder=Scheme(4, 32), prefill=Scheme(8), layers={"prefill.*": Scheme(4, 32, method="gptq")})
    with pytest.raises(InputError, match=r"prefill\.layers.*made for the decoder alone"):
        check_layers(gptq, {"prefill.layers.0.mlp.up_proj": (128, 96)})
    with pytest.raises(InputError, match=r"up_proj has 96 inputs.*wanted one of 32, 16"):
        check_layers(Recipe("r", decoder=Scheme(4, 64)), layers)
    with pytest.raises(InputError, match=r"patch_embedding has 588 inputs.*set it to null"):
        check_layers(Recipe("r", encoder=Scheme(4, 64)), layers)


def test_a_part_is_quantized_layer_by_layer() -> None:
    checkpoint = Checkpoint.open("nano")
    model = checkpoint.load(("encoder", "decoder", "embedding"))
    assert model.encoder is not None and model.decoder is not None
    names = list(linears(model, "encoder"))
    head = model.decoder.lm_head.weight
    rows = quantize_part(model, "encoder", PRESETS["int4"], "float")
    assert [row.layer for row in rows] == names
    kept = [row for row in rows if row.scheme is None]
    assert [row.layer for row in kept] == ["encoder.patch_embedding"] and "588" in kept[0].reason
    assert all(0 < row.error < 0.2 for row in rows if row.scheme)
    assert not [m for m in model.encoder.layers.modules() if isinstance(m, nn.Linear)]
    # A recipe may speak of one layer; the tied head may be quantized while the table stays.
    recipe = Recipe("r", lm_head=Scheme(8), layers={"decoder.layers.0.mlp.up_proj": Scheme(4, 32)})
    quantize_part(model, "decoder", recipe, "float")
    found = {n for n, m in model.decoder.named_modules() if isinstance(m, QuantizedLinear)}
    assert found == {"layers.0.mlp.up_proj", "lm_head"}
    assert model.embedding is not None and model.embedding.weight is head


def test_int8_rows_of_the_table(tmp_path: Path) -> None:
    table = weights(1, rows=50, inputs=64)
    table[7] = 0
    levels, scales = quantize_rows(table)
    path = tmp_path / "embedding.bin"
    path.write_bytes(levels.numpy().tobytes() + scales.numpy().tobytes())
    ids = np.array([0, 7, 49, 7])
    found = EmbeddingTable.open(path, 50, 64, "int8").lookup(ids)
    assert np.array_equal(found, (levels * scales[:, None]).numpy()[ids])
    assert np.abs(found - table.numpy()[ids]).max() <= float(table.abs().max()) / 254 * 1.001
    with pytest.raises(InputError, match="NaN"):
        quantize_rows(table / 0)


# --- exported files ---------------------------------------------------------------------------------------------------


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


BUNDLES = ["onnx-int8", "onnx-int4", "onnx-int8-prefill", "executorch-int8", "executorch-int4"]


@pytest.fixture(scope="module", params=BUNDLES)
def exported(request: pytest.FixtureRequest, nano_bundle: Callable[[str, str], Path]) -> Bundle:
    return Bundle.read(nano_bundle(*request.param.split("-", 1)))


def expected(bundle: Bundle) -> dict[str, QuantizedLinear]:
    """Every quantized layer of every graph, by name, as the recipe makes it for the bundle's engine."""
    checkpoint, recipe = Checkpoint.open("nano"), PRESETS[bundle.manifest.precision]
    activations = TARGETS[bundle.manifest.target].activations
    found = {}
    with tempfile.TemporaryDirectory() as work:
        if recipe.calibrated:
            made = bundle.manifest.quantization["calibration"]
            options = CalibrationOptions(**{name: made[name] for name in ("source", "samples", "length", "seed")})
            calibrate(checkpoint, recipe, read_calibration(options, checkpoint), Path(work), lambda stage: None)
        for part in bundle.manifest.graphs:
            model = checkpoint.load()
            quantize_part(model, part, recipe, activations, ready_from(Path(work)))
            for name, module in module_of(model, part).named_modules():
                if isinstance(module, QuantizedLinear):
                    found[f"{part}.{name}"] = module
    return found


def test_a_quantized_bundle_verifies(exported: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "bundle")  # which the result is written into
    for more in ((), ("--against", "nano")):
        done = cli("verify", folder, "--json", *more)
        assert done.returncode == 0, done.stderr
        stages = {stage["name"]: stage for stage in json.loads(done.stdout.splitlines()[-1])["stages"]}
        # The engines' own rounding is repeated, and what is left is fp32; but an activation at the border of two levels
        # goes either way, and moves what follows by a whole level.
        assert all(stage["cosine"] > 0.999 for name, stage in stages.items() if name != "tokens")
        assert stages["embedding"]["max_abs"] < 1e-6 and stages["prefill"]["relative"] < 1e-2
    rows = exported.manifest.quantization["layers"]
    assert {row["layer"] for row in rows if row["scheme"]} == set(expected(exported))
    assert [row["layer"] for row in rows if not row["scheme"]] == ["encoder.patch_embedding"]


def test_check_data_tell_how_far_eager_comes_from_itself(exported: Bundle) -> None:
    arrays = load_file(exported.path(CHECK))
    names = {name.removeprefix("noise_") for name in arrays if name.startswith("noise_")}
    assert names == {"features_0", "features_1", "prefill"}
    for name in names:
        relative, cosine = arrays[f"noise_{name}"]
        # Inputs moved by one part in a million move results, and trained weights damp that: nothing is widened.
        assert relative > 0 and cosine > 0.9995
        assert beyond_noise(QUANTIZED, arrays, name) == (QUANTIZED, "")


@given(relative=st.floats(0, 1), cosine=st.floats(-1, 1), engine=st.floats(0.9, 1))
def test_noise_widens_by_twice_what_was_measured_and_no_further(relative: float, cosine: float, engine: float) -> None:
    rule, why = beyond_noise(QUANTIZED, {"noise_features_0": np.array([relative, cosine])}, "features_0")
    assert 0.99 <= rule.cosine <= QUANTIZED.cosine and QUANTIZED.relative <= rule.relative <= 0.2
    assert (rule == QUANTIZED) == (cosine >= 0.9995 and relative <= 0.025) == (not why)
    if engine >= rule.cosine and engine < QUANTIZED.cosine:
        assert 1 - engine <= 2 * (1 - cosine) + 1e-12
    assert beyond_noise(QUANTIZED, {}, "features_0") == (QUANTIZED, "")


def test_the_file_holds_the_same_integers(exported: Bundle) -> None:
    layers = expected(exported)
    if exported.manifest.target == "onnx":
        for part in exported.manifest.graphs:
            found = stored_integers(exported, part)
            products = products_of({name: layer for name, layer in layers.items() if name.startswith(f"{part}.")})
            for name, parts in products.items():
                op, scales = found.pop(torch.cat([layer.levels for layer in parts]).numpy().tobytes())
                assert op == ("MatMulIntegerToFloat" if parts[0].activations == "row" else "MatMulNBits"), name
                wanted = torch.cat([layer.scales for layer in parts])
                repeats = scales.shape[1] // wanted.shape[1]
                assert np.array_equal(scales, wanted.repeat_interleave(repeats, 1).numpy()), name
            assert not found
        return
    blobs = {part: exported.path(f"{part}.pte").read_bytes() for part in exported.manifest.graphs}
    for name, layer in layers.items():
        blob = blobs[name.partition(".")[0]]
        if layer.scheme.bits == 8:
            stored = (layer.levels.to(torch.int16) - 128).to(torch.int8).numpy().tobytes()
            scales_stored = layer.scales.numpy().tobytes()
        else:
            stored = (layer.levels[:, 0::2] | (layer.levels[:, 1::2] << 4)).numpy().tobytes()
            scales_stored = layer.scales.bfloat16().view(torch.int16).numpy().tobytes()
        assert stored in blob and scales_stored in blob, name


def stored_integers(bundle: Bundle, part: str) -> dict[bytes, tuple[str, np.ndarray]]:
    """Operator and scales [N, groups] of every quantized product of a graph, by the bytes of its levels [N, K]."""
    import onnx
    from onnx import numpy_helper

    out = {}
    graph = onnx.load(bundle.path(f"{part}.onnx")).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            weight, scales = (numpy_helper.to_array(stored[node.input[i]]) for i in (1, 3))
            levels = (weight.T.astype(np.int16) + 128).astype(np.uint8)
        elif node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert attributes["accuracy_level"] == 4 and len(node.input) == 3
            packed, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            if attributes["bits"] == 4:
                packed = np.stack((packed & 15, packed >> 4), -1)
            levels = packed.reshape(attributes["N"], attributes["K"])
        else:
            continue
        out[np.ascontiguousarray(levels).tobytes()] = (node.op_type, scales.reshape(len(levels), -1))
    return out


def test_a_row_comes_out_the_same_whatever_is_beside_it(nano_bundle: Callable[[str, str], Path]) -> None:
    """One scale per row: neither the frames of a batch nor the cuts between chunks change a number."""
    engine = open_engine(Bundle.read(nano_bundle("onnx", "int8-prefill")))
    config = engine.config
    assert config.vision is not None
    pixels = np.random.default_rng(0).standard_normal((3, 24, 588)).astype(np.float32)
    pixels[1] *= 50
    rows, cols = positions((4, 6), 1)
    together = engine.encode(pixels, rows, cols)
    for i in range(3):
        assert np.array_equal(engine.encode(pixels[i : i + 1], rows, cols)[0], together[i])
    embeds = engine.embed(np.arange(40))
    found = []
    for cuts in ((40,), (20, 40), (2, 4, 37, 40)):
        with engine.new_cache() as cache:
            for begin, end in zip((0, *cuts), cuts, strict=False):
                logits = engine.forward(cache, embeds[begin:end], np.array([-1]))
            found.append(logits)
    # Attention sums in another order for other chunks, and a value at the border of two levels may go the other way:
    # with one scale for all rows the difference is some 2e-2.
    for other in found[1:]:
        assert np.abs(other - found[0]).max() <= 5e-3 * np.abs(found[0]).max()


@given(count=st.integers(1, 60), most=st.integers(2, 16), least=st.integers(1, 2))
def test_chunks_cover_a_prompt_and_leave_no_single_position(count: int, most: int, least: int) -> None:
    pieces = list(chunks(count, Bounds(max_chunk=most, min_chunk=least)))
    assert [i for rows in pieces for i in range(rows.start, rows.stop)] == list(range(count))
    assert all(min(least, count) <= rows.stop - rows.start <= most for rows in pieces if most > least)


def test_giving_memory_back_changes_no_number(
    nano_bundle: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(Bundle.read(nano_bundle("onnx", "int8")))
    pixels = np.random.default_rng(2).standard_normal((2, 24, 588)).astype(np.float32)
    rows, cols = positions((4, 6), 1)
    wanted = engine.encode(pixels, rows, cols)
    monkeypatch.setattr("penguin_edge.runtime.engines.onnxruntime.KEPT_PATCHES", 47)
    assert np.array_equal(engine.encode(pixels, rows, cols), wanted)


def test_a_processor_without_vnni_computes_the_same(
    nano_bundle: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.read(nano_bundle("onnx", "int8"))
    pixels = np.random.default_rng(1).standard_normal((1, 24, 588)).astype(np.float32)
    rows, cols = positions((4, 6), 1)
    wanted = open_engine(bundle).encode(pixels, rows, cols)
    monkeypatch.setattr("penguin_edge.runtime.engines.onnxruntime.int8_overflows", lambda: True)
    got = open_engine(bundle).encode(pixels, rows, cols)
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("target", "scheme", "precision", "says"),
    [
        (
            "executorch",
            {"bits": 4, "group": 64, "symmetric": False},
            "fp32",
            "XNNPACK takes int4 with symmetric groups",
        ),
        ("executorch", {"bits": 4}, "fp32", "XNNPACK takes int4 with symmetric groups"),
        ("executorch", {"bits": 4, "group": 16}, "fp32", "XNNPACK takes int4 with symmetric groups"),
        ("executorch", {"bits": 8, "group": 64}, "fp32", "XNNPACK takes int8 with one symmetric scale"),
        ("onnx", {"bits": 4, "group": 512}, "fp32", "MatMulNBits of ONNX Runtime takes groups of 16 to 256"),
        ("onnx", {"bits": 4, "group": 64, "activations": "token"}, "fp32", "only with 8-bit symmetric weights"),
        ("executorch", {"bits": 8, "activations": "block"}, "fp32", "XNNPACK rounds activations per token"),
        ("executorch", {"bits": 4, "group": 64}, "fp16", "beside fp16, but XNNPACK's quantized linears take fp32"),
    ],
)
def test_what_an_engine_cannot_compute_is_refused_by_name(
    target: str, scheme: dict[str, Any], precision: str, says: str
) -> None:
    with pytest.raises(InputError, match=r"decoder\.x: int") as error:
        TARGETS[target].check_scheme("decoder.x", Scheme(**scheme), precision)
    assert says in str(error.value)


def test_a_refused_recipe_leaves_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"decoder": {"bits": 4, "group": 64, "symmetric": False}}))
    out = tmp_path / "out"
    done = cli("export", "--model", "nano", "--target", "executorch", "--quant", recipe, "-o", out)
    assert done.returncode == 1 and "XNNPACK takes int4" in done.stderr and "Traceback" not in done.stderr
    assert not out.exists() and list(tmp_path.iterdir()) == [recipe]


def test_executorch_has_no_second_decoder(tmp_path: Path) -> None:
    done = cli("export", "--model", "nano", "--target", "executorch", "--quant", "int8-prefill", "-o", tmp_path / "o")
    assert done.returncode == 1 and "keeps the KV cache inside one graph" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_asymmetric_recipe_on_onnx(tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.json"
    scheme = {"bits": 4, "group": 32, "symmetric": False}
    recipe.write_text(
        json.dumps({"decoder": scheme, "lm_head": {"bits": 8}, "layers": {"decoder.layers.0.mlp.down_proj": None}})
    )
    out = tmp_path / "out"
    done = cli("export", "--model", "nano", "--quant", recipe, "--max-seq-len", 512, "-o", out)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.read(out).manifest
    assert manifest.precision == "mixed.json" and manifest.embedding_dtype == "fp32"
    done = cli("verify", out)
    assert done.returncode == 0, done.stdout + done.stderr
