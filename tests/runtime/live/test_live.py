"""The worker behind a stream: frames never wait, nothing grows, and whatever goes wrong is told once."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLIP, CountingEngine, picture, tiny_tokenizer

from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands import latency
from penguin_edge.errors import BudgetError, InputError, PenguinError
from penguin_edge.runtime.bench.streams import Brake, SlowedEngine
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.latency.control import Decision, LatencyTarget, Setting
from penguin_edge.runtime.latency.cost import AXES, fit
from penguin_edge.runtime.latency.profile import SCHEMA, keep
from penguin_edge.runtime.live.events import Observer, Observers, Ready, Said
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.stream import Stream

SHORT = SamplingOptions(max_new_tokens=4)


class GatedEngine(CountingEngine):
    """Encodes when it is let."""

    def __init__(self) -> None:
        super().__init__(max_seq_len=1024)
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.broken: Exception | None = None
        self.gate.set()

    def encode(self, *arguments: Any) -> Any:
        self.waiting.set()
        assert self.gate.wait(20)
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        return super().encode(*arguments)


def live(**options: Any) -> tuple[Live, GatedEngine]:
    engine = GatedEngine()
    return Live(Stream(engine, tiny_tokenizer()), **options), engine


def held(run: Live, engine: GatedEngine) -> None:
    """The worker stands inside the encoder with one frame."""
    engine.gate.clear()
    engine.waiting.clear()
    run.push(picture(99), 0.0)
    assert engine.waiting.wait(20)


class SteppedEngine(CountingEngine):
    """Begins a call of the encoder for each step that it is let, and counts calls that began."""

    def __init__(self) -> None:
        super().__init__(max_seq_len=1024)
        self.begun, self.steps, self.calls = threading.Semaphore(0), threading.Semaphore(0), 0

    def encode(self, *arguments: Any) -> Any:
        self.calls += 1
        self.begun.release()
        assert self.steps.acquire(timeout=20)
        return super().encode(*arguments)


def test_a_question_is_answered_between_two_slices_of_a_frame() -> None:
    """It waits for one call of the encoder, not for the frame: it is answered while the next call has not begun."""
    options = SamplingOptions(max_new_tokens=4)

    def stream() -> Stream:
        engine = SteppedEngine()
        for _ in range(100):
            engine.steps.release()
        return Stream(engine, tiny_tokenizer(), budget=90, tra="strict")

    alone, frames = stream(), [(picture(i // 3, 280, 280), i / 2) for i in range(20)]
    for sliced, (pixels, at) in enumerate(frames):  # noqa: B007
        before = alone.engine.calls  # type: ignore[attr-defined]
        alone.push(pixels, at)
        if alone.engine.calls - before > 1:  # type: ignore[attr-defined]
            break
    else:
        raise AssertionError("no frame made others smaller")
    ask = partial(Stream.ask, prompt="What?", options=options)
    wanted = stream()
    for pixels, at in frames[:sliced]:
        wanted.push(pixels, at)
    text = "".join(token.text for token in ask(wanted))

    session = stream()
    engine = session.engine
    assert isinstance(engine, SteppedEngine)
    with Live(session, queued=20) as run:
        for pixels, at in frames[:sliced]:
            run.push(pixels, at)
        run.wait()
        while engine.steps.acquire(blocking=False):
            pass
        while engine.begun.acquire(blocking=False):
            pass
        run.push(*frames[sliced])
        assert engine.begun.acquire(timeout=20), "the first call has begun"
        answer = run.ask("What?", options=options)
        engine.steps.release()
        assert "".join(token.text for token in answer) == text, "about the frames before"
        assert run.stats.processed == sliced, "the frame is not ready"
        for _ in range(20):
            engine.steps.release()
        run.wait()
        assert run.stats.processed == sliced + 1 and list(session.times) == [at for _, at in frames[: sliced + 1]]


def test_what_comes_is_what_a_session_answers() -> None:
    run, _ = live(queued=10)
    alone = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer())
    with run:
        for i in range(5):
            run.push(picture(i), float(i))
            alone.push(picture(i), float(i))
        run.wait()
        got = [token.id for token in run.ask("What is it?", options=SHORT)]
    assert got == [token.id for token in alone.ask("What is it?", options=SHORT)]
    assert run.stats.processed == 5 and len(run.stats.age_ms) == 5 and not run.stats.dropped
    assert run.status()["visual_tokens"] == alone.visual_tokens


def test_a_full_queue_gives_up_its_oldest_frame() -> None:
    run, engine = live(queued=3)
    with run:
        held(run, engine)
        for i in range(1, 11):
            assert run.push(picture(i), float(i))
        # The worker still stands in the encoder with the first frame: none of them waited for it.
        assert run.stats.processed == 0 and not engine.gate.is_set()
        assert run.stats.dropped == {"queue": 7}
        engine.gate.set()
        run.wait()
        assert run.stream.times == [0.0, 8.0, 9.0, 10.0] and run.stats.dropped == {"queue": 7}
    assert run.stats.frames_in == run.stats.processed + sum(run.stats.dropped.values())


def test_the_callers_buffer_may_be_written_again() -> None:
    run, engine = live()
    buffer = picture(1).copy()
    with run:
        held(run, engine)
        run.push(buffer, 1.0)
        buffer[:] = 0
        engine.gate.set()
        run.wait()
        assert run.stream.frames[1].pixels.any()


def test_frames_beyond_the_rate_are_given_up() -> None:
    run, _ = live(fps=2.0, queued=100)
    with run:
        taken = [run.push(picture(i % 3), i / 10) for i in range(30)]
        run.wait()
    assert sum(taken) == 6 and run.stats.dropped == {"rate": 24}
    assert run.stream.times == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_one_question_at_a_time_and_before_frames_that_wait() -> None:
    run, engine = live()
    with run:
        held(run, engine)
        run.push(picture(1), 1.0)
        asked = run.ask("What is it?", options=SHORT)
        with pytest.raises(InputError, match="another question"):
            run.ask("And this?")
        engine.gate.set()
        assert len(list(asked)) == 4 and run.stream.report.frames == 1
        run.wait()
        assert run.stream.times == [0.0, 1.0]
        assert list(run.ask("And now?", options=SHORT)) and run.stream.report.frames == 2


def test_an_answer_that_is_closed_frees_the_stream() -> None:
    run, _ = live()
    with run:
        run.push(picture(1), 1.0)
        run.wait()
        asked = run.ask("What is it?", options=SamplingOptions(max_new_tokens=100))
        next(asked)
        asked.close()
        run.wait()
        assert list(run.ask("And now?", options=SHORT))


def test_errors_are_raised_by_the_next_call_once_and_the_stream_goes_on() -> None:
    run, engine = live()
    with run:
        run.push(np.zeros((4, 4), np.uint8), 0.0)
        with pytest.raises(InputError, match="RGB"):
            run.wait()
        run.push(picture(1), 1.0)
        run.wait()
        engine.broken = ZeroDivisionError("inside")
        run.push(picture(2), 2.0)
        with pytest.raises(PenguinError, match=r"ZeroDivisionError: inside"):
            run.wait()
        run.push(picture(3), 3.0)
        run.wait()
        assert run.stats.dropped == {"error": 2} and run.stream.cache.length == len(run.stream.prompt_keys())
        # The frame that the encoder failed at was given up, and nothing else.
        assert run.stream.times == [1.0, 3.0]
        with pytest.raises(PenguinError, match="shorten the question"):
            list(run.ask("word " * 600))
        assert list(run.ask("And now?", options=SHORT))


def test_a_closed_stream_takes_nothing_more() -> None:
    run, engine = live()
    held(run, engine)
    run.push(picture(1), 1.0)
    watch = run.watch("What is it?", every=1.0, options=SHORT)
    threading.Timer(0.05, engine.gate.set).start()
    run.close()
    run.close()
    assert not run._worker.is_alive() and run.stats.dropped == {"closed": 1}
    for call in (lambda: run.push(picture(2), 2.0), lambda: run.ask("What?"), lambda: run.watch("What?", every=1.0)):
        with pytest.raises(InputError, match="was closed"):
            call()
    assert len(list(watch)) <= 1
    for wrong in ({"queued": 0}, {"fps": 0.0}, {"queued": "4"}, {"fps": float("nan")}, {"rate": "1"}):
        with pytest.raises(InputError, match="wanted a"):
            live(**wrong)


def test_whatever_ends_the_worker_is_told_and_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault outside of what a frame or an answer may meet: a callback that ends the program, a fault of ours."""

    class Leaving(Observer):
        def frame_ready(self, ready: Ready) -> None:
            raise SystemExit(3)

    run, engine = live(observer=Leaving())
    watch = run.watch("What is it?", on_change=True, options=SHORT)
    held(run, engine)
    asked = run.ask("What is it?", options=SHORT, wait=True)
    engine.gate.set()
    with pytest.raises(PenguinError, match="worker failed: SystemExit"):
        list(asked)
    assert list(watch) == []
    with pytest.raises(PenguinError, match="worker failed: SystemExit"):
        run.push(picture(2), 2.0)
    for call in (lambda: run.push(picture(2), 2.0), lambda: run.ask("What?")):
        with pytest.raises(InputError, match="was closed"):
            call()
    run.wait()
    run.close()
    run, _ = live()
    monkeypatch.setattr(run.stream, "status", lambda: 1 / 0)
    run.push(picture(1), 1.0)
    with pytest.raises(PenguinError, match="ZeroDivisionError"):
        run.wait()
    run.close()


