"""From a checkpoint to a bundle: parts one after another, each in its own process, then one rename.

Before work starts the memory and the disk that it needs are compared with what there is, and the KV memory that the
bundle will cost is said. Nothing is left behind when a part fails or the user stops.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from penguin_edge import child
from penguin_edge.bundle.contract import CHECK, TOKENIZER, signature
from penguin_edge.bundle.folder import Bundle, finish
from penguin_edge.bundle.manifest import GraphEntry, Manifest, TablePlace
from penguin_edge.bundle.writing import check_place, writing
from penguin_edge.errors import BundleError, InputError, MemoryLimitError, PenguinError
from penguin_edge.export.estimate import bundle_bytes
from penguin_edge.export.jobs import (
    CalibrationJob,
    ChoiceJob,
    Done,
    Job,
    Origin,
    Outcome,
    PartJob,
    read_outcome,
    write_job,
)
from penguin_edge.export.stages import LINE, VERIFY, Follower, part_stages, seconds_of, verify_seconds
from penguin_edge.export.targets.base import Target
from penguin_edge.export.targets.known import check_with, find_target
from penguin_edge.export.worker import TOOLS_BYTES
from penguin_edge.files import parse_json
from penguin_edge.folders import held, place_of, scratch
from penguin_edge.machine import human_bytes, require_memory, resident_mb, version_of
from penguin_edge.model.checkpoint import Checkpoint, meta_model
from penguin_edge.prompt.chat import EMPTY_THINK, END, IMAGE, START
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.quantize.apply import DECODERS, check_layers, chosen, embedding_scheme, linears, shareable
from penguin_edge.quantize.calibration import kept
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.recipe import PRESETS, Recipe
from penguin_edge.quantize.search.choice import STAND_IN, AutoOptions

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "67108864"}
"""glibc would raise the first to 32 MB, and weights that are freed would stay as holes in the heap."""
MIN_SEQ_LEN = 128
"""Positions that `verify` needs for its prompt and answer."""
DTYPE_NAMES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


class ExportProgress(Protocol):
    """What the pipeline tells while it works."""

    def plan(self, expected: Mapping[str, float]) -> None:
        """Seconds that parts to come are expected to take, were this a machine of a certain speed."""

    def begin(self, part: str, estimate_mb: float) -> None: ...
    def tick(self, part: str, seconds: float, resident_mb: float, stage: str, share: float | None) -> None:
        """Twice a second: what the part does by name, "" for nothing to say, and which share of it is done."""

    def done(self, part: str, seconds: float, peak_mb: float) -> None: ...


@dataclass(frozen=True)
class ExportOptions:
    """What the command line offers, with its defaults; `--target` has its own."""

    target: str
    recipe: Recipe = PRESETS["fp32"]
    max_seq_len: int = 4096
    seed: int = 0
    max_ram: int | None = None
    overwrite: bool = False
    verify: bool = True
    """Run the finished bundle against its check data before it gets its name."""
    calibration: CalibrationOptions | None = None
    """What the model reads for a recipe that needs data."""
    auto: dict[str, Any] | None = None
    """What `choose_recipe` said of the recipe: for the manifest, and for the size that the bundle must not exceed."""


@dataclass(frozen=True)
class Estimate:
    """What an export will need, in bytes."""

    kv_bytes: int
    disk_bytes: int
    peak_bytes: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peak_bytes.values())


def parts_of(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...]:
    """What is exported, in this order; the decoder goes on with the check data where `prefill` ended."""
    vision = ("encoder", "projector") if checkpoint.config.vision else ()
    return (*vision, *(("prefill",) if recipe.prefill else ()), "decoder", "embedding")


def linear_shapes(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of every linear layer, by name."""
    parts = [part for part in parts_of(checkpoint, recipe) if part != "embedding"]
    model = meta_model(checkpoint.config, [DECODERS.get(part, part) for part in parts])
    found = [item for part in parts for item in linears(model, part).items()]
    return {name: (linear.out_features, linear.in_features) for name, linear in found}


