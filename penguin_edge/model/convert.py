"""A language model made into a vision encoder: the first step of training, whose script was never published.

| of the donor                 | becomes                                                                    |
|------------------------------|----------------------------------------------------------------------------|
| embedding table, head        | dropped; the table's size sets the scale of the new patch embedding        |
| blocks, all or some of them  | `encoder.layers`; their attention sees all patches, with 2D-RoPE           |
| final norm                   | `encoder.norm`                                                             |
| (nothing)                    | `patch_embedding` [E, 588] and bias: new                                   |
| q/k norm                     | kept (Qwen3), or new with a weight that keeps the usual length (Llama)     |

Along the diagonal, where row = column, 2D-RoPE is the donor's own 1D-RoPE: with causal attention and the donor's token
embeddings in place of patches, the encoder is the donor, bit for bit.

Source: reference `penguinvl/model/penguinvl_encoder` for the form of the result and the initialisation (fact sheet,
section 2.5); the mapping follows from the published weights, which are Qwen3-0.6B's in shape.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from penguin_edge.config import PATCH, ImageConfig, PenguinConfig, VisionConfig
from penguin_edge.errors import CheckpointError, InputError, WriteError
from penguin_edge.files import file_hash, manifest_hash, read_json, write_json
from penguin_edge.folders import MayReplace, check_place, refuse_any, refuse_others, whole
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.encoder import Encoder
from penguin_edge.model.hf_config import published_json
from penguin_edge.model.layers import Block, RMSNorm
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.model.weights import published_name

Choice = Literal["first", "spaced"]
RECORD = "conversion.json"
"""Where an encoder came from, and its files. It is the mark of a folder that may be replaced, too: a downloaded encoder
has files of the same names and no record."""


def convert_language_model(
    source: PenguinModel | str | Path, *, layers: int | None = None, choose: Choice = "first", seed: int = 0
) -> tuple[Encoder, VisionConfig]:
    """An encoder with the weights of a Qwen3 or Llama-type language model, fp32, on the CPU; the donor stays as it is.

    The patch embedding is LeCun normal (truncated at two standard deviations, variance 1/588), as in the reference,
    times the root mean square of the donor's embedding table: for pixels of unit variance the residual stream then
    starts at the size that the donor's blocks were trained on. Its bias is zero.

    A Llama-type donor has no norm of q and k, the encoder has. An RMSNorm of weight one would be no identity: it would
    give each q and k the root mean square 1, whatever the donor's was, and so another temperature of attention. The
    new weight is one number per layer, the root mean square that the donor's q (or k) has for inputs of independent
    channels behind its input norm. What changes: each vector keeps its direction and loses its own length, so that
    differences of length between tokens and between heads are gone; it is the identity for vectors of usual length.

    Args:
        source: a model with decoder and embedding, or what `Checkpoint.open` takes.
        layers: blocks to keep; None keeps all. `choose`: the first ones, or evenly spaced ones with the first and
            the last among them.
        seed: of the patch embedding.
    Raises:
        CheckpointError: the source cannot be read, or lacks its decoder or embedding.
        InputError: more layers than the donor has, or fewer than one.
    """
    if not isinstance(source, PenguinModel):
        source = Checkpoint.open(source).load(("embedding", "decoder"), dtype=torch.float32)
    decoder, embedding = source.decoder, source.embedding
    if decoder is None or embedding is None:
        raise CheckpointError("the donor was loaded without its decoder or embedding; load both to convert it")
    text = source.config.text
    kept = _chosen(text.num_hidden_layers, layers, choose)
    values = {field.name: getattr(text, field.name) for field in dataclasses.fields(VisionConfig)}
    config = VisionConfig(**{**values, "num_hidden_layers": len(kept)})
    encoder = Encoder(config)
    with torch.no_grad():
        encoder.norm.load_state_dict(_copied(decoder.norm))
        for block, index in zip(encoder.layers, kept, strict=True):
            assert isinstance(block, Block)
            block.load_state_dict(_copied(decoder.layers[index]), strict=text.qk_norm)
            if not text.qk_norm:
                _set_qk_norm(block)
        spread = embedding.weight.detach().float().square().mean().sqrt().item()
        _init_patch_embedding(encoder.patch_embedding, spread, seed)
    return encoder, config


def _chosen(available: int, wanted: int | None, choose: Choice) -> list[int]:
    if choose not in ("first", "spaced"):
        raise InputError(f"unknown choice of layers {choose!r}; known: first, spaced")
    count = available if wanted is None else wanted
    if not 1 <= count <= available:
        raise InputError(f"got {count} layers to keep, wanted 1 to {available}, which the language model has")
    if choose == "first" or count == 1:
        return list(range(count))
    return [round(step * (available - 1) / (count - 1)) for step in range(count)]


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu() for name, value in module.state_dict().items()}


def _set_qk_norm(block: Block) -> None:
    """One number for all entries: the root mean square of W (g * x) over the heads, for x of unit variance."""
    attention = block.self_attn
    for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        assert isinstance(norm, RMSNorm)
        length = (projection.weight * block.input_layernorm.weight).square().sum(dim=1).mean().sqrt()
        norm.weight.fill_(length.item())


def _init_patch_embedding(layer: nn.Linear, scale: float, seed: int) -> None:
    # A normal distribution cut at two standard deviations keeps 0.8796 of its own.
    spread = scale / math.sqrt(layer.in_features) / 0.87962566103423978
    generator = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(layer.weight, std=spread, a=-2 * spread, b=2 * spread, generator=generator)
    nn.init.zeros_(layer.bias)


def save_encoder(encoder: Encoder, folder: str | Path, image: ImageConfig | None = None) -> None:
    """Write a folder with just an encoder, in the published form; `checkpoint.read_encoder` reads it.

    Raises:
        CheckpointError: the folder exists and is not empty.
    """
    with whole(folder, refuse_any(folder, CheckpointError), CheckpointError) as aside:
        _write_encoder(encoder, aside, image)


def convert_checkpoint(
    source: Checkpoint,
    out: str | Path,
    *,
    layers: int | None = None,
    choose: Choice = "first",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the folder of an encoder from a language model's checkpoint; the folder appears whole or not at all.

    Args:
        layers: as in `convert_language_model`, as are `choose` and `seed`.
        overwrite: replace a folder that an earlier conversion wrote and nobody has put anything into.
    Returns:
        What `conversion.json` says: `donor` and its `fingerprint`, `layers` that were kept (numbers of the donor's
        blocks), `seed`, and `files` with bytes and SHA-256.
    Raises:
        CheckpointError: the checkpoint is damaged, or `out` exists and may not be replaced, or cannot be written.
        InputError: as `convert_language_model`.
    """
    rule = _may_replace(out, overwrite)
    check_place(out, rule, CheckpointError)
    kept = _chosen(source.config.text.num_hidden_layers, layers, choose)
    donor = source.load(("embedding", "decoder"), dtype=torch.float32)
    encoder, _ = convert_language_model(donor, layers=layers, choose=choose, seed=seed)
    data: dict[str, Any] = {"schema": 1, "donor": source.source, "fingerprint": source.fingerprint()}
    data |= {"layers": kept, "seed": seed}
    try:
        with whole(out, rule, CheckpointError) as aside:
            _write_encoder(encoder, aside, source.config.image)
            written = sorted(aside.iterdir())
            data["files"] = {p.name: {"sha256": file_hash(p), "bytes": p.stat().st_size} for p in written}
            write_json(aside / RECORD, {**data, "sha256": manifest_hash(data)})
    except (WriteError, OSError, SafetensorError) as error:
        reason = error.reason if isinstance(error, WriteError) else getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{out}: cannot be written ({reason}); make room, or choose another folder") from error
    return data


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Refuse before any work what `convert_checkpoint` would refuse of its folder.

    Raises:
        CheckpointError: it exists and may not be replaced.
    """
    check_place(out, _may_replace(out, overwrite), CheckpointError)


def _may_replace(out: str | Path, overwrite: bool) -> MayReplace:
    def may_replace(found: Path, appeared: bool) -> None:
        if not overwrite:
            raise CheckpointError(f"{out} exists already; choose another folder or pass --overwrite")
        if not found.is_dir():
            raise CheckpointError(f"{out} exists and is not a folder; it is left as it is, choose another name")
        if not any(found.iterdir()):
            return
        advice = f"{out} is left as it is: remove it yourself, or choose another folder"
        if not (found / RECORD).is_file():
            raise CheckpointError(f"{out} exists and holds no encoder that `convert` wrote; {advice}")
        data = read_json(found / RECORD, what=f"{out}/{RECORD}", error=CheckpointError, advice=advice)
        files = data.get("files") if isinstance(data, dict) else None
        if not isinstance(files, dict) or data.get("sha256") != manifest_hash(data):
            raise CheckpointError(f"{out}/{RECORD}: damaged, or not written by `convert`; {advice}")
        refuse_others({*files, RECORD}, CheckpointError)(found, appeared)

    return may_replace


def _write_encoder(encoder: Encoder, folder: Path, image: ImageConfig | None) -> None:
    dtype = str(encoder.patch_embedding.weight.dtype).removeprefix("torch.")
    files = published_json(PenguinConfig(vision=encoder.config, image=image or ImageConfig()), dtype)
    config = {"architectures": ["PenguinVLVisionEncoderModel"], **files["config.json"]["vision_encoder_config"]}
    config["torch_dtype"] = dtype
    for name, data in (("config.json", config), ("preprocessor_config.json", files["preprocessor_config.json"])):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, parameter in encoder.named_parameters():
        value = parameter.detach().cpu().contiguous()
        shaped = value.reshape(-1, 3, PATCH, PATCH) if name == "patch_embedding.weight" else value
        tensors[published_name(f"encoder.{name}").removeprefix("model.vision_encoder.")] = shaped
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
