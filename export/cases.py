"""What check data consist of: fixed pictures, sizes and lengths, without torch, so that a device can verify."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]
DECODED = 32
"""Tokens decoded one at a time after the prompt."""
STORED_LOGITS = 8
"""Rows of decode logits kept: all 32 would be 19 MB at the published vocabulary."""
CASES = ((90, 118, 84, 112, 2), (61, 75, 56, 70, 1))
"""Native height and width, target height and width, merge size."""
MOVED = 1e-6
"""Standard deviation, relative, of what inputs are moved by to see what rounding makes of it: sums in another order."""
QUESTION = "What is in this picture, and what happens in this clip?"


def distance(got: NDArray, wanted: NDArray) -> tuple[float, float, float]:
    """Largest difference, that over the largest wanted value, and cosine, of two arrays of one shape, in f64."""
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    max_abs = float(np.abs(a - b).max(initial=0.0))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = 1.0 if not norms and not max_abs else float(a @ b) / max(norms, 1e-30)
    return max_abs, max_abs / max(float(np.abs(b).max(initial=0.0)), 1e-30), cosine


def check_image(height: int, width: int) -> NDArray[np.uint8]:
    """A deterministic picture with smooth colour, edges and fine texture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red = 127 + 120 * np.sin(x / 9) * np.cos(y / 13)
    green = np.where((x // 16 + y // 16) % 2 == 0, 220.0, 35.0)
    blue = (x * 7 + y * 13 + (x * y) % 31) % 256
    return np.stack((red, green, blue), axis=-1).clip(0, 255).astype(np.uint8)
