"""Which layer is stored how, from what each candidate costs: bytes, and KL measured for that layer alone.

Costs of layers are added up. Each layer's candidates are cut to their lower convex hull in bytes and KL, and the steps
along all hulls are taken in the order of KL saved per byte, from the smallest candidates on:

- `within_size` takes each step that still fits, and tries so with every single option settled beforehand. The sum of KL
  is at most the best possible one plus what the largest single step saves, and never grows with the size.
- `tightest` looks for the shortest run of steps whose KL, measured on the whole recipe, is within a limit: the sum says
  where to begin, measurements where to go on.

Text alone says nothing of encoder and projector: they take the scheme that the preset `int8` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from penguin_edge.errors import InputError
from penguin_edge.quantize.apply import SMALLER
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.recipe import INT8, INT8_ROWS, PRESETS, Recipe

SMALL = (Scheme(4, 64), Scheme(4, 64, symmetric=False), Scheme(4, 32))
SMALLEST_GROUP = Scheme(4, 16)
"""Scheme for layers that no other group divides."""
ROUNDS = 6
"""Whole recipes that are measured for a limit of KL, beyond the first."""
VISION = ("encoder", "projector")
STAND_IN = replace(PRESETS["int8"], name="auto")
"""Recipe that memory and disk are checked with before anything is chosen: no layer will be larger."""


@dataclass(frozen=True)
class AutoOptions:
    """One of the two limits, and what the model reads. `max_size`: bytes of the whole bundle, with the rotary tables of
    `max_seq_len` positions; `max_kl`: nats."""

    data: CalibrationOptions
    max_size: int | None = None
    max_kl: float | None = None
    max_seq_len: int = 4096


@dataclass(frozen=True)
class Option:
    """A candidate of a layer; `scheme` None: fp32. `kl` is 0 for layers that are not measured."""

    scheme: Scheme | None
    bytes: int
    kl: float = 0.0

    @property
    def label(self) -> str:
        return "fp32" if self.scheme is None else self.scheme.label


@dataclass(frozen=True)
class Step:
    """From one option of a layer to a larger one."""

    layer: int
    option: int
    bytes: int
    saved: float


def candidates(
    layers: Mapping[str, tuple[int, int]], takes: Callable[[str, Scheme], bool], images: bool
) -> dict[str, tuple[Scheme | None, ...]]:
    """Candidate schemes of each layer.

    Args:
        layers: shape [N, K] of every linear layer.
        takes: whether the target computes a layer so.
        images: whether the data has any; without, encoder and projector have one candidate.
    Returns:
        Schemes that the target takes and that divide the layer; (None,) where there is none.
    """
    found: dict[str, tuple[Scheme | None, ...]] = {}
    for layer, (_, inputs) in layers.items():
        vision = layer.partition(".")[0] in VISION
        large = INT8_ROWS if vision else INT8
        small: tuple[Scheme, ...] = () if vision and not images else SMALL
        if small and not any(scheme.fits(inputs) for scheme in small):
            small = (SMALLEST_GROUP,)
        blocked = any(inputs % size == 0 for size in SMALLER)
        fitting = [scheme for scheme in (*small, large) if blocked and scheme.fits(inputs) and takes(layer, scheme)]
        found[layer] = tuple(fitting) or (None,)
    return found


def smallest(options: Sequence[Sequence[Option]]) -> list[int]:
    """Index of each layer's smallest option; among equally small ones the one with the least KL."""
    return [min(range(len(row)), key=lambda i, row=row: (row[i].bytes, row[i].kl, i)) for row in options]  # type: ignore[misc]


def steps(options: Sequence[Sequence[Option]]) -> list[Step]:
    """All steps along the layers' hulls, most KL saved per byte first; steps of one layer keep their order."""
    found = []
    for layer, row in enumerate(options):
        at = smallest([row])[0]
        while True:
            larger = [i for i in range(len(row)) if row[i].bytes > row[at].bytes and row[i].kl < row[at].kl]
            if not larger:
                break
            here = row[at]
            # Take the largest step among equal slopes, so that slopes of a layer fall strictly.
            at = max(larger, key=lambda i: ((here.kl - row[i].kl) / (row[i].bytes - here.bytes), row[i].bytes, -i))
            found.append(Step(layer, at, row[at].bytes - here.bytes, here.kl - row[at].kl))
    # Python's sort is stable: among equal slopes the first layer comes first, and a layer's steps stay in order.
    return sorted(found, key=lambda step: -step.saved / step.bytes)


