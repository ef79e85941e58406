"""A clip streamed at wall-clock speed with a question every two seconds, and what came of it.

Times: a frame's age is from its arrival to the end of its prefill; `warm` is a question's time to its first token on
the running stream; `cold` the same in a new stream over the frames that the stream had kept, pixels to first token.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from penguin_edge.errors import InputError
from penguin_edge.machine import resident_mb
from penguin_edge.media.frames import Frame
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.bench.power import Meter
from penguin_edge.runtime.bench.stages import percentiles
from penguin_edge.runtime.bench.timeline import Timeline
from penguin_edge.runtime.core.report import Clock
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.base import F32, I64, Engine
from penguin_edge.runtime.engines.cache import Cache, Key
from penguin_edge.runtime.latency.control import LatencyControl, LatencyTarget
from penguin_edge.runtime.latency.cost import CostModel
from penguin_edge.runtime.latency.pace import Seen
from penguin_edge.runtime.live.events import Observer, Observers
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.live_options import LiveOptions
from penguin_edge.runtime.live.sources import Timed, paced
from penguin_edge.runtime.stream import Stream

QUESTION = "What is happening now?"
SLOPE_S = 600.0
"""Seconds below which memory is not extrapolated to an hour."""
COLD = 3
"""New sessions over the last window."""


@dataclass(frozen=True)
class StreamRun:
    """How long, how often a question is asked (seconds of the stream), and which answers count as too late."""

    duration_s: float
    every_s: float = 2.0
    answer_tokens: int = 16
    target: LatencyTarget | None = None
    cost: CostModel | None = None
    """Cost model of this machine; a target needs it."""
    observer: Observer = field(default_factory=Observer)
    """Is told what happens while it runs."""
    rate: float | None = None
    """Frames per second that the controller expects."""
    brake: Brake | None = None
    """That of the session's `SlowedEngine`: it slows the rest, too."""

    def __post_init__(self) -> None:
        if not all(value > 0 for value in (self.duration_s, self.every_s, self.answer_tokens)):
            raise InputError("a stream of no duration, questions without a pause, or answers without a token")


class Brake:
    """Makes what is measured through it take `factor` times as long from `after_s` seconds on, until it is let go."""

    def __init__(self, factor: float, after_s: float) -> None:
        """The clock of `after_s` begins with `start`."""
        self.factor, self.after_s = factor, after_s
        self._begin: float | None = None

    def start(self) -> None:
        self._begin = time.monotonic()

    def let_go(self) -> None:
        self._begin = None

    def wait(self, since: float) -> None:
        """Sleep so long that what began at `since` (`time.monotonic()`) has taken its time."""
        now = time.monotonic()
        if self._begin is not None and now - self._begin >= self.after_s:
            time.sleep((self.factor - 1) * (now - since))


class SlowedClock(Clock):
    """Slows what is no engine's work; its phases are measured with the sleep."""

    def __init__(self, brake: Brake) -> None:
        super().__init__()
        self._brake = brake

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with super().__call__(phase):
            begin = time.monotonic()
            yield
            if phase in ("plan", "preprocess"):
                self._brake.wait(begin)


class SlowedEngine:
    """An engine on a machine that gets slower: for trying what a controller does."""

    def __init__(self, inner: Engine, brake: Brake) -> None:
        self.inner, self.brake = inner, brake
        self.name, self.config, self.bounds = inner.name, inner.config, inner.bounds

    @property
    def capacity(self) -> int | None:
        return self.inner.capacity

    @property
    def can_move(self) -> bool:
        return self.inner.can_move

    @property
    def moves_exactly(self) -> bool:
        return self.inner.moves_exactly

    @property
    def can_place(self) -> bool:
        return self.inner.can_place

    def load(self, *, media: bool) -> None:
        self.inner.load(media=media)

    def new_cache(self) -> Cache:
        return self.inner.new_cache()

    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer()

    def close(self) -> None:
        self.inner.close()

    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        begun = time.monotonic()
        self.inner.move(cache, begin, end, to, turn)
        self.brake.wait(begun)

    def embed(self, ids: I64) -> F32:
        return self._slowly(lambda: self.inner.embed(ids))

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32:
        return self._slowly(lambda: self.inner.encode(pixels, rows, cols))

    def project(self, features: F32) -> F32:
        return self._slowly(lambda: self.inner.project(features))

    def forward(
        self, cache: Cache, embeds: F32, logit_index: I64, keys: Sequence[Key] = (), positions: I64 | None = None
    ) -> F32:
        return self._slowly(lambda: self.inner.forward(cache, embeds, logit_index, keys, positions))

    def _slowly(self, call: Callable[[], F32]) -> F32:
        begin = time.monotonic()
        out = call()
        self.brake.wait(begin)
        return out


