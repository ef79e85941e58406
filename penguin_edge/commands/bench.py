"""`penguin-edge bench`: every stage of a model alone, or a stream with questions, in milliseconds with raw samples."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands import bench_sweep, latency
from penguin_edge.commands.common import (
    above_zero,
    check_outputs,
    emit,
    is_bundle,
    open_model,
    positive,
    say,
    status,
    table,
)
from penguin_edge.commands.options import add_budget, add_engine, add_fps, add_json, add_window
from penguin_edge.errors import InputError
from penguin_edge.files import write_text
from penguin_edge.machine import describe, human_bytes, keep_heap_compact, peak_mb, resident_mb
from penguin_edge.media.frames import Frame
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.reports.bench import csv_text, html_text, require_matplotlib
from penguin_edge.runtime.bench.clips import QUESTION, VideoOptions, bench_video
from penguin_edge.runtime.bench.power import Meter
from penguin_edge.runtime.bench.stages import SCHEMA, BenchOptions, Traffic, bench_model, check_room, read_bandwidth
from penguin_edge.runtime.bench.streams import Brake, SlowedEngine, StreamRun, bench_stream
from penguin_edge.runtime.bench.sweep import Rig
from penguin_edge.runtime.core.options import SessionOptions, StreamOptions
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.latency.control import LatencyTarget
from penguin_edge.runtime.live.events import Observer
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.sources import is_live, read_source
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream

KV_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = BenchOptions()
    parser = verbs.add_parser("bench", help="measure every stage of a model, or a stream with questions")
    parser.add_argument("model", metavar="BUNDLE|CHECKPOINT")
    parser.add_argument(
        "-p", "--prompts", type=_counts, default=defaults.prompts, metavar="64,256", help="lengths of the prompts"
    )
    parser.add_argument("-n", "--tokens", type=positive, default=defaults.tokens, help="steps (default: %(default)s)")
    parser.add_argument(
        "-d", "--depths", type=_counts, default=defaults.depths, metavar="0,1024", help="KV cache depths of the steps"
    )
    parser.add_argument("--repeat", type=positive, default=defaults.repeat, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=defaults.warmup, help="rounds that are not counted (default: %(default)s)"
    )
    parser.add_argument("--video", metavar="F", help="also ask about this clip from end to end, cold and warm")
    parser.add_argument("--prompt", default=QUESTION, metavar="TEXT", help="the question (default: %(default)s)")
    parser.add_argument("--stream", metavar="CLIP", help="stream this clip, again and again, and ask every 2 s instead")
    add_fps(parser, note="the model's; 1 for a stream", usage=True)
    parser.add_argument("--duration", type=above_zero, default=30.0, metavar="S", help="default: %(default)s s")
    add_budget(parser, "for a stream, at any time", usage=True)
    add_window(parser)
    latency.add(parser)
    parser.add_argument(
        "--slow-down", metavar="FACTOR@SECOND", help="make every stage FACTOR times slower from SECOND on"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also run fixed settings, and the controller at several targets, --duration each, and compare them",
    )
    add_engine(parser)
    add_json(parser)
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE.json", help="also write the result to this file, for `compare`"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write every sample on a line of its own")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a report with pictures, in one file")
    parser.set_defaults(run=run)


def _counts(text: str) -> tuple[int, ...]:
    """argparse type: whole numbers, separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 64,256") from None


def slow_down(text: str | None) -> tuple[float, float] | None:
    """Parse FACTOR@SECOND.

    Raises:
        InputError: another form, or a factor below 1.
    """
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        factor, second = (float(part) for part in text.split("@"))
        if 1 <= factor < 1e6 and 0 <= second < 1e9:
            return factor, second
    raise InputError(f"--slow-down {text}: wanted FACTOR@SECOND, such as 2@10, with a factor of at least 1")


