"""Reading safetensors one tensor at a time, with plain reads, and choosing the files of a checkpoint.

The `safetensors` package maps the whole file, and every page it touches counts as resident: loading a checkpoint then
peaks at twice its size. Plain reads into the tensor's own memory peak at once its size, and say which tensor is cut
off.

Headers and the shard index are input: their sizes, names, shapes and byte ranges are checked before anything is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from penguin_edge.bundle.stamps import Stamp
from penguin_edge.errors import CheckpointError
from penguin_edge.files import MAX_BYTES, parse_json, read_json
from penguin_edge.schema import Record, Rows, SchemaError, Table, Text, Whole

DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F64": (torch.float64, 64),
    "F32": (torch.float32, 32),
    "F16": (torch.float16, 16),
    "BF16": (torch.bfloat16, 16),
    "C64": (torch.complex64, 64),
    "I64": (torch.int64, 64),
    "I32": (torch.int32, 32),
    "I16": (torch.int16, 16),
    "I8": (torch.int8, 8),
    "U64": (torch.uint64, 64),
    "U32": (torch.uint32, 32),
    "U16": (torch.uint16, 16),
    "U8": (torch.uint8, 8),
    "BOOL": (torch.bool, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, 8),
    "F8_E8M0": (torch.float8_e8m0fnu, 8),
    "F4": (torch.float4_e2m1fn_x2, 4),
}
"""Dtypes of the format, with bits per number. Most cannot be weights of ours; they are listed to be refused by name."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that need no scales beside them."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = Text(pattern=r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+", called="a name without control characters", longest=512)
"""Names are printed: one with a line end or an escape sequence in it would write its own messages on a terminal."""
ENTRY = Record(
    {"dtype": Text(words=tuple(DTYPES)), "shape": Rows(Whole(), most=8), "data_offsets": Rows(Whole(), 2, 2)}
)
INDEX_RULE = Record(
    {
        "weight_map": Table(
            NAME,
            Text(
                pattern=r"[^/\\\x00-\x1f]+\.safetensors",
                called="the plain name of a safetensors file in the same folder",
                longest=255,
            ),
            least=1,
        )
    },
    open=True,
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: dtype, shape and byte range in its file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    seen: Stamp
    """The file when its header was read."""

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file is shorter than its header says, or was written again since that was read.
        """
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        with self._opened() as stream:
            view = buffer.numpy().data
            done = 0
            while done < self.nbytes:
                count = stream.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise _truncated(self.path, self.name)
                done += count
        return buffer.view(self.dtype).reshape(self.shape)

    def same_as(self, other: StoredTensor) -> bool:
        """Whether another tensor has the same shape, dtype and bytes; neither is ever in memory as a whole."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        step = 16 << 20
        with self._opened() as left, other._opened() as right:
            sizes = (min(step, self.nbytes - begin) for begin in range(0, self.nbytes, step))
            return all(left.read(size) == right.read(size) for size in sizes)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Open the file at the tensor's first byte.

        Raises:
            CheckpointError: it is another file now, or was written again.
        """
        with self.path.open("rb") as stream:
            now = Stamp.of(stream.fileno())
            if now is None or not now.same_file(self.seen):
                raise CheckpointError(f"{self.path}: changed while it was being read; run the command again")
            stream.seek(self.offset)
            yield stream


def _truncated(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: cut off inside tensor {name}; download or copy the checkpoint again")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, by name.

    Raises:
        CheckpointError: not a safetensors file, a damaged header, an unknown dtype, tensors that overlap or leave
            bytes between them, or a file cut off.
    """
    try:
        with path.open("rb") as stream:
            seen = Stamp.of(stream.fileno())
            if seen is None:
                raise ValueError("it is gone")
            size = seen.size
            text = _header(stream, size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({reason}); download or copy the checkpoint again"
        ) from error
    advice = "download or copy the checkpoint again"
    what = f"{path}: not a readable safetensors file: its header"
    header, start = parse_json(text, what, error=CheckpointError, advice=advice), 8 + len(text)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a readable safetensors file (its header is not an object); {advice}")
    rows = {name: row for name, row in header.items() if name != "__metadata__"}
    for name, row in rows.items():
        try:
            NAME.check(name, "the name of a tensor")
            ENTRY.check(row, f"tensor {name[:200]}")
        except SchemaError as error:
            raise CheckpointError(f"{path}: {error}; {advice}") from error
    out, end = {}, 0
    for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"]):
        (dtype, bits), shape, (begin, stop) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
        wanted = math.prod(shape) * bits // 8
        if begin != end or stop - begin != wanted:
            raise CheckpointError(
                f"{path}: tensor {name} {list(shape)} of {row['dtype']} lies at bytes {begin} to {stop}, wanted {end} "
                f"to {end + wanted}: tensors lie one after another; {advice}"
            )
        end = stop
        if start + stop > size:
            raise _truncated(path, name)
        out[name] = StoredTensor(path, name, dtype, shape, start + begin, wanted, seen)
    if start + end != size:
        raise CheckpointError(f"{path}: {size - start - end} bytes behind its last tensor; {advice}")
    return {name: out[name] for name in rows}


def _header(stream: BinaryIO, size: int) -> bytes:
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"header length {length} in a file of {size} bytes")
    if length > MAX_BYTES:
        raise ValueError(f"a header of {length} bytes, wanted at most {MAX_BYTES}")
    return stream.read(length)


def checkpoint_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a checkpoint folder by their published names, from the files that transformers reads, and notes.

    `model.safetensors` is read alone where it is there; otherwise the shards that the index names. Any other
    safetensors file is left alone, with a note.

    Raises:
        CheckpointError: neither is there, a shard is missing, or index and shards do not agree about a tensor.
    """
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if ranks := [name for name in others if re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", name)]:
        raise CheckpointError(
            f"{folder / ranks[0]}: a shard of a distributed training checkpoint; wanted the published form: load it "
            "with transformers and save it with save_pretrained"
        )
    if (folder / WEIGHTS).is_file():
        tensors, used = read_header(folder / WEIGHTS), {WEIGHTS}
    elif (folder / INDEX).is_file():
        tensors, used = _indexed(folder)
    elif others:
        raise CheckpointError(
            f"{folder}: {others[0]}{' and others' if others[1:] else ''} there, but neither {WEIGHTS} nor {INDEX}, "
            "which says what belongs to the model; copy that, too, or rename a single file"
        )
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        advice = f"; save {pickled[0]} as safetensors first" if pickled else ""
        raise CheckpointError(
            f"{folder}: no *.safetensors file there; wanted the published checkpoint's weights{advice}"
        )
    unread = [name for name in others if name not in used]
    notes = [f"read {', '.join(sorted(used)[:2])}{' …' * (len(used) > 2)}, and not {unread[0]}"] if unread else []
    return tensors, notes


def _indexed(folder: Path) -> tuple[dict[str, StoredTensor], set[str]]:
    advice = "copy the checkpoint again"
    index = read_json(folder / INDEX, what=f"{folder / INDEX}: the shard index", error=CheckpointError, advice=advice)
    try:
        INDEX_RULE.check(index, "the shard index")
    except SchemaError as error:
        raise CheckpointError(f"{folder / INDEX}: {error}; {advice}") from error
    places: Mapping[str, str] = index["weight_map"]
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); copy it")
    tensors: dict[str, StoredTensor] = {}
    for shard in names:
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {name} lies in {tensors[name].path.name} and in {shard}; readers take one or "
                    "the other: delete the stale one, or save the checkpoint again"
                )
            tensors[name] = tensor
    for name, shard in places.items():
        if name not in tensors or tensors[name].path.name != shard:
            found = f"it lies in {tensors[name].path.name}" if name in tensors else "no shard holds it"
            raise CheckpointError(
                f"{folder / INDEX}: tensor {name} is said to be in {shard}, but {found}; index and shards are of two "
                "checkpoints: copy both again"
            )
    return tensors, set(names)
