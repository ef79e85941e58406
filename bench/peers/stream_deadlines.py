"""Deadlines of a stream on this machine: in steady load, and when every stage takes twice as long from one second on.

    python bench/peers/stream_deadlines.py out/nano --source street.mp4 --first 60 --frame 150
    python bench/peers/stream_deadlines.py --make build/half --source street.mp4 --fps 1 --first 4000 --frame 3000

Runs `penguin-edge bench --stream` twice. A deadline is each question's first token (one every two seconds) and each
frame's being ready. `--make FOLDER` first exports an encoder and a decoder of the 0.6B shape with random weights in
int4, which is no preset: speed does not depend on the numbers. The bundle is profiled before, if it was not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from penguin_edge.runtime.latency.profile import PROFILE


def command(*arguments: Any) -> str:
    """Run a verb; its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "penguin_edge", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def make(folder: Path) -> Path:
    """A bundle of the 0.6B shape, encoder and decoder, unless it is there."""
    bundle, checkpoint = folder / "bundle", folder / "checkpoint"
    if bundle.exists():
        return bundle
    import torch

    from penguin_edge.model.checkpoint import Checkpoint, meta_model, random_tensor, save

    if not checkpoint.exists():
        preset = Checkpoint.open("2b", random_weights=True)
        text = replace(preset.config.text, hidden_size=1024, intermediate_size=3072)
        model = meta_model(replace(preset.config, text=text)).to(torch.bfloat16).to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(random_tensor(name, tuple(parameter.shape), 0, torch.bfloat16))
        save(model, checkpoint, Path(preset.tokenizer))
    quiet = ("--calibration-samples", 2, "--no-verify")
    command("export", "--model", checkpoint, "--target", "onnx", "--quant", "int4", *quiet, "-o", bundle)
    return bundle


def measure(bundle: Path, args: argparse.Namespace, slow: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stream.json"
        what = ["bench", bundle, "--stream", args.source, "--fps", args.fps, "--duration", args.duration]
        what += ["--cache", args.cache, "--target-first-token", args.first, "--target-frame", args.frame, "-o", out]
        what += ["--budget", args.budget] if args.budget else []
        what += ["--threads", args.threads] if args.threads else []
        command(*what, *(("--slow-down", slow) if slow else ()))
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def late(result: dict[str, Any], args: argparse.Namespace) -> list[tuple[float, str, float | None]]:
    """When each deadline was missed, whose, and milliseconds; None of a frame that the queue gave up then."""
    line = result["timeline"]
    found: list[tuple[float, str, float | None]]
    found = [(one["time"], "frame", one["age_ms"]) for one in line["frames"] if one["age_ms"] > args.frame]
    found += [
        (one["time"], "answer", one["first_token_ms"])
        for one in line["questions"]
        if one["first_token_ms"] > args.first
    ]
    found += [(one["time"], one["reason"], None) for one in line["dropped"] if one["reason"] in ("queue", "late")]
    return sorted(found, key=lambda one: one[0])


def report(result: dict[str, Any], args: argparse.Namespace, slowed_at: float | None) -> dict[str, Any]:
    missed = late(result, args)
    ages = result["frame_age_ms"]
    first = result["first_token_ms"]
    after = [at - slowed_at for at, _, _ in missed if slowed_at is not None and at >= slowed_at]
    return {
        "deadlines": result["deadlines"],
        "missed": result["deadline_misses"],
        "missed_share": result["deadline_misses"] / max(1, result["deadlines"]),
        "last_miss_after_slowing_s": max(after, default=0.0) if slowed_at is not None else None,
        "frame_age_ms": ages,
        "oldest_frame_ms": max(result["samples"]["frame_age_ms"]),
        "age_bar_ms": args.frame + 1e3 / args.fps,
        "first_token_ms": first,
        "warm_over_cold": first["warm"]["p50"] / first["cold"]["p50"],
        "frames": [result["frames_processed"], result["frames_in"]],
        "dropped": result["dropped"],
        "budget_at_end": result["budget_at_end"],
        "max_live_visual_tokens": result["max_live_visual_tokens"],
        "decisions": [[d["time"], d["from"], d["to"], d["reason"]] for d in result["decisions"]],
        "late": missed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="a bundle of the 0.6B shape, made there")
    parser.add_argument("--source", required=True)
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--cache", choices=("recompute", "rebase"), default="rebase")
    parser.add_argument("--first", type=float, required=True, help="ms to the first token")
    parser.add_argument("--frame", type=float, required=True, help="ms until a frame is ready")
    parser.add_argument("--slow", type=float, default=2.0, help="factor, from a third of the time on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write both results there")
    args = parser.parse_args()
    if (args.bundle is None) == (args.make is None):
        parser.error("name a bundle, or --make FOLDER")
    bundle = make(args.make) if args.make else args.bundle
    threads = ("--threads", args.threads) if args.threads else ()
    if not (bundle / PROFILE).exists():
        profiled = json.loads(command("profile", bundle, *threads, "--json"))
        print(json.dumps({"profile": profiled["error"], "by_stage": profiled["error_by_stage"]}), flush=True)
    at = args.duration / 3
    results = {
        "steady": report(measure(bundle, args, None), args, None),
        "slowed": report(measure(bundle, args, f"{args.slow:g}@{at:g}"), args, at),
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
