"""Answers right against latency target: what a user of a stream decides by, for machines of several speeds.

    penguin-edge export --model nano --target onnx -o out/nano
    penguin-edge data nano --split heldout --side 168 --seed 201 --count 320 \
        --tasks motion,scene_change,before_cut,order -o DIR
    python bench/peers/answers_by_target.py out/nano --data DIR --json by-target.json -o docs/answers-by-target.png

For each speed, target and mode it runs `penguin-edge bench --stream --target-first-token` on penguin-nano's own clips,
and takes the settings that the control holds over the last `--last` seconds, and the share of deadlines that are missed
meanwhile. Then it asks the questions in these settings (`clip_questions.py`), and weighs them by the time that each is
held. The window has as many frames as the clip of a question, and the budget is their native tokens, so that shares
mean the same in both.

`dropping` is a stream whose frames all keep native size: it has the last N of every so many frames, and N and the rate
give way. A small budget alone would not do, since a stream shrinks older frames before it drops them. So each such
setting runs without a control, and `--window`, `--budget` and `--fps` make it. For a target, the one counts that
answers best of those that miss 1 % of their deadlines at most, first seconds aside.

Targets are milliseconds at speed 1, and times the factor on a slower machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from clip_questions import Outcome, Way, ask, frames_of, mean, read_questions
from stream_runs import Machine, Scene, bench, held, largest_frame, missed, write_clip

from penguin_edge.commands.common import open_model
from penguin_edge.config import PATCH
from penguin_edge.evaluation.score import wilson
from penguin_edge.files import write_picture
from penguin_edge.runtime.latency.control import ALLOWED
from penguin_edge.runtime.latency.profile import PROFILE

MODES = ("strict", "adaptive")
DROPPING = ((8, 1), (6, 1), (4, 1), (3, 1), (2, 1), (1, 1), (4, 2), (3, 2), (2, 2), (1, 2), (2, 4), (1, 4))
"""Frames that are kept, and every so many of which one is taken."""
COLD_S = 3.0
"""Seconds in which a stream without a control may still be warming up; its misses do not count."""
CLIPS = 32
"""Clips that make the stream's one."""
COLOURS = {"strict": "#d9622b", "adaptive": "#8a4fb0", "dropping": "#4f81b0"}


@dataclass
class Point:
    """One target of one mode on one machine: ways with their weights, and shares of deadlines missed, in percent, over
    the last seconds and over the whole run. No ways: the target cannot be kept."""

    speed: float
    target_ms: float
    mode: str
    ways: list[tuple[Way, float]] = field(default_factory=list)
    missed: float | None = None
    missed_in_all: float | None = None
    settings: list[dict[str, Any]] = field(default_factory=list)
    message: str = ""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def steered(machine: Machine, scene: Scene, target_ms: float, mode: str, last: float) -> Point:
    """What the control does under a target, and holds over the last seconds."""
    options = ["--fps", scene.fps, "--window", scene.window_s(scene.count), "--budget", scene.count * scene.native]
    result = bench(machine, scene, *options, "--tra", mode, "--target-first-token", target_ms)
    if isinstance(result, str):
        return Point(machine.speed, target_ms, mode, message=result)
    return Point(
        machine.speed,
        target_ms,
        mode,
        missed=missed(result, target_ms, result["seconds"] - last),
        missed_in_all=missed(result, target_ms),
        settings=[setting | {"held": share} for setting, share in held(result, scene, last)],
    )


def dropping_runs(
    machine: Machine, scene: Scene, settings: Sequence[tuple[int, int]]
) -> list[tuple[Way, dict[str, Any]]]:
    """Every setting of a stream that drops frames, and what was measured of it."""
    runs = []
    for frames, stride in settings:
        say(f"speed {machine.speed:g}: dropping, every {stride}, the last {frames}")
        options = ["--fps", scene.fps / stride, "--window", scene.window_s(frames, stride)]
        result = bench(machine, scene, *options, "--budget", frames * scene.native, "--tra", "strict")
        if isinstance(result, str):
            raise SystemExit(result)
        runs.append((Way(stride=stride, newest=frames), result))
    return runs


def dropping_point(
    args: argparse.Namespace,
    speed: float,
    target_ms: float,
    runs: Sequence[tuple[Way, dict[str, Any]]],
    answers: dict[Way, Outcome],
) -> Point:
    """The setting that answers best of those that keep the target; none may."""
    kept = [(way, result) for way, result in runs if (missed(result, target_ms, COLD_S) or 0.0) <= 100 * ALLOWED]
    if not kept:
        return Point(speed, target_ms, "dropping", message="no setting keeps the target")
    way, result = max(kept, key=lambda one: mean(answers[one[0]].right))
    late = missed(result, target_ms, result["seconds"] - args.last)
    settings = [{"frames": way.newest, "stride": way.stride, "held": 1.0}]
    return Point(speed, target_ms, "dropping", [(way, 1.0)], late, missed(result, target_ms), settings)


