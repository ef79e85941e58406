"""Per-layer errors of a quantized model, the encoder's features, and `eval --layers`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLIP, picture, tiny_model
from PIL import Image
from torch import nn

from penguin_edge.commands.cli import parser
from penguin_edge.dataset.samples import Sample
from penguin_edge.errors import InputError, PenguinError
from penguin_edge.evaluation.layer_study import draw_layers, feature_cosines, picture_size, split_name, summary, worst
from penguin_edge.media.preprocess import preprocess_image
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.eager import EagerEngine
from penguin_edge.quantize.apply import load_quantized, quantize_part
from penguin_edge.quantize.calibration.calibrate import (
    BUILTIN,
    CalibrationOptions,
    calibrate,
    read_calibration,
    ready_from,
)
from penguin_edge.quantize.linear import QuantizedLinear, Scheme
from penguin_edge.quantize.recipe import PRESETS, Recipe
from penguin_edge.quantize.search.layer_errors import Distance, LayerError, layer_errors

MEDIA = CLIP.parent


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.open("tiny", note=lambda line: None)


@pytest.fixture(scope="module")
def samples(tiny: Checkpoint) -> list[Sample]:
    return read_calibration(CalibrationOptions(BUILTIN, 4, 192), tiny)


def measured(checkpoint: Checkpoint, recipe: Recipe, samples: list[Sample], **more: Any) -> dict[str, LayerError]:
    rows = layer_errors(checkpoint, recipe, more.get("activations", "float"), more.get("ready"), samples, quiet)
    assert len({row.layer for row in rows}) == len(rows)
    return {row.layer: row for row in rows}


def test_a_distance_by_hand() -> None:
    distance = Distance()
    distance.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    distance.add(torch.tensor([[2.0]]), torch.tensor([[2.0]]))
    assert distance.cosine == pytest.approx(5 / math.sqrt(9 * 5))
    assert distance.snr_db == pytest.approx(10 * math.log10(5 / 4))
    same = Distance()
    same.add(torch.ones(3), torch.ones(3))
    assert same.cosine == 1 and same.snr_db is None and Distance().cosine == 1


def test_an_unquantized_model_is_exact(tiny: Checkpoint, samples: list[Sample]) -> None:
    rows = measured(tiny, PRESETS["fp32"], samples)
    assert set(rows) == {name for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)}
    assert {(r.scheme, r.cosine, r.snr_db, r.own_cosine, r.own_snr_db) for r in rows.values()} == {
        ("not quantized", 1.0, None, 1.0, None)
    }


def test_eight_bits_are_nearer_than_four(tiny: Checkpoint, samples: list[Sample]) -> None:
    coarse, fine = (measured(tiny, PRESETS[name], samples, activations="block") for name in ("int4", "int8"))
    assert set(coarse) == set(fine)
    for name, row in coarse.items():
        if row.scheme == "not quantized":
            assert row.own_snr_db is fine[name].own_snr_db is None
            continue
        assert row.snr_db and row.own_snr_db and fine[name].snr_db and fine[name].own_snr_db
        # A bit is 6 dB; what rounds the activations to 8 bits is the same in both.
        assert fine[name].own_snr_db > row.own_snr_db + 6 and row.own_cosine < fine[name].own_cosine < 1
        assert fine[name].snr_db > row.snr_db + 6 and row.cosine < fine[name].cosine < 1


def test_errors_are_those_of_the_models_own_forward(tiny: Checkpoint, samples: list[Sample]) -> None:
    """Some layers, recomputed from hooks on two whole models."""
    recipe = Recipe("r", encoder=Scheme(8), decoder=Scheme(4, 32), lm_head=Scheme(8), embedding="int8", lenient=True)
    rows = measured(tiny, recipe, samples, activations="token")
    plain = tiny.load(dtype=torch.float32)
    model, _ = load_quantized(tiny, ("encoder", "projector", "embedding", "decoder"), recipe, "token")
    names = ["encoder.layers.1.mlp.down_proj", "projector.readout.0", "decoder.layers.1.self_attn.k_proj"]
    seen: dict[tuple[str, bool], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for one in (plain, model):
        for name in names:
            one.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, key=(name, one is model): seen.setdefault(key, []).append(
                    (inputs[0], output)
                )
            )
        with torch.no_grad():
            for sample in samples:
                one(torch.from_numpy(sample.input_ids)[None], one.visual(sample.visuals))
    for name in names:
        wanted = torch.cat([output.flatten() for _, output in seen[name, False]])
        got = torch.cat([output.flatten() for _, output in seen[name, True]])
        layer = model.get_submodule(name)
        with torch.no_grad():
            own = torch.cat([layer(x).flatten() for x, _ in seen[name, False]])
        for found, snr, cosine in (
            (got, rows[name].snr_db, rows[name].cosine),
            (own, rows[name].own_snr_db, rows[name].own_cosine),
        ):
            missed = float((found - wanted).square().sum() / wanted.square().sum())
            if isinstance(layer, QuantizedLinear) or found is got:
                assert snr == pytest.approx(-10 * math.log10(missed), abs=0.05), name
            else:
                assert snr is None and missed == 0
            assert cosine == pytest.approx(float(nn.functional.cosine_similarity(found, wanted, dim=0)), abs=1e-6)
    assert rows["decoder.lm_head"].own_snr_db is not None


def test_smoothing_is_taken_out_again(tiny: Checkpoint, samples: list[Sample], tmp_path: Path) -> None:
    """With so small an own error that a factor left in would drown it."""
    recipe = Recipe(
        "r",
        encoder=Scheme(8),
        decoder=Scheme(8),
        prefill=Scheme(8),
        smooth={"encoder": 0.5, "prefill": 0.8},
        lenient=True,
    )
    calibrate(tiny, recipe, samples, tmp_path, lambda stage: None)
    rows = measured(tiny, recipe, samples, ready=ready_from(tmp_path))
    assert {name.partition(".")[0] for name in rows} == {"encoder", "projector", "prefill", "decoder"}
    for name, row in rows.items():
        if row.scheme != "not quantized":
            assert row.own_cosine > 0.9999 and row.own_snr_db is not None and row.own_snr_db > 30, name
    # The factors are no decoration: rounded without them, the same layers have other errors.
    plain = measured(tiny, replace(recipe, smooth={}), samples)
    for name in ("encoder.layers.0.mlp.down_proj", "prefill.layers.0.self_attn.q_proj"):
        assert plain[name].own_snr_db != rows[name].own_snr_db
    assert plain["decoder.layers.0.mlp.up_proj"].own_snr_db == rows["decoder.layers.0.mlp.up_proj"].own_snr_db


def test_half_precision_is_measured_too(tiny: Checkpoint, samples: list[Sample]) -> None:
    rows = measured(tiny, PRESETS["fp16"], samples)
    assert all(row.own_snr_db is not None and 50 < row.own_snr_db < 90 for row in rows.values())


def test_text_alone_leaves_the_encoder_out(tiny: Checkpoint, samples: list[Sample]) -> None:
    texts = [sample for sample in samples if not sample.visuals]
    assert texts and all(name.startswith("decoder.") for name in measured(tiny, PRESETS["int8"], texts))


def test_outputs_that_are_not_finite_are_named(tiny: Checkpoint, samples: list[Sample]) -> None:
    broken = Checkpoint.open("tiny", note=lambda line: None)
    wanted = "decoder.layers.1.mlp.up_proj.weight"
    tensor = broken.tensor
    broken.tensor = lambda name, *rest: tensor(name, *rest) * (math.nan if name == wanted else 1)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"decoder\.layers\.1\.mlp\.up_proj: an output is NaN"):
        measured(broken, PRESETS["fp32"], samples)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("shape", [(84, 112), (318, 480), (30, 900), (712, 1032)])
def test_pictures_are_as_large_as_allowed(shape: tuple[int, int], merge: int) -> None:
    for patches in (64, 256, 1024, 2048):
        height, width = picture_size(np.zeros((*shape, 3), np.uint8), patches, merge)
        assert height % (14 * merge) == width % (14 * merge) == 0
        assert patches * 0.6 <= height * width / 196 <= patches


def test_features_by_hand() -> None:
    reference = EagerEngine(tiny_model(), max_seq_len=1)
    checkpoint = Checkpoint.open("tiny", note=lambda line: None)
    coarse = checkpoint.load(("encoder",), dtype=torch.float32)
    quantize_part(coarse, "encoder", PRESETS["int4"], "block")
    pictures = [picture(0), np.asarray(Image.open(MEDIA / "desert_480.jpg"))]
    calls: list[tuple[int, int]] = []
    rows = feature_cosines(
        EagerEngine(coarse, max_seq_len=1), reference, pictures, (64, 256, 10**6), lambda *at: calls.append(at)
    )
    assert [row["patches"] for row in rows] == [64, 256] and calls[-1] == (4, 4)
    found = []
    for image in pictures:
        item = preprocess_image(image, reference.config.image, 1, picture_size(image, 256, 1))
        inputs = (torch.from_numpy(item.pixels)[None], torch.from_numpy(item.rows), torch.from_numpy(item.cols))
        with torch.no_grad():
            found.append(nn.functional.cosine_similarity(coarse.encode(*inputs), tiny_model().encode(*inputs), -1)[0])
    wanted = torch.cat(found)
    assert len(wanted) > 400 and float(wanted.mean()) < 0.999 and rows[1]["pictures"] == 2
    assert rows[1]["cosine_mean"] == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert rows[1]["cosine_min"] == pytest.approx(float(wanted.min()), abs=1e-5)
    for row in feature_cosines(reference, reference, pictures, (64,)):
        assert row["cosine_mean"] == pytest.approx(1, abs=1e-12) and row["cosine_min"] == pytest.approx(1, abs=1e-12)


# --- the report -------------------------------------------------------------------------------------------------------


def row(layer: str, snr: float | None, own: float | None = 40.0) -> dict[str, Any]:
    return {"layer": layer, "scheme": "s", "cosine": 0.5, "snr_db": snr, "own_cosine": 0.9, "own_snr_db": own}


def test_tables() -> None:
    assert split_name("decoder.layers.12.self_attn.q_proj") == ("decoder", 12, "q_proj")
    assert split_name("projector.readout.0") == ("projector", None, "readout.0")
    rows = [
        row("decoder.layers.0.mlp.up_proj", 10.0),
        row("decoder.layers.1.mlp.up_proj", 20.0),
        row("x.y", None, None),
    ]
    assert summary(rows)[1] == ("decoder up_proj", "2", "s", "40.0", "40.0", "15.0", "10.0", "0.50000")
    assert summary(rows)[2][3:7] == ("exact",) * 4
    assert [line[0] for line in worst(rows)[1:]] == ["decoder.layers.0.mlp.up_proj", "decoder.layers.1.mlp.up_proj"]


def test_the_picture_takes_any_model(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for rows in (
        [row("decoder.layers.0.mlp.up_proj", None, None), row("decoder.lm_head", None, None)],
        [
            row(f"{part}.layers.{i}.mlp.up_proj", 30.0 - i)
            for part in ("encoder", "prefill", "decoder")
            for i in range(40)
        ],
    ):
        draw_layers(rows, path)
        assert Image.open(path).size[0] > 600
    with pytest.raises(InputError, match="cannot write the picture"):
        draw_layers(rows, tmp_path / "none" / "x.png")


# --- the command line -------------------------------------------------------------------------------------------------


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_a_bundle_is_reported(nano_bundle: Callable[[str, str], Path], tmp_path: Path) -> None:
    bundle, drawn, text = nano_bundle("onnx", "int8-prefill"), tmp_path / "layers.png", tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the rain. " * 60)
    few = ("--pieces", 1, "--length", 128)
    done = cli(bundle, "--layers", "--against", "nano", "--text", text, *few, "--json", "-o", drawn)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Image.open(drawn).format == "PNG"
    layers = {row["layer"]: row for row in found["layers"]}
    table = json.loads((bundle / "bundle.json").read_text())["quantization"]["layers"]
    assert set(layers) == {entry["layer"] for entry in table}
    assert {name for name, row in layers.items() if row["scheme"] == "not quantized"} == {"encoder.patch_embedding"}
    assert layers["encoder.patch_embedding"]["snr_db"] is None
    assert (found["samples"], found["images"]) == (2, 1) and found["recipe"] == "int8-prefill"
    assert [row["patches"] for row in found["features"]] == [64, 256, 1024, 2048]
    assert all(0.95 < row["cosine_min"] <= row["cosine_mean"] < 1 for row in found["features"])


def test_a_recipe_is_tried_without_a_bundle(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
    record = {"id": "0", "image": ["0.png"], "conversations": turns}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(record))
    done = cli("nano", "--layers", "--quant", "int8", "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "decoder down_proj" in done.stdout and "1 samples" in done.stdout and "worst layers" in done.stdout
    assert "encoder features" in done.stdout


def test_bad_input_is_one_sentence(
    nano_bundle: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = nano_bundle("onnx", "int8")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    against = (bundle, "--layers", "--against", "nano")
    for arguments, says in (
        ((bundle, "--layers"), "name it with --against"),
        (("nano", "--layers", "--against", "nano"), "is no bundle"),
        ((bundle, "--layers", "--against", "tiny"), "a model of another shape"),
        ((bundle, "--layers", "--quant", "int4"), "leave out --quant"),
        (("nano", "--layers", "--quant", "int5"), "unknown quantization"),
        (("nano", "--layers", "--quant", "int4", "--against", "nano"), "leave out --against"),
        ((*against, "--text", tmp_path / "none.txt"), "cannot be read"),
        ((*against, "--text", tmp_path / "binary.txt"), "is not UTF-8"),
        ((*against, "--text", tmp_path / "short.txt"), "wanted at least 512"),
        ((*against, "--data", tmp_path), "no such file"),
        ((*against, "--length", 20), "for a picture"),
        ((*against, "--calibration", tmp_path / "short.txt"), "leave out --calibration"),
        ((*against, "-o", tmp_path / "none" / "x.png"), "cannot write the picture"),
        ((*against, "--over", "x"), "--over is about questions"),
        (("nano", "--text", tmp_path / "short.txt", "--quant", "int4"), "--quant is about layers"),
    ):
        args = parser().parse_args(["eval", *map(str, arguments)])
        with pytest.raises(PenguinError) as error:
            args.run(args)
        assert says in str(error.value) and "\n" not in str(error.value)
        assert not capsys.readouterr().out
    done = cli(*against, "--text", tmp_path / "binary.txt")
    assert done.returncode == 1 and "is not UTF-8" in done.stderr and "Traceback" not in done.stderr
    assert cli(bundle, "--text", tmp_path / "short.txt", "--data", tmp_path).returncode == 2
