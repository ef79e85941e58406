"""Samples for the tests of packing and losses, without files and tokenizer."""

from __future__ import annotations

import numpy as np

from penguin_edge.config import PATCH_VALUES
from penguin_edge.dataset.samples import NO_TARGET, Sample
from penguin_edge.media.preprocess import Patches, positions

IMAGE_TOKEN = 603
"""That of the tiny preset."""


def patches(seed: int, grid: tuple[int, int], merge_size: int) -> Patches:
    pixels = np.random.default_rng(seed).uniform(-1, 1, (grid[0] * grid[1], PATCH_VALUES)).astype(np.float32)
    return Patches(pixels, *positions(grid, merge_size), grid, merge_size)


def sample(seed: int, *visuals: Patches, text: int = 9, answer: int = 4) -> Sample:
    """`text` tokens in all, the last `answer` of them targets; the image tokens stand after the second one."""
    words = np.random.default_rng(seed).integers(0, 500, text)
    tokens = sum(frame.tokens for frame in visuals)
    ids = np.concatenate((words[:2], np.full(tokens, IMAGE_TOKEN), words[2:]))
    labels = np.where(np.arange(len(ids)) >= len(ids) - answer, ids, NO_TARGET)
    return Sample(f"s{seed}", ids, labels, visuals)


def mixed() -> list[Sample]:
    """Text, one image, a clip of key and intermediate frames, two images of two grids, an image like the first."""
    return [
        sample(0, text=7),
        sample(1, patches(1, (4, 6), 1)),
        sample(2, patches(2, (6, 6), 2), patches(3, (2, 4), 2), patches(4, (2, 4), 2), text=15),
        sample(3, patches(5, (2, 3), 1), patches(6, (4, 6), 1)),
        sample(4, patches(7, (4, 6), 1), text=11),
    ]
