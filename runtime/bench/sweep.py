"""What fixed settings of a stream give on this machine, and what a latency controller makes of the same targets.

Every setting of a coarse grid runs for as long as the stream that is measured. From its samples follows what it would
have missed under any target, so one sweep judges a controller at many targets: the best fixed setting of a target is
the one that keeps most visual tokens among those that miss at most `ALLOWED` of the deadlines.

| entry of `sweep` | what                                                                      |
|------------------|---------------------------------------------------------------------------|
| budget           | visual tokens that the window may have                                    |
| frame_tokens     | most tokens of one frame                                                  |
| stride           | one of so many frames is taken                                            |
| cache            | how the KV cache follows                                                  |
| miss_percent     | deadlines of the first target that were missed                            |
| visual_tokens    | of the window, the mean over its frames                                   |
| first_token_ms, frame_age_ms | percentiles                                                   |

The first `SETTLED_S` seconds of every run do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from penguin_edge.media.frames import Frame
from penguin_edge.runtime.bench.stages import percentiles
from penguin_edge.runtime.bench.streams import StreamRun, bench_stream
from penguin_edge.runtime.core.options import Follow
from penguin_edge.runtime.latency.control import ALLOWED, LatencyTarget
from penguin_edge.runtime.latency.forecast import Setting
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.stream import Stream

SETTLED_S = 5.0
SHARES = (1.0, 0.5, 0.25)
"""Shares of the budget, and of a frame's native tokens, that are tried."""
ALIKE = 0.8
"""Size of a frame over that of another setting, above which it is not tried beside it."""
TIMES = (2.0, 1.2, 1.0, 0.7)
"""Targets where none is given: so many times the slowest answer and the 99th percentile of a frame's age together, of
the setting that gives up nothing."""


@dataclass(frozen=True)
class Settled:
    """What one run gave after it had settled: milliseconds of first tokens and of frames' ages, frames that were never
    ready, and visual tokens of the window at each frame."""

    first_ms: tuple[float, ...]
    age_ms: tuple[float, ...]
    lost: int
    tokens: tuple[float, ...]

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Settled:
        """From what `bench_stream` gave."""
        told = result["timeline"]
        frames = [one for one in told["frames"] if one["time"] >= SETTLED_S]
        return cls(
            tuple(one["first_token_ms"] for one in told["questions"] if one["time"] >= SETTLED_S),
            tuple(one["age_ms"] for one in frames),
            sum(one["time"] >= SETTLED_S and one["reason"] in ("queue", "late") for one in told["dropped"]),
            tuple(one["visual_tokens"] for one in frames),
        )

    @property
    def visual_tokens(self) -> float | None:
        """Mean over frames; None when there were none."""
        return float(np.mean(self.tokens)) if self.tokens else None

    def missed(self, target: LatencyTarget) -> float | None:
        """Share of deadlines that were missed; None when there were none."""
        late = [took > target.first_token_ms for took in self.first_ms]
        if target.frame_ms is not None:
            late += [age > target.frame_ms for age in self.age_ms] + [True] * self.lost
        return sum(late) / len(late) if late else None


def grid(native: int, floor: int, budget: int, caches: Sequence[Follow]) -> list[Setting]:
    """Fixed settings to try, the one that gives up nothing first.

    Args:
        native, floor, budget: tokens of one frame, at most and at least, and of the window.
    """
    frame = min(native, budget)
    found: list[Setting] = []
    for cache, room, share in product(caches, SHARES, SHARES):
        kept = max(1, round(room * budget))
        size = min(kept, max(min(floor, frame), round(share * frame)))
        alike = (one for one in found if (one.cache, one.budget) == (cache, kept))
        if all(size <= ALIKE * one.frame_tokens for one in alike):
            found.append(Setting(kept, size, 1, cache))
    return found


@dataclass(frozen=True)
class Rig:
    """Where streams and frames come from: `stream(budget)` opens one that the caller closes, `frames()` begins the
    clip again."""

    stream: Callable[[int], Stream]
    frames: Callable[[], Iterator[Frame]]


def bench_sweep(
    rig: Rig,
    settings: Iterable[Setting],
    options: StreamRun,
    targets: Sequence[LatencyTarget],
    progress: Callable[[str], Callable[[float, Live], None]],
) -> dict[str, Any]:
    """Run every setting, then the controller at every target.

    Args:
        options: `target` is not looked at; `cost` is the controller's.
        targets: empty for `TIMES` of what the first setting takes.
        progress: gives, for what is run, what is told after each of its frames.
    """
    run = replace(options, target=None, cost=None)
    settings, outcomes, samples = list(settings), list[Settled](), []
    budget = settings[0].budget
    for setting in settings:
        with rig.stream(setting.budget) as stream:
            stream.frame_tokens, stream.follow, stream.shrink = setting.frame_tokens, setting.cache, setting.shrink
            told = bench_stream(stream, rig.frames(), run, progress(_named(setting)))
        outcomes.append(Settled.of(told))
        samples.append(asdict(outcomes[-1]))
    targets = list(targets) or _targets(outcomes[0])
    held = []
    for target in targets:
        with rig.stream(budget) as stream:
            told = bench_stream(stream, rig.frames(), replace(options, target=target), progress(f"target {target}"))
        ours = Settled.of(told)
        samples.append(asdict(ours))
        fits = [
            (one.visual_tokens or 0.0, i)
            for i, one in enumerate(outcomes)
            if (missed := one.missed(target)) is not None and missed <= ALLOWED
        ]
        best = max(fits, key=lambda row: (row[0], -row[1])) if fits else None
        held.append(
            {
                "target": asdict(target),
                "miss_percent": _percent(ours.missed(target)),
                "visual_tokens": ours.visual_tokens,
                "first_token_ms": percentiles(list(ours.first_ms)),
                "frame_age_ms": percentiles(list(ours.age_ms)),
                "decisions": told["decisions"],
                "best_fixed": best[1] if best else None,
                "share_of_best": (ours.visual_tokens or 0.0) / best[0] if best and best[0] else None,
            }
        )
    return {
        "sweep": [
            {
                "budget": setting.budget,
                "frame_tokens": setting.frame_tokens,
                "stride": setting.stride,
                "cache": setting.cache,
                "miss_percent": _percent(outcome.missed(targets[0])),
                "visual_tokens": outcome.visual_tokens,
                "first_token_ms": percentiles(list(outcome.first_ms)),
                "frame_age_ms": percentiles(list(outcome.age_ms)),
            }
            for setting, outcome in zip(settings, outcomes, strict=True)
        ],
        "held": held,
        "sweep_samples": samples,
    }


def _targets(free: Settled) -> list[LatencyTarget]:
    needed = max(free.first_ms, default=0.0) + (float(np.quantile(free.age_ms, 0.99)) if free.age_ms else 0.0)
    return [LatencyTarget(max(times * needed, 1e-3), max(times * needed, 1e-3)) for times in TIMES]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _named(setting: Setting) -> str:
    return f"budget {setting.budget}, {setting.frame_tokens} tokens a frame, {setting.cache}"
