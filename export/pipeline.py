"""From a checkpoint to a bundle: parts one after another, each in its own process, then one rename.

Before work starts the memory and the disk that it needs are compared with what there is, and the KV memory that the
bundle will cost is said. Nothing is left behind when a part fails or the user stops.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from penguin_edge import bundle as contract
from penguin_edge.bundle import Bundle, GraphEntry, Manifest, signature
from penguin_edge.checkpoint import Checkpoint
from penguin_edge.errors import BundleError, InputError, MemoryLimitError, PenguinError
from penguin_edge.export.target import Target
from penguin_edge.export.targets import find_target
from penguin_edge.machine import human_bytes, require_memory
from penguin_edge.prompt import EMPTY_THINK, END, IMAGE, START, Tokenizer

TOOLS_BYTES = 1_500_000_000
"""Resident memory of importing torch and an exporter, on top of what a part takes."""
MIN_SEQ_LEN = 128
"""Positions that `verify` needs for its prompt and answer."""
DTYPE_NAMES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Progress(Protocol):
    """What the pipeline tells while it works."""

    def begin(self, part: str, estimate_mb: float) -> None: ...
    def tick(self, part: str, seconds: float, resident_mb: float) -> None: ...
    def done(self, part: str, seconds: float, peak_mb: float) -> None: ...


@dataclass(frozen=True)
class ExportOptions:
    """What the command line offers, with its defaults."""

    target: str = "onnx"
    precision: str = "fp32"
    max_seq_len: int = 4096
    seed: int = 0
    max_ram: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Estimate:
    """What an export will need, in bytes."""

    kv_bytes: int
    disk_bytes: int
    peak_bytes: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peak_bytes.values())


def parts_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    vision = ("encoder", "projector") if checkpoint.config.vision else ()
    return (*vision, "decoder", "embedding")


def kv_bytes(checkpoint: Checkpoint, max_seq_len: int, dtype: str) -> int:
    """Bytes of the KV cache: keys and values of all layers."""
    return checkpoint.config.text.kv_values * max_seq_len * VALUE_BYTES[dtype]


def estimate(checkpoint: Checkpoint, target: Target, options: ExportOptions) -> Estimate:
    """Memory per part, disk, and KV cache, before anything is done."""
    width = VALUE_BYTES[options.precision]
    factor = target.peak_factor(options.precision)
    graphs = [part for part in parts_of(checkpoint) if part != "embedding"]
    kv = kv_bytes(checkpoint, options.max_seq_len, target.kv_dtype(options.precision))
    peak = {part: int(factor * checkpoint.parameter_bytes(part, 2)) + TOOLS_BYTES for part in graphs}
    peak["decoder"] += kv
    disk = sum(checkpoint.parameter_bytes(part, width) for part in parts_of(checkpoint)) + 64_000_000
    return Estimate(kv, disk, peak)


def check_options(checkpoint: Checkpoint, target: Target, options: ExportOptions) -> None:
    """Refuse what cannot be exported, by name.

    Raises:
        InputError: a precision that the engine cannot compute, or an impossible length.
    """
    if options.precision not in target.precisions:
        raise InputError(
            f"target {target.name} cannot compute {options.precision!r}; it knows {', '.join(target.precisions)}"
        )
    longest = checkpoint.config.text.max_position_embeddings
    if not MIN_SEQ_LEN <= options.max_seq_len <= longest:
        raise InputError(
            f"max_seq_len is {options.max_seq_len}; wanted {MIN_SEQ_LEN} to {longest}, the model's own limit"
        )


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


def export_bundle(checkpoint: Checkpoint, out: str | Path, options: ExportOptions, progress: Progress) -> Bundle:
    """Export every part and write the bundle.

    Raises:
        PenguinError: any part fails; `out` is then as it was before.
    """
    target = find_target(options.target)
    target.check_installed()
    check_options(checkpoint, target, options)
    config = checkpoint.config
    Tokenizer.open(checkpoint.tokenizer, image_token_id=config.image_token_id, vocab_size=config.text.vocab_size)
    need = estimate(checkpoint, target, options)
    check_room(need, options, Path(out))
    bounds = target.bounds(options.max_seq_len)
    stored = DTYPE_NAMES.get(str(checkpoint.dtype), "fp32")
    embedding_dtype = options.precision if stored == "fp32" else stored
    with contract.writing(out, overwrite=options.overwrite) as folder:
        entries: dict[str, GraphEntry] = {}
        for part in parts_of(checkpoint):
            job = {
                "part": part,
                "source": checkpoint.source,
                "seed": checkpoint.seed,
                "random_weights": checkpoint.stored is None,
                "target": options.target,
                "precision": options.precision,
                "embedding_dtype": embedding_dtype,
                "bounds": asdict(bounds),
                "folder": str(folder),
            }
            result = _run_part(part, job, need.peak_bytes.get(part, 0), progress)
            if part != "embedding":
                inputs, outputs = signature(part, config, bounds)
                entries[part] = GraphEntry(
                    result["file"],
                    options.precision,
                    tuple(inputs),
                    tuple(outputs),
                    round(result["peak_mb"] - result["baseline_mb"], 1),
                    round(result["seconds"], 1),
                )
        shutil.copyfile(checkpoint.tokenizer, folder / contract.TOKENIZER)
        (folder / "check.partial").replace(folder / contract.CHECK)
        manifest = Manifest(
            model=config,
            source={"name": checkpoint.source, "sha256": checkpoint.fingerprint(), "random": checkpoint.stored is None},
            target=options.target,
            precision=options.precision,
            bounds=bounds,
            graphs=entries,
            embedding_dtype=embedding_dtype,
            kv_dtype=target.kv_dtype(options.precision),
            chat={"start": START, "end": END, "image": IMAGE, "empty_think": EMPTY_THINK, "frame_tag": "Time {:.1f}s:"},
            tools={name: _version(name) for name in ("penguin-edge", "torch", *target.tools)},
            generation={"temperature": 0.0, "top_p": 1.0, "top_k": 0},
        )
        finished = contract.finish(folder, manifest)
    return Bundle(Path(out), finished.manifest)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _run_part(part: str, job: dict[str, Any], estimate_bytes: int, progress: Progress) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="penguin-edge-") as scratch:
        result_path, job_path, log_path = (Path(scratch) / name for name in ("result.json", "job.json", "log.txt"))
        job_path.write_text(json.dumps({**job, "result": str(result_path)}), encoding="utf-8")
        progress.begin(part, estimate_bytes / 1e6)
        begin = time.monotonic()
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "penguin_edge.export.worker", str(job_path)]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            try:
                _wait(process, lambda seconds, resident: progress.tick(part, seconds, resident), begin)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if not result_path.is_file():
            raise PenguinError(f"exporting the {part} ended {_ending(process.returncode)}; {_tail(log_path)}")
        result = json.loads(result_path.read_text(encoding="utf-8"))
    if "error" in result:
        raise BundleError(str(result["error"]))
    progress.done(part, result["seconds"], result["peak_mb"])
    return result


def _wait(process: subprocess.Popen[bytes], tick: Callable[[float, float], None], begin: float) -> None:
    while True:
        try:
            process.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            tick(time.monotonic() - begin, _resident_mb(process.pid))


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system, most likely for want of memory"
    return f"with exit code {code}"


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "its last words: " + (lines[-1][:300] if lines else "none")
