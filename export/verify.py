"""Stage by stage: does a bundle compute what the eager model computes?

Every stage but the last is fed the reference's own inputs, so that an error is reported where it arises, not where it
arrives. `tokens` is judged with the reference's tokens fed back, so that one near-tie does not hide all that follows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import CHECK, VERIFY
from penguin_edge.bundle.folder import Bundle
from penguin_edge.bundle.manifest import Manifest
from penguin_edge.errors import BundleError, InputError, WriteError
from penguin_edge.export.cases import CASES, DECODED, Arrays, distance, stored_arrays
from penguin_edge.files import write_json
from penguin_edge.folders import scratch
from penguin_edge.machine import peak_mb, require_memory
from penguin_edge.media.preprocess import positions, preprocess_image, resize
from penguin_edge.runtime.engines.base import Engine, chunks
from penguin_edge.runtime.engines.cache import Cache
from penguin_edge.runtime.engines.self_check import open_tokenizer

if TYPE_CHECKING:
    import torch

    from penguin_edge.model.checkpoint import Checkpoint
    from penguin_edge.quantize.apply import Calibrated
    from penguin_edge.quantize.linear import Activations
    from penguin_edge.quantize.recipe import Recipe


@dataclass(frozen=True)
class Tolerance:
    """Largest error over the reference's largest value, smallest cosine, and share of equal greedy choices."""

    relative: float
    cosine: float
    top1: float
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.999999, 1.0, "the same arithmetic in another order"),
    "fp16": Tolerance(3e-2, 0.999, 0.9, "engines round to half precision at other places; near-ties may flip"),
}
QUANTIZED = Tolerance(
    5e-2, 0.999, 0.99, "activations at the border of two levels round either way, each time by a whole level"
)


NOISE = 2
"""Factor by which an engine may differ more from a model than the model differs from itself: both differences are draws
of one noise."""
LEAST = Tolerance(0.2, 0.99, 0.99, "what is looser tells nothing")


def tolerance_of(manifest: Manifest) -> Tolerance:
    """Tolerance of a bundle's arithmetic against the eager model's, which has the same integers.

    Raises:
        BundleError: the manifest does not say in which numbers the bundle computes.
    """
    if manifest.quantization:
        return QUANTIZED
    if manifest.precision not in TOLERANCES:
        raise BundleError(
            f"the manifest's precision is {manifest.precision!r}, which does not say in which numbers the bundle "
            f"computes; wanted {' or '.join(TOLERANCES)}: export the model again"
        )
    return TOLERANCES[manifest.precision]


def beyond_noise(tolerance: Tolerance, reference: Arrays, name: str) -> tuple[Tolerance, str]:
    """The tolerance of one stage, and what it was widened for.

    Where activations are rounded, a difference in the last digit of an input can become one of a whole level, and a
    deep model of weights that were never trained passes it on undamped. How far it carries is measured when the check
    data are made, on the eager model itself: an engine cannot agree with the model better than the model agrees with
    itself.
    """
    if f"noise_{name}" not in reference:
        return tolerance, ""
    relative, cosine = (float(x) for x in reference[f"noise_{name}"])
    widened = replace(
        tolerance,
        relative=min(max(tolerance.relative, NOISE * relative), LEAST.relative),
        cosine=max(min(tolerance.cosine, 1 - NOISE * (1 - cosine)), LEAST.cosine),
    )
    if widened == tolerance:
        return tolerance, ""
    return widened, f"eager with inputs moved in their last digits: cosine {cosine:.6f}, relative {relative:.1e}"


@dataclass(frozen=True)
class StageResult:
    """One comparison. `relative` is max_abs over the largest reference value."""

    name: str
    max_abs: float
    relative: float
    cosine: float
    passed: bool
    detail: str = ""


def reference_arrays(
    bundle: Bundle, checkpoint: Checkpoint | None, calibration: str | None = None, *, allow_outside: bool = False
) -> Arrays:
    """The bundle's own check data, or the same computed again from a checkpoint, one part in memory at a time.

    Args:
        calibration: what a calibrated bundle was made with; its integers are made again.
        allow_outside: whether records of that data may name media outside their own folder.
    Raises:
        BundleError: the bundle holds no check data, was made from a model of another shape, or with other data.
        InputError: the bundle was calibrated, and no data is named.
        MemoryLimitError: this machine cannot hold the checkpoint's largest part beside the bundle.
    """
    if checkpoint is None:
        return stored_arrays(bundle.path(CHECK), bundle.manifest.model)
    from penguin_edge.quantize.apply import DTYPES, load_quantized

    with integers_again(bundle, checkpoint, calibration, allow_outside=allow_outside) as (recipe, activations, ready):

        def load(*parts: str) -> Any:
            return load_quantized(checkpoint, parts, recipe, activations, ready)[0]

        return _computed(bundle, checkpoint, DTYPES[recipe.precision], load)


