"""The engine for bundles of target `executorch`: ExecuTorch with XNNPACK on the CPU, KV buffers inside the program.

| tensor                   | shape              | dtype             | owner                                           |
|--------------------------|--------------------|-------------------|-------------------------------------------------|
| pixels, features, visual | as in `base.py`    | float32           | the caller; results are new arrays              |
| embeds, logits           | [1,S,H], [1,K,V]   | float32           | the caller; results are new arrays              |
| start                    | [1]                | int64             | the engine                                      |
| positions                | [S]                | int64             | the call                                        |
| kv_positions             | [L]                | int64             | the engine; its length tells how much is filled |
| keys_i, values_i         | [kv,max_seq_len,D] | manifest.kv_dtype | the loaded program; moved where they lie        |

torch is needed by ExecuTorch's Python binding alone, and imported by `open` alone. Each graph is loaded when it is
first called.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from penguin_edge.bundle.contract import COPY_AGAIN, EXECUTORCH_MERGED, most_positions
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BundleError, InputError, PenguinError, TargetUnavailable
from penguin_edge.machine import TORCH, Package
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
    sound,
)
from penguin_edge.runtime.engines.cache import Cache, Caches, Key
from penguin_edge.runtime.engines.embedding import EmbeddingTable
from penguin_edge.runtime.engines.kv_shift import move_positions
from penguin_edge.runtime.engines.self_check import open_tokenizer

KV_STEP = 64
"""`kv_positions` grows by this many positions: XNNPACK plans anew for every new shape."""

TYPES = {4: "i64", 5: "fp16", 6: "fp32"}
"""ExecuTorch's numbers of types, in the manifest's words."""

_OPEN: weakref.WeakSet[ExecutorchEngine] = weakref.WeakSet()
"""Engines alive in this process."""


class _InProgram:
    """A cache has nothing beside what lies in the program."""


class ExecutorchEngine:
    """See `penguin_edge.runtime.engines.base.Engine`."""

    name = "executorch"
    package = Package("executorch", f"{TORCH.install} && pip install 'penguin-edge[executorch]'")

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
        self._most = most_positions(self.config, self.bounds)
        self._slots = np.arange(self.bounds.max_seq_len, dtype=np.int64)
        self._buffers: list[np.ndarray] = []
        self._unchecked = np.zeros(self.bounds.max_seq_len, dtype=bool)
        """Slots that were written since `_heal` last looked at them."""
        self._caches = Caches(1, _InProgram)  # in the memory of the decoder's program
        self.guard = self._caches.guard
        self._process = os.getpid()
        _OPEN.add(self)

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int | None = None) -> ExecutorchEngine:
        """Open a bundle of target `executorch`.

        `threads` sets the thread pool that all engines of the process share; None leaves it as it is (one per core).

        Raises:
            TargetUnavailable: executorch or torch is not installed.
            BundleError: a bundle of another target, or one whose files do not fit its manifest.
            InputError: a number outside 1 to `MAX_THREADS`, or another one than an engine that is already open uses.
        """
        if bundle.manifest.target != "executorch":
            raise BundleError(
                f"{bundle.folder}: made for target {bundle.manifest.target!r}, and this engine runs 'executorch'; "
                "export the model with --target executorch"
            )
        check_threads(threads)
        with _quiet():
            try:
                import torch

                # The public `portable_lib` gives the same names and first imports the compiler, which takes seconds.
                from executorch.extension.pybindings import _C as binding
            except ImportError as error:
                raise TargetUnavailable(f"ExecuTorch cannot be imported ({error}); {cls.package.install}") from error
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
        engine = cls(bundle, binding, torch)
        try:
            engine._program("decoder")  # Its shapes tell whether the manifest's bounds are its own.
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def capacity(self) -> int | None:
        """1: the cache lies inside the program, which is loaded once."""
        return self._caches.capacity

    def tokenizer(self) -> Tokenizer:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        return open_tokenizer(self._bundle)

    def load(self, *, media: bool) -> None:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        with self.guard:
            for graph in self._bundle.manifest.graphs:
                if media or graph not in ("encoder", "projector"):
                    self._method(graph)

    def new_cache(self) -> Cache:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        return self._caches.new()

    def close(self) -> None:
        """See `penguin_edge.runtime.engines.base.Engine`; another engine may set the threads then."""
        self._caches.close()
        self._methods.clear()
        self._programs.clear()
        self._buffers = []
        _OPEN.discard(self)

    @property
    def can_move(self) -> bool:
        """Whether the decoder's program names its KV buffers, which those of earlier exports do not."""
        with self.guard:
            return bool(self._program("decoder").method_meta("forward").num_attributes())

    @property
    def moves_exactly(self) -> bool:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        return self._bundle.manifest.kv_dtype != "int8"

    @property
    def can_place(self) -> bool:
        """Whether the decoder takes positions."""
        return self._bundle.manifest.placed

    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        check_move(self.bounds.max_seq_len, begin, end, to, turn)
        if not self.can_move:
            raise InputError(
                f"{self._bundle.folder}: its program does not name its KV buffers; recompute, or export it again"
            )
        with self.guard:
            self._caches.state(cache)
            self._method("decoder")
            theta = self.config.text.rope_theta
            with cache.moving(begin, end, to, turn):
                self._unchecked[to : to + end - begin] = True
                for keys, values in zip(self._buffers[0::2], self._buffers[1::2], strict=True):
                    move_positions(keys[None], values[None], begin, end, to, theta, by=turn)

    def embed(self, ids: I64) -> F32:
        """[S] -> [S, H]."""
        return self._table.lookup(ids)

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32:
        """[1, P, 588] -> [1, P, C]."""
        check_encode(self.bounds, pixels, rows, cols)
        with self.guard:
            return self._call("encoder", _f32(pixels), _i64(rows), _i64(cols))

    def project(self, features: F32) -> F32:
        """[1, T, M, C] -> [1, T, H]."""
        check_project(self.bounds, features)
        with self.guard:
            return self._call("projector", _f32(features))

    def forward(
        self, cache: Cache, embeds: F32, logit_index: I64, keys: Sequence[Key] = (), positions: I64 | None = None
    ) -> F32:
        """Append [S, H] to the cache; logits [K, V] at `logit_index`.

        Raises:
            PenguinError: NaN or infinity, from a bundle whose KV buffers have no names; its cache is empty then.
        """
        with self.guard:
            self._caches.state(cache)
            check_forward(self.bounds, cache.length, embeds, logit_index, self.config.text.hidden_size)
            places = check_positions(
                positions, len(embeds), cache.length, cache.following, self._most, can_place=self.can_place
            )
            with cache.writing(len(embeds), keys, places):
                logits = self._forward(cache.length, embeds, logit_index, places)
            if not self._buffers and not sound(logits).all():
                # They cannot be healed, and methods of one program share their memory: a new one begins with zeros.
                del self._methods["decoder"], self._programs["decoder"]
                cache.forget()
                raise PenguinError(
                    f"{self._bundle.folder}: the decoder gave NaN or infinite numbers, and its cache was emptied; run "
                    "`penguin-edge verify` on the bundle, or export it again"
                )
            return logits[0, : logit_index.shape[0]]

    def _forward(self, begin: int, embeds: F32, logit_index: I64, positions: I64) -> F32:
        end = begin + embeds.shape[0]
        filled = min(-(-end // KV_STEP) * KV_STEP, self.bounds.max_seq_len)
        start = np.array([begin], dtype=np.int64)
        # XNNPACK crashes on empty tensors: who wants no logits gets one computed and none given.
        index = _i64(logit_index) if logit_index.shape[0] else np.array([-1], dtype=np.int64)
        self._method("decoder")
        self._heal(end, filled)
        self._unchecked[begin:end] = True
        placed = [_i64(positions)] if self.can_place else []
        return self._call("decoder", _f32(embeds)[None], start, index, *placed, self._slots[:filled])

    def _heal(self, begin: int, end: int) -> None:
        """Put zeros where NaN or infinity was left in slots [begin, end), which the next call masks.

        The program gives what it masks the weight 0, and 0 times NaN is NaN. Anything else stays: it may be moved.
        """
        if not self._buffers or not self._unchecked[begin:end].any():
            return
        self._unchecked[begin:end] = False
        for buffer in self._buffers:
            left = buffer[:, begin:end]
            if not np.isfinite(left).all():
                left[:, ~np.isfinite(left).all(axis=(0, 2))] = 0

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
            InputError: the engine was closed, or opened in another process.
            BundleError: as `_program`.
        """
        self._caches.check_open()
        if os.getpid() != self._process:
            raise InputError(
                "this engine was opened in another process, and ExecuTorch's threads stayed there; open the bundle "
                "after the fork"
            )
        if graph not in self._methods:
            program, buffers = self._program(graph), []
            with self._loading(graph):
                method = program.load_method("forward")
                if graph == "decoder" and self.can_move:
                    # Arrays [kv_heads, max_seq_len, D] over the program's own memory: keys and values of each layer.
                    layers = range(self.config.text.num_hidden_layers)
                    names = [f"{what}_{layer}" for layer in layers for what in ("keys", "values")]
                    buffers = [method.get_attribute(name).numpy() for name in names]
            # Kept only now: what was loaded from a file that changed meanwhile is refused when the block ends.
            self._methods[graph], self._buffers = method, buffers or self._buffers
        return self._methods[graph]

    def _program(self, graph: str) -> Any:
        """Open a graph's file at its first use.

        Raises:
            BundleError: the bundle has no such graph or was changed, or this ExecuTorch cannot load it.
        """
        if graph in self._programs:
            return self._programs[graph]
        manifest = self._bundle.manifest
        if graph not in manifest.graphs:
            raise BundleError(f"{self._bundle.folder}: has no {graph} (a text-only model); export a model with vision")
        with self._loading(graph):
            program = self._library._load_program(str(self._bundle.path(manifest.graphs[graph].file)))
            self._check_tensors(program.method_meta("forward"), graph)
        self._programs[graph] = program
        return program

    def _check_tensors(self, meta: Any, graph: str) -> None:
        """Compare the largest shapes of a graph, which its program fixes, with what the manifest says of them.

        Raises:
            BundleError: another number of tensors, or one of another type or largest shape.
        """
        manifest, bounds, text = self._bundle.manifest, self.bounds, self.config.text
        entry = manifest.graphs[graph]
        most: dict[int | str, int] = {
            "B": bounds.max_batch,
            "P": bounds.max_patches,
            "T": bounds.max_patches,
            "M": EXECUTORCH_MERGED,
        }
        most |= {"S": bounds.max_chunk, "K": bounds.max_logits}
        # The manifest says f32 where the engine says fp32.
        wanted: dict[str, tuple[Any, ...]] = {
            f"{what} {place}": (spec.dtype.replace("f32", "fp32"), *(most.get(size, size) for size in spec.shape))
            for what, specs in (("input", entry.inputs), ("output", entry.outputs))
            for place, spec in enumerate(specs)
        }
        if graph == "decoder":
            wanted[f"input {len(entry.inputs)}"] = ("i64", bounds.max_seq_len)
            # Programs of earlier exports do not name their buffers.
            for place in range(2 * text.num_hidden_layers if meta.num_attributes() else 0):
                shape = (text.num_key_value_heads, bounds.max_seq_len, text.head_dim)
                wanted[f"buffer {place}"] = (manifest.kv_dtype, *shape)
        tensors = {
            "input": (meta.num_inputs(), meta.input_tensor_meta),
            "output": (meta.num_outputs(), meta.output_tensor_meta),
            "buffer": (meta.num_attributes(), meta.attribute_tensor_meta),
        }
        found = {
            f"{what} {place}": (TYPES.get(tensor(place).dtype(), "another type"), *tensor(place).sizes())
            for what, (count, tensor) in tensors.items()
            for place in range(count)
        }
        for name in [*wanted, *(found.keys() - wanted.keys())]:
            if wanted.get(name) != found.get(name):
                given, stated = (" ".join(map(str, shapes.get(name, ("none",)))) for shapes in (found, wanted))
                raise BundleError(
                    f"{self._bundle.path(entry.file)}: its {name} is at most {given}, the manifest states {stated}; "
                    f"{COPY_AGAIN}"
                )

    @contextlib.contextmanager
    def _loading(self, graph: str) -> Iterator[None]:
        manifest = self._bundle.manifest
        try:
            with self._bundle.unchanged():
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
