"""The one dict of targets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

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


def check_with(target: Target, check: Callable[[Target], None]) -> None:
    """Check something of one target; a refusal ends with the names of those targets that take it.

    Raises:
        InputError: the target refuses it.
    """
    try:
        check(target)
    except InputError as error:
        takers = []
        for name, other in sorted(TARGETS.items()):
            with contextlib.suppress(InputError):
                check(other)
                takers.append(name)
        known = f" (--target {' or '.join(takers)} takes it)" if takers else ""
        raise InputError(f"{error}{known}") from error
