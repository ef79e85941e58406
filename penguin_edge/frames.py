from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One picture: `pixels` `[H, W, 3]` uint8 RGB, `time` in seconds or None, `index` in the sampled sequence."""

    pixels: np.ndarray
    time: float | None = None
    index: int = 0
