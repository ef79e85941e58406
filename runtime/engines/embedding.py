"""The embedding table as it lies in a bundle: raw rows, read one by one, so that only rows that are read take memory.

| tensor | shape    | dtype                                                                                    |
|--------|----------|------------------------------------------------------------------------------------------|
| table  | [V, H]   | fp32, fp16, bf16 or int8, little-endian, row-major; int4: [V, H/2] uint8, low bits first |
| scales | [V]      | float32, behind an int8 table: one per row                                               |
| scales | [V, H/G] | float32, of an int4 table: one per group; a level of 8 is zero                           |
| ids    | [S]      | int64                                                                                    |
| embeds | [S, H]   | float32                                                                                  |

An int4 table lies where the manifest's `embedding` says: in a file of its own, or, where head and table are one, in the
head's weights. The file is not mapped into memory: a process that reads a mapped file that was cut off is killed.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import EMBEDDING
from penguin_edge.bundle.folder import Bundle
from penguin_edge.bundle.stamps import Stamp
from penguin_edge.errors import BundleError, InputError

STORED = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2", "int8": "i1", "int4": "u1"}
"""NumPy dtype of what lies in the file; it has no bf16, whose bits are the upper half of an fp32."""


class TableRows:
    """Rows [count, width] of a file that stays open, read by number from any thread."""

    def __init__(self, path: Path, dtype: str, offset: int, count: int, width: int) -> None:
        """
        Raises:
            OSError: the file cannot be opened.
            ValueError: it ends before the last row, or `offset` is negative.
        """
        self.count, self.width = count, width
        self._path, self._dtype, self._offset = path, np.dtype(dtype), offset
        self._bytes = width * self._dtype.itemsize
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._stamp = Stamp.of(self._file)
        end = offset + count * self._bytes
        if self._stamp is None or offset < 0 or self._stamp.size < end:
            raise ValueError(f"{self._stamp.size if self._stamp else 0} bytes, wanted {count} rows from {offset} on")

    def read(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """[S] -> [S, width].

        Raises:
            BundleError: the file was changed since it was opened.
        """
        size, offset = self._bytes, self._offset
        found = b"".join(os.pread(self._file, size, offset + size * row) for row in ids.tolist())
        now = Stamp.of(self._file)
        if now is None or not now.same_file(self._stamp) or len(found) != size * len(ids):
            raise BundleError(f"{self._path}: changed while the bundle was open; open the bundle again")
        return np.frombuffer(found, self._dtype).reshape(len(ids), self.width)


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows of `[V, H]`, given as float32. Of int8 tables `scales` has a value per row, of int4 tables several."""

    rows: TableRows
    dtype: str
    scales: NDArray[np.float32] | TableRows | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> EmbeddingTable:
        """The table of a bundle.

        Raises:
            BundleError: as `open`, or a place outside of the file.
        """
        manifest, text = bundle.manifest, bundle.manifest.model.text
        place = manifest.embedding
        with bundle.unchanged():
            if place is None:
                return cls.open(bundle.path(EMBEDDING), text.vocab_size, text.hidden_size, manifest.embedding_dtype)
            path, groups = bundle.path(place.file), text.hidden_size // place.group
            try:
                levels = TableRows(path, "u1", place.levels, text.vocab_size, text.hidden_size // 2)
                scales = TableRows(path, "<f4", place.scales, text.vocab_size, groups)
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"{path}: holds no int4 table where the manifest says ({error}); export again"
                ) from error
        return cls(levels, "int4", scales)

    @classmethod
    def open(cls, path: str | Path, vocab: int, hidden: int, dtype: str) -> EmbeddingTable:
        """Open the file.

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
            rows = TableRows(Path(path), STORED[dtype], 0, vocab, hidden)
            scales = np.fromfile(path, dtype="<f4", offset=table) if dtype == "int8" else None
            return cls(rows, dtype, scales)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise BundleError(f"{path}: cannot be read ({reason}); copy the bundle again") from error

    def lookup(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S] -> [S, H].

        Raises:
            InputError: no vector of whole numbers, or an id outside the vocabulary.
            BundleError: the file was changed since it was opened.
        """
        vocab, width = self.rows.count, self.rows.width
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
            raise InputError(f"ids: {got}, wanted an array of integers of shape [any]")
        outside = ids[(ids < 0) | (ids >= vocab)]
        if outside.size:
            raise InputError(
                f"token id {int(outside[0])}, wanted 0 to {vocab - 1}; tokenize with the bundle's own tokenizer"
            )
        rows = self.rows.read(ids)
        if self.dtype == "bf16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        if isinstance(self.scales, TableRows):
            groups = self.scales.width
            levels = np.stack((rows & 15, rows >> 4), -1).reshape(len(ids), groups, 2 * width // groups)
            return ((levels.astype(np.float32) - 8) * self.scales.read(ids)[:, :, None]).reshape(len(ids), 2 * width)
        if self.scales is not None:
            return rows.astype(np.float32) * self.scales[ids][:, None]
        return rows.astype(np.float32)
