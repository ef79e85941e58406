"""Does one job of an export in a process of its own: `python -m penguin_edge.export.worker JOB.json OUTCOME.json`.

A part's memory is given back by ending the process, and its peak is the process's own. The outcome, or the reason why
there is none, is written to the second file; stdout and stderr belong to the exporters' chatter.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from penguin_edge.bundle.contract import EMBEDDING
from penguin_edge.bundle.manifest import TablePlace, config_hash
from penguin_edge.errors import PenguinError
from penguin_edge.export import check
from penguin_edge.export.estimate import choose
from penguin_edge.export.jobs import (
    CalibrationDone,
    CalibrationJob,
    ChoiceDone,
    ChoiceJob,
    Origin,
    PartDone,
    PartJob,
    read_job,
)
from penguin_edge.export.stages import CHECK, LOAD, PROMPT, WRITE, Teller, part_stages, progress_line, step_name
from penguin_edge.export.targets.known import find_target
from penguin_edge.files import write_json
from penguin_edge.machine import peak_mb, require_memory
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.quantize.apply import embedding_scheme, load_quantized, quantize_rows
from penguin_edge.quantize.calibration.calibrate import (
    calibrate,
    needed_bytes,
    read_calibration,
    ready_from,
    stage_count,
)
from penguin_edge.quantize.linear import quantize_weight
from penguin_edge.quantize.recipe import Recipe

TOOLS_BYTES = 1_500_000_000
"""Resident memory of importing torch and an exporter, on top of what a part takes."""
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def work(job: ChoiceJob | CalibrationJob | PartJob) -> ChoiceDone | CalibrationDone | PartDone:
    """Do a job.

    Raises:
        PenguinError: the data, the checkpoint or the exporter does not allow it.
    """
    match job:
        case ChoiceJob():
            return _choose(job)
        case CalibrationJob():
            return _calibrate(job)
        case PartJob():
            return export_part(job)
    assert_never(job)


def export_part(job: PartJob) -> PartDone:
    """Load one part, record its check data, compile it."""
    target, checkpoint, part = find_target(job.origin.target), _opened(job.origin), job.part
    teller = Teller(part_stages(checkpoint, part, job.recipe, target.compiles), _tell)
    if part == "embedding":
        teller.begin(WRITE)
        return _write_embedding(checkpoint, job.folder, job.embedding_dtype, job.recipe)
    extra = ("embedding",) if part in ("prefill", "decoder") else ()
    ready = ready_from(job.calibrated) if job.calibrated else None
    teller.begin(LOAD)
    model, rows = load_quantized(checkpoint, (part, *extra), job.recipe, target.activations, ready, teller.begin)
    _record_check(part, model, checkpoint, job.folder, teller)
    if extra:
        model.embedding = None
    done = target.export_part(part, model, job.bounds, job.folder, teller.begin)
    return PartDone(done.file, done.head, tuple(rows))


def _opened(origin: Origin) -> Checkpoint:
    return Checkpoint.open(
        origin.source, random_weights=origin.random_weights, seed=origin.seed, note=lambda line: None
    )


def _tell(line: str) -> None:
    """The parent reads the last line of this form; an exporter may have left half a line before it."""
    print(f"\n{line}", flush=True)


def _say(done: int, total: int, stage: str) -> None:
    """A stage of those that all take as long as one another."""
    _tell(progress_line(done, 1, total, f"{done}/{total} {stage}"))


def _choose(job: ChoiceJob) -> ChoiceDone:
    """Measure layers, or the rest of them, and choose."""
    target = find_target(job.origin.target)
    return ChoiceDone(*choose(_opened(job.origin), target, job.auto, job.kept, job.max_ram, _say))


def _calibrate(job: CalibrationJob) -> CalibrationDone:
    """Make the integers, or the rest of them."""
    checkpoint, options = _opened(job.origin), job.data
    samples = read_calibration(options, checkpoint)
    advice = "use fewer --calibration-samples, or a larger machine, or raise --max-ram"
    require_memory(needed_bytes(checkpoint, samples) + TOOLS_BYTES, "calibrating", advice, job.max_ram)
    tokens = sum(len(sample.input_ids) for sample in samples)
    images = sum(len(sample.visuals) for sample in samples)
    total, done = stage_count(checkpoint, images > 0), itertools.count()
    made_for = calibrate(
        checkpoint,
        job.recipe,
        samples,
        job.calibrated,
        lambda stage: _say(next(done), total, stage),
    )
    read = {"samples": len(samples), "tokens": tokens, "images": images, "sha256": made_for}
    return CalibrationDone({**options.to_json(), **read})


def _record_check(part: str, model: PenguinModel, checkpoint: Checkpoint, folder: Path, teller: Teller) -> None:
    """Add this part's eager outputs to the check data; later parts read what earlier ones left."""
    teller.begin(PROMPT if part in ("prefill", "decoder") else CHECK)
    path = folder / "check.partial"
    arrays = dict(load_file(path)) if path.is_file() else {}
    if part == "encoder":
        arrays |= check.check_patches(checkpoint.config)
        arrays |= check.check_encoder(model, arrays)
    elif part == "projector":
        arrays |= check.check_projector(model, arrays)
    else:
        if part == "prefill" or "cache" not in arrays:
            arrays["ids"] = check.check_ids(checkpoint.config, Tokenizer.of(checkpoint))
            arrays |= check.check_prefill(model, arrays)
        if part == "decoder":
            arrays |= check.check_decoder(model, arrays, lambda index: teller.begin(step_name(index)))
            del arrays["cache"]
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    overflown = [name for name, value in arrays.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if overflown:
        precision = str(model.dtype).removeprefix("torch.")
        raise PenguinError(
            f"the {part} of this model gives NaN or infinite numbers in {precision} ({overflown[0]} of the check "
            "data), so no bundle of it could answer; export it in a wider precision (--quant fp32)"
        )
    save_file(arrays, path, metadata={"model": config_hash(checkpoint.config)})


def _write_embedding(checkpoint: Checkpoint, folder: Path, dtype: str, recipe: Recipe) -> PartDone:
    text = checkpoint.config.text
    shape = (text.vocab_size, text.hidden_size)
    if dtype == "int8":
        levels, scales = quantize_rows(checkpoint.tensor("embedding.weight", shape, torch.float32))
        with (folder / EMBEDDING).open("wb") as stream:
            levels.numpy().tofile(stream)
            scales.numpy().tofile(stream)
        return PartDone(EMBEDDING)
    if dtype == "int4":
        table = checkpoint.tensor("embedding.weight", shape, torch.float32)
        integers = quantize_weight(table, embedding_scheme(recipe, text.hidden_size), "embedding")
        with (folder / EMBEDDING).open("wb") as stream:
            (integers.levels[:, 0::2] | (integers.levels[:, 1::2] << 4)).numpy().tofile(stream)
            integers.scales.numpy().tofile(stream)
        group = text.hidden_size // integers.scales.shape[1]
        return PartDone(EMBEDDING, TablePlace(EMBEDDING, 0, text.vocab_size * text.hidden_size // 2, group))
    table = checkpoint.tensor("embedding.weight", shape, TORCH_DTYPES[dtype])
    raw = table.view(torch.int16) if table.element_size() == 2 else table
    with (folder / EMBEDDING).open("wb") as stream:
        raw.numpy().tofile(stream)
    return PartDone(EMBEDDING)


def main(job_path: str, outcome_path: str) -> int:
    begin, name = time.monotonic(), "worker"
    outcome: dict[str, object]
    try:
        job = read_job(Path(job_path))
        name = job.name
        find_target(job.origin.target).check_installed()
        baseline = peak_mb()
        done = work(job).to_json()
        outcome = {"done": done, "peak_mb": peak_mb(), "baseline_mb": baseline, "seconds": time.monotonic() - begin}
    except PenguinError as error:
        outcome = {"error": str(error)}
    except OSError as error:
        outcome = {"error": f"{error.filename or name}: {error.strerror or error}; free some space and try again"}
    except MemoryError:
        outcome = {"error": f"out of memory while exporting the {name}; lower --max-seq-len or use a larger machine"}
    write_json(Path(outcome_path), outcome)
    return 1 if "error" in outcome else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
