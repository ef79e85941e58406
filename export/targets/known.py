"""The one dict of targets."""

from __future__ import annotations

from penguin_edge.errors import InputError
from penguin_edge.export.targets.base import Target
from penguin_edge.export.targets.executorch.programs import ExecutorchTarget
from penguin_edge.export.targets.onnx.graphs import OnnxTarget

TARGETS: dict[str, Target] = {"executorch": ExecutorchTarget(), "onnx": OnnxTarget()}


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        InputError: unknown; the message lists the known ones.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; known: {', '.join(sorted(TARGETS))}")
    return TARGETS[name]
