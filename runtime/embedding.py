"""The embedding table as it lies in a bundle: raw rows, memory-mapped, so that only rows that are read take memory.

| tensor | shape    | dtype                                                                                 |
|--------|----------|---------------------------------------------------------------------------------------|
| table  | [V, H]   | fp32, fp16, bf16 or int8, little-endian, row-major; int4: [V, H/2] uint8, low bits first |
| scales | [V]      | float32, behind an int8 table: one per row                                            |
| scales | [V, H/G] | float32, of an int4 table: one per group; a level of 8 is zero                        |
| ids    | [S]      | int64                                                                                 |
| embeds | [S, H]   | float32                                                                               |

An int4 table lies where the manifest's `embedding` says: in a file of its own, or, where head and table are one, in the
head's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle import EMBEDDING, Bundle
from penguin_edge.errors import BundleError, InputError

STORED = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2", "int8": "i1", "int4": "u1"}
"""NumPy dtype of what lies in the file; it has no bf16, whose bits are the upper half of an fp32."""


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows of `[V, H]`, given as float32. Of int8 and int4 tables `scales` has one or more values per row."""

    table: NDArray[Any]
    dtype: str
    scales: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> EmbeddingTable:
        """The table of a bundle.

        Raises:
            BundleError: as `open`, or a place outside of the file.
        """
        manifest, text = bundle.manifest, bundle.manifest.model.text
        place = manifest.embedding
        if place is None:
            return cls.open(bundle.path(EMBEDDING), text.vocab_size, text.hidden_size, manifest.embedding_dtype)
        path, groups = bundle.path(place.file), text.hidden_size // place.group
        try:
            shape = (text.vocab_size, text.hidden_size // 2)
            levels = np.memmap(path, np.uint8, "r", offset=place.levels, shape=shape)
            scales = np.memmap(path, "<f4", "r", offset=place.scales, shape=(text.vocab_size, groups))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: holds no int4 table where the manifest says ({error}); export again") from error
        return cls(levels, "int4", scales)

    @classmethod
    def open(cls, path: str | Path, vocab: int, hidden: int, dtype: str) -> EmbeddingTable:
        """Map the file.

        Raises:
            BundleError: unknown dtype, or a file that is missing or of another size.
        """
        if dtype not in STORED or dtype == "int4":
            raise BundleError(f"embedding dtype {dtype!r}, wanted one of {', '.join(STORED)}; export the model again")
        stored = np.dtype(STORED[dtype])
        table = vocab * hidden * stored.itemsize
        wanted = table + (4 * vocab if dtype == "int8" else 0)
        try:
            found = Path(path).stat().st_size
            if found != wanted:
                raise BundleError(
                    f"{path}: {found} bytes, wanted {wanted} for [{vocab}, {hidden}] in {dtype}; export the model again"
                )
            rows = np.memmap(path, dtype=stored, mode="r", shape=(vocab, hidden))
            scales = np.fromfile(path, dtype="<f4", offset=table) if dtype == "int8" else None
            return cls(rows, dtype, scales)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from error

    def lookup(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S] -> [S, H].

        Raises:
            InputError: an id outside the vocabulary.
        """
        vocab = self.table.shape[0]
        outside = ids[(ids < 0) | (ids >= vocab)]
        if outside.size:
            raise InputError(
                f"token id {int(outside[0])}, wanted 0 to {vocab - 1}; tokenize with the bundle's own tokenizer"
            )
        rows = np.asarray(self.table[ids])
        if self.dtype == "bf16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        if self.scales is not None and self.dtype == "int4":
            groups, width = self.scales.shape[1], 2 * self.table.shape[1]
            levels = np.stack((rows & 15, rows >> 4), -1).reshape(len(ids), groups, width // groups)
            return ((levels.astype(np.float32) - 8) * self.scales[ids][:, :, None]).reshape(len(ids), width)
        if self.scales is not None:
            return rows.astype(np.float32) * self.scales[ids][:, None]
        return rows.astype(np.float32)
