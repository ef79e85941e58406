"""Which frames of a clip are key: one comparison with the last key frame per incoming frame.

Rule (reference: `extract_ki_frames` in `penguinvl/mm_utils.py`): both frames are brought to a common size
(`compare_size`), turned to OpenCV's 8-bit HSV and cut into 14x14 patches. A patch pair is similar when its cosine is
above 0.7; pairs that are black in both frames are left out. The similarity is the share of similar patches, and a
frame below 0.95 becomes the new key frame.

| name     | shape          | dtype   |                                                          |
|----------|----------------|---------|----------------------------------------------------------|
| pixels   | `[H, W, 3]`    | uint8   | RGB; `[H, W]` is grey and taken as three equal channels  |
| hsv      | `[14Y, 14X, 3]`| uint8   | H 0-179, S and V 0-255                                   |
| energy   | `[Y, X]`       | float64 | squared norm of each patch of 588 values                 |

Two modes:

- `exact` repeats the reference, its resize included, to the bit. Against the original kernel, single values of random
  4K frames, which shrink by more than two, differ by one grey level (5 of 5.9 million).
- `fast` looks at the comparison frame at half its size (7x7 samples per patch), so each cosine is an estimate. How many
  patches could be wrong is guessed (`FAST_DOUBT`); where so many could change the label, the patches nearest to their
  limit are computed exactly until they no longer can. Frames that are mostly noise near black are compared exactly.

Measured: CPU time of one core, OpenCV with one thread, best of three passes per frame. At 1280x720 `exact` takes 32 to
36 ms per frame. `fast` takes, mean (p95): 2.7 (5.7) on a street scene scaled up, 3.0 (5.4) on an animation, 1.8 (1.9)
on a quiet shot scaled up; most frames of the first two are within 0.02 of the threshold. So 3 ms is about the mean, not
a limit, and a dark frame can cost as much as `exact`.

Labels against exact ones with the same last key frame: seven clips, one at two sizes (1416 frames), served to choose
the constants; 14 labels differ, all of two clips of a planet in black space, at most 0.0053 from the threshold. On
five other clips, one at two sizes (740 frames), none differs. After one different label the two modes hold different
key frames, so labels of whole runs can then differ anywhere: 4 of 16 such frames were more than 0.02 from the
threshold. All eight cuts of a street clip and a film are key in both modes; a cut between two night scenes (similarity
0.98) is key in neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penguin_edge.config import PATCH, PATCH_VALUES, TraConfig
from penguin_edge.errors import InputError, TargetUnavailable

KEY, INTERMEDIATE, DROPPED = "key", "intermediate", "dropped"

MAX_COMPARE_AREA = 10_240 * PATCH * PATCH
MIN_COMPARE_AREA = 10 * PATCH * PATCH
MAX_ASPECT = 1000
FAST_DOUBT = 0.65
"""Fast mode looks closer when less than this times the root of the number of patches separates a frame from a label."""
FAST_REACH = 0.85
"""Distance of a cosine from its limit over which doubt falls e-fold, times the root of the number of patches. A wrong
patch weighs more in a small frame, and a closer look costs less there."""
DARK_LEVEL, DARK_SHARE, DARK_DOUBT = 3, 0.25, 0.1
"""A patch is dark when over `DARK_SHARE` of its samples have a V of 1 to `DARK_LEVEL`, where a single level of noise
turns hue and saturation around. Each dark patch adds `DARK_DOUBT` to the doubt until it was looked at."""
FAST_CHUNK = 16
"""Patches computed exactly at a time, before fast mode asks whether more are needed."""
FAST_MIN_PATCHES = 256
"""Frames of at most so many patches are compared exactly in fast mode too: it is cheap, and one patch weighs more."""
BLACK_ENERGY = 1e-4
"""Square of the norm (0.01) below which a patch is black; one grey level is already above it."""

Pixels = NDArray[np.uint8]
Array = NDArray[Any]


@dataclass(frozen=True)
class Detection:
    """Label of one frame. `similarity` to the last key frame is None where there is nothing to compare."""

    kind: str
    similarity: float | None


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise TargetUnavailable(
            f"key-frame detection needs OpenCV ({error}): pip install opencv-python-headless"
        ) from error
    return cv2


def compare_size(height: int, width: int) -> tuple[int, int]:
    """Size (height, width) at which frames of `height` x `width` pixels are compared: multiples of 14.

    Raises:
        InputError: an empty frame, or one side more than 1000 times the other.
    """
    if min(height, width) < 1:
        raise InputError(f"a frame of {width}x{height} pixels has no content; wanted at least one pixel")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"a frame of {width}x{height} pixels is over {MAX_ASPECT} times longer than wide; crop it")
    h, w = (round(side / PATCH) * PATCH for side in (height, width))
    if h * w > MAX_COMPARE_AREA:
        beta = math.sqrt(height * width / MAX_COMPARE_AREA)
        h, w = (math.floor(side / beta / PATCH) * PATCH for side in (height, width))
    elif h * w < MIN_COMPARE_AREA:
        beta = math.sqrt(MIN_COMPARE_AREA / (height * width))
        h, w = (math.ceil(side * beta / PATCH) * PATCH for side in (height, width))
    return h, w


@lru_cache(maxsize=16)
def _taps(size_in: int, size_out: int) -> tuple[Array, Array]:
    """Antialiased triangle filter: source index `[taps, size_out]` and float32 weight, padded with weight 0.

    Every step is float32, in the order of the reference's kernel, because the result is truncated to uint8.
    """
    f32 = np.float32
    scale = f32(f32(size_in) / f32(size_out))
    support, inverse = (scale, f32(1 / float(scale))) if scale >= 1 else (f32(1), f32(1))
    centre = (float(scale) * (np.arange(size_out) + 0.5)).astype(f32)
    first = np.maximum(((centre - support).astype(np.float64) + 0.5).astype(np.int64), 0)
    last = np.minimum(((centre + support).astype(np.float64) + 0.5).astype(np.int64), size_in)
    index = first + np.arange(int((last - first).max()))[:, None]
    distance = (((index.astype(f32) - centre).astype(np.float64) + 0.5) * float(inverse)).astype(f32)
    weight = np.where(index < last, np.maximum(f32(1) - np.abs(distance), f32(0)), f32(0))
    total = np.zeros(size_out, f32)
    for row in weight:
        total = total + row
    return np.minimum(index, size_in - 1), weight / total


def _filter_rows(rows: Array, size_out: int) -> Array:
    """Resize axis 0 of `[size_in, N]` (uint8 or float32) to float32 `[size_out, N]`.

    Taps are added one by one as fused multiply-adds: product and sum in float64, rounded to float32 at each step.
    In blocks of rows that stay in the cache; a tap without weight in a block changes nothing and is left out.
    """
    index, weight = _taps(rows.shape[0], size_out)
    out = np.empty((size_out, rows.shape[1]), np.float32)
    block = max(1, 32_768 // rows.shape[1])
    for start in range(0, size_out, block):
        part = slice(start, start + block)
        total = out[part]
        for tap, w in enumerate(weight[:, part].astype(np.float64)):
            if tap and not w.any():
                continue
            step = rows[index[tap, part]] * w[:, None]
            if tap:
                step += total
            total[...] = step
    return out


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Antialiased bilinear resize of `[H, W, 3]`, truncated to uint8, equal to the reference to the last bit."""
    cv2 = _cv2()
    out: Array = pixels
    if out.shape[1] != width:
        columns = cv2.transpose(out)
        filtered = _filter_rows(columns.reshape(columns.shape[0], -1), width)
        out = cv2.transpose(filtered.reshape(width, -1, 3))
    if out.shape[0] != height:
        out = _filter_rows(out.reshape(out.shape[0], -1), height).reshape(height, width, 3)
    return out.astype(np.uint8)


