"""The automatic recipe: what a bundle's files will take, and the job that measures and chooses.

Bytes of weights are counted as the targets pack them. Graphs, manifest and check data are bounded from above, so that
a bundle is never larger than what was asked for: on penguin-nano, with 2 MB of weights, the bound is off by 5 to 10 %.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penguin_edge.config import PATCH_VALUES
from penguin_edge.errors import InputError
from penguin_edge.export.cases import CASES, STORED_LOGITS
from penguin_edge.export.targets.base import Target
from penguin_edge.files import manifest_hash, read_json, write_json
from penguin_edge.machine import human_bytes, require_memory
from penguin_edge.model.checkpoint import Checkpoint, meta_model
from penguin_edge.quantize.apply import linears
from penguin_edge.quantize.calibration.calibrate import digest, read_calibration
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.quantize.search.choice import (
    AutoOptions,
    Option,
    candidates,
    recipe_of,
    smallest,
    table_rows,
    tightest,
    totals,
    within_size,
)
from penguin_edge.quantize.search.sensitivity import (
    EMBEDDING,
    INT8_TABLE,
    Measured,
    SensitivityWalk,
    WorkProgress,
    needed_bytes,
    parts_read,
)

PROMPT = 96
"""Largest number of tokens in the check data's prompt."""


def fixed_bytes(
    checkpoint: Checkpoint, target: Target, offered: Mapping[str, Sequence[Scheme | None]], max_seq_len: int
) -> int:
    """Upper bound of the bytes of everything but the linear layers' weights: the table in 8 bits, norms and biases,
    graphs, tokenizer, check data, manifest and `verify.json`."""
    config = checkpoint.config
    text, vision = config.text, config.vision
    total = text.vocab_size * (text.hidden_size + 4) + checkpoint.tokenizer.stat().st_size
    for part in ("decoder", *(("encoder", "projector") if vision else ())):
        model = meta_model(config, (part,))
        weights = {id(linear.weight) for linear in linears(model, part).values()}
        total += sum(4 * p.numel() for p in model.parameters() if id(p) not in weights) + 12_000
    total += target.graph_bytes(config, max_seq_len)
    total += 4 * text.vocab_size * (STORED_LOGITS + 1) + 4 * PROMPT * text.hidden_size + 16_000
    if vision is not None:
        for high, wide, height, width, _ in CASES:
            patches = height * width // 196
            total += 3 * (high * wide + height * width)
            total += 4 * patches * (PATCH_VALUES + vision.hidden_size + text.hidden_size)
    # Rows of the manifest: what became of each layer, and the table of candidates; then `verify.json`.
    return total + sum(500 + 360 * len(schemes) for schemes in offered.values()) + 32_000


