"""Images and clips of a prompt: found, labelled, and read again when their pixels are needed.

A clip is read twice: once for its key-frame labels, once for the pixels that the plan asks for. Between the two only a
digest, a time stamp and a label are kept per frame.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from penguin_edge.config import ImageConfig, PenguinConfig
from penguin_edge.errors import InputError
from penguin_edge.frames import Frame, read_image, read_video
from penguin_edge.preprocess import image_size
from penguin_edge.prompt import Message, part_kind, parts_of
from penguin_edge.runtime.report import Clock
from penguin_edge.tra import DROPPED, KEY, KeyFrameDetector, Mode, Plan, plan_clip

REMEMBERED = 32
"""Files a library keeps: a clip's labels are small, a picture is held at native size."""


def digest(pixels: NDArray[np.uint8]) -> str:
    """What identifies a frame in every cache: its size and its pixels."""
    state = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    state.update(np.ascontiguousarray(pixels).data)
    return state.hexdigest()


@dataclass(frozen=True)
class Visual:
    """One image or frame as it enters the prompt: whose pixels, at what size."""

    digest: str
    height: int
    width: int
    merge_size: int

    @property
    def tokens(self) -> int:
        return (self.height // (14 * self.merge_size)) * (self.width // (14 * self.merge_size))


@dataclass
class Picture:
    """A single image."""

    frame: Frame
    digest: str
    merge_size: int

    @classmethod
    def open(cls, source: Any, config: ImageConfig) -> Picture:
        frame = read_image(source)
        return cls(frame, digest(frame.pixels), config.image_merge_size)

    def fit(self, config: ImageConfig, limit: int) -> Visual:
        """The reference's size if it stays within `limit` tokens, else the strict planner's."""
        height, width = self.frame.pixels.shape[:2]
        visual = Visual(self.digest, *image_size(height, width, config, self.merge_size), self.merge_size)
        if visual.tokens <= limit:
            return visual
        plan = plan_clip(1, [KEY], (height, width), limit, min_tokens=config.min_tokens, merge_size=self.merge_size)
        return Visual(self.digest, plan.frames[0].height, plan.frames[0].width, self.merge_size)

    def pixels(self, wanted: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        yield self.digest, self.frame.pixels


@dataclass
class Clip:
    """A labelled sequence of frames of one size; `reopen` yields the frames again, in order."""

    merge_size: int
    detector: KeyFrameDetector
    reopen: Callable[[], Iterable[Frame]]
    times: list[float | None] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    similarities: list[float | None] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)

    def add(self, frame: Frame) -> None:
        """Label one more frame.

        Raises:
            InputError: its size differs from that of the frames before.
        """
        size = (frame.pixels.shape[0], frame.pixels.shape[1])
        if self.kinds and size != self.size:
            raise InputError(
                f"a frame of {size[1]}x{size[0]} after frames of {self.size[1]}x{self.size[0]}; a clip keeps one size, "
                "resize the frames or start a new session"
            )
        self.size = size
        found = self.detector.push(frame.pixels)
        self.times.append(frame.time)
        self.kinds.append(found.kind)
        self.similarities.append(found.similarity)
        self.digests.append(digest(frame.pixels))

    def plan(self, budget: int, mode: Mode, config: PenguinConfig, max_tokens: int) -> Plan:
        """Sizes under `budget`; no frame above `max_tokens`, which is what the graphs were compiled for."""
        size = cap_size(self.size, max_tokens * (14 * self.merge_size) ** 2) if mode == "strict" else self.size
        return plan_clip(
            len(self.kinds),
            self.kinds,
            size,
            budget,
            mode=mode,
            min_tokens=config.image.min_tokens,
            merge_size=self.merge_size,
            config=config.tra,
        )

    def visuals(self, plan: Plan) -> list[Visual]:
        """The frames that the plan keeps, in order."""
        rows = zip(plan.frames, self.digests, strict=True)
        return [Visual(name, f.height, f.width, self.merge_size) for f, name in rows if f.kind != DROPPED]

    def pixels(self, wanted: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Native pixels of the wanted digests, in order, one frame in memory at a time."""
        missing = set(wanted)
        for frame, name in zip(self.reopen(), self.digests, strict=False):
            if name in missing:
                missing.discard(name)
                yield name, frame.pixels
            if not missing:
                return
        raise InputError("the clip changed while it was being read: a frame seen before is no longer there; run again")


def cap_size(size: tuple[int, int], max_area: int) -> tuple[int, int]:
    """`size` scaled down to at most `max_area` pixels after alignment to whole tokens."""
    height, width = size
    # 28 pixels of slack on each side cover rounding up to a whole token.
    scale = min(1.0, (max_area / ((height + 28) * (width + 28))) ** 0.5)
    return max(1, int(height * scale)), max(1, int(width * scale))


class Library:
    """Pictures and clips by where they come from, so that a second question about a clip does not decode it again."""

    def __init__(self, config: ImageConfig, tra: Mode) -> None:
        self.config = config
        self.detection: Literal["exact", "fast"] = "exact" if tra == "reference" else "fast"
        self._seen: OrderedDict[str, Picture | Clip] = OrderedDict()

    def new_clip(self, reopen: Callable[[], Iterable[Frame]]) -> Clip:
        return Clip(self.config.video_merge_size, KeyFrameDetector(self.detection), reopen)

    def picture(self, source: Any, clock: Clock) -> Picture:
        with clock("decode_image"):
            return self._cached(source, lambda: Picture.open(source, self.config))

    def clip(self, source: Any, options: dict[str, Any], clock: Clock) -> Clip:
        """Decode and label a clip; `options` are those of `read_video`."""

        def read() -> Clip:
            clip = self.new_clip(lambda: read_video(source, **options))
            frames = iter(read_video(source, **options))
            while True:
                with clock("decode_video"):
                    frame = next(frames, None)
                if frame is None:
                    return clip
                with clock("plan"):
                    clip.add(frame)

        return self._cached(source, read, options)

    def _cached(self, source: Any, make: Callable[[], Any], options: dict[str, Any] | None = None) -> Any:
        if not isinstance(source, (str, Path)) or not Path(source).is_file():
            return make()
        stat = Path(source).stat()
        key = json.dumps([str(Path(source).resolve()), stat.st_size, stat.st_mtime_ns, options], sort_keys=True)
        if key not in self._seen:
            self._seen[key] = make()
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]


def open_media(messages: Sequence[Message], library: Library, clock: Clock) -> list[Picture | Clip]:
    """Every image and clip that a conversation in the published format names, in order of appearance.

    Parts: `{"type": "image", "image": PATH | PIL image | array | {"image_path": PATH}}` and
    `{"type": "video", "video": PATH | {"video_path": PATH[, "fps", "max_frames", "start_time", "end_time"]}}`.

    Raises:
        InputError: a part without a usable source, or an unreadable file.
    """
    media: list[Picture | Clip] = []
    for part in parts_of(messages):
        kind = part_kind(part)
        if kind == "image":
            source = part.get("image")
            source = part.get("image_url") if source is None else source
            if isinstance(source, dict):
                source = source.get("image_path", source.get("url"))
            media.append(library.picture(_named(source, part), clock))
        elif kind == "video":
            source = part.get("video")
            options = source if isinstance(source, dict) else {"video_path": source}
            config = library.config
            wanted = {
                "fps": options.get("fps", config.fps),
                "max_frames": options.get("max_frames", config.max_frames),
                "start": options.get("start_time"),
                "end": options.get("end_time"),
            }
            media.append(library.clip(_named(options.get("video_path"), part), wanted, clock))
    return media


def _named(source: Any, part: dict[str, Any]) -> Any:
    if not isinstance(source, (str, Path, bytes, np.ndarray, Image.Image)):
        raise InputError(f'part {str(part)[:80]} names no file; wanted "image_path" or "video_path"')
    return source