@pytest.mark.parametrize("event", ["frame_ready", "frame_dropped", "said", "decided"])
def test_an_observer_that_raises_is_told_once_and_the_stream_goes_on(event: str) -> None:
    class Failing(Observer):
        told = 0

        def fail(self, *_: object) -> None:
            self.told += 1
            raise ValueError("the page has gone")

    observer, cost = Failing(), fit({stage: {(1.0, 1.0)[:axes]: [50.0]} for stage, axes in AXES.items()})
    setattr(observer, event, observer.fail)
    run, _ = live(observer=observer, queued=8, fps=10.0, rate=10.0, target=LatencyTarget(60_000.0), cost=cost)
    with run:
        errors, answers = [], []
        for step in range(8):
            try:
                run.push(picture(step), step + 0.0)
                run.push(picture(step), step + 0.01)  # beyond the rate
                run.wait()
                answers.append(list(run.ask("What is it?", options=SHORT)))
            except PenguinError as error:
                errors.append(str(error))
        run.wait()
        assert ["the page has gone" in error for error in errors] == [True] and observer.told >= 1
        assert run.stats.processed >= 1 and len(answers) >= 6 and all(answers)


def test_every_observer_is_told_whatever_another_one_raises() -> None:
    class Failing(Observer):
        def said(self, said: Said) -> None:
            raise ValueError("the page has gone")

    heard: list[Said] = []

    class Hearing(Observer):
        def said(self, said: Said) -> None:
            heard.append(said)

    run, _ = live(observer=Observers(Failing(), Hearing(), Observer()))
    with run:
        run.push(picture(1), 1.0)
        run.wait()
        tokens = list(run.ask("What is it?", options=SHORT))
        assert [one.text for one in heard if one.text] == [token.text for token in tokens if token.text]
        with pytest.raises(PenguinError, match="the page has gone"):
            run.wait()


