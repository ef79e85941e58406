"""A bundle that changes while it is open: what was opened answers, or nothing does; never another model's files."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penguin_edge.bundle.contract import EMBEDDING, MANIFEST, TOKENIZER
from penguin_edge.bundle.folder import Bundle
from penguin_edge.bundle.writing import writing
from penguin_edge.errors import BundleError
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.embedding import STORED, EmbeddingTable
from penguin_edge.runtime.engines.opening import open_engine

CHANGED = "replaced, changed or removed while the bundle was open; open the bundle again"


@pytest.fixture(params=["onnx", "executorch"])
def folder(
    request: pytest.FixtureRequest,
    nano_bundle: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A bundle of the test's own, which nobody has hashed before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(nano_bundle(request.param, "fp32"), tmp_path / "bundle"))


def opened(folder: Path) -> Engine:
    return open_engine(Bundle.read(folder), threads=1)


def step(engine: Engine) -> np.ndarray:
    with engine.new_cache() as cache:
        return engine.forward(cache, engine.embed(np.arange(100, 120)), np.array([-1]))


def look(engine: Engine) -> np.ndarray:
    places = np.repeat(np.arange(4), 4), np.tile(np.arange(4), 4)
    return engine.encode(np.full((1, 16, 588), 0.25, np.float32), *places)


def same_again(folder: Path) -> None:
    """As an export with --overwrite does it."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    with writing(folder, overwrite=True) as aside:
        aside.rmdir()
        copy.rename(aside)


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def file_replaced(folder: Path) -> None:
    """By one of the same size, with the same time stamps."""
    path = next(folder.glob("encoder.*"))
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.with_name("x").write_bytes(data)
    os.utime(path.with_name("x"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("x").rename(path)


def file_written(folder: Path) -> None:
    """In place, to the same size; the time of writing is set back."""
    path = next(folder.glob("encoder.*"))
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as stream:
        stream.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def tokenizer_written(folder: Path) -> None:
    (folder / TOKENIZER).write_bytes((folder / TOKENIZER).read_bytes().replace(b"version", b"Version"))


@pytest.mark.parametrize("change", [same_again, removed, file_replaced, file_written, tokenizer_written])
def test_a_graph_that_is_loaded_later_is_one_of_the_bundle_that_was_opened(
    folder: Path, change: Callable[[Path], None]
) -> None:
    engine = opened(folder)
    right = step(engine)
    change(folder)
    with pytest.raises(BundleError, match=CHANGED):
        look(engine)
    # What is loaded goes on.
    assert np.array_equal(step(engine), right)


def test_what_is_no_change_is_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other modes, links and names; a link that is set anew; another working directory; files of others."""
    right = look(opened(folder))
    link = tmp_path / "current"
    link.symlink_to(folder.name)
    monkeypatch.chdir(tmp_path)
    engine = opened(Path("current"))
    step(engine)
    for path in folder.iterdir():
        path.chmod(0o400)
    os.link(next(folder.glob("encoder.*")), tmp_path / "backup")
    (folder / "profile.json").write_text("{}")
    link.unlink()
    link.symlink_to("elsewhere")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert np.array_equal(look(engine), right)


def test_a_bundle_that_is_replaced_while_it_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its manifest was read, and while its files are hashed."""
    bundle = Bundle.read(folder)
    same_again(folder)
    with pytest.raises(BundleError, match=CHANGED):
        open_engine(bundle, threads=1)
    bundle = Bundle.read(folder)
    check = Bundle._check_size

    def late(self: Bundle, name: str, entry: object) -> None:
        if name == EMBEDDING:
            monkeypatch.setattr(Bundle, "_check_size", check)
            same_again(folder)
        check(self, name, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Bundle, "_check_size", late)
    with pytest.raises(BundleError, match=CHANGED):
        bundle.check_hashes()


def test_hashes_are_checked_again_when_a_file_is_another_of_the_same_size_and_time(folder: Path) -> None:
    for change in (file_replaced, file_written):
        opened(folder)
        before = next(folder.glob("encoder.*")).stat()
        change(folder)
        after = next(folder.glob("encoder.*")).stat()
        assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        with pytest.raises(BundleError, match="SHA-256 does not match"):
            opened(folder)
        change(folder)  # The same bit again.
    opened(folder)


def test_what_was_hashed_for_one_manifest_does_not_stand_for_another(folder: Path) -> None:
    """The files are those that were hashed here before; the manifest wants others."""
    opened(folder)
    bundle = Bundle.read(folder)
    other = bundle.manifest.files[EMBEDDING].__class__("0" * 64, bundle.manifest.files[EMBEDDING].bytes)
    bundle.manifest.files[EMBEDDING] = other
    with pytest.raises(BundleError, match="SHA-256 does not match"):
        open_engine(bundle, threads=1)
    assert (folder / MANIFEST).is_file()


# The embedding table.


@pytest.mark.parametrize("change", ["cut off", "emptied", "written"])
def test_a_table_that_changes_is_refused_and_kills_nobody(tmp_path: Path, change: str) -> None:
    """A mapped file that was cut off would end the process with SIGBUS."""
    values = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    path = tmp_path / EMBEDDING
    values.tofile(path)
    table = EmbeddingTable.open(path, 300, 64, "fp32")
    ids = np.array([0, 299, 299, 7])
    assert np.array_equal(table.lookup(ids), values[ids])
    if change == "written":
        (values + 1).tofile(path)
    else:
        os.truncate(path, 0 if change == "emptied" else path.stat().st_size - 1)
    with pytest.raises(BundleError, match="changed while the bundle was open"):
        table.lookup(ids)


def test_a_table_that_is_replaced_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / EMBEDDING
    np.full((4, 2), 1, np.float32).tofile(path)
    table = EmbeddingTable.open(path, 4, 2, "fp32")
    np.full((4, 2), 2, np.float32).tofile(tmp_path / "new")
    (tmp_path / "new").rename(path)
    assert (table.lookup(np.arange(4)) == 1).all()
    path.unlink()
    assert (table.lookup(np.arange(4)) == 1).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_rows_are_read_alike_by_many_threads(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(1)
    path, stored = tmp_path / EMBEDDING, np.dtype(STORED[dtype])
    raw = random.integers(0, 60, (50, 32)).astype(stored)
    scales = random.random(50).astype(np.float32)
    path.write_bytes(raw.tobytes() + (scales.tobytes() if dtype == "int8" else b""))
    table = EmbeddingTable.open(path, 50, 32, dtype)
    wanted = raw.astype(np.float32)
    if dtype == "bf16":
        wanted = (raw.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "int8":
        wanted *= scales[:, None]
    wrong: list[np.ndarray] = []

    def read(seed: int) -> None:
        for _ in range(50):
            ids = np.random.default_rng(seed).integers(0, 50, 40)
            if not np.array_equal(table.lookup(ids), wanted[ids]):
                wrong.append(ids)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and table.lookup(np.zeros(0, np.int64)).shape == (0, 32)
