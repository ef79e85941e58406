"""`--overwrite` deletes nothing that is not ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from overwriting import bundle, listing, write_new

from penguin_edge import folders
from penguin_edge.bundle.contract import MANIFEST, VERIFY
from penguin_edge.bundle.writing import check_place, writing
from penguin_edge.errors import BundleError


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


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[None]:
    """A file or folder as a mount point of its own file system, which has the same device as what is around it."""
    done = subprocess.run(["mount", "--bind", place, place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("", "is a mount point, which cannot be replaced; choose"),
        (VERIFY, r"has a mount point in it \(verify.json\), so it cannot be replaced; unmount"),
        ("weights", r"has a mount point in it \(weights\)"),
        ("weights/decoder.bin", r"has a mount point in it \(weights/decoder.bin\)"),
    ],
)
def test_what_is_mounted_is_refused_before_the_work(tmp_path: Path, inner: str, said: str) -> None:
    out = bundle(tmp_path / "out")
    with mounted(out / inner):
        before = listing(tmp_path)
        with pytest.raises(BundleError, match=said):
            check_place(out, overwrite=True)
        with pytest.raises(BundleError, match=said), writing(out, overwrite=True):
            pytest.fail("the work began")
        assert listing(tmp_path) == before
    check_place(out, overwrite=True)
    write_new(out, overwrite=True)
    assert listing(tmp_path) == {"out": None, f"out/{MANIFEST}": b"new"}


def test_a_mount_that_comes_meanwhile_is_refused_too(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out")
    before = listing(tmp_path)
    with contextlib.ExitStack() as stack:
        with pytest.raises(BundleError, match="has a mount point"), writing(out, overwrite=True) as folder:
            (folder / MANIFEST).write_text("new")
            stack.enter_context(mounted(out / VERIFY))
        assert listing(tmp_path) == before


def test_names_of_mounts_are_read_as_the_system_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, out = tmp_path / "mountinfo", bundle(tmp_path / "a b\\c")
    monkeypatch.setattr(folders, "MOUNTS", listed)
    name = str(out).replace("\\", r"\134").replace(" ", r"\040")
    for point, refused in ((name, True), (f"{name}/weights", True), (f"{name}2", False), (str(tmp_path), False)):
        listed.write_text(f"22 27 0:21 / {point} rw,relatime - ext4 /dev/sda rw\n")
        with pytest.raises(BundleError, match="mount point") if refused else contextlib.nullcontext():
            check_place(out, overwrite=True)
    listed.unlink()
    check_place(out, overwrite=True)


def test_the_working_directory_is_looked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle(tmp_path / "out"))
    with pytest.raises(BundleError, match="working directory"):
        check_place(tmp_path / "out", overwrite=True)


def test_parents_that_were_made_go_when_nothing_comes_of_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