def _patch_sums(a: Pixels, b: Pixels) -> Array:
    """Inner product `[Y, X]` of each pair of patches. Exact: integers below 2^53.

    The first sum stays below 14 * 255^2 < 2^24, so float32 holds it exactly.
    """
    product = _cv2().multiply(a, b, dtype=5)
    y, x = a.shape[0] // PATCH, a.shape[1] // PATCH
    columns = product.reshape(y, PATCH, -1).sum(axis=1, dtype=np.float32).reshape(y * x, -1)
    return columns.sum(axis=1, dtype=np.float64).reshape(y, x)


def _cosine(dot: Array, energy_a: Array, energy_b: Array) -> Array:
    """Cosine of patch pairs from inner products and squared norms; NaN where both are black."""
    cosine = dot / ((np.sqrt(energy_a) + 1e-8) * (np.sqrt(energy_b) + 1e-8))
    return np.where((energy_a < BLACK_ENERGY) & (energy_b < BLACK_ENERGY), np.nan, cosine)


def _share(similar: int, counted: int) -> float:
    """float32 mean, NaN over nothing: 19 of 20 is 0.94999999 and so below 0.95, as in the reference."""
    return float(np.float32(similar) / np.float32(counted)) if counted else math.nan


def _hsv(pixels: Pixels) -> Pixels:
    cv2 = _cv2()
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)


