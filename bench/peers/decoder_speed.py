"""Prefill and decode speed of our engines on one decoder shape with random weights, side by side in one process each
round.

    python bench/peers/decoder_speed.py --bundle out/06b-onnx --bundle out/06b-executorch --repeat 5

`--make DIR` writes a text-only checkpoint with random weights, to be exported first: `--shape` 0.6b or 1.7b, those of
Qwen3 (28 layers, width 1024 or 2048, vocabulary 151936, tied head). Rounds go through all bundles in turn, so that a
change of the machine's mood meets them all. The last line is JSON with every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from shapes import SHAPES, VOCAB

from penguin_edge.bundle.folder import Bundle
from penguin_edge.machine import describe, peak_mb
from penguin_edge.runtime.engines.base import Engine, chunks
from penguin_edge.runtime.engines.cache import Cache
from penguin_edge.runtime.engines.opening import open_engine

POSITIONS = (64, 256, 1024)


def make(folder: Path, name: str) -> None:
    """The checkpoint of a shape, in bf16."""
    import torch

    from penguin_edge.config import PenguinConfig, TextConfig
    from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint, save

    of = SHAPES[name]
    text = TextConfig(VOCAB, of.width, of.feed_forward, of.layers, of.heads, of.kv_heads, of.head_dim)
    config = PenguinConfig(vision=None, text=text, image_token_id=-1, eos_token_ids=(600,), pad_token_id=601)
    source = Checkpoint(f"qwen3-{name}-shape", config, DEFAULT_TOKENIZER)
    save(source.load(("embedding", "decoder"), dtype=torch.bfloat16), folder, DEFAULT_TOKENIZER)


def prefill(engine: Engine, cache: Cache, embeds: np.ndarray) -> float:
    """Seconds for a whole prompt from an empty cache, with logits of its last position."""
    cache.truncate(0)
    begin = time.perf_counter()
    for rows in chunks(len(embeds), engine.bounds):
        engine.forward(cache, embeds[rows], np.full(int(rows.stop == len(embeds)), -1, np.int64))
    return time.perf_counter() - begin


def decode(engine: Engine, cache: Cache, embeds: np.ndarray, past: int, count: int) -> list[float]:
    """Seconds of single tokens after `past` positions; the cache must hold at least so many."""
    cache.truncate(past)
    times = []
    for i in range(count):
        begin = time.perf_counter()
        engine.forward(cache, embeds[i : i + 1], np.array([-1]))
        times.append(time.perf_counter() - begin)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="DIR")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b", help="of --make")
    parser.add_argument("--bundle", action="append", default=[], metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.shape)
        return 0
    engines = {path: open_engine(Bundle.read(path), threads=args.threads) for path in args.bundle}
    caches = {path: engine.new_cache() for path, engine in engines.items()}
    samples: dict[str, dict[str, list[float]]] = {path: {} for path in engines}
    random = np.random.default_rng(0)
    for round_ in range(-1, args.repeat):  # round -1 warms up: graphs load, kernels pack their weights
        for path, engine in engines.items():
            hidden = engine.config.text.hidden_size
            for positions in POSITIONS:
                embeds = (0.02 * random.standard_normal((positions, hidden))).astype(np.float32)
                seconds = prefill(engine, caches[path], embeds)
                steps = decode(engine, caches[path], embeds, positions, args.tokens)
                if round_ >= 0:
                    samples[path].setdefault(f"prefill {positions}", []).append(positions / seconds)
                    samples[path].setdefault(f"decode {positions}", []).extend(1 / step for step in steps)
            print(f"round {round_}: {path}", file=sys.stderr)
    rows: dict[str, Any] = {}
    for path, found in samples.items():
        rows[path] = {name: round(statistics.median(values), 1) for name, values in found.items()}
        print(path, "  ".join(f"{name}: {value}" for name, value in rows[path].items()))
    print(json.dumps({"threads": args.threads, "median_tokens_per_s": rows, "samples": samples, "peak_mb": peak_mb(),
                      "machine": describe()}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
