"""What becomes of a frame that shrinks: its pixels resized, or its visual tokens averaged over a coarser grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from penguin_edge.media.frames import Frame
from penguin_edge.media.preprocess import resize
from penguin_edge.runtime.core.features import Features
from penguin_edge.runtime.engines.base import F32
from penguin_edge.runtime.engines.cache import Visual


def retained(frames: Sequence[Frame], visuals: Sequence[Visual]) -> list[Frame]:
    """Frames with pixels of their size in the prompt, never enlarged."""
    return [
        replace(frame, pixels=resize(frame.pixels, visual.height, visual.width))
        if math.prod(frame.pixels.shape[:2]) > visual.height * visual.width
        else frame
        for frame, visual in zip(frames, visuals, strict=True)
    ]


def put_pooled(features: Features, shrunk: Iterable[Visual], factor: int) -> None:
    """Give shrunk frames the means of the features that they had, where their size before is still known.

    Args:
        factor: pixels along each side of a token.
    """
    known = {visual.digest: visual for visual in features}
    for visual in shrunk:
        before = known.get(visual.digest)
        if before is not None and visual not in features:
            grids = ((one.height // factor, one.width // factor) for one in (before, visual))
            features.put(visual, pooled(features[before], *grids))


def pooled(features: F32, before: tuple[int, int], after: tuple[int, int]) -> F32:
    """Visual tokens [rows*columns, H] of a grid as means over a coarser one, each cell weighted by its overlap."""
    rows, columns = before
    grid = features.reshape(rows, columns, -1)
    down, across = _weights(rows, after[0]), _weights(columns, after[1])
    out = np.einsum("ar,rch,bc->abh", down, grid, across, optimize=True)
    return np.ascontiguousarray(out.reshape(after[0] * after[1], -1), dtype=np.float32)


def _weights(before: int, after: int) -> F32:
    """[after, before], rows of sum 1."""
    edges = np.arange(before + 1) * (after / before)
    low = np.maximum(edges[None, :-1], np.arange(after)[:, None])
    high = np.minimum(edges[None, 1:], np.arange(1, after + 1)[:, None])
    weights = np.clip(high - low, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
