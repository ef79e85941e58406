"""Images and clips of a prompt: found, labelled, and read again when their pixels are needed.

A clip is needed twice: for its key-frame labels, then for the pixels that the plan asks for. The frames of small clips
are held in between (`HELD_BYTES`); of larger ones only a digest, a time stamp and a label are kept per frame, and the
clip is read again.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.config import ImageConfig
from penguin_edge.errors import InputError
from penguin_edge.media.frames import MAX_SECONDS, Frame, read_image, read_video
from penguin_edge.media.places import is_data, local_path
from penguin_edge.prompt.chat import Message, part_kind, parts_of
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.core.report import Clock
from penguin_edge.schema import Maybe, Real
from penguin_edge.tra.clip import DROPPED, KeyFrameDetector, Mode, Plan
from penguin_edge.tra.layout import LabelledClip, detection_mode, media_source

REMEMBERED = 32
"""Files a library keeps: a clip's labels are small, a picture is held at native size."""
HELD_BYTES = 64 << 20
"""Native frames of clips that a library holds, all its clips together; the latest clips come first."""


def digest(pixels: NDArray[np.uint8]) -> str:
    """What identifies a frame in every cache: its size and its pixels."""
    state = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    state.update(np.ascontiguousarray(pixels).data)
    return state.hexdigest()


def own(frame: Frame | NDArray[np.uint8], time: float | None, index: int) -> Frame:
    """A frame with pixels of its own: a camera loop may write the next picture into the same buffer.

    Args:
        frame: a `Frame`, or pixels [H, W, 3] uint8 RGB with `time` in seconds.
    Raises:
        InputError: wrong shape or dtype, no pixel at all, or a time that is no finite number.
    """
    given = frame if isinstance(frame, Frame) else Frame(frame, time)
    pixels = given.pixels
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise InputError(f"a frame is {got}; wanted uint8 [H, W, 3] in RGB")
    if not pixels.size:
        raise InputError(f"a frame of {pixels.shape[1]}x{pixels.shape[0]} pixels, wanted at least one")
    check_options(time=(given.time, Maybe(Real(-MAX_SECONDS, MAX_SECONDS))))
    return Frame(np.array(pixels), None if given.time is None else float(given.time), index)


@dataclass
class Picture:
    """A single image."""

    frame: Frame
    digest: str
    merge_size: int

    @classmethod
    def open(cls, source: Any, config: ImageConfig, max_pixels: int | None = None) -> Picture:
        frame = read_image(source, max_pixels=max_pixels)
        return cls(frame, digest(frame.pixels), config.image_merge_size)

    @property
    def size(self) -> tuple[int, int]:
        return self.frame.pixels.shape[0], self.frame.pixels.shape[1]

    def pixels(self, wanted: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        yield self.digest, self.frame.pixels


@dataclass
class Clip(LabelledClip):
    """A labelled clip that knows its frames again: their digests, and `reopen`, which yields them again in order.

    `held` are the frames themselves, where they are few enough to wait for `pixels`.
    """

    reopen: Callable[[], Iterable[Frame]] = field(kw_only=True)
    digests: list[str] = field(default_factory=list)
    held: list[Frame] | None = None

    def add(self, frame: Frame) -> None:
        """Label one more frame; errors as `LabelledClip.add`."""
        super().add(frame)
        self.digests.append(digest(frame.pixels))

    def remove(self, index: int) -> None:
        """Take a frame out again."""
        super().remove(index)
        del self.digests[index]

    def copy(self, reopen: Callable[[], Iterable[Frame]]) -> Clip:
        """A clip that goes on by itself from here, with its own way to have its frames again."""
        return replace(
            self,
            detector=copy(self.detector),
            times=list(self.times),
            kinds=list(self.kinds),
            similarities=list(self.similarities),
            digests=list(self.digests),
            reopen=reopen,
        )

    def kept(self, plan: Plan) -> list[str]:
        """Digests of the frames that the plan keeps, in order."""
        return [name for frame, name in zip(plan.frames, self.digests, strict=True) if frame.kind != DROPPED]

    def pixels(self, wanted: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Native pixels of the wanted digests, in order, one frame in memory at a time."""
        missing = set(wanted)
        for frame, name in zip(self.reopen() if self.held is None else self.held, self.digests, strict=False):
            if name in missing:
                missing.discard(name)
                yield name, frame.pixels
            if not missing:
                return
        raise InputError("the clip changed while it was being read: a frame seen before is no longer there; run again")


class Library:
    """Pictures and clips by where they come from, so that a second question about a clip does not decode it again."""

    def __init__(
        self, config: ImageConfig, tra: Mode, max_pixels: int | None = None, max_packets: int | None = None
    ) -> None:
        """A library of what is read from now on; the limits are those of `read_image` and `read_video`."""
        self.config = config
        self.max_pixels, self.max_packets = max_pixels, max_packets
        self.detection = detection_mode(tra)
        self._seen: OrderedDict[str, Picture | Clip] = OrderedDict()

    def new_clip(self, reopen: Callable[[], Iterable[Frame]]) -> Clip:
        return Clip(self.config.video_merge_size, KeyFrameDetector(self.detection), reopen=reopen)

    def picture(self, source: Any, clock: Clock) -> Picture:
        with clock("decode_image"):
            return self._cached(source, lambda: Picture.open(source, self.config, self.max_pixels))

    def clip(self, source: Any, options: dict[str, Any], clock: Clock) -> Clip:
        """Decode and label a clip; `options` are those of `read_video`."""

        def frames_of() -> Iterator[Frame]:
            return read_video(source, max_pixels=self.max_pixels, max_packets=self.max_packets, **options)

        def read() -> Clip:
            clip = self.new_clip(frames_of)
            clip.held = []
            with clock("decode_video"):
                frames = frames_of()
            while True:
                with clock("decode_video"):
                    frame = next(frames, None)
                if frame is None:
                    self._release(clip)
                    return clip
                with clock("plan"):
                    clip.add(frame)
                if clip.held is not None:
                    clip.held.append(frame)
                    if len(clip.held) * frame.pixels.nbytes > HELD_BYTES:
                        clip.held = None

        return self._cached(source, read, options)

    def _release(self, latest: Clip) -> None:
        """Let go of the oldest frames until all that are held, with the latest clip's, stay within `HELD_BYTES`."""
        left = HELD_BYTES
        for clip in (latest, *reversed(self._seen.values())):
            if isinstance(clip, Clip) and clip.held:
                left -= len(clip.held) * clip.held[0].pixels.nbytes
                if left < 0:
                    clip.held = None

    def _cached(self, source: Any, make: Callable[[], Any], options: dict[str, Any] | None = None) -> Any:
        if not isinstance(source, (str, Path)) or is_data(source):
            return make()
        path = local_path(source)
        try:
            stat = path.stat()
        except (OSError, ValueError):  # for the reader to say what is wrong
            return make()
        if not S_ISREG(stat.st_mode):
            return make()
        key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, options], sort_keys=True)
        if key not in self._seen:
            self._seen[key] = make()
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]


def open_media(messages: Sequence[Message], library: Library, clock: Clock) -> list[Picture | Clip]:
    """Every image and clip that a conversation in the published format names, in order of appearance.

    Raises:
        InputError: a part without a usable source (see `media_source`), or an unreadable file.
    """
    media: list[Picture | Clip] = []
    for part in parts_of(messages):
        if part_kind(part) == "text":
            continue
        source, options = media_source(part, library.config)
        media.append(library.picture(source, clock) if options is None else library.clip(source, options, clock))
    return media
