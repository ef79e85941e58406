"""A TRA plan for people: JSON, a text timeline, and a picture.

`times` are seconds, one per frame, increasing; `similarities` are those of `Detection`, one per frame, None where there
was nothing to compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.config import TraConfig
from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.files import write_picture
from penguin_edge.tra.clip import DROPPED, INTERMEDIATE, KEY, Plan

BARS = " ▁▂▃▄▅▆▇█"
MARKS = {KEY: "K", INTERMEDIATE: "·", DROPPED: "x"}
COLOURS = {KEY: "#d9622b", INTERMEDIATE: "#4f81b0", DROPPED: "#9a9a9a"}
FULL_CHANGE = 0.25
"""Share of changed patches that fills a bar of the text timeline; a frame is key from 0.05 on."""
MAX_THUMBNAILS = 8

Similarities = Sequence[float | None]


def _aligned(plan: Plan, times: Sequence[float], similarities: Similarities) -> tuple[list[float], list[float | None]]:
    if not len(plan.frames) == len(times) == len(similarities):
        raise InputError(
            f"the plan has {len(plan.frames)} frames, but there are {len(times)} times and {len(similarities)} "
            "similarities; give one of each per frame"
        )
    clean = [None if value is None or math.isnan(value) else float(value) for value in similarities]
    return [float(time) for time in times], clean


def plan_json(plan: Plan, times: Sequence[float], similarities: Similarities) -> dict[str, Any]:
    """The plan as plain data. `keys`, `intermediates` and `dropped` are counts; dropped frames have size and tokens 0.

    Raises:
        InputError: times or similarities are not one per frame.
    """
    times, similarities = _aligned(plan, times, similarities)
    frames = [
        {
            "time": time,
            "kind": frame.kind,
            "similarity": value,
            "width": frame.width,
            "height": frame.height,
            "tokens": frame.tokens,
        }
        for frame, time, value in zip(plan.frames, times, similarities, strict=True)
    ]
    return {"frames": frames, **plan.to_json()}


def _summary(plan: Plan) -> str:
    share = plan.total_tokens / plan.budget
    return f"{plan.total_tokens:,} of {plan.budget:,} tokens ({share:.1%}), {plan.mode} plan, stage {plan.stage}"


def _kind_line(plan: Plan, kind: str, name: str) -> str:
    found = [frame for frame in plan.frames if frame.kind == kind]
    if not found:
        return f"{len(found)} {name}"
    return f"{len(found)} {name} of {found[0].width}x{found[0].height} px, {found[0].tokens:,} tokens each"


def draw_terminal(plan: Plan, times: Sequence[float], similarities: Similarities, width: int = 80) -> str:
    """A timeline of at most `width` columns, plain text.

    One column per frame; where frames outnumber columns, a column stands for several and shows its most telling one:
    a key frame before others, the most tokens, the largest change.

    Raises:
        InputError: times or similarities are not one per frame, or fewer than 40 columns.
    """
    times, similarities = _aligned(plan, times, similarities)
    if width < 40:
        raise InputError(f"a timeline of {width} columns cannot be read; give at least 40")
    labels = ("kind", "tokens", "change", "")
    indent = max(map(len, labels)) + 2
    n = len(plan.frames)
    columns = min(n, width - indent)
    groups = [range(c * n // columns, (c + 1) * n // columns) for c in range(columns)]
    most = max(frame.tokens for frame in plan.frames)
    kinds, tokens, change = "", "", ""
    for group in groups:
        kinds += MARKS[min((plan.frames[i].kind for i in group), key=list(MARKS).index)]
        tokens += _bar(max(plan.frames[i].tokens for i in group) / most)
        change += _bar((1 - min((s for i in group if (s := similarities[i]) is not None), default=1.0)) / FULL_CHANGE)
    first, last = f"{times[0]:.1f} s", f"{times[-1]:.1f} s"
    axis = first if n == 1 else first + last.rjust(max(len(last) + 1, columns - len(first)))
    lines = [
        _summary(plan),
        _kind_line(plan, KEY, "key (K)"),
        _kind_line(plan, INTERMEDIATE, "intermediate (·)"),
        *([f"{plan.dropped} dropped (x)"] if plan.dropped else []),
        "",
        *(name.ljust(indent) + row for name, row in zip(labels, (kinds, tokens, change, axis), strict=True)),
        "",
        f"tokens: full bar = {most:,}; change: patches unlike the last key frame, full bar = {FULL_CHANGE:.0%}",
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _bar(share: float) -> str:
    """One of nine levels; anything above nothing shows."""
    return BARS[math.ceil(min(1.0, max(0.0, share)) * (len(BARS) - 1))]


def draw_png(
    plan: Plan,
    times: Sequence[float],
    similarities: Similarities,
    path: str | Path,
    thumbnails: Sequence[NDArray[np.uint8] | None] | None = None,
    threshold: float = TraConfig.similarity_threshold,
) -> None:
    """Draw tokens per frame and similarity over time, key frames marked, to `path` (1400 pixels wide).

    `thumbnails` are pictures `[H, W, 3]` uint8, one per frame; those of up to eight key frames are shown on top.

    Raises:
        InputError: times, similarities or thumbnails are not one per frame, or `path` cannot be written.
        TargetUnavailable: matplotlib is not installed.
    """
    times, similarities = _aligned(plan, times, similarities)
    if thumbnails is not None and len(thumbnails) != len(times):
        raise InputError(f"got {len(thumbnails)} thumbnails for {len(times)} frames; give one per frame, or None")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise TargetUnavailable(f"a picture needs matplotlib ({error}): pip install matplotlib") from error

    shown = _shown_keys(plan, thumbnails)
    figure = Figure(figsize=(10, 6.2 if shown else 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    body: Any = figure
    if shown and thumbnails is not None:
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.3, 4.6))
        above, body = halves
        places = above.subplots(1, max(len(shown), 4))
        for axes in places:
            axes.axis("off")
        for axes, i in zip(places, shown, strict=False):
            axes.imshow(thumbnails[i])
            axes.set_title(f"key, {times[i]:.1f} s", fontsize=9, color=COLOURS[KEY])
    top, bottom = body.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    gaps = np.diff(times)
    step = float(np.median(gaps)) if len(gaps) else 1.0
    for kind in (KEY, INTERMEDIATE, DROPPED):
        which = [i for i, frame in enumerate(plan.frames) if frame.kind == kind]
        if not which:
            continue
        x = [times[i] for i in which]
        if kind == DROPPED:
            top.plot(x, [0] * len(x), "x", color=COLOURS[kind], label=f"{len(x)} dropped", clip_on=False, zorder=3)
            continue
        frame = plan.frames[which[0]]
        label = f"{len(x)} {kind}, {frame.width}×{frame.height} px, {frame.tokens:,} tokens each"
        top.bar(x, [plan.frames[i].tokens for i in which], 0.8 * step, color=COLOURS[kind], label=label)
        if kind == KEY:
            for axes in (top, bottom):
                for at in x:
                    axes.axvline(at, color=COLOURS[KEY], alpha=0.25, linewidth=1, zorder=0)
    top.set_ylabel("tokens")
    top.set_ylim(0, 1.25 * max(frame.tokens for frame in plan.frames))
    top.set_title(_summary(plan), fontsize=11, loc="left")
    top.legend(loc="upper right", fontsize=9, ncols=3, frameon=False)

    known = [(time, value) for time, value in zip(times, similarities, strict=True) if value is not None]
    bottom.plot([t for t, _ in known], [v for _, v in known], ".-", color="#333333", markersize=4, linewidth=1)
    bottom.axhline(threshold, color=COLOURS[KEY], linestyle="--", linewidth=1)
    lowest = min([value for _, value in known] + [threshold])
    bottom.set_ylim(max(0.0, lowest - 0.25 * (1.02 - lowest)), 1 + 0.15 * (1.02 - lowest))
    bottom.text(
        1.005,
        threshold,
        f"key\nbelow\n{threshold:g}",
        color=COLOURS[KEY],
        fontsize=8,
        va="center",
        transform=bottom.get_yaxis_transform(),
    )
    bottom.set_ylabel("similarity to\nlast key frame")
    bottom.set_xlabel("time in seconds" + "".join(f"\n{note}" for note in plan.notes))
    bottom.set_xlim(times[0] - step, times[-1] + step)
    top.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    write_picture(path, figure)


def _shown_keys(plan: Plan, thumbnails: Sequence[NDArray[np.uint8] | None] | None) -> list[int]:
    """Frames to show as thumbnails: key frames that have one, evenly chosen."""
    if thumbnails is None:
        return []
    keys = [i for i, frame in enumerate(plan.frames) if frame.kind == KEY and thumbnails[i] is not None]
    count = min(len(keys), MAX_THUMBNAILS)
    return [keys[j * len(keys) // count] for j in range(count)]
