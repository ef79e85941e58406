"""Load and save Penguin-VL checkpoints, and Qwen3 or Llama-type text models, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from penguin_edge.config import PATCH, PRESETS, PenguinConfig, read_json
from penguin_edge.errors import CheckpointError
from penguin_edge.files import ASSETS, file_hash
from penguin_edge.folders import refuse_any, whole
from penguin_edge.model.hf_config import config_from_folder, published_json
from penguin_edge.model.penguin import PARTS, PenguinModel
from penguin_edge.model.tensorfile import FLOATS, StoredTensor
from penguin_edge.model.weights import EMBEDDING, HEAD, check_tensor, open_files, published_name, read_finite
from penguin_edge.prompt.chat import END

DEFAULT_TOKENIZER = ASSETS / "tokenizer.json"
"""A small byte-level BPE of the Qwen2 kind, for presets."""
EMBEDDED = {"nano": ASSETS / "nano"}
"""Presets whose trained weights come with the package, and where."""
PUBLISHED_IN = {"2b": torch.bfloat16, "8b": torch.bfloat16}
"""Dtype of the published weights, and of a preset's random weights in the same shape."""
DEFAULT_IDS: dict[str, Any] = {"image_token_id": 603, "eos_token_ids": (600,), "pad_token_id": 601}
"""Ids of the special tokens of `DEFAULT_TOKENIZER`, which are not those of the published vocabulary."""


