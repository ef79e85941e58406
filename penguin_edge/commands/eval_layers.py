"""`penguin-edge eval MODEL --layers`: cosine and SNR of every linear layer, and the encoder's features."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import DEFAULT_TARGET, TORCH_BYTES, emit, is_bundle, require_torch, say, table
from penguin_edge.dataset.records import missing_media, read_records
from penguin_edge.errors import InputError
from penguin_edge.evaluation.layer_study import PATCHES, draw_layers, feature_cosines, summary, worst
from penguin_edge.folders import scratch
from penguin_edge.machine import peak_mb, require_memory
from penguin_edge.media.frames import read_image
from penguin_edge.prompt.chat import part_kind, parts_of
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.tra.layout import media_source

if TYPE_CHECKING:
    from penguin_edge.dataset.samples import Sample
    from penguin_edge.model.checkpoint import Checkpoint
    from penguin_edge.quantize.apply import Calibrated
    from penguin_edge.quantize.linear import Activations
    from penguin_edge.quantize.recipe import Recipe

    Again = tuple[Recipe, Activations, Calibrated | None]

LENGTH = 512
"""Most tokens of a sample."""
NewCountProgress = Callable[[str], Callable[[int, int], None]]


def run_layers(args: argparse.Namespace, progress: NewCountProgress) -> int:
    """Measure, report, draw.

    Raises:
        InputError: flags that do not go together, or data that cannot be read.
    """
    for name in ("budget_study", "answers", "over", "limit", "budget", "keep_visual"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is about questions; leave it out with --layers")
    if args.quant and args.against:
        raise InputError("--quant compares a recipe with its own unquantized checkpoint; leave out --against")
    if args.quant and is_bundle(args.model):
        raise InputError(f"{args.model}: is a bundle, which has its recipe; leave out --quant, or name a checkpoint")
    if not args.quant and not is_bundle(args.model):
        raise InputError(f"{args.model}: is no bundle; --layers wants one, or a checkpoint and a recipe with --quant")
    if not args.quant and not args.against:
        raise InputError("--layers compares with the unquantized checkpoint; name it with --against")
    if args.out:
        _check_writable(Path(args.out))
    require_torch()
    import torch

    from penguin_edge.model.checkpoint import Checkpoint
    from penguin_edge.quantize.search.layer_errors import layer_errors

    if args.threads:
        torch.set_num_threads(args.threads)
    begin = time.monotonic()
    checkpoint = Checkpoint.open(args.against or args.model, seed=args.seed)
    samples = read_samples(args, checkpoint)
    pictures = read_pictures(args, checkpoint)
    with _recipe(args, checkpoint) as (recipe, activations, ready):
        _check_memory(checkpoint, recipe, samples)
        rows = layer_errors(checkpoint, recipe, activations, ready, samples, progress("stages"))
        features: list[dict[str, Any]] = []
        if pictures:
            engine = _engine(args, checkpoint, (recipe, activations, ready))
            reference = _eager(checkpoint.load(("encoder",), dtype=torch.float32))
            features = feature_cosines(engine, reference, pictures, PATCHES, progress("pictures"))
    layers = [asdict(row) for row in rows]
    read = {
        "samples": len(samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "images": sum(len(sample.visuals) for sample in samples),
    }
    if args.out:
        draw_layers(layers, args.out)
        say(f"picture: {args.out}")
    if args.json:
        about = {"model": args.model, "against": checkpoint.source, "recipe": recipe.name, **read}
        speed = {"seconds": time.monotonic() - begin, "peak_mb": peak_mb()}
        emit({**about, "layers": layers, "features": features, **speed})
        return 0
    print(table(summary(layers), indent=""))
    if len(worst(layers)) > 1:
        print("\n" + table(worst(layers), indent=""))
    if features:
        print("\n" + table(feature_table(features), indent=""))
    print(f"\nagainst {checkpoint.source}; read: {', '.join(f'{count} {name}' for name, count in read.items())}")
    return 0


def feature_table(features: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("encoder features, patches up to", "pictures", "cosine, mean", "least")]
    for row in features:
        cosines = (f"{row['cosine_mean']:.6f}", f"{row['cosine_min']:.6f}")
        rows.append((str(row["patches"]), str(row["pictures"]), *cosines))
    return rows


def read_samples(args: argparse.Namespace, checkpoint: Checkpoint) -> list[Sample]:
    """Samples for both models: records of --data, text of --text with the built-in pictures, or the built-in set.

    Raises:
        InputError: as `read_calibration`.
    """
    from penguin_edge.quantize.calibration.calibrate import BUILTIN, CalibrationOptions, read_calibration

    def read(source: str, count: int) -> list[Sample]:
        return read_calibration(
            CalibrationOptions(source, count, args.length or LENGTH, args.seed, args.allow_outside), checkpoint
        )

    sees = checkpoint.config.vision is not None
    samples = []
    if args.text:
        if Path(args.text).is_dir() or Path(args.text).suffix in (".json", ".jsonl"):
            raise InputError(f"{args.text}: holds records, no plain text; name it with --data")
        samples += read(args.text, args.pieces)
    if args.data:
        samples += read_data(args, read)
    elif args.text:
        samples += [sample for sample in read(BUILTIN, 2 * args.pieces) if sample.visuals] if sees else []
    else:
        samples += read(BUILTIN, args.pieces * (1 + sees))
    if sees and not any(sample.visuals for sample in samples):
        say("note: no pictures in the data; encoder and projector are left out")
    return samples


def read_data(args: argparse.Namespace, read: Callable[[str, int], list[Sample]]) -> list[Sample]:
    """Records of --data.

    Raises:
        InputError: no records there, or a file that one names is missing.
    """
    missing = missing_media(read_records(Path(args.data), allow_outside=args.allow_outside))
    if missing:
        raise InputError(missing[0])
    path = Path(args.data)
    if not path.is_dir() and path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{path}: wanted a data folder, or a file of records ending in .json or .jsonl")
    return read(args.data, args.pieces)


def read_pictures(args: argparse.Namespace, checkpoint: Checkpoint) -> list[NDArray[np.uint8]]:
    """Whole pictures for the encoder: those of --data, one record after another, or the built-in photographs."""
    from penguin_edge.quantize.calibration.builtin import builtin_photos

    config = checkpoint.config
    if config.vision is None:
        return []
    if not args.data:
        return list(builtin_photos().values())
    parts = [
        part
        for record in read_records(Path(args.data), allow_outside=args.allow_outside)
        for part in parts_of(record.messages)
    ]
    images = [part for part in parts if part_kind(part) == "image"][: args.pieces]
    return [read_image(media_source(part, config.image)[0]).pixels for part in images]


@contextlib.contextmanager
def _recipe(args: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[Again]:
    """Recipe, rounding of activations and results of calibration, from the bundle or from --quant."""
    from penguin_edge.export.pipeline import MIN_SEQ_LEN, ExportOptions, check_options
    from penguin_edge.export.targets.known import find_target
    from penguin_edge.export.verify import integers_again
    from penguin_edge.quantize.calibration.calibrate import (
        BUILTIN,
        CalibrationOptions,
        calibrate,
        read_calibration,
        ready_from,
    )
    from penguin_edge.quantize.recipe import find_recipe

    if not args.quant:
        bundle = Bundle.read(args.model)
        with integers_again(bundle, checkpoint, args.calibration, allow_outside=args.allow_outside) as again:
            if args.calibration and not again[0].calibrated:
                raise InputError(f"{args.model}: none of its schemes reads calibration data; leave out --calibration")
            if checkpoint.fingerprint() != bundle.manifest.source.get("sha256"):
                say(f"note: the weights of {checkpoint.source} differ from the files that the bundle was made from")
            yield again
        return
    # A checkpoint was exported to nothing yet: the errors are those of what `export` makes of it by default.
    recipe, target = find_recipe(args.quant), find_target(DEFAULT_TARGET)
    data = CalibrationOptions(args.calibration or BUILTIN, seed=args.seed, allow_outside=args.allow_outside)
    wanted = data if args.calibration or recipe.calibrated else None
    check_options(checkpoint, target, ExportOptions(target.name, recipe, MIN_SEQ_LEN, calibration=wanted))
    with scratch() as work:
        if wanted:
            calibrate(checkpoint, recipe, read_calibration(wanted, checkpoint), work, lambda stage: None)
        yield recipe, target.activations, ready_from(work) if wanted else None


def _engine(args: argparse.Namespace, checkpoint: Checkpoint, again: Again) -> Engine:
    """The bundle's engine, or eager encoding by the recipe."""
    from penguin_edge.quantize.apply import load_quantized

    if args.quant:
        return _eager(load_quantized(checkpoint, ("encoder",), *again)[0])
    return open_engine(Bundle.read(args.model), threads=args.threads)


def _eager(model: Any) -> Engine:
    """An engine that encodes."""
    from penguin_edge.model.eager import EagerEngine

    return EagerEngine(model, max_seq_len=1)


def _check_memory(checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[Sample]) -> None:
    """Refuse the work if memory cannot hold the largest part twice and what calibration needs beside one."""
    from penguin_edge.quantize.apply import DTYPES
    from penguin_edge.quantize.calibration.calibrate import needed_bytes

    dtype = None if recipe.quantized else DTYPES[recipe.precision]
    parts = ("encoder", "decoder") if checkpoint.config.vision else ("decoder",)
    largest = max(checkpoint.loaded_bytes((part,), dtype) for part in parts)
    advice = "use fewer --pieces, or a larger machine"
    require_memory(needed_bytes(checkpoint, samples) + largest + TORCH_BYTES, "comparing two models", advice)


def _check_writable(path: Path) -> None:
    """Refuse a picture that cannot be written, before the work begins.

    Raises:
        InputError: the picture's folder is not there.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: cannot write the picture (no such folder); give a file in a folder that exists")
