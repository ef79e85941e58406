"""Between a stream and its latency controller: observations go one way, settings the other. The worker's alone."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from penguin_edge.errors import BudgetError
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.core.options import FOLLOWS, SHRINKS, Follow, Shrink
from penguin_edge.runtime.core.report import Report
from penguin_edge.runtime.latency.control import Decision, Device, LatencyControl, LatencyTarget
from penguin_edge.runtime.latency.cost import CostModel
from penguin_edge.runtime.latency.forecast import FILLING, FRAMES, Around, Arrivals, Forecast, Setting, forecast
from penguin_edge.runtime.latency.ranking import Full, candidates, worth
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.clip import INTERMEDIATE, KEY, size_ladder

LONGEST_MS = 10_000.0
"""Longest pause between frames that does not count as the end of the stream, unless the next one is as long; also the
time over which answers are counted."""
USUAL = (KEY, INTERMEDIATE, INTERMEDIATE, INTERMEDIATE)
"""How frames are taken to be labelled until twice as many have been."""


def sizes(stream: Stream, size: tuple[int, int], budget: int) -> tuple[int, int, int]:
    """Most and least tokens of a frame of (height, width) pixels, and of the window under a budget."""
    planner, room = stream.planner, stream.planner.limits.room
    ladder = [rows * columns for rows, columns in size_ladder(*size, planner.factor)]
    floor = next(tokens for tokens in ladder if tokens >= min(planner.least_tokens, ladder[-1]))
    largest = stream.engine.bounds.max_patches // stream.config.image.video_merge_size**2
    return min(ladder[-1], largest), floor, min(budget, room or budget)


def ways(stream: Stream) -> tuple[Sequence[Follow], Sequence[Shrink]]:
    """How the KV cache and frames that get smaller may follow."""
    options = stream.options
    movable = FOLLOWS if stream.engine.can_move and stream.engine.moves_exactly else FOLLOWS[:1]
    caches = movable if options.cache == "auto" else (options.cache,)
    # A mean over tokens of which some are left out would be one of others.
    shrinks = SHRINKS if options.keep_visual is None else SHRINKS[:1]
    return caches, shrinks if options.shrink == "auto" else (options.shrink,)


def around(stream: Stream) -> Around:
    """What else the work of a stream's frames depends on."""
    frames = stream.visual_tokens + len(stream.times) * stream.planner.tag_tokens
    return Around(
        max(0, stream.cache.length - frames) if stream.times else 0,
        stream.engine.bounds.max_batch,
        stream.config.image.video_merge_size,
    )


