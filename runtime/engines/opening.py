"""The one place that knows which engine runs which target."""

from __future__ import annotations

from pathlib import Path

from penguin_edge.bundle.manifest import Bundle
from penguin_edge.errors import BundleError
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.executorch import ExecutorchEngine
from penguin_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from penguin_edge.runtime.engines.self_check import self_check

ENGINES: dict[str, type[OnnxRuntimeEngine] | type[ExecutorchEngine]] = {
    "executorch": ExecutorchEngine,
    "onnx": OnnxRuntimeEngine,
}
"""Engines by the target that a bundle was exported for; each imports its library when it is opened."""


def open_engine(bundle: str | Path | Bundle, *, threads: int | None = None) -> Engine:
    """Check a bundle's files and load its graphs.

    Args:
        bundle: its folder, or the bundle as read.
        threads: threads of the engine; None leaves the choice to it.
    Raises:
        BundleError: damaged files, or a target that no engine here runs.
        TargetUnavailable: the engine's library is not installed.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.read(bundle)
    kind = ENGINES.get(bundle.manifest.target)
    if kind is None:
        raise BundleError(
            f"{bundle.folder}: made for target {bundle.manifest.target!r}; known: {', '.join(sorted(ENGINES))}"
        )
    bundle.check_hashes_once(self_check)
    return kind.open(bundle, threads=threads)
