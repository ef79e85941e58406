"""The engine for bundles of target `onnx`: ONNX Runtime on the CPU, KV buffers bound once and written in place.

| tensor                       | shape                       | dtype              | owner                              |
|------------------------------|-----------------------------|--------------------|------------------------------------|
| pixels, features, visual     | as in `base.py`             | float32            | the caller; results are new arrays |
| embeds, logits               | [1,S,H], [1,K,V]            | float32            | the caller; results are new arrays |
| start                        | [1]                         | int64              | each cache, bound once             |
| positions                    | [S]                         | int64              | the call                           |
| past_key_i and present_key_i | [1,kv,max_seq_len,D]        | manifest.kv_dtype  | each cache, one array for both     |

Each graph is loaded when it is first called. The system gives memory to the KV buffers only as they fill.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from penguin_edge.bundle.contract import COPY_AGAIN, KV_SCALES, POSITIONS, kv_names, most_positions
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BundleError, InputError, MemoryLimitError, PenguinError, TargetUnavailable
from penguin_edge.machine import Package, int8_overflows, page_out, trim_heap
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.engines.base import (
    F32,
    I64,
    check_encode,
    check_forward,
    check_move,
    check_positions,
    check_project,
    check_threads,
)
from penguin_edge.runtime.engines.cache import Cache, Caches, Key
from penguin_edge.runtime.engines.embedding import EmbeddingTable
from penguin_edge.runtime.engines.kv_shift import move_positions
from penguin_edge.runtime.engines.self_check import open_tokenizer

KEPT_PATCHES = 1024
"""The encoder keeps the memory of calls up to so many patches: 190 MB at the 2B model's shape."""
LINE = 64
"""Bytes of a cache line."""
TYPES = {
    **dict.fromkeys(("f32", "fp32"), "tensor(float)"),
    **dict.fromkeys(("f16", "fp16"), "tensor(float16)"),
    **dict.fromkeys(("i8", "int8"), "tensor(int8)"),
    "i64": "tensor(int64)",
}
"""What ONNX Runtime calls a manifest's types."""
KV_DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


@dataclass
class _Buffers:
    """A cache: where the next token goes, keys and values of each layer, and what binds them to each graph."""

    start: I64 = field(default_factory=lambda: np.zeros(1, np.int64))
    buffers: list[dict[str, np.ndarray]] = field(default_factory=list)
    bindings: dict[str, Any] = field(default_factory=dict)