def similarity(a: Pixels, b: Pixels, config: TraConfig | None = None) -> float:
    """Share of similar patches of two RGB frames `[14Y, 14X, 3]` uint8; NaN when all patches are black in both.

    Raises:
        InputError: shapes differ or are not multiples of 14.
    """
    config = config or TraConfig()
    a, b = _checked(a), _checked(b)
    if a.shape != b.shape or a.shape[0] % PATCH or a.shape[1] % PATCH:
        raise InputError(f"got frames {a.shape} and {b.shape}; wanted one size, multiples of {PATCH} (compare_size)")
    x, y = _hsv(a), _hsv(b)
    cosine = _cosine(*(_patch_sums(p, q) for p, q in ((x, y), (x, x), (y, y))))
    return _share(int((cosine > config.patch_cosine).sum()), int((~np.isnan(cosine)).sum()))


def _checked(pixels: Array) -> Pixels:
    """Contiguous `[H, W, 3]` uint8, grey repeated to three channels."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        got = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise InputError(f"a frame is {got}; wanted a numpy array of uint8, 0-255")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(f"a frame has shape {list(pixels.shape)}; wanted [H, W, 3] RGB or [H, W] grey, not empty")
    return np.ascontiguousarray(pixels)


def _exact_patches(pixels: Pixels, size: tuple[int, int], which: Array) -> Pixels:
    """HSV of some patches, `[N, 588]` uint8: the same values as a cut out of the whole resized frame.

    `which` `[N]` int64 counts patches row by row.
    """
    height, width = size
    (index_y, weight_y), (index_x, weight_x) = _taps(pixels.shape[0], height), _taps(pixels.shape[1], width)
    row, column = (PATCH * i[:, None] + np.arange(PATCH) for i in np.divmod(which, width // PATCH))
    n, top = len(which), index_y[0, row[:, :1]]
    rows = np.minimum(top + np.arange(int((index_y[:, row] - top).max()) + 1), pixels.shape[0] - 1)
    starts = (rows * pixels.shape[1])[:, :, None]
    wide = _blend(pixels.reshape(-1, 3), starts + index_x[:, column][:, :, None], weight_x[:, column][:, :, None])
    starts = (np.arange(n) * rows.shape[1])[:, None] - top
    patches = _blend(wide.reshape(-1, PATCH * 3), starts + index_y[:, row], weight_y[:, row])
    return _hsv(patches.reshape(-1, PATCH, 3).astype(np.uint8)).reshape(n, -1)


def _blend(source: Array, index: Array, weight: Array) -> Array:
    """Sum of the taps `[T, ...]` of `source` `[N, C]` in `_filter_rows`' arithmetic: float32 `[..., C]`."""
    total = np.zeros((*index.shape[1:], source.shape[1]), np.float32)
    for tap, w in enumerate(weight.astype(np.float64)[..., None]):
        some = w.any(axis=tuple(range(1, w.ndim)))  # the outer taps have weight in few patches
        part = slice(None) if some.all() else np.flatnonzero(some)
        step = source.take(index[tap][part], axis=0).astype(np.float64)
        step *= w[part]
        step += total[part]
        total[part] = step
    return total


class _Exact:
    """A frame as the exact comparison sees it."""

    def __init__(self, pixels: Pixels) -> None:
        height, width = compare_size(*pixels.shape[:2])
        self.hsv = _hsv(_resize(pixels, height, width))
        self.energy = _patch_sums(self.hsv, self.hsv)

    def keep(self) -> _Exact:
        return self

    def share(self, key: _Exact, config: TraConfig) -> float:
        cosine = _cosine(_patch_sums(self.hsv, key.hsv), self.energy, key.energy)
        return _share(int((cosine > config.patch_cosine).sum()), int((~np.isnan(cosine)).sum()))


