"""Prefill and decode speed of our bundles beside llama.cpp and onnxruntime-genai, in 4 bits, on two decoder shapes.

    make peers
    python bench/peers/decoder_peers.py --work build/peers [--shape 0.6b 1.7b] [--threads 1 2] [--repeat 5]

Contestants: our bundles `int4` and `int8-prefill` for ONNX Runtime and `int4` for ExecuTorch; llama.cpp in Q4_0,
choosing flash attention itself and without it (`plain`); onnxruntime-genai in int4. All have the same random weights;
`models.py` says how each was made, and makes what is missing. Without --threads the 0.6B shape runs with 1 and 2
threads, the 1.7B shape with 2.

A prompt is timed from its ids to its first greedy token, from an empty cache, with logits of the last position alone; a
decoding step from one id to the next greedy one. Every contestant lives in a process of its own (`contestants.py`), and
waits while another is measured: `idle CPU` is the share of a core that it used meanwhile, and should be nothing. Rounds
go through all contestants in turn at every length, each round beginning with the next one, so that a change of the
machine's mood meets them all; the first round of a phase warms up and is not counted.

`comparison.py` says what a phase is, and how ratios, their 95 % intervals and the geometric means come of the samples.
`bits` is stored bits for each weight, the head counted once (in brackets: of the weights that prompts use instead);
`GB/s` what steps read of the weights, without the cache, which they read too. Resident memory is with full caches, and
ExecuTorch's with torch, which its Python binding imports. `cosine` compares the logits after the
shortest prompt with the first bundle's: random weights suffer more from 4 bits than trained ones, so it only tells that
all compute the same model. The ceilings are measured in every round: the bandwidth at which threads read an array, and
2*M*N*K/s of ONNX Runtime's product of a u8 matrix with a constant s8 one.

The last line of stdout is JSON (`comparison.summary`); every sample goes to a file in WORK, which stderr names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from comparison import PEERS, Run, Speeds, bits_per_weight, geomeans, phases, rows, summary
from contestants import WARM
from models import BUNDLES, CAPACITY, PEER_FILES, bundle_folder, note, peer_python, prepare
from shapes import SHAPES

from penguin_edge.runtime.bench.stages import read_bandwidth

RUNS = [("0.6b", 2), ("1.7b", 2), ("0.6b", 1)]
"""Shape and threads, when nothing else is asked for."""
SIDE = 2048
"""Side of the square matrices whose product gives `int8_gop_s`."""


class Remote:
    """A contestant in its own process."""

    def __init__(self, name: str, python: str, kind: str, path: Path, threads: int, capacity: int) -> None:
        self.name = name
        script = Path(__file__).with_name("contestants.py")
        command = [python, script, kind, path, str(threads), str(capacity)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, *order: str | int) -> Any:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process, so that the next ones have its memory."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with status {self.process.wait()}, its words are above")
        return json.loads(line)


def int8_rate(threads: int) -> Callable[[], float]:
    """A function that measures a u8*s8 product in ONNX Runtime: GOP/s (a multiply-add is two), the best of five."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    left = random.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    right = random.integers(-127, 128, (SIDE, SIDE), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])], "int8",
        [helper.make_tensor_value_info("left", TensorProto.UINT8, left.shape)],
        [helper.make_tensor_value_info("product", TensorProto.INT32, left.shape)],
        [numpy_helper.from_array(right, "right")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it waits while others are measured
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def measure() -> float:
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            session.run(None, {"left": left})
            seconds.append(time.perf_counter() - begin)
        return 2 * SIDE**3 / min(seconds) / 1e9

    return measure


def measure(args: argparse.Namespace, shape: str, threads: int, python: str) -> tuple[Run, dict[str, Any]]:
    """All phases of one shape at one number of threads: the run, and everything that was seen, for the file."""
    folder: Path = args.work / shape
    begin = time.monotonic()
    labels = [("prefill", n) for n in sorted(set(args.prefill))] + [("decode", n) for n in sorted(set(args.decode))]
    seconds: dict[str, dict[str, list[list[float]]]] = {}
    speeds: Speeds = {}
    array, product = np.ones(64 << 20), int8_rate(threads)
    read, products = [], []
    with contextlib.ExitStack() as stack:
        rivals: list[Remote] = []

        def enter(name: str, with_python: str, kind: str, path: Path) -> None:
            rivals.append(Remote(name, with_python, kind, path, threads, args.capacity))
            stack.callback(rivals[-1].close)
            seconds[name] = {f"{what} {length}": [] for what, length in labels}
            speeds[name] = {label: [] for label in labels}

        for name in BUNDLES:
            enter(name, sys.executable, "bundle", bundle_folder(folder, name))
        for path in args.bundle:
            enter(str(path), sys.executable, "bundle", path)
        for name, file in PEER_FILES.items():
            enter(name, python, name, folder / file)
        for number, orders in enumerate(phases(args.prefill, args.decode, args.tokens)):
            for round_ in range(-1, args.repeat):
                read.append(read_bandwidth(threads, array))
                products.append(product())
                first = (round_ + 1) % len(rivals)
                for order in orders:
                    for rival in rivals[first:] + rivals[:first]:
                        times = rival.ask(*order)
                        if round_ >= 0:
                            tokens = order[1] if order[0] == "prefill" else 1
                            seconds[rival.name][f"{order[0]} {order[1]}"].append(times)
                            speeds[rival.name][order[0], order[1]].append(tokens / statistics.median(times))
                spent = time.monotonic() - begin
                note(f"{shape}, {threads} threads, phase {number}, round {round_}: {spent:.0f} s since its begin")
        reports = {rival.name: rival.ask("report", min(args.prefill)) for rival in rivals}
    run = Run(shape, threads, speeds, statistics.median(read), statistics.median(products))
    reference = np.array(reports[next(iter(reports))]["logits"])
    for report in reports.values():
        other = np.array(report.pop("logits"))
        report["cosine"] = float(other @ reference / np.linalg.norm(other) / np.linalg.norm(reference))
        for what in ("weight", "prompt"):
            bytes_ = report[f"{what}_bytes"]
            report[f"{what}_bits"] = bits_per_weight(bytes_, SHAPES[shape].parameters) if bytes_ else None
    return run, {"shape": shape, "threads": threads, "capacity": args.capacity, "contestants": reports,
                 "geomean": geomeans(run), "read_gb_per_s": read, "int8_gop_per_s": products,
                 "samples_s": seconds}  # fmt: skip


def show(run: Run, seen: dict[str, Any]) -> None:
    """One run as tables."""
    labels = list(next(iter(run.speeds.values())))
    wide = max(len(name) for name in run.speeds)
    medians = {name: {at: statistics.median(x) for at, x in found.items()} for name, found in run.speeds.items()}
    print(f"\nQwen3-{run.shape.upper()} shape, {run.threads} threads: reads {run.bandwidth_gb_s:.1f} GB/s, multiplies "
          f"{run.int8_gop_s:.0f} GOP/s in int8\n")  # fmt: skip
    print("tokens/s".ljust(wide), *(f"{what} {length}".rjust(12) for what, length in labels))
    for name, found in medians.items():
        print(name.ljust(wide), *(f"{value:12.1f}" for value in found.values()))
    ratios = {(row["engine"], row["what"], row["length"]): row for row in rows(run)}
    print("\n" + "over the best".ljust(wide), *(f"{what} {length}".rjust(20) for what, length in labels))
    for name in run.speeds:
        cells = (ratios[name, *at] for at in labels)
        print(name.ljust(wide), *("{ratio_to_best_peer:.2f} ({ci95[0]:.2f} to {ci95[1]:.2f})".format(**cell).rjust(20)
                                  for cell in cells))  # fmt: skip
    heads = [f"GB/s at {length}" for what, length in labels if what == "decode"]
    print(f"\n{'':{wide}} {'bits':>12}", *heads, f"{'MB resident':>12} {'of them own':>12}  idle CPU   cosine")
    for name, report in seen["contestants"].items():
        prompts = f" ({report['prompt_bits']:.2f})" if report["prompt_bits"] else ""
        rates = (report["weight_bytes"] * medians[name][at] / 1e9 for at in labels if at[0] == "decode")
        cells = (f"{rate:{len(head)}.1f}" for head, rate in zip(heads, rates, strict=True))
        all_, own = report["resident_mb"].values()
        print(f"{name:{wide}} {report['weight_bits']:.2f}{prompts}".ljust(wide + 13), *cells,
              f"{all_:12.0f} {own:12.0f} {report['idle_cpu']:9.4f}   {report['cosine']:.4f}")  # fmt: skip
    print()
    for name, mean in geomeans(run).items():
        said = "{ratio:.3f} ({ci95[0]:.3f} to {ci95[1]:.3f}), {engine}".format(**mean) if mean else "not measured"
        print(f"{name:12} over the best peer of each length, geometric mean: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/peers"), metavar="DIR", help="default: build/peers")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2 for 0.6b, 2 for 1.7b")
    parser.add_argument("--make", action="store_true", help="make what is missing, and measure nothing")
    parser.add_argument("--bundle", action="append", default=[], type=Path, metavar="DIR", help="one more contestant")
    parser.add_argument("--peer-python", help="interpreter that has the peers (default: one is made in --work)")
    parser.add_argument("--torch-index", default="", help="where the peers' torch comes from")
    parser.add_argument("--prefill", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--decode", type=int, nargs="+", default=[64, 256, 1024, 4096], help="past positions")
    parser.add_argument("--tokens", type=int, default=16, help="timed steps of each decode")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="positions in every cache")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that are counted")
    args = parser.parse_args()
    if min(args.prefill) < 1 or min(args.decode) <= WARM or min(args.tokens, args.repeat, *(args.threads or [1])) < 1:
        parser.error(f"wanted lengths, tokens, threads and rounds of at least 1, and pasts above {WARM}")
    need = max(*args.prefill, max(args.decode) + args.tokens + 1)
    if not need <= args.capacity <= CAPACITY:
        parser.error(f"--capacity {args.capacity}: the lengths need {need}, and the bundles hold {CAPACITY}")
    runs = [(shape, n) for shape in args.shape for n in args.threads] if args.threads else RUNS
    runs = [(shape, threads) for shape, threads in runs if shape in args.shape]
    python = peer_python(args.work, args.peer_python, args.torch_index)
    for shape in dict.fromkeys(shape for shape, _ in runs):
        prepare(args.work, shape, python)
    if args.make:
        return 0

    from penguin_edge.machine import describe

    file = args.work / time.strftime("samples-%Y%m%d-%H%M%S.json")
    found: list[tuple[Run, dict[str, Any]]] = []
    for shape, threads in runs:
        found.append(measure(args, shape, threads, python))
        show(*found[-1])
        document = {"machine": describe(), "runs": [seen for _, seen in found]}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(document), encoding="utf-8")
        os.replace(part, file)
    note(f"{file}: every sample")
    print(json.dumps(summary([run for run, _ in found])))
    return 0


assert set(PEER_FILES) == set(PEERS)

if __name__ == "__main__":
    raise SystemExit(main())
