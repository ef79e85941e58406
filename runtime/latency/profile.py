"""Measures what `cost.py` needs, on the machine that will run the model, and how well it then predicts other sizes.

What makes two runs on one machine agree:

- Rounds go over all points in turn, so that a slow second spoils one sample of each point and not all of one.
- A point counts by the lowest tenth of its samples: other programs only ever add to a call's time. The first call of
  each stage, which loads its graph, counts for nothing, and a short call that was disturbed is made again.
- A stage is a constant plus slopes times the shape's operations (`operations.py`, `fitting.py`). A point that was
  measured a few times, or never undisturbed, is drawn to that line; another speaks for itself.
- What a pause costs is the median of paired differences, and 0 where these do not agree on its sign.

Time is limited. Points are measured from the cheapest on; each is estimated before it is made, from its operations and
what was measured until then. One that does not fit is left out, and the tables have the line's value there. Points that
the model is tried on are measured in the same rounds, and it is not fitted to them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from penguin_edge.bundle.contract import PROFILE
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BundleError
from penguin_edge.files import read_json, write_json
from penguin_edge.machine import describe
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.latency.calls import CHAIN, Calls, Task, Timer
from penguin_edge.runtime.latency.cost import CostModel, CostTable, errors, fit, line
from penguin_edge.runtime.latency.fitting import LEAST, Line, Measured, Point, Timing, all_measured
from penguin_edge.schema import Maybe, Real, Record, Text, Whole

SCHEMA = "penguin-profile/4"
MEASURE_AGAIN = "run `penguin-edge profile` again"
RULES = Record(
    {"schema": Text((SCHEMA,)), "cost": Record({}, open=True)},
    {"machine": Record({}, open=True), "threads": Maybe(Whole(1, 4096))},
    open=True,
)
"""What is read of a profile; the tables are checked by `CostModel.from_json`."""
SECONDS = 45.0
"""With what loading and the last call take beside, a model of 2 billion weights is through within a minute."""
FIRST, FIRST_TRIED = 1 / 3, 1 / 10
"""Share of what is left that a point may take when it is new: one to fit to, one to try."""
LONG_CHAIN_MS = 100.0
"""A small frame that takes longer than this is not measured after a pause: what that adds is lost in its noise."""
OFTEN_ENOUGH, SHARES = 5, 8
"""Rounds that all points have; from then on each is made as long as it has had no more than its even share of the time,
and frames after a pause than so many shares."""
PAIRS = 8
"""Pairs of an awake and a woken frame from which on they tell anything: about a second of them."""

Samples = dict[str, dict[Point, list[Timing]]]


@dataclass(frozen=True)
class ProfileOptions:
    """How much is measured."""

    seconds: float | None = None
    """Limit of the measurement; None: `SECONDS`, or none where rounds are given."""
    repeat: int | None = None
    """Rounds; None: as many as the time allows."""
    tried: bool = True
    """Whether sizes are measured that the model is only tried on."""

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: no time, or fewer than one round.
        """
        check_options(seconds=(self.seconds, Maybe(Real(above=0))), repeat=(self.repeat, Maybe(Whole(1))))

    @property
    def limit(self) -> float:
        """Seconds; infinite where rounds alone are given."""
        return self.seconds or (float("inf") if self.repeat else SECONDS)


@dataclass(frozen=True)
class Progress:
    """Where a profile is: the round, from 1, calls made in it and in all of it, and seconds left."""

    round: int
    done: int
    total: int
    left_s: float


