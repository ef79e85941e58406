"""TRA over a stream: sizes of the frames of a moving window, decided as frames arrive, never above the budget.

`tra.plan_clip` sees a whole clip and gives all key frames one size, all intermediate frames another. Here a frame gets
its size when it comes, and keeps it as long as it can: only what has to shrink is encoded again. The cascade is the
paper's, cut into levels whose areas differ by a factor of 4:

| level | key frames              | intermediate frames      |
|-------|-------------------------|--------------------------|
| 0     | native                  | native                   |
| 1     | native                  | 1/16 of native           |
| 2 …   | 1/4, 1/16 … of native   | 1/16 of the key frames'  |
| n     | their least size        | the floor                |

Two modes differ in the least size of key frames. `strict`: the floor. `adaptive`: what is legible (both as in
`tra.clip`), or a `KEYS`th of the limit where that is less: the newest frame is never left out, so a window with room
for fewer large key frames would soon hold nothing of what came before.

When all are at their least size, intermediate frames are thinned evenly, then key frames: the one whose neighbours are
closest to each other in time goes, never the newest. No frame is below the floor but the newest, when it alone is more
than the budget. The oldest frames step down first, so a window holds two neighbouring levels, or more while the
scene gets quieter: levels never rise with time. A frame steps at most once per level, and levels are four apart, so a
window that fills for the first time encodes each frame at most 4/3 times more, and one that moves on at most once more.

Of each frame only a share of its tokens may enter the decoder (`keep`, see `penguin_edge.tra.keeping`). Limits count
these, and `Limits.reach` what was encoded; levels stay matters of the size that is encoded.

A step down goes on until `LOW` of the limit is reached, so that the next frames find room: what follows a changed frame
in a KV cache has to be computed again, and that should be rare. New frames rise to a better level when the whole window
would fit `LOW` there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from penguin_edge.config import PATCH, TraConfig
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.tra.clip import INTERMEDIATE, KEY, LEGIBLE_TOKENS, FramePlan, Least, Plan, size_ladder
from penguin_edge.tra.keeping import check_keep, kept_tokens

StreamMode = Literal["adaptive", "strict"]
STREAM_MODES: tuple[StreamMode, ...] = get_args(StreamMode)
STEP = 4
"""Area of a level over that of the next."""
LOW = 0.85
"""Share of the limit down to which frames step."""
KEYS = 4
"""Key frames of their least size that the limit has room for, in adaptive mode."""
COARSE = 0.75
"""Share of the limit below which the last frame to step down takes a larger size that still fits `LOW`."""


@dataclass(frozen=True)
class Limits:
    """What a window may hold. `room`: visual tokens that are kept and the text of time stamps together; `reach`: visual
    tokens that were encoded and that text. None: no such limit."""

    budget: int
    room: int | None = None
    window_s: float = 60.0
    max_frames: int = 180
    reach: int | None = None

    @property
    def left(self) -> int | None:
        """The tighter one of `room` and `reach`."""
        return min((limit for limit in (self.room, self.reach) if limit is not None), default=None)

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise BudgetError(f"got a budget of {self.budget} visual tokens, wanted at least 1")
        if self.left is not None and self.left < 1:
            raise BudgetError(f"the context leaves {self.left} tokens for frames; shorten the text around them")
        if not self.window_s > 0 or self.max_frames < 1:
            raise InputError(f"a window of {self.window_s} s and {self.max_frames} frames, wanted more than nothing")


@dataclass(frozen=True)
class Change:
    """One frame that got another size: its kept visual tokens before and now. `tokens` 0: it was given up."""

    frame: int
    before: int
    tokens: int
    reason: str


@dataclass
class _Held:
    """A frame of the window. `rung` is its size in the ladder of its native size, `kept` and `encoded` are its tokens
    there: those that may enter the decoder, and all."""

    number: int
    kind: str
    time: float
    size: tuple[int, int]
    level: int
    rung: int
    kept: int = 0
    encoded: int = 0


@lru_cache(maxsize=64)
def rungs(
    size: tuple[int, int],
    factor: int,
    floor: float,
    ratio: int,
    legible: float = 0,
    most: int = 0,
    keep: float | None = None,
) -> tuple[tuple[int, int], ...]:
    """Rungs of the ladder, (key, intermediate), at each level for frames of a native size (height, width).

    Args:
        floor: tokens that any frame should have.
        legible: tokens that are enough for a key frame, as `Least.of` takes them.
        most: kept tokens above which the least size of a key frame is not, unless the floor is.
        keep: share of a frame's tokens that is kept; None: all.
    """
    ladder = size_ladder(*size, factor)
    tokens = [rows * columns for rows, columns in ladder]
    native = len(tokens) - 1
    least = Least.of(ladder, floor, legible)
    cost = [kept_tokens(count, keep) for count in tokens]
    least_key = max(least.other, min(least.key, bisect_right(cost, most) - 1))

    def at(area: float, lowest: int) -> int:
        return max(lowest, bisect_right(tokens, area) - 1)

    levels = [(native, native)]
    area = float(tokens[native])
    while True:
        key = at(area, least_key)
        pair = key, min(key, at(area / ratio, least.other))
        if pair != levels[-1]:
            levels.append(pair)
        if pair == (least_key, least.other):
            break
        area /= STEP
    return tuple(levels)


class StreamPlanner:
    """Plans a stream frame by frame; see the top of this file."""

    def __init__(
        self,
        limits: Limits,
        *,
        mode: StreamMode = "strict",
        tag_tokens: int = 0,
        min_tokens: int = 16,
        merge_size: int = 2,
        config: TraConfig | None = None,
        keep: float | None = None,
    ) -> None:
        """
        Args:
            tag_tokens: text tokens that a kept frame takes besides, counted against `limits.room` and `limits.reach`.
            keep: share of each frame's tokens that is kept; None: all.
        Raises:
            BudgetError: no frame would fit.
            InputError: an unknown mode, or no such share.
        """
        check_keep(keep)
        if mode not in STREAM_MODES:
            raise InputError(f"a stream has no tra mode {mode!r}; known: {', '.join(STREAM_MODES)}")
        self.config, self.keep = config or TraConfig(), keep
        self.factor = PATCH * merge_size
        self.limits = limits
        self.tag_tokens = tag_tokens
        self.least_tokens = self.config.min_factor * min_tokens
        self._legible = LEGIBLE_TOKENS * min_tokens if mode == "adaptive" else 0
        _check(limits, tag_tokens)
        self._held: deque[_Held] = deque()
        self._level = self._next = self._total = self._encoded = 0

    def copy(self) -> StreamPlanner:
        """A planner that stands where this one does, for finding out what would become of frames to come."""
        found = copy(self)
        found._held = deque(replace(held) for held in self._held)
        return found

    @property
    def latest(self) -> float:
        """Time of the newest frame, in seconds; 0 when there is none."""
        return self._held[-1].time if self._held else 0.0

    @property
    def pushed(self) -> int:
        """Frames that have come so far: the number of the next one."""
        return self._next

    @property
    def level(self) -> int:
        """Level of new frames."""
        return self._level

    @property
    def total_tokens(self) -> int:
        """Visual tokens of the window that are kept."""
        return self._total

    @property
    def encoded_tokens(self) -> int:
        """Visual tokens of the window as the encoder gives them."""
        return self._encoded

    @property
    def saved_share(self) -> float:
        """Share of tokens saved, against a window whose frames are all key frames of their level; 0 when empty."""
        wanted = 0
        for held in self._held:
            levels = self._levels(held)
            key = levels[min(held.level, len(levels) - 1)][0]
            wanted += self._cost(held, max(held.rung, key))[0]
        return 1 - self._total / wanted if wanted else 0.0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the kept frames, in order; the first frame pushed was 0."""
        return tuple(held.number for held in self._held)

    @property
    def tokens(self) -> tuple[tuple[int, int], ...]:
        """Visual tokens of each kept frame, in order: those that are kept, and all that were encoded."""
        return tuple((held.kept, held.encoded) for held in self._held)

    def plan(self) -> Plan:
        """The window as a plan: one entry for each kept frame."""
        frames = []
        for held in self._held:
            rows, columns = size_ladder(*held.size, self.factor)[held.rung]
            frames.append(FramePlan(held.kind, columns * self.factor, rows * self.factor, held.kept))
        stage = "native" if all(held.level == 0 for held in self._held) else f"level {self._level}"
        return Plan(tuple(frames), self.limits.budget, self.factor, "stream", stage)

    def push(self, kind: str, size: tuple[int, int], time: float) -> list[Change]:
        """Add a frame of `size` (height, width) at `time` seconds, and return what became of others. The frame becomes
        key where the window has no key frame.

        Raises:
            InputError: an unknown label, an empty size, or a time before the last frame's.
        """
        if kind not in (KEY, INTERMEDIATE):
            raise InputError(f"unknown kind of frame {kind!r}; known: {KEY}, {INTERMEDIATE}")
        if min(size) < 1:
            raise InputError(f"a frame of {size[1]}x{size[0]} pixels, wanted at least one")
        if self._held and time < self._held[-1].time:
            raise InputError(
                f"a frame at {time:g} s after one at {self._held[-1].time:g} s; time stamps must not go back: begin a "
                "new stream"
            )
        before = self._sizes()
        changes: list[Change] = []
        while self._held and (reason := self._leaves(self._held[0], time)):
            changes.append(Change(self._held[0].number, before.pop(self._held[0].number)[1], 0, reason))
            self._remove(self._held[0])
        if all(held.kind != KEY for held in self._held):
            kind = KEY
        newest = _Held(self._next, kind, time, size, 0, 0)
        self._next += 1
        self._rise(newest)
        newest.level = self._level
        self._held.append(newest)
        self._resize(newest, self._rung(newest, newest.level))
        self._settle()
        return changes + self._changes(before)

    def set_limits(self, limits: Limits) -> list[Change]:
        """Keep other limits from now on; returns which frames that shrinks or drops.

        Raises:
            BudgetError: no frame would fit.
        """
        _check(limits, self.tag_tokens)
        before = self._sizes()
        levels = [self._levels(held) for held in self._held]
        self.limits = limits
        for held, known in zip(self._held, levels, strict=True):
            if self._levels(held) != known:
                held.level = self._level_of(held)
        while len(self._held) > limits.max_frames:
            self._remove(self._held[0])
        self._settle()
        return self._changes(before)

    def discard(self, number: int) -> int:
        """Forget one frame, which turned out to be of no use; the others keep their sizes. Returns its tokens."""
        held = next(held for held in self._held if held.number == number)
        self._remove(held)
        return held.kept

    def clear(self) -> None:
        """Forget all frames, and begin at native size again."""
        self._held.clear()
        self._total = self._encoded = self._level = 0

    def _leaves(self, held: _Held, time: float) -> str:
        if time - held.time > self.limits.window_s:
            return "window"
        return "full" if len(self._held) >= self.limits.max_frames else ""

    def _remove(self, held: _Held) -> None:
        self._held.remove(held)
        self._total -= held.kept
        self._encoded -= held.encoded

    def _resize(self, held: _Held, rung: int) -> None:
        kept, encoded = self._cost(held, rung)
        self._total += kept - held.kept
        self._encoded += encoded - held.encoded
        held.rung, held.kept, held.encoded = rung, kept, encoded

    def _cost(self, held: _Held, rung: int) -> tuple[int, int]:
        """Tokens of a frame on a rung: those that are kept, and all."""
        rows, columns = size_ladder(*held.size, self.factor)[rung]
        return kept_tokens(rows * columns, self.keep), rows * columns

    def _levels(self, held: _Held) -> tuple[tuple[int, int], ...]:
        floor, ratio = self.least_tokens, self.config.area_ratio
        if not self._legible:
            return rungs(held.size, self.factor, floor, ratio)
        limits = self.limits
        most = limits.budget if limits.room is None else min(limits.budget, limits.room)
        return rungs(held.size, self.factor, floor, ratio, self._legible, most // KEYS, self.keep)

    def _level_of(self, held: _Held) -> int:
        """The last level that is not below the frame's size: a further step makes it smaller."""
        levels = self._levels(held)
        return max(i for i, pair in enumerate(levels) if pair[held.kind != KEY] >= held.rung)

    def _rung(self, held: _Held, level: int) -> int:
        levels = self._levels(held)
        return levels[min(level, len(levels) - 1)][held.kind != KEY]

    def _sizes(self) -> dict[int, tuple[int, int]]:
        """Rung and kept tokens of each frame."""
        return {held.number: (held.rung, held.kept) for held in self._held}

    def _changes(self, before: dict[int, tuple[int, int]]) -> list[Change]:
        """Frames whose size differs from `before`; as many tokens may be kept of two sizes."""
        after = self._sizes()
        found = []
        for number, (rung, tokens) in before.items():
            now, left = after.get(number, (-1, 0))
            if now != rung:
                found.append(Change(number, tokens, left, "budget" if left else "dropped"))
        return found

    def _share(self, kept: int, encoded: int, frames: int) -> float:
        """Share of the tightest limit that so many visual tokens and frames fill."""
        share, tags = kept / self.limits.budget, frames * self.tag_tokens
        if self.limits.room is not None:
            share = max(share, (kept + tags) / self.limits.room)
        if self.limits.reach is not None:
            share = max(share, (encoded + tags) / self.limits.reach)
        return share

    def _filled(self) -> float:
        return self._share(self._total, self._encoded, len(self._held))

    def _rise(self, newest: _Held) -> None:
        """Give new frames a better level while all of the window would fit `LOW` there."""
        while self._level:
            tokens = encoded = frames = 0
            for held in (*self._held, newest):
                kept, all_of_it = self._cost(held, self._rung(held, self._level - 1))
                tokens, encoded = tokens + kept, encoded + all_of_it
                frames += 1
            if self._share(tokens, encoded, frames) > LOW:
                return
            self._level -= 1

    def _settle(self) -> None:
        """Step frames down, the oldest first, when the limits are exceeded; thin them at the floor."""
        if self._filled() <= 1:
            return
        while self._filled() > LOW:
            if len(self._held) == 1:
                self._shrink_last(self._held[0])
                return
            held = next((held for held in self._held if held.level <= self._level), None)
            if held is None:
                self._level += 1
                continue
            if all(one.level >= len(self._levels(one)) - 1 for one in self._held):
                thinnest = self._thinnest()
                left = self._share(self._total - thinnest.kept, self._encoded - thinnest.encoded, len(self._held) - 1)
                if self._filled() <= 1 and left < COARSE:
                    return
                self._remove(thinnest)
                continue
            rung = self._rung(held, self._level + 1)
            held.level = self._level + 1
            if rung < held.rung:
                before = held.rung
                self._resize(held, rung)
                if self._filled() < COARSE:
                    self._widen(held, before)

    def _thinnest(self) -> _Held:
        """The frame whose loss leaves the smallest gap, never the newest; an intermediate frame if there is one, the
        oldest of several."""
        frames = list(self._held)
        kind = KEY if all(held.kind == KEY for held in frames[:-1]) else INTERMEDIATE
        gaps = [
            (frames[i + 1].time - frames[i - 1].time if i else math.inf, i)
            for i, held in enumerate(frames[:-1])
            if held.kind == kind
        ]
        return frames[min(gaps)[1]]

    def _widen(self, held: _Held, before: int) -> None:
        """Take the largest size below the one before that leaves the window within `LOW`."""
        for rung in range(before - 1, held.rung, -1):
            least = held.rung
            self._resize(held, rung)
            if self._filled() <= LOW:
                held.level = self._level  # The next step makes it smaller.
                return
            self._resize(held, least)

    def _shrink_last(self, held: _Held) -> None:
        """The one frame left: the largest size that fits, below the floor if need be."""
        while self._filled() > 1 and held.rung:
            self._resize(held, held.rung - 1)
        held.level = self._level


def _check(limits: Limits, tag_tokens: int) -> None:
    if limits.left is not None and limits.left <= tag_tokens:
        raise BudgetError(
            f"the context leaves {limits.left} tokens for frames, and a time stamp alone takes {tag_tokens}; shorten "
            "the text, or export with a larger --max-seq-len"
        )
