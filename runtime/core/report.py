"""What an answer or a stream cost: counts, and where the time went.

Times are monotonic nanoseconds inside, milliseconds outside.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

PHASES = ("decode_image", "decode_video", "plan", "preprocess", "encode", "project", "prefill", "other")
"""The parts of the time to the first token, in order; `other` is what the rest of them leaves."""


class Clock:
    """Adds up nanoseconds per phase."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            self.spent[phase] += time.monotonic_ns() - begin


@dataclass
class Report:
    """One answer. `budget` and `visual_tokens` count visual tokens that enter the decoder, `encoded_tokens` those that
    the encoder gave; `timestamp_tokens` are text and come on top."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "unfinished"
    frames: int = 0
    keys: int = 0
    intermediates: int = 0
    dropped: int = 0
    images: int = 0
    visual_tokens: int = 0
    encoded_tokens: int = 0
    budget: int = 0
    timestamp_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    phases_ms: dict[str, float] = field(default_factory=dict)
    first_token_ms: float | None = None
    tokens_per_s: float | None = None
    token_ms: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class StreamStats:
    """What a stream has cost since it began."""

    frames: int = 0
    encoded: int = 0
    """Frames through the encoder, shrunk ones included."""
    reencoded: int = 0
    """Frames that got another size, by the encoder or by pooling."""
    prefilled_tokens: int = 0
    reprefilled_tokens: int = 0
    """Those of them that stand behind a frame that changed or went: all but the frames that had just arrived."""
    moved_tokens: int = 0
    max_visual_tokens: int = 0
    given_up: Counter[str] = field(default_factory=Counter)
    """Frames that left the window, by reason: `window`, `full`, `dropped`, `size`, `time`, `unusable`."""


@dataclass(frozen=True)
class Kept:
    """A frame of the window: its number counts all frames that were worked on, `tokens` are what is kept of it now."""

    number: int
    time: float
    kind: str
    tokens: int


@dataclass(frozen=True)
class Work:
    """What one frame made the engine do: `pixels` as it came; (frames, patches of each) of every call of the encoder;
    positions prefilled after `past`, in so many `pieces` that are not neighbours."""

    pixels: int
    encoded: tuple[tuple[int, int], ...]
    prefilled: int
    past: int
    pieces: int = 1
    moved: int = 0
    """Positions of the cache that were given another place."""
