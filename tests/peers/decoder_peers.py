"""Prefill and decode speed of our bundles beside llama.cpp and onnxruntime-genai, on the decoder shape of Qwen3-0.6B.

    python -m venv peers && peers/bin/pip install …                      # what INSTALL below names
    python tests/peers/decoder_peers.py --make DIR --peer-python peers/bin/python
    penguin-edge export --model DIR/hf --target onnx --quant int4 --max-seq-len 4352 --no-verify -o out/int4
    python tests/peers/decoder_peers.py --models DIR --bundle out/int4 --peer-python peers/bin/python [--repeat 5]

All contestants have the same random weights. `--make` writes them as a Hugging Face folder (`hf`), as llama.cpp's own
quantizer stores Q4_0 (`q4_0.gguf`: the head, which is the embedding too, in Q6_K), and as onnxruntime-genai's builder
makes int4 for the CPU (`genai`: blocks of 32, accuracy level 4, the head likewise, logits of the last position only).
llama.cpp takes part twice: choosing flash attention itself, and without it (`plain`). It must be built for the
processor it runs on, as pip does from source; `system` in the JSON tells.

A prompt is timed from its ids to its first greedy token, from an empty cache, with logits of the last position alone; a
decoding step from one id to the next greedy one. Every contestant lives in a process of its own, and waits while
another is measured: `idle CPU` is the share of a core that it used meanwhile, and should be nothing. Rounds go through
all contestants in turn at every length, each round beginning with the next one, so that a change of the machine's mood
meets them all; the first round warms up and is not counted.

A ratio is ours over the best peer of that length: the median over rounds of one round's speeds, its 95 % interval a
bootstrap over rounds. `MB/token` is what a step reads of the weights, and GB/s that times the speed; the cache, which a
step reads too, is not in it. `cosine` compares the logits after the shortest prompt with the first bundle's: random
weights suffer more from 4 bits than trained ones, so it only tells that all compute the same model. The last line is
JSON with every sample.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, LAYERS, CONTEXT = 151_936, 28, 40_960
FILL = 512
"""Positions at once where the cache is filled without being timed."""
WARM = 2
"""Steps before those that are timed: threads wake up."""
INSTALL = (
    "pip install torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.31.1 "
    "onnxruntime-genai==0.18.0 gguf==0.19.0 llama-cpp-python==0.3.36"
)
FIND = "import importlib.util as u; assert all(map(u.find_spec, ('gguf', 'llama_cpp', 'onnxruntime_genai')))"
"""Fails in an interpreter that lacks a peer."""


class Contestant(ABC):
    """A decoder with one cache. `prompt` and `step` end with the greedy next token picked."""

    weight_bytes = 0
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
    """A bundle of ours."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        from penguin_edge.bundle import Bundle
        from penguin_edge.runtime.engine import chunks
        from penguin_edge.runtime.engines import open_engine

        bundle = Bundle.read(path)
        self.engine, self.chunks = open_engine(bundle, threads=threads), chunks
        if self.engine.bounds.max_seq_len < capacity:
            raise SystemExit(f"{path}: holds {self.engine.bounds.max_seq_len} positions, wanted {capacity}")
        graph = Path(bundle.manifest.graphs["decoder"].file).stem + "."
        self.weight_bytes = sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith(graph))
        self.system = f"{self.engine.name}, cache {bundle.manifest.kv_dtype}"

    def rewind(self, length: int) -> None:
        self.engine.truncate(length)

    def prompt(self, ids: list[int]) -> None:
        embeds = self.engine.embed(np.array(ids, np.int64))
        for rows in self.chunks(len(ids), self.engine.bounds):
            self.last = self.engine.forward(embeds[rows], np.full(int(rows.stop == len(ids)), -1, np.int64))
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
PEERS = {"llama.cpp": "q4_0.gguf", "llama.cpp plain": "q4_0.gguf", "genai": "genai"}
"""And what `--make` writes for them."""


