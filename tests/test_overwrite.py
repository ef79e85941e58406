"""`--overwrite` deletes nothing that is not ours, and a kill at any moment loses nothing."""

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

from penguin_edge.bundle import MANIFEST, VERIFY, manifest_hash
from penguin_edge.bundle_folder import check_place, writing
from penguin_edge.errors import BundleError
from penguin_edge.folders import MARK, discard, scratch


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


def test_a_bundle_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out")
    write_new(out, overwrite=True)
    assert listing(tmp_path) == {"out": None, f"out/{MANIFEST}": b"new"}


def test_files_of_the_bundle_are_its_own_even_when_they_were_changed(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out")
    (out / "decoder.onnx").write_text("longer than it was")
    (out / "weights/decoder.bin").unlink()
    (out / "profile.json").write_text("{}")
    (out / ".verify.json.0123abcd").write_text("{")  # what a kill leaves
    write_new(out, overwrite=True)
    assert listing(out) == {MANIFEST: b"new"}


def damage_text(text: str) -> Callable[[Path], None]:
    return lambda out: (out / MANIFEST).write_text(text) and None


def keep_old_hash(out: Path) -> None:
    data = json.loads((out / MANIFEST).read_text())
    data["files"]["thesis.txt"] = {"sha256": "", "bytes": 1}
    (out / MANIFEST).write_text(json.dumps(data))
    (out / "thesis.txt").write_text("years of work")


def truncate(out: Path) -> None:
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text[: len(text) // 2])


def link_manifest(out: Path) -> None:
    (out / MANIFEST).rename(out.parent / "elsewhere.json")
    (out / MANIFEST).symlink_to(out.parent / "elsewhere.json")


def link_file(out: Path) -> None:
    (out / "decoder.onnx").unlink()
    (out / "decoder.onnx").symlink_to("/etc/hostname")


def folder_for_file(out: Path) -> None:
    (out / "decoder.onnx").unlink()
    (out / "decoder.onnx").mkdir()


BAD: dict[str, Callable[[Path], Any]] = {
    "foreign": damage_text('{"name": "my-web-app", "version": "1.0"}'),
    "foreign with files": damage_text('{"files": {}}'),
    "files are a list": damage_text('{"schema": 1, "files": [], "sha256": ""}'),
    "not JSON": damage_text("letter"),
    "empty": damage_text(""),
    "a list": damage_text("[]"),
    "deep": damage_text("[" * 100_000),
    "truncated": truncate,
    "changed by hand": keep_old_hash,
    "a link for manifest": link_manifest,
    "a folder for manifest": lambda out: ((out / MANIFEST).unlink(), (out / MANIFEST).mkdir()),
    "no manifest": lambda out: (out / MANIFEST).unlink(),
    "a file": lambda out: (out / "thesis.txt").write_text("years of work"),
    "a hidden file": lambda out: (out / ".env").write_text("secret"),
    "our name in another folder": lambda out: (
        (out / "sub").mkdir(),
        (out / "sub" / "decoder.onnx").write_text("another model"),
    ),
    "our name beside": lambda out: (out / "decoder.bin").write_text("x"),
    "verify.json in a folder": lambda out: (out / "weights" / VERIFY).write_text("{}"),
    "an empty folder": lambda out: (out / "notes").mkdir(),
    "a link to a file": lambda out: (out / "a").symlink_to("/etc/hostname"),
    "a link to a folder": lambda out: (out / "a").symlink_to("/etc"),
    "a dangling link": lambda out: (out / "a").symlink_to("nowhere"),
    "a pipe": lambda out: os.mkfifo(out / "a"),
    "a link for a file of ours": link_file,
    "a folder for a file of ours": folder_for_file,
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_whatever_is_not_ours_is_refused_and_left(tmp_path: Path, change: Callable[[Path], None]) -> None:
    out = bundle(tmp_path / "out")
    change(out)
    names = [str(path) for path in sorted(tmp_path.rglob("*"))]
    for call in (lambda: write_new(out, overwrite=True), lambda: check_place(out, overwrite=True)):
        with pytest.raises(BundleError) as refused:
            call()
        assert str(out) in str(refused.value) and "\n" not in str(refused.value)
        assert "left as it is" in str(refused.value) or "move it away" in str(refused.value)
    assert [str(path) for path in sorted(tmp_path.rglob("*"))] == names


def test_what_cannot_be_looked_into_is_left_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path / "out")
    before, scandir = listing(tmp_path), os.scandir

    def refuse(folder: Any) -> Any:  # the superuser may look into anything
        if str(folder).endswith("weights"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(BundleError, match=r"weights: cannot be looked into .* choose another folder"):
            write_new(out, overwrite=True)
    assert listing(tmp_path) == before


def test_what_is_added_while_the_bundle_is_made_is_not_lost(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out")
    with pytest.raises(BundleError, match=r"thesis\.txt"), writing(out, overwrite=True) as folder:
        (folder / MANIFEST).write_text("new")
        (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work" and os.listdir(tmp_path) == ["out"]


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    real = bundle(tmp_path / "disk" / "real")
    (tmp_path / "link").symlink_to("disk/real")
    write_new(tmp_path / "link", overwrite=True)
    assert os.readlink(tmp_path / "link") == "disk/real"
    assert listing(real) == {MANIFEST: b"new"} and os.listdir(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["nowhere", "file", "link"])
def test_other_links_are_refused_and_stay(tmp_path: Path, target: str, overwrite: bool) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(BundleError):
        write_new(tmp_path / "link", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"] and os.readlink(tmp_path / "link") == target


@pytest.mark.parametrize("name", ["new", "new/", "new/../new", "./new", "deep/er/new", "ü" * 120, "[a]*?", " "])
def test_odd_names_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_new(name)  # type: ignore[arg-type]
    assert Path(name, MANIFEST).read_text() == "new"
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize(
    "name",
    [".", "..", "/", "/dev/null", "/proc", "file", "file/below", "file/below/deep", "x" * 300, "a\0b", "/proc/x"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool) -> None:
    inner = bundle(tmp_path / "inner")
    (inner / "file").write_text("x")
    monkeypatch.chdir(inner)
    before = listing(tmp_path)
    with pytest.raises(BundleError):
        write_new(name, overwrite=overwrite)  # type: ignore[arg-type]
    assert listing(tmp_path) == before


def test_the_working_directory_is_not_pulled_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path / "out")
    monkeypatch.chdir(out / "weights")
    before = listing(tmp_path)
    with pytest.raises(BundleError, match="working directory"):
        write_new(out, overwrite=True)
    assert listing(tmp_path) == before


def test_parents_that_were_made_go_when_nothing_comes_of_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


# --- kills ------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from penguin_edge.bundle_folder import writing
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
        "import sys\nfrom penguin_edge.bundle_folder import writing\n"
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
