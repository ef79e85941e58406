"""Calibrated quantization: GPTQ's integers, what is gathered for them, and bundles that are made with them."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import asked_pictures, tiny_model
from torch import nn

from penguin_edge.bundle.folder import Bundle
from penguin_edge.config import TextConfig
from penguin_edge.dataset.samples import NO_TARGET, Sample
from penguin_edge.errors import InputError
from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint
from penguin_edge.model.layers import Block, full_attention, rotary_angles
from penguin_edge.quantize.apply import chosen, quantize_part
from penguin_edge.quantize.calibration.builtin import PHOTOS
from penguin_edge.quantize.calibration.calibrate import (
    CalibrationOptions,
    calibrate,
    digest,
    read_calibration,
    read_integers,
    ready_from,
    stage_count,
    text_samples,
)
from penguin_edge.quantize.gptq import gptq
from penguin_edge.quantize.linear import Integers, QuantizedLinear, Scheme, bounds_of, quantize_weight
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.quantize.smooth import GROUPS, READ, apply_factors, awq_factor, smooth_factor

SCHEMES = [
    Scheme(4, 64, method="gptq"),
    Scheme(4, 32, symmetric=False, method="gptq"),
    Scheme(8, method="gptq"),
    Scheme(4, 16, method="gptq"),
]
GPTQ = Scheme(4, 64, method="gptq")
PICTURES = DEFAULT_TOKENIZER.parent / "pictures"


def layer(seed: int, rows: int = 48, inputs: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that depend on each other as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, 24, generator=generator) @ torch.randn(24, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), mixed + 0.3 * torch.randn(400, inputs, generator=generator)


def missed(weight: torch.Tensor, x: torch.Tensor, integers: Integers) -> float:
    return float((x @ (integers.weight() - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_products_are_off_by_less_than_half(scheme: Scheme) -> None:
    for seed in range(3):
        weight, x = layer(seed)
        plain, found = quantize_weight(weight, scheme), gptq(weight, x.T @ x, scheme)
        assert missed(weight, x, found) < 0.5 * missed(weight, x, plain)
        assert torch.equal(found.scales, plain.scales) and torch.equal(found.zeros, plain.zeros)
        lowest, top = bounds_of(scheme)
        assert int(found.levels.min()) >= lowest and int(found.levels.max()) <= top
        # Also on inputs of the same kind that it was not made from.
        other = layer(seed)[1].flip(0) * torch.linspace(0.5, 2, len(x))[:, None]
        assert missed(weight, other, found) < 0.6 * missed(weight, other, plain)


@pytest.mark.parametrize("hessian", [torch.eye(128), torch.zeros(128, 128), 7.0 * torch.eye(128)])
def test_inputs_that_say_nothing_of_each_other_leave_the_plain_integers(hessian: torch.Tensor) -> None:
    weight, _ = layer(0)
    assert torch.equal(gptq(weight, hessian, GPTQ).levels, quantize_weight(weight, GPTQ).levels)


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(1)
    whole = gptq(weight, x.T @ x, GPTQ)
    monkeypatch.setattr("penguin_edge.quantize.gptq.SLAB_WEIGHTS", 128 * 5)
    assert torch.equal(gptq(weight, x.T @ x, GPTQ).levels, whole.levels)


def test_activations_that_are_not_finite_are_named() -> None:
    weight, x = layer(0)
    x[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"decoder\.x: an activation"):
        gptq(weight, x.T @ x, GPTQ, "decoder.x")


# --- smoothing --------------------------------------------------------------------------------------------------------


def uneven_block() -> tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    """A block whose inputs have a few large channels, as language models have; an input, and the maxima it causes."""
    torch.manual_seed(0)
    block = Block(TextConfig(300, 128, 256, 1, 4, 2, 32)).eval()
    with torch.no_grad():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[::40] *= 60
        block.mlp.up_proj.weight[::50] *= 30
    maxima: dict[str, torch.Tensor] = {}
    for name in READ:

        def gather(module: nn.Module, inputs: tuple[torch.Tensor], name: str = name) -> None:
            maxima.setdefault(name, inputs[0].abs().flatten(0, -2).amax(0))

        block.get_submodule(name).register_forward_pre_hook(gather)
    return block, torch.randn(1, 40, 128), maxima


def run_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    angles = rotary_angles(torch.arange(x.shape[1]), 32, 1e6)
    angles = torch.cat((angles, angles), -1)
    with torch.no_grad():
        out: torch.Tensor = block(x, angles.cos(), angles.sin(), 0, full_attention(causal=True))
    return out


def row_rounded(block: nn.Module) -> nn.Module:
    for name, child in list(block.named_modules()):
        if isinstance(child, nn.Linear):
            integers = quantize_weight(child.weight, Scheme(8))
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, QuantizedLinear(integers, None, "row"))
    return block


def smooth(block: nn.Module, maxima: dict[str, torch.Tensor], strength: float) -> None:
    readers = {names[0]: [block.get_submodule(name).get_parameter("weight") for name in names] for _, names in GROUPS}
    apply_factors(block, {name: smooth_factor(weights, maxima[name], strength) for name, weights in readers.items()})


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothing_changes_nothing_until_activations_are_rounded(strength: float) -> None:
    block, x, maxima = uneven_block()
    wanted = run_block(block, x)
    plain = copy.deepcopy(block)
    values = block.self_attn.v_proj(block.input_layernorm(x)).detach()
    smooth(block, maxima, strength)
    assert torch.allclose(run_block(block, x), wanted, atol=1e-5 * float(wanted.abs().max()))
    # What is kept in a cache is the same: another graph goes on with it.
    again = block.self_attn.v_proj(block.input_layernorm(x)).detach()
    assert torch.allclose(again, values, atol=1e-5 * float(values.abs().max()))
    missed = [float((run_block(row_rounded(b), x) - wanted).norm() / wanted.norm()) for b in (plain, block)]
    if strength == 0.5:
        assert missed[1] < 0.5 * missed[0]


def test_channels_that_are_never_used_stay() -> None:
    block, x, _ = uneven_block()
    wanted = run_block(block, x)
    smooth(block, {name: torch.zeros(width) for name, width in zip(READ, (128, 128, 256), strict=True)}, 0.5)
    assert torch.equal(run_block(block, x), wanted)


def test_awq_finds_columns_that_matter() -> None:
    weight, x = layer(2)
    x[:, ::16] *= 30
    hessian, scheme = x.T @ x, Scheme(4, 64)
    factor = awq_factor([weight], [scheme], hessian)
    scaled = quantize_weight(weight * factor, scheme).weight() / factor
    plain = quantize_weight(weight, scheme).weight()

    def error(rounded: torch.Tensor) -> float:
        return float((x @ (rounded - weight).T).norm() / (x @ weight.T).norm())

    assert (factor > 0).all() and error(scaled) < 0.95 * error(plain)
    for nothing in (awq_factor([weight], [None], hessian), awq_factor([weight], [scheme], 0 * hessian)):
        assert torch.allclose(nothing, torch.ones(128))


def test_factors_are_of_what_the_model_reads(tiny: Checkpoint, samples: list[Sample], tmp_path: Path) -> None:
    recipe = Recipe(
        "r",
        encoder=Scheme(8),
        prefill=Scheme(8),
        smooth={"encoder": 0.5, "prefill": 0.7, "decoder": "awq"},
        lenient=True,
    )
    stages: list[str] = []
    calibrate(tiny, recipe, samples, tmp_path, stages.append)
    assert len(stages) == stage_count(tiny, images=True)
    model = tiny.load(dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for block in ("encoder.layers.0", "decoder.layers.0"):
        for name in READ:

            def gather(module: nn.Module, inputs: tuple[torch.Tensor], key: str = f"{block}.{name}") -> None:
                largest = inputs[0].abs().flatten(0, -2).amax(0)
                seen[key] = torch.maximum(seen[key], largest) if key in seen else largest

            model.get_submodule(f"{block}.{name}").register_forward_pre_hook(gather)
    with torch.no_grad():
        for sample in samples:
            model(torch.from_numpy(sample.input_ids)[None], model.visual(sample.visuals))
    ready = ready_from(tmp_path)
    for part, block, strength in (("encoder", "encoder", 0.5), ("prefill", "decoder", 0.7)):
        found = ready.factors(f"{part}.layers.0")
        for _, names in GROUPS:
            weights = [model.get_submodule(f"{block}.layers.0.{name}").get_parameter("weight") for name in names]
            wanted = smooth_factor(weights, seen[f"{block}.layers.0.{names[0]}"], strength)
            assert torch.allclose(found[names[0]], wanted, rtol=1e-3), (part, names[0])
    # Nothing is rounded to data in this recipe: no integers are kept.
    assert all(name.endswith(".factors.safetensors") for name in contents(tmp_path))
    before = contents(tmp_path)
    (tmp_path / "prefill.layers.1.factors.safetensors").unlink()
    calibrate(tiny, recipe, samples, tmp_path, lambda stage: None)
    assert contents(tmp_path) == before


def test_the_smoothed_preset_verifies_against_its_checkpoint(
    nano_bundle: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(nano_bundle("onnx", "int8-prefill"), tmp_path / "bundle")
    made = Bundle.read(folder).manifest.quantization["calibration"]
    assert made["source"] == "builtin" and made["samples"] == 64 and made["images"] == 32
    assert 32 * 512 < made["tokens"] < 64 * 512
    done = cli("verify", folder, "--against", "nano")
    assert done.returncode == 0, done.stdout + done.stderr


# --- walking a model --------------------------------------------------------------------------------------------------

RECIPE = Recipe("r", encoder=GPTQ, projector=GPTQ, decoder=GPTQ, lm_head=Scheme(8), lenient=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with questions, in the training format."""
    return asked_pictures(tmp_path_factory.mktemp("calibration"), 8)


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.open("tiny", random_weights=True, note=lambda line: None)


