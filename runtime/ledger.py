"""What stands at each position of a KV cache, read as frames.

A key is a token id, or (frame at a size, its n-th token); a block is a frame's tokens with the text before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def blocks(keys: Sequence[Any]) -> list[tuple[tuple[Any, ...], tuple[int, int]]]:
    """Frames with the text before each: what one is told by (its text, its content and size), and its positions."""
    found, begin = [], 0
    for at, key in enumerate(keys):
        if isinstance(key, tuple) and key[1] == key[0].tokens - 1:
            text = tuple(one for one in keys[begin:at] if not isinstance(one, tuple))
            found.append(((text, key[0]), (begin, at + 1)))
            begin = at + 1
    return found


def last_frame(keys: Sequence[Any]) -> int:
    """Positions of the last frame: its tokens and the text between it and the frame before."""
    count, visual = 0, keys[-1][0] if keys else None
    for key in reversed(keys):
        if isinstance(key, tuple) and key[0] != visual:
            break
        count += 1
    return count