def resident() -> dict[str, float]:
    """Resident memory of this process in MB: all of it, and without pages of mapped files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(found[key].split()[0]) * 1024 / 1e6 for name, key in (("all", "VmRSS"), ("own", "RssAnon"))}


def serve(kind: str, path: Path, threads: int, capacity: int) -> None:
    """Be one contestant: obey orders from stdin, a line of JSON each, and answer in the same way."""
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
        prefill(probe)
        installed = [(d.name.lower().replace("_", "-"), d.version) for d in importlib.metadata.distributions()]
        return {
            "resident_mb": {name: value - before[name] for name, value in resident().items()},
            "idle_cpu": idle_cpu / idle_wall,
            "weight_bytes": contestant.weight_bytes,
            "system": contestant.system,
            "packages": {name: version for name, version in installed if f"{name}==" in INSTALL},
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


class Remote:
    """A contestant in its own process."""

    def __init__(self, name: str, command: list[str | Path]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, *order: str | int) -> Any:
        assert self.process.stdin
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with status {self.process.wait()}")
        return json.loads(line)


def write_gguf(folder: Path) -> None:
    """`hf` as GGUF in bf16 without a vocabulary, then as Q4_0 by llama.cpp's quantizer."""
    import gguf
    import llama_cpp
    import torch
    from safetensors import safe_open

    middle = folder / "bf16.gguf"
    writer = gguf.GGUFWriter(middle, "qwen3")
    writer.add_tokenizer_model("no_vocab")
    numbers = {"vocab_size": VOCAB, "context_length": CONTEXT, "embedding_length": 1024, "block_count": LAYERS,
               "feed_forward_length": 3072, "head_count": 16, "head_count_kv": 8, "key_length": 128,
               "value_length": 128, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e6}  # fmt: skip
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
    with safe_open(folder / "hf" / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118, it is no dict
            tensor, known = stored.get_tensor(name), names.get_name(name, (".weight",))
            if tensor.ndim == 1:
                writer.add_tensor(known, tensor.float().numpy())
            else:
                writer.add_tensor(known, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(middle).encode(), str(folder / "q4_0.gguf").encode(), ctypes.byref(options)):
        raise SystemExit(f"{middle}: llama.cpp cannot quantize it")
    middle.unlink()


def make(folder: Path, peer_python: str) -> None:
    """The checkpoint, and the peers' models from it."""
    from decoder_speed import make as make_checkpoint

    make_checkpoint(folder / "hf")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}  # the builder copies a tokenizer; none is used
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    subprocess.run([peer_python, __file__, "--gguf", folder], check=True)
    builder = [peer_python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    builder += ["-i", f"{folder}/hf", "-o", f"{folder}/genai", "-c", f"{folder}/cache"]
    builder += ["--extra_options", "accuracy_level=4", "block_size=32", "prune_lm_head=true"]
    subprocess.run(builder, check=True)


def bandwidth(values: np.ndarray, threads: int) -> float:
    """GB/s at which threads read an array, the best of five times."""
    pieces, seconds = np.array_split(values, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.max, pieces))
            seconds.append(time.perf_counter() - begin)
    return values.nbytes / min(seconds) / 1e9


def ratio(ours: list[list[float]], peers: list[list[float]]) -> tuple[float, float, float]:
    """Geometric mean over lengths of medians over rounds, and its 95 % interval; both are [lengths, rounds]."""
    each = np.log(np.array(ours) / np.array(peers))
    draws = np.random.default_rng(0).integers(0, each.shape[1], (2000, each.shape[1]))
    low, high = np.quantile(np.median(each[:, draws], axis=2).mean(0), (0.025, 0.975))
    return float(np.exp(np.median(each, axis=1).mean())), float(np.exp(low)), float(np.exp(high))


