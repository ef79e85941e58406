"""`penguin-edge plan CLIP --budget N`: the TRA plan of a clip, in the terminal, as JSON and as a picture."""

from __future__ import annotations

import argparse

from penguin_edge.bundle.contract import Bounds
from penguin_edge.commands.common import check_outputs, emit, positive, say
from penguin_edge.commands.options import (
    add_budget,
    add_fps,
    add_json,
    add_keep_visual,
    add_media_limits,
    add_tra,
    checked_max_pixels,
)
from penguin_edge.config import ImageConfig, PenguinConfig
from penguin_edge.errors import InputError
from penguin_edge.runtime.core.media import Library
from penguin_edge.runtime.core.report import Clock


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = ImageConfig()
    parser = verbs.add_parser("plan", help="draw the TRA plan of a clip")
    parser.add_argument("clip", metavar="CLIP", help="video file, gif, or folder of images")
    add_budget(parser, "for the whole clip", usage=False, required=True)
    add_tra(parser)
    add_keep_visual(parser)
    add_fps(parser, defaults.fps, usage=False)
    parser.add_argument("--max-frames", type=positive, default=defaults.max_frames, help="default: %(default)s")
    parser.add_argument("--start", type=float, help="seconds")
    parser.add_argument("--end", type=float, help="seconds")
    parser.add_argument("--min-image-tokens", type=positive, default=defaults.min_tokens, help="default: %(default)s")
    add_media_limits(parser)
    parser.add_argument("-o", "--out", metavar="PNG", help="write a picture")
    add_json(parser, "print one JSON object instead of the drawing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from penguin_edge.reports.plan import draw_png, draw_terminal, plan_json

    check_outputs(args, ["out"], ["clip"])
    if args.budget < 1:
        raise InputError(f"--budget is {args.budget}; wanted at least 1 token")
    library = Library(
        ImageConfig(min_tokens=args.min_image_tokens), args.tra, checked_max_pixels(args), args.max_packets
    )
    options = {"fps": args.fps, "max_frames": args.max_frames, "start": args.start, "end": args.end}
    clip = library.clip(args.clip, options, Clock())
    times = [0.0 if time is None else time for time in clip.times]
    config = PenguinConfig(image=library.config)
    most = Bounds().max_patches // clip.merge_size**2
    plan = clip.plan(args.budget, args.tra, config, most, keep=args.keep_visual)
    if args.out:
        draw_png(plan, times, clip.similarities, args.out)
        say(f"picture: {args.out}")
    if args.json:
        emit(plan_json(plan, times, clip.similarities))
    else:
        print(draw_terminal(plan, times, clip.similarities))
    return 0
