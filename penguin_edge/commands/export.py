"""`penguin-edge export`: a checkpoint or preset becomes a bundle."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penguin_edge.commands.common import (
    DEFAULT_TARGET,
    byte_count,
    emit,
    nats,
    positive,
    require_torch,
    say,
    status,
    table,
)
from penguin_edge.commands.options import add_allow_outside, add_json
from penguin_edge.errors import InputError
from penguin_edge.machine import human_bytes
from penguin_edge.runtime.engines.opening import ENGINES

if TYPE_CHECKING:
    from penguin_edge.export.stages import TimeLeft

AUTO = "auto"
EVERY_SECONDS = 30.0
"""Between lines about a part's work where stderr is no terminal."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("export", help="compile encoder, projector and decoder into a bundle")
    parser.add_argument(
        "--model", required=True, metavar="DIR|ID|PRESET", help="checkpoint folder, hub id, or preset name"
    )
    parser.add_argument("--random-weights", action="store_true", help="accept that a preset has random weights")
    parser.add_argument("--target", default=DEFAULT_TARGET, help=f"{' or '.join(ENGINES)} (default: %(default)s)")
    parser.add_argument(
        "--quant",
        default="fp32",
        metavar="NAME|FILE",
        help="fp32, fp16, int8, int4, int8-prefill, a recipe file, or auto: measured, layer by layer (default: fp32)",
    )
    parser.add_argument(
        "--max-size", type=byte_count, metavar="SIZE", help="for auto: most bytes of the bundle, such as 1.2GB"
    )
    parser.add_argument(
        "--max-kl", type=nats, metavar="KL", help="for auto: most nats per position to the unquantized model"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["fp16", "int8"],
        help="store keys and values in fewer bits (default: the target's own)",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR|FILE",
        help="for gptq, smoothing, static activations, auto, int8 caches: a data folder, or a text file (default: "
        "builtin, a text and a few photographs)",
    )
    add_allow_outside(parser)
    parser.add_argument("--calibration-samples", type=positive, metavar="N", help="default: 64; for auto 4")
    parser.add_argument(
        "--calibration-length", type=positive, metavar="N", help="most tokens of a sample (default: 512; for auto 128)"
    )
    parser.add_argument("--max-seq-len", type=positive, default=4096, help="KV positions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights and calibration (default: 0)")
    parser.add_argument(
        "--max-ram", type=byte_count, help="refuse an export that needs more, such as 16GB (default: all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the bundle with the eager model")
    parser.add_argument("-o", "--out", required=True, metavar="BUNDLE", help="folder to write")
    add_json(parser, "print one JSON object")
    parser.set_defaults(run=run, refuse=parser.error)


class Lines:
    """Progress on stderr: one line per part, and while it works one that is rewritten on a terminal, elsewhere a line
    now and then."""

    def __init__(self, parts: int, time_left: TimeLeft) -> None:
        self._parts, self._index, self._time_left = parts, 0, time_left
        self._rewrites = sys.stderr.isatty()
        self._estimate_mb = self._said = 0.0

    def plan(self, expected: Mapping[str, float]) -> None:
        self._time_left.plan(expected)

    def begin(self, part: str, estimate_mb: float) -> None:
        self._index += 1
        self._estimate_mb, self._said = estimate_mb, 0.0
        if not self._rewrites:
            say(f"[{self._index}/{self._parts}] {part} …")

    def tick(self, part: str, seconds: float, resident_mb: float, stage: str, share: float | None) -> None:
        if not self._rewrites and seconds - self._said < EVERY_SECONDS:
            return
        self._said = seconds
        limit = f" of at most {self._estimate_mb:.0f}" if self._estimate_mb else ""
        line = f"[{self._index}/{self._parts}] {part}{': ' * bool(stage)}{stage}, {seconds:.0f} s, "
        line += f"{resident_mb:.0f}{limit} MB{self._rest(part, seconds, share)}"
        if self._rewrites:
            status(line[: shutil.get_terminal_size().columns - 1])
        else:
            say(line)

    def _rest(self, part: str, seconds: float, share: float | None) -> str:
        left = self._time_left.left(part, seconds, share)
        return "" if left is None or (self._index == self._parts and share == 1) else f", about {left:.0f} s left"

    def done(self, part: str, seconds: float, peak_mb: float) -> None:
        clear = "\r\x1b[K" if self._rewrites else ""
        self._time_left.done(part, seconds)
        rest = self._rest(part, seconds, 1)
        say(f"{clear}[{self._index}/{self._parts}] {part}: {seconds:.1f} s, peak {peak_mb:.0f} MB{rest}")


def layer_summary(rows: list[dict[str, Any]]) -> list[str]:
    """Print the layers by scheme, and name those that did not get the scheme of their part."""
    from penguin_edge.quantize.apply import KEPT
    from penguin_edge.quantize.linear import Scheme

    counts: dict[str, list[float]] = {}
    lines = []
    for row in rows:
        label = Scheme(**row["scheme"]).label if row["scheme"] else "not quantized"
        counts.setdefault(label, []).append(row["error"])
        if row["reason"] and row["reason"] != KEPT:
            lines.append(f"  {row['layer']} {row['shape']}: {label} ({row['reason']})")
    return [
        f"{len(errors)} layers {label}" + (f", weights off by {max(errors):.2%} at most" if max(errors) else "")
        for label, errors in counts.items()
    ] + lines


