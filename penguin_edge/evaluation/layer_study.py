"""What a quantized model costs inside: the report over its layers, and the encoder's features at several resolutions.

| name     | shape     | dtype | what                                                                     |
|----------|-----------|-------|--------------------------------------------------------------------------|
| picture  | [H, W, 3] | uint8 | RGB, native                                                              |
| features | [1, P, C] | f32   | of the engine and of the reference, compared patch by patch              |

A row of `layers` has `layer`, `scheme`, `cosine` and `snr_db` of what arrives there in the quantized model, and
`own_cosine` and `own_snr_db` of the layer alone; null for an SNR where not a bit differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.config import PATCH
from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.files import write_picture
from penguin_edge.media.preprocess import fit_area, preprocess_image
from penguin_edge.runtime.engines.base import Engine

PATCHES = (64, 256, 1024, 2048)
"""Most patches of a picture, at which features are compared."""
WORST = 10
"""Layers that the report names."""
KINDS = {
    "q_proj": "#4f81b0", "k_proj": "#7fb2d9", "v_proj": "#2d5f8a", "o_proj": "#8c6bb1",
    "gate_proj": "#5a9367", "up_proj": "#a3c585", "down_proj": "#d9622b",
    "patch_embedding": "#777777", "readout.0": "#b58900", "readout.2": "#e0b040", "lm_head": "#000000",
}  # fmt: skip
CountProgress = Callable[[int, int], None]
Row = Mapping[str, Any]


def picture_size(picture: NDArray[np.uint8], patches: int, merge_size: int) -> tuple[int, int]:
    """The (height, width) of at most so many patches that keeps the aspect, in multiples of a token's side."""
    area, factor = float(patches * PATCH**2), PATCH * merge_size
    height, width = fit_area(area, picture.shape[0], picture.shape[1], factor, 0)
    while height * width > patches * PATCH**2 and height * width > factor**2:
        area *= 0.97
        height, width = fit_area(area, picture.shape[0], picture.shape[1], factor, 0)
    return height, width


def feature_cosines(
    engine: Engine,
    reference: Engine,
    pictures: Sequence[NDArray[np.uint8]],
    patches: Sequence[int] = PATCHES,
    progress: CountProgress | None = None,
) -> list[dict[str, Any]]:
    """Cosine of the two engines' features per patch, over all pictures resized to at most so many patches.

    Returns:
        For each size that both engines take: `patches`, `pictures`, and over all patches `cosine_mean`, `cosine_min`.
    Raises:
        InputError: a feature is NaN or infinite.
    """
    image = engine.config.image
    most = min(engine.bounds.max_patches, reference.bounds.max_patches)
    sizes = [count for count in patches if count <= most]
    rows: list[dict[str, Any]] = []
    for count in sizes:
        found = []
        for index, picture in enumerate(pictures):
            size = picture_size(picture, count, image.image_merge_size)
            item = preprocess_image(picture, image, image.image_merge_size, size)
            inputs = (item.pixels[None], item.rows, item.cols)
            got, wanted = (one.encode(*inputs)[0].astype(np.float64) for one in (engine, reference))
            if not (np.isfinite(got).all() and np.isfinite(wanted).all()):
                raise InputError("a feature is NaN or infinite; verify the model before you measure it")
            norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1)
            found.append((got * wanted).sum(-1) / np.maximum(norms, 1e-30))
            if progress:
                progress(len(rows) * len(pictures) + index + 1, len(sizes) * len(pictures))
        cosines = np.concatenate(found)
        rows.append(
            {
                "patches": count,
                "pictures": len(pictures),
                "cosine_mean": float(cosines.mean()),
                "cosine_min": float(cosines.min()),
            }
        )
    return rows


