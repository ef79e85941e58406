"""`penguin-edge convert LM_CHECKPOINT -o OUT`: a language model becomes a vision encoder, ready to be trained."""

from __future__ import annotations

import argparse

from penguin_edge.commands.common import TORCH_BYTES, check_outputs, positive, require_torch, say
from penguin_edge.machine import human_bytes, require_memory


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "convert",
        help="make a vision encoder from a language model",
        description="Make an encoder from the blocks of a Qwen3 or Llama-type language model: bidirectional attention, "
        "2D-RoPE, a new patch embedding. Its numbers are a start for training; it sees nothing yet.",
    )
    parser.add_argument("model", metavar="LM_CHECKPOINT", help="folder, hub id or preset of the language model")
    parser.add_argument("--layers", type=positive, metavar="N", help="blocks to keep (default: all)")
    parser.add_argument(
        "--choose",
        choices=["first", "spaced"],
        default="first",
        help="which blocks --layers keeps: the first ones, or evenly spaced ones (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the patch embedding (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an encoder that was made so before")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say where the encoder is."""
    check_outputs(args, ("out",), ("model",))
    require_torch()
    import torch

    from penguin_edge.model.checkpoint import Checkpoint
    from penguin_edge.model.convert import check_out, convert_checkpoint

    check_out(args.out, overwrite=args.overwrite)
    checkpoint = Checkpoint.open(args.model)
    donor = checkpoint.loaded_bytes(("embedding", "decoder"), torch.float32)
    require_memory(
        donor + checkpoint.parameter_bytes("decoder", 4) + TORCH_BYTES,
        f"converting {args.model} in fp32",
        "choose a smaller language model, or a larger machine",
    )
    made = convert_checkpoint(
        checkpoint, args.out, layers=args.layers, choose=args.choose, seed=args.seed, overwrite=args.overwrite
    )
    size = human_bytes(sum(entry["bytes"] for entry in made["files"].values()))
    blocks = f"{len(made['layers'])} of {checkpoint.config.text.num_hidden_layers} blocks"
    say(f"{args.model} -> encoder: {blocks}, fp32, {size}; the patch embedding is new")
    print(args.out)
    return 0
