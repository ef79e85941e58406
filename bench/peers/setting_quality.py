"""What each thing that a stream can give up costs in answers: penguin-nano's questions about clips in every setting.

    penguin-edge data nano --split heldout --side 168 --seed 201 --count 320 \
        --tasks motion,scene_change,before_cut,order -o DIR168
    python bench/peers/setting_quality.py ask --data DIR168 --json 168.json
    python bench/peers/setting_quality.py ask --data DIR168 --real --count 160 --json 168-real.json
    python bench/peers/setting_quality.py table 168.json 84.json 168-real.json 84-real.json

`ask` answers every question in every setting and writes who was right; `table` makes tables of such files, differences
with the paired 95 % interval, and the worth of a setting (`setting_worth.py`) with its errors.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_questions import Outcome, Way, ask, frames_of, mean, over, read_questions
from setting_worth import BUDGETS, FRAMES, errors, fit

from penguin_edge.commands.common import open_model
from penguin_edge.config import PATCH
from penguin_edge.evaluation.score import wilson
from penguin_edge.tra.clip import size_ladder

STRIDES = (2, 4, 8)
STRIDE_BUDGETS, STRIDE_FRAMES = (1.0, 0.5, 0.25, 0.125), (1.0, 16 / 36)
FOLLOWING = (("rebase", "encode"), ("recompute", "pool"), ("rebase", "pool"))
REAL = {(1.0, 1.0): 1, (0.5, 1.0): 3, (0.5, 16 / 36): 3, (0.25, 1.0): 3}
"""Settings that are asked of real streams, and how many ways of following are tried there; nothing shrinks in all."""
ALIKE = (
    (Way(0.5, 1.0), Way(1.0, 16 / 36), Way(1.0, 1.0, 2)),
    (Way(0.25, 1.0), Way(1.0, 9 / 36), Way(1.0, 1.0, 4)),
    (Way(0.125, 1.0), Way(1.0, 4 / 36), Way(1.0, 1.0, 8)),
)
"""Ways to keep about a half, a quarter, an eighth of the tokens: a smaller budget, smaller frames, fewer frames."""


@dataclass(frozen=True)
class Answers:
    """Outcomes of one data set. `ladder`: shares of native that the sizes of its frames have."""

    name: str
    tasks: list[str]
    ladder: list[float]
    found: dict[Way, Outcome]

    @property
    def accuracy(self) -> dict[Way, float]:
        return {way: mean(outcome.right) for way, outcome in self.found.items()}

    def frame(self, way: Way) -> float:
        """Share of native that a way's largest frames have."""
        return max((share for share in self.ladder if share <= way.frame + 1e-3), default=self.ladder[0])

    def row(self, way: Way) -> dict[str, Any]:
        """Accuracy with its interval, tokens and frames, accuracy by task, and differences from other ways, paired."""
        one = self.found[way]
        right = mean(one.right)
        tasks = dict.fromkeys(self.tasks)
        others = {"full": Way(real=way.real), **self.neighbours(way)}
        return {
            "way": asdict(way),
            "frame_share": self.frame(way),
            "accuracy": right,
            "ci95": list(wilson(right, len(one.right))),
            "count": len(one.right),
            "tokens": mean(one.tokens),
            "frames": mean(one.frames),
            "tasks": {
                task: mean([value for value, of in zip(one.right, self.tasks, strict=True) if of == task])
                for task in tasks
            },
            "over": {name: over(one.right, self.found[other].right) for name, other in others.items() if other != way},
        }

    def neighbours(self, way: Way) -> dict[str, Way]:
        """Ways that give up one step less, or follow by encoding and recomputing, by what they give up less of."""
        larger = {
            "budget": replace(way, budget=next((b for b in BUDGETS[::-1] if b > way.budget), way.budget)),
            "frame": replace(way, frame=next((f for f in FRAMES[::-1] if f > way.frame + 1e-3), way.frame)),
            "stride": replace(way, stride=max(1, way.stride // 2)),
            "tra": replace(way, tra="adaptive"),
            "following": replace(way, cache="recompute", shrink="encode"),
        }
        return {name: other for name, other in larger.items() if other != way and other in self.found}


def ways(real: bool) -> list[Way]:
    """What is asked: of windows, or of real streams."""
    if real:
        found = [Way(budget, frame, real=True) for budget, frame in REAL]
        for (budget, frame), count in REAL.items():
            found += [Way(budget, frame, cache=c, shrink=s, real=True) for c, s in FOLLOWING[:count]]
        return found
    found = [Way(budget, frame) for budget in BUDGETS for frame in FRAMES]
    found += [Way(budget, frame, stride) for stride in STRIDES for budget in STRIDE_BUDGETS for frame in STRIDE_FRAMES]
    found += [Way(budget, 1.0, tra="strict") for budget in BUDGETS]
    found += [Way(budget, 1.0, running=False) for budget in BUDGETS]
    return found


def asking(args: argparse.Namespace) -> dict[str, Any]:
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=2048)
    questions = read_questions(args.data, args.count)
    factor = PATCH * engine.config.image.video_merge_size
    height, width = frames_of(questions[0], engine.config)[0].pixels.shape[:2]
    sizes = [rows * columns for rows, columns in size_ladder(height, width, factor)]
    found = ask(engine, tokenizer, questions, ways(args.real))
    return {
        "name": f"{width} by {height} pixels",
        "tasks": [question.task for question in questions],
        "ladder": [tokens / sizes[-1] for tokens in sizes],
        "rows": [{"way": asdict(way), **asdict(outcome)} for way, outcome in found.items()],
    }


def read(path: Path) -> Answers:
    data = json.loads(path.read_text(encoding="utf-8"))
    found = {
        Way(**row["way"]): Outcome(**{name: row[name] for name in ("right", "tokens", "frames")})
        for row in data["rows"]
    }
    return Answers(data["name"], data["tasks"], data["ladder"], found)


def points(difference: list[float]) -> str:
    """A difference in points with its interval."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in difference))


def show(one: Answers) -> None:
    """The tables of one data set whose windows were asked about."""
    shares = [frame for frame in FRAMES if abs(one.frame(Way(1.0, frame)) - frame) < 1e-3]

    def cell(way: Way) -> str:
        return f"{mean(one.found[way].right):.3f}, {mean(one.found[way].tokens):.0f}"

    print(f"\n{one.name}, {len(one.tasks)} questions: accuracy, tokens\n")
    print("| budget | " + " | ".join(f"frames of {100 * share:.0f} %" for share in shares) + " | strict | beginning |")
    print("|---|" + "---|" * (len(shares) + 2))
    for budget in BUDGETS:
        row = [*(Way(budget, share) for share in shares), Way(budget, tra="strict"), Way(budget, running=False)]
        print(f"| {100 * budget:.3g} % | " + " | ".join(map(cell, row)) + " |")
    print()
    for stride in STRIDES:
        found = [f"{way}: {cell(way)}" for way in one.found if way.stride == stride]
        print("\n".join(found))
    print("\nabout as many tokens by budget, by size, by rate; the first one minus the others, in points")
    for less in ALIKE:
        lost = [points(over(one.found[less[0]].right, one.found[way].right)) for way in less[1:]]
        print(f"| {' | '.join(map(cell, less))} | {' | '.join(lost)} |")
    print("\nadaptive minus strict; running minus beginning; in points")
    for budget in BUDGETS:
        pairs = [(Way(budget), Way(budget, tra="strict")), (Way(budget), Way(budget, running=False))]
        lost = [points(over(one.found[a].right, one.found[b].right)) for a, b in pairs]
        print(f"| {100 * budget:.3g} % | {' | '.join(lost)} |")
    print()
    for way in (way for way in one.found if way.tra == "adaptive" and way.running):
        tasks = one.row(way)["tasks"]
        print(f"{way}: " + ", ".join(f"{task} {value:.2f}" for task, value in tasks.items()))


def show_real(one: Answers) -> None:
    """What following costs, of a data set that real streams were asked about."""
    print(f"\n{one.name}, {len(one.tasks)} questions of real streams: accuracy, difference in points")
    for way in one.found:
        row = one.row(way)
        print(f"{way}: {row['accuracy']:.3f}, " + points(row["over"].get("following", [0.0, 0.0, 0.0])))


def table(args: argparse.Namespace) -> dict[str, Any]:
    every = [read(path) for path in args.files]
    real = [one for one in every if all(way.real for way in one.found)]
    sets = [one for one in every if one not in real]
    for one in sets:
        show(one)
    for one in real:
        show_real(one)
    measured = [one.accuracy for one in sets]
    worth = fit(measured, lambda way, i: sets[i].frame(way), [one.accuracy for one in real])
    missed = errors(worth, measured, lambda way, i: sets[i].frame(way))
    print("\nworth: rows are budgets, columns sizes of frames")
    for budget, row in zip(worth.budgets, worth.table, strict=True):
        print(f"| {100 * budget:.3g} % | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    print(f"strides {worth.strides}, rebase {worth.rebase:+.4f}, pool {worth.pool:+.4f}")
    spread: dict[str, dict[str, float]] = {}
    for name, strides in (("every frame", (1,)), ("with a stride", STRIDES)):
        kept = [values for way, values in missed.items() if way.stride in strides]
        for of, found in (("each size", [v for values in kept for v in values]), ("mean", [mean(v) for v in kept])):
            rms = mean([value**2 for value in found]) ** 0.5
            spread[f"{name}, {of}"] = {"rms": rms, "largest": max(map(abs, found))}
    print(json.dumps(spread))
    rows = {f"{one.name}{', real' * (one in real)}": [one.row(way) for way in one.found] for one in every}
    wrong = [{"way": asdict(way), "errors": values} for way, values in missed.items()]
    return {"worth": worth.to_json(), "errors": spread, "errors_by_way": wrong, "measured": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    asked = verbs.add_parser("ask", help="answer every question in every setting")
    asked.add_argument("--data", type=Path, required=True, metavar="DIR")
    asked.add_argument("--model", default="nano")
    asked.add_argument("--count", type=int, help="questions (default: all)")
    asked.add_argument("--real", action="store_true", help="ask real streams, for moving caches and pooling")
    asked.add_argument("--threads", type=int, default=1)
    tables = verbs.add_parser("table", help="tables of what was answered, and the worth of a setting")
    tables.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for verb, make in ((asked, asking), (tables, table)):
        verb.add_argument("--json", type=Path, required=verb is asked, metavar="FILE", help="write the result there")
        verb.set_defaults(make=make)
    args = parser.parse_args()
    result = args.make(args)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
