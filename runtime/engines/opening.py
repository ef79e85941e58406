"""The one place that knows which engine runs which target."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BundleError
from penguin_edge.machine import Package
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.executorch import ExecutorchEngine
from penguin_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from penguin_edge.runtime.engines.self_check import self_check


class EngineKind(Protocol):
    """What runs the bundles of one target: an engine's class."""

    @property
    def package(self) -> Package:
        """The distribution that the engine imports when it is opened."""
        ...

    def open(self, bundle: Bundle, *, threads: int | None = None) -> Engine:
        """Open a bundle of the target.

        Raises:
            TargetUnavailable: `package` is not installed; the message ends with the line that installs it.
            BundleError: a bundle of another target, or one whose files do not fit its manifest.
        """
        ...


ENGINES: dict[str, EngineKind] = {"onnx": OnnxRuntimeEngine, "executorch": ExecutorchEngine}
"""Engines by the target that a bundle was exported for; each imports its library when it is opened."""
PLANNED = {
    "tensorrt": Package(
        "tensorrt", "pip install 'penguin-edge[tensorrt]' (export and engine are not part of this version)"
    )
}
"""Packages of targets that are to come; such a row moves into `ENGINES`."""


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
