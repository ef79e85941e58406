"""Accuracy against token budget: TRA beside dropping frames and beside shrinking all of them.

Each clip gets the same share of its own native tokens from every policy:

| policy   | what gives way                                                                           |
|----------|------------------------------------------------------------------------------------------|
| tra      | the strict plan of `penguin_edge.tra.clip`: intermediate frames before key frames        |
| adaptive | the adaptive plan: as strict, but frames are dropped before key frames become illegible  |
| drop     | frames: those that are left are evenly spaced, the first among them, at native size      |
| shrink   | detail: all frames at the same smaller size of the same ladder of sizes that TRA uses    |
| prune    | tokens: adaptive plans of which each frame keeps a share; its budget counts what is kept |

`prune` is asked for by itself, with the share that is kept. Only below one frame does `drop` shrink it, and only below
one token each does `shrink` drop frames. Time stamps are text and outside of the budget, so a policy that drops frames
has the shorter prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from penguin_edge.config import PATCH, PenguinConfig
from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.evaluation.score import (
    CountProgress,
    Question,
    Training,
    answer_tokens,
    by_media,
    difference,
    score,
)
from penguin_edge.files import write_picture
from penguin_edge.prompt.chat import Message, part_kind
from penguin_edge.tra.clip import DROPPED, KEY, FramePlan, Mode, Plan, Policy, plan_clip, size_ladder

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Shares of a clip's native tokens."""
COLOURS = {"tra": "#d9622b", "adaptive": "#8a4fb0", "drop": "#4f81b0", "shrink": "#5a9367", "prune": "#c2a11b"}
LABELS = {
    "tra": "TRA, strict",
    "adaptive": "TRA, adaptive",
    "drop": "drop frames",
    "shrink": "shrink all frames",
    "prune": "TRA, adaptive, tokens kept in part",
}
MODES: dict[str, Mode] = {"tra": "strict", "adaptive": "adaptive"}
"""The mode of `plan_clip` behind a policy's name."""


@dataclass(frozen=True)
class Reply:
    """An answer, and what its clips cost: visual tokens in the decoder, frames that were kept, and visual tokens that
    the encoder gave (None: the same)."""

    text: str
    tokens: int
    frames: int
    encoded: int | None = None


Ask = Callable[[Sequence[Message], int, Policy], Reply]
"""(messages, most tokens to decode, policy) -> reply."""


@dataclass(frozen=True)
class Prune:
    """The share of each frame's tokens that the policy `prune` keeps, and what asks a session that does so."""

    keep: float
    ask: Ask


def _uniform(kept: Sequence[int], n: int, step: tuple[int, int], budget: int, factor: int, name: str) -> Plan:
    """`kept` of `n` frames, all on one step (rows, columns) of the ladder."""
    rows, columns = step
    frame = FramePlan(KEY, columns * factor, rows * factor, rows * columns)
    frames = tuple(frame if i in set(kept) else FramePlan(DROPPED, 0, 0, 0) for i in range(n))
    return Plan(frames, budget, factor, name, name)


