"""What the verbs share: output conventions, number parsing, progress, and opening a model by any of its names."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penguin_edge.bundle.contract import MANIFEST
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import InputError, PenguinError, TargetUnavailable
from penguin_edge.files import finite
from penguin_edge.machine import EXPORTERS, require_memory
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.engines.base import Engine, check_threads
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.engines.self_check import open_tokenizer

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


DEFAULT_TARGET = "onnx"
"""What a checkpoint is exported to, and a recipe measured for, unless a flag or a bundle names another target."""
TORCH_BYTES = 500_000_000
"""Resident memory of torch and everything around a model, measured with a small one."""


def say(text: str = "") -> None:
    """A line for the reader; results go to stdout, this to stderr."""
    print(text, file=sys.stderr, flush=True)


def status(text: str) -> None:
    """Show a line in the place of the last one, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def emit(data: dict[str, Any]) -> None:
    """The last line of stdout: one JSON object; null stands for what is not finite."""
    print(json.dumps(finite(data), allow_nan=False), flush=True)


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; wanted at least 1")
    return value


def above_zero(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """argparse type: a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return value


def byte_count(text: str) -> int:
    """argparse type: 12GB, 800M, 16GiB, or plain bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; wanted something like 12GB or 16GiB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def nats(text: str) -> float:
    """argparse type: a KL, a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a KL; wanted nats per position, such as 0.05")
    return value


WHOLE_FOLDERS = ("model", "against", "clip", "video", "stream", "source")
"""Arguments that may name a folder whose every file is read."""
DATA_FILES = ("annotations.jsonl", "training_answers.json")
"""Files that are read from a data folder beside its media; a result may lie among the media."""


def check_outputs(args: argparse.Namespace, outputs: Sequence[str], inputs: Sequence[str]) -> None:
    """Refuse to write over what is read, or two results into one file, before any work.

    Args:
        outputs: names of the arguments that name files to write.
        inputs: names of the arguments that name what is read: a file, a model's folder, or a folder of data.
    Raises:
        InputError: an output that is an input, lies in one, or is another output.
    """
    read = {name: Path(os.path.realpath(value)) for name in inputs if (value := getattr(args, name, None))}
    written: dict[Path, str] = {}
    for name in outputs:
        if not (value := getattr(args, name, None)):
            continue
        place = Path(os.path.realpath(value))
        if place in written and not str(place).startswith("/dev/"):
            raise InputError(f"{value}: two of the options for results name this file; give each a file of its own")
        written[place] = name
        for role, other in read.items():
            inside = other in place.parents and (role in WHOLE_FOLDERS or place.name in DATA_FILES)
            if place == other or (place.is_file() and (inside or (other.is_file() and place.samefile(other)))):
                raise InputError(
                    f"{value}: it is read here, and the result would replace it; name another file for the result"
                )


def is_bundle(source: str) -> bool:
    return (Path(source) / MANIFEST).is_file()


def require_torch() -> None:
    """Say what to install before a verb needs the reference model.

    Raises:
        TargetUnavailable: torch is missing.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise TargetUnavailable(f"this needs the PyTorch reference model; run `{EXPORTERS}`") from None


def open_model(source: str, *, threads: int | None, max_seq_len: int) -> tuple[Engine, Tokenizer]:
    """The engine of a bundle, or the eager engine of a checkpoint or preset, and its tokenizer.

    Raises:
        MemoryLimitError: a checkpoint that this machine cannot hold.
        PenguinError: `source` is none of these, is damaged, or its engine is not installed.
    """
    if is_bundle(source):
        bundle = Bundle.read(source)
        return open_engine(bundle, threads=threads), open_tokenizer(bundle)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise PenguinError(
            f"{source}: neither {MANIFEST} nor config.json is there; wanted a bundle or a checkpoint folder"
        )
    require_torch()
    import torch

    from penguin_edge.model.checkpoint import Checkpoint
    from penguin_edge.model.eager import EagerEngine

    check_threads(threads)
    if threads:
        torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(source)
    config, tokenizer = checkpoint.config, Tokenizer.of(checkpoint)
    length = min(max_seq_len, config.text.max_position_embeddings)
    require_memory(
        checkpoint.loaded_bytes() + length * config.text.kv_values * checkpoint.dtype.itemsize + TORCH_BYTES,
        f"{source} in {str(checkpoint.dtype).removeprefix('torch.')} with {length} KV positions",
        "choose a smaller model or --max-seq-len, or export a bundle in fp16 on a larger machine",
    )
    model = checkpoint.load()
    return EagerEngine(model, max_seq_len=length), tokenizer


def table(rows: list[tuple[str, ...]], *, indent: str = "  ") -> str:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)
