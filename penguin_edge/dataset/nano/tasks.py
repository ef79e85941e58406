"""The questions: what is drawn for each, and what the answer is.

Every drawn scene has one asked question first; on the training split further questions about the same scene follow as
further turns, each about an object that no earlier turn spoke of, so that no answer stands in the text already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from numpy.random import Generator

from penguin_edge.dataset.nano.assets import OBJECTS
from penguin_edge.dataset.nano.scenes import CELL, FRAMES, LIGHTS, SIDE, Array, Painter, Placed, in_cell
from penguin_edge.dataset.nano.split import (
    CELLS,
    COUNTS,
    DIRECTIONS,
    HELD_CELLS,
    HELD_COUNTS,
    HELD_DIRECTIONS,
    HELD_PAIRS,
    LETTERS,
    held_text,
)

Split = Literal["train", "shown", "heldout"]
"""`train`: combinations that are not held out, several turns; `shown`: the same ones, one question, to compare
`heldout` with: one question each, about a combination that training never sees."""
NAMES = tuple(OBJECTS)
T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One question. `choices` are all answers the question allows, None where there is no such list."""

    task: str
    question: str
    answer: str
    choices: tuple[str, ...] | None
    tolerance: float | None = None


@dataclass(frozen=True)
class Scene:
    """A picture (one frame) or a clip, and what is asked about it."""

    frames: tuple[Array, ...]
    turns: tuple[Exchange, ...]


