"""Measures what `cost.py` needs, on the machine that will run the model, and how well it then predicts other sizes.

Points that the model is fitted to and points that it is tried on are measured in the same rounds, in turn.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from penguin_edge.bundle import Bundle, write_json
from penguin_edge.config import PATCH_VALUES
from penguin_edge.errors import BundleError, InputError
from penguin_edge.preprocess import positions, preprocess_image
from penguin_edge.runtime.cost import CostModel, Point, errors, fit
from penguin_edge.runtime.engine import Engine

PROFILE = "profile.json"
"""Beside the manifest, like `verify.json`: what was measured is no part of the bundle's hash."""
SCHEMA = "penguin-profile/1"
SIDES = (4, 8, 12, 16, 24, 32)
"""Frames of side x side patches, as far as the bundle takes them."""
TRIED_SIDES = (6, 10, 20, 28)
CHUNKS, TRIED_CHUNKS = (1, 8, 32, 128, 256), (4, 16, 64, 192)
PASTS, TRIED_PASTS = (0.0, 0.25, 0.5, 0.9), (0.12, 0.7)
"""Depths of the cache before, as shares of `max_seq_len`."""
DEEPEST = 4096
"""Beyond it the cache is not filled: that takes minutes and tells nothing new."""

Samples = dict[str, dict[Point, list[float]]]


def profile(engine: Engine, *, repeat: int = 5, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, fit and try; JSON with the model, its errors and all samples.

    Raises:
        InputError: fewer than one round.
    """
    if repeat < 1:
        raise InputError(f"{repeat} rounds, wanted at least 1")
    begin = time.monotonic()
    fitted, tried = _calls(engine)
    samples: tuple[Samples, Samples] = ({}, {})
    for round_ in range(-1, repeat):
        progress(f"round {max(0, round_ + 1)} of {repeat}")
        for group, calls in zip(samples, (fitted, tried), strict=True):
            for stage, points in calls.items():
                for point, call in points.items():
                    took = _timed(call)
                    if round_ >= 0:
                        group.setdefault(stage, {}).setdefault(point, []).append(took)
        for group, pasts in zip(samples, (PASTS, TRIED_PASTS), strict=True):
            sizes = CHUNKS if group is samples[0] else TRIED_CHUNKS
            for stage, point, took in _decoder(engine, pasts, sizes):
                if round_ >= 0:
                    group.setdefault(stage, {}).setdefault(point, []).append(took)
    engine.truncate(0)
    model = fit(samples[0])
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
    for sides in (SIDES, TRIED_SIDES):
        calls: dict[str, dict[Point, Callable[[], Any]]] = {"preprocess": {}, "encode": {}, "project": {}}
        for side in (side for side in sides if side * side <= engine.bounds.max_patches):
            patches = side * side
            picture = random.integers(0, 256, (14 * side, 14 * side, 3), dtype=np.uint8)
            pixels = random.standard_normal((1, patches, PATCH_VALUES), dtype=np.float32)
            features = random.standard_normal((1, patches // merge**2, merge**2, width), dtype=np.float32)
            places = positions((side, side), merge)
            calls["preprocess"][float(picture[..., 0].size),] = _prepare(engine, picture, merge)
            calls["encode"][float(patches),] = _encode(engine, pixels, places)
            calls["project"][float(patches // merge**2),] = _project(engine, features)
        out.append(calls)
    return tuple(out)


def _prepare(engine: Engine, picture: Any, merge: int) -> Callable[[], Any]:
    size = picture.shape[0], picture.shape[1]
    return lambda: preprocess_image(picture, engine.config.image, merge, size=size)


def _encode(engine: Engine, pixels: Any, places: Any) -> Callable[[], Any]:
    return lambda: engine.encode(pixels, *places)


def _project(engine: Engine, features: Any) -> Callable[[], Any]:
    return lambda: engine.project(features)


def _decoder(engine: Engine, pasts: tuple[float, ...], sizes: tuple[int, ...]) -> list[tuple[str, Point, float]]:
    """Prefill and decoding at some depths, the cache filled in between."""
    bounds = engine.bounds
    found: list[tuple[str, Point, float]] = []
    ids = np.arange(max(sizes)) % engine.config.text.vocab_size
    embeds = engine.embed(ids)
    engine.truncate(0)
    for share in pasts:
        past = math.floor(share * min(bounds.max_seq_len - max(sizes), DEEPEST))
        while engine.kv_len < past:
            engine.forward(embeds[: min(bounds.max_chunk, len(embeds), past - engine.kv_len)], np.empty(0, np.int64))
        for count in sizes:
            if not bounds.min_chunk <= count <= bounds.max_chunk or past + count > bounds.max_seq_len:
                continue
            took = _timed(lambda n=count: engine.forward(embeds[:n], np.array([-1])))  # type: ignore[misc]
            engine.truncate(past)
            found.append(("prefill", (float(count), float(past)), took))
        if past < bounds.max_seq_len:
            took = _timed(lambda: engine.forward(engine.embed(ids[:1]), np.array([-1])))
            engine.truncate(past)
            found.append(("decode", (float(past),), took))
    return found


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def keep(bundle: Bundle, result: dict[str, Any]) -> None:
    """Write it into the bundle's folder, for the controller."""
    write_json(bundle.path(PROFILE), result)


def load(bundle: Bundle) -> CostModel | None:
    """The model that was kept, or None.

    Raises:
        BundleError: the file is damaged, or of another version.
    """
    path = bundle.path(PROFILE)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{bundle.path(PROFILE)}: cannot be read ({error}); run `penguin-edge profile` again"
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BundleError(f"{path}: not of this version; run `penguin-edge profile` again")
    return CostModel.from_json(data["cost"])
