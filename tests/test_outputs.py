"""Single files that verbs write: whole or as they were, through links, and never in the place of a device."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from penguin_edge.files import replacing, write_json


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.csv"]


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in ("real/there.json", "real/new.json"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_json(link, {"a": 1})
        assert os.readlink(link) == target and (tmp_path / target).read_text() == '{\n "a": 1\n}\n'
    assert sorted(os.listdir(tmp_path / "real")) == ["new.json", "there.json"]


def test_a_file_that_is_private_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.touch(mode=0o600)
    with replacing(path) as aside:
        aside.write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_devices_and_pipes_are_written_to_and_stay(tmp_path: Path) -> None:
    before = os.stat(os.devnull)
    write_json(Path(os.devnull), {})
    assert os.stat(os.devnull).st_rdev == before.st_rdev and stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json(pipe, {})
    reader.join(timeout=60)
    assert heard == ["{}\n"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["ü" * 120, "a b", "-x", "[a]*?"])
def test_long_and_odd_names(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, [])
    assert os.listdir(tmp_path) == [name]