def test_what_is_no_stream_and_no_observer_is_refused() -> None:
    stream = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer())
    for call in (
        lambda: Live(stream.engine),  # type: ignore[arg-type]
        lambda: Live(stream, observer=print),  # type: ignore[arg-type]
        lambda: Live(stream, {"queued": 3}),  # type: ignore[arg-type]
        lambda: Live(stream, target=500.0),  # type: ignore[arg-type]
        lambda: Live(stream, queue=3),  # type: ignore[call-arg]
    ):
        with pytest.raises(InputError, match=r"wanted|there is no option 'queue'; known: queued, fps"):
            call()


def test_the_first_of_several_errors_is_told() -> None:
    run, engine = live(queued=10)
    with run:
        held(run, engine)
        run.push(np.zeros((4, 4), np.uint8), 1.0)
        run.push(np.zeros((4, 4, 3), np.float32), 2.0)
        run.push(picture(3), 3.0)
        engine.gate.set()
        with pytest.raises(InputError, match=r"uint8 \[4, 4\]"):
            run.wait()
        run.wait()
        assert run.stats.dropped == {"error": 2} and run.stream.times == [0.0, 3.0]


def test_times_and_prompts_that_are_none_are_refused_at_once() -> None:
    run, _ = live(fps=1.0)
    with run:
        for wrong in (float("nan"), float("inf"), "1"):
            with pytest.raises(InputError, match=r"time is .*, wanted a finite number"):
                run.push(picture(1), wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="prompt is null"):
            run.ask(None)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="every is NaN"):
            run.watch("What?", every=float("nan"))
        # And the rate is kept after that.
        assert [run.push(picture(i), i / 4) for i in range(8)] == [i % 4 == 0 for i in range(8)]
        run.wait()