@pytest.fixture(scope="module")
def samples(data: Path, tiny: Checkpoint) -> list[Sample]:
    return read_calibration(CalibrationOptions(str(data), samples=5, length=200), tiny)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_every_layer_gets_its_integers_and_a_stopped_run_goes_on(
    tiny: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    stages: list[str] = []
    made_for = calibrate(tiny, RECIPE, samples, tmp_path, stages.append)
    first = contents(tmp_path)
    linears = [name for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)]
    # The head is not calibrated; 16 or 32 divides none of the 588 inputs of the patch embedding.
    wanted = {f"{name}.safetensors" for name in linears} - {
        "decoder.lm_head.safetensors", "encoder.patch_embedding.safetensors",
    }  # fmt: skip
    assert set(first) == wanted
    assert stages[0] == "encoder.patch_embedding" and stages[-1] == "decoder.lm_head"
    assert len(stages) == stage_count(tiny, images=True)
    for name in list(first)[::3]:
        (tmp_path / name).unlink()
    assert calibrate(tiny, RECIPE, samples, tmp_path, lambda stage: None) == made_for
    assert contents(tmp_path) == first
    # Integers of other data are no use.
    assert calibrate(tiny, RECIPE, samples[:2], tmp_path, lambda stage: None) != made_for
    assert set(contents(tmp_path)) == set(first) and contents(tmp_path) != first


