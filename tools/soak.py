"""Hours of a stream, faster than the clock: does anything grow, and are answers those of a session that just began?

    python tools/soak.py out/nano --source street.mp4 --minutes 20 --json soak.json

A clip is looped as a stream of `--hours` at `--fps`, spread over `--minutes` of real time, with a question every
`--every` seconds of the stream. At `--checks` moments the same question is asked of a second engine that has never seen
the stream, over the same frames at the same sizes: under `recompute` its tokens have to be the same ones.

Judged over the last 40 % of the run, when everything that is bounded is full: resident memory by least squares, in MB
per hour of the stream, and the items of all containers that can be reached from it. Exits 1 when a bar is missed. Heap
and buffers fill for two hours, and resident memory wobbles by a megabyte or two: five hours tell a slope from that.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.folder import Bundle
from penguin_edge.machine import keep_heap_compact, peak_mb, resident_mb
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.sources import read_source
from penguin_edge.runtime.stream import Stream

QUESTIONS = ("What is happening now?", "Where is it?", "What was there before?", "How many are there?")
SETTLED = 0.6
"""Share of the run that is not judged."""
MB_PER_HOUR = 1.0


def items(root: Any) -> int:
    """Items in all containers that can be reached from an object without leaving the project's own."""
    seen: set[int] = set()
    left, count = [root], 0
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict | OrderedDict):
            count += len(one)
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | deque):
            count += len(one)
            left += one
        elif type(one).__module__.startswith("penguin_edge") and hasattr(one, "__dict__"):
            left += vars(one).values()
    return count


def fresh(of: Stream, other: Stream, question: str, options: SamplingOptions) -> list[int]:
    """Tokens of an answer about the same frames, encoded and prefilled by another engine."""
    other.forget_features()
    other.planner, other._stream = of.planner, of._stream
    other._frames[:], other._numbers[:] = of._frames, of._numbers
    return [token.id for token in other.ask(question, options=options)]


def slope(samples: NDArray[np.float64], column: int) -> float:
    """Per hour, by least squares over what is judged."""
    judged = samples[int(SETTLED * len(samples)) :]
    return float(np.polyfit(judged[:, 0] / 3600, judged[:, column], 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--source", required=True)
    parser.add_argument("--hours", type=float, default=1.0, help="of the stream")
    parser.add_argument("--minutes", type=float, default=20.0, help="of real time, at least")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--budget", type=int, default=600)
    parser.add_argument("--cache", choices=("recompute", "rebase"), default="recompute")
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--checks", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    keep_heap_compact()
    bundle = Bundle.read(args.bundle)
    session = Stream.open(bundle, threads=args.threads, budget=args.budget, cache=args.cache)
    other = Stream(open_engine(bundle, threads=args.threads), session.tokenizer, budget=args.budget)
    options = SamplingOptions(max_new_tokens=16)
    frames, seconds = round(3600 * args.hours * args.fps), 3600 * args.hours
    step = round(10 * args.fps)
    # Seconds of the stream, MB, items of containers, Python's objects. Made beforehand: it is not to grow meanwhile.
    samples = np.full((-(-frames // step), 4), np.nan)
    same = compared = equal = tokens = 0
    questions, first_ms = 0, np.zeros(int(seconds / args.every) + 1)
    begin = time.monotonic()
    with Live(session, queued=8) as live:
        for i, frame in enumerate(read_source(args.source, fps=args.fps, loop=True)):
            if i == frames:
                break
            live.push(frame)
            live.wait()
            at = i / args.fps
            asked = int(at / args.every)
            if asked > int((i - 1) / args.fps / args.every):
                question = QUESTIONS[asked % len(QUESTIONS)]
                answer = [token.id for token in live.ask(question, options=options)]
                live.wait()
                first_ms[questions] = session.report.first_token_ms or 0.0
                questions += 1
                if int(args.checks * at / seconds) > int(args.checks * (at - args.every) / seconds):
                    wanted = fresh(session, other, question, options)
                    compared, same = compared + 1, same + (answer == wanted)
                    tokens += max(len(answer), len(wanted))
                    equal += sum(a == b for a, b in zip(answer, wanted, strict=False))
            if i % step == 0:
                gc.collect()
                samples[i // step] = at, resident_mb(), items(live), len(gc.get_objects())
                left = (time.monotonic() - begin) * (frames - i) / max(1, i) / 60
                line = f"{at:.0f} of {seconds:.0f} s, {left:.0f} min left, {samples[i // step, 1]:.1f} MB"
                print(f"\r\x1b[K{line}, {same}/{compared} equal", end="", file=sys.stderr, flush=True)
            ahead = begin + 60 * args.minutes * i / frames - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
        dropped = dict(live.stats.dropped)
    print(file=sys.stderr)
    stats = session.stats
    result = {
        "bundle": Path(args.bundle).name,
        "cache": args.cache,
        "hours": args.hours,
        "real_minutes": (time.monotonic() - begin) / 60,
        "frames": stats.frames,
        "dropped": dropped,
        "questions": questions,
        "max_visual_tokens": stats.max_visual_tokens,
        "budget": args.budget,
        "memory_slope_mb_per_h": slope(samples, 1),
        "resident_mb": samples[-1, 1],
        "peak_mb": peak_mb(),
        "container_items_per_h": slope(samples, 2),
        "container_items": samples[-1, 2],
        "python_objects_per_h": slope(samples, 3),
        "python_objects": samples[-1, 3],
        "answers_compared": compared,
        "answers_equal": same,
        "tokens_compared": tokens,
        "tokens_equal": equal,
        "first_token_ms_p50": float(np.median(first_ms[:questions])),
        "memory_mb": samples[:, :2].tolist(),
    }
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "memory_mb"}, indent=1))
    # A window that breathes has no trend: its items may differ by what one frame brings.
    grown = result["memory_slope_mb_per_h"] >= MB_PER_HOUR or slope(samples, 2) > 0.02 * samples[-1, 2]
    return int(grown or stats.max_visual_tokens > args.budget or (args.cache == "recompute" and same < compared))


if __name__ == "__main__":
    sys.exit(main())