def disk_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """What the weights will take: fp32 scales at groups of 64 are half a bit per weight."""
    width = VALUE_BYTES[recipe.precision]
    total = sum(checkpoint.parameter_bytes(DECODERS.get(part, part), width) for part in parts_of(checkpoint, recipe))
    for layer, (outputs, inputs) in linear_shapes(checkpoint, recipe).items():
        scheme, _ = chosen(recipe, layer, inputs)
        if scheme is not None:
            total -= outputs * inputs * (8 * width - scheme.bits) // 8
            total += 4 * outputs * inputs // (scheme.group or inputs)
    if recipe.embedding == "int8":
        total -= checkpoint.parameter_bytes("embedding", width - 1)
    elif recipe.embedding == "int4":
        # A table that the head shares is known when it is exported: this is the most.
        total -= checkpoint.parameter_bytes("embedding", width) - checkpoint.parameter_bytes("embedding", 1) * 10 // 16
    return total


def shares_table(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether the embedding's int4 rows are the head's: one tensor in the checkpoint, under one scheme."""
    head, _ = chosen(recipe, "decoder.lm_head", checkpoint.config.text.hidden_size)
    tied = checkpoint.config.text.tie_word_embeddings
    return recipe.embedding == "int4" and tied and head is not None and shareable(head)


def kv_dtype(target: Target, recipe: Recipe) -> str:
    """What the KV cache holds."""
    return recipe.kv or target.kv_dtype(recipe.precision)


def kv_bytes(checkpoint: Checkpoint, max_seq_len: int, dtype: str) -> int:
    """Bytes of the KV cache: keys and values of all layers."""
    return checkpoint.config.text.kv_values * max_seq_len * VALUE_BYTES[dtype]


def estimate(checkpoint: Checkpoint, target: Target, options: ExportOptions) -> Estimate:
    """Memory per part, disk, and KV cache, before anything is done."""
    precision = options.recipe.precision
    factor = target.peak_factor(precision, options.recipe.quantized)
    graphs = [part for part in parts_of(checkpoint, options.recipe) if part != "embedding"]
    kv = kv_bytes(checkpoint, options.max_seq_len, kv_dtype(target, options.recipe))
    peak = {
        part: int(factor * checkpoint.parameter_bytes(DECODERS.get(part, part), 2)) + TOOLS_BYTES for part in graphs
    }
    if options.recipe.quantized:
        # A part that is to be quantized is loaded as stored: random weights in fp32.
        for part in peak:
            peak[part] += checkpoint.parameter_bytes(DECODERS.get(part, part), checkpoint.dtype.itemsize - 2)
    for part in set(peak) & {"decoder", "prefill"}:
        peak[part] += kv
    disk = disk_bytes(checkpoint, options.recipe) + 64_000_000
    return Estimate(kv, disk, peak)


def expected_seconds(checkpoint: Checkpoint, target: Target, options: ExportOptions) -> dict[str, float]:
    """What each part will take on two cores, and the comparison at the end; of calibration nothing is known before."""
    recipe = options.recipe
    parts = list(parts_of(checkpoint, recipe))
    if target.shares_table and shares_table(checkpoint, recipe):
        parts.remove("embedding")
    found = {part: seconds_of(part_stages(checkpoint, part, recipe, target.compiles)) for part in parts}
    return {**found, VERIFY: verify_seconds(checkpoint)} if options.verify else found


def check_options(checkpoint: Checkpoint, target: Target, options: ExportOptions) -> None:
    """Refuse what cannot be exported, by name.

    Raises:
        InputError: a precision or scheme that the engine cannot compute, a recipe that does not fit the model, or an
            impossible length.
    """
    recipe = options.recipe
    check_with(target, lambda taker: taker.check_model(checkpoint.config))
    check_with(target, lambda taker: _check_precision(taker, recipe))
    check_with(target, lambda taker: _check_caches(taker, recipe))
    layers = linear_shapes(checkpoint, recipe)
    check_layers(recipe, layers)
    if recipe.embedding == "int4":
        embedding_scheme(recipe, checkpoint.config.text.hidden_size)
    for layer, (_, inputs) in layers.items():
        scheme, _ = chosen(recipe, layer, inputs)
        if scheme is not None:
            check_with(target, partial(_check_scheme, layer, scheme, recipe.precision))
    if recipe.calibrated and options.calibration is None:
        raise InputError(f"{recipe.name}: its schemes need calibration data; name some with --calibration")
    if options.calibration is not None and not recipe.calibrated:
        raise InputError(f"{recipe.name}: none of its schemes reads calibration data; leave out --calibration")
    longest = checkpoint.config.text.max_position_embeddings
    if not MIN_SEQ_LEN <= options.max_seq_len <= longest:
        raise InputError(
            f"max_seq_len is {options.max_seq_len}; wanted {MIN_SEQ_LEN} to {longest}, the model's own limit"
        )


def _check_precision(target: Target, recipe: Recipe) -> None:
    if recipe.precision not in target.precisions:
        raise InputError(
            f"target {target.name} cannot compute {recipe.precision!r}; it knows {', '.join(target.precisions)}"
        )


def _check_caches(target: Target, recipe: Recipe) -> None:
    if recipe.prefill and not target.shares_kv:
        raise InputError(
            f"{recipe.name}: a second graph for prefill, but {target.name} keeps the KV cache inside one graph; leave "
            "out `prefill`"
        )
    if recipe.kv and recipe.kv not in target.kv_dtypes:
        raise InputError(
            f"{recipe.name}: a KV cache in {recipe.kv}, but {target.name} keeps it in the graph's precision; leave out "
            "`kv`"
        )


def _check_scheme(layer: str, scheme: Scheme, precision: str, target: Target) -> None:
    target.check_scheme(layer, scheme, precision)


def check_room(need: Estimate, options: ExportOptions, out: Path) -> None:
    """Refuse work that would not fit.

    Raises:
        MemoryLimitError: memory or disk is too small; the message says what is needed.
    """
    part = max(need.peak_bytes, key=lambda name: need.peak_bytes[name])
    advice = "choose a smaller precision, a smaller --max-seq-len or a larger machine, or raise --max-ram"
    require_memory(need.peak, f"exporting the {part}", advice, options.max_ram)
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need.disk_bytes > free:
        raise MemoryLimitError(
            f"the bundle needs about {human_bytes(need.disk_bytes)} on disk, {folder} has {human_bytes(free)} "
            "free; free some "
            "space or choose another folder"
        )


def choose_recipe(
    checkpoint: Checkpoint, out: str | Path, options: ExportOptions, auto: AutoOptions, progress: ExportProgress
) -> ExportOptions:
    """`options` with the recipe that measurements lead to. They are kept beside `out` until the bundle is there.

    Raises:
        PenguinError: a limit that cannot be kept, an export that would be refused, or data that cannot be read.
    """
    target = find_target(options.target)
    target.check_installed()
    stand_in = replace(options, recipe=STAND_IN)
    check_options(checkpoint, target, stand_in)
    check_room(estimate(checkpoint, target, stand_in), options, Path(out))
    final = check_place(out, overwrite=options.overwrite)
    job = ChoiceJob(_origin(checkpoint, options), auto, _measurements(final), options.max_ram)
    done = _run(job, 0, progress).done
    return replace(options, recipe=done.recipe, auto=done.report)


def _origin(checkpoint: Checkpoint, options: ExportOptions) -> Origin:
    return Origin(checkpoint.source, checkpoint.seed, checkpoint.stored is None, options.target)


def _measurements(final: Path) -> Path:
    return final.with_name(f".{final.name}.auto.json")


def export_bundle(checkpoint: Checkpoint, out: str | Path, options: ExportOptions, progress: ExportProgress) -> Bundle:
    """Export every part and write the bundle.

    Raises:
        PenguinError: any part fails; `out` is then as it was before.
    """
    final = check_place(out, overwrite=options.overwrite)
    if not options.recipe.calibrated:
        return _export(checkpoint, out, options, progress, None)
    # Beside the bundle and kept when the export fails: the next one goes on with the layer that was not done.
    work = final.with_name(f".{final.name}.calibration")
    with held(work, BundleError):
        return _export(checkpoint, out, options, progress, work)


def _export(
    checkpoint: Checkpoint, out: str | Path, options: ExportOptions, progress: ExportProgress, work: Path | None
) -> Bundle:
    """As `export_bundle`; `work` is the folder of a recipe that reads data."""
    target = find_target(options.target)
    target.check_installed()
    check_options(checkpoint, target, options)
    config = checkpoint.config
    Tokenizer.of(checkpoint)
    need = estimate(checkpoint, target, options)
    check_room(need, options, Path(out))
    bounds = target.bounds(options.max_seq_len)
    if options.recipe.prefill:
        bounds = replace(bounds, min_chunk=2)
    stored = DTYPE_NAMES.get(str(checkpoint.dtype), "fp32")
    recipe = options.recipe
    embedding_dtype = recipe.embedding or (recipe.precision if stored == "fp32" else stored)
    expected = expected_seconds(checkpoint, target, options)
    progress.plan(expected)
    table: list[dict[str, Any]] = []
    quantization: dict[str, Any] = {"auto": options.auto} if options.auto else {}
    origin = _origin(checkpoint, options)
    if work is not None and options.calibration is not None:
        integers = CalibrationJob(origin, recipe, options.calibration, work, options.max_ram)
        quantization["calibration"] = _run(integers, 0, progress).done.report
    with writing(out, overwrite=options.overwrite) as folder:
        entries: dict[str, GraphEntry] = {}
        place: TablePlace | None = None
        for part in parts_of(checkpoint, recipe):
            if part == "embedding" and place is not None:
                continue
            job = PartJob(origin, part, recipe, work, embedding_dtype, bounds, folder)
            outcome = _run(job, need.peak_bytes.get(part, 0), progress, expected.get(part))
            if part == "embedding" or shares_table(checkpoint, recipe):
                place = outcome.done.place or place
            table += [{**asdict(row), "shape": list(row.shape)} for row in outcome.done.layers]
            if part != "embedding":
                inputs, outputs = signature(part, config, bounds)
                entries[part] = GraphEntry(
                    outcome.done.file,
                    recipe.label,
                    tuple(inputs),
                    tuple(outputs),
                    round(outcome.peak_mb - outcome.baseline_mb, 1),
                    round(outcome.seconds, 1),
                )
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
        (folder / "check.partial").replace(folder / CHECK)
        manifest = Manifest(
            model=config,
            source={"name": checkpoint.source, "sha256": checkpoint.fingerprint(), "random": checkpoint.stored is None},
            target=options.target,
            precision=recipe.label,
            bounds=bounds,
            graphs=entries,
            embedding_dtype=embedding_dtype,
            kv_dtype=kv_dtype(target, recipe),
            embedding=place,
            quantization={"recipe": recipe.to_json(), "layers": table, **quantization} if recipe.quantized else {},
            chat={"start": START, "end": END, "image": IMAGE, "empty_think": EMPTY_THINK, "frame_tag": "Time {:.1f}s:"},
            tools={name: version_of(name) or "unknown" for name in ("penguin-edge", "torch", *target.tools)},
            generation={"temperature": 0.0, "top_p": 1.0, "top_k": 0},
            verified=options.verify,
        )
        finished = finish(folder, manifest)
        most, got = (options.auto or {}).get("max_size"), bundle_bytes(folder)
        if most is not None and got > most:
            raise BundleError(
                f"the bundle takes {got} bytes, {got - most} more than --max-size; no bundle was written: ask for "
                f"{human_bytes(2 * most - got)}, which leaves room for what was not foreseen"
            )
        if options.verify:
            _verify(folder, progress)
    if work is not None:
        kept.remove(work)
    if options.auto:
        _measurements(place_of(out, BundleError)).unlink(missing_ok=True)
    return Bundle(Path(out), finished.manifest)


def _run(job: Job[Done], estimate_bytes: int, progress: ExportProgress, expected: float | None = None) -> Outcome[Done]:
    """Have a worker do a job.

    Raises:
        BundleError: it cannot be done; the message is the worker's.
        PenguinError: the worker ended without a word.
    """
    with scratch() as folder:
        outcome_path, job_path, log_path = (folder / name for name in ("outcome.json", "job.json", "log.txt"))
        write_job(job_path, job)
        progress.begin(job.name, estimate_bytes / 1e6)
        with log_path.open("wb") as log:
            follower = Follower(log_path, expected)
            command = ["penguin_edge.export.worker", str(job_path), str(outcome_path)]
            code = _watch(command, log, log, job.name, progress, follower)
        if not outcome_path.is_file():
            raise PenguinError(f"exporting the {job.name} ended {_ending(code)}; {_tail(log_path)}")
        outcome = read_outcome(outcome_path, job)
    progress.done(job.name, outcome.seconds, outcome.peak_mb)
    return outcome


def _verify(folder: Path, progress: ExportProgress) -> None:
    """Run the bundle against its check data, in a process of its own.

    Raises:
        BundleError: a stage computes something else than the eager model.
    """
    with scratch() as work:
        out_path, log_path = work / "out.txt", work / "log.txt"
        progress.begin(VERIFY, 0)
        begin = time.monotonic()
        with out_path.open("wb") as out, log_path.open("wb") as log:
            follower = Follower(log_path, None)  # it says nothing of itself
            code = _watch(["penguin_edge", "verify", str(folder), "--json"], out, log, VERIFY, progress, follower)
        lines = out_path.read_text(encoding="utf-8").splitlines()
        if not lines:
            raise BundleError(f"verifying the bundle ended {_ending(code)}; {_tail(log_path)}")
    found = parse_json(lines[-1], "the verification")
    failed = [stage for stage in found["stages"] if not stage["passed"]]
    if failed:
        stage = failed[0]
        apart = "its numbers are NaN or infinite"
        if stage["relative"] is not None and stage["cosine"] is not None:
            apart = f"relative error {stage['relative']:.3g}, cosine {stage['cosine']:.6f}"
        raise BundleError(
            f"the exported {stage['name']} differs from the eager model ({apart}); no bundle was written: choose "
            "another recipe, or look at it with --no-verify and `penguin-edge verify`"
        )
    progress.done(VERIFY, time.monotonic() - begin, found["peak_mb"])


def _watch(
    module: list[str],
    out: IO[bytes],
    log: IO[bytes],
    part: str,
    progress: ExportProgress,
    follower: Follower,
) -> int:
    """Run a Python module in a session of its own until it ends; it ends with this process, however that ends."""
    process = subprocess.Popen(
        child.command(*module),
        stdin=subprocess.PIPE,  # held open: its end tells the child that this process is gone
        stdout=out,
        stderr=log,
        start_new_session=True,
        env=child.environment(MALLOC),
    )
    try:

        def tick(seconds: float, resident: float) -> None:
            progress.tick(part, seconds, resident, *follower.look(seconds))

        _wait(process, tick, time.monotonic())
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        if process.stdin is not None:
            process.stdin.close()
    return process.returncode


def _wait(process: subprocess.Popen[bytes], tick: Callable[[float, float], None], begin: float) -> None:
    while True:
        try:
            process.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            tick(time.monotonic() - begin, resident_mb(process.pid))


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system, most likely for want of memory"
    return f"with exit code {code}"


def _tail(log: Path) -> str:
    text = LINE.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line for line in text.splitlines() if line.strip()]
    return "its last words: " + (lines[-1][:300] if lines else "none")