def test_a_watch_speaks_when_it_is_time_or_when_the_scene_changes() -> None:
    run, _ = live(queued=100)
    with run:
        timed = run.watch("What is it?", every=2.0, options=SHORT)
        changed = run.watch("What is it?", on_change=True, options=SHORT)
        for i in range(8):
            # A dark scene, then a pale one.
            run.push(np.clip(picture(1), *((0, 90) if i < 4 else (200, 255))), i / 2)
        run.wait()
        timed.close()
        changed.close()
    assert [answer.time for answer in timed] == [0.0, 2.0]
    answers = list(changed)
    assert [answer.time for answer in answers] == [0.0, 2.0] and all(answer.text for answer in answers)
    with pytest.raises(InputError, match="name a pause"):
        live()[0].watch("What?")


def test_answers_that_nobody_reads_do_not_pile_up() -> None:
    run, _ = live(queued=100)
    with run:
        watch = run.watch("What is it?", every=0.1, options=SamplingOptions(max_new_tokens=1))
        for i in range(40):
            run.push(picture(0), float(i))
        run.wait()
    assert watch.missed == 40 + 1 - 16 and len(list(watch)) == 15


class PatientEngine(CountingEngine):
    """Takes a tenth of a millisecond for every patch, on any machine."""

    def encode(self, pixels: Any, rows: Any, cols: Any) -> Any:
        time.sleep(1e-4 * pixels.shape[0] * pixels.shape[1])
        return super().encode(pixels, rows, cols)


def test_a_machine_that_gets_slower_is_asked_for_less() -> None:
    measured: dict[str, Any] = {stage: {(1.0, 1.0)[:axes]: [1.0]} for stage, axes in AXES.items()}
    measured["encode"] = {(patches, many): [0.1 * patches * many] for patches in (1.0, 4096.0) for many in (1.0, 4.0)}
    cost, brake = fit(measured), Brake(10.0, 0.0)
    engine = SlowedEngine(PatientEngine(max_seq_len=1024), brake)
    session = Stream(engine, tiny_tokenizer(), budget=400, cache="rebase", shrink="encode")
    told: list[Decision] = []

    class Deciding(Observer):
        def decided(self, decision: Decision) -> None:
            told.append(decision)

    with Live(session, target=LatencyTarget(2500.0, 200.0), cost=cost, observer=Deciding()) as run:
        for i in range(3):
            run.push(picture(i, 280, 280), float(i))
            run.wait()
        assert run.control is not None and session.frame_tokens is not None and session.frame_tokens >= 24
        brake.start()
        for i in range(3, 12):
            run.push(picture(i, 280, 280), float(i))
            run.wait()
            if told:
                break
    assert told and told == list(run.control.decisions) and told[-1].reason == "slower than the target allows"
    asked = run.control.setting
    assert session.planner.limits.budget == asked.budget and session.visual_tokens <= asked.budget
    assert (asked.frame_tokens, asked.budget) < (100, 400)