def entry(point: Point, answers: dict[Way, Outcome]) -> dict[str, Any]:
    """A point with its accuracy, for JSON."""
    found: dict[str, Any] = {
        "speed": point.speed,
        "target_ms": point.target_ms,
        "mode": point.mode,
        "settings": point.settings,
        "missed_percent": point.missed,
        "missed_percent_in_all": point.missed_in_all,
        "message": point.message,
        "accuracy": None,
    }
    if point.ways:
        outcomes = [(answers[way], weight) for way, weight in point.ways]
        right = sum(mean(outcome.right) * weight for outcome, weight in outcomes)
        found["accuracy"] = right
        found["ci95"] = list(wilson(right, len(outcomes[0][0].right)))
        found["tokens"] = sum(mean(outcome.tokens) * weight for outcome, weight in outcomes)
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All points."""
    engine, tokenizer = open_model(args.model, threads=1, max_seq_len=2048)
    factor = PATCH * engine.config.image.video_merge_size
    questions = read_questions(args.data, args.count)
    clips = [frames_of(question, engine.config) for question in islice(questions, CLIPS)]
    height, width = clips[0][0].pixels.shape[:2]
    scene = Scene(folder / "clip.mp4", (height, width), len(clips[0]), args.fps, factor, args.duration)
    write_clip(scene.clip, [frame for clip in clips for frame in clip], scene.fps)
    if not (args.bundle / PROFILE).exists():
        say("a profile first")
        subprocess.run([sys.executable, "-m", "penguin_edge", "profile", str(args.bundle)], check=True)
    points: list[Point] = []
    dropped: dict[float, list[tuple[Way, dict[str, Any]]]] = {}
    for speed in args.speeds:
        machine = Machine(args.bundle, speed, args.threads)
        for target in args.targets:
            for mode in MODES:
                point = steered(machine, scene, target * speed, mode, args.last)
                points.append(point)
                say(f"speed {speed:g}, {point.target_ms:g} ms, {mode}: {point.settings or point.message}")
        dropped[speed] = dropping_runs(machine, scene, args.dropping)
    for point in points:
        for setting in point.settings:
            largest = largest_frame(engine, tokenizer, scene, setting["frame_tokens"])
            point.ways.append((scene.way(setting, point.mode, largest), setting["held"]))
    ways = [way for point in points for way, _ in point.ways]
    ways += [way for runs in dropped.values() for way, _ in runs]
    answers = ask(engine, tokenizer, questions, [Way(), *ways])
    points += [
        dropping_point(args, speed, target * speed, dropped[speed], answers)
        for speed in args.speeds
        for target in args.targets
    ]
    return {
        "count": len(questions),
        "native": mean(answers[Way()].right),
        "window": {"frames": scene.count, "tokens": scene.count * scene.native, "fps": scene.fps},
        "duration_s": args.duration,
        "points": [entry(point, answers) for point in points],
        "dropping": [
            {
                "speed": speed,
                "frames": way.newest,
                "stride": way.stride,
                "accuracy": mean(answers[way].right),
                "frame_age_ms": result["frame_age_ms"],
                "first_token_ms": result["first_token_ms"]["warm"],
            }
            for speed, runs in dropped.items()
            for way, result in runs
        ],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy above, missed deadlines below; one column per speed, one line per mode. A cross at the bottom: the mode
    cannot keep that target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    speeds = sorted({point["speed"] for point in result["points"]})
    most = max([5.0, *(1.1 * (point["missed_percent"] or 0.0) for point in result["points"])])
    size = (4.2 * len(speeds), 4.6)
    figure = Figure(figsize=size, dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(speeds), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 1))
    for column, speed in enumerate(speeds):
        upper, lower = rows[0][column], rows[1][column]
        upper.axhline(result["native"], color="#777777", linestyle=":", linewidth=1, label="all frames native")
        ticks = sorted({point["target_ms"] for point in result["points"] if point["speed"] == speed})
        for mode, colour in COLOURS.items():
            points = [one for one in result["points"] if one["speed"] == speed and one["mode"] == mode]
            failed = [one["target_ms"] for one in points if one["accuracy"] is None]
            if failed:
                upper.plot(failed, [0.0] * len(failed), "x", color=colour, clip_on=False)
            points = sorted((one for one in points if one["accuracy"] is not None), key=lambda one: one["target_ms"])
            if not points:
                continue
            at = [one["target_ms"] for one in points]
            upper.plot(at, [one["accuracy"] for one in points], ".-", color=colour, label=mode)
            upper.fill_between(at, *zip(*(one["ci95"] for one in points), strict=True), color=colour, alpha=0.1, lw=0)
            lower.plot(at, [one["missed_percent"] or 0.0 for one in points], ".-", color=colour)
        upper.set_xscale("log")
        upper.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        upper.minorticks_off()
        upper.set_ylim(0, 1.02)
        lower.set_ylim(0, most)
        upper.set_title("this machine" if speed == 1 else f"{speed:g} times slower", fontsize=10, loc="left")
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("answers right")
    rows[1][0].set_ylabel("missed, %")
    named = rows[0][0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    figure.supxlabel("latency target: first token, and age of a frame, ms", fontsize=10)
    write_picture(path, figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, metavar="DIR", help="questions, and the clips that are streamed")
    parser.add_argument("--model", default="nano", help="what answers the questions (default: %(default)s)")
    parser.add_argument("--count", type=int, help="questions (default: all)")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 4.0, 16.0], metavar="FACTOR")
    parser.add_argument("--targets", type=float, nargs="+", default=[8.0, 12.0, 18.0, 27.0, 40.0], metavar="MS")
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--duration", type=float, default=25.0, metavar="S", help="of each run")
    parser.add_argument("--last", type=float, default=10.0, metavar="S", help="over which settings count")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="draw a result again, and measure nothing")
    parser.add_argument("--only-dropping", type=int, default=len(DROPPING), metavar="N", help="try the first N alone")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    args.dropping, args.last = DROPPING[: args.only_dropping], min(args.last, args.duration)
    if args.redraw:
        result = json.loads(args.redraw.read_text(encoding="utf-8"))
    elif args.data:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args, Path(folder))
    else:
        parser.error("name --data DIR, or --redraw FILE")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.out:
        draw(result, args.out)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
