"""The comparison with other toolkits: what its samples mean, in which order they are taken, and what is said when a
peer is missing. Nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers.comparison import Run, Speeds, best_peer, bits_per_weight, geomeans, phases, ratio, rows, summary
from peers.shapes import SHAPES

PEERS = Path(__file__).parents[1] / "bench" / "peers"
LABELS = [("prefill", 64), ("prefill", 256), ("decode", 64), ("decode", 256)]


def run(changed: dict[str, list[float]] | None = None, shape: str = "0.6b", threads: int = 2) -> Run:
    """Three equal rounds: each contestant's speeds at LABELS, or those of `changed`; none: it takes no part."""
    values = {
        "onnx int4": [200, 200, 40, 40], "executorch int4": [300, 100, 50, 20], "onnx int8-prefill": [400, 800, 41, 41],
        "llama.cpp": [100, 50, 20, 20], "llama.cpp plain": [90, 100, 25, 10], "genai": [80, 80, 10, 40],
    }  # fmt: skip
    found: Speeds = {
        name: {at: [float(n)] * 3 for at, n in zip(LABELS, numbers, strict=True)}
        for name, numbers in (values | (changed or {})).items() if numbers
    }  # fmt: skip
    return Run(shape, threads, found, 30.0, 400.0)


def test_a_shape_counts_its_head_once() -> None:
    assert {name: shape.parameters for name, shape in SHAPES.items()} == {"0.6b": 596_049_920, "1.7b": 1_720_574_976}
    assert bits_per_weight(335_952_934, SHAPES["0.6b"].parameters) == pytest.approx(4.509, abs=1e-3)


def test_short_pasts_follow_the_longest_prompt_and_long_ones_come_last() -> None:
    short, long = phases([1024, 64, 256], [4096, 64, 1024, 256, 64], 16)
    assert short == [("prefill", 64), ("prefill", 256), ("prefill", 1024),
                     ("decode", 1024, 16), ("decode", 256, 16), ("decode", 64, 16)]  # fmt: skip
    assert long == [("decode", 4096, 16)]
    assert phases([64], [2048, 4096], 2) == [[("prefill", 64)], [("decode", 2048, 2)], [("decode", 4096, 2)]]


def test_no_order_of_a_round_fills_a_cache_that_an_earlier_one_cut() -> None:
    for orders in phases([16, 64, 256, 1024], [32, 64, 1024, 2048, 4096], 16):
        past = [order[1] for order in orders if order[0] == "decode"]
        assert past == sorted(past, reverse=True)


def test_a_ratio_is_the_median_of_rounds_and_the_geometric_mean_of_lengths() -> None:
    value, low, high = ratio([[2, 2, 2], [8, 8, 8]], [[1, 1, 1], [1, 1, 1]])
    assert (value, low, high) == pytest.approx((4, 4, 4))
    # One round in which the machine was slow for ours alone does not move a median.
    assert ratio([[2, 2, 0.1, 2, 2]], [[1, 1, 1, 1, 1]])[0] == pytest.approx(2)
    # A mood that meets both leaves nothing behind.
    assert ratio([[20, 2, 10]], [[10, 1, 5]]) == pytest.approx((2, 2, 2))


def test_an_interval_holds_the_ratio_and_shrinks_with_less_noise() -> None:
    random = np.random.default_rng(1)
    widths = []
    for noise in (0.1, 0.01):
        ours = 1.5 * np.exp(noise * random.standard_normal((4, 9)))
        value, low, high = ratio(ours.tolist(), np.ones((4, 9)).tolist())
        assert low < value < high and low < 1.5 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_best_peer_is_found_for_each_length_and_is_never_ours() -> None:
    speeds = run().speeds
    assert [best_peer(speeds, at) for at in LABELS] == ["llama.cpp", "llama.cpp plain", "llama.cpp plain", "genai"]
    assert best_peer(run({"llama.cpp plain": []}).speeds, ("prefill", 256)) == "genai"


def test_our_engine_is_chosen_as_a_whole() -> None:
    found = geomeans(run())
    # onnx: 2 and 2 times the best prompt; executorch: 3 and 1, although it wins one of the lengths.
    assert found["prefill_int4"] == {"engine": "onnx int4", "ratio": 2.0, "ci95": [2.0, 2.0]}
    assert found["decode"] == {"engine": "onnx int4", "ratio": round((40 / 25 * 40 / 40) ** 0.5, 4),
                               "ci95": [1.2649, 1.2649]}  # fmt: skip
    assert found["prefill_int8"] == {"engine": "onnx int8-prefill", "ratio": round((4 * 8) ** 0.5, 4),
                                     "ci95": [5.6569, 5.6569]}  # fmt: skip
    # A small cache counts where it helps: its prompts are not compared.
    small = geomeans(run({"onnx int4 kv8": [900, 900, 80, 80]}))
    assert small["decode"] and small["decode"]["engine"] == "onnx int4 kv8"
    assert small["prefill_int4"] == found["prefill_int4"]
    faster = geomeans(run({"executorch int4": [300, 300, 50, 50]}))
    assert {name: mean["engine"] for name, mean in faster.items() if mean} == {
        "decode": "executorch int4", "prefill_int4": "executorch int4", "prefill_int8": "onnx int8-prefill"
    }  # fmt: skip


