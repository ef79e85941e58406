"""Folders as an export leaves them, as far as overwriting goes, and what is in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from penguin_edge.bundle.contract import MANIFEST, VERIFY
from penguin_edge.bundle.writing import writing
from penguin_edge.files import manifest_hash


def bundle(folder: Path, content: str = "old", **more: Any) -> Path:
    """A folder as an export leaves it, as far as overwriting goes."""
    folder.mkdir(parents=True)
    names = ["decoder.onnx", "weights/decoder.bin"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    data: dict[str, Any] = {
        "schema": 1,
        "files": {name: {"sha256": "", "bytes": len(content)} for name in names},
        **more,
    }
    (folder / MANIFEST).write_text(json.dumps({**data, "sha256": manifest_hash(data)}))
    (folder / VERIFY).write_text("{}")
    return folder


def write_new(out: Path, **options: Any) -> None:
    with writing(out, **options) as folder:
        (folder / MANIFEST).write_text("new")


def listing(folder: Path) -> dict[str, Any]:
    """Everything below a folder: relative path -> link target, content or None."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }
