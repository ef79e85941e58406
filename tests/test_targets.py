"""Facts of a target: each stands at the target alone, and whoever needs one asks it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from penguin_edge.machine import EXPORTERS, TORCH
from penguin_edge.runtime.engines import ENGINES, PLANNED

ROOT = Path(__file__).resolve().parents[1]


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
