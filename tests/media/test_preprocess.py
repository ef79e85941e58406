"""Sizes, resizing and patches: bounds of the size rule, order of the patches, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from penguin_edge.config import PATCH, ImageConfig
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.frames import Frame
from penguin_edge.media.preprocess import (
    fit_area,
    image_size,
    image_sizes,
    patchify,
    positions,
    preprocess_image,
    resize,
)

CONFIG = ImageConfig()
SIDES = st.integers(1, 4000)
MERGES = st.sampled_from([1, 2])


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(SIDES, SIDES, MERGES, st.integers(1, 64), st.integers(64, 20_000), st.integers(1, 50))
def test_sizes_are_multiples_and_keep_floor_and_aspect(
    height: int, width: int, merge: int, least: int, most: int, count: int
) -> None:
    factor = PATCH * merge
    h, w = image_size(height, width, CONFIG, merge, count=count, min_tokens=least, max_tokens=most)
    assert h % factor == 0 and w % factor == 0 and min(h, w) >= factor
    floor, budget = (t * factor**2 for t in (1.5 * least, 0.95 * most))
    assert h * w >= floor
    # Away from the floor each side is off by half a step at most, or is held at one step.
    area = height * width if count * height * width <= budget else max(budget / count, floor)
    ideal = math.sqrt(area * height / width), math.sqrt(area * width / height)
    for got, wanted, other in ((h, ideal[0], w), (w, ideal[1], h)):
        shrunk_to_floor = area < floor * 1.5 or min(got, other) == factor
        assert shrunk_to_floor or abs(got - wanted) <= factor / 2 + 1e-6


def test_sides_round_half_to_even() -> None:
    # 1.5 and 2.5 steps of 14 both become 2 steps
    assert fit_area(21 * 35, 21, 35, 14, 0) == (28, 28)


def test_the_floor_rounds_up() -> None:
    h, w = fit_area(14 * 14, 14, 14, 14, 24 * 14 * 14)
    assert (h, w) == (70, 70)


def test_each_image_keeps_its_own_size_unless_shared() -> None:
    sizes = [(140, 280), (300, 100)]
    own = image_sizes(sizes, CONFIG, 1)
    assert own == [image_size(*size, CONFIG, 1) for size in sizes] and own[0] != own[1]
    shared = image_sizes(sizes, CONFIG, 1, shared=True, min_tokens=4, max_tokens=100)
    assert shared == [image_size(140, 280, CONFIG, 1, count=2, min_tokens=4, max_tokens=100)] * 2
    assert image_sizes([], CONFIG, 1, shared=True) == []


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_positions_name_the_pixels_of_each_patch(high: int, wide: int, merge: int) -> None:
    grid = (high * merge, wide * merge)
    rows, cols = positions(grid, merge)
    assert rows.dtype == cols.dtype == np.int64
    assert sorted(zip(rows.tolist(), cols.tolist(), strict=True)) == [
        (r, c) for r in range(grid[0]) for c in range(grid[1])
    ]
    # the merge * merge patches of one visual token are neighbours, and tokens run row by row
    tokens = np.stack([rows // merge, cols // merge], 1).reshape(-1, merge * merge, 2)
    assert (tokens == tokens[:, :1]).all()
    assert tokens[:, 0].tolist() == [[r, c] for r in range(high) for c in range(wide)]


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_hold_the_normalised_pixels(merge: int) -> None:
    config = ImageConfig(image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28))
    pixels = noise(56, 84)
    patches = patchify(pixels, merge, config)
    assert patches.grid == (4, 6) and patches.pixels.shape == (24, 588) and patches.pixels.dtype == np.float32
    assert patches.tokens == 24 // merge**2
    for values, row, col in zip(patches.pixels, patches.rows, patches.cols, strict=True):
        cut = pixels[row * 14 : row * 14 + 14, col * 14 : col * 14 + 14].astype(np.float64) / 255
        wanted = (cut - config.image_mean) / config.image_std
        # float32 rounding of values below 4
        np.testing.assert_allclose(values.reshape(3, 14, 14), wanted.transpose(2, 0, 1), atol=1e-6)


def test_resize_is_pillows_bicubic() -> None:
    pixels = noise(60, 47)
    wanted = np.asarray(Image.fromarray(pixels).resize((28, 42), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(pixels, 42, 28), wanted)
    np.testing.assert_array_equal(resize(pixels, 60, 47), pixels)
    # a view with negative strides is as good as a copy
    np.testing.assert_array_equal(resize(pixels[:, ::-1], 42, 28), resize(pixels[:, ::-1].copy(), 42, 28))


def test_a_frame_and_its_pixels_give_the_same() -> None:
    pixels = noise(90, 120)
    a, b = preprocess_image(Frame(pixels), CONFIG, 2), preprocess_image(pixels, CONFIG, 2)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert (a.grid[0] * PATCH, a.grid[1] * PATCH) == image_size(90, 120, CONFIG, 2)
    assert preprocess_image(pixels, CONFIG, 1, (28, 42)).grid == (2, 3)
    assert preprocess_image(noise(1, 1), CONFIG).grid == (5, 5)


def test_bad_input_is_refused() -> None:
    for call in (
        lambda: image_size(0, 10, CONFIG, 1),
        lambda: image_size(10, 10, CONFIG, 0),
        lambda: image_size(10, 10, CONFIG, 1, count=0),
        lambda: patchify(noise(14, 14), 2, CONFIG),
        lambda: patchify(noise(15, 14), 1, CONFIG),
        lambda: patchify(noise(14, 14), 1, ImageConfig(image_std=(0.5, 0, 0.5))),
        lambda: resize(noise(14, 14)[..., 0], 14, 14),
        lambda: resize(noise(14, 14), 0, 14),
        lambda: preprocess_image(noise(14, 14).astype(np.float32), CONFIG),
        lambda: positions((3, 4), 2),
    ):
        with pytest.raises(InputError):
            call()
    with pytest.raises(BudgetError, match="below"):
        image_size(10, 10, CONFIG, 1, min_tokens=20, max_tokens=10)
