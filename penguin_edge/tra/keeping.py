"""How many visual tokens of a frame are kept, where the rest of them is left out before the decoder (`keep_visual`).

A frame keeps the size that the encoder gives it. Budgets and contexts count what is kept.
"""

from __future__ import annotations

import math

from penguin_edge.errors import InputError

SLACK = 1e-9
"""A share of 0.29 of 100 tokens is 29 of them, whatever the last bit of the product says."""


def check_keep(keep: float | None) -> None:
    """Refuse what is no share.

    Raises:
        InputError: anything but None and a number above 0 and at most 1.
    """
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if keep is not None and not (number and 0 < keep <= 1):
        raise InputError(f"keep_visual is {keep!r}, wanted a share above 0 and at most 1, or None")


def kept_tokens(tokens: int, keep: float | None) -> int:
    """Visual tokens that are kept of so many of one frame: the share, rounded down, at least one. 0 stays 0.

    Args:
        keep: the share; None keeps all.
    """
    if keep is None or not tokens:
        return tokens
    return max(1, math.floor(keep * tokens + SLACK))


def most_encoded(kept: int, keep: float | None) -> int:
    """The most tokens of one frame of which no more than `kept` (at least 1) are kept."""
    if keep is None:
        return kept
    found = math.floor((kept + 1) / keep) + 1
    while kept_tokens(found, keep) > kept:
        found -= 1
    return found
