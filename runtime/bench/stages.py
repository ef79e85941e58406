"""What a model costs on this machine, stage by stage and over a stream; the numbers of `penguin-bench/1`.

| test              | one sample (ms) is                                              | `count`              |
|-------------------|-----------------------------------------------------------------|----------------------|
| encode P          | one frame of P patches through the encoder                      | P                    |
| project P         | its P / 4 tokens through the projector                          | P / 4                |
| ppN               | N tokens into an empty cache, to the logits of the last one     | N                    |
| tgN @ dD          | one token after D positions, to its greedy successor            | 1                    |

`pp` and `tg` are llama-bench's words: prompt processing and token generation, `@ d` the depth of the cache before.
All tests are measured in turn in every round, so that a change of the machine's mood meets them all.

Steps also say what they read from memory: all of the decoder's weights, and the filled part of the KV cache. The other
tests share one reading of the weights among many rows and are bound by arithmetic; GB/s would say nothing of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penguin_edge.config import PATCH_VALUES
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.preprocess import positions
from penguin_edge.runtime.engines.base import Engine, chunks
from penguin_edge.runtime.engines.cache import Cache

SCHEMA = "penguin-bench/1"
PATCHES = (64, 256, 1024)
"""Frames that are encoded: square, two by two patches to a token."""
READ_BYTES = 256 << 20
"""Beyond any cache."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: `prompts` in tokens, `tokens` steps after each depth."""

    prompts: tuple[int, ...] = (64, 256, 1024)
    tokens: int = 32
    depths: tuple[int, ...] = (0, 1024)
    repeat: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        if min((*self.prompts, self.tokens, self.repeat), default=0) < 1 or min((*self.depths, self.warmup)) < 0:
            raise InputError("wanted prompts, tokens and rounds of at least 1, and no depth below 0")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step reads: weights of decoder and head as they are stored, and one position of the KV cache."""

    weights: int
    position: int

    def step(self, options: BenchOptions, depth: int) -> int:
        """Bytes of a step, the mean over the steps after `depth`; each reads the position that it writes, too."""
        return self.weights + round(self.position * (depth + (options.tokens + 1) / 2))


@dataclass
class BenchRow:
    """One test with its raw samples; `bytes` are those that a sample reads from memory, None where that is unknown."""

    test: str
    count: int
    depth: int = 0
    samples_ms: list[float] = field(default_factory=list)
    bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        middle = percentiles(self.samples_ms)
        return {
            "test": self.test,
            "count": self.count,
            "depth": self.depth,
            "ms": middle,
            "per_s": 1e3 * self.count / middle["p50"] if middle["p50"] else None,
            "bytes": self.bytes,
            "gb_s": self.bytes / middle["p50"] / 1e6 if self.bytes and middle["p50"] else None,
            "samples_ms": [round(sample, 4) for sample in self.samples_ms],
        }


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99; None where nothing was measured."""
    if not samples:
        return {"p50": None, "p95": None, "p99": None}
    found = np.percentile(np.array(samples), (50, 95, 99))
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), found, strict=True)}


def check_room(engine: Engine, options: BenchOptions) -> None:
    """Refuse what the cache does not hold.

    Raises:
        BudgetError: a prompt, or a depth and the steps after it, above `max_seq_len`.
    """
    bound = engine.bounds.max_seq_len
    need = max(*options.prompts, *(depth + options.tokens + 1 for depth in options.depths))
    if need > bound:
        raise BudgetError(
            f"the tests take {need} positions, but max_seq_len is {bound}; choose shorter prompts or depths, or "
            "export with a larger --max-seq-len"
        )


def bench_model(
    engine: Engine, options: BenchOptions, progress: Callable[[str], None], traffic: Traffic | None = None
) -> list[BenchRow]:
    """Every stage alone, on random input; `traffic` is what the model's steps read, None where that is unknown.

    Raises:
        BudgetError: a prompt or a depth that the cache does not hold.
    """
    check_room(engine, options)
    with engine.new_cache() as cache:
        tests = _tests(engine, cache, options, traffic)
        for round_ in range(-options.warmup, options.repeat):
            for row, measure in tests:
                progress(f"round {max(0, round_ + 1)} of {options.repeat}: {row.test}")
                samples = measure()
                if round_ >= 0:
                    row.samples_ms += samples
    return [row for row, _ in tests]


def _tests(
    engine: Engine, cache: Cache, options: BenchOptions, traffic: Traffic | None
) -> list[tuple[BenchRow, Callable[[], list[float]]]]:
    random = np.random.default_rng(0)
    tests: list[tuple[BenchRow, Callable[[], list[float]]]] = []
    if engine.config.vision is not None:
        merge = engine.config.image.video_merge_size
        for patches in (count for count in PATCHES if count <= engine.bounds.max_patches):
            side = math.isqrt(patches)
            pixels = random.standard_normal((1, patches, PATCH_VALUES), dtype=np.float32)
            places = positions((side, side), merge)
            width = engine.config.vision.hidden_size
            features = random.standard_normal((1, patches // merge**2, merge**2, width), dtype=np.float32)
            tests.append(
                (
                    BenchRow(f"encode {patches}", patches),
                    lambda x=pixels, at=places: _timed(lambda: engine.encode(x, *at)),  # type: ignore[misc]
                )
            )
            tests.append(
                (
                    BenchRow(f"project {patches}", patches // merge**2),
                    lambda x=features: _timed(lambda: engine.project(x)),  # type: ignore[misc]
                )
            )
    vocab = engine.config.text.vocab_size
    ids = random.integers(0, vocab, max(*options.prompts, *options.depths, 1))
    embeds = engine.embed(ids)

    def fill(count: int) -> np.ndarray:
        cache.truncate(0)
        logits = np.zeros((1, vocab), np.float32)
        for rows in chunks(count, engine.bounds):
            last = np.full(int(rows.stop == count), -1, np.int64)
            logits = engine.forward(cache, embeds[rows], last)
        return logits

    def steps(depth: int) -> list[float]:
        token = int(fill(depth)[0].argmax()) if depth else 0
        samples = []
        for _ in range(options.tokens):
            begin = time.perf_counter()
            token = int(engine.forward(cache, engine.embed(np.array([token])), np.array([-1]))[0].argmax())
            samples.append(1e3 * (time.perf_counter() - begin))
        return samples

    for count in options.prompts:
        tests.append((BenchRow(f"pp{count}", count), lambda n=count: _timed(lambda: fill(n))))  # type: ignore[misc]
    for depth in options.depths:
        name = f"tg{options.tokens}" + (f" @ d{depth}" if depth else "")
        read = traffic.step(options, depth) if traffic else None
        tests.append((BenchRow(name, 1, depth, bytes=read), lambda d=depth: steps(d)))  # type: ignore[misc]
    return tests


def _timed(call: Callable[[], Any]) -> list[float]:
    begin = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - begin)]


def read_bandwidth(threads: int, values: np.ndarray | None = None) -> float:
    """GB/s at which threads read an array, the best of five times."""
    values = np.ones(READ_BYTES // 8) if values is None else values
    pieces, seconds = np.array_split(values, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.max, pieces))
            seconds.append(time.perf_counter() - begin)
    return values.nbytes / min(seconds) / 1e9
