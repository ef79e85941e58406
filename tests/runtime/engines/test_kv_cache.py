"""KV caches in less than fp32: what is rounded, the scales, and that the ONNX engine's cache holds the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Alone

from penguin_edge.bundle.contract import EMBEDDING, KV_SCALES, signature
from penguin_edge.bundle.folder import Bundle, finish
from penguin_edge.bundle.manifest import GraphEntry, Manifest
from penguin_edge.config import PRESETS
from penguin_edge.dataset.samples import Sample
from penguin_edge.errors import BundleError, InputError
from penguin_edge.export.pipeline import ExportOptions, check_options, kv_bytes
from penguin_edge.export.targets.executorch.programs import ExecutorchTarget
from penguin_edge.export.targets.onnx.graphs import OnnxTarget
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.decoder import KVForm
from penguin_edge.model.eager import EagerEngine
from penguin_edge.model.layers import full_attention
from penguin_edge.quantize.apply import kv_form
from penguin_edge.quantize.calibration.calibrate import calibrate, ready_from
from penguin_edge.quantize.recipe import PRESETS as RECIPES
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from penguin_edge.runtime.engines.opening import open_engine

TINY = PRESETS["tiny"]
LENGTH = 48
INT8 = replace(RECIPES["fp32"], kv="int8")


def samples(count: int = 3) -> list[Sample]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 500, 20 + index) for index in range(count)]
    return [Sample(f"{index}", ids, ids, ()) for index, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("tiny", note=lambda line: None)


@pytest.fixture(scope="module")
def scales(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    work = tmp_path_factory.mktemp("work") / "kv"
    calibrate(checkpoint, INT8, samples(), work, lambda stage: None)
    return ready_from(work).kv_scales(TINY.text.num_hidden_layers)


def test_int8_keeps_what_a_channel_can_hold() -> None:
    scales = torch.tensor([0.5, 2.0]).view(1, 1, 1, 2)
    x = torch.tensor([[0.2, 0.9], [0.26, -1.1], [63.6, -300.0], [-80.0, 256.0]]).view(1, 1, 4, 2)
    wanted = torch.tensor([[0.0, 0.0], [0.5, -2.0], [63.5, -256.0], [-64.0, 254.0]]).view(1, 1, 4, 2)
    assert torch.equal(KVForm("int8", scales).stored(0, x), wanted)


def test_scales_are_those_of_the_largest_keys_and_values(checkpoint: Checkpoint, scales: torch.Tensor) -> None:
    model = checkpoint.load(("decoder", "embedding"), dtype=torch.float32)
    assert model.decoder is not None
    text, found = TINY.text, torch.zeros(2 * TINY.text.num_hidden_layers, TINY.text.num_key_value_heads, 32)
    causal = full_attention(causal=True)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for index, values in ((layer, k), (layer + text.num_hidden_layers, v)):
            found[index] = torch.maximum(found[index], values[0].abs().amax(1))
        return causal(layer, q, k, v)

    with torch.no_grad():
        for sample in samples():
            embeds = model.splice(torch.from_numpy(sample.input_ids)[None], None)
            model.decoder(embeds, torch.arange(embeds.shape[1]), attend)
    assert scales.shape == (2 * text.num_hidden_layers, text.num_key_value_heads, 1, text.head_dim)
    torch.testing.assert_close(scales[:, :, 0] * 127, found, rtol=1e-5, atol=1e-6)


def exported(checkpoint: Checkpoint, form: KVForm, folder: Path) -> Bundle:
    """The decoder with its cache, and a table that is not read."""
    target, model = OnnxTarget(), checkpoint.load(("decoder",), dtype=torch.float32)
    assert model.decoder is not None
    model.decoder.kv_form = form
    bounds = target.bounds(LENGTH)
    folder.mkdir()
    inputs, outputs = signature("decoder", TINY, bounds)
    file = target.export_part("decoder", model, bounds, folder).file
    np.zeros((TINY.text.vocab_size, TINY.text.hidden_size), np.float32).tofile(folder / EMBEDDING)
    entry = GraphEntry(file, "fp32", tuple(inputs), tuple(outputs))
    return finish(folder, Manifest(TINY, {}, "onnx", "fp32", bounds, {"decoder": entry}, "fp32", form.dtype, {}, {}))


@pytest.mark.parametrize(
    ("dtype", "near"),
    [
        # The order of sums; no key or value of this prompt lies at the border of two levels.
        ("int8", 1e-4),
        # The engine multiplies in fp16, too, where the reference rounds only what it stores.
        ("fp16", 1e-2),
    ],
)
def test_the_engines_cache_is_the_references(
    checkpoint: Checkpoint, scales: torch.Tensor, tmp_path: Path, dtype: str, near: float
) -> None:
    form = KVForm("int8", scales) if dtype == "int8" else KVForm("fp16")
    engine = Alone(open_engine(exported(checkpoint, form, tmp_path / "bundle"), threads=1))
    model = checkpoint.load(("decoder", "embedding"), dtype=torch.float32)
    assert model.decoder is not None
    plain = Alone(EagerEngine(model, max_seq_len=LENGTH))
    model.decoder.kv_form = form
    rounded = Alone(EagerEngine(model, max_seq_len=LENGTH))
    embeds = plain.embed(samples(1)[0].input_ids)
    got, wanted, exact = [], [], []
    # Chunks, single positions, and a prefix that is used again; without gaps between positions, then with them.
    for gaps in (np.zeros(16, np.int64), np.cumsum(np.arange(16) % 3 == 2) * 4):
        for begin, end in ((0, 7), (7, 8), (8, 16), (10, 14), (14, 15)):
            positions = np.arange(begin, end) + gaps[begin:end]
            for engine_, rows in ((engine, got), (rounded, wanted), (plain, exact)):
                engine_.truncate(min(begin, engine_.length))
                rows.append(engine_.forward(embeds[begin:end], np.array([-1]), positions)[0])
    difference = np.abs(np.array(got) - np.array(wanted)).max() / np.abs(wanted).max()
    assert difference <= near
    # And the cache is what makes a difference to fp32, or this test would see nothing.
    lost = np.abs(np.array(exact) - np.array(wanted)).max() / np.abs(wanted).max()
    assert lost > (10 * difference if dtype == "int8" else 1e-5)


@pytest.mark.parametrize(
    ("dtype", "near"),
    [
        # Each engine computes its own keys: one at the border of two levels is a whole level apart, and stays so.
        ("int8", 1e-3),
        # As above: the engine multiplies in fp16.
        ("fp16", 1e-2),
    ],
)
def test_a_moved_cache_is_the_references(
    checkpoint: Checkpoint, scales: torch.Tensor, tmp_path: Path, dtype: str, near: float
) -> None:
    form = KVForm("int8", scales) if dtype == "int8" else KVForm("fp16")
    engine = Alone(open_engine(exported(checkpoint, form, tmp_path / "bundle"), threads=1))
    model = checkpoint.load(("decoder", "embedding"), dtype=torch.float32)
    assert model.decoder is not None
    model.decoder.kv_form = form
    eager = Alone(EagerEngine(model, max_seq_len=LENGTH))
    assert engine.can_move
    embeds = eager.embed(np.random.default_rng(3).integers(0, 500, LENGTH))
    found = []
    for one in (engine, eager):
        rows = []
        one.forward(embeds, np.empty(0, np.int64))
        # An overlap from a full cache, one after the other, a gap, and a single last position.
        for begin, end, to in ((7, 48, 1), (5, 42, 4), (30, 40, 12), (21, 22, 20)):
            one.move(begin, end, to)
            rows.append(one.forward(embeds[:2], np.array([0, 1])))
        found.append(np.concatenate(rows))
    assert np.abs(found[0] - found[1]).max() / np.abs(found[1]).max() <= near


def test_an_int8_cache_without_its_scales_cannot_be_moved(
    checkpoint: Checkpoint, scales: torch.Tensor, tmp_path: Path
) -> None:
    """As earlier exports left it: the scales are in the graph alone."""
    bundle = exported(checkpoint, KVForm("int8", scales), tmp_path / "bundle")
    assert np.array_equal(np.fromfile(bundle.path(KV_SCALES), "<f4"), scales.numpy().ravel())
    embeds = np.zeros((4, TINY.text.hidden_size), np.float32)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != KV_SCALES}
    older = Alone(open_engine(Bundle(bundle.folder, replace(bundle.manifest, files=files)), threads=1))
    assert not older.can_move
    older.forward(embeds, np.empty(0, np.int64))
    with pytest.raises(InputError, match="recompute, or export it again"):
        older.move(2, 4, 0)
    bundle.path(KV_SCALES).write_bytes(bytes(12))
    damaged = Alone(OnnxRuntimeEngine.open(Bundle(bundle.folder, bundle.manifest), threads=1))
    damaged.forward(embeds, np.empty(0, np.int64))
    with pytest.raises(BundleError, match="3 scales, wanted"):
        damaged.move(2, 4, 0)


def test_a_recipe_with_a_small_cache(checkpoint: Checkpoint) -> None:
    recipe = Recipe.from_json({"decoder": {"bits": 4, "group": 32}, "kv": "int8"}, "r.json")
    assert recipe.calibrated and recipe.quantized and Recipe.from_json(recipe.to_json(), "r.json") == recipe
    assert kv_form(RECIPES["int4"], 3, None) is None
    small, full = (kv_bytes(checkpoint, 4096, dtype) for dtype in ("int8", "fp32"))
    assert 4 * small == full


def test_what_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="kv 'int3', wanted fp16, int8 or null"):
        Recipe.from_json({"kv": "int3"}, "r.json")
    with pytest.raises(InputError, match="kv: int8 needs calibration data"):
        kv_form(INT8, 3, None)
    recipe = replace(RECIPES["fp32"], kv="fp16")
    with pytest.raises(InputError, match="KV cache in fp16, but executorch keeps it in the graph's precision"):
        check_options(checkpoint, ExecutorchTarget(), ExportOptions("executorch", recipe))
    with pytest.raises(InputError, match="calibration"):
        check_options(checkpoint, OnnxTarget(), ExportOptions("onnx", INT8))


def test_keys_that_are_not_finite_are_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = checkpoint.load(("decoder", "embedding"))
    assert model.decoder is not None
    model.decoder.layers[1].get_submodule("self_attn.v_proj").get_parameter("weight").data[0, 0] = float("nan")
    monkeypatch.setattr(Checkpoint, "load", lambda *args, **options: model)
    with pytest.raises(InputError, match=r"decoder\.layers\.1: a key or value is NaN"):
        calibrate(checkpoint, INT8, samples(), tmp_path / "work", lambda stage: None)


def cli(*arguments: object) -> dict[str, object]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_two_graphs_share_a_small_cache(tmp_path: Path) -> None:
    bundle = tmp_path / "nano"
    options = ("--kv-cache-dtype", "int8", "--calibration-samples", 4, "--max-seq-len", 1024)
    cli("export", "--model", "nano", "--quant", "int8-prefill", *options, "-o", bundle)
    text, info = PRESETS["nano"].text, cli("info", bundle)
    assert info["kv_dtype"] == "int8"
    assert info["kv_bytes"] == 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 1024
    assert cli("verify", bundle, "--against", "nano")["passed"]
