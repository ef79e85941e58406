"""`penguin-edge doctor`: what is installed, what the machine is, and what fits on it."""

from __future__ import annotations

import argparse
from typing import Any

from penguin_edge.commands.common import emit, table
from penguin_edge.commands.options import add_json
from penguin_edge.errors import InputError
from penguin_edge.machine import TORCH, Package, describe, human_bytes, total_memory
from penguin_edge.runtime.engines.opening import ENGINES, PLANNED


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("doctor", help="versions, engines found, processor, memory, and what fits")
    add_json(parser, "print one JSON object")
    parser.set_defaults(run=run)


def what_fits() -> list[dict[str, Any]]:
    """Exports of the published shapes that a target takes: peak memory against this machine's.

    Returns:
        One row per model, target and precision; none without the exporters.
    """
    try:
        from penguin_edge.export.pipeline import ExportOptions, check_options, estimate
        from penguin_edge.export.targets.known import TARGETS
        from penguin_edge.model.checkpoint import Checkpoint
        from penguin_edge.quantize.calibration.calibrate import BUILTIN, CalibrationOptions
        from penguin_edge.quantize.recipe import PRESETS
    except ImportError:
        return []
    rows = []
    for preset in ("2b", "8b"):
        checkpoint = Checkpoint.open(preset, note=lambda line: None)
        for name, target in sorted(TARGETS.items()):
            for precision, recipe in PRESETS.items():
                data = CalibrationOptions(BUILTIN) if recipe.calibrated else None
                options = ExportOptions(target=name, recipe=recipe, calibration=data)
                try:
                    check_options(checkpoint, target, options)
                except InputError:
                    continue
                need = estimate(checkpoint, target, options)
                rows.append(
                    {
                        "model": preset,
                        "target": name,
                        "precision": precision,
                        "export_peak_bytes": need.peak,
                        "kv_bytes": need.kv_bytes,
                        "disk_bytes": need.disk_bytes,
                        "fits": need.peak <= total_memory(),
                    }
                )
    return rows


def engine_packages() -> dict[str, Package]:
    """The package of each engine, by its target; `eager` runs checkpoints."""
    return {**{target: engine.package for target, engine in ENGINES.items()}, "eager": TORCH, **PLANNED}


def run(args: argparse.Namespace) -> int:
    machine = describe()
    needed = engine_packages()
    engines = {name: package.version for name, package in needed.items()}
    packages = machine["packages"] = {**machine["packages"], **{p.name: p.version for p in needed.values()}}
    fits = what_fits()
    if args.json:
        emit({**machine, "engines": engines, "exports": fits})
        return 0
    features = ", ".join(machine["features"]) or "no known vector features"
    print(f"{machine['processor']}, {machine['cores']} cores, {features}")
    available = machine["available_bytes"]
    print(
        f"memory {human_bytes(machine['memory_bytes'])}"
        + (f", {human_bytes(available)} available" if available else "")
    )
    print(f"{machine['system']}, Python {machine['python']}\n")
    print("engines")
    print(table([(name, version or f"missing: {needed[name].install}") for name, version in engines.items()]))
    print("\npackages")
    print(table([(name, version or "-") for name, version in packages.items()]))
    if fits:
        print("\nexport of the published shapes at 4096 positions (estimated)")
        head = ("model target precision", "peak memory", "disk", "KV cache", "fits here")
        rows = [
            (
                f"{row['model']} {row['target']} {row['precision']}",
                human_bytes(row["export_peak_bytes"]),
                human_bytes(row["disk_bytes"]),
                human_bytes(row["kv_bytes"]),
                "yes" if row["fits"] else "no",
            )
            for row in fits
        ]
        print(table([head, *rows]))
    return 0
