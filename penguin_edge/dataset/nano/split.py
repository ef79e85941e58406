"""Which combinations are held out.

A combination is held out for good, by its name alone, whatever seed a data set is drawn with. Few are: a model that
sees an object in eight of nine places has next to nothing to gain from learning that it is never in the ninth, and all
tasks share the objects, so what it must learn is the object and the place, each for itself.
"""

from __future__ import annotations

import hashlib
from itertools import permutations

from penguin_edge.dataset.nano.assets import OBJECTS

CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
DIRECTIONS = ("left", "right", "up", "down")
COUNTS = (1, 2, 3, 4, 5)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _one_of(kind: str, values: tuple[str, ...] | tuple[int, ...], portion: float) -> frozenset[tuple[str, object]]:
    """One value each for a portion of the objects."""
    chosen = [name for name in OBJECTS if share(kind, name) < portion]
    return frozenset((name, values[int(share(kind, name, "value") * len(values))]) for name in chosen)


HELD_CELLS = _one_of("cell", CELLS, 0.5)
"""(object, cell): about 5 % of all."""
HELD_DIRECTIONS = _one_of("direction", DIRECTIONS, 0.2)
"""(object, direction): about 5 % of all."""
HELD_COUNTS = _one_of("count", COUNTS, 0.25)
"""(object, number of it): about 5 % of all."""
HELD_PAIRS = frozenset(pair for pair in permutations(OBJECTS, 2) if share("pair", *sorted(pair)) < 0.05)
"""(one object, another), in both orders: 5 % of all; never in one clip, in either order."""


def held_text(text: str) -> bool:
    """Whether a word or number is held out: one in ten."""
    return share("text", text) < 0.1
