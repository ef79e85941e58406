"""The pictures of a measurement's report: SVG for the inside of a page, with text as text and colours by role.

matplotlib draws with stand-in colours, which become CSS variables, so that the page decides what light and dark look
like. Every picture is drawn twice: wide, and narrow for a phone. Units are those of `penguin-bench/1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from penguin_edge.errors import TargetUnavailable

WIDTHS = {"wide": 880, "narrow": 360}
"""CSS pixels."""
ROLES = ("ink", "muted", "grid", "late", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
STAND_IN = {role: f"#00fe{index:02x}" for index, role in enumerate(ROLES)}
PHASE_ROLES = {
    "decode_image": "c8",
    "decode_video": "c1",
    "read": "c6",
    "plan": "c4",
    "preprocess": "c3",
    "encode": "c2",
    "project": "c5",
    "prefill": "c7",
    "other": "muted",
}
LOST = "the rest"
"""Phases below a hundredth of the longest bar are drawn together: nobody could see them."""


@dataclass(frozen=True)
class Drawing:
    """One figure of the page: `svg` by width."""

    name: str
    title: str
    caption: str
    svg: Mapping[str, str]


@dataclass
class Sheet:
    """A figure in the making; `axes` from top to bottom."""

    figure: Any
    axes: list[Any]
    narrow: bool


Draw = Callable[[bool], Sheet]


def require_matplotlib() -> None:
    """Raises: TargetUnavailable: it is not installed."""
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TargetUnavailable(f"a report needs matplotlib ({error}): pip install matplotlib") from error


def picture(name: str, title: str, caption: str, draw: Draw) -> Drawing:
    """Draw a figure in both widths."""
    return Drawing(name, title, caption, {kind: _svg(f"{name}-{kind}", title, kind, draw) for kind in WIDTHS})


def _svg(name: str, title: str, kind: str, draw: Draw) -> str:
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 11 if kind == "narrow" else 12,
    }
    settings |= {key: STAND_IN["ink"] for key in ("text.color", "axes.labelcolor")}
    settings |= {key: STAND_IN["muted"] for key in ("xtick.color", "ytick.color", "axes.edgecolor")}
    settings |= {
        "grid.color": STAND_IN["grid"],
        "text.parse_math": False,
        "legend.frameon": False,
        "axes.titlesize": "medium",
    }
    out = StringIO()
    with matplotlib.rc_context(settings):
        figure = draw(kind == "narrow").figure
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several pictures share a page: each has its own ids.
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub("#00fe([0-9a-f]{2})", lambda found: f"var(--{ROLES[int(found[1], 16)]})", text)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    head = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    return head + text[text.index(">") + 1 :].strip()


def new_sheet(narrow: bool, heights: Sequence[float], sharex: bool = False, legend: float = 0.0) -> Sheet:
    """Axes below each other, of these heights in CSS pixels, and room for a legend."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width = WIDTHS["narrow" if narrow else "wide"]
    figure = Figure(figsize=(width / 72, (sum(heights) + legend) / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    found = figure.subplots(len(heights), 1, sharex=sharex, squeeze=False, height_ratios=heights)
    axes = [row[0] for row in found]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(length=3)
        one.set_axisbelow(True)
    return Sheet(figure, axes, narrow)


def log_x(axes: Any, values: Sequence[float], narrow: bool) -> None:
    """Milliseconds on a logarithmic axis with at least two readable ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values) / 1.15, max(values) * 1.15
    if high / low < 6:
        middle = (low * high) ** 0.5
        low, high = middle / 6**0.5, middle * 6**0.5
    decades = np.log10(high / low)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    few = decades > (2 if narrow else 3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x", linewidth=0.8)
    axes.set_xlabel("milliseconds")


def strips(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """All raw samples of each test as dots, the median as a bar."""

    def draw(narrow: bool) -> Sheet:
        sheet = new_sheet(narrow, [26 * len(rows) + 56])
        axes = sheet.axes[0]
        for at, row in enumerate(rows):
            samples = np.array(row["samples_ms"])
            # Spread by turns, not at random: the same file gives the same picture.
            spread = (np.arange(len(samples)) * 0.618 % 1 - 0.5) * 0.5
            axes.plot(samples, at + spread, "o", ms=4.5, mew=0, alpha=0.45, color=STAND_IN["c1"])
            axes.plot([row["ms"]["p50"]] * 2, [at - 0.36, at + 0.36], color=STAND_IN["ink"], linewidth=2)
        axes.set_yticks(range(len(rows)), [row["test"] for row in rows], color=STAND_IN["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        log_x(axes, [value for row in rows for value in row["samples_ms"]], narrow)
        return sheet

    return draw


def bandwidth(rows: Sequence[Mapping[str, Any]], limit: float) -> Draw:
    """What decoding reads per second, beside what all threads read from memory."""

    def draw(narrow: bool) -> Sheet:
        sheet = new_sheet(narrow, [30 * len(rows) + 84])
        axes = sheet.axes[0]
        names, rates = [row["test"] for row in rows], [row["gb_s"] for row in rows]
        axes.barh(names, rates, 0.6, color=STAND_IN["c1"])
        for at, rate in enumerate(rates):
            axes.annotate(f"{rate:.2f}", (rate, at), (5, 0), textcoords="offset points", va="center")
        most = max(limit, *rates)
        axes.axvline(limit, color=STAND_IN["late"], linestyle="--", linewidth=1.5)
        axes.set_title(f"memory is read at {limit:.1f} GB/s", loc="right", color=STAND_IN["late"])
        axes.set_xlim(0, 1.12 * most)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelcolor=STAND_IN["ink"])
        axes.grid(axis="x", linewidth=0.8)
        axes.set_xlabel("GB/s")
        return sheet

    return draw


def stacked(bars: Sequence[tuple[str, Mapping[str, float]]]) -> Draw:
    """Phases one after another, in milliseconds; each bar has an axis of its own, because a warm answer takes a
    hundredth of a cold one."""
    shown = [(name, _merged(phases)) for name, phases in bars]
    used = dict.fromkeys(phase for _, phases in shown for phase in phases)
    order = [phase for phase in (*PHASE_ROLES, LOST) if phase in used]

    def draw(narrow: bool) -> Sheet:
        from matplotlib.patches import Patch

        columns = 2 if narrow else 4
        lines = -(-len(order) // columns)
        sheet = new_sheet(narrow, [84] * len(shown), legend=22 * lines + 14)
        for axes, (name, phases) in zip(sheet.axes, shown, strict=True):
            total, left = sum(phases.values()), 0.0
            for phase in (phase for phase in order if phase in phases):
                ms = phases[phase]
                axes.barh([0], [ms], 0.7, left=left, color=_phase(phase), edgecolor="none")
                left += ms
            axes.set_title(f"{name}: {number(total)} ms", loc="left")
            axes.set_xlim(0, total * 1.005)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.locator_params(axis="x", nbins=4 if narrow else 8)
        sheet.axes[-1].set_xlabel("milliseconds")
        sheet.figure.legend(
            [Patch(color=_phase(phase)) for phase in order],
            [phase.replace("_", " ") for phase in order],
            loc="outside lower left",
            ncols=columns,
        )
        return sheet

    return draw


def _phase(name: str) -> str:
    return STAND_IN[PHASE_ROLES.get(name, "muted")]


def _merged(phases: Mapping[str, float]) -> dict[str, float]:
    """Merge `other` and the phases that are too small to be seen."""
    least = 0.01 * sum(phases.values())
    seen = {name: ms for name, ms in phases.items() if ms >= least and name != "other"}
    rest = sum(phases.values()) - sum(seen.values())
    return seen | ({LOST: rest} if rest > 0 else {})


def ecdf(series: Sequence[tuple[str, Sequence[float], float | None]]) -> Draw:
    """Share of samples that took no longer than each time; each series has its target, or None."""

    def draw(narrow: bool) -> Sheet:
        sheet = new_sheet(narrow, [290])
        axes = sheet.axes[0]
        every: list[float] = []
        for role, (name, samples, target) in zip(("c1", "c2", "c3"), series, strict=False):
            values = np.sort(np.array(samples, float))
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            mark = {"marker": "o", "ms": 4} if len(values) <= 40 else {}
            axes.step(values, share, where="post", color=STAND_IN[role], linewidth=2, label=name, **mark)
            every += [*values]
            if target is not None:
                every.append(target)
                axes.axvline(
                    target, color=STAND_IN[role], linestyle="--", linewidth=1.5, label=f"target: {target:g} ms"
                )
        log_x(axes, every, narrow)
        axes.set_ylim(0, 104)
        axes.set_ylabel("% of samples")
        axes.grid(axis="y", linewidth=0.8)
        if len(axes.lines) > 1:
            sheet.figure.legend(loc="outside lower left", ncols=1 if narrow else 3)
        return sheet

    return draw


def timeline(result: Mapping[str, Any]) -> Draw:
    """Budget and tokens, frame ages, first tokens; the controller's decisions as numbered lines through all."""
    frames, questions = result["timeline"]["frames"], result["timeline"]["questions"]
    options, decisions, slow = result["options"], result["decisions"], result["options"]["slow_down"]

    def draw(narrow: bool) -> Sheet:
        sheet = new_sheet(narrow, [210, 150, 150], sharex=True)
        tokens, ages, firsts = sheet.axes
        at = [one["time"] for one in frames]
        kept = [one["kv_tokens"] for one in frames]
        tokens.step(at, kept, where="post", color=STAND_IN["c3"], linewidth=1.5, label="KV positions")
        budget = [one["budget"] for one in frames]
        tokens.step(at, budget, where="post", color=STAND_IN["ink"], linewidth=1.5, linestyle="--", label="budget")
        visual = [one["visual_tokens"] for one in frames]
        tokens.fill_between(at, visual, step="post", color=STAND_IN["c1"], alpha=0.25, linewidth=0)
        tokens.step(at, visual, where="post", color=STAND_IN["c1"], linewidth=2, label="visual tokens")
        tokens.set_ylabel("tokens")
        tokens.legend(loc="lower left", bbox_to_anchor=(0, 1.09 if decisions else 1.0), ncols=3, fontsize="small",
                      handlelength=1.4, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
        _late(ages, at, [one["age_ms"] for one in frames], options["target_frame_ms"])
        ages.set_ylabel("frame age, ms")
        asked = [one["time"] for one in questions], [one["first_token_ms"] for one in questions]
        _late(firsts, *asked, options["target_first_token_ms"])
        firsts.set_ylabel("first token, ms")
        every = [value for one in frames for value in (one["budget"], one["visual_tokens"], one["kv_tokens"]) if value]
        if not _log_y(tokens, every):
            tokens.set_ylim(bottom=0)
        firsts.set_xlabel("seconds of the stream")
        firsts.set_xlim(0, max(result["seconds"], *at))
        for axes in sheet.axes:
            axes.grid(axis="y", linewidth=0.8)
            if slow:
                axes.axvline(slow["after_s"], color=STAND_IN["muted"], linewidth=1.2, linestyle=":")
            for one in decisions:
                axes.axvline(one["time"], color=STAND_IN["c7"], linewidth=1, alpha=0.7)
        span = max(result["seconds"], *at) * (0.05 if narrow else 0.02)
        for label, when in _clusters([one["time"] for one in decisions], span):
            tokens.annotate(label, (when, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                            ha="center", color=STAND_IN["c7"], fontsize="small", fontweight="bold")  # fmt: skip
        sheet.figure.align_ylabels()
        return sheet

    return draw


def _late(axes: Any, at: Sequence[float], values: Sequence[float], target: float | None) -> None:
    """Dots, those above the target in another colour and shape."""
    late = [value > target if target is not None else False for value in values]
    for above, role, mark in ((False, "c1", "o"), (True, "late", "D")):
        x = [a for a, one in zip(at, late, strict=True) if one is above]
        y = [v for v, one in zip(values, late, strict=True) if one is above]
        axes.plot(x, y, mark, ms=4.5, mew=0, color=STAND_IN[role])
    every = [*values, *([target] if target is not None else [])]
    if not every or not _log_y(axes, every):
        axes.set_ylim(0, 1.2 * max(every, default=0.0) or 1)
    if target is not None:
        axes.axhline(target, color=STAND_IN["late"], linestyle="--", linewidth=1.2)
        # Above the axes, where no dot can be.
        axes.set_title(f"target {target:g} ms", loc="right", color=STAND_IN["late"], fontsize="small", pad=3)


def _log_y(axes: Any, values: Sequence[float]) -> bool:
    """A logarithmic axis where one value would flatten all others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    if low <= 0 or (high / float(np.median(values)) < 20 and high / low < 100):
        return False
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return True


def _clusters(times: Sequence[float], span: float) -> list[tuple[str, float]]:
    """Number the decisions from 1; those nearer than `span` share one label."""
    groups: list[list[int]] = []
    for index, at in enumerate(times):
        if groups and at - times[groups[-1][0]] < span:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [
        (f"{group[0] + 1}–{group[-1] + 1}" if len(group) > 1 else f"{group[0] + 1}", times[group[0]])
        for group in groups
    ]


def over_time(lines: Sequence[tuple[str, Sequence[Sequence[float]]]], least: float) -> Draw:
    """One panel for each (label, [[seconds, value], …]); an axis spans at least `least`."""

    def draw(narrow: bool) -> Sheet:
        sheet = new_sheet(narrow, [190] * len(lines), sharex=True)
        for role, axes, (label, samples) in zip(("c1", "c2"), sheet.axes, lines, strict=False):
            at, values = np.array(samples, float).T
            axes.plot(at, values, color=STAND_IN[role], linewidth=2)
            low, high = values.min(), values.max()
            pad = max(0.1 * (high - low), (least - (high - low)) / 2)
            axes.set_ylim(max(0.0, low - pad), high + pad)
            axes.ticklabel_format(axis="y", useOffset=False, style="plain")
            axes.set_ylabel(label)
            axes.grid(axis="y", linewidth=0.8)
            axes.set_xlim(0, at[-1])
        sheet.axes[-1].set_xlabel("seconds")
        sheet.figure.align_ylabels()
        return sheet

    return draw


def number(value: float | None) -> str:
    """Format a number with about three significant digits."""
    if value is None:
        return "–"
    if not value:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
