"""The stored weights of a checkpoint by our names: what belongs to which name, what must be there, and in what state.

| part      | our names               | published names (X = one of ENCODER_PREFIXES)                         |
|-----------|-------------------------|-----------------------------------------------------------------------|
| encoder   | encoder.patch_embedding | X.embeddings.patch_embedding, weight [E,3,14,14] <-> [E,588]          |
|           | encoder.layers, .norm   | X.encoder.layers, X.encoder.norm                                      |
| projector | projector.readout.{0,2} | model.vision_projector.readout.{0,2}                                  |
| embedding | embedding.weight        | model.embed_tokens.weight                                             |
| decoder   | decoder.layers, .norm   | model.layers, model.norm                                              |
|           | decoder.lm_head         | lm_head; when tied absent, and read from model.embed_tokens           |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penguin_edge.config import PATCH, read_json
from penguin_edge.errors import CheckpointError
from penguin_edge.model.foreign import refuse_adapter, refuse_quantized, refuse_versioned
from penguin_edge.model.tensorfile import FLOATS, StoredTensor, checkpoint_tensors

ENCODER_PREFIXES = ("model.vision_encoder.vision_encoder.", "model.vision_encoder.", "vision_encoder.", "")
"""Longest first: files of the reference code, of the embedded-config form, and of the encoder alone."""

IGNORED = (
    "model.vision_encoder_teacher.",
    "model.vision_distill_layer.",
    "vision_distill_layer.",
    "model.audio_encoder.",
    "model.audio_projector.",
)
"""Training leftovers that the reference saves along; dead weight at inference."""

EMBEDDING, HEAD = "embedding.weight", "decoder.lm_head.weight"


def canonical_name(name: str) -> str | None:
    """Our name of a published key, or None when it has no part in inference."""
    if name.startswith(IGNORED) or name.endswith("rotary_emb.inv_freq"):
        return None
    # Like transformers, which also loads weights of a base model, and names with a prefix that a wrapper left.
    if name.startswith("model.model.") or name == "model.lm_head.weight":
        name = name.removeprefix("model.")
    elif name.startswith(("layers.", "norm.", "vision_projector.")) or name == "embed_tokens.weight":
        name = "model." + name
    if name.startswith("model.vision_projector."):
        return "projector." + name.removeprefix("model.vision_projector.")
    if name == "model.embed_tokens.weight":
        return EMBEDDING
    if name == "lm_head.weight":
        return HEAD
    for prefix in ENCODER_PREFIXES:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest.startswith("embeddings.patch_embedding."):
            return "encoder." + rest.removeprefix("embeddings.")
        if name.startswith(prefix) and rest.startswith("encoder."):
            return rest
    if name.startswith(("model.layers.", "model.norm.")):
        return "decoder." + name.removeprefix("model.")
    return name


def published_name(name: str) -> str:
    """The key under which `save` writes one of our parameters."""
    part, _, rest = name.partition(".")
    if part == "encoder":
        return "model.vision_encoder." + ("embeddings." + rest if rest.startswith("patch_embedding") else name)
    if part == "projector":
        return "model.vision_projector." + rest
    if part == "embedding":
        return "model.embed_tokens." + rest
    return rest if rest.startswith("lm_head") else "model." + rest


def open_files(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor], list[str]]:
    """The content of a folder's `config.json`, its tensors by our names, and notes; no tensor is read.

    Raises:
        CheckpointError: a file is missing or damaged, or holds an adapter or quantized weights, or names other files
            to be read; or one tensor is there under two names.
    """
    refuse_adapter(folder)
    data = read_json(folder / "config.json", "the model configuration")
    refuse_versioned(folder)
    refuse_quantized(folder, data, {})
    published, notes = checkpoint_tensors(folder)
    refuse_adapter(folder, published)
    refuse_quantized(folder, data, {name: tensor.dtype for name, tensor in published.items()})
    stored: dict[str, StoredTensor] = {}
    ignored: list[str] = []
    for name, tensor in published.items():
        ours = canonical_name(name)
        if ours is None:
            ignored.append(name)
        elif ours in stored:
            raise CheckpointError(
                f"{folder}: tensors {stored[ours].name} and {name} are two names of one weight; readers take one or "
                "the other: save the checkpoint again with one of them"
            )
        else:
            stored[ours] = tensor
    if ignored:
        notes.append(f"ignored {len(ignored)} tensors of training or audio parts, such as {ignored[0]}")
    return data, stored, notes


def check_tensor(tensor: StoredTensor | None, name: str, shape: tuple[int, ...], source: str) -> None:
    """Compare what is stored with what the model needs.

    Args:
        name: ours.
    Raises:
        CheckpointError: it is missing, misshapen, or not made of floating-point numbers.
    """
    if tensor is None:
        advice = "the weights do not fit config.json"
        if name == HEAD:
            advice = "tie_word_embeddings is not set in config.json: set it if the head is the embedding table"
        raise CheckpointError(f"{source}: tensor {published_name(name)} {list(shape)} is missing; {advice}")
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{source}: tensor {tensor.name} is {tensor.dtype}, wanted floating-point weights; name the "
            "checkpoint before quantization"
        )
    shapes = [shape]
    if name == "encoder.patch_embedding.weight":
        shapes.append((shape[0], 3, PATCH, PATCH))
    if tensor.shape not in shapes:
        raise CheckpointError(
            f"{source}: tensor {tensor.name} is {list(tensor.shape)}, wanted {list(shape)}; the weights do not fit "
            "config.json"
        )


def read_finite(tensor: StoredTensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A stored tensor in another shape and dtype.

    Raises:
        CheckpointError: a number in it is NaN or infinite, or becomes infinite in `dtype`.
    """
    stored = tensor.read().reshape(tuple(shape))
    value = stored.to(dtype)
    if _finite(value):
        return value
    if _finite(stored):
        largest = max(abs(float(limit)) for limit in stored.aminmax())
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} holds {largest:.6g}, which {str(dtype).removeprefix('torch.')} "
            "cannot hold; choose fp32"
        )
    raise CheckpointError(
        f"{tensor.path}: tensor {tensor.name} holds a number that is NaN or infinite; repair the checkpoint, or copy "
        "it again"
    )


def _finite(value: Tensor) -> bool:
    """Whether all numbers are finite; the extremes tell, without a mask as large as the tensor."""
    return all(math.isfinite(float(limit)) for limit in value.aminmax())
