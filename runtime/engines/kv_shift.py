"""Slots of a KV cache given another place: values are copied, keys turned by the difference of their angles.

| name   | shape                       | dtype        | what                            |
|--------|-----------------------------|--------------|---------------------------------|
| keys   | [1, kv, max_seq_len, D]     | f32, f16, i8 | after the rotary step           |
| values | [1, kv, max_seq_len, D]     | f32, f16, i8 |                                 |
| scale  | [kv, 1, D]                  | f32          | of each channel of int8 keys    |

A key at position p is R(p) k, and R(by) R(p) = R(p + by): the turn is exact but for rounding. In int8
that is half a step of each channel, and it adds up over moves.
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


def move_positions(
    keys: NDArray[Any],
    values: NDArray[Any],
    begin: int,
    end: int,
    to: int,
    theta: float,
    scale: NDArray[np.float32] | None = None,
    by: int | None = None,
) -> None:
    """Move slots [begin, end) down to `to`, in place; the two may overlap.

    Args:
        scale: for int8 keys.
        by: rotary positions that keys are turned by; None: as many as the slots move by.
    """
    by = to - begin if by is None else by
    if begin == to and not by:
        return
    half = keys.shape[-1] // 2
    cos, sin = turn(by, keys.shape[-1], theta)
    for at in range(begin, end, STEP):
        here = slice(at, min(at + STEP, end))
        there = slice(at - begin + to, here.stop - begin + to)
        held = keys[:, :, here].astype(np.float32)
        if scale is not None:
            held *= scale
        first, second = held[..., :half], held[..., half:]
        turned = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
        # The two channels of a pair have scales of their own: what one could hold may be too much for the other.
        keys[:, :, there] = turned if scale is None else (turned / scale).round().clip(-128, 127)
        values[:, :, there] = values[:, :, here].copy()
