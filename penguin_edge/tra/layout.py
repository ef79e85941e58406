"""Which size every image and frame of a prompt gets under one token budget, the same in training and at inference.

A clip is labelled frame by frame (`LabelledClip`) and planned once the budget is known; images come first and leave
the rest of the budget to clips. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from penguin_edge.config import PATCH, ImageConfig, PenguinConfig
from penguin_edge.errors import InputError
from penguin_edge.media.frames import Frame
from penguin_edge.media.places import shown
from penguin_edge.media.preprocess import image_size, image_sizes
from penguin_edge.prompt.chat import Message, message_fields, part_kind
from penguin_edge.tra.clip import DROPPED, KEY, KeyFrameDetector, Mode, Plan, Policy, plan_clip, size_ladder
from penguin_edge.tra.keeping import kept_tokens, most_encoded

Size = tuple[int, int]


def detection_mode(tra: Mode) -> Literal["exact", "fast"]:
    """How key frames are found: to the reference's bit only where its plans are asked for."""
    return "exact" if tra == "reference" else "fast"


@dataclass
class LabelledClip:
    """A sequence of frames of one size, labelled as they come; holds none of their pixels but the last key frame's."""

    merge_size: int
    detector: KeyFrameDetector
    times: list[float | None] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    similarities: list[float | None] = field(default_factory=list)
    size: Size = (0, 0)

    def add(self, frame: Frame) -> None:
        """Label one more frame.

        Raises:
            InputError: its size differs from that of the frames before.
        """
        size = (frame.pixels.shape[0], frame.pixels.shape[1])
        if self.kinds and size != self.size:
            raise InputError(
                f"a frame of {size[1]}x{size[0]} after frames of {self.size[1]}x{self.size[0]}; a clip keeps one size, "
                "resize the frames or begin a new clip"
            )
        self.size = size
        found = self.detector.push(frame.pixels)
        self.times.append(frame.time)
        self.kinds.append(found.kind)
        self.similarities.append(found.similarity)

    def remove(self, index: int) -> None:
        """Take a frame out again."""
        for values in (self.times, self.kinds, self.similarities):
            del values[index]

    def plan(
        self,
        budget: int,
        mode: Mode,
        config: PenguinConfig,
        max_tokens: int | None = None,
        policy: Policy | None = None,
        keep: float | None = None,
    ) -> Plan:
        """Sizes under `budget`; no frame above `max_tokens`, which graphs are compiled for, but in reference mode.

        A `policy` plans instead of TRA. `keep` is the share of a frame's tokens that is kept, None: all.
        """
        size = self.size
        if mode != "reference" and max_tokens is not None:
            size = cap_size(size, max_tokens, PATCH * self.merge_size)
        if policy is not None:
            return kept_plan(policy(self.kinds, size, budget, self.merge_size), keep)
        return plan_clip(
            len(self.kinds),
            self.kinds,
            size,
            budget,
            mode=mode,
            min_tokens=config.image.min_tokens,
            merge_size=self.merge_size,
            config=config.tra,
            keep=keep,
        )

    def part(self, plan: Plan, begin: int = 0, end: int | None = None) -> dict[str, Any]:
        """The content part of frames `begin` to `end`, as far as the plan keeps them."""
        kept = [i for i in range(len(self.kinds))[begin:end] if plan.frames[i].kind != DROPPED]
        times = [self.times[i] for i in kept]
        return {"type": "video", "num_frames": len(kept), "timestamps": [] if None in times else times}


def cap_size(size: Size, tokens: int, factor: int) -> Size:
    """`size` if it comes to at most so many visual tokens, of `factor` pixels along each side; else the largest size
    of its ladder that does, and one token at least."""
    largest = largest_size(size, tokens, factor)
    rows, columns = size_ladder(*size, factor)[-1]
    return size if largest == (rows * factor, columns * factor) else largest


def largest_size(size: Size, tokens: int, factor: int) -> Size:
    """The largest size of the ladder of `size` that comes to at most so many visual tokens, and to one at least."""
    rows, columns = [one for one in size_ladder(*size, factor) if one[0] * one[1] <= max(tokens, 1)][-1]
    return rows * factor, columns * factor


