"""Keeps a stream within a latency target: takes the setting that is worth most of those whose 99th percentile fits.

| what               | comes from                                                                                   |
|--------------------|----------------------------------------------------------------------------------------------|
| the next frames    | the stream's own planner, which goes on as a copy under the setting (`forecast.py`)          |
| what they take     | the cost model of this machine, by a line fitted to what was seen of late (`pace.py`)        |
| what comes on top  | the noise around that line: `NOISY` of it                                                    |
| the rest           | deadlines: each that is missed takes from the limits that predictions are held against, each |
|                    | that is kept gives to them, so that `ALLOWED` are missed in the long run                     |

A setting is how much is asked of the machine; `ranking.py` puts them in order, by what each is worth and what it asks
for here. One that no longer fits is left at once for the first in this order that does, or that comes close to the
least that can be reached: nothing is given up for nothing. A better one is taken when it would fit `MARGIN` of the
limits, and nothing has changed for `HOLD_S` seconds; every rise that had to be taken back of late makes that time
`BACK_OFF` times as long, so that a machine at the border does not swing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from penguin_edge.bundle.contract import Bounds
from penguin_edge.errors import BudgetError
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.core.report import Work
from penguin_edge.runtime.latency.cost import CostModel
from penguin_edge.runtime.latency.forecast import FRAMES, Forecast, Setting, price
from penguin_edge.runtime.latency.pace import NOISE, Pace, Seen
from penguin_edge.runtime.latency.ranking import efficient, spaced
from penguin_edge.schema import Maybe, Real

ALLOWED = 0.01
"""Share of deadlines that may be missed."""
NOISY = 0.95
"""Share of the noise that is reckoned with; rarer accidents are too few to be foreseen, and are left to what is missed.
"""
GAIN, LEEWAY = 0.05, (0.5, 1.25)
"""How much of a limit a missed deadline takes away, and how little and how much may be left. With a gain of `GAIN *
ALLOWED` for each that was kept, the share of those missed tends to `ALLOWED` whatever the predictions are worth
(adaptive conformal inference: Gibbs and Candès, 2021, arXiv 2106.00170)."""
MARGIN = 0.85
"""Share of the limits that a larger setting has to fit."""
HOLD_S, BACK_OFF, RECENT_S = 3.0, 4, 120.0
"""Seconds without a change before a rise, their growth with each rise that was taken back, and for how long that
counts."""
FIRST_FRAMES = 8
"""Frames that are foretold for each setting when they are put in order, which has to be quick."""
LOOK_S = 1.0
"""Seconds between forecasts while nothing is new."""
BUSY = 0.9
"""Share of the time that frames and answers may take; beyond, frames would wait for frames."""
WAIT = 0.5
"""Share of a frame's limit that answers may take of it. How long they are is not the controller's: what they leave too
little for, no setting makes good."""
REACHED = 1.1
"""Where nothing fits: what comes this close to the least that can be reached will do."""
MUCH = 1.5
"""By how much frames get slower or faster for answers, which are rarer, to be taken to follow before they show it."""
QUEUED, NO_WAIT = 9, (0.0, 0.0)
"""Waits for other frames that are remembered, and those assumed after a change; the middle one counts."""
KEPT = 1000
"""Decisions, and times as predicted and as taken, that are remembered."""


@dataclass(frozen=True)
class LatencyTarget:
    """Milliseconds from a question to its first token, and from a frame's arrival to its being ready; tokens per second
    of an answer, at least. None: no such limit."""

    first_token_ms: float
    frame_ms: float | None = None
    tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        check_options(
            first_token_ms=(self.first_token_ms, Real(above=0)),
            frame_ms=(self.frame_ms, Maybe(Real(above=0))),
            tokens_per_s=(self.tokens_per_s, Maybe(Real(above=0))),
        )

    def __str__(self) -> str:
        parts = [f"a first token within {self.first_token_ms:g} ms"]
        parts += [f"frames within {self.frame_ms:g} ms"] if self.frame_ms else []
        parts += [f"{self.tokens_per_s:g} tokens per second"] if self.tokens_per_s else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Costs:
    """Milliseconds, each at its 99th percentile: a frame, a question's first token, one more token; the share of the
    time that frames take, and answers; and the window's visual tokens."""

    frame: float
    first: float
    token: float
    busy: float
    tokens: float