def totals(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> tuple[int, float]:
    """Bytes and KL of a choice, added up."""
    picked = [row[i] for row, i in zip(options, chosen, strict=True)]
    return sum(option.bytes for option in picked), sum(option.kl for option in picked)


def within_size(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Index of each layer's option, at most `budget` bytes in all.

    Raises:
        InputError: even the smallest options take more.
    """
    start, order = smallest(options), steps(options)
    used, _ = totals(options, start)
    if used > budget:
        raise InputError(
            f"got a budget of {budget} bytes for layers, wanted at least {used}, which their smallest schemes take"
        )
    best = _filled(start, used, order, budget, None)
    kl = totals(options, best)[1]
    # A large layer that comes late finds its room taken: each option is tried as the one that is settled first.
    for layer, row in enumerate(options):
        for index, option in enumerate(row):
            begin = used + option.bytes - row[start[layer]].bytes
            if begin > budget:
                continue
            found = _filled([*start[:layer], index, *start[layer + 1 :]], begin, order, budget, layer)
            if totals(options, found)[1] < kl:
                best, kl = found, totals(options, found)[1]
    return best


def _filled(start: list[int], used: int, order: Sequence[Step], budget: int, settled: int | None) -> list[int]:
    """`start` and every step that fits; a step that does not fit blocks the later steps of its layer."""
    chosen, stuck = list(start), {settled}
    for step in order:
        if step.layer in stuck or used + step.bytes > budget:
            stuck.add(step.layer)
            continue
        chosen[step.layer] = step.option
        used += step.bytes
    return chosen


def after(options: Sequence[Sequence[Option]], count: int) -> list[int]:
    """Index of each layer's option when the first `count` steps are taken."""
    chosen = smallest(options)
    for step in steps(options)[:count]:
        chosen[step.layer] = step.option
    return chosen


def steps_for(options: Sequence[Sequence[Option]], kl: float) -> int:
    """The fewest steps whose KL adds up to at most `kl`; all of them where none do."""
    order = steps(options)
    _, left = totals(options, smallest(options))
    for count, step in enumerate(order):
        if left <= kl:
            return count
        left -= step.saved
    return len(order)


def tightest(
    options: Sequence[Sequence[Option]], wanted: float, measure: Callable[[list[int]], float]
) -> tuple[list[int], float]:
    """A small choice whose measured KL is at most `wanted`.

    Args:
        measure: the KL of the whole recipe.
    Returns:
        The choice, and its KL as measured. Where all steps together do not reach `wanted`, the best that was measured.
    """
    last = len(steps(options))
    kls: dict[int, float] = {}

    def kl(count: int) -> float:
        if count not in kls:
            kls[count] = measure(after(options, count))
        return kls[count]

    first = steps_for(options, wanted)
    bad, good = (-1, first) if kl(first) <= wanted else (first, last)
    if kl(good) > wanted:
        best = min(kls, key=lambda count: (kls[count], count))
        return after(options, best), kls[best]
    # The sum is off by a factor, most of which the first measurement shows.
    _, sum_first = totals(options, after(options, first))
    guess = steps_for(options, wanted * sum_first / kls[first]) if kls[first] > 0 else 0
    for _ in range(ROUNDS):
        if good - bad <= 1:
            break
        middle = guess if bad < guess < good else (bad + good) // 2
        guess = -1
        if kl(middle) <= wanted:
            good = middle
        else:
            bad = middle
    return after(options, good), kls[good]


def recipe_of(layers: Sequence[str], options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Recipe:
    """Recipe of a choice, with every layer by its name."""
    schemes = {layer: row[i].scheme for layer, row, i in zip(layers, options, chosen, strict=True)}
    return Recipe("auto", embedding="int8", layers=schemes)


def table_rows(
    layers: Mapping[str, tuple[int, int]],
    options: Sequence[Sequence[Option]],
    chosen: Sequence[int],
    images: bool,
) -> list[dict[str, Any]]:
    """The table of a choice, as JSON: KL is null where it was not measured."""
    rows = []
    for (layer, shape), row, i in zip(layers.items(), options, chosen, strict=True):
        unseen, fixed = layer.partition(".")[0] in VISION and not images, row[i].scheme is None
        reason = "no group divides its inputs" if fixed else "not measured: no pictures in the data" if unseen else ""
        rows.append(
            {
                "layer": layer,
                "shape": list(shape),
                "chosen": row[i].label,
                "reason": reason,
                "candidates": [
                    {
                        "label": option.label,
                        "scheme": None if option.scheme is None else asdict(option.scheme),
                        "bytes": option.bytes,
                        "kl": None if unseen or option.scheme is None else option.kl,
                    }
                    for option in row
                ],
            }
        )
    return rows
