"""penguin-nano as it ships: its shape, its scores on held-out combinations, and the same scores from its bundles."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penguin_edge.checkpoint import EMBEDDED, Checkpoint, meta_model
from penguin_edge.config import PRESETS
from penguin_edge.nano.tasks import TASKS

FOLDER = EMBEDDED["nano"]


def test_its_shape_is_small_and_quantizes() -> None:
    config = PRESETS["nano"]
    assert sum(p.numel() for p in meta_model(config).parameters()) <= 6_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000
    for part in (config.vision, config.text):
        assert part is not None
        widths = [part.hidden_size, part.intermediate_size, part.num_attention_heads * part.head_dim]
        widths.append(part.num_key_value_heads * part.head_dim)
        assert not any(width % 64 for width in widths)
    assert config.text.vocab_size % 64 == 0
    assert dataclasses.fields(config) == dataclasses.fields(PRESETS["2b"])


def test_the_shipped_checkpoint_is_the_preset() -> None:
    checkpoint = Checkpoint.open("nano")
    assert checkpoint.stored is not None and checkpoint.config == PRESETS["nano"]
    random = Checkpoint.open("nano", random_weights=True, note=lambda line: None)
    assert random.stored is None and random.fingerprint() != checkpoint.fingerprint()


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "heldout"
    command = [sys.executable, "-m", "penguin_edge", "data", "nano", "--split", "heldout", "--count", "200"]
    subprocess.run([*command, "--seed", "77", "-o", str(out)], check=True, capture_output=True)
    return out


def scores(model: str | Path, data: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "penguin_edge", "eval", str(model), "--data", str(data), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_it_learned_and_its_bundles_score_the_same(heldout: Path, tmp_path: Path) -> None:
    eager = scores("nano", heldout)
    assert set(eager["tasks"]) == set(TASKS)
    for row in eager["tasks"].values():
        assert {"n", "accuracy", "chance", "majority", "question_only"} <= set(row) and row["n"] == 20
    # 0.38 above it when the weights were made; random weights are below it. Room for 20 questions a task.
    assert eager["average"] > eager["baselines"]["majority"] + 0.25
    for target in ("onnx", "executorch"):
        bundle = tmp_path / target
        command = [sys.executable, "-m", "penguin_edge", "export", "--model", "nano", "--target", target]
        subprocess.run([*command, "--quant", "fp32", "-o", str(bundle)], check=True, capture_output=True)
        exported = scores(bundle, heldout)
        # Greedy answers; two candidates closer than the rounding of fp32 are not expected among 200.
        assert {task: row["accuracy"] for task, row in exported["tasks"].items()} == {
            task: row["accuracy"] for task, row in eager["tasks"].items()
        }