class Steering:
    """Keeps a stream at the controller's setting."""

    def __init__(
        self,
        stream: Stream,
        target: LatencyTarget,
        cost: CostModel,
        decided: Callable[[Decision], None],
        rate: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            decided: is told every decision.
            rate: frames per second that are to come, until they have shown it themselves.
            size: pixels of these frames, (height, width), where that is known.
        """
        self.control: LatencyControl | None = None
        self.stride = 1
        """One of so many frames that come is taken."""
        self._stream, self._target, self._cost, self._decided = stream, target, cost, decided
        self._budget = stream.planner.limits.budget
        self._kinds: deque[str] = deque(maxlen=FRAMES)
        self._expected = size
        self._size: tuple[int, int] | None = None
        self._given_up = False
        self._begun = 0
        self._took_ms = 0.0
        self._apart_ms, self._last = 1e3 / rate if rate else math.inf, math.nan
        self._pause_ms = math.nan
        self._spoken: deque[tuple[int, int, float]] = deque(maxlen=16)
        """When answers began and ended, nanoseconds, and how slow the engine was then."""

    def begin(self) -> None:
        """Warm the engine up, choose for the frames that are expected; the clock of decisions begins."""
        self._stream.warm_up(self._expected)
        self._begun = time.monotonic_ns()
        if self._expected is not None:
            try:
                self._choose(self._expected)
            except BudgetError:  # the first frame says it
                self._given_up = False

    def offered(self, at: float | None) -> None:
        """A frame of `at` seconds has come, taken or not; from the thread that pushes."""
        apart = (at - self._last) * 1e3 if at is not None else math.nan
        if 0 < apart < LONGEST_MS or 0.8 * self._pause_ms < apart < 1.25 * self._pause_ms:
            self._apart_ms = apart if math.isinf(self._apart_ms) else 0.8 * self._apart_ms + 0.2 * apart
        elif apart >= LONGEST_MS:
            self._pause_ms = apart
        self._last = at if at is not None else math.nan

    def late(self, arrived: int) -> bool:
        """Whether a frame that has waited since then would not be ready in time any more."""
        limit = self._target.frame_ms
        if self.control is None or limit is None:  # also where the target was given up
            return False
        return (time.monotonic_ns() - arrived) / 1e6 + self._took_ms > limit

    def missed(self) -> None:
        """A frame was given up because it would have been late."""
        if self.control is not None:
            self.control.miss()

    def before(self, frame: Frame) -> None:
        """Choose for a frame of another size than the last.

        Raises:
            BudgetError: the target cannot be kept; said once, and the stream goes on as if without one.
        """
        size = frame.pixels.shape[:2]
        if not self._given_up and size != self._size and frame.pixels.ndim == 3 and min(size):
            self._choose(size)

    def _choose(self, size: tuple[int, int]) -> None:
        """Choose for frames of (height, width) pixels."""
        near, before, self._size = self._device(), self._size, size
        native, floor, budget = sizes(self._stream, size, self._budget)
        keep = self._stream.options.keep_visual or 1.0
        found = candidates(native, floor, budget, *ways(self._stream), keep)
        value = partial(worth, full=Full(native, budget, keep * native * self._frames_kept()))
        asked, reason = found[0], "predicted to be slower than the target allows"
        if self.control is None:
            try:
                self.control = LatencyControl(
                    self._target, self._cost, near, found, value, self._foresee, self._decided
                )
            except BudgetError:
                self._given_up, self._size = True, before
                raise
        else:
            asked, reason = self.control.setting, "frames of another size"
            self.control.choose(near, found, value)
        self._apply(self.control.setting)
        if self.control.setting != asked:
            self.control.tell(self._now(), asked, reason)

    def frame(self, arrived: int, begun: int, ended: int, paused: int) -> None:
        """A frame is ready: tell the controller what it took, and do what that decides.

        Args:
            arrived, begun, ended: when, in nanoseconds.
            paused: nanoseconds of answers between its slices.
        """
        control, work = self.control, self._stream.last_work
        if control is None or work is None:
            return
        if len(self._stream.window) > 1:  # the first one is a key frame whatever it shows
            self._kinds.append(self._stream.window[-1].kind)
        control.device = self._device()
        held_up = sum(max(0, min(begun, end) - max(arrived, begin)) for begin, end, _ in self._spoken) / 1e6
        took = (ended - begun - paused) / 1e6
        self._took_ms = min(took, 2 * self._took_ms) if self._took_ms else took
        since = max(self._begun, ended - int(1e6 * LONGEST_MS))
        # Those of before count as long as they would take now.
        spoken = sum(max(0, end - max(begin, since)) / slower for begin, end, slower in self._spoken)
        spoken_share = spoken / max(1, ended - since)
        queued = (begun - arrived) / 1e6 - held_up
        control.observe_frame(self._now(), work, took, held_up + paused / 1e6, queued)
        control.observe_share(control.slower * spoken_share)
        asked = control.setting
        control.decide(self._now())
        if control.setting != asked:
            self._apply(control.setting)

    def answer(self, asked: int, begun: int, past: int, report: Report) -> None:
        """An answer has ended that was asked for and begun then (nanoseconds), after `past` positions."""
        self._spoken.append((begun, time.monotonic_ns(), self.control.slower if self.control is not None else 1.0))
        if self.control is not None and report.first_token_ms is not None:
            each = 1e3 / report.tokens_per_s if report.tokens_per_s else None
            tokens = max(1, report.prompt_tokens - report.reused_tokens)
            waited = (begun - asked) / 1e6
            self.control.observe_answer(self._now(), past, tokens, report.first_token_ms, each, waited)

    def _foresee(self, settings: Sequence[Setting], frames: int) -> list[Forecast]:
        assert self._size is not None
        kinds = tuple(self._kinds) if len(self._kinds) >= 2 * len(USUAL) else USUAL
        apart = 1.0 if math.isinf(self._apart_ms) else self._apart_ms / 1e3
        arrivals = Arrivals(self._size, apart, kinds)
        near = around(self._stream)
        return forecast(self._stream.planner, settings, arrivals, near, frames=frames, filling=min(FILLING, 6 * frames))

    def _frames_kept(self) -> float:
        """How many frames the window has when it is full and nothing is given up."""
        limits = self._stream.planner.limits
        return max(1.0, min(limits.max_frames, limits.window_s / (1e-3 * self._apart_ms)))

    def _now(self) -> float:
        return (time.monotonic_ns() - self._begun) / 1e9

    def _device(self) -> Device:
        """The rate by time stamps of all frames that come: those that are left out count, too."""
        bounds, merge = self._stream.engine.bounds, self._stream.config.image.video_merge_size
        return Device(bounds, merge, self._stream.options.question_tokens, self._apart_ms)

    def _apply(self, setting: Setting) -> None:
        self.stride = setting.stride
        self._stream.frame_tokens = setting.frame_tokens
        self._stream.follow, self._stream.shrink = setting.cache, setting.shrink
        if setting.budget != self._stream.planner.limits.budget:
            self._stream.set_budget(setting.budget)
