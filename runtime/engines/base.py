"""What every engine does, whatever compiles or runs the graphs.

| call    | takes                                                       | gives                  |
|---------|-------------------------------------------------------------|------------------------|
| encode  | pixels [B,P,588] f32, rows [P] i64, cols [P] i64            | features [B,P,C] f32   |
| project | features [B,T,M,C] f32                                      | visual [B,T,H] f32     |
| embed   | ids [S] i64                                                 | embeds [S,H] f32       |
| forward | embeds [S,H] f32, logit_index [K] i64 (-1 is the last),     | logits [K,V] f32       |
|         | positions [S] i64 (None: those that follow)                 |                        |

An engine is loaded graphs, which callers may share. What they do not share are KV caches: `new_cache` gives each its
own, and `forward` appends S tokens to the one that it is given. A token has a slot, where it is written and which the
causal mask counts, and a rotary position. The two are equal unless visual tokens before it were left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import Bounds
from penguin_edge.config import PATCH_VALUES, PenguinConfig
from penguin_edge.errors import BudgetError, InputError

if TYPE_CHECKING:
    from penguin_edge.prompt.tokenizer import Tokenizer
    from penguin_edge.runtime.engines.cache import Cache, Key

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


LARGEST = np.finfo(np.float32).max


def sound(values: F32) -> NDArray[np.bool_]:
    """Where a graph gave numbers: not NaN, not infinite, and not what XNNPACK's quantized linears make of these.

    They clamp to the range of f32, and NaN becomes one end of it.
    """
    return np.abs(values) < LARGEST


class Engine(Protocol):
    """One loaded model.

    One thread at a time: a second one is refused with `BusyError`. `embed` only reads, and may be called at any time.
    """

    name: str
    config: PenguinConfig
    bounds: Bounds

    @property
    def capacity(self) -> int | None:
        """How many caches may be open at once; None: as many as memory holds."""
        ...

    @property
    def can_move(self) -> bool:
        """False where the bundle lacks what `move` needs, as those of earlier exports may."""
        ...

    @property
    def moves_exactly(self) -> bool:
        """False where each move rounds keys anew by a step of an int8 cache, which adds up."""
        ...

    @property
    def can_place(self) -> bool:
        """Whether tokens may have other positions than slots; False for the graphs of earlier exports."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model.

        Raises:
            InputError: the engine was made without one.
        """
        ...

    def load(self, *, media: bool) -> None:
        """Load what answers need, with pictures or without; otherwise each graph is loaded at its first use.

        Raises:
            BundleError: a graph cannot be loaded.
        """
        ...

    def new_cache(self) -> Cache:
        """An empty KV cache of `max_seq_len` positions.

        Raises:
            BusyError: `capacity` of them are open.
        """
        ...

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32: ...
    def project(self, features: F32) -> F32: ...
    def embed(self, ids: I64) -> F32: ...
    def forward(
        self, cache: Cache, embeds: F32, logit_index: I64, keys: Sequence[Key] = (), positions: I64 | None = None
    ) -> F32:
        """Append to a cache.

        Args:
            keys: what stands in each slot, for who wants to find it there again.
            positions: [S], the rotary position of each token; None: those that follow the cache's last one.
        """
        ...

    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        """Give slots of a cache another place.

        What was written at [begin, end), and not written over since, stands at [to, to + count) from now on, and the
        cache ends there. `to` is not above `begin`; slots at or above the cache's length may be named.

        Args:
            turn: by how many rotary positions the keys are turned; None: as many as the slots move by.
        """
        ...

    def close(self) -> None:
        """Let go of the graphs and close all caches; whatever is asked afterwards is refused."""
        ...


MAX_THREADS = 1024
"""Threads of one engine; each costs memory, and more than there are cores make nothing faster."""


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no machine has.

    Raises:
        InputError: none of 1 to `MAX_THREADS`, and not None.
    """
    if threads is not None and not (_is_whole(threads) and 1 <= threads <= MAX_THREADS):
        raise InputError(f"{threads!r} threads, wanted 1 to {MAX_THREADS}, or none for one per core")


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


def check_encode(bounds: Bounds, pixels: F32, rows: I64, cols: I64) -> None:
    """Refuse patches [B, P, 588] whose places [P] do not fit them, or that are outside the declared bounds.

    Raises:
        InputError: another shape or dtype, or more frames or patches than the bundle was exported for.
    """
    _check_array("pixels", pixels, "f", (None, None, PATCH_VALUES))
    for name, places in (("rows", rows), ("cols", cols)):
        _check_array(name, places, "iu", (pixels.shape[1],))
    _check_frames(bounds, *pixels.shape[:2])