def kept_plan(plan: Plan, keep: float | None) -> Plan:
    """A plan of the same sizes that counts what is kept of each frame; None keeps all."""
    if keep is None:
        return plan
    frames = (
        replace(frame, tokens=kept_tokens((frame.height // plan.factor) * (frame.width // plan.factor), keep))
        for frame in plan.frames
    )
    return replace(plan, frames=tuple(frames))


def fit_image(size: Size, config: ImageConfig, limit: int) -> Size:
    """The reference's size if it stays within `limit` tokens, as encoded, else the strict planner's."""
    merge = config.image_merge_size
    height, width = image_size(*size, config, merge)
    if token_count((height, width), merge) <= limit:
        return height, width
    frame = plan_clip(1, [KEY], size, limit, min_tokens=config.min_tokens, merge_size=merge).frames[0]
    return frame.height, frame.width


def token_count(size: Size, merge_size: int) -> int:
    """Visual tokens of an image or frame of this target size."""
    return (size[0] // (PATCH * merge_size)) * (size[1] // (PATCH * merge_size))


@dataclass(frozen=True)
class Fit:
    """Target sizes of what each medium keeps (an image is one frame), and the plan of each clip, in order."""

    sizes: list[list[Size]]
    plans: list[Plan]


def fit_media(
    media: Sequence[Size | LabelledClip],
    limit: int,
    config: PenguinConfig,
    *,
    tra: Mode = "strict",
    shared_image_size: bool = False,
    max_patches: int | None = None,
    policy: Policy | None = None,
    keep: float | None = None,
) -> Fit:
    """Plan images (given by their native size) and clips, in order of appearance, under `limit` visual tokens.

    Args:
        shared_image_size: all images take the size computed for the first one, as in the reference.
        max_patches: bound on one image or frame of a compiled graph.
        policy: plans the clips instead of TRA.
        keep: share of the tokens of each image and frame that is kept and that `limit` counts; None: all.
    Raises:
        BudgetError: nothing is left for a medium.
    """
    image = config.image
    sizes: list[list[Size]] = [[] for _ in media]
    images = [(i, item) for i, item in enumerate(media) if not isinstance(item, LabelledClip)]
    clips = [(i, item) for i, item in enumerate(media) if isinstance(item, LabelledClip)]
    left = limit
    if shared_image_size and images:
        most = max(image.min_tokens * 2, min(limit, image.max_tokens))
        native = [size for _, size in images]
        shared = image_sizes(native, image, image.image_merge_size, shared=True, max_tokens=most)
        for (i, _), size in zip(images, shared, strict=True):
            sizes[i] = [size]
            left -= kept_tokens(token_count(size, image.image_merge_size), keep)
        images = []
    bound = most_encoded(limit, keep) if max_patches is None else max_patches // image.image_merge_size**2
    for rank, (i, native_size) in enumerate(images):
        # Each image may take an equal share of what is left; half of it stays for clips when there are any.
        share = (left // 2 if clips and left > len(media) else left - len(clips)) // (len(images) - rank)
        sizes[i] = [fit_image(native_size, image, max(1, min(most_encoded(max(1, share), keep), bound)))]
        left -= kept_tokens(token_count(sizes[i][0], image.image_merge_size), keep)
    plans = []
    weights = [len(clip.kinds) * clip.size[0] * clip.size[1] for _, clip in clips]
    for rank, (i, clip) in enumerate(clips):
        later = len(clips) - rank - 1  # one token at least for each of them
        share = max(1, min(left * weights[rank] // sum(weights[rank:]), left - later))
        most_tokens = None if max_patches is None else max_patches // clip.merge_size**2
        plan = clip.plan(share, tra, config, most_tokens, policy, keep)
        sizes[i] = [(frame.height, frame.width) for frame in plan.frames if frame.kind != DROPPED]
        left -= plan.total_tokens
        plans.append(plan)
    return Fit(sizes, plans)


def spell_out(
    messages: Iterable[Message], media: Sequence[Size | LabelledClip], plans: Sequence[Plan]
) -> list[Message]:
    """The messages with each clip written as the frames that its plan keeps. The caller's messages stay as they are.

    Raises:
        InputError: a malformed message.
    """
    source, remaining = iter(media), iter(plans)
    out = []
    for message in messages:
        content = message_fields(message)[1]
        if isinstance(content, str):
            out.append(message)
            continue
        parts = []
        for part in content:
            item = next(source) if part_kind(part) != "text" else None
            parts.append(item.part(next(remaining)) if isinstance(item, LabelledClip) else part)
        out.append({**message, "content": parts})
    return out


VIDEO_OPTIONS = ("video_path", "fps", "max_frames", "start_time", "end_time")
"""Keys of a part's `video` object."""


def media_source(part: dict[str, Any], config: ImageConfig) -> tuple[Any, dict[str, Any] | None]:
    """What an image or video part names, and for a clip the options of `read_video`.

    Parts: `{"type": "image", "image": PATH | bytes | PIL image | array | {"image_path": PATH}}` and
    `{"type": "video", "video": PATH | {"video_path": PATH[, "fps", "max_frames", "start_time", "end_time"]}}`. A path
    may be a `file:` address, that of an image a `data:` address.

    Raises:
        InputError: a part without a usable source.
    """
    wanted = None
    if part_kind(part) == "image":
        source = part.get("image")
        source = part.get("image_url") if source is None else source
        if isinstance(source, dict):
            source = source.get("image_path", source.get("url"))
    else:
        source = part.get("video")
        options = source if isinstance(source, dict) else {"video_path": source}
        unknown = [key for key in options if key not in VIDEO_OPTIONS] + [key for key in VIDEO_OPTIONS if key in part]
        if unknown:
            raise InputError(
                f"a video part has {shown(str(unknown[0]))!r} where it is not read; wanted "
                f'{{"type": "video", "video": {{"video_path": …}}}} with any of {", ".join(VIDEO_OPTIONS[1:])} in '
                "the inner object"
            )
        wanted = {
            "fps": options.get("fps", config.fps),
            "max_frames": options.get("max_frames", config.max_frames),
            "start": options.get("start_time"),
            "end": options.get("end_time"),
        }
        source = options.get("video_path")
    if not isinstance(source, (str, Path, bytes, np.ndarray, Image.Image)):
        raise InputError(f'part {str(part)[:80]} names no file; wanted "image_path" or "video_path"')
    return source, wanted
