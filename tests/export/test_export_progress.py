"""What an export says while it works: stages, shares of the work, and the time left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penguin_edge.commands import export as command
from penguin_edge.export import worker
from penguin_edge.export.jobs import Origin, PartJob
from penguin_edge.export.pipeline import ExportOptions, expected_seconds, parts_of
from penguin_edge.export.stages import (
    CHECK,
    LOAD,
    START,
    START_SECONDS,
    VERIFY,
    Follower,
    Teller,
    TimeLeft,
    WorkStage,
    part_stages,
    progress_line,
    seconds_of,
)
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.quantize.recipe import PRESETS


def opened(model: str) -> Checkpoint:
    return Checkpoint.open(model, random_weights=True, note=lambda line: None)


def names(lines: list[str]) -> list[str]:
    return [line.split(" ", 4)[4] for line in lines]


def test_a_worker_says_every_stage_once_and_in_order() -> None:
    lines: list[str] = []
    stages = [
        WorkStage(START, 2),
        WorkStage(LOAD, 3),
        WorkStage("decoder.a", 1),
        WorkStage("decoder.b", 1),
        WorkStage(CHECK, 5),
    ]
    teller = Teller(stages, lines.append)
    for name in (LOAD, "no stage", "decoder.a", "decoder.b", LOAD, CHECK):
        teller.begin(name)
    assert lines == [
        "progress 2 3 12 load",
        "progress 5 1 12 quantize layer 1 of 2",
        "progress 6 1 12 quantize layer 2 of 2",
        "progress 7 5 12 check data",
    ]


def test_a_parent_reads_the_last_whole_line_and_goes_on_within_its_stage(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    follower = Follower(log, 12.0)
    assert follower.look(1.0) == ("", pytest.approx(1 / 12))
    assert follower.look(60.0) == ("", pytest.approx(START_SECONDS / 12)), "not beyond what lies before the first line"
    log.write_text("a note\nprogress 2 3 12 load\nprogress 5 1")
    assert follower.look(60.0) == ("load", pytest.approx(2 / 12))
    # 2 expected seconds took 60: the next one takes 30.
    assert follower.look(90.0) == ("load", pytest.approx(3 / 12))
    assert follower.look(900.0) == ("load", pytest.approx(5 / 12))
    log.write_bytes(b"progress 2 3 12 load\n\xff\nprogress 5 1 12 layer 1 of 2\nTraceback:\n" + b"x" * 999)
    assert follower.look(900.0) == ("layer 1 of 2", pytest.approx(5 / 12))


def test_a_parent_says_nothing_of_a_part_that_says_nothing(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "log.txt", None)
    assert follower.look(5.0) == ("", None)
    (tmp_path / "log.txt").write_text(
        "0/60 no line of ours\n" + progress_line(20, 1, 60, "20/60 decoder.layers.4") + "\n"
    )
    stage, share = follower.look(30.0)
    assert stage == "20/60 decoder.layers.4" and share == pytest.approx(1 / 3)
    assert TimeLeft().left("calibration", 30.0, share) == pytest.approx(60.0)


@pytest.mark.parametrize(("quant", "target"), [("int4", "onnx"), ("fp32", "executorch"), ("int8-prefill", "onnx")])
@pytest.mark.parametrize("speed", [0.2, 1.0, 7.0])
def test_the_time_left_is_right_after_a_quarter(quant: str, target: str, speed: float, tmp_path: Path) -> None:
    """On a machine of another speed, and with kinds of stages that take up to a quarter more or less than expected."""
    checkpoint, options = opened("2b"), ExportOptions(target, PRESETS[quant])
    expected = expected_seconds(checkpoint, TARGETS[target], options)
    rng, log = np.random.default_rng(0), tmp_path / "log.txt"
    factors: dict[str, float] = {}
    work: dict[str, list[tuple[WorkStage, float]]] = {}
    for part in expected:
        whole = [WorkStage(VERIFY, expected[part])]
        stages = whole if part == VERIFY else part_stages(checkpoint, part, options.recipe, TARGETS[target].compiles)
        for stage in stages:
            factors.setdefault(kind(stage), float(rng.uniform(0.8, 1.25)))
        work[part] = [(stage, speed * stage.seconds * factors[kind(stage)]) for stage in stages]
    total = sum(seconds for stages in work.values() for _, seconds in stages)
    time_left, clock, checked = TimeLeft(), 0.0, 0
    time_left.plan(expected)
    for part, stages in work.items():
        log.unlink(missing_ok=True)
        lines: list[str] = []
        teller = Teller([stage for stage, _ in stages], lines.append)
        follower = Follower(log, None if part == VERIFY else expected[part])
        began = clock
        for stage, seconds in stages:
            if stage.name not in (START, VERIFY):
                teller.begin(stage.name)
                log.write_text("\n".join(lines) + "\n")
            for moment in np.linspace(clock, clock + seconds, 4, endpoint=False):
                _, share = follower.look(moment - began)
                left = time_left.left(part, moment - began, share)
                if 0.25 * total <= moment:
                    assert left is not None and abs(left - (total - moment)) <= 0.3 * (total - moment) + 0.02 * total
                    checked += 1
            clock += seconds
        time_left.done(part, clock - began)
    assert checked > 50 and time_left.left(part, clock - began, 1) == 0


def kind(stage: WorkStage) -> str:
    """Stages of one kind are off by the same factor: all layers, all tokens."""
    return "layer" if "." in stage.name else stage.name.split(":")[0]


def test_what_is_expected_covers_every_part() -> None:
    # An int4 head that the table shares is one file for ONNX Runtime alone.
    for quant, target, skipped in (
        ("int4", "onnx", True),
        ("int4", "executorch", False),
        ("int8", "onnx", False),
        ("fp16", "executorch", False),
    ):
        checkpoint, options = opened("2b"), ExportOptions(target, PRESETS[quant])
        found = expected_seconds(checkpoint, TARGETS[target], options)
        parts = [p for p in parts_of(checkpoint, options.recipe) if p != "embedding" or not skipped]
        assert list(found) == [*parts, VERIFY] and all(seconds > 1 for seconds in found.values())
        quiet = ExportOptions(target, PRESETS[quant], verify=False)
        assert VERIFY not in expected_seconds(checkpoint, TARGETS[target], quiet)


@pytest.mark.parametrize(("part", "quant"), [("projector", "fp32"), ("decoder", "int4"), ("embedding", "int8")])
def test_a_worker_goes_through_the_stages_that_were_foretold(
    part: str, quant: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, recipe, target = opened("tiny"), PRESETS[quant], TARGETS["onnx"]
    job = PartJob(Origin("tiny", 0, True, "onnx"), part, recipe, None, "int8", target.bounds(128), tmp_path)
    if part != "embedding":
        before = [name for name in ("encoder", "projector") if name != part]
        for earlier in before[: 1 if part == "projector" else 2]:
            worker.export_part(replace(job, part=earlier))
    capfd.readouterr()
    worker.export_part(job)
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("progress ")]
    stages = part_stages(checkpoint, part, recipe, False)
    assert len(said) == len(stages) - 1, "all but the start, of which a parent knows itself"
    at = [float(line.split()[1]) for line in said]
    assert at == pytest.approx([seconds_of(stages[:index]) for index in range(1, len(stages))], rel=1e-4)
    layers = [stage.name for stage in stages if "." in stage.name]
    assert len([name for name in names(said) if name.startswith("quantize layer")]) == len(layers)


def test_lines_of_a_log_are_few_and_say_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    time_left = TimeLeft()
    lines = command.Lines(2, time_left)
    lines.plan({"encoder": 50.0, "verify": 50.0})
    lines.begin("encoder", 900)
    for second in range(101):
        lines.tick("encoder", float(second), 500.0, "quantize layer 3 of 9", second / 100)
    lines.done("encoder", 100.0, 600.0)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "[1/2] encoder …",
        "[1/2] encoder: quantize layer 3 of 9, 30 s, 500 of at most 900 MB, about 170 s left",
        "[1/2] encoder: quantize layer 3 of 9, 60 s, 500 of at most 900 MB, about 140 s left",
        "[1/2] encoder: quantize layer 3 of 9, 90 s, 500 of at most 900 MB, about 110 s left",
        "[1/2] encoder: 100.0 s, peak 600 MB, about 100 s left",
    ]
    lines.begin("verify", 0)
    lines.done("verify", 80.0, 0)
    assert capsys.readouterr().err.splitlines() == ["[2/2] verify …", "[2/2] verify: 80.0 s, peak 0 MB"]


def test_a_terminal_has_one_line_that_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    lines = command.Lines(1, TimeLeft())
    lines.begin("decoder", 900)
    for second in range(3):
        lines.tick("decoder", float(second), 500.0, "quantize layer 3 of 9", None)
    shown = capsys.readouterr().err
    assert "\n" not in shown and shown.count("\r\x1b[K[1/1] decoder: quantize layer 3 of 9") == 3
    assert max(len(line) for line in shown.split("\r\x1b[K")) <= 39
