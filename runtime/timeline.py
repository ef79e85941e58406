"""What a stream was like at each moment: one entry per frame that became ready or never did, and one per question.

Times are seconds since the stream began, ages and first tokens milliseconds.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import Any

from penguin_edge.runtime.power import Meter
from penguin_edge.runtime.stream import StreamSession


@dataclass(frozen=True)
class FrameReady:
    """The stream right after a frame's prefill: `budget` is what held for this frame."""

    time: float
    age_ms: float
    budget: int
    visual_tokens: int
    kv_tokens: int


@dataclass
class Timeline:
    """`begin` is that of `time.monotonic`."""

    session: StreamSession
    begin: float = field(default_factory=time.monotonic)
    frames: list[FrameReady] = field(default_factory=list)
    questions: list[tuple[float, float]] = field(default_factory=list)
    """When each was asked, and its time to the first token."""
    dropped: list[tuple[float, str]] = field(default_factory=list)
    """When a frame was given up unseen, and why."""

    def frame(self, age_ms: float) -> None:
        """A frame is ready; on the worker, which alone may look at the session."""
        session = self.session
        self.frames.append(
            FrameReady(
                time.monotonic() - self.begin,
                age_ms,
                session.planner.limits.budget,
                session.visual_tokens,
                session.cache.length,
            )
        )

    def to_json(self, memory: list[tuple[float, float]], meter: Meter) -> dict[str, Any]:
        return {
            "frames": [asdict(one) for one in self.frames],
            "questions": [{"time": at, "first_token_ms": took} for at, took in self.questions],
            "dropped": [{"time": at, "reason": why} for at, why in self.dropped],
            "memory_mb": [list(one) for one in memory],
            "power_w": [list(one) for one in meter.power],
            "temperature_c": [list(one) for one in meter.celsius],
        }


class Ages(deque[float]):
    """All ages of a stream; `Live` appends each on its worker when the frame is ready, and the timeline is told."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def append(self, age_ms: float, /) -> None:
        super().append(age_ms)
        self._timeline.frame(age_ms)


class Drops(Counter[str]):
    """Frames given up unseen, by reason; `Live` counts each when that happens, and the timeline is told."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def __setitem__(self, reason: str, count: int, /) -> None:
        now = time.monotonic() - self._timeline.begin
        self._timeline.dropped += [(now, reason)] * (count - self[reason])
        super().__setitem__(reason, count)
