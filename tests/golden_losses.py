"""The packed training forward, its losses and its gradients against the recorded arrays."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_model import HIDDEN, LOGITS, VLMS, close, frames_of, load_vlm, vlm_of
from golden_set import GOLDEN, TABLES
from safetensors.torch import load_file
from torch import nn

from penguin_edge.dataset.samples import Sample
from penguin_edge.model.checkpoint import read_encoder
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.model.weights import canonical_name
from penguin_edge.training.losses import Distiller, DistillLoss, cross_entropy
from penguin_edge.training.packing import forward_packed, pack, prompt_order

LOSS, GRADIENT, FEATURES = 1e-4, 1e-3, 5e-5
"""Relative; of the gradients to their norm; features are absolute. fp32, where summation order alone may differ."""
PACKED = sorted(GOLDEN.glob("losses_packed*.npz"))
TEACHERS = sorted(path.parent for path in GOLDEN.glob("*teacher*/config.json"))
RUNS = TABLES.get("losses", []) if PACKED else []
PARTS = TABLES.get("loss_parts_derived", {})
DISTILLED = bool(TEACHERS) and (GOLDEN / "distill_layer.safetensors").is_file()


@cache
def packed_samples(path: Path) -> list[Sample]:
    """The samples of a recorded pack, in its order; a dummy patch of the reference is left to `pack`."""
    arrays = np.load(path)
    image = load_vlm(vlm_of(path.stem))[0].config.image_token_id
    starts = np.flatnonzero(arrays["position_ids"][0] == 0)
    frames = list(frames_of(arrays))
    samples = []
    for ids, labels in zip(
        np.split(arrays["input_ids"][0], starts[1:]), np.split(arrays["labels"][0], starts[1:]), strict=True
    ):
        wanted, visuals = int((ids == image).sum()), []
        if not wanted:
            dummy = frames.pop(0)
            assert dummy.grid == (1, 1) and not dummy.pixels.any()
        while sum(frame.tokens for frame in visuals) < wanted:
            visuals.append(frames.pop(0))
        samples.append(Sample(str(len(samples)), ids, labels, tuple(visuals)))
    assert not frames
    return samples


def training_model(path: Path) -> PenguinModel:
    model = copy.deepcopy(load_vlm(vlm_of(path.stem))[1])
    return model.requires_grad_(True).train()


def recorded_distiller(model: PenguinModel) -> Distiller:
    assert model.config.vision is not None
    _, teacher = read_encoder(TEACHERS[0])
    distiller = Distiller(teacher, model.config.vision.hidden_size, "reference")
    stored = load_file(GOLDEN / "distill_layer.safetensors")
    distiller.vision_distill_layer.load_state_dict(
        {name.removeprefix("vision_distill_layer."): value for name, value in stored.items()}
    )
    return distiller.train()


def losses_of(path: Path, run: dict[str, Any], model: PenguinModel) -> tuple[torch.Tensor, DistillLoss | None, Any]:
    assert model.decoder is not None
    batch = pack(packed_samples(path), dummy_per_text=True)
    out = forward_packed(model, batch)
    items = run["num_items_in_batch"]
    caption = cross_entropy(model.decoder, out.hidden, batch, scope=run["reduction_scope"], items=items)
    if not run["use_reconstruct"]:
        return caption, None, None
    distiller = recorded_distiller(model)
    return caption, distiller(batch, out.features, epoch=run["current_epoch"] or 0.0, items=items), distiller


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PACKED])
def test_pack(path: Path) -> None:
    arrays, table = np.load(path), TABLES.get("pack", {})
    batch = pack(packed_samples(path), dummy_per_text=True)
    for name, got in (("input_ids", batch.input_ids), ("labels", batch.labels), ("position_ids", batch.positions)):
        np.testing.assert_array_equal(got.numpy().reshape(1, -1), arrays[name])
    if table:
        assert batch.cu_seqlens[:-1].tolist() == table["position_ids_starts"]
        assert len(batch.targets) == table["label_tokens_after_shift"]
        assert len(batch.lengths) == table["sequences"] == len(table["order"])
        assert sum(group.frames for group in batch.groups) == len(table["modals"])
        assert sum(group.frames for group in batch.groups if group.dummy) == table["modals"].count("text")


@pytest.mark.parametrize("backend", ["padded", "mask"])
@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PACKED])
def test_packed_forward(path: Path, backend: Any) -> None:
    arrays = np.load(path)
    model = load_vlm(vlm_of(path.stem))[1]
    assert model.decoder is not None
    batch = pack(packed_samples(path))
    with torch.no_grad():
        out = forward_packed(model, batch, backend)
        rows = arrays["packed_logits_last16"].shape[1]
        logits = model.decoder.logits(out.hidden, torch.arange(-rows, 0))
    close(out.hidden, arrays["packed_last_hidden"], HIDDEN)
    close(logits, arrays["packed_logits_last16"], LOGITS)
    dummy = np.repeat([not grid.prod() > 1 for grid in arrays["grid_sizes"]], tokens_of(arrays))
    close(prompt_order(batch, out.features), arrays["student_features"][~dummy], FEATURES)


def tokens_of(arrays: Any) -> np.ndarray:
    return arrays["grid_sizes"].prod(1) // arrays["merge_sizes"] ** 2


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PACKED if DISTILLED])
def test_distilled_features(path: Path) -> None:
    arrays = np.load(path)
    distiller = recorded_distiller(load_vlm(vlm_of(path.stem))[1])
    frames = list(frames_of(arrays))
    with torch.no_grad():
        for name, encoder in (
            ("student_features", load_vlm(vlm_of(path.stem))[1].encoder),
            ("teacher_features", distiller.teacher),
        ):
            assert encoder is not None
            found = [
                encoder(*(torch.from_numpy(x) for x in (frame.pixels[None], frame.rows, frame.cols)))
                .unflatten(1, (-1, frame.merge_size**2))
                .mean(2)[0]
                for frame in frames
            ]
            close(torch.cat(found), arrays[name], FEATURES)
        adapted = distiller.vision_distill_layer(torch.from_numpy(arrays["student_features"]))
    close(adapted, arrays["distilled_student"], FEATURES)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PACKED])
@pytest.mark.parametrize(
    "run",
    [run for run in RUNS if DISTILLED or not run["use_reconstruct"]],
    ids=lambda run: (
        f"{run['reduction_scope']}-{run['num_items_in_batch']}-{run['current_epoch']}-{run['use_reconstruct']}"
    ),
)
def test_losses(path: Path, run: dict[str, Any]) -> None:
    model = load_vlm(vlm_of(path.stem))[1]
    with torch.no_grad():
        caption, distilled, _ = losses_of(path, run, model)
    assert caption.item() == pytest.approx(run["caption_loss"], rel=LOSS)
    total = caption.item()
    if distilled is not None:
        total += distilled.loss.item()
        assert (distilled.direction + distilled.amplitude).item() == pytest.approx(run["teacher_loss"], rel=LOSS)
        assert distilled.relation.item() == pytest.approx(run["relation_loss"], rel=LOSS)
        for name in ("direction", "amplitude"):
            if name in PARTS:
                assert getattr(distilled, name).item() == pytest.approx(PARTS[name], rel=LOSS)
    assert total == pytest.approx(run["loss"], rel=LOSS)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PACKED if DISTILLED])
@pytest.mark.parametrize("run", [run for run in RUNS if "gradients" in run], ids=lambda run: run["reduction_scope"])
def test_gradients(path: Path, run: dict[str, Any]) -> None:
    model = training_model(path)
    caption, distilled, distiller = losses_of(path, run, model)
    assert distilled is not None
    (caption + distilled.loss).backward()
    recorded = {name.removeprefix("grad_"): value for name, value in np.load(path).items() if name.startswith("grad_")}
    compared = 0
    for name, wanted in TABLES.get("grad_norms", {}).items():
        got = parameter_of(name, model, distiller).grad
        assert got is not None, name
        assert got.norm().item() == pytest.approx(wanted, rel=GRADIENT), name
        compared += 1
    for name, wanted in recorded.items():
        got = parameter_of(name, model, distiller).grad
        assert got is not None, name
        distance = np.linalg.norm(got.numpy().reshape(-1) - wanted.reshape(-1))
        assert distance <= GRADIENT * np.linalg.norm(wanted), name
        compared += 1
    assert compared
    for name in TABLES.get("no_grad_params", []):
        assert parameter_of(name, model, distiller).grad is None, name


def parameter_of(name: str, model: PenguinModel, distiller: Distiller) -> nn.Parameter:
    """Our parameter of a key of the reference's training model."""
    for prefix in ("vision_distill_layer.", "model.vision_distill_layer."):
        if name.startswith(prefix):
            return distiller.vision_distill_layer.get_parameter(name.removeprefix(prefix))
    teacher = "model.vision_encoder_teacher."
    ours = canonical_name(name.removeprefix(teacher))
    assert ours is not None, name
    if name.startswith(teacher):
        return distiller.teacher.get_parameter(ours.removeprefix("encoder."))
    return model.get_parameter(ours)


@pytest.mark.parametrize("name", TABLES.get("train_state_dict_keys_extra", {}) if DISTILLED else {})
def test_training_keys(name: str) -> None:
    """What a training run saves beside the model has its place in the distiller, and is ignored at inference."""
    model = load_vlm(VLMS[0])[1]
    shape = TABLES["train_state_dict_keys_extra"][name]
    assert canonical_name(name) is None
    found = tuple(parameter_of(name, model, recorded_distiller(model)).shape)
    assert int(np.prod(found)) == int(np.prod(shape)) and found[0] == shape[0]