class ProfileStopped(KeyboardInterrupt):
    """A measurement that was stopped; `result` is what `profile` would have returned, with "stopped" true."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__()
        self.result = result


def profile(
    engine: Engine,
    options: ProfileOptions | None = None,
    *,
    progress: Callable[[Progress], None],
    clock: Timer | None = None,
) -> dict[str, Any]:
    """Measure, fit and try; JSON with the model, its errors and all samples.

    Raises:
        ProfileStopped: a KeyboardInterrupt ended the measurement, and there is a model by then.
        KeyboardInterrupt: it came before two points of each stage were measured.
    """
    clock = clock or Timer()
    begin = clock.now()
    calls = Calls(engine, clock)
    run = _Run(calls, options or ProfileOptions(), clock, progress, begin)

    def result(*, stopped: bool) -> dict[str, Any]:
        return _result(run) | {"stopped": stopped, "seconds": clock.now() - begin}

    try:
        run.measure()
    except KeyboardInterrupt:
        if not run.usable:
            raise
        raise ProfileStopped(result(stopped=True)) from None
    finally:
        calls.close()
    return result(stopped=False)


@dataclass
class _Run:
    """Rounds over the points of an engine, and what they gave."""

    calls: Calls
    options: ProfileOptions
    clock: Timer
    progress: Callable[[Progress], None]
    begin: float
    samples: tuple[Samples, Samples] = field(default_factory=lambda: ({}, {}))
    """Fitted, tried."""
    spent: dict[Task | None, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of each task; None: of frames after a pause."""
    woken: list[float] = field(default_factory=list)
    _lines: dict[str, tuple[int, Line]] = field(default_factory=dict)
    """Line of each stage, by the medians of so many points; for estimates."""

    def measure(self) -> None:
        """
        Raises:
            KeyboardInterrupt: somebody wants it to end.
        """
        loaded = set()
        for task in self.calls.tasks:
            if task.stage not in loaded:
                self.calls.timed(task)
                loaded.add(task.stage)
        tasks = [task for task in self.calls.tasks if self.options.tried or not task.tried]
        round_ = 0
        while tasks and (self.options.repeat is None or round_ < self.options.repeat):
            made = []
            for done, task in enumerate(tasks):
                self.progress(Progress(round_ + 1, done, len(tasks), self._left(tasks[done:], tasks, round_)))
                if self._fits(task, new=round_ == 0) and not self._had_enough(task, round_, len(tasks)):
                    with self._spending(task):
                        took = self.calls.timed(task)
                    points = self.samples[task.tried].setdefault(task.stage, {})
                    points[task.point] = [*points.get(task.point, ()), took]
                    made.append(task)
            if self._wakes(round_, len(tasks)):
                with self._spending(None):
                    self.woken.append(self.calls.waking())
            if not made:
                break
            # Without the points that were too long for the first round; a later one leaves out what no longer fits.
            tasks = made if round_ == 0 else tasks
            round_ += 1
        # A short measurement has few rounds, and fewer pairs tell nothing.
        while self.woken and len(self.woken) < PAIRS and self.options.repeat is None:
            self.woken.append(self.calls.waking())

    @property
    def usable(self) -> bool:
        """Whether there is a constant and a slope for each stage."""
        return all(self.samples[0].get(task.stage, {}).get(task.point) for task in self.calls.tasks if task.needed)

    @contextmanager
    def _spending(self, task: Task | None) -> Iterator[None]:
        begin = self.clock.now()
        yield
        self.spent[task] += self.clock.now() - begin

    def _had_enough(self, task: Task | None, round_: int, tasks: int) -> bool:
        """Whether it was made often, and others are to have the time: where there are no rounds to be kept."""
        shares = SHARES if task is None else 1
        even = shares * (self.clock.now() - self.begin) / tasks
        return self.options.repeat is None and round_ >= OFTEN_ENOUGH and self.spent[task] > even

    def _wakes(self, round_: int, tasks: int) -> bool:
        if not self.calls.wakes or self._had_enough(None, round_, tasks):
            return False
        return self._chain_ms() < min(LONG_CHAIN_MS, 250 * self._rest())

    def _rest(self) -> float:
        return self.options.limit - (self.clock.now() - self.begin)

    def _fits(self, task: Task, *, new: bool) -> bool:
        share = 1.0
        if new:
            if task.needed or self.options.limit == float("inf"):
                return True
            share = FIRST_TRIED if task.tried else FIRST
        return self._expected(task) / 1e3 <= share * self._rest()

    def _expected(self, task: Task) -> float:
        """Milliseconds of a call, and of filling the cache for it, by what is known until now."""
        filled = self.calls.filling(task)
        ms = self._guess(task.stage, task.point, task.tried)
        return ms + (self._guess("prefill", (float(filled), task.depth / 2), False) if filled else 0.0)

    def _guess(self, stage: str, point: Point, tried: bool) -> float:
        operations = self.calls.operations
        known = self.samples[0].get(stage, {})
        if values := self.samples[tried].get(stage, {}).get(point):
            return statistics.median(sample.ms for sample in values)
        if len(known) > 1:
            count, found = self._lines.get(stage, (0, Line(0.0, (0.0, 0.0))))
            if count != len(known):
                found = line({at: _taken(values) for at, values in known.items()}, partial(operations.amounts, stage))
                self._lines[stage] = len(known), found
            return found.ms(operations.amounts(stage, point))
        # The slowest of what was measured, for each operation: of the stage, or of all.
        per = (
            _taken(values).ms / operations.effort(other, at)
            for other, points in ({stage: known} if known else self.samples[0]).items()
            for at, values in points.items()
        )
        return max(per, default=0.0) * operations.effort(stage, point)

    def _chain_ms(self) -> float:
        """A small frame through the engine."""
        return sum(_taken(next(iter(self.samples[0][stage].values()))).ms for stage in CHAIN)

    def _left(self, rest: list[Task], tasks: list[Task], round_: int) -> float:
        """Seconds until the end."""
        left = max(0.0, self._rest())
        if self.options.repeat is not None:
            more = self.options.repeat - round_ - 1
            left = min(left, sum(map(self._expected, rest)) / 1e3 + more * sum(map(self._expected, tasks)) / 1e3)
        return left