@dataclass(frozen=True)
class Asked:
    """Milliseconds that a setting asks for by the cost model, uncorrected: a frame and a slice of it, each at its 99th
    percentile; a frame's mean; a question; one more token. And the window's visual tokens."""

    frame: float
    slice: float
    mean: float
    question: float
    token: float
    tokens: float


@dataclass(frozen=True)
class Decision:
    """One change of setting, `time` seconds after the beginning by the clock; milliseconds of what was to take longer,
    a frame or a first token, and of what was seen last, None before anything was."""

    time: float
    before: Setting
    after: Setting
    predicted_ms: float
    observed_ms: float | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "from": asdict(self.before),
            "to": asdict(self.after),
            "predicted": self.predicted_ms,
            "observed": self.observed_ms,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Device:
    """What predictions need to know beside the cost model; `interval_ms` is between frames that come."""

    bounds: Bounds
    merge: int
    question_tokens: int
    interval_ms: float = math.inf


class LatencyControl:
    """Chooses a setting; see the top of this file. Times are seconds of any clock that does not go back."""

    def __init__(
        self,
        target: LatencyTarget,
        cost: CostModel,
        device: Device,
        choices: Sequence[Setting],
        worth: Callable[[Setting], float],
        foresee: Callable[[Sequence[Setting], int], list[Forecast]],
        decided: Callable[[Decision], None] = lambda decision: None,
    ) -> None:
        """
        Args:
            choices: all settings that may be taken.
            worth: what a setting is worth.
            foresee: what the next frames, so many, will make the engine do under each setting.
            decided: is told every decision.
        Raises:
            BudgetError: even the least setting is predicted to miss the target; the message says what it reaches.
        """
        self.target, self.cost, self.device = target, cost, device
        self.decisions: deque[Decision] = deque(maxlen=KEPT)
        self.frames_seen: deque[Seen] = deque(maxlen=KEPT)
        self.questions_seen: deque[Seen] = deque(maxlen=KEPT)
        self._foresee, self._decided = foresee, decided
        self._frame = Pace(cost.wake_ms)
        self._first = Pace(cost.wake_ms, self._frame)
        self._token = Pace()
        self._leeway = 1.0
        self._held_up: deque[float] = deque(maxlen=NOISE)
        self._wait = 0.0
        self._late = False
        """The last frame was."""
        self._queued: deque[float] = deque(NO_WAIT, maxlen=QUEUED)
        self._answering = 0.0
        self._observed: float | None = None
        self._changed, self._looked, self._rose = 0.0, -math.inf, -math.inf
        self._taken_back: deque[float] = deque(maxlen=3)
        self.choose(device, choices, worth)
        least = self.predicted(self.order()[-1][1])
        if not self._fits(least, busy=math.inf):  # too many frames are left out
            raise BudgetError(
                f"{target} cannot be kept here: with the least of everything this machine is predicted to need "
                f"{least.first:.0f} ms to a first token, {least.frame:.0f} ms for a frame and to give "
                f"{1e3 / max(least.token, 1e-3):.1f} tokens per second; choose another target, or a smaller model"
            )

    def choose(self, device: Device, choices: Sequence[Setting], worth: Callable[[Setting], float]) -> None:
        """Begin with a setting for what comes: frames of one size from now on."""
        self.device, self._worth = device, worth
        self._most = max(map(worth, choices))
        found = self._foresee(choices, FIRST_FRAMES)
        self._asked = {one: self._asks(forecast) for one, forecast in zip(choices, found, strict=True)}
        self.setting = self._best(1.0)

    def order(self) -> list[tuple[float, Setting]]:
        """Settings in the order in which they give way, as things are now, each with what it asks for."""

        def load(setting: Setting) -> float:
            return self._load(self._costs(setting, self._asked[setting]))

        return efficient(self._asked, load, self._worth)

    @property
    def slower(self) -> float:
        """Time that work takes over the time that the cost model says, beside what is added whatever the work."""
        return self._frame.factor

    def work_ms(self, work: Work) -> float:
        """What one frame takes by the cost model, uncorrected."""
        return sum(price(self.cost, work, self.device.bounds, self.device.merge))

    def predicted(self, setting: Setting) -> Costs:
        """What a setting is to take here, as far as is known by now."""
        return self._costs(setting, self._asks(self._foresee([setting], FRAMES)[0]))

    def _asks(self, found: Forecast) -> Asked:
        priced = [price(self.cost, work, self.device.bounds, self.device.merge) for work in found.works]
        frame, longest = np.quantile([(sum(one), max(one)) for one in priced], 1 - ALLOWED, axis=0)
        question = self.cost.prefill_ms(self.device.question_tokens, found.past, self.device.bounds)
        mean, token = sum(map(sum, priced)) / len(priced), self.cost.stage_ms("decode", found.past)
        return Asked(float(frame), float(longest), mean, question, token, found.tokens)

    def _costs(self, setting: Setting, asked: Asked) -> Costs:
        """What was asked for, as it is here."""
        noise = self._frame.beyond(asked.mean, NOISY)
        wait = self._wait + median(self._queued) / setting.stride
        busy = self._frame.expect(asked.mean) / (self.device.interval_ms * setting.stride) + self._answering
        # A question waits for a slice of the frame in work; a frame for answers, and for frames.
        first = self._frame.expect(asked.slice) + noise + self._first.at_most(asked.question, NOISY)
        frame = self._frame.expect(asked.frame) + noise + wait
        return Costs(frame, first, self._token.at_most(asked.token, 0.5), busy, asked.tokens)

    def observe_frame(
        self, now: float, work: Work, took_ms: float, held_up_ms: float = 0.0, queued_ms: float = 0.0
    ) -> Seen:
        """What a frame took, from its turn to the end of its prefill, and how long it had waited for its turn, for
        answers and for other frames."""
        seen = self._frame.observe(now, self.work_ms(work), took_ms)
        self.frames_seen.append(seen)
        if (ratio := self._frame.changed) is not None:
            self._looked = -math.inf
            if not 1 / MUCH < ratio < MUCH:
                for pace in (self._first, self._token):
                    pace.scale(ratio)
        self._observed = took_ms
        self._held_up.append(held_up_ms)
        if self.target.frame_ms is not None:
            self._wait = min(float(np.quantile(self._held_up, NOISY)), WAIT * self.target.frame_ms)
        self._queued.append(max(0.0, queued_ms) * self.setting.stride)
        if self.target.frame_ms is not None:
            late = took_ms + held_up_ms + queued_ms > self.target.frame_ms
            # Frames that come in while one is late are late by the same accident.
            if not (late and self._late and took_ms + held_up_ms <= self.target.frame_ms):
                self._judge(late)
            self._late = late
        return seen

    def observe_answer(
        self,
        now: float,
        past: int,
        tokens: int,
        first_ms: float,
        token_ms: float | None = None,
        waited_ms: float = 0.0,
    ) -> Seen:
        """What a question of so many tokens took to its first one, after `past` positions, once the worker was free;
        one more token of its answer; and how long the question had waited for the worker."""
        # Questions are much alike: how slow the machine is, frames have shown.
        asked = self.cost.prefill_ms(tokens, past, self.device.bounds)
        seen = self._first.observe(now, asked, first_ms, self._frame.factor)
        self.questions_seen.append(seen)
        self._observed = first_ms
        if token_ms is not None:
            self._token.observe(now, self.cost.stage_ms("decode", past), token_ms)
        self._judge(waited_ms + first_ms > self.target.first_token_ms)
        return seen

    def observe_share(self, answering: float) -> None:
        """The share of the time that answers take."""
        self._answering = min(max(answering, 0.0), WAIT)

    def miss(self) -> None:
        """A frame was given up that would not have been ready in time."""
        if not self._late:
            self._judge(True)
        self._late = True

    def _judge(self, late: bool) -> None:
        """One deadline."""
        self._leeway += GAIN * (ALLOWED - late)
        self._leeway = min(max(self._leeway, LEEWAY[0]), LEEWAY[1])
        if late:
            self._looked = -math.inf

    def decide(self, now: float) -> Decision | None:
        """The next setting, if it is another one; `decided` is told, too."""
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        before, wanted, reason = self.setting, self.setting, ""
        rested = now - self._changed >= self._hold(now)
        if not self._fits(held := self.predicted(before)):
            wanted = self._best(1.0, held)
            if self._worth(wanted) < self._worth(before):
                reason = "slower than the target allows"
                if now - self._rose < RECENT_S:
                    self._taken_back.append(now)
                self._rose = -math.inf
            elif wanted != before and rested:
                reason, self._rose = "less would not help", now
        elif rested and self._worth(before) < self._most:
            wanted = self._best(MARGIN)
            if self._worth(wanted) > self._worth(before):
                reason, self._rose = "room to spare", now
        if not reason:
            return None
        self.setting = wanted
        # The change itself takes its time, and one frame that waits for it is no reason for another.
        self._queued.clear()
        self._queued.extend(NO_WAIT)
        return self.tell(now, before, reason)

    def tell(self, now: float, before: Setting, reason: str) -> Decision:
        """Write down that this setting takes the place of another one; `decided` is told."""
        self._changed = now
        found = self.predicted(self.setting)
        decision = Decision(now, before, self.setting, max(found.frame, found.first), self._observed, reason)
        self.decisions.append(decision)
        self._decided(decision)
        return decision

    def _hold(self, now: float) -> float:
        return HOLD_S * BACK_OFF ** sum(now - at < RECENT_S for at in self._taken_back)

    def _load(self, costs: Costs) -> float:
        """The share of what a target and the time allow that is asked for, by what comes closest to it."""
        target = self.target
        return max(
            costs.first / target.first_token_ms,
            costs.frame / target.frame_ms if target.frame_ms is not None else 0.0,
            1e-3 * costs.token * (target.tokens_per_s or 0.0),
            costs.busy / BUSY,
        )

    def _fits(self, costs: Costs, share: float = 1.0, busy: float = BUSY) -> bool:
        target, limit = self.target, share * self._leeway
        return (
            costs.first <= limit * target.first_token_ms
            and costs.busy <= share * busy
            and (target.frame_ms is None or costs.frame <= limit * target.frame_ms)
            and (target.tokens_per_s is None or costs.token * target.tokens_per_s <= 1e3 * share)
        )

    def _best(self, share: float, held: Costs | None = None) -> Setting:
        """The first setting in order that fits a share of the limits, taking it that later ones ask for less. Where not
        even the last one does: the present one for less than all of the limits, else the first that comes close to what
        the last one reaches; but none of less worth while what the present one costs, `held`, is about as much."""
        front = self.order()
        least = self.predicted(front[-1][1])
        if self._fits(least, share):
            # One after the other: predictions do not fall evenly along the order, and there are few of these.
            return next((one for one in spaced(front) if self._fits(self.predicted(one), share)), front[-1][1])
        if share < 1:
            return self.setting

        def close(costs: Costs, reached: float = REACHED) -> bool:
            return (
                costs.frame <= reached * least.frame
                and costs.first <= reached * least.first
                and costs.busy <= max(BUSY, reached * least.busy)
            )

        found = self._first_of([one for _, one in front], close)
        stays = held is not None and close(held, REACHED / MARGIN) and self._worth(found) < self._worth(self.setting)
        return self.setting if stays else found

    def _first_of(self, choices: list[Setting], will_do: Callable[[Costs], bool]) -> Setting:
        low, high = 0, len(choices) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if will_do(self.predicted(choices[middle])) else (middle + 1, high)
        return choices[low]