def pick(rng: Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def several(rng: Generator, values: Sequence[T], count: int) -> list[T]:
    return [values[int(i)] for i in rng.permutation(len(values))[:count]]


def _held(pairs: frozenset[tuple[str, object]], rng: Generator) -> tuple[str, object]:
    return pick(rng, sorted(pairs, key=str))


def _objects_in_cells(rng: Generator, count: int, first: tuple[str, int] | None) -> list[tuple[str, int]]:
    """Different objects in different cells; all combinations but `first` are ones that training sees."""
    placed = [first] if first else []
    names = [name for name in several(rng, NAMES, count + 8) if not first or name != first[0]]
    cells = [cell for cell in (int(i) for i in rng.permutation(9)) if not first or cell != first[1]]
    for name in names:
        if len(placed) == count:
            break
        free = [cell for cell in cells if (name, CELLS[cell]) not in HELD_CELLS]
        if free:
            placed.append((name, free[0]))
            cells.remove(free[0])
    return placed


def _grid(
    painter: Painter, rng: Generator, split: Split, count: int
) -> tuple[tuple[Array, ...], list[tuple[str, int]]]:
    first = None
    if split == "heldout":
        name, cell = _held(HELD_CELLS, rng)
        first = (name, CELLS.index(str(cell)))
    placed = _objects_in_cells(rng, count, first)
    frame = painter.paint(painter.background(rng), [in_cell(name, cell, rng) for name, cell in placed])
    return (frame,), placed


def _name_turn(cell: int, name: str) -> Exchange:
    return Exchange("lookup", f"What is at the {CELLS[cell]}?", name, NAMES)


def _place_turn(cell: int, name: str) -> Exchange:
    return Exchange("position", f"Where is the {name}?", CELLS[cell], CELLS)


def naming(painter: Painter, rng: Generator, split: Split) -> Scene:
    """One object alone."""
    frames, [(name, _)] = _grid(painter, rng, split, 1)
    return Scene(frames, (Exchange("naming", "What is in the picture?", name, NAMES),))


def _shared_turns(rng: Generator, placed: Sequence[tuple[str, int]]) -> list[Exchange]:
    return [(_name_turn if rng.random() < 0.5 else _place_turn)(cell, name) for name, cell in placed]


def lookup(painter: Painter, rng: Generator, split: Split) -> Scene:
    """What is in a named cell, among several objects."""
    frames, placed = _grid(painter, rng, split, int(rng.integers(1, 6)))
    rest = _shared_turns(rng, placed[1:]) if split == "train" else []
    return Scene(frames, (_name_turn(placed[0][1], placed[0][0]), *rest))


def position(painter: Painter, rng: Generator, split: Split) -> Scene:
    """Where a named object is, among several."""
    frames, placed = _grid(painter, rng, split, int(rng.integers(1, 6)))
    rest = _shared_turns(rng, placed[1:]) if split == "train" else []
    return Scene(frames, (_place_turn(placed[0][1], placed[0][0]), *rest))


def relation(painter: Painter, rng: Generator, split: Split) -> Scene:
    """Left or right of, above or below: two objects of three, in different columns or rows."""
    frames, placed = _grid(painter, rng, split, 3)
    (one, a), (other, b) = placed[:2]
    ways = [i for i, differ in enumerate((a % 3 != b % 3, a // 3 != b // 3)) if differ]
    if pick(rng, ways) == 0:
        words, answer = ("left", "right"), "left" if a % 3 < b % 3 else "right"
        question = f"Is the {one} left or right of the {other}?"
    else:
        words, answer = ("above", "below"), "above" if a // 3 < b // 3 else "below"
        question = f"Is the {one} above or below the {other}?"
    rest = _shared_turns(rng, placed[2:]) if split == "train" else []
    return Scene(frames, (Exchange("relation", question, answer, words), *rest))


def counting(painter: Painter, rng: Generator, split: Split) -> Scene:
    """How many of one object, among up to two others."""
    if split == "heldout":
        held = _held(HELD_COUNTS, rng)
        name, count = held[0], int(str(held[1]))
    else:
        name, count = pick(rng, [(n, c) for n in several(rng, NAMES, 1) for c in COUNTS if (n, c) not in HELD_COUNTS])
    return _count(painter, rng, split, name, count)


def count_any(painter: Painter, rng: Generator, split: Split) -> Scene:
    """How many of one object, of those that training shows in every number: for training. There is nothing to learn
    from what an object is never counted as; but a model counts the other objects less well afterwards."""
    held = {name for name, _ in HELD_COUNTS}
    return _count(painter, rng, split, pick(rng, [name for name in NAMES if name not in held]), pick(rng, COUNTS))


def count_both(painter: Painter, rng: Generator, split: Split) -> Scene:
    """How many of two objects together: for training. Half of the questions name an object with the number that is
    held out for it, as a sum with another object, so that the name in a question is no clue against that number."""
    one, total = _held(HELD_COUNTS, rng) if rng.random() < 0.5 else (pick(rng, NAMES), pick(rng, COUNTS))
    total = int(str(total))
    other = pick(rng, [name for name in NAMES if name != one and (name, total) not in HELD_COUNTS])
    parts = [
        (first, total - first)
        for first in range(total + 1)
        if (one, first) not in HELD_COUNTS and (other, total - first) not in HELD_COUNTS
    ]
    counts = dict(zip((one, other), pick(rng, parts), strict=True))
    cells = [int(i) for i in rng.permutation(9)]
    placed = [(name, cells.pop()) for name, count in counts.items() for _ in range(count)]
    rest = [(name, cells.pop()) for name in several(rng, NAMES, 3) if name not in counts][: int(rng.integers(0, 3))]
    rest = [(name, cell) for name, cell in rest if (name, CELLS[cell]) not in HELD_CELLS]
    frame = painter.paint(painter.background(rng), [in_cell(name, cell, rng) for name, cell in placed + rest])
    first, second = several(rng, (one, other), 2)
    asked = Exchange("count_both", f"How many {first} and {second} pictures are there?", str(total), None)
    return Scene((frame,), (asked, *_shared_turns(rng, rest)))


def _count(painter: Painter, rng: Generator, split: Split, name: str, count: int) -> Scene:
    # Held-out places belong to the other tasks: here an object may be in any cell.
    cells = [int(i) for i in rng.permutation(9)]
    others = [n for n in several(rng, NAMES, 3) if n != name][: int(rng.integers(0, 3))]
    placed = [(name, cell) for cell in cells[:count]]
    placed += [(n, cell) for n, cell in zip(others, cells[count:], strict=False)]
    placed = [(n, c) for n, c in placed if n == name or (n, CELLS[c]) not in HELD_CELLS]
    frame = painter.paint(painter.background(rng), [in_cell(n, c, rng) for n, c in placed])
    turns = [Exchange("counting", f"How many {name} pictures are there?", str(count), tuple(map(str, COUNTS)))]
    if split == "train":
        turns += _shared_turns(rng, placed[count:])
    return Scene((frame,), tuple(turns))


def _text(rng: Generator, held: bool) -> str:
    """A word of three letters or a number of three digits."""
    alphabet = LETTERS if rng.random() < 0.6 else "0123456789"
    while True:
        text = "".join(pick(rng, alphabet) for _ in range(3))
        if held_text(text) == held:
            return text


def reading(painter: Painter, rng: Generator, split: Split) -> Scene:
    """A word of three letters or a number of three digits, read out character by character."""
    text = _text(rng, split == "heldout")
    frame = painter.background(rng)
    line = CELL * (int(rng.integers(3)) + 0.5)
    frame = painter.write(frame, text.upper(), line, painter.ink(frame, rng), rng)
    what = "number" if text.isdigit() else "word"
    return Scene((frame,), (Exchange("reading", f"Read the {what}.", " ".join(text), None),))


def closeup(painter: Painter, rng: Generator, split: Split) -> Scene:
    """One object of any size: for training, where naming begins."""
    name, side = pick(rng, NAMES), int(rng.integers(CELL, 81))
    x, y = (int(v) for v in rng.integers(-2, SIDE - side + 3, 2))
    frame = painter.paint(painter.background(rng), [Placed(name, x, y, side)])
    return Scene((frame,), (Exchange("closeup", "What is this?", name, NAMES),))


def place(painter: Painter, rng: Generator, split: Split) -> Scene:
    """Where one object is, alone: for training, where positions begin."""
    frames, [(name, cell)] = _grid(painter, rng, "train", 1)
    return Scene(frames, (_place_turn(cell, name),))


def describe(painter: Painter, rng: Generator, split: Split) -> Scene:
    """Everything in a picture, in reading order: for training, many objects learned from one picture."""
    frames, placed = _grid(painter, rng, "train", int(rng.integers(3, 10)))
    answer = ", ".join(f"{CELLS[cell]} {name}" for name, cell in sorted(placed, key=lambda item: item[1]))
    return Scene(frames, (Exchange("describe", "Describe the picture.", answer, None),))


def tally(painter: Painter, rng: Generator, split: Split) -> Scene:
    """How many of each of two or three objects: for training, several counts learned from one picture."""
    groups: list[tuple[str, int]] = []
    for name in several(rng, NAMES, int(rng.integers(2, 4))):
        room = 9 - sum(count for _, count in groups)
        free = [count for count in COUNTS if (name, count) not in HELD_COUNTS and count <= room]
        if free:
            groups.append((name, pick(rng, free)))
    kinds = [name for name, count in groups for _ in range(count)]
    cells = [int(i) for i in rng.permutation(9)][: len(kinds)]
    objects = [in_cell(name, cell, rng) for name, cell in zip(kinds, cells, strict=True)]
    frame = painter.paint(painter.background(rng), objects)
    turns = [Exchange("tally", f"How many {name} pictures are there?", str(count), None) for name, count in groups]
    return Scene((frame,), tuple(turns))


def census(painter: Painter, rng: Generator, split: Split) -> Scene:
    """How many of each of one to three objects, and where they are: for training, about objects all of whose numbers
    are shown."""
    counted = {name for name, _ in HELD_COUNTS}
    first = pick(rng, [name for name in NAMES if name not in counted])
    groups: list[tuple[str, int]] = []
    for name in [first, *(name for name in several(rng, NAMES, 3) if name != first)][: int(rng.integers(1, 4))]:
        room = 9 - sum(count for _, count in groups)
        free = [count for count in COUNTS if (name, count) not in HELD_COUNTS and count <= room]
        if free:
            groups.append((name, pick(rng, free)))
    cells = [int(i) for i in rng.permutation(9)]
    placed = {name: sorted(cells.pop() for _ in range(count)) for name, count in groups}
    objects = [in_cell(name, cell, rng) for name, at in placed.items() for cell in at]
    frame = painter.paint(painter.background(rng), objects)
    turns = []
    for name in several(rng, [name for name in placed if name not in counted], len(placed)):
        if rng.random() < 0.6:
            turns.append(Exchange("census", f"How many {name} pictures are there?", str(len(placed[name])), None))
        else:
            answer = ", ".join(CELLS[cell] for cell in placed[name])
            turns.append(Exchange("census", f"Where are all {name} pictures?", answer, None))
    return Scene((frame,), tuple(turns))


def transcribe(painter: Painter, rng: Generator, split: Split) -> Scene:
    """Three lines of text: for training, many characters learned from one picture."""
    lines = [_text(rng, False) for _ in range(3)]
    frame = painter.background(rng)
    colour = painter.ink(frame, rng)
    for index, line in enumerate(lines):
        frame = painter.write(frame, line.upper(), CELL * (index + 0.5), colour, rng)
    return Scene(
        (frame,), (Exchange("transcribe", "Read all lines.", ", ".join(" ".join(line) for line in lines), None),)
    )


def motion(painter: Painter, rng: Generator, split: Split) -> Scene:
    """One or two objects, each moving its own way along its own lane."""
    if split == "heldout":
        held = _held(HELD_DIRECTIONS, rng)
        first = (held[0], str(held[1]))
    else:
        first = pick(rng, [(n, d) for n in several(rng, NAMES, 1) for d in DIRECTIONS if (n, d) not in HELD_DIRECTIONS])
    moving = [first]
    if rng.random() < 0.5:
        name = pick(rng, [n for n in NAMES if n != first[0] and (n, first[0]) not in HELD_PAIRS])
        # Along the same axis, so that the lanes do not cross.
        along = DIRECTIONS[:2] if first[1] in DIRECTIONS[:2] else DIRECTIONS[2:]
        way = [d for d in along if (name, d) not in HELD_DIRECTIONS]
        moving.append((name, pick(rng, way)))
    lanes = several(rng, (0, 1, 2), len(moving))
    tracks = [_track(name, way, lane, rng) for (name, way), lane in zip(moving, lanes, strict=True)]
    background = painter.background(rng)
    frames = tuple(painter.paint(background, [track[i] for track in tracks]) for i in range(FRAMES))
    turns = [Exchange("motion", f"Which way does the {name} move?", way, DIRECTIONS) for name, way in moving]
    return Scene(frames, tuple(turns if split == "train" else turns[:1]))


def _track(name: str, way: str, lane: int, rng: Generator) -> list[Placed]:
    side = int(rng.integers(25, 31))
    step = rng.uniform(5, 8)
    span = step * (FRAMES - 1)
    start = rng.uniform(-2, SIDE - side - span + 2)
    across = int(CELL * lane + (CELL - side) / 2 + rng.integers(-2, 3))
    along = [start + step * i for i in range(FRAMES)]
    if way in ("left", "up"):
        along.reverse()
    return [
        Placed(name, *((round(a), across) if way in ("left", "right") else (across, round(a))), side) for a in along
    ]


def _pair(rng: Generator, split: Split) -> tuple[str, str]:
    if split == "heldout":
        one, other = _held(HELD_PAIRS, rng)
        return one, str(other)
    while True:
        one, other = several(rng, NAMES, 2)
        if (one, other) not in HELD_PAIRS:
            return one, other


def _shots(painter: Painter, rng: Generator, shots: Sequence[tuple[str | None, int]]) -> tuple[Array, ...]:
    """Shots one after another, of an object and a number of frames each; the light changes with every cut."""
    turn = int(rng.integers(2))
    frames: list[Array] = []
    for number, (name, length) in enumerate(shots):
        background = painter.background(rng, LIGHTS[(number + turn) % 2])
        objects = []
        if name:
            cell = pick(rng, [c for c in range(9) if (name, CELLS[c]) not in HELD_CELLS])
            objects = [in_cell(name, cell, rng)]
        frames += [painter.paint(background, objects)] * length
    return tuple(frames)


def _cut(painter: Painter, rng: Generator, split: Split, asked: str) -> Scene:
    before, after = _pair(rng, split)
    at = int(rng.integers(1, FRAMES))
    frames = _shots(painter, rng, [(before, at), (after, FRAMES - at)])
    turns = {
        "scene_change": Exchange(
            "scene_change", "When does the scene change?", f"{float(at)}s",
            tuple(f"{float(i)}s" for i in range(1, FRAMES)), tolerance=1.0,
        ),
        "before_cut": Exchange("before_cut", "What was there before the scene changed?", before, NAMES),
        "after_cut": Exchange("after_cut", "What is there after the scene changed?", after, NAMES),
    }  # fmt: skip
    first = turns.pop(asked)
    return Scene(frames, (first, *(several(rng, list(turns.values()), 2) if split == "train" else ())))


def scene_change(painter: Painter, rng: Generator, split: Split) -> Scene:
    """When one shot ends and another begins; right within one frame."""
    return _cut(painter, rng, split, "scene_change")


def before_cut(painter: Painter, rng: Generator, split: Split) -> Scene:
    """What the first of two shots shows."""
    return _cut(painter, rng, split, "before_cut")


def order(painter: Painter, rng: Generator, split: Split) -> Scene:
    """Which of two objects appears first; a shot with nothing in it lies before, between or after them."""
    one, other = _pair(rng, split)
    shots: list[str | None] = [one, other]
    shots.insert(int(rng.integers(3)), None)
    cuts = sorted(several(rng, range(1, FRAMES), 2))
    lengths = (cuts[0], cuts[1] - cuts[0], FRAMES - cuts[1])
    frames = _shots(painter, rng, list(zip(shots, lengths, strict=True)))
    a, b = several(rng, (one, other), 2)
    return Scene(frames, (Exchange("order", f"Which came first, the {a} or the {b}?", one, (one, other)),))


TASKS: dict[str, Callable[[Painter, Generator, Split], Scene]] = {
    "naming": naming,
    "lookup": lookup,
    "position": position,
    "relation": relation,
    "counting": counting,
    "reading": reading,
    "motion": motion,
    "scene_change": scene_change,
    "before_cut": before_cut,
    "order": order,
}
"""Every task by name: draws one scene."""

DENSE = {
    "closeup": closeup,
    "place": place,
    "describe": describe,
    "tally": tally,
    "census": census,
    "count_any": count_any,
    "count_both": count_both,
    "transcribe": transcribe,
}
"""For training only: what the other tasks build on, and many answers from one picture."""
