"""Measures what `cost.py` needs, on the machine that will run the model, and how well it then predicts other sizes.

Points that the model is fitted to and points that it is tried on are measured in the same rounds, in turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from penguin_edge.bundle.contract import PROFILE
from penguin_edge.bundle.folder import Bundle
from penguin_edge.config import PATCH, PATCH_VALUES
from penguin_edge.errors import BundleError, InputError
from penguin_edge.files import read_json, write_json
from penguin_edge.machine import describe
from penguin_edge.media.frames import Frame
from penguin_edge.media.preprocess import positions, preprocess_image, resize
from penguin_edge.runtime.core.media import Library
from penguin_edge.runtime.engines.base import F32, Engine
from penguin_edge.runtime.engines.cache import Cache
from penguin_edge.runtime.live.cost import CostModel, Point, errors, fit
from penguin_edge.schema import Maybe, Record, Text, Whole

"""Beside the manifest, like `verify.json`: what was measured is no part of the bundle's hash."""
SCHEMA = "penguin-profile/3"
MEASURE_AGAIN = "run `penguin-edge profile` again"
RULES = Record(
    {"schema": Text((SCHEMA,)), "cost": Record({}, open=True)},
    {"machine": Record({}, open=True), "threads": Maybe(Whole(1, 4096))},
    open=True,
)
"""What is read of a profile; the tables are checked by `CostModel.from_json`."""
SIDES, TRIED_SIDES = (4, 8, 12, 16, 24, 32), (6, 10, 20, 28)
"""Frames of side x side patches, as far as the bundle takes them."""
SOURCES, TRIED_SOURCES = ((240, 320), (480, 640), (1080, 1920)), ((360, 480), (720, 1280))
"""Frames as they come, (height, width), made into every second of these sizes."""
BATCH, BATCHED = 4, 256
"""Frames in one call, and the most patches each that this is measured for: larger ones take as long one by one."""
CHUNKS, TRIED_CHUNKS = (1, 8, 32, 128, 256), (4, 16, 64, 192)
PASTS, TRIED_PASTS = (0.0, 0.03, 0.25, 0.5, 0.9), (0.12, 0.7)
"""Depths of the cache before, as shares of `max_seq_len`."""
DEEPEST = 4096
"""Beyond it the cache is not filled: that takes minutes and tells nothing new."""
ROUNDS, LONG_S = 5, 30.0
"""Rounds at least, and what they fill where they are short: a machine that is slow for a second spoils several."""
PAUSE_S = 0.1
"""Before what is measured of waking: threads no longer spin by then."""
SHORT_MS, AGAIN = 10.0, 4
"""A call that is shorter than this is made so many times more, and its median taken: the first one finds the caches of
the processor filled by another stage."""

WOKEN = ("encode", "project", "prefill")

Samples = dict[str, dict[Point, list[float]]]


