"""`penguin-edge bench`: every stage of a model alone, or a stream with questions, in milliseconds with raw samples."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penguin_edge.bundle import Bundle
from penguin_edge.commands.common import emit, is_bundle, open_model, positive, say, table
from penguin_edge.commands.stream import seconds_of
from penguin_edge.errors import InputError
from penguin_edge.frames import Frame
from penguin_edge.machine import describe, human_bytes, peak_mb, resident_mb
from penguin_edge.runtime.bench import SCHEMA, BenchOptions, Row, bench_model, read_bandwidth
from penguin_edge.runtime.bench_stream import Brake, SlowedEngine, StreamOptions, bench_stream
from penguin_edge.runtime.control import LatencyTarget
from penguin_edge.runtime.cost import CostModel
from penguin_edge.runtime.live import Live
from penguin_edge.runtime.profile import load, profile
from penguin_edge.runtime.sources import is_live, read_source
from penguin_edge.runtime.stream import StreamSession


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = BenchOptions()
    parser = verbs.add_parser("bench", help="measure every stage of a model, or a stream with questions")
    parser.add_argument("model", metavar="BUNDLE|CHECKPOINT")
    parser.add_argument("-p", "--prompts", type=_counts, default=defaults.prompts, metavar="64,256", help="prompts")
    parser.add_argument("-n", "--tokens", type=positive, default=defaults.tokens, help="steps (default: %(default)s)")
    parser.add_argument(
        "-d", "--depths", type=_counts, default=defaults.depths, metavar="0,1024", help="depths of them"
    )
    parser.add_argument("--repeat", type=positive, default=defaults.repeat, help="rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="rounds before them (default: %(default)s)")
    parser.add_argument("--stream", metavar="CLIP", help="stream this clip, again and again, and ask every 2 s instead")
    parser.add_argument("--fps", type=seconds_of, default=1.0, help="frames per second (default: %(default)s)")
    parser.add_argument("--duration", type=seconds_of, default=30.0, metavar="S", help="default: %(default)s s")
    parser.add_argument("--budget", type=positive, metavar="T", help="visual tokens at any time (default: the model's)")
    parser.add_argument("--window", type=seconds_of, default=60.0, metavar="S", help="default: %(default)s s")
    parser.add_argument("--shrink", choices=("encode", "pool"), default="encode", help="default: %(default)s")
    parser.add_argument("--cache", choices=("recompute", "rebase"), default="recompute", help="default: %(default)s")
    parser.add_argument(
        "--target-first-token",
        type=seconds_of,
        metavar="MS",
        help="adapt sizes, budget and rate so that answers begin within this",
    )
    parser.add_argument(
        "--target-frame", type=seconds_of, metavar="MS", help="and frames are ready within this (default: as answers)"
    )
    parser.add_argument("--slow-down", metavar="FACTOR@SECOND", help="make every stage so much slower from then on")
    parser.add_argument("--threads", type=positive, help="threads of the engine (default: all cores)")
    parser.add_argument("--max-seq-len", type=positive, default=4096, help="for a checkpoint; a bundle has its own")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE.json", help="write it there, too; for `compare`")
    parser.set_defaults(run=run)


def _counts(text: str) -> tuple[int, ...]:
    """argparse type: whole numbers, separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 64,256") from None


def slow_down(text: str | None) -> tuple[float, float] | None:
    """FACTOR@SECOND.

    Raises:
        InputError: of another form, or a machine that gets faster.
    """
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        factor, second = (float(part) for part in text.split("@"))
        if 1 <= factor < 1e6 and 0 <= second < 1e9:
            return factor, second
    raise InputError(f"--slow-down {text}: wanted FACTOR@SECOND, such as 2@10, with a factor of at least 1")


