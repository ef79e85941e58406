"""`penguin-edge info CHECKPOINT|BUNDLE`: configuration, parameters and bytes per part, bounds, KV memory."""

from __future__ import annotations

import argparse
from typing import Any

from penguin_edge.bundle.contract import VERIFY
from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import emit, is_bundle, require_torch, table
from penguin_edge.commands.options import add_json
from penguin_edge.errors import InputError
from penguin_edge.files import read_json
from penguin_edge.machine import human_bytes
from penguin_edge.schema import Flag, Record, Text

_word = Text()
VERIFIED = Record(
    {"passed": Flag(), "against": _word, "time": _word, "engine": _word, "manifest_sha256": _word}, open=True
)
"""Fields that are read from `verify.json`."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("info", help="what a checkpoint, preset or bundle is")
    parser.add_argument("source", metavar="CHECKPOINT|BUNDLE", help="folder, hub id, preset name, or bundle")
    add_json(parser, "print one JSON object")
    parser.set_defaults(run=run)


def bundle_info(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    sizes: dict[str, int] = {}
    for name, entry in manifest.files.items():
        part = name.split(".")[0].split("/")[0]
        sizes[part] = sizes.get(part, 0) + entry.bytes
    try:
        verified = read_json(bundle.path(VERIFY), rule=VERIFIED)
    except InputError:  # none, or not one that says what is shown
        verified = None
    if verified and verified["manifest_sha256"] != manifest.to_json()["sha256"]:
        verified = None
    value = {"fp32": 4, "fp16": 2, "int8": 1}[manifest.kv_dtype]
    data = manifest.to_json()
    return {
        "kind": "bundle",
        "source": manifest.source,
        "target": manifest.target,
        "precision": manifest.precision,
        "config": data["model"],
        "bytes": sizes,
        "total_bytes": sum(sizes.values()),
        "bounds": data["bounds"],
        "kv_bytes": manifest.model.text.kv_values * value * manifest.bounds.max_seq_len,
        "kv_dtype": manifest.kv_dtype,
        "export": {name: {"peak_mb": g.peak_mb, "seconds": g.seconds} for name, g in manifest.graphs.items()},
        "tools": manifest.tools,
        "verified": None
        if verified is None
        else {key: verified[key] for key in ("passed", "against", "time", "engine")},
    }


def checkpoint_info(source: str) -> dict[str, Any]:
    require_torch()
    from penguin_edge.model.checkpoint import Checkpoint, meta_model

    checkpoint = Checkpoint.open(source)
    model = meta_model(checkpoint.config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    if checkpoint.config.text.tie_word_embeddings:
        parts["decoder"] -= checkpoint.config.text.vocab_size * checkpoint.config.text.hidden_size
    width = checkpoint.dtype.itemsize
    return {
        "kind": "preset" if checkpoint.stored is None else "checkpoint",
        "source": {"name": checkpoint.source},
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "config": checkpoint.config.to_json(),
        "parameters": parts,
        "total_parameters": sum(parts.values()),
        "bytes": {name: count * width for name, count in parts.items()},
        "total_bytes": sum(parts.values()) * width,
        "kv_bytes_per_token_fp32": checkpoint.config.text.kv_values * 4,
        "notes": checkpoint.notes,
    }


def run(args: argparse.Namespace) -> int:
    info = bundle_info(Bundle.read(args.source)) if is_bundle(args.source) else checkpoint_info(args.source)
    if args.json:
        emit(info)
        return 0
    print(f"{info['kind']} {info['source']['name']}")
    for part in ("vision", "text", "image"):
        fields = info["config"][part]
        if fields:
            print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in fields.items()))
    if info["kind"] == "bundle":
        print(f"target {info['target']}, precision {info['precision']}, KV {info['kv_dtype']}")
        print("bounds: " + ", ".join(f"{key} {value}" for key, value in info["bounds"].items()))
        print(table([("part", "bytes"), *((n, human_bytes(b)) for n, b in info["bytes"].items())]))
        print(f"total {human_bytes(info['total_bytes'])}; KV cache {human_bytes(info['kv_bytes'])}")
        print("export: " + ", ".join(f"{n} {e['seconds']} s, {e['peak_mb']} MB" for n, e in info["export"].items()))
        print("tools: " + ", ".join(f"{name} {version}" for name, version in info["tools"].items()))
        seen = info["verified"]
        print(
            "verified: "
            + (
                f"{'passed' if seen['passed'] else 'FAILED'} against {seen['against']}, {seen['time']}"
                if seen
                else "never; run `penguin-edge verify`"
            )
        )
        return 0
    rows = [(name, f"{count:,}", human_bytes(info["bytes"][name])) for name, count in info["parameters"].items()]
    print(table([("part", "parameters", info["dtype"]), *rows]))
    print(f"total {info['total_parameters']:,} parameters, {human_bytes(info['total_bytes'])}")
    print(f"KV cache {human_bytes(info['kv_bytes_per_token_fp32'])} per token in fp32")
    return 0
