"""A kill, a failure or another writer at any moment of a replacement loses nothing, with locks and without."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from overwriting import bundle, listing, write_new

from penguin_edge.bundle.contract import MANIFEST
from penguin_edge.bundle.writing import check_place, writing
from penguin_edge.errors import BundleError
from penguin_edge.folders import MARK, discard, held, scratch

KILLED = """
import os, signal, sys
from pathlib import Path
from penguin_edge.bundle.writing import writing
count = int(sys.argv[2])
def after(event, arguments):  # every call that changes a file system, before it is done
    global count
    if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}:
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(after)
with writing(sys.argv[1], overwrite=True) as folder:
    (folder / "bundle.json").write_text("new")
"""


def test_a_kill_at_any_step_loses_nothing_and_leaves_nothing_to_the_next_run(tmp_path: Path) -> None:
    seen = set()
    for step in range(100):
        out = bundle(tmp_path / str(step) / "out")
        old = listing(out)
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(step)], capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        with pytest.raises(BundleError, match="exists already"):
            check_place(out, overwrite=False)  # brings back what was moved away
        state = "old" if listing(out) == old else "new"
        seen.add(state)
        assert state == "old" or listing(out) == {MANIFEST: b"new"}
        assert os.listdir(out.parent) == ["out"]
    assert step > 8 and seen == {"old", "new"}


def killed_rest(tmp_path: Path, step: int) -> Path:
    out = bundle(tmp_path / "out")
    subprocess.run([sys.executable, "-c", KILLED, str(out), str(step)], capture_output=True)
    [rest] = tmp_path.glob(".out.*.partial")
    return rest


def between_the_renames(tmp_path: Path) -> Path:
    for step in range(100):
        rest = killed_rest(tmp_path, step) if step > 2 else tmp_path
        if (rest / "old").is_dir():
            return rest
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    raise AssertionError("never between")


def test_what_stands_there_meanwhile_is_not_traded_for_the_old(tmp_path: Path) -> None:
    rest = between_the_renames(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    with pytest.raises(BundleError, match="move one of the two away") as refused:
        write_new(tmp_path / "out", overwrite=True)
    assert str(rest) in str(refused.value) and listing(tmp_path) == before


def between(monkeypatch: pytest.MonkeyPatch, moved: str, act: Callable[[], Any]) -> None:
    """Have somebody act in the moment after a folder was moved to a path that ends so."""
    replace, done = Path.replace, []

    def and_act(path: Path, target: Path) -> Path:
        result = replace(path, target)
        if Path(target).name == moved and not done:
            done.append(act())
        return result

    monkeypatch.setattr(Path, "replace", and_act)


def occupy(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def test_what_appears_between_the_renames_costs_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path / "out")
    old = listing(out)
    with monkeypatch.context() as patch:
        between(patch, "old", lambda: occupy(out))
        with pytest.raises(BundleError, match="move one of the two away") as refused:
            write_new(out, overwrite=True)
    [rest] = tmp_path.glob(".out.*.partial")
    for _ in range(2):
        assert str(rest) in str(refused.value)
        assert listing(rest / "old") == old and listing(rest / "new") == {MANIFEST: b"new"}
        assert listing(out) == {"thesis.txt": b"years of work"}
        with pytest.raises(BundleError, match="move one of the two away") as refused:
            write_new(out, overwrite=True)
    out.rename(tmp_path / "thesis")
    write_new(out, overwrite=True)
    assert listing(out) == {MANIFEST: b"new"} and sorted(os.listdir(tmp_path)) == ["out", "thesis"]


def test_an_empty_place_that_is_filled_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("penguin_edge.folders._sync", lambda folder: None)
    with monkeypatch.context() as patch:
        lexists = os.path.lexists
        seen: list[Any] = []

        def late(path: Any) -> bool:
            found = lexists(path)
            if path == out and not found and len(list(tmp_path.glob(".out.*/new/*"))) and not seen:
                seen.append(occupy(out))
            return found

        patch.setattr(os.path, "lexists", late)
        with pytest.raises(BundleError, match="appeared in its place"):
            write_new(out, overwrite=True)
    assert listing(tmp_path) == {"out": None, "out/thesis.txt": b"years of work"}


def test_a_file_that_took_the_place_of_a_bundle_is_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bundle(tmp_path / "out")
    replace = Path.replace

    def trade(path: Path, target: Path) -> Path:
        if path == out and Path(target).name == "old":
            shutil.rmtree(out)
            out.write_text("years of work")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", trade)
    with pytest.raises(BundleError, match="is not a bundle"):
        write_new(out, overwrite=True)
    assert listing(tmp_path) == {"out": b"years of work"}


def keep_nothing(found: Path, appeared: bool) -> None:
    """Anything may be removed."""


def refuse_late(found: Path, appeared: bool) -> None:
    if appeared:
        raise BundleError("something was added")


@pytest.mark.parametrize("rule", [keep_nothing, refuse_late])
@pytest.mark.parametrize("occupied", [False, True])
def test_what_is_discarded_is_gone_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Callable[[Path, bool], None], occupied: bool
) -> None:
    out = bundle(tmp_path / "out")
    old = listing(out)
    if occupied:
        between(monkeypatch, "old", lambda: occupy(out))
    if rule is refuse_late:
        with pytest.raises(BundleError, match="move one of the two away" if occupied else "added"):
            discard(out, rule, BundleError)
        [kept] = tmp_path.glob(".out.*.partial/old") if occupied else [out]
        assert listing(kept) == old
    else:
        discard(out, rule, BundleError)
        assert not list(tmp_path.glob(".*"))
    assert os.path.lexists(out) == (occupied or rule is refuse_late)
    assert not occupied or listing(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("name", ["new", "old", "out"])
def test_renames_that_fail_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out = bundle(tmp_path / "out")
    before, replace = listing(tmp_path), Path.replace
    failed: list[Path] = []

    def refuse(path: Path, target: Path) -> Path:
        if Path(target).name == name and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(BundleError, match="Input/output error"):
        if name == "new":
            discard(out, keep_nothing, BundleError)
        else:
            write_new(out, overwrite=True)
    assert failed and listing(tmp_path) == before


def fail_sync(monkeypatch: pytest.MonkeyPatch, number: int, kind: Callable[[int], bool]) -> list[int]:
    """Have fsync fail for descriptors of a kind; the list grows by each of them."""
    sync, failed = os.fsync, []

    def fails(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            failed.append(descriptor)
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    return failed


@pytest.mark.parametrize("kind", [stat.S_ISREG, stat.S_ISDIR])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_costs_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: Callable[[int], bool]
) -> None:
    out = bundle(tmp_path / "out")
    failed = fail_sync(monkeypatch, number, kind)
    write_new(out, overwrite=True)
    assert failed and listing(tmp_path) == {"out": None, f"out/{MANIFEST}": b"new"}


@pytest.mark.parametrize("kind", [stat.S_ISREG, stat.S_ISDIR])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_or_damaged_is_one_sentence_and_the_old_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: Callable[[int], bool]
) -> None:
    out = bundle(tmp_path / "out")
    before = listing(tmp_path)
    failed = fail_sync(monkeypatch, number, kind)
    with pytest.raises(BundleError, match=f"cannot be written .*{os.strerror(number)}"):
        write_new(out, overwrite=True)
    assert failed and listing(tmp_path) == before


UNLOCKED = """
import fcntl
def flock(*given): raise OSError(95, "Operation not supported")
fcntl.flock = flock
"""


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*given: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)


def unlocked_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a kill between the renames leaves on a file system without locks."""
    no_locks(monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "KILLED", UNLOCKED + KILLED)
    return between_the_renames(tmp_path)