def bundle_bytes(folder: Path) -> int:
    """Bytes of all files of a bundle."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def choose(
    checkpoint: Checkpoint,
    target: Target,
    options: AutoOptions,
    kept: Path,
    max_ram: int | None,
    progress: WorkProgress,
) -> tuple[Recipe, dict[str, Any]]:
    """Measure what is not known yet, and choose.

    Args:
        kept: the file where measurements are kept, so that a run that was stopped, or another limit, goes on with them.
    Returns:
        The recipe, and what the manifest says of it: limit, data, table, and KL as predicted and measured.
    Raises:
        InputError: a limit that cannot be kept, data that cannot be read, or weights that are not finite.
        MemoryLimitError: the model does not fit.
    """
    samples = read_calibration(options.data, checkpoint)
    images = sum(len(sample.visuals) for sample in samples)
    parts = ("encoder", "projector", "decoder") if checkpoint.config.vision else ("decoder",)
    model = meta_model(checkpoint.config, parts)
    layers = {
        name: (linear.out_features, linear.in_features)
        for part in parts
        for name, linear in linears(model, part).items()
    }
    offered = candidates(layers, lambda layer, scheme: _takes(target, layer, scheme), images > 0)
    fixed = fixed_bytes(checkpoint, target, offered, options.max_seq_len)

    def priced(measured: Measured) -> list[list[Option]]:
        return [
            [
                Option(
                    scheme,
                    target.layer_bytes(layers[layer], scheme),
                    0.0 if scheme is None else measured.get(layer, {}).get(scheme.label, 0.0),
                )
                for scheme in schemes
            ]
            for layer, schemes in offered.items()
        ]

    unmeasured = priced({})
    least = fixed + totals(unmeasured, smallest(unmeasured))[0]
    if options.max_size is not None and options.max_size < least:
        raise InputError(
            f"--max-size {human_bytes(options.max_size)}: the smallest bundle of this model takes {human_bytes(least)}"
            f" ({least} bytes); ask for at least that"
        )
    most = max(len(schemes) for schemes in offered.values())
    advice = "use fewer or shorter --calibration-samples, or a larger machine, or raise --max-ram"
    # Seven layers of a block are tried at once.
    require_memory(needed_bytes(checkpoint, samples, 7 * most + 1) + 500_000_000, "measuring", advice, max_ram)
    seen = {
        layer: [scheme for scheme in schemes if scheme is not None]
        for layer, schemes in offered.items()
        if images or layer.startswith("decoder.")
    }
    labels = {layer: [scheme.label for scheme in schemes] for layer, schemes in seen.items()}
    made_for = hashlib.sha256(
        json.dumps([digest(checkpoint, Recipe("auto"), samples), target.name, target.activations, labels]).encode()
    ).hexdigest()
    known = _read(kept, made_for)
    walk = SensitivityWalk(checkpoint.load(parts_read(samples)), samples, target.activations)
    measured = walk.measure(seen, known, lambda found: _keep(kept, made_for, found), progress)
    table_kl = measured[EMBEDDING][INT8_TABLE]
    # The table is a layer without a choice.
    rows = [*priced(measured), [Option(None, 0, table_kl)]]
    stages, rounds = len(walk.stages), 0

    def whole(chosen: list[int]) -> float:
        nonlocal rounds
        rounds += 1
        at = iter(range(stages))
        schemes = recipe_of(list(layers), rows[:-1], chosen[:-1]).layers
        decided = {layer: schemes[layer] for layer in seen}
        return walk.whole(decided, lambda stage: progress(next(at), stages, f"recipe-{rounds}:{stage}"))

    if options.max_size is not None:
        chosen = within_size(rows, options.max_size - fixed)
        measured_kl = whole(chosen)
    else:
        assert options.max_kl is not None
        chosen, measured_kl = tightest(rows, options.max_kl, whole)
        if measured_kl > options.max_kl:
            raise InputError(
                f"--max-kl {options.max_kl:g} cannot be reached: the best recipe of these candidates measures "
                f"{measured_kl:.3g} nats per position; ask for at least that, or export with --quant fp32"
            )
    used, predicted = totals(rows, chosen)
    limit = {"max_size": options.max_size} if options.max_kl is None else {"max_kl": options.max_kl}
    report = {
        **limit,
        "bytes": fixed + used,
        "smallest_bytes": least,
        "predicted_kl": predicted,
        "measured_kl": measured_kl,
        "embedding_kl": table_kl,
        "recipes_measured": rounds,
        "data": {
            **options.data.to_json(),
            "samples": len(samples),
            "tokens": sum(len(sample.input_ids) for sample in samples),
            "images": images,
            "sha256": made_for,
        },
        "layers": table_rows(layers, rows[:-1], chosen[:-1], images > 0),
    }
    return recipe_of(list(layers), rows[:-1], chosen[:-1]), report


def _takes(target: Target, layer: str, scheme: Scheme) -> bool:
    try:
        target.check_scheme(layer, scheme, "fp32")
    except InputError:
        return False
    return True


def _read(path: Path, made_for: str) -> Measured:
    """Measurements of exactly these weights, data and candidates; none if the file is missing or damaged."""
    try:
        kept = read_json(path)
        if kept["made_for"] == made_for and kept["sha256"] == manifest_hash(kept):
            return {layer: {label: float(kl) for label, kl in row.items()} for layer, row in kept["kl"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _keep(path: Path, made_for: str, found: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"made_for": made_for, "kl": found}
    write_json(path, {**data, "sha256": manifest_hash(data)})