def random_tensor(name: str, shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """A reproducible random weight: its own stream per name, so that parts can be made one at a time.

    Scales keep activations near one, attention away from flat, and greedy output from repeating one token.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if name.endswith("norm.weight") or "layernorm" in name:
        centre, scale = (1.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0), 0.1
    elif name == EMBEDDING:
        centre, scale = 0.0, 0.35
    elif name.endswith(".bias"):
        centre, scale = 0.0, 0.1
    else:
        centre, scale = (
            0.0,
            (3.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0) / math.sqrt(shape[-1]),
        )
    out = torch.empty(tuple(shape), dtype=dtype)
    flat, step = out.view(-1), 1 << 24
    for begin in range(0, flat.numel(), step):
        piece = flat[begin : begin + step]
        piece.copy_(torch.randn(piece.shape, generator=generator).mul_(scale).add_(centre))
    return out


@dataclass
class Checkpoint:
    """An opened checkpoint: its configuration, and its tensors by our names, not yet read."""

    source: str
    config: PenguinConfig
    tokenizer: Path
    notes: list[str] = field(default_factory=list)
    stored: dict[str, StoredTensor] | None = None
    """None for a preset, whose weights come from `seed`."""
    seed: int = 0

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        random_weights: bool = False,
        seed: int = 0,
        note: Callable[[str], None] | None = None,
    ) -> Checkpoint:
        """A local folder, a preset name, or a hub id; every tensor's presence and shape is checked here.

        Args:
            random_weights: draw the weights of a preset from `seed` also where trained ones come with the package.
        Raises:
            CheckpointError: not found, not reachable, damaged, or not fitting its configuration.
            SettingError: the environment allows fewer layers.
        """
        text = str(source)
        if Path(text).is_dir():
            checkpoint = cls._open_folder(Path(text))
        elif text in EMBEDDED and not random_weights:
            checkpoint = dataclasses.replace(cls._open_folder(EMBEDDED[text]), source=text)
        elif text in PRESETS:
            config, tokenizer = PRESETS[text], DEFAULT_TOKENIZER
            if text in EMBEDDED:
                tokenizer = EMBEDDED[text] / "tokenizer.json"
            else:
                config = dataclasses.replace(config, **DEFAULT_IDS)
            PenguinConfig.from_json(json.loads(json.dumps(config.to_json())))  # within the limits, as any other one
            line = f"preset {text}: random weights from seed {seed}, and an embedded small tokenizer"
            checkpoint = cls(text, config, tokenizer, [line], None, seed)
        elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not Path(text).exists():
            checkpoint = dataclasses.replace(cls._open_folder(download(text)), source=text)
        else:
            raise CheckpointError(
                f"{text!r} is neither a checkpoint folder, nor a preset ({', '.join(sorted(PRESETS))}), nor a hub "
                "id such "
                "as tencent/Penguin-VL-2B"
            )
        for line in checkpoint.notes:
            (note or _note_to_stderr)(line)
        return checkpoint

    @classmethod
    def _open_folder(cls, folder: Path) -> Checkpoint:
        data, stored, notes = open_files(folder)
        config, encoder_folder, more = config_from_folder(folder, data, {name: t.shape for name, t in stored.items()})
        notes += more
        if encoder_folder and not any(name.startswith("encoder.") for name in stored):
            _, extra, more = open_files(encoder_folder)
            stored |= {name: tensor for name, tensor in extra.items() if name.startswith("encoder.")}
            notes += [*more, f"encoder weights read from {encoder_folder}"]
        if not any(name.startswith(("embedding.", "decoder.")) for name in stored):
            raise CheckpointError(
                f"{folder}: holds just an encoder; name the folder of the whole model, or use read_encoder in Python"
            )
        config = _with_end_of_turn(config, folder / "tokenizer.json")
        try:
            config.check()
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}; copy the checkpoint again") from error
        if not config.eos_token_ids:
            notes.append(
                "neither configuration nor tokenizer names a token that ends an answer; an answer ends at its limit"
            )
        checkpoint = cls(str(folder), config, folder / "tokenizer.json", notes, stored)
        checkpoint._settle_head()
        checkpoint._check_tensors()
        return checkpoint

    def _settle_head(self) -> None:
        """Decide whether a head that is declared tied is read from the table or from a tensor of its own, as
        transformers 5 does."""
        assert self.stored is not None
        if not self.config.text.tie_word_embeddings or HEAD not in self.stored:
            return
        if EMBEDDING not in self.stored:
            self.stored[EMBEDDING] = self.stored.pop(HEAD)
        elif not self.stored[HEAD].same_as(self.stored[EMBEDDING]):
            text = dataclasses.replace(self.config.text, tie_word_embeddings=False)
            self.config = dataclasses.replace(self.config, text=text)
            self.notes.append(
                f"tie_word_embeddings is set, but {self.stored[HEAD].name} is stored with values of its own; it is used"
            )

    def _check_tensors(self) -> None:
        assert self.stored is not None
        wanted = {
            name: tuple(p.shape) for name, p in meta_model(self.config, PARTS).named_parameters(remove_duplicate=False)
        }
        for name, shape in wanted.items():
            check_tensor(self._find(name), name, shape, self.source)
        known = {*wanted, HEAD}
        unknown = sorted(tensor.name for name, tensor in self.stored.items() if name not in known)
        if unknown:
            self.notes.append(f"ignored {len(unknown)} tensors that are no part of the model, such as {unknown[0]}")

    def _find(self, name: str) -> StoredTensor | None:
        assert self.stored is not None
        if name == HEAD and self.config.text.tie_word_embeddings:
            name = EMBEDDING
        return self.stored.get(name)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that holds the stored weights; for a preset the one in which its shape is published, else fp32.

        Matrices decide: the widest of them, at most fp32. Norms in fp32 beside matrices in bf16 are kept in bf16.
        """
        if self.stored is None:
            return PUBLISHED_IN.get(self.source, torch.float32)
        known = ("encoder.", "projector.", "embedding.", "decoder.")
        found = {t.dtype for name, t in self.stored.items() if len(t.shape) > 1 and name.startswith(known)}
        widest = functools.reduce(torch.promote_types, found & set(FLOATS))
        return torch.float32 if widest == torch.float64 else widest

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One parameter by our name, read now, in the dtype asked for.

        Raises:
            CheckpointError: a number in it is NaN or infinite, or too large for that dtype.
        """
        if self.stored is None:
            tied = name == HEAD and self.config.text.tie_word_embeddings
            return random_tensor(EMBEDDING if tied else name, shape, self.seed, self.dtype).to(dtype)
        tensor = self._find(name)
        assert tensor is not None, name
        return read_finite(tensor, shape, dtype)

    def load(
        self, parts: Sequence[str] = PARTS, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> PenguinModel:
        """The model, or some of its parts, in evaluation mode; never holds more than one tensor beyond the result."""
        model = meta_model(self.config, parts)
        dtype = dtype or self.dtype
        for prefix, module in list(model.named_modules()):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{leaf}"
                if name == HEAD and self.config.text.tie_word_embeddings and model.embedding is not None:
                    continue
                value = self.tensor(name, parameter.shape, dtype).to(device)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        model.tie()
        return model.eval()

    def parameter_bytes(self, part: str, bytes_per_value: int) -> int:
        """Bytes of one part at a given width; a tied head counts in the decoder, too, since it is compiled into it."""
        return bytes_per_value * sum(p.numel() for p in meta_model(self.config, (part,)).parameters())

    def loaded_bytes(self, parts: Sequence[str] = PARTS, dtype: torch.dtype | None = None) -> int:
        """Bytes of what `load` returns; a head that shares the table's weights counts once."""
        count = sum(p.numel() for p in meta_model(self.config, parts).parameters())
        return count * (dtype or self.dtype).itemsize

    def fingerprint(self) -> str:
        """SHA-256 over the weights' files, or over a preset's name, configuration and seed."""
        if self.stored is None:
            text = json.dumps([self.source, self.config.to_json(), self.seed], sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()
        return _files_hash(self.stored.values())


def _files_hash(stored: Iterable[StoredTensor]) -> str:
    digest = hashlib.sha256()
    for path in sorted({tensor.path for tensor in stored}):
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def _with_end_of_turn(config: PenguinConfig, tokenizer: Path) -> PenguinConfig:
    """`config` with the token that ends a turn of the prompt format among those that end an answer.

    Published files often name another one alone: the end of a text, which a chat model does not write after an answer.
    """
    if not tokenizer.is_file():
        return config
    tokens = read_json(tokenizer, "the tokenizer").get("added_tokens")
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and token.get("content") == END:
            found = token.get("id")
            # A tokenizer of another model is refused by name where it is used; a language model's donor needs none.
            if type(found) is int and 0 <= found < config.text.vocab_size:
                ids = dict.fromkeys((*config.eos_token_ids, found))
                return dataclasses.replace(config, eos_token_ids=tuple(ids))
    return config


def _note_to_stderr(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def meta_model(config: PenguinConfig, parts: Sequence[str] = PARTS) -> PenguinModel:
    """The model's shape without its memory."""
    with torch.device("meta"):
        return PenguinModel(config, parts)


def read_encoder(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[PenguinConfig, Any]:
    """The encoder of a folder that holds just an encoder (such as tencent/Penguin-Encoder).

    Raises:
        CheckpointError: not an encoder checkpoint, or a tensor is missing or misshapen.
    """
    folder = Path(folder)
    data, stored, _ = open_files(folder)
    config, _, _ = config_from_folder(folder, data, {name: t.shape for name, t in stored.items()})
    model = meta_model(config, ("encoder",))
    if model.encoder is None:
        raise CheckpointError(f"{folder}: a text model without an encoder; name the folder of an encoder")
    for prefix, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}"
            tensor = stored.get(name)
            check_tensor(tensor, name, tuple(parameter.shape), str(folder))
            assert tensor is not None, name
            setattr(module, leaf, nn.Parameter(read_finite(tensor, parameter.shape, dtype), requires_grad=False))
    return config, model.encoder


def encoder_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the shape and the weights' files of a folder that `read_encoder` reads.

    Raises:
        CheckpointError: as `read_encoder`.
    """
    folder = Path(folder)
    data, stored, _ = open_files(folder)
    config, _, _ = config_from_folder(folder, data, {name: t.shape for name, t in stored.items()})
    shape = json.dumps(dataclasses.asdict(config)["vision"], sort_keys=True)
    return hashlib.sha256((shape + _files_hash(stored.values())).encode()).hexdigest()


def download(hub_id: str) -> Path:
    """Fetch a checkpoint from the hub, with the hub library's own progress bars.

    Raises:
        CheckpointError: the library is missing, the hub cannot be reached, or the id is unknown there.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{hub_id}: downloading needs huggingface_hub; run `pip install huggingface_hub`, or name a local folder"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub library raises many kinds for one fact: it could not be fetched
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: cannot be downloaded ({type(error).__name__}: {reason[:160]}); check the id and the "
            "network, or "
            "name a local folder that holds the checkpoint"
        ) from error


def save(model: PenguinModel, folder: str | Path, tokenizer: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a checkpoint in the published form (embedded encoder configuration), sharded when large.

    Raises:
        CheckpointError: the folder exists and is not empty.
    """
    with whole(folder, refuse_any(folder, CheckpointError), CheckpointError) as aside:
        write_published(model, aside, tokenizer, max_shard_bytes=max_shard_bytes)


def write_published(model: PenguinModel, folder: Path, tokenizer: Path, *, max_shard_bytes: int) -> None:
    """The files of `save`, into a folder that is there."""
    _write_weights(model.named_parameters(), folder, max_shard_bytes)
    for name, data in published_json(model.config, str(model.dtype).removeprefix("torch.")).items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _write_weights(parameters: Iterable[tuple[str, nn.Parameter]], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, nn.Parameter]] = [{}]
    filled = 0
    for name, parameter in parameters:
        if shards[-1] and filled + parameter.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = parameter
        filled += parameter.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for ours, parameter in shard.items():
            value = parameter.detach().cpu().contiguous()
            if ours == "encoder.patch_embedding.weight":
                value = value.reshape(-1, 3, PATCH, PATCH)
            tensors[published_name(ours)] = value
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(p.nbytes for shard in shards for p in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
