"""What the live view shows: the newest frames, the window, latencies, decisions and answers, each of bounded size.

The stream's worker calls `frame_ready` and `said`, which store a few numbers and a reference. Pictures are made where
`encode` is called, in the server's thread (`view_server.py`), and states where a page asks for one.

| held      | bound                                                               |
|-----------|---------------------------------------------------------------------|
| pictures  | `STORED` JPEGs, at most `WIDTH` pixels wide, and one frame's pixels |
| latencies | `POINTS` numbers each                                               |
| answers   | `ANSWERS` of at most `LONGEST` characters                           |
"""

from __future__ import annotations

import io
import secrets
import threading
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from penguin_edge.runtime.live.events import Observer, Ready, Said
from penguin_edge.runtime.live.live import Live

SHOTS, STORED, WIDTH, QUALITY = 12, 36, 320, 80
"""Pictures that are shown and that are kept, for a page that is late to fetch one; pixels; JPEG's own scale."""
POINTS = 120
ANSWERS, LONGEST = 20, 20_000
DECISIONS = 6
"""Newest decisions of the controller that are shown."""


@dataclass(frozen=True)
class Shot:
    """A frame's picture as JPEG, and what it was when it was ready."""

    number: int
    time: float
    kind: str
    tokens: int
    age_ms: float
    jpeg: bytes


@dataclass
class Spoken:
    """An answer so far; `version` tells which of two states of it is newer."""

    number: int
    prompt: str
    time: float | None
    version: int
    text: str = ""
    done: bool = False
    error: str = ""
    first_token_ms: float | None = None


class View(Observer):
    """See the top of this file. It is the observer of a `Live`; everything may be called from any thread."""

    def __init__(self, source: str = "", model: str = "") -> None:
        """
        Args:
            source: what is looked at, by a name for the reader.
            model: what answers, likewise.
        """
        self.source, self.model = source, model
        self.run = secrets.token_hex(4)
        """Tells one run of the program from the next, whose frames have the same numbers."""
        self.phase = "live"
        """`live`; `ended`: no more frames come, questions are still answered; `closed`."""
        self._lock = threading.Lock()
        self._newest: Ready | None = None
        self._pending: Ready | None = None
        self._shots: deque[Shot] = deque(maxlen=STORED)
        self._ages: deque[float] = deque(maxlen=POINTS)
        self._firsts: deque[float] = deque(maxlen=POINTS)
        self._answers: deque[Spoken] = deque(maxlen=ANSWERS)
        self._version = 0

    def frame_ready(self, ready: Ready) -> None:
        """A frame was worked on. Of its pixels a reference is kept until the next frame, or until it is drawn."""
        with self._lock:
            self._newest = self._pending = ready
            self._ages.append(round(ready.age_ms, 1))

    def said(self, said: Said) -> None:
        """A piece of an answer."""
        with self._lock:
            self._version += 1
            if not self._answers or self._answers[-1].number != said.number:
                self._answers.append(Spoken(said.number, said.prompt[:LONGEST], said.time, self._version))
            spoken = self._answers[-1]
            spoken.version, spoken.done, spoken.error = self._version, said.done, said.error
            spoken.text = (spoken.text + said.text)[:LONGEST]
            if said.first_token_ms is not None:
                spoken.first_token_ms = round(said.first_token_ms, 1)
                self._firsts.append(spoken.first_token_ms)

    def encode(self) -> bool:
        """Draw the newest frame if that was not done; whether there was one."""
        with self._lock:
            ready, self._pending = self._pending, None
        if ready is None:
            return False
        newest, age = ready.window[-1], round(ready.age_ms, 1)  # A window keeps its newest frame whatever the budget.
        shot = Shot(newest.number, newest.time, newest.kind, newest.tokens, age, thumbnail(ready.frame.pixels))
        with self._lock:
            self._shots.append(shot)
        return True

    def jpeg(self, number: int) -> bytes | None:
        """The picture of a frame; None when it is no longer, or not yet, there."""
        with self._lock:
            return next((shot.jpeg for shot in self._shots if shot.number == number), None)

    def answers(self, after: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Answers that changed after a version, oldest first, and the version now."""
        with self._lock:
            return self._version, [asdict(one) for one in self._answers if one.version > after]

    def state(self, live: Live) -> dict[str, Any]:
        """All but the answers, as JSON; sizes are those after the newest frame."""
        with self._lock:
            newest, ages, firsts = self._newest, list(self._ages), list(self._firsts)
            shots = [(one.number, one.time, one.kind, one.tokens, one.age_ms) for one in list(self._shots)[-SHOTS:]]
        window = [(one.number, round(one.time, 3), one.kind, one.tokens) for one in (newest.window if newest else ())]
        control = live.control
        return {
            "run": self.run,
            "phase": self.phase,
            "source": self.source,
            "model": self.model,
            **live.status(),
            "visual_tokens": sum(tokens for _, _, _, tokens in window),
            "frames_kept": len(window),
            "window": window,
            "shots": shots,
            "ages_ms": ages,
            "given_up": dict(live.stream.stats.given_up),
            "work_ms": round(newest.work_ms, 1) if newest else None,
            "firsts_ms": firsts,
            "target": None if control is None else asdict(control.target),
            "setting": None if control is None else asdict(control.setting),
            # A copy: the worker may add to them meanwhile.
            "decisions": [] if control is None else [one.to_json() for one in tuple(control.decisions)[-DECISIONS:]],
        }


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG of pixels [H, W, 3] uint8 RGB, at most `WIDTH` wide and twice that high."""
    image = Image.fromarray(pixels)
    image.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.BILINEAR, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
