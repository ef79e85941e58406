"""What recipes that are chosen by measurement cost a model with trained weights, at several sizes.

    python bench/peers/auto_quality.py --work DIR --sizes 115MB 125MB 145MB              # SmolLM2, see smollm2.py
    python bench/peers/auto_quality.py --work DIR --model nano --sizes 3.08MB 3.2MB 3.3MB

ONNX Runtime's schemes. Layers of the decoder are measured on pieces of Debian's fortunes (`apt install fortunes`), of
nano on the built-in text; the recipes, and plain `int4` and `int8` beside them, on these and on other pieces of the
built-in text. Sizes are those of whole bundles, as the export counts them at most. Measurements are kept in DIR. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from penguin_edge.commands.common import byte_count
from penguin_edge.export.estimate import choose
from penguin_edge.export.targets.onnx.graphs import OnnxTarget
from penguin_edge.model.checkpoint import EMBEDDED, Checkpoint, save
from penguin_edge.quantize.calibration.calibrate import BUILTIN, CalibrationOptions, read_calibration
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.search.choice import AutoOptions
from penguin_edge.quantize.search.sensitivity import SensitivityWalk

TEXT = Path("/usr/share/games/fortunes/literature")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the model and measurements go")
    parser.add_argument("--model", metavar="DIR|PRESET", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sizes", type=byte_count, nargs="*", default=[115_000_000, 125_000_000, 145_000_000])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.model or args.work / "model-with-tokenizer"
    if not Path(folder).exists() and args.model is None:
        import smollm2

        model, tokenizer = smollm2.read(args.work)
        save(model, folder, EMBEDDED["nano"] / "tokenizer.json")
        tokenizer.save(str(args.work / "model-with-tokenizer" / "tokenizer.json"))
    checkpoint, target = Checkpoint.open(folder, note=lambda line: None), OnnxTarget()
    other = CalibrationOptions(BUILTIN, 2 * args.samples, args.length, seed=1)
    begin = time.monotonic()

    def progress(done: int, total: int, stage: str) -> None:
        print(f"\r{done}/{total} {stage}, {time.monotonic() - begin:.0f} s\x1b[K", end="", flush=True)

    recipes: dict[str, dict[str, Any]] = {}
    data = CalibrationOptions(BUILTIN if args.model else str(TEXT), args.samples, args.length)
    for size in args.sizes:
        options = AutoOptions(data, max_size=size)
        recipe, report = choose(checkpoint, target, options, args.work / "measured.json", None, progress)
        counts: dict[str, int] = {}
        for row in report["layers"]:
            counts[row["chosen"]] = counts.get(row["chosen"], 0) + 1
        found = {name: report[name] for name in ("bytes", "predicted_kl", "measured_kl")}
        recipes[f"auto {size / 1e6:g} MB"] = {**found, "chosen": counts, "schemes": dict(recipe.layers)}
        print(f"\n{size}: {found} {counts}", flush=True)
    shapes = {row["layer"]: (row["shape"][0], row["shape"][1]) for row in report["layers"]}
    fixed = report["bytes"] - sum(target.layer_bytes(shapes[name], s) for name, s in recipe.layers.items())
    walks = {
        "measured_kl": SensitivityWalk(checkpoint.load(), read_calibration(data, checkpoint), target.activations),
        "other_kl": SensitivityWalk(checkpoint.load(), read_calibration(other, checkpoint), target.activations),
    }
    for name, scheme in (("int4", Scheme(4, 64)), ("int8", Scheme(8))):
        schemes = {layer: scheme if layer.startswith("decoder") else s for layer, s in recipe.layers.items()}
        used = sum(target.layer_bytes(shapes[layer], s) for layer, s in schemes.items())
        recipes[name] = {"bytes": used + fixed, "schemes": schemes}
    for name, row in recipes.items():
        schemes = row.pop("schemes")
        for key, walk in walks.items():
            if key not in row:
                row[key] = walk.whole(schemes, lambda stage: None)
        cells = ", ".join(f"{key} {row[key]:.4g}" for key in ("bytes", *walks))
        print(f"{name:14} {cells}", flush=True)
    print(json.dumps(recipes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
