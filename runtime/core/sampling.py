"""From logits to a token: greedy, or temperature, top-k and top-p in this order, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penguin_edge.errors import InputError, PenguinError
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.engines.base import sound
from penguin_edge.schema import Maybe, Real, Whole


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
        check_options(
            max_new_tokens=(self.max_new_tokens, Whole(1)),
            temperature=(self.temperature, Real(0)),
            top_p=(self.top_p, Real(above=0, most=1)),
            top_k=(self.top_k, Whole()),
            seed=(self.seed, Whole(most=2**128)),
            max_ms=(self.max_ms, Maybe(Real(above=0))),
        )


def given_sampling(options: SamplingOptions | None, usual: SamplingOptions) -> SamplingOptions:
    """Options of a call; None: the usual ones.

    Raises:
        InputError: anything else.
    """
    if options is not None and not isinstance(options, SamplingOptions):
        raise InputError(f"options: {type(options).__name__}, wanted SamplingOptions, or None")
    return options or usual


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """One token id from logits [V].

        Raises:
            PenguinError: a logit that is NaN or infinite, of which no token follows.
        """
        numbers = sound(logits)
        if not numbers.all():
            raise PenguinError(
                f"{numbers.size - np.count_nonzero(numbers)} of {numbers.size} logits are NaN or infinite, so there is "
                "no next token; run `penguin-edge verify` on the bundle, and if that passes export it in a wider "
                "precision (--quant fp32)"
            )
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
