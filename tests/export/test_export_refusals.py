"""What must never become a bundle: weights that are not finite, and models that an engine cannot compute."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import config, make, weights

from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.export.pipeline import ExportOptions, check_options
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.export.worker import _write_embedding
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.quantize.apply import load_quantized
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.recipe import PRESETS, Recipe, find_recipe

PRECISIONS = ["fp32", "fp16", "int8", "int4"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plain") / "model", tied=True)


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, note=[].append)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_number_that_is_not_finite_is_named(
    plain: Path, tmp_path: Path, precision: str, value: float, name: str
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    weights(lambda tensors: tensors[name].view(-1)[-1:].fill_(value))(folder)
    with pytest.raises(CheckpointError, match=rf"{name} holds a number that is NaN or infinite"):
        load_quantized(opened(folder), ("decoder",), PRESETS[precision], "block")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_nor_is_it_written_as_a_table(plain: Path, tmp_path: Path, dtype: str) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    weights(lambda tensors: tensors["model.embed_tokens.weight"][639].fill_(torch.nan))(folder)
    with pytest.raises(CheckpointError, match="embed_tokens"):
        _write_embedding(opened(folder), tmp_path, dtype, PRESETS["int4"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_number_that_fp16_cannot_hold_is_named_behind_quantization_too(plain: Path, tmp_path: Path) -> None:
    """Beside quantized layers the rest is loaded as stored, and rounded to fp16 afterwards."""
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    weights(lambda tensors: tensors["model.layers.1.input_layernorm.weight"][3].fill_(1e6))(folder)
    recipe = Recipe("r", precision="fp16", decoder=Scheme(8))
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm\.weight: a number becomes infinite in fp16"):
        load_quantized(opened(folder), ("decoder",), recipe, "block")
    with pytest.raises(CheckpointError, match="which float16 cannot hold"):
        load_quantized(opened(folder), ("decoder",), PRESETS["fp16"], "block")
    load_quantized(opened(folder), ("decoder",), PRESETS["int8"], "block")


def test_the_export_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    weights(lambda tensors: tensors["model.embed_tokens.weight"][639].fill_(torch.nan))(folder)
    done = cli("export", "--model", folder, "--max-seq-len", 128, "--no-verify", "-o", tmp_path / "out")
    assert done.returncode == 1 and "model.embed_tokens.weight holds" in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("head_dim", [2, 8, 20, 24])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_head_that_the_engine_cannot_turn_is_refused_first(tmp_path: Path, head_dim: int, precision: str) -> None:
    checkpoint = opened(make(tmp_path / "model", head_dim=head_dim))
    options = ExportOptions("onnx", PRESETS[precision], max_seq_len=128)
    with pytest.raises(InputError, match=rf"head_dim is {head_dim}, but GroupQueryAttention .* multiples of 16"):
        check_options(checkpoint, TARGETS["onnx"], options)
    if precision == "fp32":
        check_options(checkpoint, TARGETS["executorch"], options)


def test_a_recipe_that_quantizes_nothing_is_its_precision(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "half.json").write_text(json.dumps({"precision": "fp16"}))
    assert find_recipe(str(tmp_path / "none.json")).label == "fp32"
    out = tmp_path / "out"
    recipe = tmp_path / "half.json"
    done = cli("export", "--model", plain, "--quant", recipe, "--max-seq-len", 128, "-o", out)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.read(out).manifest
    assert manifest.precision == "fp16" and manifest.graphs["decoder"].precision == "fp16"
    assert cli("verify", out).returncode == 0
    assert cli("verify", out, "--against", plain).returncode == 0


def test_a_configuration_with_absurd_sizes_is_refused_at_once(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    for changes in ({"num_hidden_layers": 2**40}, {"num_hidden_layers": 100_000}, {"hidden_size": 2**40}):
        config(**changes)(folder)
        with pytest.raises(CheckpointError, match=next(iter(changes))):
            opened(folder)