def measure(args: argparse.Namespace) -> None:
    """Rounds through all contestants, then the tables and the JSON."""
    from penguin_edge.machine import describe

    options = ["--threads", str(args.threads), "--capacity", str(args.capacity)]
    ours = [str(path) for path in args.bundle]
    rivals = [Remote(path, [sys.executable, __file__, *options, "--serve", "bundle", path]) for path in ours]
    for kind, file in PEERS.items():
        rivals.append(Remote(kind, [args.peer_python, __file__, *options, "--serve", kind, args.models / file]))
    orders: list[tuple[Any, ...]] = [("prefill", count) for count in sorted(args.prefill)]
    orders += [("decode", past, args.tokens) for past in sorted(args.decode)]
    seconds: dict[str, dict[str, list[list[float]]]] = {rival.name: {} for rival in rivals}
    speeds: dict[str, dict[str, list[float]]] = {rival.name: {} for rival in rivals}
    array, read = np.ones(64 << 20), []
    for round_ in range(-1, args.repeat):
        read.append(bandwidth(array, args.threads))
        first = (round_ + 1) % len(rivals)
        for order in orders:
            what, length = order[:2]
            for rival in rivals[first:] + rivals[:first]:
                times = rival.ask(*order)
                if round_ >= 0:
                    seconds[rival.name].setdefault(f"{what} {length}", []).append(times)
                    tokens = length if what == "prefill" else 1
                    speeds[rival.name].setdefault(f"{what} {length}", []).append(tokens / statistics.median(times))
        print(f"round {round_}", file=sys.stderr)
    reports = {rival.name: rival.ask("report", min(args.prefill)) for rival in rivals}
    medians = {name: {at: statistics.median(x) for at, x in found.items()} for name, found in speeds.items()}

    labels = list(medians[ours[0]])
    wide = max(len(name) for name in medians)
    print("tokens/s".ljust(wide), *(f"{label:>12}" for label in labels))
    for name, found in medians.items():
        print(name.ljust(wide), *(f"{value:12.1f}" for value in found.values()))
    heads = [f"GB/s {label}" for label in labels if label.startswith("decode")]
    print(f"\n{'':{wide}} {'MB/token':>10}", *heads, f"{'MB resident':>12} {'of them own':>12}  idle CPU   cosine")
    reference = np.array(reports[ours[0]]["logits"])
    for name, found in reports.items():
        other = np.array(found.pop("logits"))
        found["cosine"] = float(other @ reference / np.linalg.norm(other) / np.linalg.norm(reference))
        bytes_ = found["weight_bytes"]
        found["gb_per_s"] = {at: bytes_ * x / 1e9 for at, x in medians[name].items() if at.startswith("decode")}
        rates = (f"{x:{len(head)}.1f}" for head, x in zip(heads, found["gb_per_s"].values(), strict=True))
        all_, own = found["resident_mb"].values()
        print(f"{name:{wide}} {bytes_ / 1e6:10.1f}", *rates, f"{all_:12.0f} {own:12.0f} {found['idle_cpu']:9.4f}   "
              f"{found['cosine']:.4f}")  # fmt: skip
    print(f"read bandwidth {statistics.median(read):.1f} GB/s")

    best = {at: max(PEERS, key=lambda peer: medians[peer][at]) for at in labels}
    groups = {at: [at] for at in labels} | {
        f"{what}, all": [at for at in labels if at.startswith(what)] for what in ("prefill", "decode")
    }
    ratios: dict[str, dict[str, tuple[float, float, float]]] = {name: {} for name in ours}
    for name in ours:
        print(f"\n{name} over the best peer")
        for group, members in groups.items():
            times = ratio([speeds[name][at] for at in members], [speeds[best[at]][at] for at in members])
            ratios[name][group] = times
            print(f"  {group:12} {'{:.3f} ({:.3f} to {:.3f})'.format(*times)}  {best.get(group, 'geometric mean')}")
    print(json.dumps({"threads": args.threads, "capacity": args.capacity, "median_tokens_per_s": medians,
                      "best_peer": best, "ratios": ratios, "contestants": reports, "read_gb_per_s": read,
                      "samples_s": seconds, "machine": describe()}))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="DIR")
    parser.add_argument("--models", type=Path, metavar="DIR", help="what --make wrote")
    parser.add_argument("--bundle", action="append", default=[], type=Path, metavar="DIR")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers (default: this)")
    parser.add_argument("--prefill", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--decode", type=int, nargs="+", default=[64, 256, 1024, 4096], help="past positions")
    parser.add_argument("--tokens", type=int, default=16, help="timed steps of each decode")
    parser.add_argument("--capacity", type=int, default=4352, help="positions in every cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], Path(args.serve[1]), args.threads, args.capacity)
    elif args.gguf:
        write_gguf(args.gguf)
    elif subprocess.run([args.peer_python, "-c", FIND], stderr=subprocess.DEVNULL).returncode:
        parser.error(f"{args.peer_python} lacks a peer; there: {INSTALL}")
    elif args.make:
        make(args.make, args.peer_python)
    elif args.models and args.bundle:
        measure(args)
    else:
        parser.error("wanted --make, or --models and --bundle")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
