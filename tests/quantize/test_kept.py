"""What a calibration leaves for the next one: whole, its own, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from penguin_edge.errors import InputError
from penguin_edge.folders import held
from penguin_edge.quantize.calibration.kept import DIGEST, prepare, remove, write_tensors

TENSORS = {"levels": torch.arange(64, dtype=torch.uint8), "scale": torch.tensor(0.5), "half": torch.ones(3).bfloat16()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / ".out.calibration"
    prepare(folder, "this")
    for name in ("a", "b"):
        write_tensors(folder / f"{name}.safetensors", TENSORS)
    return folder


def test_whole_files_are_kept_for_the_same_and_removed_for_another(work: Path) -> None:
    prepare(work, "this")
    assert sorted(os.listdir(work)) == ["a.safetensors", "b.safetensors", DIGEST]
    prepare(work, "that")
    assert os.listdir(work) == [DIGEST] and (work / DIGEST).read_text() == "that"


@pytest.mark.parametrize("at", [4, 40, -1, -80, None])
def test_a_damaged_file_is_made_again(work: Path, at: int | None) -> None:
    content = bytearray((work / "a.safetensors").read_bytes())
    if at is None:
        del content[-5:]
    else:
        content[at] ^= 1
    (work / "a.safetensors").write_bytes(content)
    prepare(work, "this")
    assert sorted(os.listdir(work)) == ["b.safetensors", DIGEST]


@pytest.mark.parametrize("name", ["thesis.txt", "a.safetensors"])
def test_a_folder_of_something_else_is_left(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(InputError, match="move it away"):
        prepare(tmp_path, "this")
    remove(tmp_path)
    assert (tmp_path / name).read_text() == "years of work"


def test_files_of_the_user_outlive_it(work: Path) -> None:
    (work / "notes.txt").write_text("mine")
    prepare(work, "that")
    remove(work)
    assert os.listdir(work) == ["notes.txt"]
    (work / "notes.txt").unlink()
    work.rmdir()


def test_one_process_works_there_at_a_time(work: Path) -> None:
    with held(work, InputError), pytest.raises(InputError, match="another process works there"), held(work, InputError):
        pass
    with held(work, InputError):
        remove(work)
    assert not work.exists()
