"""Records to training samples: sizes and pixels as at inference, ids, and which of them are targets.

| field            | shape      | dtype   | meaning                                                       |
|------------------|------------|---------|---------------------------------------------------------------|
| `input_ids`      | `[S]`      | int64   | the whole conversation, image tokens repeated                 |
| `labels`         | `[S]`      | int64   | the same id where it is a target, -100 elsewhere; not shifted |
| `Patches.pixels` | `[P, 588]` | float32 | one entry of `visuals` per image or frame, in prompt order    |

Source: `_process_text_with_label` of the reference (`penguinvl/model/processor.py`) and its data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.config import PenguinConfig
from penguin_edge.dataset.records import DataRecord
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.frames import read_image, read_video
from penguin_edge.media.preprocess import Patches, preprocess_image
from penguin_edge.prompt.chat import (
    EMPTY_THINK,
    Message,
    Piece,
    VisualTokens,
    message_fields,
    part_kind,
    parts_of,
    render,
)
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.tra.clip import DROPPED, KEY, MODES, KeyFrameDetector, Mode, Plan
from penguin_edge.tra.layout import (
    Fit,
    LabelledClip,
    Size,
    detection_mode,
    fit_media,
    media_source,
    spell_out,
    token_count,
)

NO_TARGET = -100
KEPT_BYTES = 64 << 20
"""Bytes up to which a clip is decoded once; a larger one is decoded again, frame by frame, for its pixels."""
THINK = "<think>"

Ids = NDArray[np.int64]
Pixels = NDArray[np.uint8]


class SampleTooLong(InputError):
    """A sample of more ids than the model is trained on; it is left out whole, never cut inside an image."""


@dataclass(frozen=True)
class DataOptions:
    """How records become samples.

    `mm_max_length` is the budget of visual tokens of one sample. `fps`, `max_frames` and `min_tokens` None take the
    model's own numbers, which are those of inference. `shared_image_size` gives all images of a record the size of the
    first one; with it and `tra="reference"` samples are those of the reference.
    """

    model_max_length: int = 16_384
    mm_max_length: int = 10_240
    fps: float | None = None
    max_frames: int | None = None
    min_tokens: int | None = None
    tra: Mode = "strict"
    shared_image_size: bool = False
    tight_share: float = 0.0
    """Share of the clips that are built under a budget between a sixteenth and all of their tokens: a model that is to
    answer under any budget must have learned under any."""


@dataclass(frozen=True)
class Sample:
    """One conversation ready to be packed; the table of this file has shapes and dtypes."""

    id: str
    input_ids: Ids
    labels: Ids
    visuals: tuple[Patches, ...]


def encode_conversation(
    messages: Sequence[Message],
    visual_tokens: Sequence[int],
    tokenizer: Tokenizer,
    *,
    reference_captions: bool = False,
) -> tuple[Ids, Ids]:
    """Ids and labels `[S]` of a conversation whose clips are spelled out as frames.

    Targets are the answers with their `<|im_end|>`, without the newline behind it. An answer without `<think>` gets the
    empty think block in front, which is no target. Never a target: image tokens and the token after each, `<think>` and
    a newline token directly after it. Of a caption (role None) all text is a target.

    Args:
        visual_tokens: tokens of each image and frame in order of appearance.
        reference_captions: leave out the first three and the last token of a caption as well, as the reference does.
    Raises:
        InputError: a malformed message, or a wrong number of visual token counts.
    """
    ids: list[int] = []
    labels: list[int] = []
    marks = _Marks.of(tokenizer)
    counts = iter(visual_tokens)
    for message in messages:
        role, _ = message_fields(message)
        pieces = render([message], generation_prompt=False)
        given = [next(counts, None) if isinstance(piece, VisualTokens) else 0 for piece in pieces]
        if None in given:
            raise InputError(
                f"{len(visual_tokens)} images and frames were given, fewer than the conversation names; wanted one each"
            )
        pieces = [
            VisualTokens(n or 0, 0) if isinstance(p, VisualTokens) else p for p, n in zip(pieces, given, strict=True)
        ]
        head, body, tail = (tokenizer.encode_pieces(part) for part in _split(role, pieces))
        ids += head + body + tail
        targets = marks.masked(body)
        if role is None and reference_captions:
            targets = [NO_TARGET] * 3 + targets[3:-1] + [NO_TARGET]
        labels += [NO_TARGET] * len(head) + targets + [NO_TARGET] * len(tail)
    left = len(list(counts))
    if left:
        raise InputError(f"{len(visual_tokens)} images and frames were given, {left} more than the conversation names")
    return np.array(ids, np.int64), np.array(labels, np.int64)


def _split(role: str | None, pieces: list[Piece]) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """The pieces of one message: before its targets, its targets, and after them.

    The generation prompt is a piece of its own, so that its tokens are those of inference whatever character the
    answer begins with.
    """
    if role is None:
        return [], pieces, []
    if role != "assistant":
        return pieces, [], []
    start, first, *rest = pieces
    header = "assistant\n"
    assert isinstance(first, str)
    answer: list[Piece] = [first.removeprefix(header), *rest[:-1]]
    if not any(isinstance(piece, str) and THINK in piece for piece in answer):
        header += EMPTY_THINK
    return [start, header], answer, rest[-1:]


@dataclass(frozen=True)
class _Marks:
    """Tokens beside which nothing is a target; `think` is None in a vocabulary without one."""

    image: int
    newline: int
    think: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Marks:
        think = tokenizer.encode(THINK)
        return cls(tokenizer.image_token_id, tokenizer.encode("\n")[-1], think[0] if len(think) == 1 else None)

    def masked(self, answer: list[int]) -> list[int]:
        """The ids of an answer as labels."""
        labels = list(answer)
        for i, token in enumerate(answer):
            previous = answer[i - 1] if i else -1
            after_think = self.think is not None and previous == self.think and token == self.newline
            if self.image in (token, previous) or token == self.think or after_think:
                labels[i] = NO_TARGET
        return labels


class SampleBuilder:
    """Builds one sample per call; keeps nothing between calls, so it may be copied to worker processes."""

    def __init__(self, config: PenguinConfig, tokenizer: Tokenizer, options: DataOptions | None = None) -> None:
        self.options = options = options or DataOptions()
        if options.tra not in MODES:
            raise InputError(f"tra mode {options.tra!r} is unknown; known: {', '.join(MODES)}")
        for name in ("model_max_length", "mm_max_length"):
            if getattr(options, name) < 1:
                raise InputError(f"{name} is {getattr(options, name)}, wanted at least 1")
        if not 0 <= options.tight_share <= 1:
            raise InputError(f"tight_share is {options.tight_share}, wanted a share between 0 and 1")
        numbers = {"fps": options.fps, "max_frames": options.max_frames, "min_tokens": options.min_tokens}
        given: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
        self.config = replace(config, image=replace(config.image, **given))
        self.tokenizer = tokenizer

    def __call__(self, record: DataRecord) -> Sample:
        """Raises:
        InputError: media that are missing, unreadable or too many for the budget; names record, file and line.
        SampleTooLong: more ids than `model_max_length`.
        """
        try:
            return self._build(record)
        except InputError as error:
            raise type(error)(f"{record.name}: {error}") from error

    def _build(self, record: DataRecord) -> Sample:
        options = self.options
        media = [self._open(part) for part in parts_of(record.messages) if part_kind(part) != "text"]
        if media and self.config.vision is None:
            raise InputError("the model reads text only; leave out records with images and clips")
        budget = min(options.mm_max_length, self.config.image.max_tokens)
        if budget < len(media):
            raise BudgetError(
                f"{len(media)} images and clips for {budget} visual tokens, wanted at least one token each; "
                "raise mm_max_length"
            )
        shapes = [item.shape for item in media]
        fit_to = partial(
            fit_media, shapes, config=self.config, tra=options.tra, shared_image_size=options.shared_image_size
        )
        fit = fit_to(budget)
        counts = _counts(media, fit)
        draw = _draw(record)
        if draw < options.tight_share and any(isinstance(shape, LabelledClip) for shape in shapes):
            fit = fit_to(max(len(media), int(sum(counts) * 16 ** -(draw / options.tight_share))))
            counts = _counts(media, fit)
        ids, labels = encode_conversation(spell_out(record.messages, shapes, fit.plans), counts, self.tokenizer)
        if len(ids) > options.model_max_length:
            raise SampleTooLong(
                f"{len(ids)} tokens ({sum(counts)} of them visual), model_max_length is {options.model_max_length}; "
                "raise it, lower mm_max_length, or shorten the text"
            )
        plans = iter(fit.plans)
        visuals = []
        for item, sizes in zip(media, fit.sizes, strict=True):
            frames = item.frames(next(plans) if isinstance(item.shape, LabelledClip) else None)
            for pixels, size in zip(frames, sizes, strict=True):
                visuals.append(preprocess_image(pixels, self.config.image, item.merge_size, size))
        return Sample(record.id, ids, labels, tuple(visuals))

    def _open(self, part: dict[str, Any]) -> _Medium:
        source, options = media_source(part, self.config.image)
        if options is None:
            pixels = read_image(source).pixels
            return _Medium((pixels.shape[0], pixels.shape[1]), self.config.image.image_merge_size, [pixels])
        clip = LabelledClip(self.config.image.video_merge_size, KeyFrameDetector(detection_mode(self.options.tra)))
        kept: list[Pixels] | None = []
        for frame in read_video(source, **options):
            clip.add(frame)
            if kept is not None:
                kept.append(frame.pixels)
                if len(kept) * frame.pixels.nbytes > KEPT_BYTES:
                    kept = None
        return _Medium(clip, clip.merge_size, kept, lambda: (frame.pixels for frame in read_video(source, **options)))


def _draw(record: DataRecord) -> float:
    """A number in [0, 1) that belongs to the record."""
    return int.from_bytes(blake2b(record.id.encode(), digest_size=4).digest(), "big") / 2**32


def _counts(media: Sequence[_Medium], fit: Fit) -> list[int]:
    return [token_count(size, item.merge_size) for item, sizes in zip(media, fit.sizes, strict=True) for size in sizes]


@dataclass
class _Medium:
    """An image or a labelled clip; the native frames of a large clip are not kept but read again."""

    shape: Size | LabelledClip
    merge_size: int
    kept: list[Pixels] | None
    reopen: Callable[[], Iterator[Pixels]] = lambda: iter(())

    def frames(self, plan: Plan | None) -> Iterator[Pixels]:
        """Native pixels of what the plan keeps, in order; None keeps all."""
        native = iter(self.reopen() if self.kept is None else self.kept)
        for kind in [KEY] if plan is None else [frame.kind for frame in plan.frames]:
            pixels = next(native, None)
            if pixels is None:
                raise InputError("the clip changed while it was being read; run again")
            if kind != DROPPED:
                yield pixels