def run(args: argparse.Namespace) -> int:
    slow = slow_down(args.slow_down)
    if (slow or args.target_first_token or args.target_frame) and not args.stream:
        raise InputError("--slow-down, --target-first-token and --target-frame are for --stream CLIP")
    if args.target_frame and not args.target_first_token:
        raise InputError("--target-frame goes with --target-first-token MS")
    if args.stream and is_live(args.stream):
        raise InputError(f"{args.stream}: a live source shows other pictures each time; name a clip, or use `stream`")
    begin = time.monotonic()
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=args.max_seq_len)
    bundle = Bundle.read(args.model) if is_bundle(args.model) else None
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "what": "stream" if args.stream else "model",
        "model": args.model,
        "engine": engine.name,
        "precision": bundle.manifest.precision if bundle else None,
        "threads": args.threads,
        "disk_bytes": sum(entry.bytes for entry in bundle.manifest.files.values()) if bundle else None,
        "machine": describe(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if args.stream:
        brake = Brake(*slow) if slow else None
        slowed = SlowedEngine(engine, brake) if brake else engine
        session = StreamSession(
            slowed,
            tokenizer,
            budget=args.budget,
            window_s=args.window,
            shrink=args.shrink,
            cache=args.cache,
            answer_tokens=16,
        )
        target = cost = None
        if args.target_first_token:
            # A frame that is late makes the answer late that waits for it.
            target = LatencyTarget(args.target_first_token, args.target_frame or args.target_first_token)
            cost = load(bundle) if bundle else None
            if cost is None:
                say("no profile of this machine is kept with the model: measuring one")
                cost = CostModel.from_json(profile(engine, repeat=2, progress=_line)["cost"])
        options = StreamOptions(args.duration, target=target, cost=cost, brake=brake)
        result |= bench_stream(session, _looped(args), options, _follow(args.duration))
        result["peak_mb"] = peak_mb()
        _stream_table(result)
    else:
        choice = BenchOptions(args.prompts, args.tokens, args.depths, args.repeat, args.warmup)
        rows = bench_model(engine, choice, _line)
        bandwidth = read_bandwidth(args.threads or result["machine"]["cores"])
        result |= {"rows": [row.to_json() for row in rows], "read_gb_s": bandwidth}
        result |= {"resident_mb": resident_mb(), "peak_mb": peak_mb(), "seconds": time.monotonic() - begin}
        _model_table(rows, result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        emit(result)
    return 0


def _looped(args: argparse.Namespace) -> Iterator[Frame]:
    return read_source(args.stream, fps=args.fps, loop=True)


def _line(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _follow(duration: float) -> Any:
    def follow(at: float, live: Live) -> None:
        stats = live.stats
        _line(f"{at:.0f} of {duration:.0f} s: {stats.processed} frames ready, {sum(stats.dropped.values())} dropped")

    return follow


def _ms(values: dict[str, float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in values.values()]


def _model_table(rows: list[Row], result: dict[str, Any]) -> None:
    _line("")
    shown: list[tuple[str, ...]] = [("", "p50 ms", "p95", "p99", "per second")]
    for row in rows:
        data = row.to_json()
        shown.append((row.test, *_ms(data["ms"]), f"{data['per_s']:.1f}"))
    print(table(shown, indent=""))
    disk = f", {human_bytes(result['disk_bytes'])} on disk" if result["disk_bytes"] else ""
    print(
        f"{result['engine']}{disk}, resident {result['resident_mb']:.0f} MB, at most {result['peak_mb']:.0f} MB; this "
        f"machine reads {result['read_gb_s']:.1f} GB/s"
    )


def _stream_table(result: dict[str, Any]) -> None:
    _line("")
    shown = [
        ("", "p50 ms", "p95", "p99"),
        ("frame age", *_ms(result["frame_age_ms"])),
        ("first token, running stream", *_ms(result["first_token_ms"]["warm"])),
        ("first token, new session", *_ms(result["first_token_ms"]["cold"])),
    ]
    print(table(shown, indent=""))
    late = f"{result['deadline_misses']} of {result['deadlines']} deadlines missed; " if result["deadlines"] else ""
    print(
        f"frames: {result['frames_processed']} of {result['frames_in']}, {result['frames_dropped']} dropped; {late}"
        f"visual tokens at most {result['max_live_visual_tokens']} of {result['budget']}; per frame "
        f"{result['reencodings_per_frame']:.2f} encoded again, {result['reprefilled_tokens_per_frame']:.1f} tokens "
        "prefilled again"
    )
    for one in result["decisions"]:
        say(f"{one['time']:7.1f} s  {one['from']} -> {one['to']}: {one['reason']}")
    say(f"resident {result['memory_mb'] or 0:.0f} MB, at most {result['peak_mb']:.0f} MB")
