"""`penguin-edge run`: one answer about images, clips or text, streamed as it is decoded."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from penguin_edge.commands.common import emit, open_model, positive, say, table
from penguin_edge.commands.options import (
    add_budget,
    add_engine,
    add_fps,
    add_json,
    add_keep_visual,
    add_media_limits,
    add_tra,
    checked_max_pixels,
)
from penguin_edge.errors import InputError
from penguin_edge.files import read_json
from penguin_edge.media.places import existing, is_data, local_path
from penguin_edge.prompt.chat import Message, part_kind, parts_of
from penguin_edge.runtime.core.options import SessionOptions
from penguin_edge.runtime.core.report import PHASES, Report
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = SamplingOptions()
    parser = verbs.add_parser("run", help="ask about images, a clip, or just text")
    parser.add_argument("model", metavar="BUNDLE|CHECKPOINT")
    parser.add_argument("--video", action="append", default=[], metavar="F", help="clip; may be given several times")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="image; may be given several times")
    parser.add_argument("--prompt", metavar="TEXT", help="the question")
    parser.add_argument("--conversation", metavar="FILE.json", help="a conversation in the published format instead")
    parser.add_argument("--max-new-tokens", type=positive, default=defaults.max_new_tokens, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0 is off (default)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument(
        "--max-ms",
        type=float,
        metavar="MS",
        help="end the answer at the first token that comes MS milliseconds after the question or later",
    )
    add_engine(parser)
    add_fps(parser, note="the model's", usage=False)
    parser.add_argument("--max-frames", type=positive, help="most frames taken (default: the model's)")
    add_budget(parser, "(default: what the context leaves)", usage=False)
    add_tra(parser)
    add_keep_visual(parser)
    parser.add_argument("--thinking", action="store_true", help="let the model think: no empty think block")
    parser.add_argument(
        "--shared-image-size", action="store_true", help="the first image's size for all, as the reference"
    )
    add_media_limits(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def conversation(args: argparse.Namespace) -> list[Message]:
    """The messages that the flags ask for.

    Raises:
        InputError: neither or both of --prompt and --conversation, or an unreadable file.
    """
    if args.conversation:
        if args.prompt or args.video or args.image:
            raise InputError("--conversation brings its own text and media; leave out --prompt, --video and --image")
        messages = read_json(args.conversation, advice="wanted a list of messages")
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{args.conversation}: wanted a list of at least one message")
        return messages
    if args.prompt is None:
        raise InputError("nothing to answer; pass --prompt TEXT or --conversation FILE.json")
    parts: list[dict[str, Any]] = []
    for path in args.video:
        video = {"video_path": path, "fps": args.fps, "max_frames": args.max_frames}
        parts.append({"type": "video", "video": {key: value for key, value in video.items() if value is not None}})
    parts += [{"type": "image", "image": {"image_path": path}} for path in args.image]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": args.prompt}]}]


def run(args: argparse.Namespace) -> int:
    options = SamplingOptions(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed, args.max_ms)
    messages = conversation(args)
    for source in (*args.video, *args.image):
        if not is_data(source):
            existing(local_path(source), "a picture or a clip")
    begin = time.monotonic()
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=args.max_seq_len)
    planned = SessionOptions(
        budget=args.budget,
        tra=args.tra,
        thinking=args.thinking,
        shared_image_size=args.shared_image_size,
        max_pixels=checked_max_pixels(args),
        max_packets=args.max_packets,
        keep_visual=args.keep_visual,
    )
    session = Session(engine, tokenizer, planned)
    # Graphs are loaded at their first use, which would be booked under the first answer's parts.
    engine.load(media=any(part_kind(part) != "text" for part in parts_of(messages)))
    load_ms = 1e3 * (time.monotonic() - begin)
    answer = session.converse(messages, options)
    code = 0
    try:
        for token in answer:
            sys.stdout.write(token.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()
        session.report.finish_reason = "interrupted"
        code = 130
    print(flush=True)
    report(session.report, load_ms, engine.name)
    if args.json:
        emit({**session.report.to_json(), "load_ms": load_ms, "engine": engine.name})
    return code


def report(result: Report, load_ms: float, engine: str) -> None:
    """The short report on stderr."""
    for note in result.notes:
        say(f"note: {note}")
    say(f"\n{engine}: finished by {result.finish_reason} after {len(result.token_ids)} tokens")
    if result.frames:
        say(
            f"  frames {result.frames}: {result.keys} key, {result.intermediates} intermediate, {result.dropped} "
            "dropped; "
            f"{result.timestamp_tokens} text tokens of time stamps"
        )
    if result.frames or result.images:
        encoded = f", {result.encoded_tokens} encoded" if result.encoded_tokens != result.visual_tokens else ""
        say(f"  visual tokens {result.visual_tokens} of budget {result.budget}{encoded}")
    say(f"  prompt {result.prompt_tokens} tokens, {result.reused_tokens} reused; load {load_ms:.0f} ms")
    if result.first_token_ms is not None:
        phases = [(name, f"{result.phases_ms[name]:.1f}") for name in PHASES if result.phases_ms.get(name)]
        say(table([("time to first token, ms", f"{result.first_token_ms:.1f}"), *((f"  {n}", v) for n, v in phases)]))
    rate = f"{result.tokens_per_s:.1f} tokens/s" if result.tokens_per_s else "no rate (one token)"
    say(f"  decode {rate}; peak memory {result.peak_mb:.0f} MB")