def run(args: argparse.Namespace) -> int:
    check_outputs(args, ["out", "csv", "html", "trace"], ["model", "video", "stream"])
    slow, target = slow_down(args.slow_down), latency.target(args)
    if (slow or target) and not args.stream:
        raise InputError("--slow-down and --target-first-token are for --stream CLIP")
    bench_sweep.check(args)
    if args.stream and args.video:
        raise InputError("--video and --stream are measured one at a time; leave out one of them")
    if args.stream and is_live(args.stream):
        raise InputError(f"{args.stream}: a live source shows other pictures each time; name a clip, or use `stream`")
    if args.video and not Path(args.video).exists():
        raise InputError(f"{args.video}: no such file; check the path")
    outputs = [path for path in (args.out, args.csv, args.html) if path]
    for path in outputs:
        check_output(path)
    if args.html:
        require_matplotlib()
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
        "load_ms": 1e3 * (time.monotonic() - begin),
        "machine": describe(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if args.stream:
        _stream(args, result, engine, tokenizer, slow, target)
        _stream_table(result)
        if args.sweep:
            bench_sweep.show(result)
    else:
        _model(args, result, engine, tokenizer, bundle)
        result["seconds"] = time.monotonic() - begin
        _model_table(result)
    if args.out:
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    if args.csv:
        write_text(args.csv, csv_text(result))
    if args.html:
        write_text(args.html, html_text(result))
    if args.json:
        emit(result)
    return 0


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        InputError: a folder, a file in a folder that is not there, or one that may not be written.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, wanted a file; name one in it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: its folder is not there; make it, or name a file in a folder that exists")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: its folder cannot be written; name a file in another one")


def traffic(bundle: Bundle | None, engine: Engine) -> Traffic | None:
    """Bytes that a step reads: a bundle's decoder files, or a checkpoint's parameters; None for anything else."""
    values = engine.config.text.kv_values
    if bundle is not None:
        manifest = bundle.manifest
        graph = manifest.graphs["decoder"].file
        # ONNX keeps the weights in a second file beside the graph.
        files = [entry.bytes for name, entry in manifest.files.items() if name.startswith(graph)]
        return Traffic(sum(files), values * KV_BYTES[manifest.kv_dtype])
    decoder = getattr(getattr(engine, "model", None), "decoder", None)
    if decoder is None:
        return None
    parameters = [(one.numel(), one.element_size()) for one in decoder.parameters()]
    return Traffic(sum(count * size for count, size in parameters), values * parameters[0][1])


def _model(
    args: argparse.Namespace, result: dict[str, Any], engine: Engine, tokenizer: Tokenizer, bundle: Bundle | None
) -> None:
    """Measure every stage alone, and the clip."""
    choice = BenchOptions(args.prompts, args.tokens, args.depths, args.repeat, args.warmup)
    check_room(engine, choice)
    video = None
    with Meter() as meter:
        if args.video:  # first: a clip that cannot be read is found out at once
            clip = VideoOptions(args.video, args.prompt, args.fps, args.tokens, args.repeat, args.warmup)
            planned = SessionOptions(budget=args.budget, tra=args.tra)
            video = bench_video(lambda: Session(engine, tokenizer, planned), clip, status)
        rows = bench_model(engine, choice, status, traffic(bundle, engine))
    result |= {
        "options": asdict(choice),
        "rows": [row.to_json() for row in rows],
        "video": video,
        "resident_mb": resident_mb(),
        "peak_mb": peak_mb(),
        **meter.to_json(),
        "timeline": {
            "power_w": [list(one) for one in meter.power],
            "temperature_c": [list(one) for one in meter.celsius],
        },
        "read_gb_s": read_bandwidth(args.threads or result["machine"]["cores"]),
    }


