"""Features by what they were computed from: each picture or frame is encoded once per size.

| name     | shape    | dtype | meaning                                                |
|----------|----------|-------|--------------------------------------------------------|
| features | [K, H]   | f32   | the visual tokens of one `Visual`, or the kept ones    |
| embeds   | [S, H]   | f32   | what the decoder takes for S keys: text, visual tokens |

Where only a share of the tokens is kept, which ones is decided when a `Visual` is first computed, and stays as long as
its features do: cache prefixes stay equal. A key frame keeps all of its features besides, since those that follow are
compared with it.

Kept features are bounded: beyond four times `max_seq_len` rows, those that were used least recently go, unless the
prompt at hand needs them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from penguin_edge.config import PATCH
from penguin_edge.errors import InputError
from penguin_edge.media.preprocess import Patches, preprocess_image
from penguin_edge.runtime.core.answer import UnusablePicture
from penguin_edge.runtime.core.media import Clip, Picture
from penguin_edge.runtime.core.prune import Grid, least_alike
from penguin_edge.runtime.core.report import Clock
from penguin_edge.runtime.engines.base import F32, Engine, sound
from penguin_edge.runtime.engines.cache import Key, Visual
from penguin_edge.tra.keeping import kept_tokens

PATCHES_PER_CALL = 4096
"""Frames of one grid are encoded together up to this many patches; larger batches gain nothing and cost memory."""

Calls = list[tuple[int, int]]
"""Calls of the encoder: frames, and patches of each."""


@dataclass(frozen=True)
class _Rows:
    """Features [K, H] of the tokens `numbers`, and all of them [T, H] where other frames are compared with these."""

    rows: F32
    numbers: Sequence[int]
    whole: F32 | None = None

    @property
    def count(self) -> int:
        return len(self.rows) + (0 if self.whole is None else len(self.whole))


class Features:
    """What the encoder and the projector of one engine gave, by content and size."""

    def __init__(self, engine: Engine, keep: float | None = None) -> None:
        """`keep` is the share of each picture's and frame's tokens that is kept; None: all."""
        self._engine, self._keep = engine, keep
        self._held: OrderedDict[Visual, _Rows] = OrderedDict()
        self._rows = 0

    def __contains__(self, visual: Visual) -> bool:
        return visual in self._held

    def __iter__(self) -> Iterator[Visual]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, visual: Visual) -> F32:
        return self._held[visual].rows

    @property
    def rows(self) -> int:
        """Rows of all features together, with those that key frames keep to be compared with."""
        return self._rows

    def numbers(self, visual: Visual) -> Sequence[int]:
        """Numbers of the tokens that are kept, in order.

        Raises:
            InputError: only a share is kept, and which is not known before the features are computed.
        """
        if self._keep is None:
            return range(visual.tokens)
        if visual not in self._held:
            raise InputError("which tokens of a frame are kept is known once it is encoded; push a frame or ask first")
        return self._held[visual].numbers

    def put(self, visual: Visual, rows: F32) -> None:
        """Keep features [T, H] of all tokens that were made elsewhere, such as by pooling."""
        self._put(visual, _Rows(rows, range(len(rows))))

    def _put(self, visual: Visual, held: _Rows) -> None:
        before = self._held.get(visual)
        self._rows += held.count - (before.count if before else 0)
        self._held[visual] = held

    def keep_only(self, visuals: Iterable[Visual]) -> None:
        """Forget all others."""
        for visual in set(self._held) - set(visuals):
            self._rows -= self._held.pop(visual).count

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self._rows = 0

    def compute(
        self,
        media: Sequence[Picture | Clip],
        visuals: Sequence[Visual],
        clock: Clock,
        references: Sequence[Visual | None] = (),
    ) -> Calls:
        """Compute what these visuals lack; each picture or frame is read once.

        Args:
            media: where the pixels come from.
            references: of each visual, the key frame that it is compared with where only a share is kept: the last one
                before it, itself for a key frame, None for a picture.
            clock: adds up the phases `decode_image`, `decode_video`, `preprocess`, `encode` and `project`.
        Raises:
            UnusablePicture: features that are not finite, which are not kept.
        """
        return list(self.steps(media, visuals, clock, references))

    def steps(
        self,
        media: Sequence[Picture | Clip],
        visuals: Sequence[Visual],
        clock: Clock,
        references: Sequence[Visual | None] = (),
    ) -> Iterator[tuple[int, int]]:
        """What `compute` does, one call of the encoder at a time; yields each when it is done."""
        lacking: dict[str, set[Visual]] = {}
        for visual in visuals:
            if visual in self._held:
                self._held.move_to_end(visual)
            else:
                lacking.setdefault(visual.digest, set()).add(visual)
        sieve = _Sieve(self, visuals, references, self._keep)
        for visual in sieve.needed(set().union(*lacking.values())):
            lacking.setdefault(visual.digest, set()).add(visual)
        batch: list[tuple[Visual, Patches]] = []
        bounds = self._engine.bounds

        def flush() -> tuple[int, int]:
            call = len(batch), len(batch[0][1].rows)
            self._encode([v for v, _ in batch], [p for _, p in batch], sieve, clock)
            batch.clear()
            return call

        for visual, patches in self._patches(media, lacking, clock):
            full = (len(batch) + 1) * len(patches.rows) > PATCHES_PER_CALL or len(batch) >= bounds.max_batch
            if batch and (full or batch[0][1].grid != patches.grid or batch[0][0].merge_size != visual.merge_size):
                yield flush()
            batch.append((visual, patches))
        if batch:
            yield flush()
        limit, needed = 4 * bounds.max_seq_len, len(set(visuals))
        while len(self._held) > needed and self._rows > limit:
            self._rows -= self._held.popitem(last=False)[1].count

    def embeds(self, keys: Sequence[Key]) -> F32:
        """Rows [S, H] of keys; those of visual tokens must have been computed."""
        out = np.empty((len(keys), self._engine.config.text.hidden_size), np.float32)
        text = [i for i, key in enumerate(keys) if not isinstance(key, tuple)]
        if text:
            out[text] = self._engine.embed(np.array([keys[i] for i in text], np.int64))
        last: Visual | None = None
        held = _Rows(out[:0], ())
        for i, key in enumerate(keys):
            if isinstance(key, tuple):
                if key[0] is not last:
                    last, held = key[0], self._held[key[0]]
                number = key[1]
                out[i] = held.rows[number if isinstance(held.numbers, range) else bisect_left(held.numbers, number)]
        return out

    def whole(self, visual: Visual) -> F32 | None:
        """Features [T, H] of all tokens, where they are held."""
        held = self._held.get(visual)
        return None if held is None else held.rows if len(held.rows) == visual.tokens else held.whole

    def sift(self, visual: Visual, rows: F32, reference: tuple[F32, Visual] | None, *, whole: bool) -> None:
        """Keep a share of features [T, H], or what was kept of them before.

        Args:
            reference: the features that they are compared with, and whose they are.
            whole: whether other frames will be compared with all of these.
        """
        held = self._held.get(visual)
        if held is None:
            other = None if reference is None else (reference[0], _grid(reference[1]))
            numbers = least_alike(rows, _grid(visual), kept_tokens(len(rows), self._keep), other)
            held = _Rows(rows[numbers], numbers)
        self._put(visual, replace(held, whole=np.array(rows) if whole else None))

    def _patches(
        self, media: Sequence[Picture | Clip], lacking: dict[str, set[Visual]], clock: Clock
    ) -> Iterator[tuple[Visual, Patches]]:
        for item in media:
            names = item.digests if isinstance(item, Clip) else [item.digest]
            wanted = [name for name in names if name in lacking]
            source = item.pixels(wanted) if wanted else iter(())
            phase = "decode_video" if isinstance(item, Clip) else "decode_image"
            while True:
                with clock(phase):
                    row = next(source, None)
                if row is None:
                    break
                for visual in sorted(lacking.pop(row[0], ()), key=lambda v: v.tokens):
                    with clock("preprocess"):
                        patches = preprocess_image(
                            row[1],
                            self._engine.config.image,
                            visual.merge_size,
                            size=(visual.height, visual.width),
                        )
                    yield visual, patches

    def _encode(self, visuals: list[Visual], patches: list[Patches], sieve: _Sieve, clock: Clock) -> None:
        merged = visuals[0].merge_size ** 2
        with clock("encode"):
            features = self._engine.encode(np.stack([p.pixels for p in patches]), patches[0].rows, patches[0].cols)
        with clock("project"):
            batch, count, channels = features.shape
            rows = self._engine.project(features.reshape(batch, count // merged, merged, channels))
        kept = [bool(sound(one).all() and sound(row).all()) for one, row in zip(features, rows, strict=True)]
        with clock("project"):
            for visual, row, usable in zip(visuals, rows, kept, strict=True):
                if usable:
                    sieve.take(visual, row)
        if not all(kept):
            raise UnusablePicture([visual for visual, usable in zip(visuals, kept, strict=True) if not usable])


class _Sieve:
    """What becomes of the features of one prompt: all are kept, or each frame waits for the one it is compared with."""

    def __init__(
        self,
        features: Features,
        visuals: Sequence[Visual],
        references: Sequence[Visual | None],
        keep: float | None,
    ) -> None:
        self._features, self._keep = features, keep
        self._reference: dict[Visual, Visual | None] = {}
        for visual, reference in zip(visuals, references, strict=False):
            self._reference.setdefault(visual, reference)
        self._keys = {reference for reference in references if reference is not None}
        self._waiting: dict[Visual, F32] = {}

    def _compared(self, visual: Visual) -> Visual | None:
        """The other frame that one is compared with."""
        reference = self._reference.get(visual)
        return None if reference == visual else reference

    def needed(self, lacking: Iterable[Visual]) -> list[Visual]:
        """Key frames that have to be computed again, since what lacks is compared with all of their features."""
        if self._keep is None:
            return []
        found = {reference for visual in lacking if (reference := self._compared(visual)) is not None}
        return [reference for reference in found if self._features.whole(reference) is None]

    def take(self, visual: Visual, rows: F32) -> None:
        """Keep features [T, H], or a share of them as soon as the frame to compare with is there."""
        if self._keep is None or kept_tokens(len(rows), self._keep) == len(rows):
            self._features.put(visual, rows)
        else:
            self._waiting[visual] = rows
        for one in list(self._waiting):
            other, reference = self._compared(one), None
            if other is not None:
                found = self._waiting.get(other)
                found = self._features.whole(other) if found is None else found
                if found is None:
                    continue
                reference = found, other
            self._features.sift(one, self._waiting[one], reference, whole=one in self._keys)
            del self._waiting[one]


def _grid(visual: Visual) -> Grid:
    factor = PATCH * visual.merge_size
    return visual.height // factor, visual.width // factor
