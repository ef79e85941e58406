"""The manifest: what a bundle's `bundle.json` says, typed and checked against itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from penguin_edge.bundle import rules
from penguin_edge.bundle.contract import (
    EMBEDDING,
    MANIFEST,
    POSITIONS,
    SCHEMA_VERSION,
    TOKENIZER,
    Bounds,
    TensorSpec,
    compiled_bounds,
    signature,
)
from penguin_edge.config import PenguinConfig
from penguin_edge.files import manifest_hash
from penguin_edge.schema import SchemaError


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class GraphEntry:
    """One compiled graph: its main file, and how it was made."""

    file: str
    precision: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    peak_mb: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class TablePlace:
    """Where an int4 embedding table lies: byte offsets of its levels and of its scales, and weights per scale."""

    file: str
    levels: int
    scales: int
    group: int


@dataclass(frozen=True)
class Manifest:
    """`bundle.json` as it is; see docs/bundle.md for each field."""

    model: PenguinConfig
    source: dict[str, Any]
    target: str
    precision: str
    bounds: Bounds
    graphs: dict[str, GraphEntry]
    embedding_dtype: str
    kv_dtype: str
    chat: dict[str, Any]
    tools: dict[str, str]
    generation: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    """The recipe, and what became of each linear layer; empty when nothing is quantized."""
    embedding: TablePlace | None = None
    """Place of an int4 table; any other table is the whole of `embedding.bin`."""
    verified: bool = False
    """Whether the export ended with a comparison to its check data, and passed it."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @property
    def placed(self) -> bool:
        """Whether the decoders take a rotary position for each token, which those of earlier exports do not."""
        return any(spec.name == POSITIONS for spec in self.graphs["decoder"].inputs)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["model"] = self.model.to_json()
        data["kv_layout"] = "[1, kv_heads, max_seq_len, head_dim] per layer, keys and values"
        data["sha256"] = manifest_hash(data)
        return data

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            SchemaError: a field that breaks its rule, or two that do not go together.
            CheckpointError: the same in the model's configuration.
        """
        rules.MANIFEST.check(data, "")

        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)

        graphs = {
            name: GraphEntry(**{**row, "inputs": tensors(row["inputs"]), "outputs": tensors(row["outputs"])})
            for name, row in data["graphs"].items()
        }
        bounds = Bounds(**{**data["bounds"], "patch_buckets": tuple(data["bounds"]["patch_buckets"])})
        files = {name: FileEntry(**row) for name, row in data["files"].items()}
        plain = {
            key: data[key]
            for key in ("source", "target", "precision", "embedding_dtype", "kv_dtype", "chat", "tools", "generation")
        }
        place = data.get("embedding")
        plain |= {"embedding": TablePlace(**place) if place else None}
        plain |= {"quantization": data.get("quantization", {}), "verified": data.get("verified", False)}
        model = PenguinConfig.from_json(data["model"])
        manifest = cls(model=model, bounds=bounds, graphs=graphs, files=files, schema=data["schema"], **plain)
        manifest.check()
        return manifest

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            SchemaError: which, and what they have to fulfil.
        """
        self._check_graphs()
        self._check_bounds()
        self._check_table()
        needed = [TOKENIZER, *(graph.file for graph in self.graphs.values())]
        missing = sorted(set(needed) - set(self.files))
        if missing:
            raise SchemaError(f"files does not list {missing[0]}, which the bundle needs to run")
        if MANIFEST in self.files:
            raise SchemaError(f"files lists {MANIFEST} itself, which cannot hold its own hash")

    def _check_graphs(self) -> None:
        wanted = {"decoder"} | ({"encoder", "projector"} if self.model.vision else set())
        if set(self.graphs) - {"prefill"} != wanted:
            raise SchemaError(
                f"graphs has {', '.join(sorted(self.graphs)) or 'none'}, wanted {', '.join(sorted(wanted))}"
            )
        files = [graph.file for graph in self.graphs.values()]
        if len(set(files)) < len(files):
            raise SchemaError(f"graphs names {max(files, key=files.count)} twice; wanted a file per graph")
        for name, graph in self.graphs.items():
            tensors = signature(name, self.model, self.bounds, placed=self.placed)
            if (list(graph.inputs), list(graph.outputs)) != tensors:
                raise SchemaError(f"graphs.{name} has other tensors than a model of this configuration has")

    def _check_bounds(self) -> None:
        bounds, longest = self.bounds, self.model.text.max_position_embeddings
        if not bounds.min_chunk <= bounds.max_chunk:
            raise SchemaError(f"bounds has min_chunk {bounds.min_chunk} above max_chunk {bounds.max_chunk}")
        if not bounds.min_chunk <= bounds.max_seq_len <= longest:
            raise SchemaError(
                f"bounds has max_seq_len {bounds.max_seq_len}, wanted {bounds.min_chunk} to {longest}, its limit"
            )
        if bounds.min_chunk > 1 and "prefill" not in self.graphs:
            raise SchemaError(f"bounds has min_chunk {bounds.min_chunk}, wanted 1 without a prefill graph")
        # Most of them are in no graph, and how large a picture may be decides what is answered about it.
        written = compiled_bounds(self.target, bounds.max_seq_len, prefill="prefill" in self.graphs)
        for name, wanted in asdict(written).items() if written else ():
            found = getattr(bounds, name)
            if found != wanted:
                found, wanted = (list(x) if isinstance(x, tuple) else x for x in (found, wanted))
                raise SchemaError(
                    f"bounds has {name} {found}, and an export for {self.target} with max_seq_len "
                    f"{bounds.max_seq_len} writes {wanted}"
                )

    def _check_table(self) -> None:
        """The embedding table's place and size."""
        text, place, name = self.model.text, self.embedding, EMBEDDING
        if (self.embedding_dtype == "int4") != (place is not None):
            raise SchemaError(
                f"embedding_dtype is {self.embedding_dtype} {'with' if place else 'without'} a place of the "
                "table, wanted one for int4 and none for others"
            )
        if place is None:
            width = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[self.embedding_dtype]
            size = text.vocab_size * (text.hidden_size * width + (4 if self.embedding_dtype == "int8" else 0))
            fits = name not in self.files or self.files[name].bytes == size
        else:
            name = place.file
            if text.hidden_size % place.group or text.hidden_size % 2:
                raise SchemaError(
                    f"embedding.group is {place.group}, wanted a divisor of the hidden size "
                    f"{text.hidden_size}, which is even"
                )
            levels = text.vocab_size * text.hidden_size // 2
            scales = 4 * text.vocab_size * (text.hidden_size // place.group)
            size = max(place.levels + levels, place.scales + scales)
            apart = place.levels + levels <= place.scales or place.scales + scales <= place.levels
            own = size == levels + scales or name != EMBEDDING
            fits = name not in self.files or (size <= self.files[name].bytes and apart and own)
        if name not in self.files:
            raise SchemaError(f"files does not list {name}, which holds the embedding table")
        if not fits:
            raise SchemaError(
                f"files: {name} has {self.files[name].bytes} bytes, and a {self.embedding_dtype} table of "
                f"[{text.vocab_size}, {text.hidden_size}] does not lie there as stated"
            )


def config_hash(config: PenguinConfig) -> str:
    """SHA-256 over the canonical JSON of a model's configuration; the check data carry it as metadata `model`."""
    return manifest_hash(config.to_json())
