"""Small folders as transformers and peft save them, and the question whether we compute the same from them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.CRITICAL)

SIZES: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 601,
    "pad_token_id": 601,
    "bos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
TOLERANCE = 2e-5
"""Share of the largest logit: the same sums in fp32, in another order at most."""
Edit = Callable[[Path], None]


def make(folder: Path, kind: str = "qwen3", *, tied: bool = False, shard: str = "1GB", **changes: Any) -> Path:
    """A random model of the kind, saved by transformers; a shard as small as 20KB makes several files."""
    torch.manual_seed(1)
    fields = {**SIZES, "rope_parameters": dict(ROPE), "tie_word_embeddings": tied, **changes}
    if kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{"head_dim": 16, **fields}))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            centre, scale = (1.0, 0.1) if parameter.ndim == 1 else (0.0, 1.5 / parameter.shape[-1] ** 0.5)
            parameter.normal_(centre, scale)
    model.save_pretrained(folder, max_shard_size=shard)
    shutil.copyfile(DEFAULT_TOKENIZER, folder / "tokenizer.json")
    return folder


def ids() -> Tensor:
    return torch.randint(0, 590, (1, 48), generator=torch.Generator().manual_seed(3))


def ours(folder: Path, notes: list[str] | None = None) -> Tensor:
    """Our logits [48, V] in fp32."""
    checkpoint = Checkpoint.open(folder, note=(notes if notes is not None else []).append)
    model = checkpoint.load(dtype=torch.float32)
    assert model.decoder is not None
    with torch.no_grad():
        return model.decoder.logits(model(ids()), torch.arange(48))[0]


def theirs(folder: Path) -> Tensor:
    """Those of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(ids()).logits[0]
    return logits


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def config(**changes: Any) -> Edit:
    """Set fields of config.json; `...` removes one."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return edit


def weights(change: Callable[[dict[str, Tensor]], Any], name: str = "model.safetensors") -> Edit:
    """Change the tensors of one file, in place."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})

    return edit


def text(name: str, content: Any) -> Edit:
    """Write a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(content)) and None


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit
