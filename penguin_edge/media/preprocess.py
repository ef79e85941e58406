"""From pixels to patches: target size, resize, normalise, cut. NumPy and Pillow only.

| tensor                         | shape       | dtype   | meaning                                             |
|--------------------------------|-------------|---------|-----------------------------------------------------|
| frame pixels                   | `[H, W, 3]` | uint8   | RGB, native or resized                              |
| `Patches.pixels`               | `[P, 588]`  | float32 | one row per patch: channel, row, column; normalised |
| `Patches.rows`, `Patches.cols` | `[P]`       | int64   | patch coordinates, from 0                           |

`P = h * w` patches of 14 by 14 pixels; `m` is the merge size. Patches come in merge-block order: block row, block
column, row in block, column in block, so that the `m * m` patches behind one visual token lie together.

Source: `penguinvl/model/penguinvl_encoder/image_processing_penguinvl.py` of the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from penguin_edge.config import PATCH, PATCH_VALUES, ImageConfig, TraConfig
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.frames import Frame


def fit_area(area: float, height: int, width: int, factor: int, min_area: float) -> tuple[int, int]:
    """The (height, width) nearest to `area` that keeps the aspect and whose sides are multiples of `factor`.

    Sides are rounded half to even and are at least `factor`. If the result is below `min_area` the size is computed
    again from `min_area`, rounded up. The order of the float operations is the reference's (`simple_batched_resize`),
    because the rounding at a tie depends on it.
    """
    if height < 1 or width < 1:
        raise InputError(f"an image of {height}x{width} pixels has no area; both sides must be at least 1")
    aspect = height / width
    wide = math.sqrt(area / aspect)
    high = wide * aspect
    h = max(factor, round(high / factor) * factor)
    w = max(factor, round(wide / factor) * factor)
    if h * w < min_area:
        wide = math.sqrt(min_area / aspect)
        high = wide * aspect
        h = math.ceil(high / factor) * factor
        w = math.ceil(wide / factor) * factor
    return h, w


def image_size(
    height: int,
    width: int,
    config: ImageConfig,
    merge_size: int,
    *,
    count: int = 1,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
) -> tuple[int, int]:
    """The (height, width) in pixels that one of `count` images of this native size is resized to.

    Native if all images together fit 0.95 of `max_tokens`, otherwise an equal share of that, with a floor of 1.5
    `min_tokens`; both counted before the sides are rounded. `min_tokens` and `max_tokens` replace the configured ones.
    Both factors are TRA's, as in the reference, which sizes images and frames in one function.

    Raises:
        InputError: a size, count or merge size below 1.
        BudgetError: `max_tokens` below `min_tokens`.
    """
    least = config.min_tokens if min_tokens is None else min_tokens
    most = config.max_tokens if max_tokens is None else max_tokens
    for name, value in (("merge size", merge_size), ("image count", count), ("min_tokens", least)):
        if value < 1:
            raise InputError(f"got {name} {value}, wanted at least 1")
    if most < least:
        raise BudgetError(f"max_tokens {most} is below min_tokens {least}; raise the one or lower the other")
    factor = PATCH * merge_size
    floor = least * factor * factor * TraConfig.min_factor
    budget = most * factor * factor * TraConfig.max_factor
    area: float = height * width
    if count * area > budget:
        area = max(budget / count, floor)
    return fit_area(area, height, width, factor, floor)


def image_sizes(
    sizes: Sequence[tuple[int, int]],
    config: ImageConfig,
    merge_size: int,
    *,
    shared: bool = False,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
) -> list[tuple[int, int]]:
    """Target (height, width) of every image of a request, from their native (height, width).

    By default each image keeps its own aspect and has the budget to itself. With `shared` it is the reference's rule:
    the images share the budget, and all take the size computed for the first one, whatever their own aspect is.

    Raises:
        InputError: see `image_size`.
    """
    if not shared:
        return [image_size(h, w, config, merge_size, min_tokens=min_tokens, max_tokens=max_tokens) for h, w in sizes]
    if not sizes:
        return []
    height, width = sizes[0]
    size = image_size(height, width, config, merge_size, count=len(sizes), min_tokens=min_tokens, max_tokens=max_tokens)
    return [size] * len(sizes)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """`[H, W, 3]` uint8 to `[height, width, 3]` uint8 by Pillow's antialiased bicubic filter.

    No other resampler gives the same pixels: results of OpenCV or PyTorch differ by several grey levels.
    """
    _check_pixels(pixels)
    if height < 1 or width < 1:
        raise InputError(f"cannot resize to {height}x{width} pixels; both sides must be at least 1")
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def positions(grid: tuple[int, int], merge_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch of a grid (h, w), `[h * w]` int64 each, in merge-block order.

    Raises:
        InputError: the grid is empty or not a multiple of the merge size.
    """
    _check_grid(grid, merge_size)
    rows, cols = np.indices(grid, dtype=np.int64)
    return _block_order(rows, merge_size).reshape(-1), _block_order(cols, merge_size).reshape(-1)


