"""The engine for bundles of target `executorch`: ExecuTorch with XNNPACK on the CPU, KV buffers inside the program.

| tensor                   | shape              | dtype           | owner                                          |
|--------------------------|--------------------|-----------------|------------------------------------------------|
| pixels, features, visual | as in `engine.py`  | float32         | the caller; results are new arrays             |
| embeds, logits           | [1,S,H], [1,K,V]   | float32         | the caller; results are new arrays             |
| start                    | [1]                | int64           | the engine                                     |
| kv_positions             | [L]                | int64           | the engine; its length tells how much is filled |
| keys_i, values_i         | [kv,max_seq_len,D] | manifest.kv_dtype | the loaded program; moved where they lie     |

torch is needed by ExecuTorch's Python binding alone, and imported by `open` alone. Each graph is loaded when it is
first called.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from penguin_edge.bundle import Bundle
from penguin_edge.errors import BundleError, InputError, TargetUnavailable
from penguin_edge.runtime.embedding import EmbeddingTable
from penguin_edge.runtime.engine import F32, I64, check_encode, check_forward, check_move, check_truncate
from penguin_edge.runtime.kv_shift import move_positions

KV_STEP = 64
"""`kv_positions` grows by this many positions: XNNPACK plans anew for every new shape."""

_OPEN: weakref.WeakSet[ExecutorchEngine] = weakref.WeakSet()
"""Engines alive in this process."""


class ExecutorchEngine:
    """See `penguin_edge.runtime.engine.Engine`."""

    name = "executorch"

    def __init__(self, bundle: Bundle, library: Any, torch: Any) -> None:
        """Use `open`; `library` is ExecuTorch's imported binding."""
        self.config = bundle.manifest.model
        self.bounds = bundle.manifest.bounds
        self._bundle = bundle
        self._library = library
        self._torch = torch
        self._table = EmbeddingTable.of(bundle)
        self._programs: dict[str, Any] = {}
        self._methods: dict[str, Any] = {}
        self._positions = np.arange(self.bounds.max_seq_len, dtype=np.int64)
        self._kv_len = 0
        _OPEN.add(self)

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int | None = None) -> ExecutorchEngine:
        """Open a bundle of target `executorch`.

        `threads` sets the thread pool that all engines of the process share; None leaves it as it is (one per core).

        Raises:
            TargetUnavailable: executorch or torch is not installed.
            BundleError: a bundle of another target, or one whose files do not fit its manifest.
            InputError: fewer than one thread, or another number than an engine that is already open uses.
        """
        if bundle.manifest.target != "executorch":
            raise BundleError(
                f"{bundle.folder}: made for target {bundle.manifest.target!r}, and this engine runs 'executorch'; "
                "export the model with --target executorch"
            )
        if threads is not None and threads < 1:
            raise InputError(f"{threads} threads, wanted at least 1")
        with _quiet():
            try:
                import torch

                # The public `portable_lib` gives the same names and first imports the compiler, which takes seconds.
                from executorch.extension.pybindings import _C as binding
            except ImportError as error:
                raise TargetUnavailable(
                    f"ExecuTorch cannot be imported ({error}); pip install torch==2.13.0 and then "
                    "'penguin-edge[executorch]'"
                ) from error
            # The first question to the thread pool makes it, with its notes on the processor.
            current = binding._threadpool_get_thread_count()
            if threads is not None and threads != current:
                # Loaded graphs keep a pointer to the pool that they were loaded with.
                if _OPEN:
                    raise InputError(
                        f"{threads} threads, but an engine that is open in this process uses {current}, and they share "
                        "one pool; pass the same number or run it in a process of its own"
                    )
                binding._unsafe_reset_threadpool(threads)
        return cls(bundle, binding, torch)

    @property
    def kv_len(self) -> int:
        """Tokens in the cache."""
        return self._kv_len

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; nothing is moved."""
        check_truncate(self._kv_len, length)
        self._kv_len = length

    @property
    def can_move(self) -> bool:
        """Whether the decoder's program names its KV buffers, which those of earlier exports do not."""
        return bool(self._program("decoder").method_meta("forward").num_attributes())

    def move(self, begin: int, end: int, to: int) -> None:
        """See `penguin_edge.runtime.engine.MovingEngine`."""
        check_move(self.bounds.max_seq_len, begin, end, to)
        if not self.can_move:
            raise InputError(
                f"{self._bundle.folder}: its program does not name its KV buffers; recompute, or export it again"
            )
        method, text = self._method("decoder"), self.config.text
        for layer in range(text.num_hidden_layers):
            # Tensors over the program's own memory.
            keys, values = (method.get_attribute(f"{what}_{layer}").numpy()[None] for what in ("keys", "values"))
            move_positions(keys, values, begin, end, to, text.rope_theta)
        self._kv_len = to + end - begin

    def embed(self, ids: I64) -> F32:
        """[S] -> [S, H]."""
        return self._table.lookup(ids)

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32:
        """[1, P, 588] -> [1, P, C]."""
        check_encode(self.bounds, pixels)
        return self._call("encoder", _f32(pixels), _i64(rows), _i64(cols))

    def project(self, features: F32) -> F32:
        """[1, T, M, C] -> [1, T, H]."""
        batch, tokens, merged = features.shape[:3]
        check_encode(self.bounds, features.reshape(batch, tokens * merged, -1))
        return self._call("projector", _f32(features))

    def forward(self, embeds: F32, logit_index: I64) -> F32:
        """Append [S, H] at `kv_len`; logits [K, V] at `logit_index`."""
        check_forward(self.bounds, self._kv_len, embeds, logit_index)
        end = self._kv_len + embeds.shape[0]
        filled = min(-(-end // KV_STEP) * KV_STEP, self.bounds.max_seq_len)
        start = np.array([self._kv_len], dtype=np.int64)
        # XNNPACK crashes on empty tensors: who wants no logits gets one computed and none given.
        count = logit_index.shape[0]
        index = _i64(logit_index) if count else np.array([-1], dtype=np.int64)
        logits = self._call("decoder", _f32(embeds)[None], start, index, self._positions[:filled])
        self._kv_len = end
        return logits[0, :count]

    def _call(self, graph: str, *inputs: Any) -> F32:
        method = self._method(graph)
        try:
            return method([self._torch.from_numpy(array) for array in inputs])[0].numpy()
        except RuntimeError as error:
            shapes = [array.shape for array in inputs]
            raise InputError(
                f"{graph}: ExecuTorch refused inputs of shapes {shapes} ({error}); check them against the "
                "bundle's manifest"
            ) from error

    def _method(self, graph: str) -> Any:
        """Load a graph at its first use.

        Raises:
            BundleError: as `_program`.
        """
        if graph not in self._methods:
            program = self._program(graph)
            with self._loading(graph):
                self._methods[graph] = program.load_method("forward")
        return self._methods[graph]

    def _program(self, graph: str) -> Any:
        """Open a graph's file at its first use.

        Raises:
            BundleError: the bundle has no such graph, or this ExecuTorch cannot load it.
        """
        if graph in self._programs:
            return self._programs[graph]
        manifest = self._bundle.manifest
        if graph not in manifest.graphs:
            raise BundleError(f"{self._bundle.folder}: has no {graph} (a text-only model); export a model with vision")
        with self._loading(graph):
            self._programs[graph] = self._library._load_program(str(self._bundle.path(manifest.graphs[graph].file)))
        return self._programs[graph]

    @contextlib.contextmanager
    def _loading(self, graph: str) -> Iterator[None]:
        manifest = self._bundle.manifest
        try:
            yield
        except RuntimeError as error:
            raise BundleError(
                f"{self._bundle.path(manifest.graphs[graph].file)}: this ExecuTorch cannot load it ({error}); it was "
                f"exported for executorch {manifest.tools.get('executorch', 'of an unknown version')}: install that "
                "one, copy the bundle again, or export again"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what native libraries write to stderr while they are imported; errors come as exceptions."""
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        kept = os.dup(2)
        stack.callback(os.close, kept)
        stack.callback(os.dup2, kept, 2)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        os.close(sink)
        yield


def _f32(values: F32) -> F32:
    return _owned(values, np.float32)


def _i64(values: I64) -> I64:
    return _owned(values, np.int64)


def _owned(values: Any, dtype: Any) -> Any:
    """Contiguous and of `dtype`; torch takes no array that must not be written to."""
    return np.require(values, dtype, ("C", "W"))
