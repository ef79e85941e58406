"""Bundles are written whole or not at all, and what was there before is never lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penguin_edge.bundle.contract import MANIFEST, Bounds, signature
from penguin_edge.bundle.writing import writing
from penguin_edge.config import PRESETS
from penguin_edge.errors import BundleError
from penguin_edge.files import manifest_hash

DATA = {"files": {}, "schema": 1}
OLD = json.dumps({**DATA, "sha256": manifest_hash(DATA)})


def old_bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_text(OLD)
    return folder


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    out = old_bundle(tmp_path / "out")
    with pytest.raises(RuntimeError), writing(out, overwrite=True) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in out.iterdir()] == [MANIFEST]


@pytest.mark.parametrize(("error", "told"), [(OSError, BundleError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_failing_rename_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], told: type[BaseException]
) -> None:
    out = old_bundle(tmp_path / "out")
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(told), writing(out, overwrite=True) as folder:
        (folder / MANIFEST).write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / MANIFEST).read_text() == OLD


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="appeared"), writing(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        (tmp_path / "out").mkdir()
    assert list((tmp_path / "out").iterdir()) == [] and len(list(tmp_path.iterdir())) == 1


def test_other_folders_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match="not a bundle"), writing(tmp_path / "home", overwrite=True):
        pass
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_signatures_name_every_tensor() -> None:
    for graph, names in {
        "encoder": "pixels rows cols",
        "projector": "features",
        "decoder": "embeds start logit_index positions",
    }.items():
        inputs, outputs = signature(graph, PRESETS["tiny"], Bounds())
        assert [spec.name for spec in inputs] == names.split() and len(outputs) == 1
