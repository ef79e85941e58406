"""One decoder in a process of its own: ours, llama.cpp's or onnxruntime-genai's.

    PYTHON bench/peers/contestants.py KIND PATH THREADS CAPACITY

PYTHON has what that kind needs, ours `penguin_edge`. The process takes an order from stdin, a line of JSON, and answers
on stdout in the same way; it first says `null`, when it is loaded.

| order            | answer                                                                                 |
|------------------|----------------------------------------------------------------------------------------|
| ["prefill", N]   | [seconds] from N ids, with an empty cache, to the first greedy token                   |
| ["decode", N, T] | [seconds] of each of T single steps after N positions; fills the cache before, untimed |
| ["report", N]    | memory, idle CPU, weights and versions of the process, logits after a prompt of N      |
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shapes import CONTEXT, VOCAB

FILL = 512
"""Positions at once where the cache is filled without being timed."""
WARM = 2
"""Steps before those that are timed: threads wake up."""
PACKAGES = ("torch", "onnxruntime", "executorch", "onnxruntime-genai", "llama-cpp-python")


class Contestant(ABC):
    """A decoder with one cache. `prompt` and `step` end with the greedy next token picked."""

    weight_bytes = 0
    prompt_bytes = 0
    """Bytes of the weights that prompts use instead, if they do."""
    system = ""
    next = 0

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions."""

    @abstractmethod
    def prompt(self, ids: list[int]) -> None:
        """Append ids."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """[V] after the last position."""

    def step(self) -> None:
        self.prompt([self.next])


class Bundled(Contestant):
    """A bundle of ours, for ONNX Runtime or ExecuTorch."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        from penguin_edge.bundle.folder import Bundle
        from penguin_edge.runtime.engines.base import chunks
        from penguin_edge.runtime.engines.opening import open_engine

        bundle = Bundle.read(path)
        self.engine, self.chunks = open_engine(bundle, threads=threads), chunks
        self.cache = self.engine.new_cache()
        if self.engine.bounds.max_seq_len < capacity:
            raise SystemExit(f"{path}: holds {self.engine.bounds.max_seq_len} positions, wanted {capacity}")
        for graph, entry in bundle.manifest.graphs.items():
            stem = Path(entry.file).stem + "."  # a .pte alone, or an .onnx and its .onnx.data
            bytes_ = sum(file.bytes for name, file in bundle.manifest.files.items() if name.startswith(stem))
            if graph == "decoder":
                self.weight_bytes = bytes_
            elif graph == "prefill":
                self.prompt_bytes = bytes_
        self.system = f"{self.engine.name}, cache {bundle.manifest.kv_dtype}"

    def rewind(self, length: int) -> None:
        self.cache.truncate(length)

    def prompt(self, ids: list[int]) -> None:
        embeds = self.engine.embed(np.array(ids, np.int64))
        for rows in self.chunks(len(ids), self.engine.bounds):
            last = np.full(int(rows.stop == len(ids)), -1, np.int64)
            self.last = self.engine.forward(self.cache, embeds[rows], last)
        self.next = int(self.last[0].argmax())

    def logits(self) -> np.ndarray:
        return self.last[0]


class LlamaCpp(Contestant):
    """A GGUF file in llama.cpp."""

    flash = True

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = capacity  # one batch: logits are of its last position alone
        options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        if not self.flash:
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(model, options) if model else None
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.weight_bytes = llama_cpp.llama_model_size(model)
        self.system = llama_cpp.llama_print_system_info().decode().strip()

    def rewind(self, length: int) -> None:
        self.api.llama_memory_seq_rm(self.memory, 0, length, -1)

    def prompt(self, ids: list[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.next = int(self.logits().argmax())

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), shape=(VOCAB,))


class LlamaCppPlain(LlamaCpp):
    """The same without flash attention."""

    flash = False


class GenAI(Contestant):
    """A model folder in onnxruntime-genai."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(path))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        model = og.Model(config)
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=capacity, do_sample=False)
        self.generator = og.Generator(model, settings)
        tables = 2 * 4 * CONTEXT * 64  # of the rotary embedding, of which a step reads one row
        self.weight_bytes = (path / "model.onnx.data").stat().st_size - tables
        self.system = (path / "genai_config.json").read_text(encoding="utf-8")

    def rewind(self, length: int) -> None:
        self.generator.rewind_to(length)

    def prompt(self, ids: list[int]) -> None:
        self.generator.append_tokens(ids)
        self.step()  # the logits are there: this picks a token, and runs nothing

    def step(self) -> None:
        if self.generator.is_done():
            raise RuntimeError("onnxruntime-genai met an end token, and would compute nothing more")
        self.generator.generate_next_token()

    def logits(self) -> np.ndarray:
        return np.asarray(self.generator.get_output("logits"), np.float32).reshape(-1, VOCAB)[-1]


KINDS: dict[str, Callable[[Path, int, int], Contestant]] = {
    "bundle": Bundled, "llama.cpp": LlamaCpp, "llama.cpp plain": LlamaCppPlain, "genai": GenAI,
}  # fmt: skip


def resident() -> dict[str, float]:
    """Resident memory of this process in MB: all of it, and without pages of mapped files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(found[key].split()[0]) * 1024 / 1e6 for name, key in (("all", "VmRSS"), ("own", "RssAnon"))}


def serve(kind: str, path: Path, threads: int, capacity: int) -> None:
    """Be one contestant until stdin ends."""
    before = resident()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    contestant = KINDS[kind](path, threads, capacity)
    ids = np.random.default_rng(0).integers(1000, VOCAB, capacity).tolist()
    held, idle_cpu, idle_wall = 0, 0.0, 0.0

    def prefill(count: int) -> list[float]:
        nonlocal held
        contestant.rewind(0)
        begin = time.perf_counter()
        contestant.prompt(ids[:count])
        held = count
        return [time.perf_counter() - begin]

    def decode(past: int, count: int) -> list[float]:
        nonlocal held
        held = min(held, past - WARM - 1)
        contestant.rewind(held)
        while held < past - WARM:
            more = ids[held : min(held + FILL, past - WARM)]
            contestant.prompt(more)
            held += len(more)
        times = []
        for _ in range(WARM + count):
            begin = time.perf_counter()
            contestant.step()
            times.append(time.perf_counter() - begin)
        held += len(times)
        return times[WARM:]

    def report(probe: int) -> dict[str, Any]:
        memory = resident()
        prefill(probe)
        installed = [(d.name.lower().replace("_", "-"), d.version) for d in importlib.metadata.distributions()]
        return {
            "resident_mb": {name: value - before[name] for name, value in memory.items()},
            "idle_cpu": idle_cpu / idle_wall,
            "weight_bytes": contestant.weight_bytes,
            "prompt_bytes": contestant.prompt_bytes,
            "system": contestant.system,
            "packages": {name: version for name, version in installed if name in PACKAGES},
            "logits": contestant.logits().tolist(),
        }

    orders: dict[str, Callable[..., Any]] = {"prefill": prefill, "decode": decode, "report": report}
    answer: Any = None
    while True:
        cpu, wall = time.process_time(), time.perf_counter()
        print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        idle_cpu, idle_wall = idle_cpu + time.process_time() - cpu, idle_wall + time.perf_counter() - wall
        name, *values = json.loads(line)
        answer = orders[name](*values)


if __name__ == "__main__":
    try:
        serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except BrokenPipeError:  # who asked is gone
        os._exit(1)
