"""Keeps a stream within a latency target: predicts what a setting costs, corrects by what is observed, and decides.

A setting is how much is asked of the machine. They are tried in this order, and left in the other:

1. key frames get smaller: at most a quarter of native, a sixteenth, … down to the floor;
2. the budget of visual tokens halves, down to a few floors;
3. frames are left out: every second is taken, every fourth, every eighth.

A setting fits when the costliest frame and the first token of a question, as predicted and corrected, are within the
target. One that no longer fits is left at once, for the first that does. A better one is taken one step at a time, when
it would fit `MARGIN` of the target and nothing has changed for `HOLD_S` seconds; a rise that had to be taken back
doubles that time, so that a machine at the border does not swing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from penguin_edge.bundle import Bounds
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.runtime.cost import CostModel
from penguin_edge.stream_plan import LOW, STEP

MARGIN = 0.8
HOLD_S, LONGEST_S = 3.0, 60.0
EASING = 0.25
"""Weight of the newest observation when it is faster than the correction says; a slower one weighs twice that."""
KEPT = 1000
"""Decisions that are remembered."""


@dataclass(frozen=True)
class LatencyTarget:
    """Milliseconds: from a question to its first token, and from a frame's turn to its being ready."""

    first_token_ms: float
    frame_ms: float | None = None

    def __post_init__(self) -> None:
        for value in (self.first_token_ms, self.frame_ms):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"a latency target of {value} ms, wanted more than 0")


@dataclass(frozen=True)
class Setting:
    """Visual tokens of the window, most tokens of one frame, and how many frames make one that is taken."""

    budget: int
    frame_tokens: int
    stride: int = 1


@dataclass(frozen=True)
class Work:
    """What one frame made the engine do: patches of each frame encoded, positions prefilled after `past`."""

    pixels: int
    patches: tuple[int, ...]
    prefilled: int
    past: int


@dataclass(frozen=True)
class Decision:
    """One change of setting, `time` seconds after the beginning, in the stream's own clock."""

    time: float
    before: Setting
    after: Setting
    predicted_ms: float
    observed_ms: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {"from": data.pop("before"), "to": data.pop("after"), **data}


@dataclass(frozen=True)
class Device:
    """What predictions need to know beside the cost model."""

    bounds: Bounds
    merge: int
    tag_tokens: int
    question_tokens: int
    recompute: bool
    """Whether a frame that changes makes all behind it be computed again."""


def settings(native: int, floor: int, budget: int) -> list[Setting]:
    """All settings, in order; `native` and `floor` are tokens of one frame."""
    frame, found = min(native, budget), [Setting(budget, min(native, budget))]
    while frame > floor:
        frame = max(floor, frame // STEP)
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
        trace: Callable[[Decision], None] = lambda decision: None,
    ) -> None:
        """
        Args:
            trace: is told every decision.
        Raises:
            BudgetError: even the last setting is predicted to miss the target; the message says what it reaches.
        """
        self.target, self.cost, self.device, self.choices = target, cost, device, choices
        self.decisions: deque[Decision] = deque(maxlen=KEPT)
        self._trace = trace
        self._slower = {"frame": 1.0, "first": 1.0}
        self._observed = 0.0
        self._changed, self._hold, self._rose = 0.0, HOLD_S, False
        least = self.predicted(choices[-1])
        if not self._within(least, 1.0):
            raise BudgetError(
                f"a first token within {target.first_token_ms:g} ms"
                + (f" and frames within {target.frame_ms:g} ms" if target.frame_ms else "")
                + " cannot be kept here: with the least of everything this machine is predicted to need "
                f"{least[1]:.0f} and {least[0]:.0f} ms; choose another target, or a smaller model"
            )
        self.index = self._first(1.0)

    @property
    def setting(self) -> Setting:
        return self.choices[self.index]

    def work_ms(self, work: Work) -> float:
        """What one frame's work is predicted to take, uncorrected."""
        cost, merged = self.cost, self.device.merge**2
        encoded = sum(cost.stage_ms("encode", p) + cost.stage_ms("project", p // merged) for p in work.patches)
        prefill = cost.prefill_ms(work.prefilled, work.past, self.device.bounds) if work.prefilled else 0.0
        return cost.stage_ms("preprocess", work.pixels) + encoded + prefill

    def predicted(self, setting: Setting) -> tuple[float, float]:
        """The costliest frame and a question's first token, milliseconds, uncorrected."""
        device, merged = self.device, self.device.merge**2
        new = setting.frame_tokens + device.tag_tokens
        # A step down: what it frees was tokens of a size that is encoded again at a quarter.
        shrunk = int((1 - LOW) * setting.budget / (STEP - 1)) * merged
        window = min(device.bounds.max_seq_len - new, 2 * setting.budget)
        prefilled, past = (window + new, 0) if device.recompute else (new, window)
        patches = (setting.frame_tokens * merged, *((shrunk,) if shrunk else ()))
        frame = self.work_ms(Work(setting.frame_tokens * merged * 196, patches, prefilled, past))
        question = self.cost.prefill_ms(device.question_tokens, window, device.bounds)
        # The frame in work is finished first.
        return frame, frame + question + self.cost.stage_ms("decode", window)

    def observe_frame(self, work: Work, took_ms: float) -> None:
        """What a frame took, from its turn to the end of its prefill."""
        self._observe("frame", took_ms, self.work_ms(work))

    def observe_first(self, past: int, took_ms: float) -> None:
        """What a question took to its first token, after `past` positions, once the worker was free."""
        question = self.cost.prefill_ms(self.device.question_tokens, past, self.device.bounds)
        self._observe("first", took_ms, question)

    def _observe(self, what: str, took: float, predicted: float) -> None:
        ratio = min(max(took / max(predicted, 1e-3), 0.1), 100.0)
        known = self._slower[what]
        weight = EASING if ratio < known else 2 * EASING
        self._slower[what] = known + weight * (ratio - known)
        self._observed = took

    def decide(self, now: float) -> Decision | None:
        """The next setting, if it is another one; `trace` is told, too."""
        slower = max(self._slower.values())
        wanted = self._first(slower)
        reason = ""
        if wanted > self.index:
            reason = "slower than the target allows"
            if self._rose and now - self._changed < 2 * self._hold:
                self._hold = min(2 * self._hold, LONGEST_S)
            self._rose = False
        elif self.index and now - self._changed >= self._hold:
            wanted = self.index - 1
            if self._within(self._corrected(self.choices[wanted], slower), MARGIN):
                reason = "room to spare"
                if not self._rose and now - self._changed >= 4 * self._hold:
                    self._hold = HOLD_S
                self._rose = True
        if not reason:
            return None
        before, self.index, self._changed = self.setting, wanted, now
        frame, first = self._corrected(self.setting, slower)
        decision = Decision(now, before, self.setting, max(frame, first), self._observed, reason)
        self.decisions.append(decision)
        self._trace(decision)
        return decision

    def _corrected(self, setting: Setting, slower: float) -> tuple[float, float]:
        frame, first = self.predicted(setting)
        return frame * slower, first * slower

    def _within(self, costs: tuple[float, float], share: float) -> bool:
        frame, first = costs
        fits = first <= share * self.target.first_token_ms
        return fits and (self.target.frame_ms is None or frame <= share * self.target.frame_ms)

    def _first(self, slower: float) -> int:
        """The first setting that fits, else the last."""
        fitting = (i for i, one in enumerate(self.choices) if self._within(self._corrected(one, slower), 1.0))
        return next(fitting, len(self.choices) - 1)
