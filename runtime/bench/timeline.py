"""What a stream was like at each moment: one entry per frame that became ready or never did, and one per question.

Times are seconds since the stream began, ages and first tokens milliseconds.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from penguin_edge.runtime.bench.power import Meter
from penguin_edge.runtime.live.events import Dropped, Observer, Ready


@dataclass(frozen=True)
class FrameReady:
    """The stream right after a frame's prefill: `budget` is what held for this frame."""

    time: float
    age_ms: float
    budget: int
    visual_tokens: int
    kv_tokens: int


@dataclass
class Timeline(Observer):
    """All that a stream told; `begin` is that of `time.monotonic`."""

    begin: float = field(default_factory=time.monotonic)
    frames: list[FrameReady] = field(default_factory=list)
    questions: list[tuple[float, float]] = field(default_factory=list)
    """When each was asked, and its time to the first token."""
    dropped: list[tuple[float, str]] = field(default_factory=list)
    """When a frame was given up unseen, and why."""

    def start(self) -> None:
        """The stream begins now."""
        self.begin = time.monotonic()

    @property
    def age_ms(self) -> list[float]:
        """Ages of all frames; a deadline that is forgotten would count as kept."""
        return [one.age_ms for one in self.frames]

    def frame_ready(self, ready: Ready) -> None:
        now = time.monotonic() - self.begin
        self.frames.append(FrameReady(now, ready.age_ms, ready.budget, ready.visual_tokens, ready.kv_tokens))

    def frame_dropped(self, dropped: Dropped) -> None:
        self.dropped.append((time.monotonic() - self.begin, dropped.reason))

    def to_json(self, memory: list[tuple[float, float]], meter: Meter) -> dict[str, Any]:
        return {
            "frames": [asdict(one) for one in self.frames],
            "questions": [{"time": at, "first_token_ms": took} for at, took in self.questions],
            "dropped": [{"time": at, "reason": why} for at, why in self.dropped],
            "memory_mb": [list(one) for one in memory],
            "power_w": [list(one) for one in meter.power],
            "temperature_c": [list(one) for one in meter.celsius],
        }
