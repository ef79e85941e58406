"""What each scheme costs a language model with real weights: perplexity, KL and agreement on three texts.

    python bench/peers/quantization_quality.py --work DIR [--pieces 3] [--length 512] [--continued 64] [--only NAME …]

The model is SmolLM2-135M-Instruct (`smollm2.py`). **Mind that it already lies on a 4-bit grid of groups of 32**: an
asymmetric scheme of that group can repeat it nearly without loss, and says nothing of other models; compare at other
groups. All linear layers of the decoder are quantized, the tied head is not; in the last rows the embedding table
alone, or the KV cache. Groups of 96 and 192, which no recipe may name, bracket 128, which does not divide the width.
Calibration reads 32 pieces of 512 tokens of other files than those that are measured. `--continued N` also compares N
greedy tokens after the first half of each piece, which takes minutes per row. Texts: fortunes and gcide of Debian (`apt
install fortunes dict-gcide`), and the topics of CPython's own `pydoc_data`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import torch
from numpy.typing import NDArray
from torch import nn

from penguin_edge.evaluation.text import measure_text
from penguin_edge.model.checkpoint import EMBEDDED, Checkpoint, save
from penguin_edge.model.eager import EagerEngine
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.apply import embedding_scheme, kv_form, quantize_part, quantize_rows
from penguin_edge.quantize.calibration.calibrate import calibrate, ready_from, text_samples
from penguin_edge.quantize.linear import Activations, Scheme, quantize_weight
from penguin_edge.quantize.recipe import Recipe

FORTUNES = Path("/usr/share/games/fortunes")
GCIDE = Path("/usr/share/dictd/gcide.dict.dz")
CALIBRATION = ("literature", "computers", "politics", "education", "law", "food")
ROWS = Scheme(8, activations="token")
STATIC, LARGEST = Scheme(8, activations="static"), Scheme(8, method="rtn", activations="static")
SMOOTH: dict[str, float | str] = {"decoder": 0.5}
AWQ: dict[str, float | str] = {"decoder": "awq"}


def odd_group(group: int) -> Scheme:
    """Four bits in groups that are no power of two."""
    scheme = Scheme(4, 64)
    object.__setattr__(scheme, "group", group)
    return scheme


SCHEMES: dict[str, tuple[Scheme | None, Activations, dict[str, Any]]] = {
    "fp32": (None, "float", {}),
    "int8 rtn": (Scheme(8, method="rtn"), "float", {}),
    "int8 mse": (Scheme(8, method="mse"), "float", {}),
    "int8 mse, activations per token": (Scheme(8, method="mse"), "token", {}),
    "int8 mse, activations per block": (Scheme(8, method="mse"), "block", {}),
    "int8 mse, activations per row, symmetric": (ROWS, "block", {}),
    "the same, down_proj per block": (ROWS, "block", {"layers": {"*.down_proj": Scheme(8)}}),
    "int8 mse, per row, SmoothQuant 0.5": (ROWS, "block", {"smooth": SMOOTH}),
    "the same, down_proj per block, SmoothQuant 0.5": (
        ROWS,
        "block",
        {"smooth": SMOOTH, "layers": {"*.down_proj": Scheme(8)}},
    ),
    "int8 mse, static": (STATIC, "block", {}),
    "int8 mse, static, SmoothQuant 0.5": (STATIC, "block", {"smooth": SMOOTH}),
    "int8 mse, static, scale of the largest, SmoothQuant 0.5": (LARGEST, "block", {"smooth": SMOOTH}),
    "the same, static, down_proj per block, SmoothQuant 0.5": (
        STATIC,
        "block",
        {"smooth": SMOOTH, "layers": {"*.down_proj": Scheme(8)}},
    ),
    "int4 g64 rtn": (Scheme(4, 64, method="rtn"), "float", {}),
    "int4 g64 mse": (Scheme(4, 64, method="mse"), "float", {}),
    "int4 g64 awq": (Scheme(4, 64), "float", {"smooth": AWQ}),
    "int4 g64 awq and gptq": (Scheme(4, 64, method="gptq"), "float", {"smooth": AWQ}),
    "int4 g64 gptq": (Scheme(4, 64, method="gptq"), "float", {}),
    "int4 g64 gptq, activations per token": (Scheme(4, 64, method="gptq"), "token", {}),
    "int4 g64 asymmetric rtn": (Scheme(4, 64, False, "rtn"), "float", {}),
    "int4 g64 asymmetric mse": (Scheme(4, 64, False, "mse"), "float", {}),
    "int4 g64 asymmetric gptq": (Scheme(4, 64, False, "gptq"), "float", {}),
    "int4 g32 rtn": (Scheme(4, 32, method="rtn"), "float", {}),
    "int4 g32 mse": (Scheme(4, 32, method="mse"), "float", {}),
    "int4 g32 awq": (Scheme(4, 32), "float", {"smooth": AWQ}),
    "int4 g32 gptq": (Scheme(4, 32, method="gptq"), "float", {}),
    "int4 g96 mse": (odd_group(96), "float", {}),
    "int4 g192 mse": (odd_group(192), "float", {}),
    "fp32, embedding int8": (None, "float", {"embedding": "int8"}),
    "fp32, embedding int4 g64": (None, "float", {"embedding": "int4"}),
    "fp32, KV cache fp16": (None, "float", {"kv": "fp16"}),
    "fp32, KV cache int8": (None, "float", {"kv": "int8"}),
}


def texts() -> dict[str, str]:
    """What is measured on."""
    topics = pydoc_data.topics.topics
    return {
        "fortunes/science": (FORTUNES / "science").read_text(encoding="utf-8"),
        "gcide": gzip.open(GCIDE).read(4_000_000).decode("utf-8", "replace")[-200_000:],
        "python docs": "\n".join(topics[name] for name in sorted(topics)),
    }


def quantized(checkpoint: Checkpoint, recipe: Recipe, activations: Activations, work: Path) -> PenguinModel:
    """The whole model in fp32; the table is quantized apart from the head that shares it, which stays."""
    ready = ready_from(work)
    model = checkpoint.load(dtype=torch.float32)
    assert model.decoder is not None and model.embedding is not None
    quantize_part(model, "decoder", recipe, activations, ready)
    model.decoder.kv_form = kv_form(recipe, len(model.decoder.layers), ready)
    if recipe.embedding is None:
        return model
    table = model.embedding.weight
    model.decoder.lm_head.weight = nn.Parameter(table.clone(), requires_grad=False)
    if recipe.embedding == "int4":
        rounded = quantize_weight(table, embedding_scheme(recipe, table.shape[1])).weight()
    else:
        levels, scales = quantize_rows(table)
        rounded = levels * scales[:, None]
    model.embedding.weight = nn.Parameter(rounded, requires_grad=False)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the model and integers go")
    parser.add_argument("--pieces", type=int, default=3, help="per text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--continued", type=int, default=0, metavar="N", help="greedy tokens after each piece")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", metavar="NAME", help=", ".join(SCHEMES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2.read(args.work)
    print(smollm2.check(model, tokenizer), flush=True)
    if not (args.work / "model").exists():
        save(model, args.work / "model", EMBEDDED["nano"] / "tokenizer.json")
    checkpoint = Checkpoint.open(str(args.work / "model"), note=lambda line: None)
    pieces: dict[str, NDArray[np.int64]] = {}
    for name, text in texts().items():
        ids = np.array(tokenizer.encode(text).ids[: args.pieces * args.length], np.int64)
        pieces[name] = ids.reshape(args.pieces, args.length)
    other = "\n".join((FORTUNES / name).read_text(encoding="utf-8") for name in CALIBRATION)
    samples = text_samples(
        tokenizer.encode(other).ids, samples=32, length=512, rng=np.random.default_rng(0), name="fortunes"
    )
    length = args.length + args.continued
    reference = EagerEngine(model, max_seq_len=length)
    result: dict[str, Any] = {}
    for name, (scheme, activations, more) in SCHEMES.items():
        if args.only and name not in args.only:
            continue
        begin = time.monotonic()
        recipe = Recipe(name, decoder=scheme, **more)
        work = args.work / f"integers-{name.replace(' ', '-').replace(',', '')}"
        if recipe.calibrated:
            calibrate(checkpoint, recipe, samples, work, lambda stage: None)
        candidate = quantized(checkpoint, recipe, activations, work)
        engine = EagerEngine(candidate, max_seq_len=length)
        row = {
            text: measure_text(engine, ids, reference, lambda done, total: None, continued=args.continued)
            for text, ids in pieces.items()
        }
        result[name] = row
        cells = "  ".join(f"{r['perplexity']:.2f}/{r['kl_mean']:.4f}/{r['top1_agreement']:.3f}" for r in row.values())
        if args.continued:
            cells += "  greedy " + "/".join(f"{r['greedy_tokens_equal']:.1f}" for r in row.values())
        print(f"{name:40} {cells}  ({time.monotonic() - begin:.0f} s)", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