def _taken(samples: list[Timing]) -> Measured:
    """What a call took of late, with all that disturbed it: what the next one has to be expected to take."""
    return Measured(max(LEAST, statistics.median(sample.ms for sample in samples)), len(samples))


def _result(run: _Run) -> dict[str, Any]:
    operations = run.calls.operations
    grids: dict[str, set[Point]] = {}
    for task in run.calls.tasks:
        if not task.tried:
            grids.setdefault(task.stage, set()).add(task.point)
    fitted, tried = (
        {stage: all_measured(points, partial(operations.effort, stage)) for stage, points in group.items()}
        for group in run.samples
    )
    awake: dict[str, dict[Point, Measured]] = (
        {"wake": {(0.0,): Measured(waking(run.woken), 1)}} if run.calls.wakes else {}
    )
    model = fit(fitted | awake, operations, grids)
    missed = errors(model, tried)
    every = [error for values in missed.values() for error in values]
    return {
        "schema": SCHEMA,
        "cost": model.to_json(),
        "measured": {stage: _counts(model.tables[stage], points) for stage, points in fitted.items()},
        "lines": {
            stage: {"constant_ms": found.constant, "ms_per_giga": list(found.slopes)}
            for stage, points in fitted.items()
            for found in [line(points, partial(operations.amounts, stage))]
        },
        "error": {
            "median": float(np.median(every)) if every else None,
            "p95": float(np.quantile(every, 0.95)) if every else None,
        },
        "error_by_stage": {stage: float(np.median(values)) for stage, values in missed.items()},
        "samples": {
            name: {stage: _listed(points) for stage, points in group.items()}
            for name, group in zip(("fitted", "tried"), run.samples, strict=True)
        },
        "woken_ms": run.woken,
    }


def _counts(table: CostTable, points: dict[Point, Measured]) -> list[list[int]]:
    """For each cell of a table the samples that it comes from; 0: from the line alone."""
    found = {(*point, 0.0)[:2]: one.count for point, one in points.items()}
    return [[found.get((x, y), 0) for y in table.axes[1]] for x in table.axes[0]]


def _listed(points: dict[Point, list[Timing]]) -> list[list[Any]]:
    """[point, milliseconds, processor milliseconds] each."""
    return [
        [list(point), [sample.ms for sample in samples], [sample.cpu_ms for sample in samples]]
        for point, samples in points.items()
    ]


def waking(differences: list[float]) -> float:
    """What a pause adds: the median of paired differences in ms, and 0 where their quartiles differ in sign."""
    if len(differences) < PAIRS or float(np.quantile(differences, 0.25)) <= 0:
        return 0.0
    return statistics.median(differences)


def keep(bundle: Bundle, result: dict[str, Any]) -> None:
    """Write it into the bundle's folder, for the controller."""
    write_json(bundle.path(PROFILE), result)


def differences(bundle: Bundle, threads: int | None) -> str:
    """What the profile that is kept was measured with, where that is not this machine and as many threads."""
    data = _read(bundle.path(PROFILE))
    now, then = describe(), data.get("machine") or {}
    names = [f"{name} {then.get(name)!r}" for name in ("processor", "cores") if then.get(name) != now[name]]
    if data.get("threads") != threads:
        names.append(f"{data.get('threads') or 'all'} threads")
    return ", ".join(names)


def load(bundle: Bundle) -> CostModel | None:
    """The model that was kept, or None.

    Raises:
        BundleError: the file is damaged, or of another version.
    """
    path = bundle.path(PROFILE)
    if not path.exists():
        return None
    found = CostModel.from_json(_read(path).get("cost"))
    if bundle.manifest.model.vision is not None and "encode" not in found.tables:
        raise BundleError(f"{path}: knows nothing of the encoder that the bundle has; {MEASURE_AGAIN}")
    return found


def _read(path: Path) -> dict[str, Any]:
    """The profile's JSON.

    Raises:
        BundleError: as `load`.
    """
    data: dict[str, Any] = read_json(path, rule=RULES, error=BundleError, advice=MEASURE_AGAIN)
    return data
