"""What check data consist of: fixed pictures, sizes and lengths, without torch, so that a device can verify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from penguin_edge.bundle.contract import COPY_AGAIN
from penguin_edge.config import PATCH, PATCH_VALUES, PenguinConfig
from penguin_edge.errors import BundleError

Arrays = dict[str, NDArray]
DECODED = 32
"""Tokens decoded one at a time after the prompt."""
STORED_LOGITS = 8
"""Rows of decode logits kept: all 32 would be 19 MB at the published vocabulary."""
CASES = ((90, 118, 84, 112, 2), (61, 75, 56, 70, 1))
"""Native height and width, target height and width, merge size."""
MOVED = 1e-6
"""Relative standard deviation of the noise that is added to inputs to see what rounding makes of it; it is as large as
the effect of sums in another order."""
QUESTION = "What is in this picture, and what happens in this clip?"


def distance(got: NDArray, wanted: NDArray) -> tuple[float, float, float]:
    """Compare two arrays of one shape in f64: largest difference, that over the largest wanted value, cosine."""
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


def stored_arrays(path: Path, config: PenguinConfig) -> Arrays:
    """The check data of a bundle; see `export/check.py` for what they are.

    Raises:
        BundleError: unreadable, or an array is missing or of another shape than a model of this configuration has.
    """
    try:
        arrays: Arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: cannot be read as check data ({error}); {COPY_AGAIN}") from error
    length, text = len(arrays["ids"]) if "ids" in arrays else 0, config.text
    wanted: dict[str, tuple[int, ...]] = {
        "ids": (length,),
        "embeds": (length, text.hidden_size),
        "prefill": (1, text.vocab_size),
        "tokens": (DECODED + 1,),
        "decode": (STORED_LOGITS, text.vocab_size),
        "decode_top": (DECODED,),
    }
    if "placed" in arrays or "positions" in arrays:  # neither is in bundles of earlier exports
        wanted |= {"positions": (length,), "placed": (1, text.vocab_size)}
    if config.vision is not None:
        for case, (native_h, native_w, height, width, merge) in enumerate(CASES):
            patches = height // PATCH * (width // PATCH)
            wanted |= {
                f"image_{case}": (native_h, native_w, 3),
                f"size_{case}": (3,),
                f"pixels_{case}": (height, width, 3),
                f"patches_{case}": (1, patches, PATCH_VALUES),
                f"features_{case}": (1, patches, config.vision.hidden_size),
                f"visual_{case}": (1, patches // merge**2, text.hidden_size),
            }
    for name, shape in wanted.items():
        found = list(arrays[name].shape) if name in arrays else "missing"
        if found != list(shape):
            raise BundleError(f"{path}: {name} is {found}, wanted {list(shape)}; {COPY_AGAIN}")
    for case, (*_, height, width, merge) in enumerate(CASES if config.vision is not None else ()):
        if (found := arrays[f"size_{case}"].tolist()) != [height, width, merge]:
            raise BundleError(f"{path}: size_{case} is {found}, wanted {[height, width, merge]}; {COPY_AGAIN}")
    return arrays
