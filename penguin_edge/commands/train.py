"""`penguin-edge train --stage N --model SOURCE --data PATH… --out DIR`: one stage of training."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from penguin_edge.commands.common import emit, positive, require_torch, say
from penguin_edge.commands.options import add_allow_outside, add_json
from penguin_edge.errors import InputError
from penguin_edge.training.train_config import STAGES, Lora, TrainConfig

RATES = ("llm", "projector", "encoder", "patch_embedding", "distill")
OPTIONS = ("model_max_length", "mm_max_length", "tight_share", "fps", "max_frames")
FROZEN = "frozen"
DEFAULTS = {field.name: field.default for kind in (Lora, TrainConfig) for field in dataclasses.fields(kind)}


def rate(text: str) -> float | str:
    """argparse type: a learning rate above 0, or `frozen`."""
    if text == FROZEN:
        return FROZEN
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate; wanted a number or {FROZEN!r}") from None
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{value} is not a learning rate; wanted a number above 0, or {FROZEN!r}")
    return value


def source(text: str) -> tuple[Path, float]:
    """argparse type: PATH or PATH=WEIGHT."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"weight {weight} of {path}: wanted a number above 0")
    return Path(path), value


def _flag(group: Any, name: str, text: str, **options: Any) -> None:
    """A flag for a setting of `TrainConfig` or `Lora`; its default is written there, and only shown here."""
    default = DEFAULTS[options.get("dest", name).removeprefix("lora_")]
    if isinstance(default, bool):
        options["action"] = argparse.BooleanOptionalAction
        shown = "on" if default else "off"
    else:
        shown = "none" if default is None else f"{default}"
        options.setdefault("metavar", None if "choices" in options else "X" if options["type"] is float else "N")
    group.add_argument(f"--{name.replace('_', '-')}", help=f"{text} ({shown})" if shown != "none" else text, **options)


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "train",
        help="train a model, one stage of four",
        description="Defaults are those of the published recipe. Several processes: torchrun -m penguin_edge train …",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--stage", type=int, choices=sorted(STAGES), required=True)
    what.add_argument("--model", required=True, metavar="SOURCE", help="checkpoint folder, hub id, or preset")
    what.add_argument("--random-weights", action="store_true", help="train a preset from its random weights")
    what.add_argument(
        "--data",
        type=source,
        nargs="+",
        required=True,
        metavar="PATH[=WEIGHT]",
        help="annotation files, or folders with annotations.jsonl; WEIGHT: how often its records come per epoch",
    )
    what.add_argument("--media-root", type=Path, metavar="DIR", help="folder of the media (the annotations')")
    add_allow_outside(what)
    what.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    what.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")

    size = parser.add_argument_group("how much")
    _flag(size, "batch_size", "samples of one micro-batch and process; the recipe has 128 per step", type=positive)
    _flag(size, "accumulate", "micro-batches of one step", type=positive)
    _flag(size, "epochs", "passes over the data", type=float)
    _flag(size, "max_steps", "optimiser steps, instead of --epochs", type=positive)
    size.add_argument("--model-max-length", type=positive, metavar="N", help="longest sample in tokens (the stage's)")
    size.add_argument("--mm-max-length", type=positive, metavar="N", help="visual tokens of a sample (the stage's)")
    size.add_argument("--tight-share", type=float, metavar="X", help="share of clips built under a smaller budget (0)")
    size.add_argument("--fps", type=float, metavar="X", help="frames per second taken from clips (the model's)")
    size.add_argument("--max-frames", type=positive, metavar="N", help="frames taken from a clip (the model's)")
    _flag(size, "length_group", "samples of like length share a step; measures every sample first")

    learn = parser.add_argument_group("learning", f"rates: a number, or {FROZEN!r}; default: the stage's")
    learn.add_argument("--learning-rate", type=rate, metavar="X", help="of every part that the stage trains")
    for part in RATES:
        learn.add_argument(f"--{part.replace('_', '-')}-lr", type=rate, metavar="X")
    _flag(learn, "muon_lr", "matrices inside the blocks learn by Muon at this rate", type=float)
    _flag(learn, "weight_decay", "of matrices", type=float)
    _flag(learn, "warmup_ratio", "share of the steps in which the rates rise", type=float)
    _flag(learn, "min_lr_ratio", "the last step's share of the rates", type=float)
    _flag(learn, "max_grad_norm", "longer gradients are cut to this", type=float)
    _flag(learn, "grouping", "reference: norms decay, too", choices=("sound", "reference"))
    _flag(learn, "scope", "what the loss is averaged over", choices=("batch", "sequence"))

    aids = parser.add_argument_group("distillation and LoRA")
    aids.add_argument("--teacher", type=Path, metavar="DIR", help="an encoder checkpoint; stage 1 needs one")
    aids.add_argument("--distill", action=argparse.BooleanOptionalAction, help="learn from the teacher (the stage's)")
    _flag(aids, "distill_form", "form of the loss", choices=("edge", "paper", "reference"))
    _flag(aids, "distill_weight", "weight of the loss", type=float)
    aids.add_argument("--lora-rank", type=positive, metavar="N", help="train the language model through LoRA")
    _flag(aids, "lora_alpha", "scale of LoRA, times the rank", type=positive)
    _flag(aids, "lora_dropout", "dropout of LoRA", type=float)

    how = parser.add_argument_group("how")
    _flag(how, "seed", "of weights and order", type=int)
    _flag(how, "precision", "bf16: autocast over fp32 weights", choices=("fp32", "bf16"))
    _flag(how, "attention", "how samples are kept apart", choices=("padded", "mask", "varlen"))
    _flag(how, "gradient_checkpointing", "compute activations twice to save memory")
    how.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model over the processes (FSDP2)")
    _flag(how, "device", "cpu: even where there is a GPU", choices=("auto", "cpu"))
    _flag(how, "threads", "of this process on a CPU", type=positive)
    _flag(how, "workers", "loader processes; 0 loads in this one", type=int)
    _flag(how, "save_every", "steps between checkpoints", type=positive)
    _flag(how, "keep", "checkpoints to keep", type=positive)
    _flag(how, "max_bad_share", "stop above this share of unusable samples", type=float)
    _flag(how, "peak_flops", "of one process, for MFU; measured unless given", type=float)
    how.add_argument("--tensorboard", action="store_true", help="write OUT/tensorboard")
    add_json(how, "print the JSON line only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_torch()
    _check_preset(args.model, args.random_weights)
    from penguin_edge.training.trainer import train

    stage = STAGES[args.stage]
    taken = {"data", "rates", "options", "lora"}
    config = TrainConfig(
        data=tuple(args.data),
        rates=dataclasses.replace(stage.rates, **_rates(args)),
        options=dataclasses.replace(stage.data, **_given(args, OPTIONS)),
        lora=_lora(args),
        **_given(args, {field.name for field in dataclasses.fields(TrainConfig)} - taken),
    )
    result = train(config, say)
    if result is None:
        return 0
    if not args.json:
        print(f"{result['model']}: {result['steps']} steps, {result['samples']} samples, {result['tokens']} tokens")
        print(f"left out: {result['bad']} unreadable, {result['too_long']} too long")
    emit(result)
    return 0


def _given(args: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The settings that were given, by name; the others keep their defaults."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _rates(args: argparse.Namespace) -> dict[str, float | None]:
    changed: dict[str, float | None] = {}
    if args.learning_rate is not None:
        if args.learning_rate == FROZEN:
            raise InputError("--learning-rate frozen trains nothing; freeze single parts, such as --encoder-lr frozen")
        changed = dataclasses.asdict(STAGES[args.stage].rates.scaled_to(args.learning_rate))
    if args.patch_embedding_lr == FROZEN:
        raise InputError("the patch embedding learns with the encoder; freeze both with --encoder-lr frozen")
    for part in RATES:
        given = getattr(args, f"{part}_lr")
        if given is not None:
            changed[part] = None if given == FROZEN else given
    if args.encoder_lr == FROZEN and args.patch_embedding_lr is None:
        changed["patch_embedding"] = None
    return changed


def _lora(args: argparse.Namespace) -> Lora | None:
    given = _given(args, ("lora_rank", "lora_alpha", "lora_dropout"))
    if given and args.lora_rank is None:
        raise InputError("--lora-alpha and --lora-dropout need --lora-rank")
    return Lora(**{name.removeprefix("lora_"): value for name, value in given.items()}) if given else None


def _check_preset(model: str, random_weights: bool) -> None:
    from penguin_edge.config import PRESETS
    from penguin_edge.model.checkpoint import EMBEDDED

    preset = model in PRESETS and not Path(model).is_dir()
    if random_weights and not preset:
        raise InputError(f"--random-weights needs a preset ({', '.join(sorted(PRESETS))}), got {model}")
    if preset and model not in EMBEDDED and not random_weights:
        raise InputError(f"{model} is a preset and has random weights; add --random-weights if that is what you want")
