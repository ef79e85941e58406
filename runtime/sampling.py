"""From logits to a token: greedy, or temperature, top-k and top-p in this order, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penguin_edge.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is decoded. Temperature 0 is greedy, top_k 0 and top_p 1 cut nothing."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_ms: float | None = None
    """Milliseconds from the question on after which the answer ends with the token that is there; None: no limit."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, wanted at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}, wanted 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, wanted above 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}, wanted 0 or more")
        if self.max_ms is not None and not self.max_ms > 0:
            raise InputError(f"max_ms is {self.max_ms}, wanted more than 0")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}, wanted 0 (off) or more")


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """One token id from logits [V]."""
        options = self._options
        if options.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        weights = np.exp((logits[order].astype(np.float64) - float(logits[order[0]])) / options.temperature)
        weights /= weights.sum()
        # Keep the smallest set whose mass reaches top_p; the most likely token is always in it.
        kept = int(np.searchsorted(np.cumsum(weights), options.top_p, side="left")) + 1
        weights = weights[:kept]
        return int(self._random.choice(order[:kept], p=weights / weights.sum()))
