"""Keeps a stream within a latency target: predicts what a setting costs, corrects by what is observed, and decides.

A setting is how much is asked of the machine. They are tried in this order, and left in the other:

1. key frames get smaller: at most half of native, a quarter, … down to the floor;
2. the budget of visual tokens halves, down to a few floors;
3. frames are left out: every second is taken, every fourth, every eighth.

A setting fits when the costliest frame and the first token of a question, as predicted and corrected, are within the
target, and usual frames do not come faster than they can be worked on. One that no longer fits is left at once, for the
first that does, or that comes close to the least that can be reached: nothing is given up for nothing. A better one is
taken one step at a time, when it would fit `MARGIN` of the target on the machine at its slowest of late, and nothing
has changed for `HOLD_S` seconds; a rise that had to be taken back makes that time `BACK_OFF` times as long, so that a
machine at the border does not swing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from penguin_edge.bundle.contract import Bounds
from penguin_edge.errors import BudgetError
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.core.report import Work
from penguin_edge.runtime.live.cost import CostModel
from penguin_edge.schema import Maybe, Real
from penguin_edge.tra.stream import LOW, STEP

MARGIN = 0.8
HOLD_S, LONGEST_S, BACK_OFF = 3.0, 120.0, 4
EASING, ALARM = 0.25, 0.5
"""Weight of what was observed when it is faster than the correction says, and when it is slower."""
TELLING, LEAST = 0.25, 0.1
"""Share of the costliest frame's work from which on a frame's own counts in full, and what it counts at least: what is
small tells little of it."""
SPIKE, LONG_MS = 5, 200.0
"""The middle one of so many observations counts: one alone is an accident of the machine. Of work that takes longer
than this, three: it is less of an accident, and there is less time."""
BUSY = 0.9
"""Share of the time that frames and answers may take; beyond, frames would wait for frames."""
REACHED = 1.1
"""Where nothing fits: what comes this close to the least that can be reached will do."""
FADING, WAIT = 0.95, 0.5
"""Share of the longest wait for an answer that is left a frame later, and of a frame's limit that it may take."""
RECALL = 0.985
"""Share of the slowest correction that is left a frame later."""
NEARING = 0.05
"""Share by which the corrections of answers follow that of frames, with every frame: questions may be rare."""
KEPT = 1000
"""Decisions that are remembered."""


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
class Setting:
    """Visual tokens of the window, most tokens of one frame, and how many frames make one that is taken."""

    budget: int
    frame_tokens: int
    stride: int = 1


@dataclass(frozen=True)
class Costs:
    """Milliseconds: the costliest frame, a question's first token, one more token; and the share of the time that usual
    frames take, and answers."""

    frame: float
    first: float
    token: float
    busy: float = 0.0


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
    """What predictions need to know beside the cost model. `tokens` are visual ones, `pixels` those of a frame."""

    bounds: Bounds
    merge: int
    tag_tokens: int
    question_tokens: int
    recompute: bool
    """Whether a frame that changes makes all behind it be computed again."""
    pixels: int
    floor_tokens: int
    """The least that a kept frame takes."""
    frames: int
    """Frames that the window will hold if all are taken."""
    interval_ms: float = math.inf
    """Between frames that come."""


