"""`penguin-edge stream`: questions about a clip, a camera or a network stream while it runs."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penguin_edge.commands import latency
from penguin_edge.commands.common import (
    above_zero,
    check_outputs,
    emit,
    open_model,
    positive,
    say,
    status,
)
from penguin_edge.commands.options import (
    add_budget,
    add_engine,
    add_fps,
    add_json,
    add_keep_visual,
    add_media_limits,
    add_window,
    checked_max_pixels,
)
from penguin_edge.errors import InputError
from penguin_edge.machine import keep_heap_compact, peak_mb
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.bench.streams import phases_per_frame
from penguin_edge.runtime.core.options import StreamOptions
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.live.events import Observers
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.live_options import LiveOptions
from penguin_edge.runtime.live.sources import Timed, is_live, paced, read_source, without_password
from penguin_edge.runtime.live.view import View
from penguin_edge.runtime.live.view_server import PORT, ViewServer, socket_at
from penguin_edge.runtime.live.watch import Watch
from penguin_edge.runtime.stream import Stream

ANSWERS = 1000
"""Most answers kept for `--json`: the last ones."""
EVERY_SECONDS = 0.5
"""Seconds between status lines on a terminal; elsewhere ten times as long."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("stream", help="ask about a clip, a camera or a network stream while it runs")
    parser.add_argument("model", metavar="BUNDLE|CHECKPOINT")
    parser.add_argument("--source", required=True, metavar="F", help="clip, folder of pictures, /dev/video0, rtsp://…")
    parser.add_argument("--prompt", metavar="TEXT", help="the question; asked at the end unless said otherwise")
    parser.add_argument("--every", type=above_zero, metavar="S", help="ask every S seconds of the stream")
    parser.add_argument(
        "--on-change", action="store_true", help="ask at key frames, with --every at least S seconds apart"
    )
    add_fps(parser, 1.0, usage=True)
    parser.add_argument("--loop", action="store_true", help="begin the clip again when it ends")
    parser.add_argument(
        "--fast", action="store_true", help="read a clip as fast as it can be processed, dropping nothing"
    )
    parser.add_argument("--duration", type=above_zero, metavar="S", help="stop after S seconds of the stream")
    add_budget(parser, "at any time (default: the model's)", usage=True)
    add_window(parser)
    add_keep_visual(parser, "; not with --shrink pool")
    add_media_limits(parser)
    parser.add_argument(
        "--queue", type=positive, default=LiveOptions().queued, help="most frames that wait (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, help="most tokens of an answer (default: %(default)s)"
    )
    latency.add(parser)
    add_engine(parser)
    parser.add_argument(
        "--ui",
        action="store_true",
        help="show the stream on a page of this machine alone, and take questions there; it stays after the source has "
        "ended, until Ctrl-C, unless --duration or --json says when to stop",
    )
    parser.add_argument(
        "--port", type=port_of, metavar="N", help=f"port of the page; 0: any free one (default: {PORT})"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def port_of(text: str) -> int:
    """argparse type: a port of this machine, or 0."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; wanted 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> int:
    check_outputs(args, ["trace"], ["model", "source"])
    live_source = is_live(args.source)
    if (args.every or args.on_change) and not args.prompt:
        raise InputError("--every and --on-change ask a question; name it with --prompt TEXT")
    if live_source and (args.fast or args.loop):
        raise InputError(f"{args.source}: a live source has its own speed and no end; leave out --fast and --loop")
    if args.port is not None and not args.ui:
        raise InputError("--port names the port of the page; add --ui to show the page")
    target = latency.target(args)
    keep_heap_compact()
    frames = Timed(
        read_source(
            args.source,
            fps=args.fps,
            loop=args.loop,
            note=say,
            max_pixels=checked_max_pixels(args),
            max_packets=args.max_packets,
        )
    )
    # Before the model is loaded: a port that is taken is said at once.
    bound = socket_at(PORT if args.port is None else args.port) if args.ui else None
    options = SamplingOptions(args.max_new_tokens)
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=args.max_seq_len)
    kept = StreamOptions(
        budget=args.budget,
        window_s=args.window,
        tra=args.tra,
        shrink=args.shrink,
        cache=args.cache,
        answer_tokens=args.max_new_tokens,
        keep_visual=args.keep_visual,
    )
    stream = Stream(engine, tokenizer, kept)
    answers: deque[dict[str, Any]] = deque(maxlen=ANSWERS)
    code = 0
    view = View(_named(args.source), f"{Path(args.model).name} on {engine.name}")
    cost = latency.cost(args.model, engine, args.threads) if target else None
    with contextlib.ExitStack() as opened:
        told = [latency.trace(args, opened), *([view] if bound is not None else [])]
        size = frames.size() if target is not None and not live_source else None
        taken = LiveOptions(queued=args.queue, target=target, cost=cost, rate=args.fps, size=size)
        live = opened.enter_context(Live(stream, taken, observer=Observers(*told)))
        live.wait()  # for the engine to be warm
        server = None
        if bound is not None:
            server = opened.enter_context(ViewServer(view, live, bound, options=options, note=_note))
            say(f"live view: {server.address}")
        watch = None
        if args.every or args.on_change:
            watch = live.watch(args.prompt, every=args.every, on_change=args.on_change, options=options)
            reader = threading.Thread(target=_read, args=(watch, answers), daemon=True)
            reader.start()
        try:
            _feed(live, frames if args.fast or live_source else paced(frames), args)
            live.wait()
            if args.prompt and watch is None:
                _ask(live, args.prompt, options, answers)
            view.phase = "ended"
            if server is not None and args.duration is None and not args.json:
                _note(f"the source has ended; {server.address} stays until Ctrl-C")
                server.wait()
        except KeyboardInterrupt:
            code = 130
        live.close()
        if watch is not None:
            reader.join()
    decisions = [decision.to_json() for decision in live.control.decisions] if live.control else []
    result = {
        **live.status(),
        **_costs(stream, None if live_source else frames.ms_per_frame),
        "decisions": decisions,
        "answers": list(answers),
    }
    result |= {"peak_mb": peak_mb(), "engine": engine.name}
    _report(result)
    if args.json:
        emit(result)
    return code


def _feed(live: Live, frames: Iterator[Frame], args: argparse.Namespace) -> None:
    shown = 0.0
    first: float | None = None
    for frame in frames:
        at = frame.time or 0.0
        first = at if first is None else first
        if args.duration is not None and at - first >= args.duration:
            break
        live.push(frame)
        if args.fast:
            live.wait()
        pause = EVERY_SECONDS * (1 if sys.stderr.isatty() else 10)
        if time.monotonic() - shown >= pause:
            shown = time.monotonic()
            _line(live, at)


def _line(live: Live, at: float) -> None:
    now = live.status()
    age = "-" if now["age_ms"] is None else f"{now['age_ms']:.0f} ms"
    dropped = sum(now["frames_dropped"].values())
    text = (
        f"{at:8.1f} s  frames {now['frames_processed']} ready, {dropped} dropped, {now['frames_kept']} kept  visual "
        f"tokens {now['visual_tokens']}/{now['budget']}  cache {now['kv_tokens']}/{now['capacity']}  age {age}"
    )
    if live.control is not None:
        setting = live.control.setting
        text += f"  frames of at most {setting.frame_tokens} tokens, 1 in {setting.stride}"
    (status if sys.stderr.isatty() else say)(text)


def _read(watch: Watch, answers: deque[dict[str, Any]]) -> None:
    for answer in watch:
        _show(answer.time, answer.text)
        answers.append({"time": answer.time, "text": answer.text, "first_token_ms": answer.report.first_token_ms})


def _ask(live: Live, prompt: str, options: SamplingOptions, answers: deque[dict[str, Any]]) -> None:
    text, first, asked = "", None, time.monotonic()
    for token in live.ask(prompt, options=options, wait=True):
        # Not the stream's report, which may be of a question from the page by now.
        first = 1e3 * (time.monotonic() - asked) if first is None else first
        text += token.text
    at = live.stream.times[-1] if live.stream.times else None
    _show(at, text)
    answers.append({"time": at, "text": text, "first_token_ms": first})


def _named(source: str) -> str:
    """A source without the user and password of its address."""
    return without_password(source) if is_live(source) else Path(source).name


def _note(text: str) -> None:
    """Print a line that does not end up behind the status line."""
    _clear()
    say(text)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _show(at: float | None, text: str) -> None:
    _clear()
    print(f"[{at or 0.0:.1f} s] {text.strip()}", flush=True)


def _costs(stream: Stream, read_ms: float | None) -> dict[str, Any]:
    """What the stream cost; `read_ms` is what reading a frame of a clip took, in the thread that reads it."""
    stats = stream.stats
    frames = max(1, stats.frames)
    return {
        "max_live_visual_tokens": stats.max_visual_tokens,
        "saved_against_all_key": stream.planner.saved_share,
        "reencodings_per_frame": stats.reencoded / frames,
        "reprefilled_tokens_per_frame": stats.reprefilled_tokens / frames,
        "given_up": dict(stats.given_up),
        "phases_ms_per_frame": phases_per_frame(stream, read_ms),
    }


def _report(result: dict[str, Any]) -> None:
    say()
    dropped = ", ".join(f"{count} {reason}" for reason, count in result["frames_dropped"].items()) or "none"
    left = ", ".join(f"{count} {reason}" for reason, count in result["given_up"].items()) or "none"
    say(f"{result['engine']}: {result['frames_processed']} of {result['frames_in']} frames; dropped unseen: {dropped}")
    say(
        f"  kept {result['frames_kept']}, {result['visual_tokens']} visual tokens, at most "
        f"{result['max_live_visual_tokens']} of {result['budget']}; left the window: {left}"
    )
    phases = [f"{name} {ms:.1f}" for name, ms in result["phases_ms_per_frame"].items()]
    say(
        f"  per frame: {result['reencodings_per_frame']:.2f} encoded again, "
        f"{result['reprefilled_tokens_per_frame']:.1f} tokens prefilled again; ms: {', '.join(phases)}"
    )
    asked = [answer["first_token_ms"] for answer in result["answers"] if answer["first_token_ms"] is not None]
    if asked:
        middle = sorted(asked)[len(asked) // 2]
        say(f"  {len(asked)} answers, first token after {middle:.0f} ms (median)")
    say(f"  peak memory {result['peak_mb']:.0f} MB")
