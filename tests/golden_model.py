"""Encoder, projector, decoder, checkpoints and prompts against the recorded arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_set import GOLDEN, TABLES
from safetensors.numpy import load_file
from torch import nn

from penguin_edge.media.preprocess import Patches, positions
from penguin_edge.model.checkpoint import Checkpoint, meta_model, read_encoder
from penguin_edge.model.encoder import rotary_2d
from penguin_edge.model.generate import generate
from penguin_edge.model.layers import rotary_angles, rotate
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.model.weights import canonical_name, published_name
from penguin_edge.prompt.chat import IMAGE, as_text, render
from penguin_edge.prompt.tokenizer import Tokenizer

ROPE, ENCODER, HIDDEN, LOGITS = 1e-6, 5e-5, 2e-4, 3e-4
"""Absolute, fp32: another implementation differs in summation order alone."""


def folders(model_type: str) -> list[Path]:
    """Checkpoint folders of the set, by the model type that their configuration names."""
    found = []
    for path in sorted(GOLDEN.glob("*/config.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("model_type") == model_type:
            found.append(path.parent)
    return found


VLMS = folders("penguinvl_qwen3")


def vlm_of(name: str) -> Path:
    """The checkpoint that an array file belongs to: the longest folder name that it starts with, or the only one."""
    named = [folder for folder in VLMS if name.startswith(folder.name)]
    return max(named, key=lambda folder: len(folder.name)) if named else VLMS[0]


@cache
def load_vlm(folder: Path) -> tuple[Checkpoint, PenguinModel, Tokenizer]:
    checkpoint = Checkpoint.open(folder, note=lambda line: None)
    return checkpoint, checkpoint.load(dtype=torch.float32), Tokenizer.of(checkpoint)


def frames_of(arrays: Any) -> Iterator[Patches]:
    """One `Patches` per frame of the packed arrays."""
    offset = 0
    for (t, h, w), merge in zip(arrays["grid_sizes"].tolist(), arrays["merge_sizes"].tolist(), strict=True):
        rows, cols = positions((h, w), merge)
        for _ in range(t):
            yield Patches(arrays["pixel_values"][offset : offset + h * w], rows, cols, (h, w), merge)
            offset += h * w
    assert offset == len(arrays["pixel_values"])


def trace(modules: list[nn.Module]) -> tuple[list[list[np.ndarray]], list[Any]]:
    """Record what each module gives, call by call."""
    seen: list[list[np.ndarray]] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda m, args, out, row=row: row.append(out.detach().numpy()))
        for module, row in zip(modules, seen, strict=True)
    ]
    return seen, hooks


def close(got: Any, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=0, atol=tolerance)


def cases(pattern: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted(GOLDEN.glob(pattern))]


def hidden_arrays(arrays: Any) -> list[np.ndarray]:
    """hidden_0, hidden_1, … in order."""
    names = sorted((name for name in arrays if name.startswith("hidden_")), key=lambda name: int(name.split("_")[1]))
    return [arrays[name] for name in names]


# --- encoder and projector --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("encoder_*.safetensors"))
def test_encoder(path: Path) -> None:
    arrays = load_file(path)
    model = load_vlm(VLMS[0])[1]
    assert model.encoder is not None
    seen, hooks = trace([model.encoder.patch_embedding, *model.encoder.layers[:-1], model.encoder.norm])
    frames = list(frames_of(arrays))
    features, projected = [], []
    with torch.no_grad():
        for frame in frames:
            out = model.encode(
                torch.from_numpy(frame.pixels)[None], torch.from_numpy(frame.rows), torch.from_numpy(frame.cols)
            )
            merged = out.unflatten(1, (-1, frame.merge_size**2)).mean(2)
            features.append(merged[0].numpy())
            projected.append(model.project(out, frame.merge_size)[0].numpy())
    for hook in hooks:
        hook.remove()
    for got, wanted in zip(seen, hidden_arrays(arrays), strict=True):
        close(np.concatenate([row[0] for row in got]), wanted, ENCODER)
    close(np.concatenate(features), arrays["features"], ENCODER)
    close(np.concatenate(projected), arrays["projected"], ENCODER)
    boundaries = np.cumsum([0, *(len(frame.rows) for frame in frames)])
    np.testing.assert_array_equal(boundaries, arrays["cu_seqlens"])


@pytest.mark.parametrize("path", cases("encoder_*.safetensors"))
def test_encoder_rotary(path: Path) -> None:
    arrays = load_file(path)
    config = load_vlm(VLMS[0])[0].config.vision
    assert config is not None
    axes = [np.concatenate(axis) for axis in zip(*((f.rows, f.cols) for f in frames_of(arrays)), strict=True)]
    np.testing.assert_array_equal(np.stack(axes), arrays["position_ids"])
    rows, cols = (torch.from_numpy(axis) for axis in axes)
    for axis, positions_ in enumerate((rows, cols)):
        angles = rotary_angles(positions_, config.head_dim, config.rope_theta)
        close(torch.cat((angles, angles), -1).cos(), arrays["rope_cos"][axis], ROPE)
        close(torch.cat((angles, angles), -1).sin(), arrays["rope_sin"][axis], ROPE)
    cos, sin = rotary_2d(rows, cols, config.head_dim, config.rope_theta, torch.float32)
    for name in ("q", "k"):
        if f"{name}_rot" in arrays:
            close(rotate(torch.from_numpy(arrays[name]), cos, sin), arrays[f"{name}_rot"], ROPE * 4)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for folder in VLMS])
def test_every_tensor_has_its_place(folder: Path) -> None:
    model = load_vlm(folder)[1]
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text(encoding="utf-8"))
    ours = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert {canonical_name(name) for name in shapes} == set(ours)
    for name, shape in shapes.items():
        found = ours[canonical_name(name)]
        assert int(np.prod(shape)) == int(np.prod(found)), name
        if len(shape) == len(found):
            assert tuple(shape) == found, name


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for folder in VLMS])
def test_the_separate_encoder_holds_the_same_weights(folder: Path) -> None:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_encoder")
    if not name or not (folder.parent / name).is_dir():
        return
    config, encoder = read_encoder(folder.parent / name)
    model = load_vlm(folder)[1]
    assert model.encoder is not None and config.vision == model.config.vision
    for (key, a), b in zip(encoder.named_parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_published_names_are_read_back() -> None:
    for name, _ in meta_model(load_vlm(VLMS[0])[0].config).named_parameters(remove_duplicate=False):
        assert canonical_name(published_name(name)) == name


# --- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = TABLES.get("prompts", {})


@pytest.mark.parametrize("name", PROMPTS.get("cases", {}))
def test_prompt(name: str) -> None:
    case = PROMPTS["cases"][name]
    tokenizer = load_vlm(VLMS[0])[2]
    messages = case["conversation"]
    wanted = {
        "plain": {"generation_prompt": False},
        "generation": {},
        "generation_system_flag": {},
        "generation_think": {"thinking": True},
    }
    for key, flags in wanted.items():
        if key in case:
            assert as_text(render(messages, **flags)) == case[key], key
    if "input_ids_unexpanded" in case:
        assert tokenizer.encode_pieces(render(messages)) == case["input_ids_unexpanded"]


def test_prompt_constants() -> None:
    tokenizer = load_vlm(VLMS[0])[2]
    for name, wanted in PROMPTS.get("special_tokens", {}).items():
        assert tokenizer.special(name) == wanted, name
    if "newline_id" in PROMPTS:
        assert tokenizer.encode("\n") == [PROMPTS["newline_id"]]
    if "generation_prompt_ids" in PROMPTS:
        assert tokenizer.encode_pieces(render([])) == PROMPTS["generation_prompt_ids"]
        assert tokenizer.encode_pieces(render([], thinking=True)) == PROMPTS["generation_prompt_think_ids"]


# --- the whole model --------------------------------------------------------------------------------------------------

VLM_CASES = [
    p
    for p in sorted(GOLDEN.glob("vlm*_*.npz"))
    if "input_ids" in np.load(p).files and "logits_last" in np.load(p).files
]


def case_name(path: Path) -> str:
    return path.stem.removeprefix(vlm_of(path.stem).name).lstrip("_")


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in VLM_CASES])
def test_vlm(path: Path) -> None:
    arrays = np.load(path)
    _, model, tokenizer = load_vlm(vlm_of(path.stem))
    assert model.decoder is not None
    ids = torch.from_numpy(arrays["input_ids"])
    before = ids.clone()
    frames = list(frames_of(arrays)) if "grid_sizes" in arrays.files else []
    prompt = TABLES.get("generation", {}).get(case_name(path), {}).get("prompt_case", case_name(path))
    if prompt in PROMPTS.get("cases", {}):
        counts = [len(f.rows) // f.merge_size**2 for f in frames]
        pieces = render(PROMPTS["cases"][prompt]["conversation"], counts)
        assert tokenizer.encode_pieces(pieces) == ids[0].tolist()
    assert arrays["attention_mask"].all()
    seen, hooks = trace([*model.decoder.layers[:-1], model.decoder.norm])
    with torch.no_grad():
        visual = model.visual(frames)
        embeds = model.splice(ids, visual)
        hidden = model(ids, visual)
        rows = arrays["logits_last"].shape[1]
        logits = model.decoder.logits(hidden, torch.arange(ids.shape[1] - rows, ids.shape[1]))
    for hook in hooks:
        hook.remove()
    assert torch.equal(ids, before), "the caller's ids must stay as they are"
    if "inputs_embeds" in arrays.files:
        close(embeds, arrays["inputs_embeds"], ENCODER)
    got = [embeds.numpy(), *(row[0] for row in seen)]
    for mine, wanted in zip(got, hidden_arrays(arrays), strict=True):
        close(mine, wanted, HIDDEN)
    close(logits, arrays["logits_last"], LOGITS)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in VLM_CASES])
def test_greedy_generation(path: Path) -> None:
    arrays = np.load(path)
    if "generated_ids" not in arrays.files:
        return
    checkpoint, model, tokenizer = load_vlm(vlm_of(path.stem))
    frames = list(frames_of(arrays)) if "grid_sizes" in arrays.files else []
    wanted = arrays["generated_ids"][0].tolist()
    with torch.no_grad():
        visual = model.visual(frames)
    ids, logits = generate(
        model,
        torch.from_numpy(arrays["input_ids"]),
        visual,
        max_new_tokens=len(wanted),
        stop=checkpoint.config.eos_token_ids,
    )
    assert ids == wanted
    close(logits, arrays["generated_logits"], LOGITS)
    case = TABLES.get("generation", {}).get(case_name(path))
    if case:
        assert ids == case["new_token_ids"]
        assert arrays["input_ids"].shape[1] == case["n_prompt_tokens"]
        assert tokenizer.decode(ids, skip_special=False) == case["text"]
        top = torch.topk(logits, 2).values
        close((top[:, 0] - top[:, 1])[: len(case["margins"])], case["margins"], 1e-3)  # recorded with four decimals


@pytest.mark.parametrize("path", cases("vlm*_batch_right_padded.npz"))
def test_right_padded_batch(path: Path) -> None:
    arrays = np.load(path)
    _, model, _ = load_vlm(vlm_of(path.stem))
    assert model.decoder is not None
    with torch.no_grad():
        hidden = model(torch.from_numpy(arrays["input_ids"]), model.visual(list(frames_of(arrays))))
    for row, mask in enumerate(arrays["attention_mask"]):
        wanted = arrays[f"logits_row{row}_last"]
        end = int(mask.sum())
        with torch.no_grad():
            logits = model.decoder.logits(hidden[row : row + 1], torch.arange(end - len(wanted), end))
        close(logits[0], wanted, LOGITS)


def test_image_token_is_the_models() -> None:
    checkpoint, _, tokenizer = load_vlm(VLMS[0])
    assert tokenizer.special(IMAGE) == checkpoint.config.image_token_id