def settings(native: int, floor: int, budget: int) -> list[Setting]:
    """All settings, in order; `native` and `floor` are tokens of one frame."""
    frame, found = min(native, budget), [Setting(budget, min(native, budget))]
    while frame > floor:
        # Near the floor a frame that steps down frees so little that many have to.
        frame = frame // 2 if frame >= 8 * floor else floor
        found.append(Setting(budget, frame))
    while budget > 4 * floor:
        budget = max(4 * floor, budget // 2)
        found.append(Setting(budget, min(frame, budget)))
    return found + [Setting(found[-1].budget, found[-1].frame_tokens, stride) for stride in (2, 4, 8)]


class LatencyControl:
    """Chooses a setting; see the top of this file. Times are seconds of any clock that does not go back."""

    def __init__(
        self,
        target: LatencyTarget,
        cost: CostModel,
        device: Device,
        choices: list[Setting],
        decided: Callable[[Decision], None] = lambda decision: None,
    ) -> None:
        """
        Args:
            decided: is told every decision.
        Raises:
            BudgetError: even the last setting is predicted to miss the target; the message says what it reaches.
        """
        self.target, self.cost, self.device, self.choices = target, cost, device, choices
        self.decisions: deque[Decision] = deque(maxlen=KEPT)
        self._decided = decided
        self._slower = {"frame": 1.0, "first": 1.0, "token": 1.0}
        self._slowest = dict(self._slower)
        # Begun with two that are as predicted: the very first one alone is an accident, too.
        self._ratios = {name: deque([1.0, 1.0], maxlen=SPIKE) for name in self._slower}
        self._overheads: deque[float] = deque(maxlen=SPIKE)
        self._queued = deque([0.0, 0.0], maxlen=SPIKE)  # As if all frames had been taken.
        self._observed: float | None = None
        self._held_up = self._answering = 0.0
        self._changed, self._hold, self._rose, self.index = 0.0, HOLD_S, False, 0
        least = self.predicted(choices[-1])
        if not self._within(replace(least, busy=0.0), 1.0):  # Too many frames are left out.
            raise BudgetError(
                f"{target} cannot be kept here: with the least of everything this machine is predicted to need "
                f"{least.first:.0f} ms to a first token, {least.frame:.0f} ms for a frame and to give "
                f"{1e3 / max(least.token, 1e-3):.1f} tokens per second; choose another target, or a smaller model"
            )
        self.index = self._first()

    def see(self, device: Device, choices: list[Setting]) -> None:
        """Frames of another size from now on."""
        self.index = 0  # Another thread may look.
        self.device, self.choices = device, choices
        self.index = self._first()

    @property
    def setting(self) -> Setting:
        return self.choices[self.index]

    @property
    def slower(self) -> float:
        """Measured time of recent frames over the predicted time; 1 is as predicted, 2 twice as slow."""
        return self._slower["frame"]

    def engine_ms(self, work: Work) -> float:
        """What one frame makes the engine do is predicted to take, uncorrected."""
        cost, merged = self.cost, self.device.merge**2
        spent = cost.wake_ms
        for frames, patches in work.encoded:
            spent += cost.stage_ms("encode", patches, frames) + cost.stage_ms("project", frames * patches // merged)
        if work.prefilled:
            each = -(-work.prefilled // work.pieces)
            spent += work.pieces * cost.prefill_ms(each, work.past, self.device.bounds)
        if work.moved and "move" in cost.tables:  # A cache of a few positions is profiled without.
            spent += cost.stage_ms("move", work.moved)
        return spent

    def overhead_ms(self, work: Work) -> float:
        """What a frame takes beside: label, resize, patches, and finding out what to do. As observed; of fewer than
        three, what the model says counts beside."""
        guess = self.cost.stage_ms("preprocess", work.pixels, work.encoded[-1][1] if work.encoded else 0)
        return median([*self._overheads, *[guess] * (3 - len(self._overheads))])

    def _question_ms(self, tokens: int, past: int) -> float:
        return self.cost.wake_ms + self.cost.prefill_ms(tokens, past, self.device.bounds)

    def window(self, setting: Setting) -> int:
        """Positions that the window will take when it is full."""
        device = self.device
        frames = max(1, min(device.frames // setting.stride, setting.budget // device.floor_tokens))
        room = device.bounds.max_seq_len - device.question_tokens - setting.frame_tokens - device.tag_tokens
        return max(0, min(room, setting.budget + frames * device.tag_tokens))

    def costliest(self, setting: Setting) -> Work:
        """Work for a frame that makes older ones step down.

        What they free is tokens: they are encoded again at a quarter of the area, or go when they are at the floor.
        """
        device, window = self.device, self.window(setting)
        piece = max(device.floor_tokens, setting.frame_tokens // STEP)
        again = 0
        if setting.frame_tokens > device.floor_tokens:
            again = max(1, round((1 - LOW) * setting.budget / (setting.frame_tokens - piece)))
        most, merged = device.bounds.max_batch, device.merge**2
        encoded = [(min(again - i, most), piece * merged) for i in range(0, again, most)]
        encoded.append((1, setting.frame_tokens * merged))
        new = setting.frame_tokens + device.tag_tokens
        if device.recompute:
            return Work(device.pixels, tuple(encoded), int(LOW * window) + new, 0)
        changed = again * (piece + device.tag_tokens)
        return Work(device.pixels, tuple(encoded), changed + new, window, again + 1, window)

    def predicted(self, setting: Setting, corrected: bool = False, slowest: bool = False) -> Costs:
        """What the model says, or that corrected by what was observed, of late or at its slowest."""
        work, window = self.costliest(setting), self.window(setting)
        slower = (self._slowest if slowest else self._slower) if corrected else dict.fromkeys(self._slower, 1.0)
        frame = slower["frame"] * self.engine_ms(work) + self.overhead_ms(work)
        question = slower["first"] * self._question_ms(self.device.question_tokens, window)
        token = slower["token"] * self.cost.stage_ms("decode", window)
        wait, limit = 0.0, self.target.frame_ms
        if corrected and limit:
            # How long answers take is not the controller's: what they leave too little for, no setting makes good.
            wait = min(self._held_up, WAIT * limit) + (median(self._queued) if self._queued else 0.0) / setting.stride
        usual = Work(self.device.pixels, work.encoded[-1:], setting.frame_tokens + self.device.tag_tokens, window)
        each = slower["frame"] * self.engine_ms(usual) + self.overhead_ms(usual)
        busy = each / (self.device.interval_ms * setting.stride) + (self._answering if corrected else 0.0)
        # A question waits for the frame in work; a frame for answers, and for frames.
        return Costs(frame + wait, frame + question + token, token, busy)

    def observe_frame(
        self, work: Work, took_ms: float, engine_ms: float, held_up_ms: float = 0.0, queued_ms: float = 0.0
    ) -> None:
        """What a frame took, from its turn to the end of its prefill, the engine's part of that, and how long it had
        waited for its turn, for answers and for other frames."""
        predicted, costliest = self.engine_ms(work), self.engine_ms(self.costliest(self.setting))
        self._observe("frame", engine_ms, predicted, min(1.0, max(LEAST, predicted / max(TELLING * costliest, 1e-3))))
        self._observed = took_ms
        self._overheads.append(max(0.0, took_ms - engine_ms))
        self._held_up = max(held_up_ms, FADING * self._held_up)
        self._queued.append(max(0.0, queued_ms) * self.setting.stride)
        for name in ("first", "token"):
            self._slower[name] += NEARING * (self._slower["frame"] - self._slower[name])
        for name, known in self._slower.items():
            self._slowest[name] = max(known, RECALL**self.setting.stride * self._slowest[name])

    def observe_answer(self, past: int, tokens: int, first_ms: float, token_ms: float | None = None) -> None:
        """What a question of so many tokens took to its first one, after `past` positions, once the worker was free,
        and one more token of its answer."""
        self._observe("first", first_ms, self._question_ms(tokens, past))
        self._observed = first_ms
        if token_ms is not None:
            self._observe("token", token_ms, self.cost.stage_ms("decode", past))

    def observe_share(self, answering: float) -> None:
        """The share of the time that answers take."""
        self._answering = min(max(answering, 0.0), WAIT)

    def _observe(self, what: str, took: float, predicted: float, weight: float = 1.0) -> None:
        self._ratios[what].append(min(max(took / max(predicted, 1e-3), 0.1), 100.0))
        latest = list(self._ratios[what])[-3 if predicted >= LONG_MS else 0 :]
        ratio, known = median(latest), self._slower[what]
        self._slower[what] = known + weight * (EASING if ratio < known else ALARM) * (ratio - known)

    def decide(self, now: float) -> Decision | None:
        """The next setting, if it is another one; `decided` is told, too."""
        wanted, reason = self._first(), ""
        if wanted > self.index:
            reason = "slower than the target allows"
            if self._rose and now - self._changed < 2 * LONGEST_S:
                self._hold = min(BACK_OFF * self._hold, LONGEST_S)
            self._rose = False
        elif self.index and now - self._changed >= self._hold:
            better = self.index - 1
            if self._within(self.predicted(self.choices[better], corrected=True, slowest=True), MARGIN):
                wanted, reason = better, "room to spare"
                if now - self._changed >= 2 * LONGEST_S:
                    self._hold = HOLD_S
                self._rose = True
            elif wanted < self.index and not self._within(self.predicted(self.choices[-1], corrected=True), 1.0):
                reason = "less would not help"
        if not reason:
            return None
        before, self.index = self.setting, wanted
        self._queued.clear()
        return self.tell(now, before, reason)

    def tell(self, now: float, before: Setting, reason: str) -> Decision:
        """Write down that this setting takes the place of another one; `decided` is told."""
        self._changed = now
        found = self.predicted(self.setting, corrected=True)
        decision = Decision(now, before, self.setting, max(found.frame, found.first), self._observed, reason)
        self.decisions.append(decision)
        self._decided(decision)
        return decision

    def _within(self, costs: Costs, share: float) -> bool:
        target = self.target
        return (
            costs.first <= share * target.first_token_ms
            and costs.busy <= share * BUSY
            and (target.frame_ms is None or costs.frame <= share * target.frame_ms)
            and (target.tokens_per_s is None or costs.token * target.tokens_per_s <= 1e3 * share)
        )

    def _first(self) -> int:
        """The first setting that fits; where none does, the first that comes close to what the last one reaches."""
        costs = [self.predicted(one, corrected=True) for one in self.choices]
        fitting = (i for i, one in enumerate(costs) if self._within(one, 1.0))
        least = costs[-1]
        close = (
            i
            for i, one in enumerate(costs)
            if one.frame <= REACHED * least.frame
            and one.first <= REACHED * least.first
            and one.busy <= max(BUSY, REACHED * least.busy)
        )
        return next(fitting, next(close))