class OnnxRuntimeEngine:
    """See `penguin_edge.runtime.engines.base.Engine`."""

    name = "onnxruntime"
    package = Package("onnxruntime", "pip install 'penguin-edge[onnx]'")

    def __init__(self, bundle: Bundle, runtime: Any, threads: int | None) -> None:
        """Use `open`; `runtime` is the imported onnxruntime module."""
        self.config = bundle.manifest.model
        self.bounds = bundle.manifest.bounds
        self._bundle = bundle
        self._runtime = runtime
        self._threads = threads
        self._layers = bundle.manifest.quantization.get("layers", [])
        self._table = EmbeddingTable.of(bundle)
        self._sessions: dict[str, Any] = {}
        self._most = most_positions(self.config, self.bounds)
        self._caches = Caches(None, _Buffers)
        self._scales: list[F32] | None = None
        self.guard = self._caches.guard

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int | None = None) -> OnnxRuntimeEngine:
        """Open a bundle of target `onnx`; `threads` None leaves the choice to ONNX Runtime (one per core).

        Raises:
            TargetUnavailable: onnxruntime is not installed.
            BundleError: a bundle of another target, or one whose files do not fit its manifest.
            InputError: fewer than one thread, or more than `MAX_THREADS`.
        """
        if bundle.manifest.target != "onnx":
            raise BundleError(
                f"{bundle.folder}: made for target {bundle.manifest.target!r}, and this engine runs 'onnx'; export the "
                "model with --target onnx"
            )
        check_threads(threads)
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetUnavailable(f"onnxruntime cannot be imported ({error}); {cls.package.install}") from error
        return cls(bundle, onnxruntime, threads)

    @property
    def capacity(self) -> int | None:
        """None: a cache is a set of arrays."""
        return self._caches.capacity

    def tokenizer(self) -> Tokenizer:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        return open_tokenizer(self._bundle)

    def load(self, *, media: bool) -> None:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        with self.guard:
            for graph in self._bundle.manifest.graphs:
                if media or graph not in ("encoder", "projector"):
                    self._session(graph)

    def new_cache(self) -> Cache:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        return self._caches.new()

    def close(self) -> None:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        self._caches.close()
        self._sessions.clear()

    @property
    def can_move(self) -> bool:
        """False for an int8 cache whose scales are in the graph alone, as earlier exports left them."""
        return self._bundle.manifest.kv_dtype != "int8" or KV_SCALES in self._bundle.manifest.files

    @property
    def moves_exactly(self) -> bool:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        return self._bundle.manifest.kv_dtype != "int8"

    @property
    def can_place(self) -> bool:
        """Whether the decoders take positions."""
        return self._bundle.manifest.placed

    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        check_move(self.bounds.max_seq_len, begin, end, to, turn)
        if not self.can_move:
            raise InputError(f"{self._bundle.folder}: no {KV_SCALES} for its int8 cache; recompute, or export it again")
        with self.guard:
            state, scales = self._caches.state(cache), self._key_scales()
            with cache.moving(begin, end, to, turn):
                for layer, buffers in enumerate(state.buffers):
                    scale, theta = scales[layer] if scales else None, self.config.text.rope_theta
                    move_positions(buffers["key"], buffers["value"], begin, end, to, theta, scale, turn)

    def _key_scales(self) -> list[F32]:
        """[kv, 1, D] of each layer's keys; none where the cache is not int8.

        Raises:
            BundleError: a file that does not fit the model.
        """
        if self._scales is None and self._bundle.manifest.kv_dtype == "int8":
            text, path = self.config.text, self._bundle.path(KV_SCALES)
            shape = (2 * text.num_hidden_layers, text.num_key_value_heads, 1, text.head_dim)
            with self._bundle.unchanged():
                found = np.fromfile(path, "<f4")
            if found.size != math.prod(shape):
                raise BundleError(f"{path}: {found.size} scales, wanted {math.prod(shape)}; export the model again")
            self._scales = list(found.reshape(shape)[: text.num_hidden_layers].astype(np.float32))
        return self._scales or []

    def embed(self, ids: I64) -> F32:
        """[S] -> [S, H]."""
        return self._table.lookup(ids)

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32:
        """[B, P, 588] -> [B, P, C]."""
        check_encode(self.bounds, pixels, rows, cols)
        # Without an arena every layer asks the system for its large tensors anew, a fifth of the attention's time; with
        # one the largest picture's memory would be kept for ever.
        options = self._runtime.RunOptions()
        if pixels.shape[0] * pixels.shape[1] > KEPT_PATCHES:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with self.guard:
            return self._call("encoder", {"pixels": _f32(pixels), "rows": _i64(rows), "cols": _i64(cols)}, options)

    def project(self, features: F32) -> F32:
        """[B, T, M, C] -> [B, T, H]."""
        check_project(self.bounds, features)
        with self.guard:
            return self._call("projector", {"features": _f32(features)})

    def forward(
        self, cache: Cache, embeds: F32, logit_index: I64, keys: Sequence[Key] = (), positions: I64 | None = None
    ) -> F32:
        """Append [S, H] to a cache; logits [K, V] at `logit_index`.

        Raises:
            InputError: positions with gaps in a call that fills an empty cache to its last slot.
        """
        with self.guard:
            state = self._caches.state(cache)
            check_forward(self.bounds, cache.length, embeds, logit_index, self.config.text.hidden_size)
            places = check_positions(
                positions, len(embeds), cache.length, cache.following, self._most, can_place=self.can_place
            )
            if len(embeds) == self.bounds.max_seq_len and places[-1] - places[0] >= len(embeds):
                # The attention takes the positions of a whole cache at once from the first one alone.
                raise InputError(
                    f"{len(embeds)} tokens with gaps between their positions fill the whole cache in one call; append "
                    "them in two calls"
                )
            with cache.writing(len(embeds), keys, places):
                state.start[0] = cache.length
                return self._forward(state, embeds, logit_index, places)

    def _forward(self, state: _Buffers, embeds: F32, logit_index: I64, positions: I64) -> F32:
        # At least `min_chunk` positions go through the graph for prompts, where the bundle has one.
        prompt = "prefill" in self._bundle.manifest.graphs and len(embeds) >= self.bounds.min_chunk
        graph = "prefill" if prompt else "decoder"
        session = self._session(graph)
        if graph not in state.bindings:
            state.bindings[graph] = self._bind(session, state)
        binding = state.bindings[graph]
        # ONNX Runtime reads these arrays where they are: they must outlive the call.
        inputs = {"embeds": _f32(embeds)[None], "logit_index": _i64(logit_index)}
        if self.can_place:
            inputs[POSITIONS] = positions
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise self._failed(graph, error) from error
        return binding.get_outputs()[0].numpy()[0]

    def _bind(self, session: Any, state: _Buffers) -> Any:
        """Bind `start` and the KV buffers, one set for all graphs, for good; `logits` is the first output."""
        text, ort_value = self.config.text, self._runtime.OrtValue
        shape = [1, text.num_key_value_heads, self.bounds.max_seq_len, text.head_dim]
        dtype = KV_DTYPES[self._bundle.manifest.kv_dtype]
        if not state.buffers:
            state.buffers = [
                {what: _aligned_zeros(shape, dtype) for what in ("key", "value")} for _ in range(text.num_hidden_layers)
            ]
        binding = session.io_binding()
        binding.bind_output("logits")
        binding.bind_ortvalue_input("start", ort_value.ortvalue_from_numpy(state.start))
        for layer, buffers in enumerate(state.buffers):
            names = kv_names(layer)
            for what, array in buffers.items():
                buffer = ort_value.ortvalue_from_numpy(array)  # the same memory
                binding.bind_ortvalue_input(names[f"past_{what}"], buffer)
                binding.bind_ortvalue_output(names[f"present_{what}"], buffer)
        return binding

    def _call(self, graph: str, inputs: dict[str, Any], options: Any = None) -> F32:
        session = self._session(graph)
        try:
            return session.run(None, inputs, options)[0]
        except Exception as error:
            raise self._failed(graph, error) from error

    def _failed(self, graph: str, error: Exception) -> PenguinError:
        """The package's own error for what ONNX Runtime raised while it ran a graph."""
        text = str(error).strip().splitlines()[-1]
        if "allocate" in text or "bad_alloc" in text:
            return MemoryLimitError(f"{graph}: out of memory ({text}); use a smaller budget or fewer frames at once")
        return InputError(f"{graph}: ONNX Runtime refused the call ({text}); compare shapes with the manifest")

    def _session(self, graph: str) -> Any:
        """Load a graph at its first use.

        Raises:
            InputError: the engine was closed.
            BundleError: the bundle has no such graph or was changed, or this ONNX Runtime cannot load it.
        """
        self._caches.check_open()
        if graph in self._sessions:
            return self._sessions[graph]
        manifest = self._bundle.manifest
        if graph not in manifest.graphs:
            raise BundleError(f"{self._bundle.folder}: has no {graph} (a text-only model); export a model with vision")
        path = self._bundle.path(manifest.graphs[graph].file)
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        options.enable_cpu_mem_arena = graph != "projector"
        if int8_overflows():
            # Slower and right: such a processor adds pairs of products in 16 bits.
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.enable_mem_pattern = False
        # Each graph has threads of its own: those of the one that has just run are not to spin while the next one runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            with self._bundle.unchanged():
                session = self._runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except BundleError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise BundleError(
                f"{path}: onnxruntime {self._runtime.__version__} cannot load it ({reason}); it was exported for "
                f"{manifest.tools.get('onnxruntime', 'an unknown version')}: copy the bundle again, or export again"
            ) from error
        self._check_tensors(session, graph, path)
        if any(row["scheme"] and row["layer"].startswith(f"{graph}.") for row in self._layers):
            # ONNX Runtime computes from copies of its own, and has read the file for nothing but them.
            page_out(path.with_name(f"{path.name}.data"))
            trim_heap()
        self._sessions[graph] = session
        return session

    def _check_tensors(self, session: Any, graph: str, path: Path) -> None:
        """Compare what a loaded graph takes and gives with what the manifest says of it.

        Raises:
            BundleError: a tensor is missing, left over, or of another type or shape.
        """
        manifest, text = self._bundle.manifest, self.config.text
        entry = manifest.graphs[graph]
        wanted = {spec.name: (TYPES[spec.dtype], spec.shape) for spec in (*entry.inputs, *entry.outputs)}
        if graph in ("decoder", "prefill"):
            shape = (1, text.num_key_value_heads, self.bounds.max_seq_len, text.head_dim)
            for layer in range(text.num_hidden_layers):
                wanted |= {name: (TYPES[manifest.kv_dtype], shape) for name in kv_names(layer).values()}
        found = {spec.name: (spec.type, spec.shape) for spec in (*session.get_inputs(), *session.get_outputs())}
        for name in sorted(wanted.keys() | found.keys()):
            if name in wanted and name in found and _agree(wanted[name], found[name]):
                continue
            given, stated = (" ".join(map(str, tensors.get(name, ("none",)))) for tensors in (found, wanted))
            raise BundleError(f"{path}: its tensor {name} is {given}, the manifest states {stated}; {COPY_AGAIN}")


def _agree(wanted: tuple[str, Sequence[int | str]], found: tuple[str, Sequence[int | str]]) -> bool:
    """Equal types and numbers; a letter stands for any length."""
    pairs = itertools.zip_longest(wanted[1], found[1])
    return wanted[0] == found[0] and all(a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in pairs)


def _aligned_zeros(shape: list[int], dtype: Any) -> np.ndarray:
    """An array that begins with a cache line, whose memory the system gives when it is first written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + LINE, np.uint8)
    skip = -raw.ctypes.data % LINE
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _f32(values: F32) -> F32:
    return np.ascontiguousarray(values, dtype=np.float32)


def _i64(values: I64) -> I64:
    return np.ascontiguousarray(values, dtype=np.int64)
