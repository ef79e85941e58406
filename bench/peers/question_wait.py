"""How long a question waits for the frame in work: with frames in slices, and with each frame in one piece.

    python bench/peers/question_wait.py BUNDLE --source CLIP --fps 2 --budget 400 [--questions 60] [--cache rebase]

Frames come at `--fps` by the wall clock; questions of one token at random moments, the same ones for both ways, which
take turns of ten questions. A line for each way: percentiles of the time from asking to the token, in milliseconds; the
last line is JSON with all samples.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from typing import Any

import numpy as np

from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.sources import paced, read_source
from penguin_edge.runtime.slices import Slices
from penguin_edge.runtime.stream import Stream

ONE = SamplingOptions(max_new_tokens=1)
TURN = 10
"""Questions of one way before the other one's turn."""


class Whole(Stream):
    """A stream whose frames are one slice each."""

    def slices(self, *frame: Any) -> Slices:
        found = super().slices(*frame)
        found.finish()
        return found


def asked(live: Live, count: int, chance: random.Random, apart_s: float) -> list[float]:
    """Milliseconds of each question to its token."""
    found = []
    for _ in range(count):
        time.sleep(apart_s * chance.uniform(0.5, 1.5))
        begin = time.monotonic()
        list(live.ask("What is happening now?", options=ONE))
        found.append(1e3 * (time.monotonic() - begin))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--source", required=True)
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--budget", type=int, default=400)
    parser.add_argument("--frame-tokens", type=int, help="most tokens of a frame")
    parser.add_argument("--cache", default="recompute")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--apart", type=float, default=1.0, help="mean seconds between questions")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    samples: dict[str, list[float]] = {"slices": [], "whole": []}
    chances = {name: random.Random(1) for name in samples}
    for turn in range(2 * -(-args.questions // TURN)):
        name = ("slices", "whole")[turn % 2]
        kind = Stream if name == "slices" else Whole
        stream = kind.open(args.bundle, threads=args.threads, budget=args.budget, cache=args.cache)
        stream.frame_tokens = args.frame_tokens
        over = threading.Event()
        with Live(stream) as live:

            def feed(live: Live = live, over: threading.Event = over) -> None:
                for frame in paced(read_source(args.source, fps=args.fps, loop=True)):
                    if over.is_set():
                        return
                    live.push(frame)

            camera = threading.Thread(target=feed, daemon=True)
            camera.start()
            time.sleep(8 / args.fps)  # until the window is full enough to change
            samples[name] += asked(live, TURN, chances[name], args.apart)
            over.set()
            camera.join()
        stream.engine.close()
    for name, found in samples.items():
        p50, p95, p99 = np.percentile(found, (50, 95, 99))
        print(
            f"{name:6} {len(found)} questions: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, at most {max(found):.1f} ms"
        )
    print(json.dumps(samples))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
