"""What stands in each slot of a KV cache, read as frames.

A key is a token id, or (frame at a size, its n-th token); a block is a frame's kept tokens with the text before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from penguin_edge.runtime.core.report import Clock
from penguin_edge.runtime.engines.base import F32, Engine, chunks
from penguin_edge.runtime.engines.cache import Cache, Key, Visual, positions_of

Block: TypeAlias = tuple[tuple[Key | None, ...], Visual, tuple[int, ...]]
"""A frame as it is told from others: the text before it, its content and its size, and which of its tokens are there.
Inside of equal blocks positions differ by the same number, whatever stands before them."""


def blocks(keys: Sequence[Key | None]) -> list[tuple[Block, tuple[int, int]]]:
    """Frames with the text before each, and their slots."""
    found: list[tuple[Block, tuple[int, int]]] = []
    begin = 0
    numbers: list[int] = []
    for at, key in enumerate(keys):
        if not isinstance(key, tuple):
            continue
        numbers.append(key[1])
        following = keys[at + 1] if at + 1 < len(keys) else None
        if isinstance(following, tuple) and following[0] == key[0] and following[1] > key[1]:
            continue
        text = tuple(keys[begin : at + 1 - len(numbers)])
        found.append(((text, key[0], tuple(numbers)), (begin, at + 1)))
        begin, numbers = at + 1, []
    return found


def to_last_frame(keys: Sequence[Key]) -> list[Key]:
    """Keys without the text behind the last frame."""
    end = next((at for at in range(len(keys), 0, -1) if isinstance(keys[at - 1], tuple)), 0)
    return list(keys[:end])


def last_frame(keys: Sequence[Key]) -> int:
    """Positions of the last frame: its tokens and the text between it and the frame before."""
    last = keys[-1] if keys else None
    count, visual = 0, last[0] if isinstance(last, tuple) else None
    for key in reversed(keys):
        if isinstance(key, tuple) and key[0] != visual:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Rebased:
    """Positions that were computed, in so many calls' worth of `pieces`, and that were moved."""

    computed: int
    pieces: int
    moved: int


def rebase(
    engine: Engine,
    cache: Cache,
    keys: Sequence[Key],
    embeds: Callable[[Sequence[Key]], F32],
    clock: Clock,
) -> Rebased:
    """Bring a KV cache to `keys`: frames that it holds already are moved, the others computed where they stand."""
    old, was, positions = dict(reversed(blocks(cache.keys))), cache.positions, positions_of(keys)
    # Begin, end, to, and by how many positions. Neighbours that stay neighbours turn alike, and are moved at once.
    computed, moved, pieces, run = 0, 0, 0, (0, 0, 0, 0)

    def flush() -> int:
        begin, end, to, turn = run
        if end > begin:
            with clock("prefill"):
                engine.move(cache, begin, end, to, turn)
        return (end - begin) * (begin != to or turn != 0)

    for block, (to, stop) in blocks(keys):
        begin, end = old.get(block, (-1, -1))
        if begin >= to and begin >= run[1]:
            turn = positions[to] - was[begin]
            if begin != run[1] or to != run[2] + run[1] - run[0]:
                moved += flush()
                run = begin, begin, to, turn
            run = run[0], end, run[2], turn
            continue
        moved += flush()
        run = stop, stop, stop, 0
        cache.truncate(to)
        new, places = list(keys[to:stop]), np.array(positions[to:stop], np.int64)
        with clock("prefill"):
            for rows in chunks(len(new), engine.bounds):
                engine.forward(cache, embeds(new[rows]), np.empty(0, np.int64), new[rows], places[rows])
        computed, pieces = computed + len(new), pieces + 1
    moved += flush()
    cache.truncate(len(keys))
    return Rebased(computed, max(1, pieces), moved)