def check_project(bounds: Bounds, features: F32) -> None:
    """Refuse features [B, T, M, C] outside the declared bounds.

    Raises:
        InputError: another shape or dtype, or more frames or patches than the bundle was exported for.
    """
    _check_array("features", features, "f", (None, None, None, None))
    _check_frames(bounds, features.shape[0], features.shape[1] * features.shape[2])


def _check_array(name: str, values: Any, kinds: str, shape: tuple[int | None, ...]) -> None:
    """Refuse what is no array of these kinds ("f": floats, "iu": integers) and sizes; None takes any size."""
    if isinstance(values, np.ndarray) and values.dtype.kind in kinds and values.ndim == len(shape):
        for want, size in zip(shape, values.shape, strict=True):
            if want is not None and want != size:
                break
        else:
            return
    got = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
    wanted = ", ".join("any" if size is None else f"{size}" for size in shape)
    kind = "floats" if kinds == "f" else "integers"
    raise InputError(f"{name}: {got}, wanted an array of {kind} of shape [{wanted}]")


def _check_frames(bounds: Bounds, batch: int, patches: int) -> None:
    if not 1 <= batch <= bounds.max_batch or not 1 <= patches <= bounds.max_patches:
        raise InputError(
            f"{batch} frames of {patches} patches, wanted at most {bounds.max_batch} of {bounds.max_patches}; use a "
            "smaller budget or export with larger bounds"
        )


def check_forward(bounds: Bounds, kv_len: int, embeds: F32, logit_index: I64, width: int) -> None:
    """Refuse a chunk [S, width] outside the declared bounds.

    Raises:
        BudgetError: the cache cannot hold the chunk.
        InputError: another shape or dtype, or chunk or logit index outside the bounds.
    """
    _check_array("embeds", embeds, "f", (None, width))
    _check_array("logit_index", logit_index, "iu", (None,))
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
    if not wanted:
        return
    # A decoded token asks for one: a reduction over one number takes a microsecond.
    least = most = int(logit_index[0])
    if wanted > 1:
        least, most = int(logit_index.min()), int(logit_index.max())
    if least < -1 or most >= count:
        raise InputError(
            f"logit_index {logit_index.tolist()} outside a chunk of {count} tokens; wanted -1 to {count - 1}"
        )


def check_positions(positions: I64 | None, count: int, slot: int, following: int, most: int, *, can_place: bool) -> I64:
    """Rotary positions [S] of `count` tokens that are written from `slot` on.

    Args:
        positions: as `forward` takes them.
        following: the position behind the cache's last one.
        most: see `penguin_edge.bundle.contract.most_positions`.
        can_place: whether the graphs take positions.
    Raises:
        BudgetError: a position that the graphs have no angles for.
        InputError: another shape or dtype, a negative position, or other positions than slots where `can_place` is not.
    """
    if positions is None:
        least, last = following, following + count - 1
        found = np.arange(least, last + 1, dtype=np.int64)
    else:
        _check_array("positions", positions, "iu", (count,))
        found = np.ascontiguousarray(positions, dtype=np.int64)
        least, last = int(found.min()), int(found.max())
    if last >= most:
        raise BudgetError(
            f"position {last}, but there are {most} of this model and this cache; use a shorter prompt, keep more of "
            "the visual tokens, or export with a larger --max-seq-len"
        )
    if least < 0:
        raise InputError(f"position {least}, wanted 0 to {most - 1}")
    if not can_place and not np.array_equal(found, np.arange(slot, slot + count)):
        raise InputError(
            f"positions {least} to {last} in slots {slot} to {slot + count - 1}: the graphs of this bundle know slots "
            "alone; export the model again"
        )
    return found


def check_move(max_seq_len: int, begin: int, end: int, to: int, turn: int | None = None) -> None:
    """Refuse a move upwards, or one of slots beyond the cache.

    Raises:
        InputError: anything but 0 <= to <= begin < end <= max_seq_len, or a turn by no whole number.
    """
    if turn is not None and not _is_whole(turn):
        raise InputError(f"move with a turn by {turn!r} positions, wanted a whole number")
    if not all(map(_is_whole, (begin, end, to))) or not 0 <= to <= begin < end <= max_seq_len:
        raise InputError(
            f"move [{begin}, {end}) to {to} in a cache of {max_seq_len}; wanted 0 <= to <= begin < end <= {max_seq_len}"
        )


def check_truncate(kv_len: int, length: int) -> None:
    """Refuse a prefix longer than what the cache holds.

    Raises:
        InputError: `length` is no whole number, negative or above `kv_len`.
    """
    if not _is_whole(length) or not 0 <= length <= kv_len:
        raise InputError(f"truncate to {length} tokens, but the cache holds {kv_len}; wanted 0 to {kv_len}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