@dataclass(frozen=True)
class Patches:
    """One image or frame, ready for the encoder; shapes in the table of this file. `grid` is (h, w) in patches."""

    pixels: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    grid: tuple[int, int]
    merge_size: int

    @property
    def tokens(self) -> int:
        """Visual tokens that the decoder sees."""
        return self.grid[0] * self.grid[1] // self.merge_size**2


def patchify(pixels: np.ndarray, merge_size: int, config: ImageConfig) -> Patches:
    """Normalise `[H, W, 3]` uint8 pixels and cut them into patches.

    Raises:
        InputError: not uint8 RGB, or a side that is not a multiple of `14 * merge_size`.
    """
    _check_pixels(pixels)
    height, width = pixels.shape[:2]
    factor = PATCH * merge_size
    if merge_size < 1 or height % factor or width % factor or not pixels.size:
        raise InputError(
            f"got {height}x{width} pixels at merge size {merge_size}, wanted sides that are multiples of {factor};"
            " resize to image_size first"
        )
    grid = (height // PATCH, width // PATCH)
    tiles = pixels.reshape(grid[0], PATCH, grid[1], PATCH, 3).transpose(0, 2, 4, 1, 3)
    raw = _block_order(tiles, merge_size).reshape(-1, 3, PATCH * PATCH)
    values = np.empty(raw.shape, dtype=np.float32)
    table = _levels(config.image_mean, config.image_std, config.rescale_factor)
    for channel in range(3):
        np.take(table[channel], raw[:, channel], out=values[:, channel])
    rows, cols = positions(grid, merge_size)
    return Patches(values.reshape(-1, PATCH_VALUES), rows, cols, grid, merge_size)


def preprocess_image(
    frame: Frame | np.ndarray, config: ImageConfig, merge_size: int = 1, size: tuple[int, int] | None = None
) -> Patches:
    """Resize one frame to `size` (default: its own `image_size`), normalise it and cut it into patches."""
    pixels = frame.pixels if isinstance(frame, Frame) else frame
    _check_pixels(pixels)
    height, width = size or image_size(pixels.shape[0], pixels.shape[1], config, merge_size)
    return patchify(resize(pixels, height, width), merge_size, config)


@functools.lru_cache(maxsize=8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], rescale: float) -> np.ndarray:
    """The normalised value of each grey level, `[3, 256]` float32: 8-bit pixels need no arithmetic per pixel."""
    if any(s == 0 for s in std):
        raise InputError(f"image_std {std} has a zero; wanted the standard deviation of each channel")
    # The reference rescales and normalises in float32, in this order.
    levels = (np.arange(256) * rescale).astype(np.float32)
    return (levels - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def _block_order(grid: np.ndarray, merge_size: int) -> np.ndarray:
    """`[h, w, ...]` to `[h/m, w/m, m, m, ...]`."""
    h, w = grid.shape[:2]
    blocks = grid.reshape(h // merge_size, merge_size, w // merge_size, merge_size, *grid.shape[2:])
    return blocks.swapaxes(1, 2)


def _check_grid(grid: tuple[int, int], merge_size: int) -> None:
    if merge_size < 1 or min(grid) < 1 or grid[0] % merge_size or grid[1] % merge_size:
        raise InputError(f"got a grid of {grid[0]}x{grid[1]} patches, wanted multiples of the merge size {merge_size}")


def _check_pixels(pixels: np.ndarray) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(f"got pixels {pixels.dtype} {list(pixels.shape)}, wanted uint8 [H, W, 3]; use read_image")
