"""Prefill: bring a KV cache to what a prompt wants in it, and compute no more than that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from penguin_edge.runtime.engines.base import F32, Engine, chunks
from penguin_edge.runtime.engines.cache import Cache, Key, positions_of


@dataclass(frozen=True)
class Prefilled:
    """Positions that were reused, and the logits [V] after the last one, or [0] where none were asked for."""

    reused: int
    logits: F32


def extend_to(
    engine: Engine, cache: Cache, keys: Sequence[Key], embeds: Callable[[Sequence[Key]], F32], *, logits: bool
) -> Prefilled:
    """Keep the longest prefix of the cache that is also one of `keys`, and compute the rest.

    Args:
        embeds: gives the rows [S, H] of keys.
        logits: whether those after the last position are wanted, which is computed again for them.
    Raises:
        BudgetError: the cache does not hold that many.
    """
    same = cache.common(keys)
    if logits or same < len(keys):
        # Where the bundle has a graph of its own for prompts, it is given no less than that graph's least chunk, so
        # that reuse does not change an answer.
        same = min(same, max(0, len(keys) - engine.bounds.min_chunk))
    cache.truncate(same)
    found, new, positions = np.empty((0, 0), np.float32), keys[same:], np.array(positions_of(keys)[same:], np.int64)
    for rows in chunks(len(new), engine.bounds):
        wanted = np.full(int(logits and rows.stop == len(new)), -1, np.int64)
        found = engine.forward(cache, embeds(new[rows]), wanted, new[rows], positions[rows])
    return Prefilled(same, found[0] if logits else np.empty(0, np.float32))