def test_rows_are_those_of_every_contestant_and_length() -> None:
    found = rows(run())
    assert len(found) == 6 * len(LABELS)
    assert all(
        list(row) == ["shape", "threads", "what", "length", "engine", "tokens_per_s", "ratio_to_best_peer", "ci95"]
        for row in found
    )
    by = {(row["engine"], row["what"], row["length"]): row for row in found}
    assert by["onnx int8-prefill", "prefill", 256]["ratio_to_best_peer"] == 8
    assert by["llama.cpp", "prefill", 256]["ratio_to_best_peer"] == 0.5
    assert by["genai", "decode", 256] == {
        "shape": "0.6b", "threads": 2, "what": "decode", "length": 256, "engine": "genai", "tokens_per_s": 40.0,
        "ratio_to_best_peer": 1.0, "ci95": [1.0, 1.0],
    }  # fmt: skip


def test_the_summary_takes_the_smaller_shape_and_the_most_threads() -> None:
    slow = {name: [20.0, 20.0, 1.0, 1.0] for name in ("onnx int4", "executorch int4", "onnx int8-prefill")}
    small, large = run(), run({"onnx int8-prefill": [200, 200, 40, 40]}, "1.7b")
    single = run(slow, threads=1)
    found = summary([single, small, large])
    assert list(found) == ["rows", "geomean", "geomean_by_shape", "bandwidth_gb_s", "int8_gop_s"]
    assert found["geomean"] == {"decode": 1.2649, "prefill_int4": 2.0, "prefill_int8": 2.0}
    assert found["geomean_by_shape"] == {"0.6b": geomeans(small), "1.7b": geomeans(large)}
    assert {(row["shape"], row["threads"]) for row in found["rows"]} == {("0.6b", 1), ("0.6b", 2), ("1.7b", 2)}
    assert (found["bandwidth_gb_s"], found["int8_gop_s"]) == (30.0, 400.0)


def test_what_was_not_measured_is_null() -> None:
    found = summary([run({"onnx int8-prefill": []})])
    assert found["geomean"] == {"decode": 1.2649, "prefill_int4": 2.0, "prefill_int8": None}
    assert found["geomean_by_shape"]["0.6b"]["prefill_int8"] is None


FAKE = """
import sys
from pathlib import Path
import contestants, numpy as np

class Fake(contestants.Contestant):
    weight_bytes, held = 8, 0
    def __init__(self, path, threads, capacity):
        print("what a library prints")
    def rewind(self, length):
        assert 0 <= length <= self.held
        self.held = length
        print("rewind", length, file=sys.stderr)
    def prompt(self, ids):
        self.held += len(ids)
        print("prompt", len(ids), file=sys.stderr)
    def logits(self):
        return np.array([0.0, float(self.held)])

contestants.KINDS["fake"] = Fake
contestants.serve("fake", Path(), 1, 2048)
"""


def test_a_cache_is_filled_once_and_cut_for_nothing() -> None:
    orders = [["prefill", 64], ["prefill", 256], ["decode", 256, 2], ["decode", 64, 2], ["decode", 1500, 1],
              ["decode", 1500, 1], ["report", 16]]  # fmt: skip
    lines = "".join(json.dumps(order) + "\n" for order in orders)
    done = subprocess.run([sys.executable, "-c", FAKE], cwd=PEERS, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[0] is None and [len(times) for times in answers[1:-1]] == [1, 1, 2, 2, 1, 1]
    assert answers[-1]["logits"] == [0, 16] and answers[-1]["weight_bytes"] == 8
    past = [line.split() for line in done.stderr.splitlines() if line.split()[0] in ("rewind", "prompt")]
    assert [(what, int(count)) for what, count in past] == [
        ("rewind", 0), ("prompt", 64),
        ("rewind", 0), ("prompt", 256),
        # One position before the two steps that warm up; the first timed step then follows 256 and 64 positions.
        ("rewind", 253), *[("prompt", 1)] * 5,
        ("rewind", 61), *[("prompt", 1)] * 5,
        # Filled from the 66 that are there, in pieces; the second time nothing is left to fill.
        ("rewind", 66), ("prompt", 512), ("prompt", 512), ("prompt", 408), *[("prompt", 1)] * 3,
        ("rewind", 1497), *[("prompt", 1)] * 4,
        ("rewind", 0), ("prompt", 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer-python", "nowhere/python"], "nowhere/python is no interpreter with the peers"),
        (["--decode", "4400"], "the lengths need"),
        (["--decode", "2"], "pasts above"),
        (["--repeat", "0"], "at least 1"),
    ],
)
def test_what_cannot_run_is_said_in_one_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, PEERS / "decoder_peers.py", "--work", tmp_path / "work", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout and not (tmp_path / "work").exists()
