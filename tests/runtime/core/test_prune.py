"""Which tokens are left out: those that repeat another one, by the plainest possible reading of the rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.runtime.core import prune
from penguin_edge.runtime.core.prune import least_alike
from penguin_edge.runtime.engines.base import F32


def repeated(rows: F32, grid: tuple[int, int], reference: tuple[F32, tuple[int, int]] | None) -> list[float]:
    """Highest cosine of each token, one pair after the other."""

    def cosine(a: F32, b: F32) -> float:
        return float(a.astype(np.float64) @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

    out = []
    for i, row in enumerate(rows):
        found = [cosine(row, other) for other in rows[:i]]
        if reference is not None:
            other, (down, across) = reference
            r, c = divmod(i, grid[1])
            # The centre of a token, as a share of the frame, lies in this token of the other one.
            there = int((r + 0.5) / grid[0] * down) * across + int((c + 0.5) / grid[1] * across)
            found.append(cosine(row, other[there]))
        out.append(max(found, default=-1.0))
    return out


@given(
    seed=st.integers(0, 10_000),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    other=st.one_of(st.none(), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    count=st.integers(1, 25),
    block=st.sampled_from([1, 3, 512]),
)
def test_the_least_repeated_stay_in_order(
    seed: int, grid: tuple[int, int], other: tuple[int, int] | None, count: int, block: int
) -> None:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((grid[0] * grid[1], 6)).astype(np.float32)
    reference = None
    if other is not None:
        reference = random.standard_normal((other[0] * other[1], 6)).astype(np.float32), other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "BLOCK", block)
        kept = least_alike(rows, grid, min(count, len(rows)), reference)
    scores = repeated(rows, grid, reference)
    assert kept == sorted(set(kept)) and len(kept) == min(count, len(rows))
    left = set(range(len(rows))) - set(kept)
    assert max(scores[i] for i in kept) <= min((scores[i] for i in left), default=2.0) + 1e-6


def test_a_plain_ground_is_left_out_and_what_stands_before_it_stays() -> None:
    random = np.random.default_rng(0)
    ground, things = random.standard_normal(16), random.standard_normal((3, 16))
    rows = np.tile(ground, (36, 1)).astype(np.float32)
    rows[[7, 20, 35]] = things
    assert least_alike(rows, (6, 6), 4) == [0, 7, 20, 35]
    # A later frame in which one of them has moved on: the others are known, the ground behind it too.
    later = rows.copy()
    later[20], later[21] = ground, things[1]
    assert least_alike(later, (6, 6), 1, (rows, (6, 6))) == [21]


def test_of_equal_tokens_the_first_stay_and_zeros_are_no_trouble() -> None:
    rows = np.ones((6, 4), np.float32)
    rows[3:] = 0
    assert least_alike(rows, (2, 3), 1) == [0]
    kept = least_alike(rows, (2, 3), 4)
    assert kept == least_alike(rows, (2, 3), 4) == [0, 3, 4, 5]
