"""A vision encoder that begins as a language model, against the same encoder from other weights, at equal steps.

    python bench/peers/encoder_donor.py --train DIR --eval DIR … --work DIR [--rates 3e-4 1e-3] [--steps 600]

The claim of Penguin-VL in miniature. The donor is SmolLM2-135M-Instruct (`smollm2.py`). Its first blocks become the
encoder of a model whose projector, embedding and decoder are those of the preset nano in shape and random in weights,
and which `penguin-edge train` then trains.
The starting points differ in the encoder's blocks alone; patch embedding and final norm are the same in all:

| arm      | blocks of the encoder                                                                              |
|----------|----------------------------------------------------------------------------------------------------|
| donor    | the donor's, as `penguin_edge.model.convert` makes them                                            |
| random   | as `penguin_edge.training.initialise` makes them, all norms one                                    |
| shuffled | the donor's numbers, each tensor's in random order: its scale and outliers without what it learned |

Runs that are there are not repeated. Needs `pip install gguf tokenizers`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import smollm2
import torch

from penguin_edge.config import PRESETS
from penguin_edge.model.checkpoint import Checkpoint, save
from penguin_edge.model.convert import convert_language_model
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.training.initialise import initialise

ARMS = ("donor", "random", "shuffled")
WINDOW = 50
RECIPE = [
    "--stage=3", "--min-lr-ratio=0.5", "--weight-decay=0.01", "--scope=sequence", "--batch-size=16", "--seed=0",
    "--precision=fp32", "--no-gradient-checkpointing", "--no-length-group", "--device=cpu", "--threads=1",
    "--workers=1",
]  # fmt: skip


@torch.no_grad()
def make_arms(donor: PenguinModel, arms: list[str], work: Path, layers: int, seed: int, decoder: str | None) -> None:
    """Checkpoints that differ in the encoder's blocks alone."""
    encoder, vision = convert_language_model(donor, layers=layers, seed=seed)
    nano = Checkpoint.open(decoder or "nano", random_weights=decoder is None)
    base = PenguinModel(dataclasses.replace(PRESETS["nano"], vision=vision))
    initialise(base, seed)
    assert base.encoder is not None
    base.encoder.patch_embedding.load_state_dict(encoder.patch_embedding.state_dict())
    if decoder:
        trained = nano.load(("embedding", "decoder"), dtype=torch.float32).state_dict()
        base.load_state_dict(trained, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for arm in arms:
        model = copy.deepcopy(base)
        assert model.encoder is not None
        if arm != "random":
            model.encoder.layers.load_state_dict(encoder.layers.state_dict())
        if arm == "shuffled":
            for value in model.encoder.layers.parameters():
                order = torch.randperm(value.numel(), generator=generator)
                value.copy_(value.flatten()[order].view_as(value))
        if not (work / f"start-{arm}").exists():
            save(model, work / f"start-{arm}", nano.tokenizer)


def train_and_measure(start: Path, out: Path, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Loss averaged over the last 50 steps at every 100th, and accuracy on each evaluation set."""
    penguin = [sys.executable, "-m", "penguin_edge"]
    if not (out / "model").is_dir():
        command = [*penguin, "train", "--model", str(start), "--data", str(args.train), "--out", str(out), *RECIPE]
        command += ["--learning-rate", str(rate), "--max-steps", str(args.steps), "--save-every", str(args.steps)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    curve = {end: sum(losses[end - WINDOW : end]) / WINDOW for end in range(100, len(losses) + 1, 100)}
    accuracy = {}
    for data in args.eval:
        kept = out / f"eval-{data.name}.json"
        if not kept.is_file():
            command = [*penguin, "eval", str(out / "model"), "--data", str(data), "--threads", "1", "--json"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            kept.write_text(done.stdout.splitlines()[-1])
        tasks = json.loads(kept.read_text())["tasks"]
        accuracy[data.name] = {name: {key: row[key] for key in ("n", "accuracy")} for name, row in tasks.items()}
    return {"loss": curve, "accuracy": accuracy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="training data")
    parser.add_argument("--eval", type=Path, nargs="*", default=[], metavar="DIR", help="sets to measure accuracy on")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where models and logs go")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3], metavar="X", help="learning rates")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the encoder: the donor's first ones")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--decoder", metavar="DIR", help="take embedding and decoder of this checkpoint of shape nano")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    donor, tokenizer = smollm2.read(args.work)
    result: dict[str, Any] = {"donor": smollm2.check(donor, tokenizer), "runs": {}}
    print(result["donor"], flush=True)
    make_arms(donor, list(args.arms), args.work, args.layers, args.seed, args.decoder)
    del donor
    for rate in args.rates:
        for arm in args.arms:
            name = f"{arm}-{rate:g}"
            row = train_and_measure(args.work / f"start-{arm}", args.work / name, args, rate)
            result["runs"][name] = row
            losses = " ".join(f"{step}:{loss:.3f}" for step, loss in row["loss"].items())
            print(f"{name:16} loss {losses}  accuracy {row['accuracy']}", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
