"""What every engine does, whatever compiles or runs the graphs.

| call    | takes                                                       | gives                  |
|---------|-------------------------------------------------------------|------------------------|
| encode  | pixels [B,P,588] f32, rows [P] i64, cols [P] i64            | features [B,P,C] f32   |
| project | features [B,T,M,C] f32                                      | visual [B,T,H] f32     |
| embed   | ids [S] i64                                                 | embeds [S,H] f32       |
| forward | embeds [S,H] f32, logit_index [K] i64 (-1 is the last)      | logits [K,V] f32       |

`forward` appends S tokens to the KV cache at `kv_len`; `truncate(n)` forgets all but the first n, at no cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle import Bounds
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import BudgetError, InputError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Engine(Protocol):
    """One loaded model with one KV cache. Not thread-safe; one caller at a time."""

    name: str
    config: PenguinConfig
    bounds: Bounds

    @property
    def kv_len(self) -> int: ...
    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32: ...
    def project(self, features: F32) -> F32: ...
    def embed(self, ids: I64) -> F32: ...
    def forward(self, embeds: F32, logit_index: I64) -> F32: ...
    def truncate(self, length: int) -> None: ...


@runtime_checkable
class MovingEngine(Engine, Protocol):
    """An engine that can give positions of its cache another place.

    `move(begin, end, to)`: what was written at [begin, end), and not written over since, stands at [to, to + count)
    from now on, its keys turned by the rotary angle between the two, and `kv_len` is the end of it. `to` is not above
    `begin`; positions at or above `kv_len` may be named.
    """

    can_move: bool
    """False where the bundle lacks what a move needs, as those of earlier exports may."""

    def move(self, begin: int, end: int, to: int) -> None: ...


def chunks(count: int, bounds: Bounds) -> Iterator[slice]:
    """A prompt of `count` positions in pieces of at most `max_chunk`, none below `min_chunk` if it can be helped."""
    begin = 0
    while begin < count:
        rest = count - begin
        size = min(rest, bounds.max_chunk)
        if 0 < rest - size < bounds.min_chunk < size:
            size -= bounds.min_chunk - (rest - size)
        yield slice(begin, begin + size)
        begin += size


def check_encode(bounds: Bounds, pixels: F32) -> None:
    """Refuse a batch outside the declared bounds.

    Raises:
        InputError: more frames or more patches than the bundle was exported for.
    """
    batch, patches = pixels.shape[:2]
    if not 1 <= batch <= bounds.max_batch or not 1 <= patches <= bounds.max_patches:
        raise InputError(
            f"{batch} frames of {patches} patches, wanted at most {bounds.max_batch} of {bounds.max_patches}; use a "
            "smaller budget or export with larger bounds"
        )


def check_forward(bounds: Bounds, kv_len: int, embeds: F32, logit_index: I64) -> None:
    """Refuse a chunk outside the declared bounds.

    Raises:
        BudgetError: the cache cannot hold the chunk.
        InputError: chunk or logit index outside the bounds.
    """
    count, wanted = embeds.shape[0], logit_index.shape[0]
    if kv_len + count > bounds.max_seq_len:
        raise BudgetError(
            f"{kv_len + count} tokens, but the bundle holds max_seq_len = {bounds.max_seq_len}; use a shorter prompt, "
            "a smaller --budget, or export with a larger --max-seq-len"
        )
    if not 1 <= count <= bounds.max_chunk or wanted > bounds.max_logits:
        raise InputError(
            f"a chunk of {count} tokens with {wanted} logits, wanted 1 to {bounds.max_chunk} with at most "
            f"{bounds.max_logits}; split the prompt into chunks"
        )
    if wanted and (logit_index.min() < -1 or logit_index.max() >= count):
        raise InputError(
            f"logit_index {logit_index.tolist()} outside a chunk of {count} tokens; wanted -1 to {count - 1}"
        )


def check_move(max_seq_len: int, begin: int, end: int, to: int) -> None:
    """Refuse a move upwards, or of positions that there are not.

    Raises:
        InputError: anything but 0 <= to <= begin < end <= max_seq_len.
    """
    if not 0 <= to <= begin < end <= max_seq_len:
        raise InputError(
            f"move [{begin}, {end}) to {to} in a cache of {max_seq_len}; wanted 0 <= to <= begin < end <= {max_seq_len}"
        )


def check_truncate(kv_len: int, length: int) -> None:
    """Refuse a prefix longer than what the cache holds.

    Raises:
        InputError: `length` is negative or above `kv_len`.
    """
    if not 0 <= length <= kv_len:
        raise InputError(f"truncate to {length} tokens, but the cache holds {kv_len}; wanted 0 to {kv_len}")