def test_a_target_that_cannot_be_kept_is_said_with_the_first_frame() -> None:
    engine = CountingEngine(max_seq_len=1024)
    cost = fit({stage: {(1.0, 1.0)[:axes]: [9.0]} for stage, axes in AXES.items()})
    with Live(Stream(engine, tiny_tokenizer()), target=LatencyTarget(5.0), cost=cost) as run:
        run.push(picture(0), 0.0)
        with pytest.raises(BudgetError, match="cannot be kept here"):
            run.wait()
        run.push(picture(1), 1.0)
        run.wait()
        assert run.stats.processed == 2 and not run.stats.dropped
    with pytest.raises(InputError, match="penguin-edge profile"):
        Live(Stream(engine, tiny_tokenizer()), target=LatencyTarget(5.0))


def test_decisions_are_written_down_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with ExitStack() as opened:
        tell = latency.trace(argparse.Namespace(trace=path), opened)
        for i in range(3):
            tell.decided(
                Decision(float(i), Setting(400, 60), Setting(200, 30, 2), 12.5, 40.0, "slower than the target allows")
            )
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["time"] for line in lines] == list(range(i + 1))
    assert lines[-1]["to"] == asdict(Setting(200, 30, 2)) and lines[-1]["observed"] == 40.0


def test_frames_of_another_size_begin_from_the_budget_that_was_asked_for() -> None:
    cost = fit({stage: {(1.0, 1.0)[:axes]: [0.1]} for stage, axes in AXES.items()})
    session = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer(), budget=400)
    with Live(session, target=LatencyTarget(60_000.0), cost=cost) as run:
        for i in range(4):
            run.push(picture(i, 280, 280), float(i))
            run.wait()
            assert run.control is not None and session.planner.limits.budget == 400
            # As if the machine had become slow: then frames get another size.
            run.control.setting = Setting(100, 50)
            run._steering._apply(run.control.setting)  # type: ignore[union-attr]
            assert session.planner.limits.budget < 400
            run.push(picture(i, 140, 168), float(i) + 0.5)
            run.wait()
            assert session.planner.limits.budget == 400 == run.control.setting.budget
            assert run.control.decisions[-1].reason == "frames of another size"


def test_a_target_that_was_given_up_drops_nothing() -> None:
    engine = GatedEngine()
    cost = fit({stage: {(1.0, 1.0)[:axes]: [9.0]} for stage, axes in AXES.items()})
    target = LatencyTarget(5.0, 5.0)
    with Live(Stream(engine, tiny_tokenizer()), target=target, cost=cost, queued=8) as run:
        run.wait()
        held(run, engine)
        with pytest.raises(BudgetError, match="cannot be kept here"):
            run.push(picture(1), 1.0)
        for i in range(1, 5):
            run.push(picture(i), float(i))
        engine.gate.set()
        run.wait()
        assert run.stats.processed == 5 and not run.stats.dropped


def test_every_frame_of_another_rate_counts_for_the_controller() -> None:
    """30 frames a second of which one is taken: every second one of those that are."""
    cost = fit({stage: {(1.0, 1.0)[:axes]: [0.1]} for stage, axes in AXES.items()})
    session = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer(), budget=400)
    with Live(session, target=LatencyTarget(60_000.0), cost=cost, fps=1.0, queued=100) as run:
        run.push(picture(0), 0.0)
        run.wait()
        run._steering.stride = 2  # type: ignore[union-attr]
        taken = [run.push(picture(0), i / 30) for i in range(1, 300)]
        run.wait()
    assert sum(taken) == 5


def timid(nano_bundle: Callable[[str, str], Path], folder: Path) -> Path:
    """A copy of a bundle whose profile says that each patch takes a millisecond."""
    bundle = Path(shutil.copytree(nano_bundle("onnx", "fp32"), folder / "timid"))
    each = dict.fromkeys(AXES, 1e-4) | {"encode": 1.0, "preprocess": 1e-7}  # of a token, a position, and of a pixel
    cost = fit(
        {stage: {(size, 1.0)[:axes]: [each[stage] * size] for size in (1.0, 4096.0)} for stage, axes in AXES.items()}
    )
    keep(Bundle.read(bundle), {"schema": SCHEMA, "cost": cost.to_json()})
    return bundle


