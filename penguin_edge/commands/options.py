"""Flags that several verbs share: each declared once, with one type and one default."""

from __future__ import annotations

import argparse

from penguin_edge.commands.common import above_zero, positive, share
from penguin_edge.runtime.core.options import FOLLOWS, SHRINKS, SessionOptions, StreamOptions
from penguin_edge.tra.clip import MODES
from penguin_edge.tra.stream import STREAM_MODES

MAX_SEQ_LEN = 4096
"""KV positions of a checkpoint that is run, or exported, without a wish."""


def add_engine(parser: argparse._ActionsContainer) -> None:
    """The flags of whatever answers: threads, and the KV positions of a checkpoint."""
    add_threads(parser)
    parser.add_argument(
        "--max-seq-len", type=positive, default=MAX_SEQ_LEN, metavar="N", help="for a checkpoint; a bundle has its own"
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    """The flag of an engine's threads."""
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of the engine (default: all cores)")


def add_budget(parser: argparse._ActionsContainer, what: str, *, usage: bool, required: bool = False) -> None:
    """The flag of a budget.

    Args:
        what: what the budget is for, for the reader.
        usage: whether a number below 1 is an error of usage; otherwise the planner refuses it, with exit code 1.
    """
    kind = positive if usage else int
    parser.add_argument("--budget", type=kind, required=required, metavar="N", help=f"visual tokens {what}")


def add_tra(parser: argparse._ActionsContainer) -> None:
    """The flag of how clips are planned."""
    default = SessionOptions().tra
    parser.add_argument("--tra", choices=MODES, default=default, help="default: %(default)s")


def add_keep_visual(parser: argparse._ActionsContainer, note: str = "") -> None:
    """The flag of the share of visual tokens that is kept; `note` says where verbs differ."""
    parser.add_argument(
        "--keep-visual",
        type=share,
        metavar="FRACTION",
        help="lossy: of each frame or picture give the decoder only this share of its visual tokens, those least like "
        f"another one, at their own positions; budgets count what is kept (default: all){note}",
    )


def add_fps(
    parser: argparse._ActionsContainer, default: float | None = None, note: str = "%(default)s", *, usage: bool
) -> None:
    """The flag of the rate at which frames are taken.

    Args:
        note: what holds without the flag, for the reader.
        usage: whether a number of 0 or below is an error of usage; otherwise the reader of clips refuses it.
    """
    kind = above_zero if usage else float
    parser.add_argument(
        "--fps", type=kind, default=default, metavar="X", help=f"frames taken per second (default: {note})"
    )


def add_window(parser: argparse._ActionsContainer) -> None:
    """The flags of a stream's window."""
    usual = StreamOptions()
    parser.add_argument(
        "--window", type=above_zero, default=usual.window_s, metavar="S", help="seconds kept (default: %(default)s)"
    )
    for name, words, default in (
        ("--tra", STREAM_MODES, usual.tra),
        ("--shrink", ("auto", *SHRINKS), usual.shrink),
        ("--cache", ("auto", *FOLLOWS), usual.cache),
    ):
        note = f"; auto is {words[1]} until a latency target asks for more" if words[0] == "auto" else ""
        parser.add_argument(name, choices=words, default=default, help=f"default: %(default)s{note}")


def add_media_limits(parser: argparse._ActionsContainer) -> None:
    """The flags for every verb that reads media named on its command line."""
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="most pixels of a picture (default: 134 million) or of a clip's frame (33.5 million)",
    )
    parser.add_argument("--max-packets", type=positive, metavar="N", help="most packets of a clip (16.8 million)")


def checked_max_pixels(args: argparse.Namespace) -> int | None:
    """Apply the flag's value to the whole process, since Pillow has a limit of its own, and return it."""
    if args.max_pixels is not None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = max(args.max_pixels, Image.MAX_IMAGE_PIXELS or 0)
    pixels: int | None = args.max_pixels
    return pixels


def add_json(parser: argparse._ActionsContainer, what: str = "print one JSON object as the last line") -> None:
    """The flag of a result as JSON; `what` says where verbs differ."""
    parser.add_argument("--json", action="store_true", help=what)


def add_allow_outside(parser: argparse._ActionsContainer) -> None:
    """The flag for every verb that reads annotations."""
    parser.add_argument(
        "--allow-outside", action="store_true", help="take media that annotations name outside their own folder"
    )
