"""Options of sessions and streams: each name, type and default written here alone, and held against its rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, get_args

from penguin_edge.errors import BudgetError, InputError
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.schema import LARGEST, Flag, Maybe, Real, Text, Whole
from penguin_edge.tra.clip import MODES, Mode, Policy
from penguin_edge.tra.keeping import check_keep
from penguin_edge.tra.stream import STREAM_MODES, StreamMode

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Shrink = Literal["encode", "pool"]
Follow = Literal["recompute", "rebase"]
SHRINKS: tuple[Shrink, ...] = get_args(Shrink)
FOLLOWS: tuple[Follow, ...] = get_args(Follow)
Options = TypeVar("Options", bound="DataclassInstance")


def given_options(kind: type[Options], options: Options | None, changes: Mapping[str, Any]) -> Options:
    """Options with changes by name; None: the defaults.

    Raises:
        InputError: no options of this kind, or a name that there is none of.
    """
    if options is None:
        options = kind()
    if not isinstance(options, kind):
        raise InputError(f"options: {type(options).__name__}, wanted {kind.__name__}")
    known = [field.name for field in fields(kind)]
    for name in changes:
        if name not in known:
            raise InputError(f"there is no option {name!r}; known: {', '.join(known)}")
    return replace(options, **changes) if changes else options


COUNT = Maybe(Whole(1))


def _check_budget(budget: int | None) -> None:
    check_options(budget=(budget, Maybe(Whole(-LARGEST))))
    if budget is not None and budget < 1:
        raise BudgetError(f"a budget of {budget} visual tokens holds nothing; wanted at least 1")


@dataclass(frozen=True)
class SessionOptions:
    """How a session plans its prompts."""

    budget: int | None = None
    """Visual tokens of a prompt; None takes what the context leaves."""
    tra: Mode = "adaptive"
    """How clips are planned; see the top of `penguin_edge.tra.clip`."""
    max_frames: int | None = None
    """Pushed frames that are kept; None takes the model's number."""
    thinking: bool = False
    """Leave out the empty think block."""
    shared_image_size: bool = False
    """Give all images of a prompt the first one's size, as the reference does."""
    max_pixels: int | None = None
    """Most pixels of a picture or of a clip's frame; None takes the limits of `read_image` and `read_video`."""
    max_packets: int | None = None
    """Most packets of a clip; None takes the limit of `read_video`."""
    policy: Policy | None = None
    """Plans clips instead of TRA."""
    keep_visual: float | None = None
    """Share of the visual tokens of each picture and frame that enters the decoder, above 0 and at most 1: those that
    are least like another one, at their own positions. Lossy. None keeps all. Budgets count what is kept."""

    def __post_init__(self) -> None:
        if self.tra not in MODES:
            raise InputError(f"tra mode {self.tra!r} is unknown; known: {', '.join(MODES)}")
        check_options(
            max_frames=(self.max_frames, COUNT),
            max_pixels=(self.max_pixels, COUNT),
            max_packets=(self.max_packets, COUNT),
            thinking=(self.thinking, Flag()),
            shared_image_size=(self.shared_image_size, Flag()),
        )
        if self.policy is not None and not callable(self.policy):
            raise InputError(f"policy: {type(self.policy).__name__}, wanted a function that plans a clip, or None")
        _check_budget(self.budget)
        check_keep(self.keep_visual)


@dataclass(frozen=True)
class StreamOptions:
    """What a stream keeps, and how it follows what changes."""

    budget: int | None = None
    """Visual tokens of the window at any time; None takes the model's number. What the context leaves beside time
    stamps, question and answer is a limit of its own."""
    tra: StreamMode = "adaptive"
    """How the window is planned; see the top of `penguin_edge.tra.stream`."""
    window_s: float = 60.0
    """Seconds that frames are kept."""
    max_frames: int | None = None
    """Frames that are kept; None takes the model's number."""
    shrink: Shrink | Literal["auto"] = "auto"
    """What is done with a frame that gets smaller: `encode` its pixels again, or `pool` its features. `auto` is
    `encode`, until a latency controller says otherwise."""
    cache: Follow | Literal["auto"] = "auto"
    """How the KV cache follows: `recompute` or `rebase`; see the top of `stream.py`. `auto` is `recompute`, until a
    latency controller says otherwise."""
    question_tokens: int = 128
    """Positions that are kept free for a question."""
    answer_tokens: int = 128
    """Positions that are kept free for an answer."""
    thinking: bool = False
    """Leave out the empty think block."""
    keep_visual: float | None = None
    """As in `SessionOptions`. Not with `shrink="pool"`."""

    def __post_init__(self) -> None:
        check_options(
            question_tokens=(self.question_tokens, Whole()),
            answer_tokens=(self.answer_tokens, Whole()),
            window_s=(self.window_s, Real(above=0)),
            max_frames=(self.max_frames, COUNT),
            thinking=(self.thinking, Flag()),
        )
        if self.tra not in STREAM_MODES:
            raise InputError(f"a stream has no tra mode {self.tra!r}; known: {', '.join(STREAM_MODES)}")
        if self.shrink not in (*SHRINKS, "auto"):
            raise InputError(f"frames cannot be shrunk by {self.shrink!r}; known: {', '.join(SHRINKS)}, auto")
        if self.cache not in (*FOLLOWS, "auto"):
            raise InputError(f"the cache cannot follow by {self.cache!r}; known: {', '.join(FOLLOWS)}, auto")
        _check_budget(self.budget)
        check_keep(self.keep_visual)
        if self.keep_visual is not None and self.shrink == "pool":
            raise InputError(
                "shrink='pool' takes means over all tokens of a frame, and keep_visual leaves some of them out; take "
                "shrink='encode', or leave out keep_visual"
            )


class SessionChanges(TypedDict, total=False):
    """`SessionOptions` by name, where a call takes them one by one."""

    budget: int | None
    tra: Mode
    max_frames: int | None
    thinking: bool
    shared_image_size: bool
    max_pixels: int | None
    max_packets: int | None
    policy: Policy | None
    keep_visual: float | None


class StreamChanges(TypedDict, total=False):
    """`StreamOptions` by name."""

    budget: int | None
    tra: StreamMode
    window_s: float
    max_frames: int | None
    shrink: Shrink | Literal["auto"]
    cache: Follow | Literal["auto"]
    question_tokens: int
    answer_tokens: int
    thinking: bool
    keep_visual: float | None


PROMPT = Text(longest=LARGEST)
"""Rule of a question."""
