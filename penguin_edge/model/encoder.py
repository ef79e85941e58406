"""The vision encoder: Qwen3 made bidirectional, with 2D-RoPE.

| name       | shape       | dtype   | what                                                        |
|------------|-------------|---------|-------------------------------------------------------------|
| pixels     | [B, P, 588] | float   | patches of B frames of one grid, in merge-block order       |
| rows, cols | [P]         | int64   | position of each patch in its frame                         |
| features   | [B, P, C]   | float   | one vector per patch, same order                            |

Source: reference `penguinvl/model/penguinvl_encoder/modeling_penguinvl_encoder.py`. Frames never see each other, so a
batch of frames of one grid needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penguin_edge.config import PATCH_VALUES, VisionConfig
from penguin_edge.model.layers import Attend, Block, RMSNorm, full_attention, rotary_angles


def rotary_2d(rows: Tensor, cols: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [P, D]: the first D/2 entries turn by the row, the last D/2 by the column.

    Both halves use the same D/2 frequencies, and the half-split rule pairs entry j with entry j+D/2: the two numbers
    of a pair turn by different angles. This is not a rotation unless row = col; the weights were trained this way.
    """
    angles = torch.cat((rotary_angles(rows, head_dim, theta), rotary_angles(cols, head_dim, theta)), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Encoder(nn.Module):
    """Patches to features; the forward table stands at the top of this file."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(PATCH_VALUES, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixels: Tensor, rows: Tensor, cols: Tensor, attend: Attend | None = None) -> Tensor:
        x = self.patch_embedding(pixels)
        cos, sin = rotary_2d(rows, cols, self.config.head_dim, self.config.rope_theta, x.dtype)
        attend = attend or full_attention(causal=False)
        for index, block in enumerate(self.layers):
            x = block(x, cos, sin, index, attend)
        return self.norm(x)
