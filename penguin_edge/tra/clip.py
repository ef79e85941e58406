"""TRA (temporal redundancy-aware) compression: how many visual tokens each frame of a clip may cost.

Key frames keep their detail, intermediate frames get about a sixteenth of it, and the whole fits a token budget.
A plan knows two sizes only, one per kind. A frame of `height` x `width` target pixels costs
`(height / factor) * (width / factor)` tokens, `factor = 14 * merge_size`.

Three modes:

- `reference` repeats `simple_batched_resize` of the reference
  (`penguinvl/model/penguinvl_encoder/image_processing_penguinvl.py`) to the last bit, its flaws included: it can exceed
  the budget, and it can enlarge frames far above native.
- `strict` is the same cascade with a guarantee: never above the budget, never larger than native.
- `adaptive` keeps that guarantee, and drops frames before key frames get too small to be read.

The strict cascade; the first stage that fits is taken:

| stage   | key frames                              | intermediate frames                            |
|---------|-----------------------------------------|------------------------------------------------|
| native  | native                                  | native                                         |
| joint   | as large as fits; native at most        | key area / 16; more only once keys are native  |
| floor   | as large as fits                        | the floor                                      |
| thinned | at least the floor, as large as fits    | as above, for the frames that were not dropped |

The floor is the smallest size of at least `1.5 * min_tokens` tokens, or native if that is smaller.

The adaptive cascade is the same while key frames are legible, and differs where they would not be:

| stage   | key frames                              | intermediate frames                            |
|---------|-----------------------------------------|------------------------------------------------|
| native  | native                                  | native                                         |
| joint   | as large as fits; legible at least      | key area / 16, or the floor; what fits         |
| floor   | as large as fits; legible at least      | the floor                                      |
| thinned | legible, then as large as fits          | the floor, for as many as fit beside all keys  |
| one     | frame 0 alone, as large as fits         | none                                           |

A key frame is legible at `LEGIBLE_SHARE` of its native tokens, or at `LEGIBLE_TOKENS * min_tokens` where that is less:
docs/budgets.md tells how both were found. Where not all key frames fit at that size, as many as do are kept,
as large as fits, and no other frame.

Of each frame only a share of its tokens may enter the decoder (`keep`, see `penguin_edge.tra.keeping`). The budget then
counts these; areas, the floor and what is legible stay matters of the size that is encoded.

Sizes come from a ladder: all sizes met while a frame is scaled down from native with its sides rounded to whole
factors. At its lower end the ladder gives up the aspect, so it always ends at one token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from penguin_edge.config import PATCH, TraConfig
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.preprocess import fit_area
from penguin_edge.tra.keeping import check_keep, kept_tokens
from penguin_edge.tra.keyframes import (
    DROPPED,
    INTERMEDIATE,
    KEY,
    Array,
    Detection,
    KeyFrameDetector,
    compare_size,
    similarity,
)

__all__ = [
    "DROPPED",
    "INTERMEDIATE",
    "KEY",
    "Detection",
    "FramePlan",
    "KeyFrameDetector",
    "Plan",
    "Policy",
    "TraPlanner",
    "compare_size",
    "plan_clip",
    "similarity",
]

Mode = Literal["adaptive", "strict", "reference"]
MODES: tuple[Mode, ...] = get_args(Mode)
LEGIBLE_SHARE = 2 / 3
"""Tokens of a legible key frame over those of its native size."""
LEGIBLE_TOKENS = 25
"""Tokens that are enough for a legible key frame of any native size, in units of the model's `min_tokens`."""


@dataclass(frozen=True)
class FramePlan:
    """Target of one frame: `width` x `height` pixels as encoded, and `tokens` that enter the decoder: those after the
    merge, or the share of them that is kept. All 0 when dropped."""

    kind: str
    width: int
    height: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """Targets of all frames of a clip, in order, and what was decided on the way.

    `stage` is native, joint, floor or thinned; in adaptive mode also one, in reference mode key-floor, never thinned.
    `notes` are sentences for the user: what was dropped, relabelled or exceeded.
    """

    frames: tuple[FramePlan, ...]
    budget: int
    factor: int
    mode: str
    stage: str
    notes: tuple[str, ...] = ()

    def _count(self, kind: str) -> int:
        return sum(frame.kind == kind for frame in self.frames)

    @property
    def keys(self) -> int:
        return self._count(KEY)

    @property
    def intermediates(self) -> int:
        return self._count(INTERMEDIATE)

    @property
    def dropped(self) -> int:
        return self._count(DROPPED)

    @property
    def total_tokens(self) -> int:
        return sum(frame.tokens for frame in self.frames)

    @property
    def over_budget(self) -> bool:
        """True is possible in reference mode only."""
        return self.total_tokens > self.budget

    def to_json(self) -> dict[str, Any]:
        """Counts and decisions; `plan_report.plan_json` adds the frames with their times and similarities."""
        return {
            "keys": self.keys,
            "intermediates": self.intermediates,
            "dropped": self.dropped,
            "total_tokens": self.total_tokens,
            "budget": self.budget,
            "mode": self.mode,
            "stage": self.stage,
            "notes": list(self.notes),
        }


