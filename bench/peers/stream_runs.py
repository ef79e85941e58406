"""Runs of `penguin-edge bench --stream` on penguin-nano's own clips, and what its control held meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from clip_questions import Way, tokens_of

from penguin_edge.dataset.nano.build import FF_QP2LAMBDA
from penguin_edge.media.frames import Frame
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.stream import Stream


@dataclass(frozen=True)
class Machine:
    """A bundle on this machine, made `speed` times slower. `threads` None leaves the choice to the engine."""

    bundle: Path
    speed: float
    threads: int | None = None


@dataclass(frozen=True)
class Scene:
    """What is streamed: frames of `size` (height, width) pixels, `count` of them in a window."""

    clip: Path
    size: tuple[int, int]
    count: int
    fps: float
    factor: int
    duration_s: float

    @property
    def native(self) -> int:
        return tokens_of(self.size, self.factor)

    def window_s(self, frames: int, stride: int = 1) -> float:
        """Seconds that hold so many frames, and not one more."""
        return (frames - 0.5) * stride / self.fps

    def way(self, setting: dict[str, Any], mode: str, frame_tokens: int) -> Way:
        """A setting of the control in shares; `frame_tokens` are those that its largest frames come to."""
        cache, shrink = setting.get("cache", "recompute"), setting.get("shrink", "encode")
        return Way(
            setting["budget"] / (self.count * self.native),
            frame_tokens / self.native,
            setting["stride"],
            mode,
            cache,
            shrink,
            real=(cache, shrink) != ("recompute", "encode"),
        )


def largest_frame(engine: Engine, tokenizer: Tokenizer, scene: Scene, frame_tokens: int) -> int:
    """Tokens that a frame comes to in a stream that allows so many: sizes are few."""
    with Stream(engine, tokenizer) as stream:
        stream.frame_tokens = frame_tokens
        stream.push(np.zeros((*scene.size, 3), np.uint8), 0.0)
        return stream.visual_tokens


def write_clip(path: Path, frames: Sequence[Frame], fps: float) -> None:
    """An MPEG-4 file of these frames."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"flags": "+qscale", "global_quality": str(2 * FF_QP2LAMBDA)}
        stream = container.add_stream("mpeg4", rate=Fraction(fps).limit_denominator(1000), options=options)
        (stream.height, stream.width, _), stream.pix_fmt = frames[0].pixels.shape, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.pixels, format="rgb24")))
        container.mux(stream.encode())


def bench(machine: Machine, scene: Scene, *options: Any) -> dict[str, Any] | str:
    """What `penguin-edge bench --stream` measures, or its message where it ends with exit code 1."""
    what = [sys.executable, "-m", "penguin_edge", "bench", machine.bundle, "--stream", scene.clip, *options]
    what += ["--duration", scene.duration_s, "--json"]
    what += ["--slow-down", f"{machine.speed:g}@0"] if machine.speed != 1 else []
    what += ["--threads", machine.threads] if machine.threads else []
    done = subprocess.run([str(one) for one in what], capture_output=True, text=True, check=False)
    if done.returncode == 1:
        return done.stderr.strip().splitlines()[-1]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, what))}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def held(result: dict[str, Any], scene: Scene, last: float) -> list[tuple[dict[str, Any], float]]:
    """Settings of the control over the last seconds, and the share of that time of each."""
    decisions, end = result["decisions"], result["seconds"]
    begin = max(0.0, end - last)
    full = {"budget": result["budget"], "frame_tokens": min(scene.native, result["budget"]), "stride": 1}
    steps = [(0.0, decisions[0]["from"] if decisions else full)] + [(one["time"], one["to"]) for one in decisions]
    until = [at for at, _ in steps[1:]] + [end]
    spans = [(setting, min(end, to) - max(begin, at)) for (at, setting), to in zip(steps, until, strict=True)]
    return [(setting, span / (end - begin)) for setting, span in spans if span > 0]


def missed(result: dict[str, Any], target_ms: float, begin: float = 0.0) -> float | None:
    """Percent of deadlines from `begin` (seconds) on that were missed: of frames, of first tokens; a frame that was
    pushed out or given up was never ready."""
    line = result["timeline"]
    late = [one["age_ms"] > target_ms for one in line["frames"] if one["time"] >= begin]
    late += [one["first_token_ms"] > target_ms for one in line["questions"] if one["time"] >= begin]
    late += [True for one in line["dropped"] if one["reason"] in ("queue", "late") and one["time"] >= begin]
    return 100 * sum(late) / len(late) if late else None