@pytest.mark.parametrize("verb", ["stream", "bench"])
def test_decisions_of_the_command_line_are_traced(
    verb: str, nano_bundle: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The first choice is a small one; frames show that there is room to spare."""
    trace = tmp_path / "trace.jsonl"
    command = [sys.executable, "-m", "penguin_edge", verb, str(timid(nano_bundle, tmp_path)), "--json"]
    command += ["--source", str(CLIP), "--fast"] if verb == "stream" else ["--stream", str(CLIP)]
    # Four seconds show it here; a machine that has other things to do may need more of them.
    seconds = "6" if verb == "stream" else "16"
    command += ["--fps", "4", "--duration", seconds, "--budget", "90", "--threads", "1", "--trace", str(trace)]
    command += ["--target-first-token", "20000", "--target-frame", "150"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    told = [json.loads(line) for line in trace.read_text().splitlines()]
    assert told and told == result["decisions"]
    for one in told:
        assert {"time", "from", "to", "predicted", "observed", "reason"} == one.keys()
        assert one["from"] != one["to"] and 0 <= one["time"] < 60 and one["reason"]
    assert told[0]["reason"] == "predicted to be slower than the target allows" and told[0]["observed"] is None
    assert told[0]["predicted"] <= 150 and told[0]["to"]["frame_tokens"] < told[0]["from"]["frame_tokens"]
    if verb == "bench":
        (first, *_) = (one for one in told[1:] if one["reason"] == "room to spare")
        assert first["observed"] < 150 and first["to"]["frame_tokens"] > first["from"]["frame_tokens"]
        assert result["deadlines"] > 0
        seen = result["calibration"]
        assert seen["frames"]["count"] == result["frames_processed"] == len(seen["frames"]["times"])
        assert seen["questions"]["count"] >= 2 and 0 <= seen["frames"]["above_p95_percent"] <= 100


def test_a_stream_with_a_target_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penguin_edge", "stream", "tiny", "--source", str(CLIP), "--fps", "4", "--fast"]
    command += ["--budget", "90", "--threads", "1", "--max-seq-len", "1024", "--max-new-tokens", "4", "--json"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=300)

    trace = tmp_path / "trace.jsonl"
    done = run("--target-first-token", "20000", "--trace", str(trace), "--duration", "2", "--prompt", "What?")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    told = [json.loads(line) for line in trace.read_text().splitlines()]
    assert told == result["decisions"] and result["frames_processed"] == 8
    for arguments, word in (
        (("--target-frame", "5"), "--target-first-token"),
        (("--trace", str(trace)), "--target-first-token"),
        (("--target-first-token", "0.01"), "cannot be kept here"),
        (("--target-first-token", "20000", "--target-tokens-per-s", "1e9"), "tokens per second"),
        (("--target-first-token", "20000", "--trace", str(tmp_path / "none" / "x")), "folder that is there"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert run("--target-first-token", "soon").returncode == 2


def test_a_frame_that_cannot_be_in_time_gives_way_to_a_newer_one() -> None:
    engine = GatedEngine()
    cost = fit({stage: {(1.0, 1.0)[:axes]: [0.1]} for stage, axes in AXES.items()})
    engine.gate.set()
    target = LatencyTarget(60_000.0, 300.0)
    with Live(Stream(engine, tiny_tokenizer()), target=target, cost=cost, queued=8) as run:
        run.wait()
        held(run, engine)
        for i in range(1, 6):
            run.push(picture(i), float(i))
        threading.Event().wait(0.5)  # all of them have waited for longer than they have
        engine.gate.set()
        run.wait()
        assert run.stats.dropped["late"] == 4 and run.stream.times[-1] == 5.0
        assert run.stats.frames_in == run.stats.processed + sum(run.stats.dropped.values()) == 6