def profile(engine: Engine, *, repeat: int | None = None, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, fit and try; JSON with the model, its errors and all samples.

    Args:
        repeat: rounds; None: `ROUNDS`, and more until `LONG_S` have passed.
    Raises:
        InputError: fewer than one round.
    """
    if repeat is not None and repeat < 1:
        raise InputError(f"{repeat} rounds, wanted at least 1")
    begin = time.monotonic()
    fitted, tried = _calls(engine)
    cache = engine.new_cache()
    samples: tuple[Samples, Samples] = ({}, {})
    woken: list[float] = []
    round_, passed = -1, 0.0
    while round_ < (repeat or ROUNDS) or (repeat is None and passed < LONG_S):
        of = str(repeat) if repeat else f"at least {ROUNDS}, {passed:.0f} s of at least {LONG_S:.0f}"
        progress(f"round {max(0, round_ + 1)} of {of}")
        for group, calls in zip(samples, (fitted, tried), strict=True):
            for stage, points in calls.items():
                for point, call in points.items():
                    took = _timed(call)
                    if round_ >= 0:
                        group.setdefault(stage, {}).setdefault(point, []).append(took)
        for group, pasts in zip(samples, (PASTS, TRIED_PASTS), strict=True):
            sizes = CHUNKS if group is samples[0] else TRIED_CHUNKS
            for stage, point, took in _decoder(engine, cache, pasts, sizes):
                if round_ >= 0:
                    group.setdefault(stage, {}).setdefault(point, []).append(took)
        if fitted and round_ >= 0:
            woken.append(_woken(engine, cache, fitted))
        round_, passed = round_ + 1, time.monotonic() - begin
    cache.close()
    if woken:
        awake = sum(statistics.median(next(iter(samples[0][stage].values()))) for stage in WOKEN)
        samples[0]["wake"] = {(0.0,): [max(0.0, took - awake) for took in woken]}
    model = fit(_whole(samples[0]))
    missed = errors(model, samples[1])
    every = [error for values in missed.values() for error in values]
    return {
        "schema": SCHEMA,
        "cost": model.to_json(),
        "error": {"median": float(np.median(every)), "p95": float(np.quantile(every, 0.95))},
        "error_by_stage": {stage: float(np.median(values)) for stage, values in missed.items()},
        "samples": {
            name: {stage: [[list(p), v] for p, v in points.items()] for stage, points in group.items()}
            for name, group in zip(("fitted", "tried"), samples, strict=True)
        },
        "seconds": time.monotonic() - begin,
    }


def _calls(engine: Engine) -> tuple[dict[str, dict[Point, Callable[[], Any]]], ...]:
    """What needs no cache: fitted, tried."""
    random, out = np.random.default_rng(0), []
    if engine.config.vision is None:
        return {}, {}
    merge, width = engine.config.image.video_merge_size, engine.config.vision.hidden_size
    for sides, sources in ((SIDES, SOURCES), (TRIED_SIDES, TRIED_SOURCES)):
        calls: dict[str, dict[Point, Callable[[], Any]]] = {"preprocess": {}, "encode": {}, "project": {}}
        taken = [side for side in sides if side * side <= engine.bounds.max_patches]
        for side in taken:
            patches = side * side
            pixels = random.standard_normal((BATCH, patches, PATCH_VALUES), dtype=np.float32)
            features = random.standard_normal((1, patches // merge**2, merge**2, width), dtype=np.float32)
            places = positions((side, side), merge)
            for frames in (1, BATCH)[: 1 + (engine.bounds.max_batch >= BATCH and patches <= BATCHED)]:
                calls["encode"][float(patches), float(frames)] = partial(engine.encode, pixels[:frames], *places)
            calls["project"][float(patches // merge**2),] = partial(engine.project, features)
        for source in sources:
            arrive = _arrival(engine, source)
            for side in taken[::2]:
                calls["preprocess"][float(source[0] * source[1]), float(side * side)] = partial(arrive, side)
        out.append(calls)
    return tuple(out)


def _arrival(engine: Engine, source: tuple[int, int]) -> Callable[[int], Any]:
    """What a frame of a stream goes through before the encoder. Every one shows another picture than the last."""
    image, merge = engine.config.image, engine.config.image.video_merge_size
    random = np.random.default_rng(0)
    coarse = [random.integers(0, 256, (12, 16, 3), dtype=np.uint8) for _ in range(2)]
    frames = cycle([Frame(resize(picture, *source), 0.0) for picture in coarse])
    clip = Library(image, "strict").new_clip(lambda: ())

    def arrive(side: int) -> Any:
        frame = Frame(np.array(next(frames).pixels), 0.0)
        clip.add(frame)
        return preprocess_image(frame, image, merge, size=(PATCH * side, PATCH * side))

    return arrive


def _whole(samples: Samples) -> Samples:
    """With the points of `encode` that are not measured: several large frames at once."""
    found = dict(samples.get("encode", {}))
    for patches, frames in list(found):
        if frames == 1 and any(many == BATCH for _, many in found):
            found.setdefault((patches, float(BATCH)), [BATCH * ms for ms in found[patches, 1.0]])
    return samples | ({"encode": found} if found else {})


def _woken(engine: Engine, cache: Cache, calls: dict[str, dict[Point, Callable[[], Any]]]) -> float:
    """A small frame after a pause, from the encoder on: the first point of each stage of `WOKEN`."""
    embeds = engine.embed(np.arange(_chunks(engine, CHUNKS)[0]))
    cache.truncate(0)
    first = {stage: next(iter(points.values())) for stage, points in calls.items()}
    first["prefill"] = partial(engine.forward, cache, embeds, np.array([-1]))
    time.sleep(PAUSE_S)
    first["preprocess"]()
    begin = time.perf_counter()
    for stage in WOKEN:
        first[stage]()
    return 1e3 * (time.perf_counter() - begin)


def _chunks(engine: Engine, sizes: tuple[int, ...]) -> list[int]:
    bounds = engine.bounds
    return [count for count in sizes if bounds.min_chunk <= count <= min(bounds.max_chunk, bounds.max_seq_len - 1)]


def _decoder(
    engine: Engine, cache: Cache, pasts: tuple[float, ...], sizes: tuple[int, ...]
) -> list[tuple[str, Point, float]]:
    """Prefill and decoding at some depths, the cache filled in between."""
    bounds = engine.bounds
    found: list[tuple[str, Point, float]] = []
    counts = _chunks(engine, sizes)
    ids = np.arange(max(counts, default=1)) % engine.config.text.vocab_size
    embeds = engine.embed(ids)
    cache.truncate(0)
    for past in sorted({math.floor(share * min(bounds.max_seq_len - len(ids), DEEPEST)) for share in pasts}):
        while cache.length < past:
            engine.forward(cache, embeds[: past - cache.length], np.empty(0, np.int64))

        def step(new: F32, past: int = past) -> None:
            cache.truncate(past)
            engine.forward(cache, new, np.array([-1]))

        for count in counts:
            found.append(("prefill", (float(count), float(past)), _timed(partial(step, embeds[:count]))))
        found.append(("decode", (float(past),), _timed(lambda: step(engine.embed(ids[:1])))))
        cache.truncate(past)
        if engine.can_move and past > 1:
            # What is in the cache no longer matters; a position less is.
            found.append(("move", (float(past - 1),), _timed(partial(engine.move, cache, 1, past, 0), again=0)))
    return found


def _timed(call: Callable[[], Any], again: int = AGAIN) -> float:
    samples: list[float] = []
    while not samples or (samples[-1] < SHORT_MS and len(samples) <= again):
        begin = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples)


def keep(bundle: Bundle, result: dict[str, Any]) -> None:
    """Write it into the bundle's folder, for the controller."""
    write_json(bundle.path(PROFILE), result)


def differences(bundle: Bundle, threads: int | None) -> str:
    """What the profile that is kept was measured with, where that is not this machine and as many threads."""
    data = _read(bundle.path(PROFILE))
    now, then = describe(), data.get("machine") or {}
    names = [f"{name} {then.get(name)!r}" for name in ("processor", "cores") if then.get(name) != now[name]]
    if data.get("threads") != threads:
        names.append(f"{data.get('threads') or 'all'} threads")
    return ", ".join(names)


def load(bundle: Bundle) -> CostModel | None:
    """The model that was kept, or None.

    Raises:
        BundleError: the file is damaged, or of another version.
    """
    path = bundle.path(PROFILE)
    if not path.exists():
        return None
    data = _read(path)
    return CostModel.from_json(data.get("cost"))


def _read(path: Path) -> dict[str, Any]:
    """The profile's JSON.

    Raises:
        BundleError: as `load`.
    """
    data: dict[str, Any] = read_json(path, rule=RULES, error=BundleError, advice=MEASURE_AGAIN)
    return data
