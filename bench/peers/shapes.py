"""The decoder shapes that are compared: those of Qwen3-0.6B and Qwen3-1.7B, whose head is the embedding."""

from __future__ import annotations

from dataclasses import dataclass

VOCAB, CONTEXT = 151_936, 40_960


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` layers, its head as large as its vocabulary."""

    width: int
    feed_forward: int
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def parameters(self) -> int:
        """Numbers in all weights, the head counted once."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        norms = 2 * self.width + 2 * self.head_dim
        layer = attention + 3 * self.width * self.feed_forward + norms
        return self.layers * layer + self.width + VOCAB * self.width


SHAPES = {"0.6b": Shape(1024, 3072), "1.7b": Shape(2048, 6144)}
