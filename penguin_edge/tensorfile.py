"""Reading safetensors one tensor at a time, with plain reads.

The `safetensors` package maps the whole file, and every page it touches counts as resident: loading a checkpoint then
peaks at twice its size. Plain reads into the tensor's own memory peak at once its size, and say which tensor is cut
off.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from penguin_edge.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: dtype, shape and byte range in its file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file is shorter than its header says.
        """
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            view = buffer.numpy().data
            done = 0
            while done < self.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise _truncated(self.path, self.name)
                done += count
        return buffer.view(self.dtype).reshape(self.shape)


def _truncated(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: cut off inside tensor {name}; download or copy the checkpoint again")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, by name.

    Raises:
        CheckpointError: not a safetensors file, a damaged header, an unknown dtype, or a file cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            header, start = _json_header(stream, size)
        except (ValueError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); download or copy the checkpoint again"
            ) from error
    out = {}
    for name, row in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
            if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"bytes {begin} to {end} for {list(shape)} of {row['dtype']}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name} has an entry that cannot be used ({error!r})") from error
        if start + end > size:
            raise _truncated(path, name)
        out[name] = StoredTensor(path, name, dtype, shape, start + begin, end - begin)
    return out


def _json_header(stream: BinaryIO, size: int) -> tuple[dict[str, dict], int]:
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"header length {length} in a file of {size} bytes")
    header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, 8 + length


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those its index names, or all of them.

    Raises:
        CheckpointError: none there, or a shard that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index}: not a readable shard index ({error!r}); copy the checkpoint again"
            ) from error
        missing = [name for name in names if not (folder / os.path.basename(name)).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); copy it again"
            )
        return [folder / os.path.basename(name) for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file there; wanted the published checkpoint's weights")
    return files
