"""Positions of a KV cache given another place: values are copied, keys turned by the difference of their angles.

| name   | shape                       | dtype        | what                            |
|--------|-----------------------------|--------------|---------------------------------|
| keys   | [1, kv, max_seq_len, D]     | f32 or f16   | after the rotary step           |
| values | [1, kv, max_seq_len, D]     | f32 or f16   |                                 |

A key at position p is R(p) k, and R(to - begin) R(p) = R(p + to - begin): the turn is exact but for rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP = 256
"""Positions at once: what is turned stays in the cache of the processor."""


def turn(by: int, size: int, theta: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [D/2] of a turn by so many positions."""
    angles = by * theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def move_positions(keys: NDArray[Any], values: NDArray[Any], begin: int, end: int, to: int, theta: float) -> None:
    """Move [begin, end) down to `to`, in place; the two may overlap."""
    if begin == to:
        return
    half = keys.shape[-1] // 2
    cos, sin = turn(to - begin, keys.shape[-1], theta)
    for at in range(begin, end, STEP):
        here = slice(at, min(at + STEP, end))
        there = slice(at - begin + to, here.stop - begin + to)
        first, second = (keys[:, :, here, part].astype(np.float32) for part in (slice(half), slice(half, None)))
        keys[:, :, there, :half] = first * cos - second * sin
        keys[:, :, there, half:] = second * cos + first * sin
        values[:, :, there] = values[:, :, here].copy()