def _stream(
    args: argparse.Namespace,
    result: dict[str, Any],
    engine: Engine,
    tokenizer: Tokenizer,
    slow: tuple[float, float] | None,
    target: LatencyTarget | None,
) -> None:
    keep_heap_compact()
    brake = Brake(*slow) if slow else None
    used: Engine = SlowedEngine(engine, brake) if brake else engine
    kept = StreamOptions(
        budget=args.budget,
        window_s=args.window,
        tra=args.tra,
        shrink=args.shrink,
        cache=args.cache,
        answer_tokens=16,
    )

    def opened(budget: int | None) -> Stream:
        return Stream(used, tokenizer, replace(kept, budget=budget))

    cost = latency.cost(args.model, engine, args.threads) if target or args.sweep else None
    with contextlib.ExitStack() as files:
        trace = latency.trace(args, files)
        rate = args.fps or 1.0
        options = StreamRun(args.duration, target=target, cost=cost, rate=rate, brake=brake, observer=trace)
        with opened(args.budget) as stream:
            budget = stream.budget
            result |= bench_stream(stream, _looped(args), options, _follow(args.duration))
        if args.sweep:
            rig = Rig(opened, lambda: _looped(args))
            result |= bench_sweep.sweep(rig, budget, replace(options, observer=Observer()), target)
    result["options"] = {
        "source": args.stream,
        "fps": args.fps or 1.0,
        "duration_s": args.duration,
        "every_s": options.every_s,
        "answer_tokens": options.answer_tokens,
        "window_s": args.window,
        "shrink": args.shrink,
        "cache": args.cache,
        "target_first_token_ms": args.target_first_token,
        "target_frame_ms": target.frame_ms if target else None,
        "target_tokens_per_s": target.tokens_per_s if target else None,
        "slow_down": {"factor": slow[0], "after_s": slow[1]} if slow else None,
    }
    result["peak_mb"] = peak_mb()


def _looped(args: argparse.Namespace) -> Iterator[Frame]:
    return read_source(args.stream, fps=args.fps or 1.0, loop=True)


def _follow(duration: float) -> Any:
    def follow(at: float, live: Live) -> None:
        stats = live.stats
        status(f"{at:.0f} of {duration:.0f} s: {stats.processed} frames ready, {sum(stats.dropped.values())} dropped")

    return follow


def _ms(values: dict[str, float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in values.values()]


def _model_table(result: dict[str, Any]) -> None:
    status("")
    shown: list[tuple[str, ...]] = [("", "p50 ms", "p95", "p99", "per second", "GB/s")]
    for row in result["rows"]:
        rate = f"{row['gb_s']:.2f}" if row["gb_s"] else "-"
        shown.append((row["test"], *_ms(row["ms"]), f"{row['per_s']:.1f}", rate))
    print(table(shown, indent=""))
    if result["video"]:
        _video_table(result["video"])
    disk = f", {human_bytes(result['disk_bytes'])} on disk" if result["disk_bytes"] else ""
    print(
        f"{result['engine']}{disk}, resident {result['resident_mb']:.0f} MB, at most {result['peak_mb']:.0f} MB; this "
        f"machine reads {result['read_gb_s']:.1f} GB/s"
    )
    _sensors(result)


def _video_table(video: dict[str, Any]) -> None:
    shown = [
        ("", "p50 ms", "p95", "p99"),
        ("first token, cold", *_ms(video["first_token_ms"]["cold"])),
        ("first token, warm", *_ms(video["first_token_ms"]["warm"])),
        ("between tokens", *_ms(video["inter_token_ms"])),
    ]
    print(f"\n{video['source']}: {video['frames']} frames, {video['visual_tokens']} visual tokens")
    print(table(shown, indent=""))
    for kind, phases in video["phases_ms"].items():
        print(f"{kind}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in phases.items()) + " ms")
    if video["tpot_ms"]:
        print(f"per token after the first {video['tpot_ms']:.2f} ms, {video['tokens_per_s']:.1f} tokens/s")


def _sensors(result: dict[str, Any]) -> None:
    power, heat = result["power_w"], result["temperature_c"]
    if power:
        say(f"{power['mean']:.2f} W, at most {power['max']:.2f} ({result['sensors']['power']})")
    if heat:
        degrees = f"{heat['begin']:.0f} to {heat['end']:.0f} °C, at most {heat['max']:.0f}"
        say(f"{degrees} ({result['sensors']['temperature']})")


def _stream_table(result: dict[str, Any]) -> None:
    status("")
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
    _sensors(result)