@contextlib.contextmanager
def integers_again(
    bundle: Bundle, checkpoint: Checkpoint, calibration: str | None = None, *, allow_outside: bool = False
) -> Iterator[tuple[Recipe, Activations, Calibrated | None]]:
    """A bundle's recipe, how its engine rounds activations, and what calibration leaves, made again.

    Args:
        calibration, allow_outside: as `reference_arrays`.
    Raises:
        BundleError: the bundle was made from a model of another shape, or with other data.
        InputError: the bundle was calibrated, and no data is named.
    """
    from penguin_edge.export.targets.known import find_target
    from penguin_edge.quantize.calibration.calibrate import ready_from
    from penguin_edge.quantize.recipe import PRESETS, Recipe

    config = bundle.manifest.model
    if (checkpoint.config.text, checkpoint.config.vision) != (config.text, config.vision):
        raise BundleError(
            f"{bundle.folder}: exported from a model of another shape than {checkpoint.source}; name the "
            "checkpoint that "
            f"the bundle was made from ({bundle.manifest.source.get('name')})"
        )
    stored = bundle.manifest.quantization.get("recipe")
    recipe = Recipe.from_json(stored, bundle.manifest.precision) if stored else PRESETS[bundle.manifest.precision]
    activations = find_target(bundle.manifest.target).activations
    with contextlib.ExitStack() as stack:
        ready = None
        if recipe.calibrated:
            work = stack.enter_context(scratch())
            _calibrate_again(bundle, checkpoint, recipe, calibration, allow_outside, work)
            ready = ready_from(work)
        yield recipe, activations, ready


def _calibrate_again(
    bundle: Bundle, checkpoint: Checkpoint, recipe: Recipe, calibration: str | None, allow_outside: bool, work: Path
) -> None:
    from penguin_edge.quantize.calibration.calibrate import (
        BUILTIN,
        CalibrationOptions,
        calibrate,
        digest,
        read_calibration,
    )

    made = dict(bundle.manifest.quantization["calibration"])
    if calibration is None and made["source"] == BUILTIN:
        calibration = BUILTIN
    if calibration is None:
        raise InputError(
            f"{bundle.folder} was calibrated with {made['source']}; name the data with --calibration, or leave out "
            "--against"
        )
    kept = {name: made[name] for name in ("samples", "length", "seed")}
    samples = read_calibration(CalibrationOptions(calibration, **kept, allow_outside=allow_outside), checkpoint)
    if digest(checkpoint, recipe, samples) != made["sha256"]:
        raise BundleError(
            f"{bundle.folder}: {calibration} or {checkpoint.source} is not what the bundle was calibrated with "
            f"({made['source']}, {bundle.manifest.source.get('name')})"
        )
    calibrate(checkpoint, recipe, samples, work, lambda stage: None)


def _computed(bundle: Bundle, checkpoint: Checkpoint, dtype: torch.dtype, load: Callable[..., Any]) -> Arrays:
    from penguin_edge.export import check

    config = bundle.manifest.model
    largest = max(checkpoint.loaded_bytes(parts, dtype) for parts in (("encoder",), ("embedding", "decoder")))
    require_memory(
        sum(entry.bytes for entry in bundle.manifest.files.values()) + largest,
        f"computing {checkpoint.source} beside the bundle",
        "verify with the bundle's own check data (leave out --against), or on a larger machine",
    )
    arrays: Arrays = {"ids": check.check_ids(config, open_tokenizer(bundle))}
    if config.vision is not None:
        arrays |= check.check_patches(config)
        arrays |= check.check_encoder(load("encoder"), arrays)
        arrays |= check.check_projector(load("projector"), arrays)
    if "prefill" in bundle.manifest.graphs:
        arrays |= check.check_prefill(load("prefill", "embedding"), arrays)
    model = load("decoder", "embedding")
    if "prefill" not in bundle.manifest.graphs:
        arrays |= check.check_prefill(model, arrays)
    return arrays | check.check_decoder(model, arrays)


def compare(name: str, got: NDArray, wanted: NDArray, tolerance: Tolerance, detail: str = "") -> StageResult:
    """Shapes must be equal, all numbers finite, and both measures within the tolerance."""
    if got.shape != wanted.shape:
        return StageResult(
            name, float("inf"), float("inf"), 0.0, False, f"shape {list(got.shape)}, wanted {list(wanted.shape)}"
        )
    max_abs, relative, cosine = distance(got, wanted)
    passed = bool(np.isfinite(got).all()) and relative <= tolerance.relative and cosine >= tolerance.cosine
    return StageResult(name, max_abs, relative, cosine, passed, detail)