class _Sampled:
    """A frame at half the comparison size, and its exact patches as far as they were asked for."""

    def __init__(self, pixels: Pixels) -> None:
        cv2 = _cv2()
        self.pixels = pixels
        self.size = compare_size(*pixels.shape[:2])
        height, width = self.size[0] // 2, self.size[1] // 2
        # A bilinear sample sees two pixels per axis; larger steps are halved first so that none is skipped.
        while pixels.shape[0] >= 4 * height and pixels.shape[1] >= 4 * width:
            pixels = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
        hsv = _hsv(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR))
        self.values = hsv.astype(np.float32).reshape(2 * height // PATCH, PATCH // 2, -1)
        self.energy = self._sums(self)
        noisy = cv2.inRange(cv2.extractChannel(hsv, 2), 1, DARK_LEVEL)
        share = cv2.resize(noisy, self.energy.shape[::-1], interpolation=cv2.INTER_AREA)
        self.dark: Array = (share > 255 * DARK_SHARE).ravel()
        self.whole: _Exact | None = None
        self.exact: Pixels | None = None
        self.known: Array | None = None

    def _sums(self, other: _Sampled) -> Array:
        """Inner product `[Y, X]` of each pair of sampled patches; exact, since 7 * 7 * 3 * 255^2 < 2^24."""
        columns = np.einsum("ysk,ysk->yk", self.values, other.values).reshape(-1, 3 * PATCH // 2)
        return (columns @ np.ones(columns.shape[1], np.float32)).astype(np.float64).reshape(self.values.shape[0], -1)

    def keep(self) -> _Sampled:
        self.pixels = self.pixels.copy()  # the caller may decode the next frame into the same buffer
        return self

    def patches(self, which: Array) -> Pixels:
        """Exact HSV patches `[N, 588]` of a key frame; each is computed once."""
        if self.exact is None or self.known is None:
            count = self.energy.size
            self.exact, self.known = np.empty((count, PATCH_VALUES), np.uint8), np.zeros(count, bool)
        missing = which[~self.known[which]]
        if len(missing):
            self.exact[missing] = _exact_patches(self.pixels, self.size, missing)
            self.known[missing] = True
        return self.exact[which]

    def share(self, key: _Sampled, config: TraConfig) -> float:
        limit, threshold = config.patch_cosine, config.similarity_threshold
        cosine = _cosine(self._sums(key), self.energy, key.energy).ravel()
        similar, counted = cosine > limit, ~np.isnan(cosine)
        share, total = _share(int(similar.sum()), int(counted.sum())), max(1, int(counted.sum()))
        doubt, reach = FAST_DOUBT * math.sqrt(total), FAST_REACH / math.sqrt(total)
        dark = (self.dark | key.dark) & counted
        left = int(dark.sum())
        if left > total // 4:
            return self.as_exact().share(key.as_exact(), config)
        if abs(share - threshold) * total >= doubt + DARK_DOUBT * left:
            return share
        distance = np.where(dark, 0, np.abs(cosine - limit))
        order = np.flatnonzero(distance < reach * math.log(2 * doubt))  # beyond, doubt is below half a patch
        order = order[np.argsort(distance[order], kind="stable")]
        for start in range(0, len(order), FAST_CHUNK):
            which = order[start : start + FAST_CHUNK]
            remaining = doubt * math.exp(-distance[which[0]] / reach) + DARK_DOUBT * max(0, left - start)
            if abs(share - threshold) * total >= remaining:
                break
            a, b = (p.astype(np.float32) for p in (_exact_patches(self.pixels, self.size, which), key.patches(which)))
            exact = _cosine(*(np.einsum("nv,nv->n", p, q) for p, q in ((a, b), (a, a), (b, b))))
            similar[which], counted[which] = exact > limit, ~np.isnan(exact)
            share = _share(int(similar.sum()), int(counted.sum()))
        return share

    def as_exact(self) -> _Exact:
        self.whole = self.whole or _Exact(self.pixels)
        return self.whole


class KeyFrameDetector:
    """Labels the frames of one clip, one `push` per frame, in order.

    The first frame is key. So is a frame of another size than the last key frame: there is no common comparison size,
    and a camera that changes its format shows a new view anyway. Frames that are black where the key frame is black,
    and nowhere else anything, are intermediate.

    Only the last key frame is held, whatever the length of the clip.

    Args:
        mode: `exact` gives the labels and similarities of the reference; `fast` estimates (see the module).
        config: thresholds.
    """

    def __init__(self, mode: Literal["exact", "fast"] = "exact", config: TraConfig | None = None) -> None:
        if mode not in ("exact", "fast"):
            raise InputError(f"unknown detection mode {mode!r}; known: exact, fast")
        self.mode = mode
        self.config = config or TraConfig()
        self._shape: tuple[int, ...] | None = None
        self._key: _Exact | _Sampled | None = None

    def push(self, pixels: Array) -> Detection:
        """Label the next frame, `[H, W, 3]` RGB or `[H, W]` grey, uint8.

        `similarity` is None for the first frame, after a change of size, and where all patches are black in both.

        Raises:
            InputError: not such an array, empty, or one side more than 1000 times the other.
            TargetUnavailable: OpenCV is not installed.
        """
        pixels = _checked(pixels)
        height, width = compare_size(*pixels.shape[:2])
        small = height * width <= FAST_MIN_PATCHES * PATCH * PATCH
        frame: Any = (_Exact if self.mode == "exact" or small else _Sampled)(pixels)
        share: float | None = None
        if self._key is not None and self._shape == pixels.shape:
            share = frame.share(self._key, self.config)
            if not share < self.config.similarity_threshold:  # NaN too: nothing but black in both
                return Detection(INTERMEDIATE, None if math.isnan(share) else share)
        self._shape, self._key = pixels.shape, frame.keep()
        return Detection(KEY, share)