@dataclass
class _Samples:
    warm_ms: list[float] = field(default_factory=list)
    asked: float = 0.0
    """When the last question was, by `time.monotonic`."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the beginning, MB."""
    failed: Exception | None = None


def bench_stream(
    stream: Stream,
    frames: Iterator[Frame],
    options: StreamRun,
    progress: Callable[[float, Live], None],
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Run a stream and measure it; see the interface in docs/benchmarks/schema.md.

    Args:
        frames: of a source that goes on for long enough.
        progress: told after each frame, with the stream's time.
        meter: reads power and temperature meanwhile; None: those of this machine.
    """
    found, meter, budget = _Samples(), meter or Meter(), stream.planner.limits.budget
    choice = SamplingOptions(max_new_tokens=options.answer_tokens)
    if options.brake is not None:
        stream.clock, stream.new_clock = SlowedClock(options.brake), partial(SlowedClock, options.brake)
    timeline = Timeline()
    read = Timed(frames)
    wanted = LiveOptions(target=options.target, cost=options.cost, rate=options.rate, size=read.size())
    live = Live(stream, wanted, observer=Observers(timeline, options.observer))
    with live, ExitStack() as metered:
        live.wait()  # for the engine to be warm
        metered.enter_context(meter)
        if options.brake is not None:
            options.brake.start()
        timeline.start()
        begin = timeline.begin
        # A camera does not wait for answers.
        camera = threading.Thread(target=_feed, args=(live, read, options, found, progress), daemon=True)
        camera.start()
        while camera.is_alive():
            # Where an answer took longer than that, the next moment is waited for.
            turn = int((time.monotonic() - begin) / options.every_s) + 1
            camera.join(max(0.0, begin + options.every_s * turn - time.monotonic()))
            if camera.is_alive():
                _ask(live, choice, found)
                timeline.questions.append((found.asked - begin, found.warm_ms[-1]))
        if found.failed is not None:
            raise found.failed
        live.wait()
        seconds = time.monotonic() - begin
    if options.brake is not None:
        options.brake.let_go()
    cold = _cold(stream, choice)
    pushed_out = live.stats.dropped["queue"] + live.stats.dropped["late"]
    deadlines, missed = _deadlines(options.target, found.warm_ms, timeline.age_ms, pushed_out)
    stats = stream.stats
    frames_seen = max(1, stats.frames)
    return {
        "seconds": seconds,
        "fps_in": live.stats.frames_in / seconds,
        "fps_processed": live.stats.processed / seconds,
        "frames_in": live.stats.frames_in,
        "frames_processed": live.stats.processed,
        "frames_dropped": sum(live.stats.dropped.values()),
        "dropped": dict(live.stats.dropped),
        "given_up": dict(stats.given_up),
        "frame_age_ms": percentiles(timeline.age_ms),
        "deadlines": deadlines,
        "deadline_misses": missed,
        "deadline_miss_percent": 100 * missed / deadlines if deadlines else None,
        "decisions": [decision.to_json() for decision in live.control.decisions] if live.control else [],
        "calibration": calibration(live.control) if live.control else None,
        "budget": budget,
        "budget_at_end": stream.planner.limits.budget,
        "max_live_visual_tokens": stats.max_visual_tokens,
        "live_kv_tokens": len(stream.prompt_keys()),
        "visual_tokens_per_frame": stream.visual_tokens / max(1, len(stream.times)),
        "saved_against_all_key": stream.planner.saved_share,
        "reencodings_per_frame": stats.reencoded / frames_seen,
        "reprefilled_tokens_per_frame": stats.reprefilled_tokens / frames_seen,
        "first_token_ms": {"warm": percentiles(found.warm_ms), "cold": percentiles(cold)},
        "phases_ms_per_frame": phases_per_frame(stream, read.ms_per_frame),
        "memory_mb": found.memory[-1][1] if found.memory else None,
        "memory_slope_mb_per_h": slope(found.memory),
        **meter.to_json(),
        "timeline": timeline.to_json(found.memory, meter),
        "samples": {"frame_age_ms": timeline.age_ms, "warm_ms": found.warm_ms, "cold_ms": cold},
    }


def calibration(control: LatencyControl) -> dict[str, Any]:
    """How well times were foreseen, of frames and of questions to their first token once the worker was free.

    `above_p95_percent` is the share that took longer than the 95th percentile predicted for it, `ratio` the median of
    taken over predicted; `times` are [predicted, 95th percentile, taken] in milliseconds, the latest `KEPT`.
    """

    def said(times: Sequence[Seen]) -> dict[str, Any]:
        above = [one.taken > one.p95 for one in times]
        ratios = [one.taken / max(one.predicted, 1e-3) for one in times]
        return {
            "count": len(times),
            "above_p95_percent": 100 * sum(above) / len(above) if above else None,
            "ratio": float(np.median(ratios)) if ratios else None,
            "times": [[one.predicted, one.p95, one.taken] for one in times],
        }

    return {"frames": said(control.frames_seen), "questions": said(control.questions_seen)}


def phases_per_frame(stream: Stream, read_ms: float | None) -> dict[str, float]:
    """Milliseconds of each part, per frame that was worked on.

    `read` is decoding the clip, in the thread that reads it: no part of a frame's age. None leaves it out.
    """
    frames = max(1, stream.stats.frames)
    parts = {} if read_ms is None else {"read": read_ms}
    # The pixels are there: taking them is no decoding.
    spent = {name: ns for name, ns in stream.clock.spent.items() if ns and not name.startswith("decode_")}
    return parts | {name: ns / 1e6 / frames for name, ns in spent.items()}


def _deadlines(
    target: LatencyTarget | None, first_ms: list[float], age_ms: list[float], pushed_out: int
) -> tuple[int, int]:
    """Deadlines that there were, and those that were missed: first tokens, and frames if they have a limit; those that
    the queue had no room for were never ready."""
    if target is None:
        return 0, 0
    late = [took > target.first_token_ms for took in first_ms]
    if target.frame_ms is not None:
        late += [age > target.frame_ms for age in age_ms] + [True] * pushed_out
    return len(late), sum(late)


def _feed(
    live: Live,
    frames: Iterator[Frame],
    options: StreamRun,
    found: _Samples,
    progress: Callable[[float, Live], None],
) -> None:
    begin = time.monotonic()
    try:
        for frame in paced(frames):
            at = time.monotonic() - begin
            if at >= options.duration_s:
                return
            live.push(frame)
            found.memory.append((at, resident_mb()))
            progress(at, live)
    except Exception as error:  # raised again by the thread that asks
        found.failed = error


def _ask(live: Live, choice: SamplingOptions, found: _Samples) -> None:
    """From the moment of asking, waiting for the frame in work included."""
    begin = found.asked = time.monotonic()
    for i, _ in enumerate(live.ask(QUESTION, options=choice)):
        if i == 0:
            found.warm_ms.append(1e3 * (time.monotonic() - begin))


def _cold(stream: Stream, choice: SamplingOptions) -> list[float]:
    samples = []
    for _ in range(COLD if stream.times else 0):
        stream.forget_features()
        begin = time.monotonic()
        next(stream.ask(QUESTION, options=choice))
        samples.append(1e3 * (time.monotonic() - begin))
    return samples


def slope(memory: list[tuple[float, float]]) -> float | None:
    """MB per hour by least squares over the second half of the samples; None below ten minutes."""
    if not memory or memory[-1][0] < SLOPE_S:
        return None
    at, mb = np.array(memory[len(memory) // 2 :]).T
    return float(np.polyfit(at / 3600, mb, 1)[0])
