"""Calls of an engine that a profile measures: one for each point of each stage.

What stands in a cache does not change how long a call takes. So depths of the cache are reached with `move`, which
takes milliseconds where computing them would take minutes: the cache is made to end at a position, over whatever its
memory holds. An engine that cannot move computes them, and its deep points are left out where that takes too long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from penguin_edge.config import PATCH, PATCH_VALUES
from penguin_edge.media.frames import Frame
from penguin_edge.media.preprocess import positions, preprocess_image, resize
from penguin_edge.runtime.core.media import Library
from penguin_edge.runtime.engines.base import I64, Engine, chunks
from penguin_edge.runtime.engines.cache import Cache
from penguin_edge.runtime.latency.fitting import Point, Timing
from penguin_edge.runtime.latency.operations import Operations

SIDES, TRIED_SIDES = (4, 8, 12, 16, 24, 32), (6, 10, 20, 28)
"""Frames of side x side patches, as far as the bundle takes them."""
SOURCES, TRIED_SOURCES = ((240, 320), (480, 640), (1080, 1920)), ((360, 480), (720, 1280))
"""Frames as they come, (height, width), made into every second of these sizes."""
BATCH, BATCHED = 4, 256
"""Frames in one call, and the most patches each that this is measured for: larger ones take as long one by one."""
CHUNKS, TRIED_CHUNKS = (1, 8, 32, 128, 256), (4, 16, 64, 192)
PASTS, TRIED_PASTS = (0.0, 0.25, 0.9), (0.12, 0.6)
"""Depths of the cache before, as shares of `max_seq_len`."""
SMALL = 16
"""A move of all positions before is measured, and one of so many times fewer."""
DEEPEST = 4096
"""Beyond it nothing is measured: the last line goes on."""
PAUSE_S = 0.1
"""Before what is measured of waking: threads no longer spin by then."""
SHORT_MS, AGAIN = 10.0, 4
"""A call that is shorter than this is made so many times more, and their median taken: the first one finds the caches
of the processor filled by another stage."""
ALONE, REST_S = 0.8, 0.005
"""Share of the threads at once that smaller calls were seen to have, below which a call was disturbed. It is made again
after a rest: a system takes cores from those first that have used them long."""
CHAIN = ("preprocess", "encode", "project", "prefill")
"""A frame's way to the KV cache."""
APART = 4.0
"""The second point of a stage takes this many times the work of the first: two such give a constant and a slope."""


