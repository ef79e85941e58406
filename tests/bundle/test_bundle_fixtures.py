"""Bundles of an earlier day open, pass `verify` and answer as they did; see tests/bundles/README.md.

The folders are read and never written: what may write works on a copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from exports import stamps

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.cli import main
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session

BUNDLES = Path(__file__).parents[1] / "bundles"
TARGETS = ("onnx", "executorch")
ANSWERS: list[dict[str, Any]] = json.loads((BUNDLES / "answers.json").read_text(encoding="utf-8"))
MAX_BYTES = 3_000_000
"""Limit of one folder: everybody who clones the repository has them, for ever."""


@pytest.fixture(params=TARGETS)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A committed bundle that nothing is remembered of; it is as it was when the test ends."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = BUNDLES / request.param
    before = stamps(BUNDLES)
    yield folder
    assert stamps(BUNDLES) == before, "a committed bundle was written into"


def skip_unless_it_runs(bundle: Bundle) -> None:
    """A .pte file runs with the minor version of executorch that made it, other graphs with any."""
    made = bundle.manifest.tools.get("executorch")
    if made is None:
        return
    found = metadata.version("executorch")
    if found.split(".")[:2] != made.split(".")[:2]:
        pytest.skip(
            f"made with executorch {made}, and {found} is installed: a .pte file runs with its own minor version"
        )


def test_every_target_has_one() -> None:
    assert sorted(path.name for path in BUNDLES.iterdir() if path.is_dir()) == sorted((*TARGETS, "pictures"))


def test_it_opens_and_is_what_was_committed(kept: Path) -> None:
    bundle = Bundle.read(kept)
    bundle.check_hashes()
    assert bundle.manifest.target == kept.name and bundle.manifest.verified
    assert sum(path.stat().st_size for path in kept.iterdir()) < MAX_BYTES


def test_it_passes_verify(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a copy, since the verb writes its result beside the manifest."""
    skip_unless_it_runs(Bundle.read(kept))
    copy = shutil.copytree(kept, tmp_path / "bundle")
    assert main(["verify", str(copy), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and result["manifest_sha256"] == Bundle.read(kept).manifest.to_json()["sha256"]


def test_it_answers_as_it_did(kept: Path) -> None:
    skip_unless_it_runs(Bundle.read(kept))
    session = Session.open(kept)
    for asked in ANSWERS:
        picture = {"type": "image", "image": {"image_path": str(BUNDLES / asked["picture"])}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": asked["question"]}]}
        tokens = list(session.converse([message], SamplingOptions(max_new_tokens=24)))
        assert [token.id for token in tokens] == asked["token_ids"]
        assert "".join(token.text for token in tokens) == asked["answer"]
        assert session.report.finish_reason == "stop"