def test_the_inputs_are_those_of_the_model(tiny: Checkpoint, samples: list[Sample], tmp_path: Path) -> None:
    """First block of the encoder and of the decoder: gathered here with the model's own forward."""
    calibrate(tiny, RECIPE, samples, tmp_path, lambda stage: None)
    model, plain, ready = tiny.load(dtype=torch.float32), tiny.load(dtype=torch.float32), ready_from(tmp_path)
    # What comes before a block is quantized when its inputs are gathered.
    quantize_part(model, "encoder", RECIPE, "float", ready)
    quantize_part(model, "projector", RECIPE, "float", ready)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("encoder.layers.0.self_attn.q_proj", "decoder.layers.0.self_attn.v_proj"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
    with torch.no_grad():
        for sample in samples:
            model(torch.from_numpy(sample.input_ids)[None], model.visual(sample.visuals))
    for name, inputs in seen.items():
        rows, layer = torch.cat(inputs), plain.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        scheme, _ = chosen(RECIPE, name, layer.in_features)
        assert scheme is not None
        wanted = gptq(layer.weight, rows.T @ rows, scheme)
        found = read_integers(tmp_path / f"{name}.safetensors", scheme)
        # Sums come in another order; a weight at the border of two levels may go the other way.
        assert (found.levels != wanted.levels).float().mean() < 0.01, name
        assert (found.levels != quantize_weight(layer.weight, scheme).levels).float().mean() > 0.1, name


def test_the_digest_knows_data_recipe_and_weights(tiny: Checkpoint, samples: list[Sample]) -> None:
    other = Checkpoint.open("tiny", random_weights=True, seed=1, note=lambda line: None)
    found = {
        digest(tiny, RECIPE, samples),
        digest(tiny, RECIPE, samples[:-1]),
        digest(tiny, Recipe("r", decoder=GPTQ), samples),
        digest(other, RECIPE, samples),
    }
    assert len(found) == 4 and digest(tiny, RECIPE, list(samples)) in found


def test_pieces_of_text_are_drawn_by_the_seed() -> None:
    def draw(seed: int, count: int = 3) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        found = text_samples(range(1000), samples=count, length=50, rng=rng, name="t")
        return [sample.input_ids.tolist() for sample in found]

    assert draw(0) == draw(0) != draw(1)
    assert all(piece == list(range(piece[0], piece[0] + 50)) and piece[0] % 50 == 0 for piece in draw(2, 20))
    assert len(draw(0, 99)) == 20


def test_the_builtin_set_has_pictures_for_models_that_see(tiny: Checkpoint) -> None:
    def read(seed: int = 0, checkpoint: Checkpoint = tiny, **more: int) -> list[Sample]:
        return read_calibration(
            CalibrationOptions("builtin", seed=seed, **{"samples": 15, "length": 192, **more}), checkpoint
        )

    found = read()
    pictures = [sample for sample in found if sample.visuals]
    assert len(found) == 15 and len(pictures) == 8
    assert digest(tiny, RECIPE, found) == digest(tiny, RECIPE, read()) != digest(tiny, RECIPE, read(seed=1))
    # Six photographs in turn, each a crop of its own at its own size.
    assert (
        {sample.id.split(":")[1] for sample in pictures}
        == set(PHOTOS)
        == {path.stem for path in PICTURES.glob("*.jpg")}
    )
    assert len({sample.visuals[0].grid for sample in pictures}) > 3
    for sample in pictures:
        [visual] = sample.visuals
        assert 64 * 0.8 <= visual.tokens <= len(sample.input_ids) <= 192
        assert int((sample.input_ids == tiny.config.image_token_id).sum()) == visual.tokens
        assert (sample.labels != NO_TARGET).sum() > 8
    blind = copy.copy(tiny)
    blind.config = dataclasses.replace(tiny.config, vision=None)
    texts = read(checkpoint=blind)
    assert len(texts) == 15 and not any(sample.visuals for sample in texts)
    assert {tuple(sample.input_ids) for sample in found if not sample.visuals} <= {tuple(s.input_ids) for s in texts}
    with pytest.raises(InputError, match="40 tokens a sample leave 0 for a picture"):
        read(length=40)


def test_the_builtin_pictures_calibrate_an_encoder(tiny: Checkpoint, tmp_path: Path) -> None:
    found = read_calibration(CalibrationOptions("builtin", samples=4, length=192), tiny)
    recipe = Recipe("r", encoder=GPTQ, projector=GPTQ, smooth={"encoder": 0.5}, lenient=True)
    calibrate(tiny, recipe, found, tmp_path, lambda stage: None)
    assert "encoder.layers.0.mlp.up_proj.safetensors" in contents(tmp_path)
    assert "encoder.layers.0.factors.safetensors" in contents(tmp_path)


# --- the command line -------------------------------------------------------------------------------------------------


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def recipe_file(folder: Path, **parts: Any) -> Path:
    path = folder / "gptq.json"
    path.write_text(json.dumps(parts))
    return path


def test_export_verifies_and_says_what_it_read(data: Path, tmp_path: Path) -> None:
    scheme = {"bits": 4, "group": 64, "method": "gptq"}
    recipe = recipe_file(tmp_path, projector=scheme, decoder=scheme)
    out = tmp_path / "out"
    common = ("--model", "nano", "--quant", recipe, "--max-seq-len", 512, "-o", out)
    done = cli("export", *common, "--calibration", data, "--calibration-samples", 6)
    assert done.returncode == 0, done.stderr
    made = Bundle.read(out).manifest.quantization["calibration"]
    assert made["samples"] == made["images"] == 6 and made["tokens"] > 6 * 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq.json", "out"]
    done = cli("verify", out, "--against", "nano", "--calibration", data)
    assert done.returncode == 0, done.stdout + done.stderr
    done = cli("verify", out, "--against", "nano")
    assert done.returncode == 1 and "--calibration" in done.stderr
    (tmp_path / "other.jsonl").write_text(
        "\n".join((data / "annotations.jsonl").read_text().replace("What", "Where").splitlines()[:6])
    )
    for seed in range(8):
        (tmp_path / f"{seed}.png").write_bytes((data / f"{seed}.png").read_bytes())
    done = cli("verify", out, "--against", "nano", "--calibration", tmp_path / "other.jsonl")
    assert done.returncode == 1 and "is not what the bundle was calibrated with" in done.stderr


def test_bad_calibration_data(tiny: Checkpoint, data: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    for name, says in (
        ("none.txt", "cannot be read"),
        ("short.txt", "wanted at least 512"),
        ("binary.txt", "is not UTF-8"),
        ("empty.jsonl", "no record in it"),
        ("folder", "annotations.jsonl"),
    ):
        with pytest.raises(InputError, match=says):
            read_calibration(CalibrationOptions(str(tmp_path / name)), tiny)
    with pytest.raises(InputError, match="model_max_length is 4"):
        read_calibration(CalibrationOptions(str(data), length=4), tiny)


def test_text_alone_cannot_calibrate_an_encoder(tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text without any picture " * 100)
    texts = read_calibration(CalibrationOptions(str(tmp_path / "text.txt"), length=64), tiny)
    with pytest.raises(InputError, match=r"encoder\.\S+: int4 .* gptq reads images"):
        calibrate(tiny, RECIPE, texts, tmp_path / "work", lambda stage: None)
    assert not (tmp_path / "work").exists()
    calibrate(tiny, Recipe("r", decoder=GPTQ, lenient=True), texts, tmp_path / "work", lambda stage: None)
    assert all(name.startswith("decoder.layers") for name in contents(tmp_path / "work"))


def test_refused_calibrations_leave_nothing(data: Path, tmp_path: Path) -> None:
    scheme = {"bits": 4, "group": 64, "method": "gptq"}
    recipe = recipe_file(tmp_path, decoder=scheme)
    smooth, seeing, text = tmp_path / "smooth.json", tmp_path / "seeing.json", tmp_path / "text.txt"
    text.write_text("a text without any picture " * 300)
    blind = {"encoder.patch_embedding": None}
    smooth.write_text(json.dumps({"encoder": {"bits": 8}, "smooth": {"encoder": 0.5}, "layers": blind}))
    seeing.write_text(json.dumps({"encoder": scheme, "layers": blind}))
    for more, says in (
        (("--quant", seeing, "--calibration", text), "leave out --calibration for the built-in pictures"),
        (("--quant", smooth, "--calibration", text), "smoothing reads images, and the calibration data has none"),
        (("--quant", recipe, "--calibration", tmp_path / "none.txt"), "cannot be read"),
        (("--quant", "int4", "--calibration", data), "none of its schemes reads calibration data"),
    ):
        done = cli("export", "--model", "nano", "-o", tmp_path / "out", *more)
        assert done.returncode == 1 and "Traceback" not in done.stderr and says in done.stderr, done.stderr
        assert set(tmp_path.iterdir()) == {recipe, smooth, seeing, text}
