"""Features by what they were computed from: each picture or frame is encoded once per size.

| name     | shape    | dtype | meaning                                                |
|----------|----------|-------|--------------------------------------------------------|
| features | [T, H]   | f32   | the visual tokens of one `Visual`                      |
| embeds   | [S, H]   | f32   | what the decoder takes for S keys: text, visual tokens |

Kept features are bounded: beyond four times `max_seq_len` rows, those that were used least recently go, unless the
prompt at hand needs them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from penguin_edge.media.preprocess import Patches, preprocess_image
from penguin_edge.runtime.core.answer import UnusablePicture
from penguin_edge.runtime.core.media import Clip, Picture
from penguin_edge.runtime.core.report import Clock
from penguin_edge.runtime.engines.base import F32, Engine, sound
from penguin_edge.runtime.engines.cache import Key, Visual

PATCHES_PER_CALL = 4096
"""Frames of one grid are encoded together up to this many patches; larger batches gain nothing and cost memory."""

Calls = list[tuple[int, int]]
"""Calls of the encoder: frames, and patches of each."""


class Features:
    """What the encoder and the projector of one engine gave, by content and size."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: OrderedDict[Visual, F32] = OrderedDict()
        self._rows = 0

    def __contains__(self, visual: Visual) -> bool:
        return visual in self._held

    def __iter__(self) -> Iterator[Visual]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, visual: Visual) -> F32:
        return self._held[visual]

    @property
    def rows(self) -> int:
        """Rows of all features together."""
        return self._rows

    def put(self, visual: Visual, rows: F32) -> None:
        """Keep features [T, H] that were made elsewhere, such as by pooling."""
        self._rows += len(rows) - len(self._held.get(visual, ()))
        self._held[visual] = rows

    def keep_only(self, visuals: Iterable[Visual]) -> None:
        """Forget all others."""
        for visual in set(self._held) - set(visuals):
            self._rows -= len(self._held.pop(visual))

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self._rows = 0

    def compute(self, media: Sequence[Picture | Clip], visuals: Sequence[Visual], clock: Clock) -> Calls:
        """Compute what these visuals lack; each picture or frame is read once.

        Args:
            media: where the pixels come from.
            clock: adds up the phases `decode_image`, `decode_video`, `preprocess`, `encode` and `project`.
        Raises:
            UnusablePicture: features that are not finite, which are not kept.
        """
        return list(self.steps(media, visuals, clock))

    def steps(
        self, media: Sequence[Picture | Clip], visuals: Sequence[Visual], clock: Clock
    ) -> Iterator[tuple[int, int]]:
        """What `compute` does, one call of the encoder at a time; yields each when it is done."""
        lacking: dict[str, set[Visual]] = {}
        for visual in visuals:
            if visual in self._held:
                self._held.move_to_end(visual)
            else:
                lacking.setdefault(visual.digest, set()).add(visual)
        batch: list[tuple[Visual, Patches]] = []
        bounds = self._engine.bounds

        def flush() -> tuple[int, int]:
            call = len(batch), len(batch[0][1].rows)
            self._encode([v for v, _ in batch], [p for _, p in batch], clock)
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
            self._rows -= len(self._held.popitem(last=False)[1])

    def embeds(self, keys: Sequence[Key]) -> F32:
        """Rows [S, H] of keys; those of visual tokens must have been computed."""
        out = np.empty((len(keys), self._engine.config.text.hidden_size), np.float32)
        text = [i for i, key in enumerate(keys) if not isinstance(key, tuple)]
        if text:
            out[text] = self._engine.embed(np.array([keys[i] for i in text], np.int64))
        last: Visual | None = None
        rows = out[:0]
        for i, key in enumerate(keys):
            if isinstance(key, tuple):
                if key[0] is not last:
                    last, rows = key[0], self._held[key[0]]
                out[i] = rows[key[1]]
        return out

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

    def _encode(self, visuals: list[Visual], patches: list[Patches], clock: Clock) -> None:
        merged = visuals[0].merge_size ** 2
        with clock("encode"):
            features = self._engine.encode(np.stack([p.pixels for p in patches]), patches[0].rows, patches[0].cols)
        with clock("project"):
            batch, count, channels = features.shape
            rows = self._engine.project(features.reshape(batch, count // merged, merged, channels))
        kept = [bool(sound(one).all() and sound(row).all()) for one, row in zip(features, rows, strict=True)]
        for visual, row, usable in zip(visuals, rows, kept, strict=True):
            if usable:
                self.put(visual, row)
        if not all(kept):
            raise UnusablePicture([visual for visual, usable in zip(visuals, kept, strict=True) if not usable])