def auto_summary(report: dict[str, Any]) -> list[str]:
    """Print what was decided and why: for each measured layer the KL of every candidate, and the one that was
    chosen."""

    def short(label: str) -> str:
        return label.replace(" mse", "").replace("asymmetric", "asym").replace(", activations per ", "/")

    measured = [row for row in report["layers"] if not row["reason"]]
    labels = list(dict.fromkeys(c["label"] for row in measured for c in row["candidates"]))
    rows: list[tuple[str, ...]] = [("nats when this layer alone is", *map(short, labels), "chosen")]
    for row in measured:
        kls = {c["label"]: f"{c['kl']:.1e}" for c in row["candidates"]}
        rows.append((row["layer"], *(kls.get(label, "") for label in labels), short(row["chosen"])))
    rows.append(("embedding", *("" for _ in labels), f"int8 ({report['embedding_kl']:.1e})"))
    others: dict[str, list[str]] = {}
    for row in report["layers"]:
        if row["reason"]:
            others.setdefault(f"{short(row['chosen'])}, {row['reason']}", []).append(row["layer"])
    data = report["data"]
    return [
        *table(rows).splitlines(),
        *(f"  {len(names)} layers {what}: {names[0]}{' …' if names[1:] else ''}" for what, names in others.items()),
        f"KL {report['predicted_kl']:.4g} by the sum, {report['measured_kl']:.4g} measured, nats per position over "
        f"{data['tokens']} tokens and {data['images']} pictures of {data['source']}; the bundle will take at most "
        f"{human_bytes(report['bytes'])}",
    ]


def run(args: argparse.Namespace) -> int:
    limits = [name for name in ("--max-size", "--max-kl") if getattr(args, name[2:].replace("-", "_")) is not None]
    if args.quant == AUTO and len(limits) != 1:
        args.refuse(f"--quant auto wants one of --max-size and --max-kl, got {' and '.join(limits) or 'none'}")
    if args.quant == AUTO and args.kv_cache_dtype:
        args.refuse("--quant auto chooses layers, not caches; leave out --kv-cache-dtype")
    if args.quant != AUTO and limits:
        args.refuse(f"{limits[0]} is for --quant auto alone, got --quant {args.quant}")
    require_torch()
    from penguin_edge.export.pipeline import (
        ExportOptions,
        check_options,
        choose_recipe,
        estimate,
        expected_seconds,
        export_bundle,
    )
    from penguin_edge.export.stages import TimeLeft
    from penguin_edge.export.targets.known import find_target
    from penguin_edge.model.checkpoint import Checkpoint
    from penguin_edge.quantize.apply import DECODERS
    from penguin_edge.quantize.calibration.calibrate import BUILTIN, CalibrationOptions
    from penguin_edge.quantize.recipe import find_recipe
    from penguin_edge.quantize.search.choice import STAND_IN, AutoOptions

    target = find_target(args.target)
    checkpoint = Checkpoint.open(args.model, random_weights=args.random_weights, seed=args.seed)
    if checkpoint.stored is None and not args.random_weights:
        raise InputError(
            f"{args.model} is a preset, which has no trained weights; pass --random-weights or name a checkpoint"
        )
    automatic = args.quant == AUTO
    recipe = STAND_IN if automatic else find_recipe(args.quant)
    if args.kv_cache_dtype:
        recipe = replace(recipe, kv=args.kv_cache_dtype)
    samples, length = args.calibration_samples or (4 if automatic else 64), args.calibration_length
    read = CalibrationOptions(
        args.calibration or BUILTIN, samples, length or (128 if automatic else 512), args.seed, args.allow_outside
    )
    data = read if not automatic and (args.calibration or recipe.calibrated) else None
    options = ExportOptions(
        args.target, recipe, args.max_seq_len, args.seed, args.max_ram, args.overwrite, not args.no_verify, data
    )
    check_options(checkpoint, target, options)
    need = estimate(checkpoint, target, options)
    say(
        f"{args.model} -> {args.target} {args.quant}: KV cache of {args.max_seq_len} positions takes "
        f"{human_bytes(need.kv_bytes)} at run time; export needs up to {human_bytes(need.peak)} of memory and "
        f"{human_bytes(need.disk_bytes)} of disk"
    )
    begin = time.monotonic()
    # All that can be foretold, and what reads data first.
    parts = len(expected_seconds(checkpoint, target, options)) + recipe.calibrated + automatic
    lines = Lines(parts, TimeLeft())
    if automatic:
        auto = AutoOptions(read, args.max_size, args.max_kl, args.max_seq_len)
        options = choose_recipe(checkpoint, args.out, options, auto, lines)
        for line in auto_summary(options.auto or {}):
            say(line)
    bundle = export_bundle(checkpoint, args.out, options, lines)
    total = sum(entry.bytes for entry in bundle.manifest.files.values())
    result = {
        "bundle": str(bundle.folder),
        "bytes": total,
        "kv_bytes": need.kv_bytes,
        "seconds": round(time.monotonic() - begin, 1),
        "parts": {
            name: {
                "seconds": graph.seconds,
                "peak_mb_beyond_tools": graph.peak_mb,
                "peak_over_bf16_bytes": round(
                    (graph.peak_mb or 0) * 1e6 / checkpoint.parameter_bytes(DECODERS.get(name, name), 2), 2
                ),
            }
            for name, graph in bundle.manifest.graphs.items()
        },
    }
    if options.auto:
        result["auto"] = options.auto
    for line in layer_summary(bundle.manifest.quantization.get("layers", [])):
        say(line)
    checked = "verified" if bundle.manifest.verified else "not verified"
    say(f"{bundle.folder}: {human_bytes(total)}, {checked}")
    if args.json:
        emit(result)
    else:
        print(bundle.folder)
    return 0
