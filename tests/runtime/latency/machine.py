"""A simulated machine under a stream: its own planner, prices of a known model, and a clock that costs nothing.

What a frame takes is `added + speed(t) * price + noise(t)`, which the controller is not told. A question comes every
two seconds, together with a frame, and waits for a slice of its work, the longest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from penguin_edge.bundle.contract import Bounds
from penguin_edge.runtime.core.options import FOLLOWS
from penguin_edge.runtime.latency.control import Device, LatencyControl, LatencyTarget, Setting
from penguin_edge.runtime.latency.cost import CostModel, fit
from penguin_edge.runtime.latency.forecast import Around, Arrivals, Forecast, forecast, frame_work, price
from penguin_edge.runtime.latency.ranking import Full, candidates, worth
from penguin_edge.tra.clip import INTERMEDIATE, KEY, size_ladder
from penguin_edge.tra.layout import cap_size
from penguin_edge.tra.stream import Limits, StreamPlanner

SIDES = [4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0]
QUEUE = 4
"""Frames that wait, at most."""
BOUNDS = Bounds(max_seq_len=4096, max_chunk=256)


def model(scale: float = 1.0, constant: float = 1.0) -> CostModel:
    """Milliseconds about those of the 0.6B shape on two cores, times `scale`; constants of calls times `constant`."""
    return fit(
        {
            "preprocess": {(x, p): [scale * (0.1 + 1e-5 * x + 1e-3 * p)] for x in (3e3, 4e5) for p in (16.0, 1600.0)},
            "encode": {
                (s * s, b): [scale * (2 * constant + b * (0.2 * s**2 + 1e-4 * s**4))] for s in SIDES for b in (1.0, 4.0)
            },
            "project": {(x,): [scale * (0.2 * constant + 0.01 * x)] for x in (4.0, 576.0)},
            "prefill": {
                (n, past): [scale * (5 * constant + n + 2e-4 * n * past)]
                for n in (1.0, 256.0)
                for past in (0.0, 4096.0)
            },
            "decode": {(x,): [scale * (20 + 0.005 * x)] for x in (0.0, 4096.0)},
            "move": {(x,): [scale * 0.01 * x] for x in (0.0, 4096.0)},
        }
    )


@dataclass
class Truth:
    """What the machine does, which the controller does not know; `speed` and `noise` are functions of the time."""

    cost: CostModel = field(default_factory=model)
    added: float = 3.0
    speed: Callable[[float], float] = lambda t: 1.0
    noise: Callable[[float], float] = lambda t: 0.0


@dataclass
class Seen:
    """What came of a run: (time, milliseconds) of every frame's age and every first token, (time, visual tokens)."""

    ages: list[tuple[float, float]] = field(default_factory=list)
    firsts: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[tuple[float, float]] = field(default_factory=list)

    def misses(self, target: LatencyTarget, begin: float = 0.0, end: float = float("inf")) -> float:
        """Share of deadlines that were missed."""
        late = [ms > target.first_token_ms for at, ms in self.firsts if begin <= at < end]
        if target.frame_ms is not None:
            late += [ms > target.frame_ms for at, ms in self.ages if begin <= at < end]
        return sum(late) / max(1, len(late))

    def kept(self, begin: float = 0.0, end: float = float("inf")) -> float:
        """Mean visual tokens of the window."""
        return float(np.mean([tokens for at, tokens in self.tokens if begin <= at < end]))

    def quantile(self, share: float, begin: float = 5.0) -> tuple[float, float]:
        """A frame's age and a first token."""
        return tuple(
            float(np.quantile([ms for at, ms in found if at >= begin], share)) for found in (self.ages, self.firsts)
        )  # type: ignore[return-value]


class Machine:
    """A stream of frames of one size on a machine."""

    def __init__(
        self,
        truth: Truth,
        *,
        fps: float = 2.0,
        size: tuple[int, int] = (280, 392),
        budget: int = 1000,
        caches: Sequence[str] = FOLLOWS[:1],
        kinds: Sequence[str] = (KEY, *[INTERMEDIATE] * 5),
        window_s: float = 60.0,
    ) -> None:
        self.truth, self.fps, self.size, self.kinds = truth, fps, size, kinds
        self.planner = StreamPlanner(Limits(budget, 3500, window_s), tag_tokens=9)
        self.around = Around(12, 16, 2)
        ladder = [rows * columns for rows, columns in size_ladder(*size, self.planner.factor)]
        floor = next(tokens for tokens in ladder if tokens >= min(self.planner.least_tokens, ladder[-1]))
        self.choices = candidates(ladder[-1], floor, budget, caches, ("encode",))
        self.worth = partial(worth, full=Full(ladder[-1], budget, ladder[-1] * min(180, window_s * fps)))
        self.device = Device(BOUNDS, 2, 24, 1e3 / fps)
        self.labels: list[str] = []

    def foresee(self, settings: Sequence[Setting], frames: int) -> list[Forecast]:
        kinds = self.labels[-32:] if len(self.labels) >= 8 else (KEY, *[INTERMEDIATE] * 3)
        return forecast(self.planner, settings, Arrivals(self.size, 1 / self.fps, kinds), self.around, frames=frames)

    def control(self, target: LatencyTarget, cost: CostModel | None = None) -> LatencyControl:
        known = cost or self.truth.cost
        return LatencyControl(target, known, self.device, self.choices, self.worth, self.foresee)

    def run(self, seconds: float, control: LatencyControl | None = None, fixed: Setting | None = None) -> Seen:
        """Frames for so long under a controller, or under a fixed setting."""
        seen, free, setting, spent = Seen(), 0.0, None, 0
        every = int(2 * self.fps)
        for turn in range(int(seconds * self.fps)):
            arrived = turn / self.fps
            wanted = control.setting if control is not None else fixed or self.choices[0]
            if wanted != setting:
                self.planner.set_limits(replace(self.planner.limits, budget=wanted.budget))
                setting = wanted
            if turn % setting.stride:
                continue
            if free - arrived > QUEUE / self.fps:  # newer ones have taken its place
                seen.ages.append((arrived, 1e3 * (free - arrived)))
                continue
            kind = self.kinds[turn % len(self.kinds)]
            changes = self.planner.push(kind, cap_size(self.size, setting.frame_tokens, self.planner.factor), arrived)
            self.labels.append(self.planner.plan().frames[-1].kind)
            work = frame_work(self.planner, changes, self.size, setting, self.around)
            begun = max(arrived, free)
            slices = [self.truth.speed(begun) * one for one in price(self.truth.cost, work, BOUNDS, 2)]
            besides = self.truth.added + self.truth.noise(begun)
            took = besides + sum(slices)
            queued = max(0.0, 1e3 * (begun - arrived) - spent)
            held, spent = 1e3 * (begun - arrived) - queued, 0
            free = begun + took / 1e3
            seen.ages.append((arrived, 1e3 * (free - arrived)))
            seen.tokens.append((arrived, self.planner.total_tokens))
            if control is not None:
                control.observe_frame(free, work, took, held, queued)
                control.decide(free)
            if turn % every == 0:
                past = work.past + work.prefilled
                cost, speed = self.truth.cost, self.truth.speed(free)
                first = self.truth.added + speed * cost.prefill_ms(24, past, BOUNDS) + self.truth.noise(free)
                waited = besides + max(slices)
                seen.firsts.append((arrived, waited + first))
                if control is not None:
                    control.observe_answer(free + first / 1e3, past, 24, first, None, waited)
                free, spent = free + first / 1e3, first
        return seen
