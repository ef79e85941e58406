"""The causal language model: Qwen3, or a Llama-type model with `qk_norm` off.

| name      | shape       | dtype | what                                                      |
|-----------|-------------|-------|-----------------------------------------------------------|
| embeds    | [B, S, H]   | float | token and visual embeddings                               |
| positions | [S]         | int64 | ordinary 1D positions, visual tokens included             |
| hidden    | [B, S, H]   | float | after the final norm                                      |
| logits    | [B, K, V]   | float | only where they are asked for, never over a whole prompt  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.config import TextConfig
from penguin_edge.model.layers import Attend, Block, RMSNorm, full_attention, rotary_angles, rotate


@dataclass(frozen=True)
class KVForm:
    """Form of a KV cache that holds another dtype than the model's own."""

    dtype: Literal["fp16", "int8"]
    scales: Tensor | None = None
    """Scales of an int8 cache, [2L, kv, 1, D] f32: of every channel of all keys, then of all values."""

    def stored(self, index: int, x: Tensor) -> Tensor:
        """Keys (`index` is the layer) or values (layer + L), [1, kv, S, D], as they come back out of the cache."""
        if self.scales is None:
            return x.half().to(x.dtype)
        scale = self.scales[index].to(x.dtype)
        return (x / scale).round().clamp(-128, 127) * scale


class Decoder(nn.Module):
    """Blocks, final norm and head. The embedding table is a part of its own: see `penguin_edge.model.penguin`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, config.qk_norm) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.kv_form: KVForm | None = None

    def forward(self, embeds: Tensor, positions: Tensor, attend: Attend | None = None) -> Tensor:
        """Hidden states after the final norm; without `attend`, causal attention inside this call."""
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        attend = attend or full_attention(causal=True)
        x = embeds
        for index, block in enumerate(self.layers):
            x = block(x, cos, sin, index, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        """[B, K, V] at the positions `index` [K] of `hidden`; -1 is the last, K may be 0."""
        return self.lm_head(hidden.index_select(1, torch.where(index < 0, index + hidden.shape[1], index)))


class KVCache:
    """Keys and values [1, kv, max_seq_len, D] per layer, written in place at `length`.

    Truncating to a prefix only lowers `length`: what lies above it is never read.
    """

    def __init__(
        self,
        config: TextConfig,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        form: KVForm | None = None,
    ) -> None:
        shape = (1, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.max_seq_len = max_seq_len
        self.length = 0
        self.form = form

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v at `length`, then attend causally over everything up to the last new position."""
        start, end = self.length, self.length + k.shape[2]
        if self.form is not None:
            k, v = self.form.stored(layer, k), self.form.stored(layer + len(self.keys), v)
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        columns = torch.arange(end, device=q.device)
        mask = columns[None, :] <= columns[start:end, None]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def move(self, begin: int, end: int, to: int, theta: float, by: int | None = None) -> None:
        """Move slots [begin, end) to `to` <= begin; keys are turned by so many positions, None: as the slots move."""
        size = self.keys[0].shape[-1]
        angles = (to - begin if by is None else by) * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        both = torch.cat((angles, angles)).to(self.keys[0].device)
        cos, sin = both.cos().float(), both.sin().float()
        there = slice(to, to + end - begin)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            turned = rotate(keys[:, :, begin:end].float(), cos, sin)
            keys[:, :, there] = (turned if self.form is None else self.form.stored(layer, turned)).to(keys.dtype)
            values[:, :, there] = values[:, :, begin:end].clone()
        self.length = there.stop
