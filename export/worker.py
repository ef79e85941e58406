"""Exports one part in a process of its own: `python -m penguin_edge.export.worker JOB.json`.

A part's memory is given back by ending the process, and its peak is the process's own. The result, or the reason why
there is none, is written to the file that the job names; stdout and stderr belong to the exporters' chatter.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from penguin_edge.bundle.manifest import EMBEDDING, Bounds, TablePlace, config_hash
from penguin_edge.errors import PenguinError
from penguin_edge.export import check
from penguin_edge.export.auto import choose
from penguin_edge.export.stages import CHECK, LOAD, PROMPT, WRITE, Teller, part_stages, progress_line, step_name
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.files import write_json
from penguin_edge.machine import peak_mb, require_memory
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.penguin import PARTS
from penguin_edge.prompt.chat import Tokenizer
from penguin_edge.quantize.apply import DECODERS, embedding_scheme, load_quantized, quantize_rows
from penguin_edge.quantize.calibration.calibrate import (
    CalibrationOptions,
    calibrate,
    needed_bytes,
    read_calibration,
    ready_from,
    stage_count,
)
from penguin_edge.quantize.linear import quantize_weight
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.quantize.search.choice import AutoOptions

CALIBRATION = "calibration"
"""The job that makes integers for all parts, before any is exported."""
AUTO = "auto"
"""The job that measures layers and chooses a recipe, before anything else."""
TOOLS_BYTES = 1_500_000_000
"""Resident memory of importing torch and an exporter, on top of what a part takes."""
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_part(job: dict[str, Any]) -> dict[str, Any]:
    """Load one part, record its check data, compile it. Returns what the manifest says of it."""
    target = TARGETS[job["target"]]
    target.check_installed()
    baseline = peak_mb()
    part = job["part"]
    checkpoint = Checkpoint.open(
        job["source"], random_weights=job["random_weights"], seed=job["seed"], note=lambda line: None
    )
    recipe = Recipe.from_json(job["recipe"], job["recipe"]["name"])
    if part == AUTO:
        options = AutoOptions(CalibrationOptions(**job["data"]), job["max_size"], job["max_kl"], job["max_seq_len"])
        recipe, report = choose(checkpoint, target, options, Path(job["kept"]), job["max_ram"], _say)
        return {"recipe": recipe.to_json(), "report": report, "peak_mb": peak_mb(), "baseline_mb": baseline}
    if part == CALIBRATION:
        report = _calibrate(checkpoint, recipe, job)
        return {"calibration": report, "peak_mb": peak_mb(), "baseline_mb": baseline}
    folder = Path(job["folder"])
    teller = Teller(part_stages(checkpoint, part, recipe, target.compiles), _tell)
    if part == "embedding":
        teller.begin(WRITE)
        return _write_embedding(checkpoint, folder, job["embedding_dtype"], recipe) | {
            "peak_mb": peak_mb(),
            "baseline_mb": baseline,
        }
    extra = ("embedding",) if part in ("prefill", "decoder") else ()
    ready = ready_from(Path(job["calibrated"])) if job["calibrated"] else None
    teller.begin(LOAD)
    model, rows = load_quantized(checkpoint, (part, *extra), recipe, target.activations, ready, teller.begin)
    _record_check(part, model, checkpoint, folder, teller)
    if extra:
        model.embedding = None
    bounds = Bounds(**{**job["bounds"], "patch_buckets": tuple(job["bounds"]["patch_buckets"])})
    done = target.export_part(part, model, bounds, folder, teller.begin)
    layers = [asdict(row) for row in rows]
    head = asdict(done.head) if done.head else None
    return {"file": done.file, "head": head, "peak_mb": peak_mb(), "baseline_mb": baseline, "layers": layers}


def _tell(line: str) -> None:
    """The parent reads the last line of this form; an exporter may have left half a line before it."""
    print(f"\n{line}", flush=True)


def _say(done: int, total: int, stage: str) -> None:
    """A stage of those that all take as long as one another."""
    _tell(progress_line(done, 1, total, f"{done}/{total} {stage}"))


def _calibrate(checkpoint: Checkpoint, recipe: Recipe, job: dict[str, Any]) -> dict[str, Any]:
    """Make the integers, or the rest of them."""
    options = CalibrationOptions(**job["calibration"])
    samples = read_calibration(options, checkpoint)
    advice = "use fewer --calibration-samples, or a larger machine, or raise --max-ram"
    require_memory(needed_bytes(checkpoint, samples) + TOOLS_BYTES, "calibrating", advice, job["max_ram"])
    tokens = sum(len(sample.input_ids) for sample in samples)
    images = sum(len(sample.visuals) for sample in samples)
    total, done = stage_count(checkpoint, images > 0), itertools.count()
    made_for = calibrate(
        checkpoint,
        recipe,
        samples,
        Path(job["calibrated"]),
        lambda stage: _say(next(done), total, stage),
    )
    return {**options.to_json(), "samples": len(samples), "tokens": tokens, "images": images, "sha256": made_for}


def _record_check(part: str, model: Any, checkpoint: Checkpoint, folder: Path, teller: Teller) -> None:
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
    save_file(arrays, path, metadata={"model": config_hash(checkpoint.config)})


def _write_embedding(checkpoint: Checkpoint, folder: Path, dtype: str, recipe: Recipe) -> dict[str, Any]:
    text = checkpoint.config.text
    shape = (text.vocab_size, text.hidden_size)
    if dtype == "int8":
        levels, scales = quantize_rows(checkpoint.tensor("embedding.weight", shape, torch.float32))
        with (folder / EMBEDDING).open("wb") as stream:
            levels.numpy().tofile(stream)
            scales.numpy().tofile(stream)
        return {"file": EMBEDDING}
    if dtype == "int4":
        table = checkpoint.tensor("embedding.weight", shape, torch.float32)
        integers = quantize_weight(table, embedding_scheme(recipe, text.hidden_size), "embedding")
        with (folder / EMBEDDING).open("wb") as stream:
            (integers.levels[:, 0::2] | (integers.levels[:, 1::2] << 4)).numpy().tofile(stream)
            integers.scales.numpy().tofile(stream)
        group = text.hidden_size // integers.scales.shape[1]
        return {"place": asdict(TablePlace(EMBEDDING, 0, text.vocab_size * text.hidden_size // 2, group))}
    table = checkpoint.tensor("embedding.weight", shape, TORCH_DTYPES[dtype])
    raw = table.view(torch.int16) if table.element_size() == 2 else table
    with (folder / EMBEDDING).open("wb") as stream:
        raw.numpy().tofile(stream)
    return {"file": EMBEDDING}


def main(path: str) -> int:
    # Our own file, whose paths may hold bytes that are no UTF-8.
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    assert job["part"] in (*PARTS, *DECODERS, CALIBRATION, AUTO)
    begin = time.monotonic()
    try:
        result = export_part(job)
    except PenguinError as error:
        result = {"error": str(error)}
    except OSError as error:
        result = {"error": f"{error.filename or job['part']}: {error.strerror or error}; free some space and try again"}
    except MemoryError:
        result = {
            "error": f"out of memory while exporting the {job['part']}; lower --max-seq-len or use a larger machine"
        }
    result["seconds"] = time.monotonic() - begin
    write_json(Path(job["result"]), result)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
