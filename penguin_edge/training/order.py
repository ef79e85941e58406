"""Which samples make which step: the length index, and an order that any step can be resumed from.

The order is a function of (seed, epoch) alone, so a run stopped in the middle of an epoch goes on with the very next
batch, and loader workers and processes agree on it without communicating.

One epoch: files (with their weights) -> indices -> order -> steps of `batch_size * world_size * accumulate` samples ->
micro-batches. With a length index the order is grouped: samples sorted by length, cut into steps, the steps shuffled;
this is what the reference records (`length_sampler` in the tables), except that here lengths get a little noise each
epoch, so that a sample does not meet the same neighbours every time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.errors import InputError, WriteError
from penguin_edge.files import file_hash, manifest_hash, read_json, write_text
from penguin_edge.schema import Free, Record, Rows, Table, Text, Whole

INDEX_SCHEMA = 2
UNUSABLE = -1
"""Length of a record that cannot be used; it keeps its place so that indices stay those of the file."""

INDEX = Record(
    {
        "schema": Whole(INDEX_SCHEMA, INDEX_SCHEMA),
        "annotations": Text(longest=64),
        "sha256": Text(longest=64),
        "settings": Free(),
        "lengths": Rows(Whole(UNUSABLE), most=1 << 40),
        "problems": Table(Text(pattern="[0-9]+", longest=16), Text(), most=1 << 40),
    }
)
"""What a stored index must be, to be used again."""

Array = NDArray[np.int64]


@dataclass(frozen=True)
class LengthIndex:
    """Tokens of every record of one annotation file, in file order, and why some cannot be used."""

    lengths: tuple[int, ...]
    problems: dict[int, str]


def index_path(annotations: Path) -> Path:
    """Where the length index of an annotation file lies."""
    return annotations.with_name(annotations.name + ".lengths.json")


def read_index(annotations: Path, count: int, settings: dict[str, Any]) -> LengthIndex | None:
    """The stored index, or None when there is none, when it is damaged, or when it belongs to another file content or
    other settings."""
    try:
        data = read_json(index_path(annotations), rule=INDEX)
        whole = data["sha256"] == manifest_hash(data) and len(data["lengths"]) == count
        if not whole or data["annotations"] != file_hash(annotations) or data["settings"] != settings:
            return None
        return LengthIndex(tuple(data["lengths"]), {int(k): v for k, v in data["problems"].items()})
    except (InputError, OSError):
        return None


def write_index(annotations: Path, index: LengthIndex, settings: dict[str, Any]) -> bool:
    """Store an index beside its file, atomically. False where the folder cannot be written."""
    data = {
        "schema": INDEX_SCHEMA,
        "annotations": file_hash(annotations),
        "settings": settings,
        "lengths": list(index.lengths),
        "problems": {str(number): why for number, why in index.problems.items()},
    }
    try:
        write_text(index_path(annotations), json.dumps({**data, "sha256": manifest_hash(data)}))
    except WriteError:
        return False
    return True


def build_index(lengths: Iterable[int | str]) -> LengthIndex:
    """An index from the lengths of all records in file order; a string says why that record cannot be used."""
    found = list(lengths)
    problems = {number: length for number, length in enumerate(found) if isinstance(length, str)}
    return LengthIndex(tuple(UNUSABLE if isinstance(length, str) else length for length in found), problems)


def cut(order: Sequence[int], step_size: int, least: int = 1) -> list[list[int]]:
    """Steps of `step_size` samples. A remainder of fewer than `least` joins the step before it: nothing is dropped."""
    steps = [list(order[start : start + step_size]) for start in range(0, len(order), step_size)]
    if len(steps) > 1 and len(steps[-1]) < least:
        rest = steps.pop()
        steps[-1] += rest
    return steps


def visual_tokens(height: int, width: int, frames: int | None = None, *, limit: int = 10_240) -> int:
    """Visual tokens of an image, or of a clip, as the reference's length tool counts them: no floor, no TRA.

    `penguinvl/tools/calculate_seqlen.py`, for comparing with its files; our own index counts built samples.
    """
    side = 14 if frames is None else 28
    return min(limit, -(-height // side) * -(-width // side) * (1 if frames is None else frames))


@dataclass(frozen=True)
class Order:
    """The samples of every step of every epoch.

    `sizes` are the records per file, `weights` how often a file's records come per epoch (0.5: a random half, 2: each
    twice). `lengths` over all files, in their order, switches grouping on; `UNUSABLE` ones are left out.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int
    weights: tuple[float, ...] = ()
    world_size: int = 1
    accumulate: int = 1
    lengths: tuple[int, ...] | None = None
    jitter: float = 0.1
    """Largest relative noise on a length before sorting; 0 gives the reference's steps, the same in every epoch."""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.sizes):
            raise InputError(f"{len(self.weights)} weights for {len(self.sizes)} files; give one each")
        if any(weight <= 0 for weight in self.weights):
            raise InputError(f"data weights are {list(self.weights)}; wanted numbers above 0")
        if self.samples_per_epoch < self.world_size * self.accumulate:
            raise InputError(
                f"{self.samples_per_epoch} usable samples cannot fill {self.world_size * self.accumulate} "
                "micro-batches of one step; use more data, fewer processes or less accumulation"
            )

    @property
    def step_size(self) -> int:
        """Samples of one optimiser step."""
        return self.batch_size * self.world_size * self.accumulate

    def _files(self) -> list[Array]:
        """Usable indices of each file, counted through all files."""
        starts = np.cumsum((0, *self.sizes))
        files = [np.arange(start, start + size) for start, size in zip(starts, self.sizes, strict=False)]
        if self.lengths is None:
            return files
        lengths = np.asarray(self.lengths)
        return [file[lengths[file] != UNUSABLE] for file in files]

    @property
    def samples_per_epoch(self) -> int:
        weights = self.weights or (1.0,) * len(self.sizes)
        return sum(round(w * len(file)) for w, file in zip(weights, self._files(), strict=True))

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.samples_per_epoch, self.step_size)
        return max(1, full + (rest >= self.world_size * self.accumulate))

    def steps(self, epoch: int) -> list[list[int]]:
        """The samples of each optimiser step of an epoch, over all processes."""
        import torch

        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", epoch))

        def permutation(count: int) -> Array:
            return torch.randperm(count, generator=generator).numpy()

        chosen = []
        for weight, file in zip(self.weights or (1.0,) * len(self.sizes), self._files(), strict=True):
            whole, part = divmod(round(weight * len(file)), max(1, len(file)))
            chosen += [file] * whole + [file[permutation(len(file))[:part]]]
        indices = np.concatenate(chosen)
        indices = indices[permutation(len(indices))]
        least = self.world_size * self.accumulate
        if self.lengths is None:
            return cut(indices.tolist(), self.step_size, least)
        lengths = np.asarray(self.lengths)[indices].astype(np.float64)
        noise = torch.rand(len(indices), generator=generator, dtype=torch.float64).numpy()
        ascending = indices[np.argsort(lengths * (1 + self.jitter * (2 * noise - 1)), kind="stable")]
        steps = cut(ascending.tolist(), self.step_size, least)
        return [steps[i] for i in permutation(len(steps))]

    def micro_batches(self, step: Sequence[int], rank: int) -> list[list[int]]:
        """The `accumulate` micro-batches that one process takes of a step; sizes differ by one at most."""
        parts = [[int(i) for i in part] for part in np.array_split(step, self.world_size * self.accumulate)]
        return parts[rank :: self.world_size]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