Policy = Callable[[Sequence[str], tuple[int, int], int, int], Plan]
"""(labels, native (height, width), budget in tokens, merge size) -> a plan within the budget, in the place of TRA's."""


@lru_cache(maxsize=64)
def size_ladder(height: int, width: int, factor: int) -> tuple[tuple[int, int], ...]:
    """All sizes (rows, columns), in factors, of a frame scaled from nothing up to native; tokens strictly increase.

    A side of `s * height` pixels becomes its nearest whole number of factors, at least one. Native is the last entry;
    no side exceeds the native side by more than rounding up to one factor.
    """
    rows, columns = (max(1, round(side / factor)) for side in (height, width))
    # Rows grow from k to k + 1 at the scale (2k + 1) * factor / (2 * height), columns likewise: compared as integers.
    steps = [((2 * k + 1) * width, 0) for k in range(1, rows)]
    steps = sorted(steps + [((2 * k + 1) * height, 1) for k in range(1, columns)])
    sizes = [(1, 1)]
    last = None
    for at, axis in steps:
        r, c = sizes[-1]
        grown = (r + 1, c) if axis == 0 else (r, c + 1)
        if at == last:
            sizes[-1] = grown  # both sides grow at the same scale
        else:
            sizes.append(grown)
        last = at
    return tuple(sizes)


def _largest(upper: int, lower: int, fits: Callable[[int], bool]) -> int:
    """Largest index in [lower, upper] that fits, for a monotone test; `lower` is known to fit."""
    return bisect_right(range(lower + 1, upper + 1), False, key=lambda i: not fits(i)) + lower


def plan_clip(
    n: int,
    kinds: Sequence[str],
    size: tuple[int, int],
    budget: int,
    *,
    mode: Mode = "strict",
    min_tokens: int = 16,
    merge_size: int = 2,
    config: TraConfig | None = None,
    keep: float | None = None,
) -> Plan:
    """Sizes for `n` frames of one `size` (height, width in pixels), labelled `kinds`, within `budget` tokens.

    In strict and adaptive mode frame 0 is always key, whatever its label. When even the least sizes (see the top of
    this file) are too much for every frame, the intermediate frames are thinned evenly, then the key frames; frame 0
    stays, and alone it may go below its least size, down to one token. If keys below native leave some budget, it is
    less than one more step of all keys would cost.

    Args:
        keep: share of each frame's tokens that enters the decoder and that the budget counts; None: all. In reference
            mode the sizes stay those of the reference.
    Raises:
        BudgetError: a budget below one token.
        InputError: no frames, an unknown label, an empty size, no such share; in reference mode also a clip without
            key frames whose budget is too small, where the reference divides by zero.
    """
    config = config or TraConfig()
    height, width = size
    if n < 1 or len(kinds) != n:
        raise InputError(f"got {len(kinds)} labels for {n} frames; wanted at least one frame and one label for each")
    unknown = sorted({str(kind) for kind in kinds} - {KEY, INTERMEDIATE})
    if unknown:
        raise InputError(f"unknown kind of frame {unknown[0]!r}; known: {KEY}, {INTERMEDIATE}")
    if min(height, width, min_tokens, merge_size) < 1:
        raise InputError(
            f"got {width}x{height} pixels, min_tokens {min_tokens}, merge_size {merge_size}; wanted all above 0"
        )
    if budget < 1:
        raise BudgetError(f"a budget of {budget} tokens holds no frame; give at least 1")
    check_keep(keep)
    factor = PATCH * merge_size
    if mode == "reference":
        return _reference(list(kinds), height, width, budget, factor, min_tokens, config, keep)
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    ladder = size_ladder(height, width, factor)
    least = Least.of(ladder, config.min_factor * min_tokens, LEGIBLE_TOKENS * min_tokens if mode == "adaptive" else 0)
    plan = _guarded(list(kinds), ladder, budget, factor, least, config.area_ratio, keep)
    return replace(plan, mode=mode)


