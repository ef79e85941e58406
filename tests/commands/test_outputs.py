"""Single files that verbs write: whole or as they were, through links, and never in the place of a device."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from penguin_edge.errors import InputError, WriteError
from penguin_edge.files import replacing, write_json, write_picture, write_text


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_a_full_disk_is_one_sentence_and_the_old_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, there: bool
) -> None:
    path = tmp_path / "out.txt"
    if there:
        path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "aside"))

    monkeypatch.setattr(
        *{"write": (Path, "write_text"), "sync": (os, "fsync"), "rename": (Path, "replace")}[moment], full
    )
    if moment == "sync" and not there:  # nothing is given up, so nothing has to be on the disk before
        write_text(path, "new")
        assert path.read_text() == "new"
        return
    with pytest.raises(WriteError) as found:
        write_text(path, "new", advice="buy a disk")
    assert str(found.value) == f"{path}: cannot be written (No space left on device); buy a disk"
    assert found.value.reason == "No space left on device"
    assert os.listdir(tmp_path) == ["out.txt"] * there and (not there or path.read_text() == "old")


def test_a_file_system_that_cannot_sync_costs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", cannot)
    for text in ("old", "new"):
        write_text(tmp_path / "out.txt", text)
    assert (tmp_path / "out.txt").read_text() == "new" and os.listdir(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("where", ["none/out.json", "file/out.json"])
def test_a_folder_that_is_not_there_is_said_by_the_name_that_was_asked_for(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / where
    for write in (write_json, write_text):
        with pytest.raises(InputError) as found:
            write(path, "x")
        assert str(found.value).startswith(f"{path}: cannot be written (") and "\n" not in str(found.value)
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_caller_stays_his(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "out"):
        raise KeyError("x")
    assert not os.listdir(tmp_path)


def test_a_picture_is_a_png_by_any_name(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    write_picture(tmp_path / "plan", figure)
    assert (tmp_path / "plan").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(WriteError, match=r"cannot write the picture \(No such file or directory\); give a file in"):
        write_picture(tmp_path / "none" / "plan.png", figure)


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
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o444, 0o640])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    path.chmod(mode)
    write_json(path, {})
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "{}\n"


def test_files_in_shared_memory_are_files() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this system has no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "out.csv")
        path.write_text("old")
        with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt
        assert path.read_text() == "old" and os.listdir(folder) == ["out.csv"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_the_file_behind_stdout_is_written_to(tmp_path: Path, name: str) -> None:
    code = "import pathlib, sys; from penguin_edge import files; files.write_json(pathlib.Path(sys.argv[1]), [])"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code, name], stdout=out, check=True)
        assert os.fstat(out.fileno()).st_ino == (tmp_path / "out").stat().st_ino
    assert (tmp_path / "out").read_text() == "[]\n" and os.listdir(tmp_path) == ["out"]


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
