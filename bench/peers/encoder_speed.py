"""Encoder speed of our bundles at the shape of the 2B model's vision encoder with random weights, side by side.

    python bench/peers/encoder_speed.py --make DIR [--layers 28]
    penguin-edge export --model DIR --target onnx --quant int8 --max-seq-len 512 -o out/int8     # and others
    python bench/peers/encoder_speed.py --bundle out/fp32 --bundle out/int8 [--patches 256 1024 2048] [--repeat 9]

Rounds go through all bundles in turn, so that a change of the machine's mood meets them all; a ratio is the median
over the rounds of one round's times, its interval a bootstrap over rounds. Pixels are a real photograph's. The first
bundle is what the others are compared with, in speed and in features (cosine). The last line is JSON with every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from penguin_edge.bundle.folder import Bundle
from penguin_edge.machine import describe, peak_mb
from penguin_edge.media.preprocess import positions, preprocess_image
from penguin_edge.runtime.engines.opening import open_engine

PICTURE = Path(__file__).parents[2] / "tests" / "media"
SIDES = {256: (16, 16), 1024: (32, 32), 2048: (32, 64), 4096: (64, 64)}
"""Patches of a frame, down and across."""


def make(folder: Path, layers: int) -> None:
    """A checkpoint with the encoder of the 2B model, or some layers of it, and as little decoder as can be."""
    import torch

    from penguin_edge.config import PRESETS, PenguinConfig, TextConfig
    from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint, save

    vision = PRESETS["2b"].vision
    assert vision is not None
    config = PenguinConfig(
        vision=replace(vision, num_hidden_layers=layers),
        text=TextConfig(4096, 64, 128, 1, 2, 1, 32),
        image_token_id=603,  # of the embedded small tokenizer
        eos_token_ids=(600,),
        pad_token_id=601,
    )
    save(Checkpoint("2b-encoder", config, DEFAULT_TOKENIZER).load(dtype=torch.bfloat16), folder, DEFAULT_TOKENIZER)


def ratio(base: list[float], other: list[float]) -> tuple[float, float, float]:
    """How many times faster, and its 95 % interval."""
    each = np.array(base) / np.array(other)
    draws = np.random.default_rng(0).choice(each, (2000, len(each)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(np.median(each)), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--bundle", action="append", default=[], metavar="DIR")
    parser.add_argument("--patches", type=int, nargs="+", default=[256, 1024, 2048], choices=sorted(SIDES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.layers)
        return 0
    engines = {path: open_engine(Bundle.read(path), threads=args.threads) for path in args.bundle}
    picture = np.asarray(Image.open(next(PICTURE.glob("*.jpg"))).convert("RGB"))
    samples: dict[str, dict[int, list[float]]] = {path: {} for path in engines}
    features: dict[tuple[str, int], Any] = {}
    for round_ in range(-1, args.repeat):  # round -1 warms up
        for patches in args.patches:
            high, wide = SIDES[patches]
            image = next(iter(engines.values())).config.image
            pixels = preprocess_image(picture, image, 1, size=(14 * high, 14 * wide)).pixels
            rows, cols = positions((high, wide), 1)
            for path, engine in engines.items():
                begin = time.perf_counter()
                found = engine.encode(pixels[None], rows, cols)
                seconds = time.perf_counter() - begin
                if round_ < 0:
                    features[path, patches] = found
                else:
                    samples[path].setdefault(patches, []).append(seconds)
        print(f"round {round_}", file=sys.stderr)
    first = args.bundle[0]
    table: dict[str, Any] = {}
    for path, found in samples.items():
        for patches, seconds in found.items():
            a, b = (features[p, patches].astype(np.float64)[0] for p in (path, first))
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            faster = ratio(samples[first][patches], seconds)
            table.setdefault(path, {})[patches] = {
                "median_s": statistics.median(seconds), "times_faster": faster,
                "cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min()),
            }  # fmt: skip
            print(
                f"{path:30} {patches:5} patches {1000 * statistics.median(seconds):9.1f} ms   {faster[0]:.2f}x "
                f"({faster[1]:.2f} to {faster[2]:.2f})   cosine {cosine.mean():.5f}, least {cosine.min():.5f}"
            )
    print(json.dumps({"threads": args.threads, "table": table, "samples": samples, "peak_mb": peak_mb(),
                      "machine": describe()}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
