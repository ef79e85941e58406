"""What a target is: which precisions and schemes it computes, what exporting costs, and how one part is compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from penguin_edge.bundle.contract import Bounds
from penguin_edge.bundle.manifest import TablePlace
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import TargetUnavailable
from penguin_edge.machine import EXPORTERS
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.linear import Activations, Scheme


@dataclass(frozen=True)
class PartFile:
    """What compiling one part left behind: its main file (others lie beside it), relative to the folder."""

    file: str
    head: TablePlace | None = None
    """Where an int4 head lies, if the embedding can be read from it."""


def silent(stage: str) -> None:
    """Tell nobody."""


def require_modules(purpose: str, *names: str) -> None:
    """Refuse to export where a tool is missing; nothing is imported.

    Args:
        purpose: how the message begins, such as "exporting to ONNX".
        names: top-level modules.
    Raises:
        TargetUnavailable: which are missing, and the line that installs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise TargetUnavailable(f"{purpose} needs {', '.join(missing)}, not installed here; {EXPORTERS}")


class Target(Protocol):
    """One toolchain, and every fact about it that others ask for.

    `export_part` runs in a process of its own and may use all memory it declares. The engine that runs the bundles,
    and the package that it needs, stand under the same name in `runtime/engines/opening.py`, which needs no torch.
    """

    name: str
    """What `--target` and the manifest call it."""
    precisions: tuple[str, ...]
    tools: tuple[str, ...]
    """Distributions whose versions go into the manifest."""
    shares_kv: bool
    """Whether two graphs can work on one KV cache."""
    kv_dtypes: tuple[str, ...]
    """What else a KV cache may hold, if a recipe asks for it."""
    activations: Activations
    """How this engine rounds what goes into a quantized product."""
    shares_table: bool
    """Whether the embedding can be read from a head's file, where both have the same integers."""
    compiles: bool
    """Whether a graph is taken apart by a compiler once it is traced, which takes its time."""

    def bounds(self, max_seq_len: int) -> Bounds:
        """Bounds that this target can plan for."""

    def kv_dtype(self, precision: str) -> str:
        """What the KV buffers hold unless a recipe says otherwise: "fp32" or "fp16"."""

    def check_model(self, config: PenguinConfig) -> None:
        """Raise InputError, by name, for a model that this engine cannot compute, before any work is done.

        The message says what is wrong; `check_options`, which knows all targets, adds which of them take it.
        """

    def check_scheme(self, layer: str, scheme: Scheme, precision: str) -> None:
        """Raise InputError, by name, for a scheme that this engine would refuse or compute wrongly.

        `precision` is that of the activations between quantized layers.
        """

    def peak_factor(self, precision: str, quantized: bool) -> float:
        """Peak memory of exporting a part over the part's bf16 bytes, beyond what the tools take."""

    def check_installed(self) -> None:
        """Raise TargetUnavailable, with the `pip install` line, when a tool is missing."""

    def layer_bytes(self, shape: tuple[int, int], scheme: Scheme | None) -> int:
        """Bytes that the weights of a layer [N, K] take in a bundle, without its bias; None: in fp32."""

    def graph_bytes(self, config: PenguinConfig, max_seq_len: int) -> int:
        """Upper bound of the bytes of all graphs beside the model's weights: nodes, and constants made for them."""

    def export_part(
        self, part: str, model: PenguinModel, bounds: Bounds, folder: Path, note: Callable[[str], None] = silent
    ) -> PartFile:
        """Compile `part` of `model`, which holds just that part in the precision to be exported.

        Quantized layers are `QuantizedLinear`; their integers go into the file as they are. `note` is told the names
        of `export/stages.py` as they begin: trace, compile, write.
        """
