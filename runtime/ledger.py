"""What stands at each position of a KV cache, read as frames.

A key is a token id, or (frame at a size, its n-th token); a block is a frame's tokens with the text before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penguin_edge.runtime.engine import F32, MovingEngine, chunks
from penguin_edge.runtime.report import Clock


def blocks(keys: Sequence[Any]) -> list[tuple[tuple[Any, ...], tuple[int, int]]]:
    """Frames with the text before each: what one is told by (its text, its content and size), and its positions."""
    found, begin = [], 0
    for at, key in enumerate(keys):
        if isinstance(key, tuple) and key[1] == key[0].tokens - 1:
            text = tuple(one for one in keys[begin:at] if not isinstance(one, tuple))
            found.append(((text, key[0]), (begin, at + 1)))
            begin = at + 1
    return found


def to_last_frame(keys: Sequence[Any]) -> list[Any]:
    """Keys without the text behind the last frame."""
    end = next((at for at in range(len(keys), 0, -1) if isinstance(keys[at - 1], tuple)), 0)
    return list(keys[:end])


def last_frame(keys: Sequence[Any]) -> int:
    """Positions of the last frame: its tokens and the text between it and the frame before."""
    count, visual = 0, keys[-1][0] if keys else None
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
    mover: MovingEngine,
    held: Sequence[Any],
    keys: Sequence[Any],
    embeds: Callable[[list[Any]], F32],
    clock: Clock,
) -> Rebased:
    """Bring a KV cache that holds `held` to `keys`: frames in both are moved, the others computed where they stand.

    Should the engine fail on the way, the cache holds neither.
    """
    old = dict(reversed(blocks(held)))
    computed, moved, pieces, run = 0, 0, 0, (0, 0, 0)  # begin, end, to: neighbours that move alike are moved at once

    def flush() -> int:
        begin, end, to = run
        if end > begin:
            with clock("prefill"):
                mover.move(begin, end, to)
        return (end - begin) * (begin != to)

    for block, (to, stop) in blocks(keys):
        begin, end = old.get(block, (-1, -1))
        if begin >= to and begin >= run[1]:
            if begin != run[1] or to != run[2] + run[1] - run[0]:
                moved += flush()
                run = begin, begin, to
            run = run[0], end, run[2]
            continue
        moved += flush()
        run = stop, stop, stop
        mover.truncate(to)
        new = list(keys[to:stop])
        with clock("prefill"):
            for rows in chunks(len(new), mover.bounds):
                mover.forward(embeds(new[rows]), np.empty(0, np.int64))
        computed, pieces = computed + len(new), pieces + 1
    moved += flush()
    mover.truncate(len(keys))
    return Rebased(computed, max(1, pieces), moved)
