"""Blocks shared by the encoder and the decoder (reference: transformers' Qwen3, used for both stacks).

| name       | shape             | dtype   | what                                             |
|------------|-------------------|---------|--------------------------------------------------|
| x          | [B, S, hidden]    | float   | activations                                      |
| cos, sin   | [S, D]            | as x    | rotary tables, both halves written out           |
| q          | [B, heads, S, D]  | as x    | after per-head norm and rotary                   |
| k, v       | [B, kv, S, D]     | as x    | each kv head serves heads/kv consecutive q heads |

Attention itself is a function that is handed in, so that eager, ONNX Runtime, ExecuTorch and TensorRT share these
blocks and differ only in how keys and values are stored and read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.config import TextConfig, VisionConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q, k, v) -> [B, S, heads*D]."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, accumulated in fp32 by `torch.nn.functional.rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles position * theta^(-2j/D), j = 0 … D/2-1.

    Args:
        positions: [S] int64.
    Returns:
        [S, D/2] float32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    return positions.to(torch.float32)[:, None] * (1.0 / theta**exponents)[None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x*cos + rotate_half(x)*sin over the last dimension; a rotation only where both halves share their angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def full_attention(causal: bool) -> Attend:
    """Attention inside one call, without a cache: every position sees all others, or all before it."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return attend


class Attention(nn.Module):
    """Grouped-query attention with optional per-head norm of q and k before the rotary step."""

    def __init__(self, config: VisionConfig | TextConfig, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim))

        q = rotate(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), cos, sin)
        v = heads(self.v_proj(x)).transpose(1, 2)
        return self.o_proj(attend(layer, q, k, v))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: VisionConfig | TextConfig, qk_norm: bool = True) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))
