"""Folders that hold something other than one model's own weights and settings.

Adapters and weights that somebody quantized load, in part, as if they were plain checkpoints, and then compute
something else. They are told by their files, their configuration and the names and dtypes of their tensors, before any
tensor is read. Folders with settings for several versions of transformers are a different model in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from penguin_edge.config import read_json
from penguin_edge.errors import CheckpointError
from penguin_edge.model.tensorfile import FLOATS
from penguin_edge.schema import Rows, SchemaError, Text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
ADAPTER_NAMES = re.compile(
    r"^base_model\.model\.|\.base_layer\.|\.(lora|vera|ia3|hada|lokr|oft|boft|randlora|hra|miss|bone)_[A-Za-z]"
    r"|\.modules_to_save\.|\.original_module\.|^prompt_embeddings|\.trainable_tokens_"
)
"""What PEFT calls its tensors, in an adapter's file and in the state of a model that was not merged."""

QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that AutoGPTQ, AutoAWQ and ModelOpt write."""
QUANTIZED_FIELDS = ("quantization_config", "compression_config", "quantization")
"""Fields that transformers, compressed-tensors before it, and MLX write."""
QUANTIZED_NAMES: Mapping[str, str] = {
    r"\.(qweight|qzeros|g_idx|scales)$": "GPTQ, AWQ or MLX",
    r"\.weight_(packed|scale|scale_inv|scale_2|global_scale|zero_point|shape|g_idx)$": "fp8 or compressed-tensors",
    r"\.(input|output|k|v)_scale(_ub)?$|\.activation_scale$": "fp8 or compressed-tensors",
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..+)?|SCB|weight_format)$": "bitsandbytes",
    r"\.weight\._(data|scale|shift|packed)$|\._weight_[a-z]|\.weight:": "quanto or torchao",
    r"\.(W_q|W_nbits)$": "HQQ",
    r"\.(codes|codebooks|Qidxs|SU|SV)$|_(blocks|scales)$": "a codebook or block format",
}
"""Tensors that stand beside packed or scaled weights, by the tool that writes them."""


VERSIONED = {"config.json": "configuration_files", "tokenizer_config.json": "fast_tokenizer_files"}
"""Files that may name others of the folder, and the fields in which they do."""
CHOSEN = {"configuration_files": "config", "fast_tokenizer_files": "tokenizer"}
"""What the other files stand in place of: `config.4.2.0.json` of `config.json` for transformers 4.2.0 and newer."""


def refuse_versioned(folder: Path) -> None:
    """Refuse settings or a tokenizer of which each version of transformers reads another file.

    Raises:
        CheckpointError: a file names such others; the message names both.
    """
    for name, field in VERSIONED.items():
        path = folder / name
        data = read_json(path, "a configuration") if path.is_file() else {}
        if field not in data:
            continue
        try:
            Rows(Text()).check(data[field], field)
        except SchemaError as error:
            raise CheckpointError(f"{path}: {error}; copy the checkpoint again") from error
        plain = CHOSEN[field]
        other = next((f for f in data[field] if re.search(rf"{plain}\..*\.json", f)), None)
        if other is not None:
            raise CheckpointError(
                f"{path}: {field} names {other[:80]!r}, which some versions of transformers read in place of "
                f"{plain}.json: keep the file that holds, as {plain}.json, and leave {field} out"
            )


def refuse_adapter(folder: Path, names: Iterable[str] = ()) -> None:
    """Refuse a LoRA or another PEFT adapter: beside a model, alone, or not yet merged into it.

    Args:
        names: the published names of the stored tensors, where they are known.
    Raises:
        CheckpointError: an adapter's file or tensor is there; the message says how to merge.
    """
    found = next((str(folder / name) for name in ADAPTER_FILES if (folder / name).exists()), None)
    if found is None:
        tensor = next((name for name in names if ADAPTER_NAMES.search(name)), None)
        found = f"{folder}: tensor {tensor}" if tensor else None
    if found is not None:
        raise CheckpointError(
            f"{found} is part of an adapter, which would be left out; merge it first (merge_and_unload of PEFT), save "
            "the result in a folder of its own, and name that"
        )


def refuse_quantized(folder: Path, data: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse weights that were quantized elsewhere.

    Args:
        data: the content of `config.json`.
        dtypes: dtypes of the stored tensors by their published names.
    Raises:
        CheckpointError: a quantization is configured, or a tensor belongs to one; the message says which.
    """
    found = ""
    for key in QUANTIZED_FIELDS:
        if data.get(key):
            value = data[key]
            method = value.get("quant_method") if isinstance(value, dict) else None
            found = f"{folder / 'config.json'}: {key}" + (f" ({str(method)[:40]!r})" if method else "")
            break
        if data.get(key) is not None:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {data[key]!r}, which says neither how the weights were quantized "
                "nor that they were not; leave it out if they are plain"
            )
    found = found or next((str(folder / name) for name in QUANTIZED_FILES if (folder / name).exists()), "")
    for pattern, tool in QUANTIZED_NAMES.items():
        if found:
            break
        tensor = next((name for name in dtypes if re.search(pattern, name)), None)
        found = f"{folder}: tensor {tensor} (as of {tool})" if tensor else ""
    packed = next((n for n, dtype in dtypes.items() if n.endswith(".weight") and dtype not in FLOATS), None)
    if not found and packed:
        found = f"{folder}: tensor {packed} of {str(dtypes[packed]).removeprefix('torch.')}"
    if found:
        raise CheckpointError(
            f"{found} says that these weights are quantized; name the checkpoint before quantization, in floating "
            "point, and let `export --quant` quantize it"
        )
