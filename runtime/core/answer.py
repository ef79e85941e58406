"""An answer on its way: what it is made from, how its tokens come, and how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from penguin_edge.config import PenguinConfig
from penguin_edge.errors import BusyError, InputError, PenguinError
from penguin_edge.guard import Guard
from penguin_edge.prompt.chat import Piece, frame_tag
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.media import Clip, Picture
from penguin_edge.runtime.core.report import Report
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.cache import Visual
from penguin_edge.tra.clip import DROPPED, KEY, Plan
from penguin_edge.tra.keeping import kept_tokens
from penguin_edge.tra.layout import LabelledClip, Size


@dataclass(frozen=True)
class Token:
    """One decoded token; `text` may be empty while a character is incomplete."""

    id: int
    text: str


class UnusablePicture(PenguinError):
    """A picture or frame whose features are not finite; `visuals` say which."""

    def __init__(self, visuals: Sequence[Visual]) -> None:
        super().__init__(
            f"the encoder gave NaN or infinite numbers for {len(visuals)} of the pictures or frames, which therefore "
            "cannot be used; run `penguin-edge verify` on the bundle, and if that passes export it in a wider "
            "precision (--quant fp32)"
        )
        self.visuals = tuple(visuals)


@dataclass(frozen=True)
class Layout:
    """A prompt planned under a visual budget; `length` counts all of its tokens, `visual_tokens` those of pictures.

    `references` has the key frame that each visual is compared with, as `Features.compute` takes them.
    """

    pieces: list[Piece]
    visuals: list[Visual]
    references: list[Visual | None]
    plans: list[Plan]
    budget: int
    length: int
    visual_tokens: int

    @property
    def encoded_tokens(self) -> int:
        """Visual tokens that the encoder gives, whether they are kept or not."""
        return sum(visual.tokens for visual in self.visuals)

    @property
    def span(self) -> int:
        """Rotary positions from the first token to the one behind the last: what is left out leaves gaps."""
        return self.length + self.encoded_tokens - self.visual_tokens


def layout(
    pieces: list[Piece],
    visuals: list[Visual],
    references: list[Visual | None],
    plans: list[Plan],
    budget: int,
    tokenizer: Tokenizer,
    keep: float | None,
) -> Layout:
    """A prompt with its length in tokens, where the share `keep` of each visual's is kept; None: all."""
    kept = sum(kept_tokens(visual.tokens, keep) for visual in visuals)
    return Layout(pieces, visuals, references, plans, budget, len(tokenizer.encode_pieces(pieces)), kept)


def kept_visuals(clip: Clip, plan: Plan) -> list[Visual]:
    """The frames that a plan keeps, at its sizes, in order."""
    sizes = [(frame.height, frame.width) for frame in plan.frames if frame.kind != DROPPED]
    return [Visual(name, *size, clip.merge_size) for name, size in zip(clip.kept(plan), sizes, strict=True)]


def key_frames(visuals: Sequence[Visual], plan: Plan) -> list[Visual | None]:
    """For each frame that a plan keeps, the last key frame up to it; None before the first one."""
    found: list[Visual | None] = []
    last = None
    for visual, kind in zip(visuals, (f.kind for f in plan.frames if f.kind != DROPPED), strict=True):
        last = visual if kind == KEY else last
        found.append(last)
    return found


def check_keep_visual(engine: Engine, keep: float | None) -> None:
    """Refuse to leave visual tokens out where the graphs know no positions with gaps.

    Raises:
        InputError: they do not, and a share is to be kept.
    """
    if keep is not None and not engine.can_place:
        raise InputError(
            f"{engine.name} cannot leave out visual tokens with this bundle, whose decoder takes no positions: it was "
            "exported before that was known; export the model again, or leave out keep_visual"
        )


def refuse_media(config: PenguinConfig, given: bool) -> None:
    """Refuse pictures where the model reads text only.

    Raises:
        InputError: it does, and there are some.
    """
    if given and config.vision is None:
        raise InputError("this model reads text only; leave out images, clips and frames")


@contextlib.contextmanager
def ending(report: Report) -> Iterator[None]:
    """Write into the report that an answer ended with an error."""
    try:
        yield
    except Exception:
        report.finish_reason = "error"
        raise


Render = Callable[[list[Plan], list[int]], list[Piece]]
"""From the clips' plans and the token count of every image and frame to the pieces of the prompt."""


class Answering(Generator[Token, None, None]):
    """The tokens of an answer, each computed when it is asked for, under the session's guard."""

    def __init__(self, guard: Guard, tokens: Generator[Token, None, None]) -> None:
        self._guard, self._tokens = guard, tokens

    def send(self, value: None) -> Token:
        with self._guard:
            return self._tokens.send(value)

    def throw(self, *error: Any) -> Token:
        with self._guard:
            return self._tokens.throw(*error)

    def close(self) -> None:
        try:
            self._tokens.close()
        except ValueError:  # It is running, in another thread.
            raise BusyError("the answer's next token is being computed; close it when that has come") from None


def largest_fit(
    fit: Callable[[int], Layout], least: int, wanted: int, capacity: int, fits: Callable[[Layout], bool]
) -> Layout:
    """The layout of the largest budget up to `wanted` and `capacity`, to within a part in 64, that `fits`.

    A smaller budget drops frames and with them their time stamps: the length follows, so halve the interval.
    """
    best = fit(least)
    low, high = least, min(wanted, max(capacity, 1))
    while high - low > max(1, high // 64):
        middle = (low + high) // 2
        attempt = fit(middle)
        if fits(attempt):
            low, best = middle, attempt
        else:
            high = middle
    return best


def describe(report: Report, media: list[Picture | Clip], layout: Layout, tokenizer: Tokenizer) -> None:
    """Write what an answer is about into its report."""
    report.budget = layout.budget
    report.images = sum(isinstance(item, Picture) for item in media)
    report.visual_tokens, report.encoded_tokens = layout.visual_tokens, layout.encoded_tokens
    clips = [item for item in media if isinstance(item, Clip)]
    for clip, plan in zip(clips, layout.plans, strict=True):
        report.frames += len(plan.frames)
        report.keys += plan.keys
        report.intermediates += plan.intermediates
        report.dropped += plan.dropped
        report.notes += plan.notes
        times = [time for time in clip.times if time is not None]
        if len(times) < len(clip.times):
            report.notes.append("the frames have no times: the prompt says nothing of when they were")
        elif times != sorted(times):
            report.notes.append("the frames' times go back: the prompt has them as they came")
        tags = [frame_tag(t) for t, f in zip(clip.times, plan.frames, strict=True) if f.kind != DROPPED]
        report.timestamp_tokens += sum(len(tokenizer.encode(("," if i else "") + tag)) for i, tag in enumerate(tags))


def shapes(media: Sequence[Picture | Clip]) -> list[Size | LabelledClip]:
    """What the planner needs to know of each medium."""
    return [item if isinstance(item, Clip) else item.size for item in media]