def _spread(n: int, keep: int) -> list[int]:
    """`keep` of `n` places from the first to the last, as the loader thins out too long a clip; one is the first."""
    return [i * (n - 1) // (keep - 1) for i in range(keep)] if keep > 1 else [0]


def drop_frames(kinds: Sequence[str], size: tuple[int, int], budget: int, merge_size: int) -> Plan:
    """As many evenly spaced frames at native size as fit; see the top of this file."""
    factor = PATCH * merge_size
    ladder = size_ladder(*size, factor)
    native = math.prod(ladder[-1])
    keep = min(len(kinds), max(1, budget // native))
    step = max((step for step in ladder if math.prod(step) <= budget), key=math.prod)
    return _uniform(_spread(len(kinds), keep), len(kinds), step, budget, factor, "drop")


def shrink_frames(kinds: Sequence[str], size: tuple[int, int], budget: int, merge_size: int) -> Plan:
    """All frames at the largest common size that fits; see the top of this file."""
    factor = PATCH * merge_size
    keep = min(len(kinds), budget)
    step = max((step for step in size_ladder(*size, factor) if keep * math.prod(step) <= budget), key=math.prod)
    return _uniform(_spread(len(kinds), keep), len(kinds), step, budget, factor, "shrink")


def policies(config: PenguinConfig, keep: float | None = None) -> dict[str, Policy]:
    """The policies for a model, by name; `prune` among them where the share that it keeps is given."""

    def tra(
        mode: Mode, kept: float | None, kinds: Sequence[str], size: tuple[int, int], budget: int, merge_size: int
    ) -> Plan:
        return plan_clip(
            len(kinds),
            kinds,
            size,
            budget,
            mode=mode,
            min_tokens=config.image.min_tokens,
            merge_size=merge_size,
            config=config.tra,
            keep=kept,
        )

    plans: dict[str, Policy] = {name: partial(tra, mode, None) for name, mode in MODES.items()}
    plans |= {"drop": drop_frames, "shrink": shrink_frames}
    return plans if keep is None else {**plans, "prune": partial(tra, "adaptive", keep)}


def within(policy: Policy, share: float) -> Policy:
    """The policy under a share of each clip's native tokens, at least one token."""

    def shared(kinds: Sequence[str], size: tuple[int, int], budget: int, merge_size: int) -> Plan:
        native = len(kinds) * math.prod(size_ladder(*size, PATCH * merge_size)[-1])
        return policy(kinds, size, max(1, min(budget, int(share * native))), merge_size)

    return shared


def about_clips(questions: Sequence[Question]) -> list[Question]:
    """The questions whose media are clips alone.

    Raises:
        InputError: there are none.
    """

    def kinds(question: Question) -> set[str]:
        contents = [message["content"] for message in question.messages]
        return {part_kind(part) for content in contents if not isinstance(content, str) for part in content}

    found = [question for question in questions if kinds(question) - {"text"} == {"video"}]
    if not found:
        raise InputError("a budget study needs questions about clips, and the data set has none")
    return found


def study(
    questions: Sequence[Question],
    ask: Ask,
    config: PenguinConfig,
    *,
    training: Training | None = None,
    shares: Sequence[float] = SHARES,
    progress: CountProgress | None = None,
    prune: Prune | None = None,
) -> dict[str, Any]:
    """Answer every question about clips under every policy and share.

    Args:
        prune: asks under the policy of this name, too.
    Returns:
        `score` of the strict plans under the first share; `budget_study`, a list with one entry per policy and share:
        `policy`, `share`, mean `visual_tokens`, `encoded_tokens` and `frames` per question, `accuracy` over all
        questions with its `interval`, `tasks` (name -> accuracy), and `over_tra`, `over_drop` and `over_adaptive`:
        accuracy minus that of the strict plans, of dropping frames and of the adaptive plans under the same share, with
        the 95 % interval [difference, low, high] of paired questions; `study`, its numbers by share and mode:
        `accuracy`, `count` of questions, mean visual `tokens`, and for `prune` `over_adaptive`; and `keep_visual`, the
        share that `prune` keeps, or None.
    Raises:
        InputError: no questions about clips.
    """
    questions = about_clips(questions)
    known = policies(config, prune.keep if prune else None)
    asked = {name: prune.ask if prune and name == "prune" else ask for name in known}
    runs = [(name, share) for share in shares for name in known]
    fitted = {run: within(known[run[0]], run[1]) for run in runs}
    longest = answer_tokens(questions)
    replies: dict[tuple[str, float], list[Reply]] = {run: [Reply("", 0, 0)] * len(questions) for run in runs}
    done = 0
    for i in by_media(questions):
        for run in runs:
            try:
                replies[run][i] = asked[run[0]](questions[i].messages, longest[questions[i].task], fitted[run])
            except InputError as error:
                raise InputError(f"{questions[i].record}: {error}") from error
            done += 1
            if progress:
                progress(done, len(runs) * len(questions))
    pooled = [replace(question, task="clips") for question in questions]
    entries = []
    table: dict[str, dict[str, Any]] = {f"{share:g}": {} for share in shares}
    for name, share in runs:
        given = replies[name, share]
        texts = [reply.text for reply in given]
        whole = score(pooled, texts, training={})["tasks"]["clips"]
        tasks = score(questions, texts, training={})["tasks"]
        tokens = sum(reply.tokens for reply in given) / len(given)
        over = {
            f"over_{other}": difference(questions, texts, [reply.text for reply in replies[other, share]])
            for other in ("tra", "drop", "adaptive")
        }
        row = {"accuracy": whole["accuracy"], "count": len(given), "tokens": tokens}
        if name == "prune":
            row["over_adaptive"] = over["over_adaptive"]
        table[f"{share:g}"][MODES.get(name, name)] = row
        entries.append(
            {
                "policy": name,
                "share": share,
                "visual_tokens": tokens,
                "encoded_tokens": sum(reply.tokens if reply.encoded is None else reply.encoded for reply in given)
                / len(given),
                "frames": sum(reply.frames for reply in given) / len(given),
                "accuracy": whole["accuracy"],
                "interval": whole["interval"],
                "tasks": {task: row["accuracy"] for task, row in tasks.items()},
                **over,
            }
        )
    first = [reply.text for reply in replies["tra", shares[0]]]
    kept = prune.keep if prune else None
    return {
        **score(questions, first, training=training),
        "budget_study": entries,
        "study": table,
        "keep_visual": kept,
    }


def draw_study(result: dict[str, Any], path: str | Path) -> None:
    """Accuracy over budget, one panel for all questions and one per task, with baselines, to a PNG.

    Raises:
        InputError: `path` cannot be written.
        TargetUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TargetUnavailable(f"a picture needs matplotlib ({error}): pip install matplotlib") from error
    tasks = result["tasks"]
    names: list[str | None] = [None, *(tasks if len(tasks) > 1 else ())]
    columns = min(3, len(names))
    figure = Figure(figsize=(4.4 * columns, 3.6 * -(-len(names) // columns)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(-(-len(names) // columns), columns, sharex=True, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, result, name)
    for axes in panels[len(names) :]:
        axes.axis("off")
    panels[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("visual tokens, share of a clip's native tokens", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    write_picture(path, figure)


def _draw_panel(axes: Any, result: dict[str, Any], task: str | None) -> None:
    """One panel: of one task, or of all questions with their intervals."""
    for policy, colour in COLOURS.items():
        entries = [entry for entry in result["budget_study"] if entry["policy"] == policy]
        if not entries:
            continue
        shares = [entry["share"] for entry in entries]
        values = [entry["accuracy"] if task is None else entry["tasks"][task] for entry in entries]
        axes.plot(shares, values, ".-", color=colour, label=LABELS[policy])
        if task is None:
            low, high = zip(*(entry["interval"] for entry in entries), strict=True)
            axes.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
    rows = [result["tasks"][task]] if task else list(result["tasks"].values())
    weights = [row["n"] for row in rows]
    for key, style in (("chance", ":"), ("question_only", "--")):
        level = sum(row[key] * n for row, n in zip(rows, weights, strict=True)) / sum(weights)
        axes.axhline(level, color="#777777", linestyle=style, linewidth=1, label=key.replace("_", " "))
    axes.set_xscale("log", base=2)
    axes.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
    axes.invert_xaxis()
    axes.set_ylim(0, 1.02)
    axes.set_title(task or f"all {sum(weights):,} questions about clips", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
