"""Facts of a target: each stands at the target alone, and whoever needs one asks it."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from penguin_edge.bundle.contract import Bounds
from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.cli import main
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.export.estimate import choose
from penguin_edge.export.pipeline import ExportOptions, check_options, estimate, expected_seconds
from penguin_edge.export.targets.base import PartFile, require_modules, silent
from penguin_edge.export.targets.known import TARGETS, find_target
from penguin_edge.machine import EXPORTERS, TORCH, Package
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions
from penguin_edge.quantize.linear import Activations, Scheme
from penguin_edge.quantize.recipe import PRESETS, Recipe
from penguin_edge.quantize.search.choice import AutoOptions
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.opening import ENGINES, PLANNED

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "LICENSE")


class ThirdTarget:
    """A target that takes eight bits alone, in large files."""

    name = "third"
    precisions: tuple[str, ...] = ("fp16", "fp32")
    tools: tuple[str, ...] = ("numpy",)
    shares_kv = True
    kv_dtypes: tuple[str, ...] = ()
    activations: Activations = "token"
    shares_table = False
    compiles = True

    def bounds(self, max_seq_len: int) -> Bounds:
        return Bounds(max_seq_len)

    def kv_dtype(self, precision: str) -> str:
        return "fp16"

    def check_model(self, config: PenguinConfig) -> None:
        if not config.text.tie_word_embeddings:
            raise InputError("the third engine takes no head beside the table")

    def check_scheme(self, layer: str, scheme: Scheme, precision: str) -> None:
        if scheme.bits != 8:
            raise InputError(f"{layer}: {scheme.label}, but the third engine takes 8 bits")

    def peak_factor(self, precision: str, quantized: bool) -> float:
        return 7.0

    def check_installed(self) -> None:
        require_modules("the third export", "numpy", "no_such_module", "nor_this")

    def layer_bytes(self, shape: tuple[int, int], scheme: Scheme | None) -> int:
        return shape[0] * shape[1] * (4 if scheme is None else 1) + 1000

    def graph_bytes(self, config: PenguinConfig, max_seq_len: int) -> int:
        return 3_000_000

    def export_part(
        self, part: str, model: PenguinModel, bounds: Bounds, folder: Path, note: Callable[[str], None] = silent
    ) -> PartFile:
        raise NotImplementedError


class ThirdEngine:
    """An engine whose package is not there."""

    package = Package("no-such-package", "pip install 'no-such-package[third]'")

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int | None = None) -> Engine:
        raise TargetUnavailable(cls.package.install)


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> ThirdTarget:
    """A third row in the dict of targets and in that of engines, and nothing else."""
    target = ThirdTarget()
    monkeypatch.setitem(TARGETS, target.name, target)
    monkeypatch.setitem(ENGINES, target.name, ThirdEngine)
    return target


def opened(model: str) -> Checkpoint:
    return Checkpoint.open(model, random_weights=True, note=lambda line: None)


def test_sizes_of_a_third_target_are_its_own(third: ThirdTarget, tmp_path: Path) -> None:
    options = AutoOptions(CalibrationOptions(TEXT, samples=1, length=24), max_size=10**9)
    reports = {
        name: choose(opened("tiny"), TARGETS[name], options, tmp_path / name, None, lambda *at: None)
        for name in ("onnx", "third")
    }
    recipe, report = reports["third"]
    rows = {row["layer"]: row for row in report["layers"]}
    sizes = {name: third.layer_bytes(tuple(rows[name]["shape"]), scheme) for name, scheme in recipe.layers.items()}
    assert report["bytes"] > 3_000_000 + sum(sizes.values()) > reports["onnx"][1]["bytes"]
    assert not [c for row in rows.values() for c in row["candidates"] if c["label"].startswith("int4")]


def test_options_of_a_third_target_are_checked(third: ThirdTarget) -> None:
    checkpoint = opened("tiny")
    assert find_target("third") is third
    eight = Recipe("eight", decoder=Scheme(8), prefill=Scheme(8))
    options = ExportOptions("third", eight, max_seq_len=128)
    check_options(checkpoint, third, options)
    with pytest.raises(
        InputError, match=r"executorch keeps the KV cache inside .* \(--target onnx or third takes it\)"
    ):
        check_options(checkpoint, TARGETS["executorch"], options)
    with pytest.raises(InputError, match=r"third engine takes 8 bits \(--target executorch or onnx takes it\)$"):
        check_options(checkpoint, third, ExportOptions("third", PRESETS["int4"], max_seq_len=128))
    with pytest.raises(InputError, match=r"no head beside the table \(--target executorch or onnx takes it\)$"):
        check_options(opened("8b"), third, ExportOptions("third", PRESETS["fp32"]))
    need = estimate(checkpoint, third, options)
    assert need.kv_bytes == estimate(checkpoint, TARGETS["onnx"], options).kv_bytes // 2
    assert need.peak > estimate(checkpoint, TARGETS["onnx"], options).peak
    assert "embedding" in expected_seconds(checkpoint, third, options)
    with pytest.raises(TargetUnavailable) as refused:
        third.check_installed()
    assert str(refused.value) == f"the third export needs no_such_module, nor_this, not installed here; {EXPORTERS}"


def test_doctor_knows_a_third_target(third: ThirdTarget, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "missing: pip install 'no-such-package[third]'" in said
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["engines"]) == ["onnx", "executorch", "third", "eager", *PLANNED]
    assert found["engines"]["third"] is None and found["packages"]["no-such-package"] is None
    exports = {(row["model"], row["target"], row["precision"]) for row in found["exports"]}
    # What a target refuses is no row: a head of its own, four bits, a second graph on a cache that is not shared.
    assert {row[0] for row in exports if row[1] == "third"} == {"2b"}
    assert {row[2] for row in exports if row[1] == "third"} == {"fp32", "fp16", "int8"}
    assert ("2b", "onnx", "int8-prefill") in exports and ("2b", "executorch", "int8-prefill") not in exports


def test_a_third_target_is_offered(third: ThirdTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "onnx or executorch or third (default: onnx)" in " ".join(capsys.readouterr().out.split())
    export = ["export", "--model", "tiny", "--random-weights", "--max-seq-len", "128", "-o", str(tmp_path / "out")]
    assert main([*export, "--target", "third"]) == 1
    assert "the third export needs no_such_module" in capsys.readouterr().err
    assert main([*export, "--target", "fourth"]) == 1
    assert "unknown target 'fourth'; known: executorch, onnx, third" in capsys.readouterr().err


def test_nobody_else_asks_which_target_it_is() -> None:
    """No comparison with the name of a target, and no dict with one as a key, but in the dicts themselves."""
    homes = {"export/targets/known.py", "runtime/engines/opening.py", "penguin_edge/bundle/contract.py"}
    engines = {
        "runtime/engines/onnxruntime.py",
        "runtime/engines/executorch.py",
    }  # each refuses bundles of other targets
    found = []
    for folder in ("penguin_edge", "export", "quantize", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                sides: list[ast.expr | None] = []
                if isinstance(node, ast.Compare) and place not in engines:
                    sides = [node.left, *node.comparators]
                elif isinstance(node, ast.Dict) and place not in homes:
                    sides = node.keys
                if any(isinstance(side, ast.Constant) and side.value in TARGETS for side in sides):
                    found.append(f"{place}, line {node.lineno}")
    assert not found, f"these ask for a target by name; make it a fact of the target: {found}"


def test_lines_that_install_name_what_there_is() -> None:
    """What messages and `doctor` say: extras of pyproject.toml, and the version of torch that was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = [TORCH, *(engine.package for engine in ENGINES.values()), *PLANNED.values()]
    for line in [EXPORTERS, *(package.install for package in packages)]:
        named = re.findall(r"penguin-edge\[([a-z]+)\]", line)
        assert named or line == TORCH.install
        assert set(named) <= set(project["optional-dependencies"]), line
    pins = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert TORCH.install.removeprefix("pip install ") in pins
