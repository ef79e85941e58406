"""The projector: merge M neighbouring patches, then a two-layer MLP into the decoder's width.

| name     | shape        | dtype | what                                                                      |
|----------|--------------|-------|---------------------------------------------------------------------------|
| features | [B, T, M, C] | float | encoder features; a view, since patches come in merge-block order, M = m² |
| visual   | [B, T, H]    | float | one embedding per visual token, row-major over the merged grid            |

The reference down-samples features bilinearly (no antialiasing); for m = 1 and m = 2 that is the mean of each block.
Source: reference `penguinvl/model/projector.py` (`mlp2x_gelu`).
"""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """Mean over M, Linear, exact GELU, Linear."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.readout = nn.Sequential(nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size))

    def forward(self, features: Tensor) -> Tensor:
        return self.readout(features.mean(dim=2))