def verify_stages(
    engine: Engine, reference: Arrays, tolerance: Tolerance, progress: Callable[[str], None]
) -> list[StageResult]:
    """All stages of one engine against the reference arrays."""
    exact = TOLERANCES["fp32"]
    stages: list[StageResult] = []
    if engine.config.vision is not None:
        found: dict[str, list[StageResult]] = {name: [] for name in ("pixels", "patches", "encoder", "projector")}
        for case in range(len(CASES)):
            height, width, merge = (int(x) for x in reference[f"size_{case}"])
            image = reference[f"image_{case}"]
            patches = preprocess_image(image, engine.config.image, merge, size=(height, width))
            rows, cols = positions((height // 14, width // 14), merge)
            progress("encoder")
            features = engine.encode(reference[f"patches_{case}"], rows, cols)
            progress("projector")
            shaped = reference[f"features_{case}"]
            visual = engine.project(shaped.reshape(1, -1, merge**2, shaped.shape[-1]))
            pixels = resize(image, height, width)
            rule, why = beyond_noise(tolerance, reference, f"features_{case}")
            found["pixels"].append(compare("pixels", pixels, reference[f"pixels_{case}"], exact))
            found["patches"].append(compare("patches", patches.pixels[None], reference[f"patches_{case}"], exact))
            found["encoder"].append(compare("encoder", features, shaped, rule, why))
            found["projector"].append(compare("projector", visual, reference[f"visual_{case}"], tolerance))
        stages += [max(each, key=lambda stage: (not stage.passed, stage.relative)) for each in found.values()]
    progress("embedding")
    ids = reference["ids"]
    text = ids != engine.config.image_token_id
    stages.append(compare("embedding", engine.embed(ids[text]), reference["embeds"][text], tolerance))
    progress("prefill")
    with engine.new_cache() as cache:
        return stages + _decoder_stages(engine, cache, reference, tolerance, progress)


def prefill(
    engine: Engine,
    cache: Cache,
    embeds: NDArray[np.float32],
    chunk: int,
    places: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Append `embeds` in chunks, at rotary `places` or those that follow; logits [1, V] after the last token."""
    logits = np.empty((0, 0), np.float32)
    for rows in chunks(len(embeds), replace(engine.bounds, max_chunk=chunk)):
        last = rows.stop == len(embeds)
        at = None if places is None else places[rows]
        logits = engine.forward(cache, embeds[rows], np.full(int(last), -1, np.int64), positions=at)
    return logits


def _decoder_stages(
    engine: Engine, cache: Cache, reference: Arrays, tolerance: Tolerance, progress: Callable[[str], None]
) -> list[StageResult]:
    embeds, tokens = reference["embeds"], reference["tokens"]
    first = prefill(engine, cache, embeds, engine.bounds.max_chunk)
    rule, why = beyond_noise(tolerance, reference, "prefill")
    stages = [compare("prefill", first, reference["prefill"], rule, why)]
    progress("decode")
    rows = [engine.forward(cache, engine.embed(tokens[i : i + 1]), np.array([-1]))[0] for i in range(DECODED)]
    logits = np.stack(rows)
    kept = len(reference["decode"])
    stages.append(compare("decode", logits[:kept], reference["decode"], rule, why))
    wanted = np.append(tokens[:1], reference["decode_top"])
    every = np.concatenate((first, logits))
    below = every.max(-1) - every[np.arange(len(every)), wanted]
    # Two tokens closer than the errors of both may change places: no sign of a wrong graph.
    near = 2 * max(stage.max_abs for stage in stages)
    equal = below <= near
    share = float(equal.mean())
    ties = int((equal & (below > 0)).sum())
    detail = f"{int(equal.sum())} of {len(equal)} greedy choices equal"
    if ties:
        detail += f", {ties} of them near-ties"
    stages.append(StageResult("tokens", float((~equal).sum()), 1.0 - share, share, share >= tolerance.top1, detail))
    progress("truncate")
    middle = len(embeds) // 2
    cache.truncate(middle)
    again = prefill(engine, cache, embeds[middle:], 7)
    stages.append(compare("truncate", again, reference["prefill"], rule, f"truncated to {middle}, then chunks of 7"))
    # Bundles of earlier exports know no positions, and their check data say nothing of them.
    if engine.can_place and "placed" in reference:
        progress("positions")
        cache.truncate(0)
        placed = prefill(engine, cache, embeds, engine.bounds.max_chunk, reference["positions"])
        stages.append(compare("positions", placed, reference["placed"], rule, "the prompt with gaps between positions"))
    return stages


def verify_bundle(
    bundle: Bundle,
    engine: Engine,
    checkpoint: Checkpoint | None,
    progress: Callable[[str], None],
    calibration: str | None = None,
    *,
    allow_outside: bool = False,
) -> dict[str, Any]:
    """Verify, write `verify.json` beside the manifest, and return its content."""
    reference = reference_arrays(bundle, checkpoint, calibration, allow_outside=allow_outside)
    tolerance = tolerance_of(bundle.manifest)
    stages = verify_stages(engine, reference, tolerance, progress)
    result = {
        "passed": all(stage.passed for stage in stages),
        "stages": [asdict(stage) for stage in stages],
        "engine": engine.name,
        "precision": bundle.manifest.precision,
        "against": "check data of the bundle" if checkpoint is None else checkpoint.source,
        "tolerance": asdict(tolerance),
        "peak_mb": peak_mb(),
        "manifest_sha256": bundle.manifest.to_json()["sha256"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    try:
        write_json(bundle.path(VERIFY), result)
    except WriteError as error:
        progress(f"{VERIFY} not written: {error.reason}")
    return result