@dataclass(frozen=True)
class Timer:
    """Seconds: now, and of all threads of this process on a processor; tests have a clock of their own."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    worked: Callable[[], float] = time.process_time


@dataclass(frozen=True)
class Task:
    """One point of a stage."""

    stage: str
    point: Point
    tried: bool
    """Whether it is there to try the model, which is not fitted to it."""
    effort: float
    """See `Operations.effort`."""
    prepare: Callable[[], None]
    """Brings the cache to where it has to be; takes no part in the time."""
    call: Callable[[], Any]
    depth: int = 0
    """Positions that the cache has to hold before."""
    needed: bool = False
    """Whether there is no model without it."""


class Calls:
    """All tasks of an engine; owns the cache that they are made on."""

    def __init__(self, engine: Engine, clock: Timer) -> None:
        self._engine, self._clock = engine, clock
        self.operations = Operations(engine.config)
        self._cache = engine.new_cache()
        bounds = engine.bounds
        ids = np.arange(max(1, min(bounds.max_chunk, bounds.max_seq_len - 1))) % engine.config.text.vocab_size
        self._embeds = engine.embed(ids)
        found = [*self._media(), *self._decoder()]
        needed = {id(task) for task in self._needed(found)}
        found = [replace(task, needed=id(task) in needed) for task in found]
        # Classes of about as much work, the cheapest first; within one from deep to shallow: cutting a cache is free.
        self.tasks = sorted(found, key=_order)
        self._least = {task.stage: task for task in sorted(found, key=lambda task: -task.effort) if not task.tried}
        self._best: dict[Task, float] = {}
        """Threads at once, the most that each task was seen to have."""

    def close(self) -> None:
        self._cache.close()

    def timed(self, task: Task) -> Timing:
        """Make a call, a short or disturbed one several times: the middle one of those that were not disturbed."""
        samples: list[Timing] = []
        while not samples or (len(samples) <= AGAIN and sum(sample.ms for sample in samples) < AGAIN * SHORT_MS):
            if samples and not self._alone(task, samples[-1]):
                self._clock.sleep(REST_S)
                self._least[task.stage].prepare()
                self._least[task.stage].call()  # wakes the engine's threads
            elif samples and samples[-1].ms > SHORT_MS:
                break
            task.prepare()
            samples.append(self._timed(task.call))
        alone = sorted((sample for sample in samples if self._alone(task, sample)), key=lambda sample: sample.ms)
        self._best[task] = max(self._best.get(task, 0.0), *(sample.threads for sample in samples))
        return alone[len(alone) // 2] if alone else min(samples, key=lambda sample: sample.ms)

    def _alone(self, task: Task, sample: Timing) -> bool:
        """Whether about as many threads worked at once as in smaller calls of the stage."""
        smaller = (
            threads
            for other, threads in self._best.items()
            if other.stage == task.stage and other.effort <= task.effort
        )
        return sample.threads >= ALONE * max(smaller, default=0.0)

    def _timed(self, call: Callable[[], Any]) -> Timing:
        worked, begin = self._clock.worked(), self._clock.now()
        call()
        return Timing(1e3 * (self._clock.now() - begin), 1e3 * (self._clock.worked() - worked))

    def filling(self, task: Task) -> int:
        """Positions to compute before a call, where the engine cannot move."""
        return 0 if self._engine.can_move else max(0, task.depth - self._cache.length)

    @property
    def wakes(self) -> bool:
        """Whether there is an encoder, whose small frame can be measured after a pause."""
        return self._engine.config.vision is not None

    def waking(self) -> float:
        """What a small frame takes more after a pause than the same one just before; ms."""
        first: dict[str, Task] = {}
        for task in self.tasks:
            if not task.tried and not task.depth:
                first.setdefault(task.stage, task)

        def chain() -> None:
            for stage in CHAIN:
                first[stage].call()

        took = []
        for pause in (0.0, 0.0, PAUSE_S):
            self.hold(0)
            if pause:
                self._clock.sleep(pause)
            took.append(self._timed(chain))
        # The first one filled the caches of the processor.
        return took[2].ms - took[1].ms

    def hold(self, length: int) -> None:
        """Let the cache end at `length`."""
        cache = self._cache
        if cache.length >= length:
            cache.truncate(length)
        elif self._engine.can_move:
            self._engine.move(cache, 1, length + 1, 0)
        else:
            for rows in chunks(length - cache.length, self._engine.bounds):
                self._engine.forward(cache, self._embeds[: rows.stop - rows.start], np.empty(0, np.int64))

    def _needed(self, found: list[Task]) -> Iterator[Task]:
        """The smallest point of each stage, and one that takes at least `APART` times its work along the first axis."""
        for stage in dict.fromkeys(task.stage for task in found):
            mine = sorted((t for t in found if t.stage == stage and not t.tried), key=lambda task: task.effort)
            least = mine[0]
            work = APART * sum(self.operations.amounts(stage, least.point))
            yield least
            for task in mine[1:]:
                if task.point[1:] == least.point[1:] and sum(self.operations.amounts(stage, task.point)) >= work:
                    yield task
                    break

    def _task(
        self, stage: str, point: tuple[int, ...], call: Callable[[], Any], *, tried: bool, depth: int | None = None
    ) -> Task:
        at = tuple(map(float, point))
        prepare = _nothing if depth is None or stage == "move" else partial(self.hold, depth)
        return Task(stage, at, tried, self.operations.effort(stage, at), prepare, call, depth or 0)

    def _media(self) -> Iterator[Task]:
        engine, random = self._engine, np.random.default_rng(0)
        if engine.config.vision is None:
            return
        merge, width = engine.config.image.video_merge_size, engine.config.vision.hidden_size
        for tried, sides, sources in ((False, SIDES, SOURCES), (True, TRIED_SIDES, TRIED_SOURCES)):
            taken = [side for side in sides if side * side <= engine.bounds.max_patches]
            for side in taken:
                patches, tokens = side * side, side * side // merge**2
                pixels = random.standard_normal((BATCH, patches, PATCH_VALUES), dtype=np.float32)
                features = random.standard_normal((1, tokens, merge**2, width), dtype=np.float32)
                places = positions((side, side), merge)
                for frames in (1, BATCH)[: 1 + (engine.bounds.max_batch >= BATCH and patches <= BATCHED)]:
                    call = partial(engine.encode, pixels[:frames], *places)
                    yield self._task("encode", (patches, frames), call, tried=tried)
                yield self._task("project", (tokens,), partial(engine.project, features), tried=tried)
            for source in sources:
                arrive = _arrival(engine, source)
                for side in taken[::2]:
                    point = (source[0] * source[1], side * side)
                    yield self._task("preprocess", point, partial(arrive, side), tried=tried)

    def _decoder(self) -> Iterator[Task]:
        engine, bounds, cache, last = self._engine, self._engine.bounds, self._cache, np.array([-1])
        one = np.zeros(1, np.int64)
        for tried, sizes, shares in ((False, CHUNKS, PASTS), (True, TRIED_CHUNKS, TRIED_PASTS)):
            counts = [n for n in sizes if bounds.min_chunk <= n <= len(self._embeds)]
            room = min(bounds.max_seq_len - max(counts, default=1), DEEPEST)
            for past in sorted({math.floor(share * room) for share in shares}):
                for count in counts:
                    call = partial(engine.forward, cache, self._embeds[:count], last)
                    yield self._task("prefill", (count, past), call, tried=tried, depth=past)
                step = partial(_step, engine, cache, one, last)
                yield self._task("decode", (past,), step, tried=tried, depth=past)
                # A frame's few positions are moved, too: below the first point a table holds its value.
                for moved in sorted({past // SMALL, past} - {0}) if engine.can_move else ():
                    move = partial(engine.move, cache, 1, moved + 1, 0)
                    yield self._task("move", (moved,), move, tried=tried, depth=moved)


def _order(task: Task) -> tuple[bool, int, int, float]:
    return not task.needed, math.floor(math.log(task.effort, APART)), -task.depth, task.effort


def _step(engine: Engine, cache: Cache, one: I64, last: I64) -> None:
    engine.forward(cache, engine.embed(one), last)


def _nothing() -> None:
    """Media need no cache, and a move fills it."""


def _arrival(engine: Engine, source: tuple[int, int]) -> Callable[[int], Any]:
    """What a frame of a stream goes through before the encoder. Every one shows another picture than the last."""
    image, merge = engine.config.image, engine.config.image.video_merge_size
    random = np.random.default_rng(0)
    coarse = [random.integers(0, 256, (12, 16, 3), dtype=np.uint8) for _ in range(2)]
    frames = cycle([Frame(resize(picture, *source), 0.0) for picture in coarse])
    clip = Library(image, "strict").new_clip(lambda: ())

    def arrive(side: int) -> Any:
        frame = Frame(np.array(next(frames).pixels), 0.0)
        clip.add(frame)
        return preprocess_image(frame, image, merge, size=(PATCH * side, PATCH * side))

    return arrive
