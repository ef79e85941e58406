"""What the next frames will make the engine do under a setting: the stream's own planner goes on, on a copy.

Nothing is computed but sizes. Frames are taken to come as those before did: as many key frames, at the same rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penguin_edge.bundle.contract import Bounds
from penguin_edge.runtime.core.features import PATCHES_PER_CALL
from penguin_edge.runtime.core.options import Follow, Shrink
from penguin_edge.runtime.core.report import Work
from penguin_edge.runtime.latency.cost import CostModel
from penguin_edge.tra.clip import KEY
from penguin_edge.tra.layout import cap_size
from penguin_edge.tra.stream import Change, StreamPlanner

FRAMES = 32
"""Frames that a forecast goes on for."""
FILLING = 96
"""Frames before them, until the window is full and older ones change for every new one."""


@dataclass(frozen=True)
class Setting:
    """Visual tokens of the window, most tokens of one frame, how many frames make one that is taken, and how the KV
    cache and frames that get smaller follow."""

    budget: int
    frame_tokens: int
    stride: int = 1
    cache: Follow = "recompute"
    shrink: Shrink = "encode"


@dataclass(frozen=True)
class Arrivals:
    """What comes: frames of (height, width) pixels, `interval_s` apart, and how the last ones were labelled."""

    size: tuple[int, int]
    interval_s: float
    kinds: Sequence[str] = (KEY,)


@dataclass(frozen=True)
class Around:
    """What else a frame's work depends on: `positions` before the first frame, `batch` the most frames in one call of
    the encoder, `merge` patches along each side of a token."""

    positions: int
    batch: int
    merge: int


@dataclass(frozen=True)
class Forecast:
    """Work of each of the next frames; the mean of the window's visual tokens, and its most positions."""

    works: tuple[Work, ...]
    tokens: float
    past: int


def forecast(
    planner: StreamPlanner,
    settings: Sequence[Setting],
    arrivals: Arrivals,
    around: Around,
    *,
    frames: int = FRAMES,
    filling: int = FILLING,
) -> list[Forecast]:
    """Let a copy of `planner` go on under each setting; the planner stays as it is.

    Args:
        settings: those that differ in `cache` and `shrink` alone are cheap together.
        frames: how many are foretold, after at most `filling` of those that older frames need not change for.
    """
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, one in enumerate(settings):
        alike.setdefault((one.budget, one.frame_tokens, one.stride), []).append(i)
    found: list[Forecast | None] = [None] * len(settings)
    for places in alike.values():
        foretold = _go_on(planner, [settings[i] for i in places], arrivals, around, frames, filling)
        for i, ahead in zip(places, foretold, strict=True):
            found[i] = ahead
    return [one for one in found if one is not None]


def _go_on(
    planner: StreamPlanner, settings: Sequence[Setting], arrivals: Arrivals, around: Around, frames: int, filling: int
) -> list[Forecast]:
    """Forecasts of settings that give frames the same sizes."""
    planner, sizes = planner.copy(), settings[0]
    planner.set_limits(replace(planner.limits, budget=sizes.budget))
    size = cap_size(arrivals.size, sizes.frame_tokens, planner.factor)
    kinds = arrivals.kinds or (KEY,)
    works: list[list[Work]] = [[] for _ in settings]
    tokens = turn = 0
    at = planner.latest
    while len(works[0]) < frames:
        at += arrivals.interval_s * sizes.stride
        changes = planner.push(kinds[turn % len(kinds)], size, at)
        turn += 1
        settled = any(change.reason in ("window", "full", "dropped", "budget") for change in changes)
        if filling and not settled:
            filling -= 1
            continue
        filling = 0
        for one, seen in zip(settings, works, strict=True):
            seen.append(frame_work(planner, changes, arrivals.size, one, around))
        tokens += planner.total_tokens
    return [Forecast(tuple(seen), tokens / frames, max(work.past + work.prefilled for work in seen)) for seen in works]


def frame_work(
    planner: StreamPlanner, changes: Sequence[Change], size: tuple[int, int], setting: Setting, around: Around
) -> Work:
    """What a stream does for the newest frame of a planner, of (height, width) pixels, after `changes` of others."""
    tag, numbers = planner.tag_tokens, planner.numbers
    kept, areas = zip(*planner.tokens, strict=True)
    whole = dict(zip(numbers, areas, strict=True))  # what the encoder gives, whatever is kept of it
    shrunk = [change.frame for change in changes if change.tokens]
    encoded = numbers[-1:] if setting.shrink == "pool" else [*shrunk, numbers[-1]]
    calls: list[tuple[int, int]] = []
    # Frames of one size go through the encoder together; the newest one's call comes last.
    sizes = dict.fromkeys(whole[number] for number in encoded if whole[number] != whole[numbers[-1]])
    for tokens in (*sizes, whole[numbers[-1]]):
        frames, patches = sum(whole[number] == tokens for number in encoded), tokens * around.merge**2
        batch = max(1, min(around.batch, PATCHES_PER_CALL // patches))
        calls += [(batch, patches)] * (frames // batch) + [(frames % batch, patches)] * (frames % batch > 0)
    positions = [tokens + tag for tokens in kept]
    if setting.cache == "recompute":
        # From the first place on that is not as it was.
        first = min((change.frame for change in changes), default=numbers[-1])
        begin = next(i for i, number in enumerate(numbers) if number >= first)
        prefilled = sum(positions[begin:])
        return Work(size[0] * size[1], tuple(calls), prefilled, around.positions + sum(positions[:begin]))
    first = min((change.frame for change in changes), default=numbers[-1])
    # The text before the first frame belongs to it: another frame in its place is computed again.
    fresh = {*shrunk, numbers[-1], *(numbers[:1] if first < numbers[0] else ())}
    changed = [i for i, number in enumerate(numbers) if number in fresh]
    prefilled = sum(positions[i] for i in changed)
    pieces = len(changed)
    begin = next(i for i, number in enumerate(numbers) if number >= first)
    moved = sum(positions[i] for i in range(begin, len(numbers)) if i not in changed)
    past = around.positions + sum(positions) - prefilled
    return Work(size[0] * size[1], tuple(calls), prefilled, past, pieces, moved)


def price(cost: CostModel, work: Work, bounds: Bounds, merge: int) -> tuple[float, ...]:
    """Milliseconds of one frame's work by the cost model, slice by slice: each call of the encoder with what comes
    before it, and at the end what the KV cache takes. Older frames that are encoded anew are resized and cut into
    patches, and no more: what so many patches add to a frame that comes."""
    before = cost.stage_ms("preprocess", work.pixels, work.encoded[-1][1] if work.encoded else 0)
    bare = cost.stage_ms("preprocess", work.pixels, 0)
    slices = []
    for i, (frames, patches) in enumerate(work.encoded):
        call = cost.stage_ms("encode", patches, frames) + cost.stage_ms("project", frames * patches // merge**2)
        if i < len(work.encoded) - 1:  # the newest frame is in the last call
            call += frames * max(0.0, cost.stage_ms("preprocess", work.pixels, patches) - bare)
        slices.append(before + call)
        before = 0.0
    if work.prefilled:
        each = -(-work.prefilled // work.pieces)
        before += work.pieces * cost.prefill_ms(each, work.past, bounds)
    if work.moved and "move" in cost.tables:  # a cache of a few positions is profiled without
        before += cost.stage_ms("move", work.moved)
    return (*slices, before)
