"""The work folder of a calibration: a file of tensors per layer and stage, kept when an export is stopped.

The next one goes on from what is there. Every file carries the SHA-256 of its tensors: one that does not fit it is
removed and made again. Nothing else in the folder is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from penguin_edge.errors import InputError
from penguin_edge.files import ASIDE, replacing, write_text

DIGEST = "digest.txt"
"""File that names what decides the tensors: weights, recipe, data. It is our mark, too: without it nothing in a folder
is ours."""


def prepare(work: Path, made_for: str) -> None:
    """Leave in `work` only whole files that were made for the same weights, recipe and data.

    Raises:
        InputError: a folder of something else is in the way.
    """
    mark = work / DIGEST
    work.mkdir(parents=True, exist_ok=True)
    if not mark.is_file() and any(work.iterdir()):
        raise InputError(f"{work} is needed for calibration and holds something else; move it away")
    same = mark.is_file() and mark.read_bytes() == made_for.encode()
    for path in _files(work):
        if not same or not _is_whole(path):
            path.unlink()
    if not same:
        write_text(mark, made_for)


def remove(work: Path) -> None:
    """Remove the folder, or what is ours in it; the mark goes last."""
    if (work / DIGEST).is_file():
        with contextlib.suppress(OSError):
            for path in [*_files(work), work / DIGEST]:
                path.unlink()
            work.rmdir()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One file, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as aside:
        save_file(tensors, aside, metadata={"sha256": _hash(tensors)})


def _files(work: Path) -> list[Path]:
    """Files of tensors, and what a kill left of one that was being written."""
    return sorted(p for p in work.iterdir() if p.name.endswith(".safetensors") or ASIDE.fullmatch(p.name))


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return bool((stored.metadata() or {}).get("sha256") == _hash(tensors))
    except (SafetensorError, OSError, RuntimeError, ValueError):
        return False


def _hash(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
