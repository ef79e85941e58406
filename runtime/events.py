"""What a live stream tells whoever looks on, on its worker: each frame when it is ready, each answer piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

from penguin_edge.frames import Frame


@dataclass(frozen=True)
class Kept:
    """A frame of the window: its number counts all frames that were worked on, `tokens` is its size now."""

    number: int
    time: float
    kind: str
    tokens: int


@dataclass(frozen=True)
class Ready:
    """A frame that was worked on. `frame` is as it was pushed and belongs to the stream: read it, do not write it."""

    frame: Frame
    number: int
    age_ms: float
    """From `push` to the end of its prefill, which a latency target is about."""
    work_ms: float
    """The part of it that was work; the rest was waiting."""
    window: tuple[Kept, ...]
    """All frames that are kept now, this one the last."""


@dataclass(frozen=True)
class Said:
    """A piece of an answer: the first has no text, the last is `done`, with an `error` if there was one."""

    number: int
    prompt: str
    time: float | None
    """Time stamp of the newest frame that the answer is about, in seconds."""
    text: str = ""
    done: bool = False
    error: str = ""
    first_token_ms: float | None = None
    """From asking; with the last piece."""
