"""Which visual tokens of a frame are left out: those that are most like another one that stays in sight.

| name      | shape   | dtype | meaning                                              |
|-----------|---------|-------|------------------------------------------------------|
| rows      | [T, H]  | f32   | projected features of one frame, row by row          |
| reference | [R, H]  | f32   | those of the last key frame before it                |

A token is as repeated as its highest cosine: with any token earlier in its own frame, and with the token of the
reference at the same place, the nearest one where the two have different sizes.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from penguin_edge.runtime.engines.base import F32

Grid: TypeAlias = tuple[int, int]
"""Tokens of a frame down and across."""
BLOCK = 512
"""Tokens that are compared with all earlier ones at once."""


def least_alike(rows: F32, grid: Grid, count: int, reference: tuple[F32, Grid] | None = None) -> list[int]:
    """Numbers of the `count` tokens that are least repeated, in order; the first of equal ones.

    Args:
        reference: features of the frame that this one is compared with, besides itself.
    """
    return sorted(np.argsort(repetition(rows, grid, reference), kind="stable")[:count].tolist())


def repetition(rows: F32, grid: Grid, reference: tuple[F32, Grid] | None = None) -> F32:
    """How much each token is like another one, [T]: its highest cosine, -1 where there is none."""
    directions = _directions(rows)
    repeated = np.full(len(rows), -1.0, np.float32)
    for begin in range(0, len(rows), BLOCK):
        end = min(begin + BLOCK, len(rows))
        alike = directions[begin:end] @ directions[:end].T
        alike[np.arange(begin, end)[:, None] <= np.arange(end)] = -1.0
        repeated[begin:end] = alike.max(axis=1)
    if reference is not None:
        other, shape = reference
        same_place = _directions(other)[_nearest(grid, shape)]
        repeated = np.maximum(repeated, (directions * same_place).sum(axis=1))
    return repeated


def _directions(rows: F32) -> F32:
    """Rows of length one; one of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)


def _nearest(grid: Grid, other: Grid) -> NDArray[np.int64]:
    """For each token of a grid, the number of the token of the other one in which its centre lies."""
    down, across = (((np.arange(n) + 0.5) * m / n).astype(np.int64) for n, m in zip(grid, other, strict=True))
    return (down[:, None] * other[1] + across[None]).ravel()