def split_name(layer: str) -> tuple[str, int | None, str]:
    """Part, number of the block if it is in one, and kind: `decoder.layers.3.mlp.up_proj` is decoder, 3, up_proj."""
    part, _, rest = layer.partition(".")
    if not rest.startswith("layers."):
        return part, None, rest
    _, block, rest = rest.split(".", 2)
    return part, int(block), rest.rpartition(".")[2]


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A table of part and kind of layer: how many, in which schemes, and the median and the worst SNR of either error.

    Layers without any error count as infinitely good.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        part, _, kind = split_name(row["layer"])
        groups.setdefault((part, kind), []).append(row)
    out: list[tuple[str, ...]] = [
        ("layers", "n", "scheme", "own SNR, dB", "worst", "accumulated, dB", "worst", "cosine, worst")
    ]
    for (part, kind), members in groups.items():
        cells = []
        for key in ("own_snr_db", "snr_db"):
            values = [math.inf if row[key] is None else row[key] for row in members]
            middle, least = float(np.median(values)), min(values)
            cells += [decibels(None if math.isinf(value) else value) for value in (middle, least)]
        schemes = " / ".join(dict.fromkeys(row["scheme"] for row in members))
        cosine = min(row["cosine"] for row in members)
        out.append((f"{part} {kind}", str(len(members)), schemes, *cells, f"{cosine:.5f}"))
    return out


def worst(rows: Sequence[Row], count: int = WORST) -> list[tuple[str, ...]]:
    """A table of the layers with the lowest SNR of what arrives there."""
    missed = sorted((row for row in rows if row["snr_db"] is not None), key=lambda row: float(row["snr_db"]))
    out: list[tuple[str, ...]] = [("worst layers", "scheme", "own SNR, dB", "accumulated, dB", "cosine")]
    for row in missed[:count]:
        errors = (decibels(row["own_snr_db"]), decibels(row["snr_db"]), f"{row['cosine']:.5f}")
        out.append((row["layer"], row["scheme"], *errors))
    return out


def draw_layers(rows: Sequence[Row], path: str | Path) -> None:
    """SNR over depth, one panel per graph, one line per kind of layer, to a PNG; a layer without error is no point.

    The patch embedding stands before the blocks, the projector's layers and the head behind them.

    Raises:
        InputError: `path` cannot be written.
        TargetUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TargetUnavailable(f"a picture needs matplotlib ({error}): pip install matplotlib") from error
    panels: dict[str, dict[str, list[tuple[int, Row]]]] = {}
    depths: dict[str, int] = {}
    for row in rows:
        part, block, kind = split_name(row["layer"])
        panel = "encoder" if part == "projector" else part
        if block is not None:
            depths[panel] = max(depths.get(panel, 0), block + 1)
        at = block if block is not None else -1 if kind == "patch_embedding" else depths.get(panel, 0)
        panels.setdefault(panel, {}).setdefault(kind, []).append((at + (kind == "readout.2"), row))
    figure = Figure(figsize=(5.2 * len(panels) + 1.4, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(1, len(panels), sharey=True, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, (panel, kinds) in zip(every, panels.items(), strict=True):
        for kind, points in kinds.items():
            blocks = [place for place, _ in points]
            for key, style, alpha in (("own_snr_db", ".:", 0.55), ("snr_db", "o-", 1.0)):
                values = [math.nan if row[key] is None else row[key] for _, row in points]
                [line] = axes.plot(blocks, values, style, color=KINDS[kind], alpha=alpha, markersize=3.5, linewidth=1.2)
            handles.setdefault(kind, line)
        exact = sum(row["snr_db"] is None for points in kinds.values() for _, row in points)
        total = sum(map(len, kinds.values()))
        axes.set_title(f"{panel}: {total} layers" + (f", {exact} exact" if exact else ""), fontsize=10, loc="left")
        axes.set_xlabel("block", fontsize=9)
        step = max(1, depths[panel] // 8)
        axes.set_xticks(range(0, depths[panel], step))
        axes.set_xlim(-1.4, depths[panel] + 1.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    [own] = every[0].plot([], [], ".:", color="#777777", markersize=3.5, linewidth=1.2)
    handles["the layer's own error"] = own
    every[0].set_ylabel("SNR of a layer's outputs, dB", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    write_picture(path, figure)