def _assemble(
    kinds: Sequence[str], sizes: dict[str, tuple[int, int]], budget: int, factor: int, keep: float | None
) -> Plan:
    """A plan from labels and target pixels (height, width) per kind; mode and stage are filled in by the caller."""
    made = {k: FramePlan(k, w, h, kept_tokens((h // factor) * (w // factor), keep)) for k, (h, w) in sizes.items()}
    return Plan(tuple(made[kind] for kind in kinds), budget, factor, "", "")


def _reference(
    kinds: list[str],
    height: int,
    width: int,
    budget: int,
    factor: int,
    min_tokens: int,
    config: TraConfig,
    keep: float | None,
) -> Plan:
    n, keys = len(kinds), kinds.count(KEY)
    native = height * width
    least = min_tokens * factor * factor * config.min_factor
    most = budget * factor * factor * config.max_factor
    key_area: float = native
    other_area: float = native
    stage = "native"
    if n * native > most:
        stage = "joint"
        key_area = most / (keys + (n - keys) / config.area_ratio)
        other_area = key_area / config.area_ratio
        if other_area < least:
            if keys == 0:
                raise InputError(
                    f"{n} intermediate frames without a key frame do not fit {budget} tokens, where the reference "
                    "divides by zero; mark a frame as key or use mode='strict'"
                )
            stage, other_area = "floor", least
            key_area = (most - (n - keys) * least) / keys
        if key_area < least:
            stage, key_area = "key-floor", least
    areas = {KEY: key_area, INTERMEDIATE: other_area}
    sizes = {kind: fit_area(area, height, width, factor, least) for kind, area in areas.items()}
    plan = replace(_assemble(kinds, sizes, budget, factor, keep), mode="reference", stage=stage)
    if not plan.over_budget:
        return plan
    return replace(plan, notes=(f"{plan.total_tokens} tokens exceed the budget of {budget}, as in the reference",))


@dataclass(frozen=True)
class Least:
    """Rungs of a ladder below which frames are not scaled down, by kind: key frames and intermediate frames."""

    key: int
    other: int

    @classmethod
    def of(cls, ladder: Sequence[tuple[int, int]], floor: float, legible: float) -> Least:
        """The least rungs for frames of a ladder.

        Args:
            floor: tokens that any frame should have.
            legible: tokens that are enough for a key frame; below `LEGIBLE_SHARE` of native it gets that share.
                0 asks for no more than the floor.
        """
        native = len(ladder) - 1

        def reaching(least: float) -> int:
            return next((i for i, (rows, columns) in enumerate(ladder) if rows * columns >= least), native)

        rows, columns = ladder[-1]
        other = reaching(floor)
        return cls(max(other, reaching(min(legible, LEGIBLE_SHARE * rows * columns))), other)


def _guarded(
    kinds: list[str],
    ladder: Sequence[tuple[int, int]],
    budget: int,
    factor: int,
    least: Least,
    ratio: int,
    keep: float | None,
) -> Plan:
    """A plan that keeps the budget: the strict one where both kinds have the same least rung, else the adaptive one."""
    notes = []
    if kinds[0] != KEY:
        notes.append("frame 0 was made key: a plan starts with a key frame")
        kinds[0] = KEY
    tokens = [r * c for r, c in ladder]
    cost = [kept_tokens(count, keep) for count in tokens]
    native = len(ladder) - 1
    n, keys = len(kinds), kinds.count(KEY)
    legible = least.key > least.other

    stage, lowest = "", least.key
    if keys * cost[least.key] + (n - keys) * cost[least.other] > budget:
        stage = "thinned"
        if budget < cost[least.key]:
            stage, lowest = "one" if legible else stage, 0
        room = max(0, budget - keys * cost[least.key]) // cost[least.other]
        why = "the budget is below their floor"
        if legible and stage != "one":
            why = f"key frames keep {cost[least.key]} tokens"
        notes.extend(_thin(kinds, max(1, budget // cost[least.key]), room, why, last=legible))
    keys, others = kinds.count(KEY), kinds.count(INTERMEDIATE)

    def joint(key: int) -> int:
        """Rung of the intermediate frames beside keys on rung `key`: a sixteenth of the tokens, not below the floor."""
        return min(key, max(least.other, bisect_right(tokens, tokens[key] / ratio) - 1))

    def fits(key: int, other: int) -> bool:
        return keys * cost[key] + others * cost[other] <= budget

    if n == keys + others and fits(native, native):
        stage, key, other = "native", native, native
    else:
        key = _largest(native, lowest, lambda i: fits(i, joint(i)))
        # At the least size of the keys a sixteenth of it may be too much.
        other = _largest(joint(key), min(key, least.other), lambda i: fits(key, i))
        # A step of all intermediate frames may have been too much where a step of the keys alone is not.
        key = _largest(native, key, lambda i: fits(i, other))
        if key == native:
            other = _largest(native, other, lambda i: fits(native, i))
        stage = stage or ("floor" if other == least.other and others else "joint")
        if key < least.key:
            below = f"the {cost[least.key]} that are legible" if legible else f"the floor of {cost[least.key]}"
            notes.append(f"frame 0 alone is left, with {cost[key]} tokens, below {below}")
    sizes = {kind: (ladder[i][0] * factor, ladder[i][1] * factor) for kind, i in ((KEY, key), (INTERMEDIATE, other))}
    plan = _assemble(kinds, {**sizes, DROPPED: (0, 0)}, budget, factor, keep)
    return replace(plan, stage=stage, notes=tuple(notes))


def _evenly(items: list[int], keep: int, *, last: bool = False) -> set[int]:
    """`keep` of `items`, spread evenly; the first is always among them, or the last."""
    if last:
        return {items[(j + 1) * len(items) // keep - 1] for j in range(keep)}
    return {items[j * len(items) // keep] for j in range(keep)}


def _thin(kinds: list[str], keys: int, others: int, why: str, *, last: bool) -> list[str]:
    """Mark frames as dropped, in place, until at most so many of each kind are left. Returns what to say.

    Args:
        last: keep the last intermediate frame rather than the first, which follows a key frame.
    """
    notes = []
    for name, most in ((INTERMEDIATE, others), (KEY, keys)):
        items = [i for i, kind in enumerate(kinds) if kind == name]
        keep = min(len(items), most)
        kept = _evenly(items, keep, last=last and name == INTERMEDIATE)
        for i in items:
            if i not in kept:
                kinds[i] = DROPPED
        if keep < len(items):
            notes.append(f"dropped {len(items) - keep} of {len(items)} {name} frames: {why}")
    return notes


class TraPlanner:
    """A detector that remembers its labels, so that a clip can be planned once its frames were seen.

    All frames get the sizes planned for the size of the first one; a clip that changes its size is noted in the plan.
    """

    def __init__(
        self,
        detect: Literal["exact", "fast"] = "exact",
        *,
        min_tokens: int = 16,
        merge_size: int = 2,
        config: TraConfig | None = None,
    ) -> None:
        self.config = config or TraConfig()
        self.detector = KeyFrameDetector(detect, self.config)
        self.min_tokens = min_tokens
        self.merge_size = merge_size
        self.detections: list[Detection] = []
        self.size: tuple[int, int] | None = None
        self._other_size: tuple[int, int] | None = None

    def push(self, pixels: Array) -> Detection:
        """Label the next frame; arguments and errors as `KeyFrameDetector.push`."""
        detection = self.detector.push(pixels)
        size = (int(pixels.shape[0]), int(pixels.shape[1]))
        self.size = self.size or size
        if size != self.size:
            self._other_size = size
        self.detections.append(detection)
        return detection

    def plan(self, budget: int, mode: Mode = "strict") -> Plan:
        """Plan all frames pushed so far; errors as `plan_clip`."""
        if self.size is None:
            raise InputError("no frame was pushed; push the frames of the clip before planning it")
        plan = plan_clip(
            len(self.detections),
            [detection.kind for detection in self.detections],
            self.size,
            budget,
            mode=mode,
            min_tokens=self.min_tokens,
            merge_size=self.merge_size,
            config=self.config,
        )
        if self._other_size is None:
            return plan
        (height, width), (h, w) = self.size, self._other_size
        return replace(plan, notes=(*plan.notes, f"frames of {w}x{h} are planned as those of {width}x{height}"))