def test_without_locks_the_old_is_brought_back_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlocked_rest(tmp_path, monkeypatch)
    with pytest.raises(BundleError, match="exists already"):
        check_place(tmp_path / "out", overwrite=False)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "decoder.onnx").read_text() == "old"


@pytest.mark.parametrize("key", ["boot", "space", "start", "pid"])
def test_without_locks_what_cannot_be_told_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    rest = unlocked_rest(tmp_path, monkeypatch)
    mark = json.loads((rest / MARK).read_text())
    (rest / MARK).write_text(json.dumps({**mark, key: ""}))
    before = listing(tmp_path)
    with pytest.raises(BundleError, match="has no locks") as refused:
        write_new(tmp_path / "out", overwrite=True)
    assert str(rest / "old") in str(refused.value) and listing(tmp_path) == before


def test_without_locks_a_number_that_is_used_again_is_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = unlocked_rest(tmp_path, monkeypatch)
    mark = json.loads((rest / MARK).read_text())
    (rest / MARK).write_text(json.dumps({**mark, "pid": os.getpid()}))
    write_new(tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == {"out": None, f"out/{MANIFEST}": b"new"}


def test_without_locks_a_writer_that_lives_is_left_in_peace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    out = bundle(tmp_path / "out")
    with writing(out, overwrite=True) as folder:
        (folder / MANIFEST).write_text("first")
        with pytest.raises(RuntimeError), writing(out, overwrite=True):
            raise RuntimeError
        assert (folder / MANIFEST).read_text() == "first"
    assert listing(tmp_path) == {"out": None, f"out/{MANIFEST}": b"first"}


def test_without_locks_one_process_holds_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    work = tmp_path / ".out.calibration"
    with held(work, BundleError):
        (work / "kept").touch()
        with pytest.raises(BundleError, match="another process works there"), held(work, BundleError):
            pass
        assert len(os.listdir(tmp_path)) == 2
    code = (
        f"{UNLOCKED}import os, sys\nfrom pathlib import Path\nfrom penguin_edge.errors import BundleError\n"
        "from penguin_edge.folders import held\nwith held(Path(sys.argv[1]), BundleError): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(work)])
    assert len(os.listdir(tmp_path)) == 2
    with held(work, BundleError):  # whose it was is gone
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == [work.name]


def test_only_rests_that_are_provably_ours_are_cleared(tmp_path: Path) -> None:
    foreign = {
        ".out.0123abcd.partial/letter.txt": "no mark",
        f".out.1123abcd.partial/{MARK}": '{"name": "out", "host": "another", "boot": "another"}',
        f".out.2123abcd.partial/{MARK}": '{"name": "out"}',
        f".out.3123abcd.partial/{MARK}": "[" * 9999,
        f".out.x123abcd.partial/{MARK}": "no number of ours",
        f".outer.4123abcd.partial/{MARK}": "another name",
        ".out.partial/letter.txt": "an older form",
    }
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / ".out.5123abcd.partial").symlink_to("/etc")
    before = listing(tmp_path)
    write_new(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert listing(tmp_path) == before


def test_a_writer_that_lives_is_left_in_peace(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom penguin_edge.bundle.writing import writing\n"
        "with writing(sys.argv[1], overwrite=True) as f:\n"
        "    (f / 'bundle.json').write_text('first'); print('ready', flush=True); sys.stdin.read()"
    )
    out = bundle(tmp_path / "out")
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline()
        with pytest.raises(RuntimeError), writing(out, overwrite=True):
            raise RuntimeError
        assert len(list(tmp_path.glob(".out.*.partial"))) == 1
        other.stdin.close()
        assert other.wait(timeout=60) == 0
    assert listing(tmp_path) == {"out": None, f"out/{MANIFEST}": b"first"}


def test_work_folders_of_killed_processes_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "penguin-edge-notes").mkdir()
    (tmp_path / "penguin-edge-0123abcd").mkdir()
    (tmp_path / "penguin-edge-0123abcd" / "letter").write_text("of another's")
    code = (
        "import os\nfrom penguin_edge.folders import scratch\n"
        "with scratch() as f:\n    (f / 'big').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code])
    assert len(list(tmp_path.glob("penguin-edge-*/*/big"))) == 1
    with scratch() as folder, scratch() as other:
        assert folder != other and len(list(tmp_path.iterdir())) == 4
    assert sorted(os.listdir(tmp_path)) == ["penguin-edge-0123abcd", "penguin-edge-notes"]
