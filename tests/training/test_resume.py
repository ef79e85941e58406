"""A run goes on from a step that is whole, or not at all; nothing of the user's is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from penguin_edge.errors import CheckpointError, PenguinError
from penguin_edge.files import file_hash, manifest_hash, write_json
from penguin_edge.model.checkpoint import EMBEDDED
from penguin_edge.training.state import LOG, STATE, STEP, check_step, checkpoints, cut_log
from penguin_edge.training.train_config import STAGES, Lora, TrainConfig
from penguin_edge.training.trainer import train

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "data"
    folder.mkdir()
    lines = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": f"answer {number % 3}"}]
        lines.append(json.dumps({"id": str(number), "image": [f"{number}.png"], "conversations": turns}))
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def config(data: Path, out: Path, **more: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "stage": 3,
        "model": "tiny",
        "random_weights": True,
        "data": ((data, 1.0),),
        "out": out,
        "batch_size": 2,
        "max_steps": STEPS,
        "save_every": 2,
        "keep": 3,
        "rates": STAGES[3].rates.scaled_to(1e-3),
        "precision": "fp32",
        "gradient_checkpointing": False,
        "length_group": False,
        "workers": 0,
        "device": "cpu",
        "threads": 1,
        "peak_flops": 1e11,
    }
    return TrainConfig(**{**given, **more})


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    train(config(data, out), quiet)
    return out


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The run as a kill after step 4 leaves it."""
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "step-00000006")
    return out


def resumed(data: Path, out: Path, **more: Any) -> list[str]:
    said: list[str] = []
    train(config(data, out, resume=True, **more), said.append)
    return said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- rotten files -----------------------------------------------------------------------------------------------------


def test_every_file_of_a_step_is_hashed(finished: Path) -> None:
    for step in checkpoints(finished):
        assert check_step(step)
        assert set(json.loads((step / STEP).read_text())["files"]) == {path.name for path in step.iterdir()} - {STEP}


@pytest.mark.parametrize("name", [STATE, "model.safetensors", "config.json", "tokenizer.json", STEP])
def test_one_flipped_bit_is_refused_and_the_step_before_is_named(data: Path, stopped: Path, name: str) -> None:
    step = stopped / "step-00000004"
    flip(step / name)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as refused:
        resumed(data, stopped)
    assert str(step / name) in str(refused.value)
    assert f"step-00000002 is whole: remove {step} to go on from there" in str(refused.value)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_following_the_advice_leads_to_the_same_weights(data: Path, stopped: Path, finished: Path) -> None:
    flip(stopped / "step-00000004" / "model.safetensors")
    shutil.rmtree(stopped / "step-00000004")
    assert "step 2 of 6" in "\n".join(resumed(data, stopped))
    for name in ("model/model.safetensors", LOG):
        assert (stopped / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("change", ["missing", "longer", "no hashes", "all rotten"])
def test_other_damage_is_refused(data: Path, stopped: Path, change: str) -> None:
    step = stopped / "step-00000004"
    if change == "missing":
        (step / "model.safetensors").unlink()
    elif change == "longer":
        with (step / "model.safetensors").open("ab") as stream:
            stream.write(b"\0")
    elif change == "no hashes":
        (step / STEP).unlink()
    else:
        flip(step / STATE)
        flip(stopped / "step-00000002" / "model.safetensors")
    advice = "no earlier checkpoint is whole" if change == "all rotten" else "step-00000002 is whole"
    with pytest.raises(CheckpointError, match=advice):
        resumed(data, stopped)


def test_steps_of_an_earlier_version_go_on_with_a_note(data: Path, stopped: Path, finished: Path) -> None:
    for step in checkpoints(stopped):
        (step / STEP).unlink()
        state = torch.load(step / STATE, weights_only=True)
        torch.save({**state, "schema": 1}, step / STATE)
    assert "cannot be checked" in "\n".join(resumed(data, stopped))
    assert (stopped / "model/model.safetensors").read_bytes() == (finished / "model/model.safetensors").read_bytes()


def test_a_state_runs_no_code(data: Path, stopped: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "evil"),))

    step = stopped / "step-00000004"
    (step / STEP).unlink()
    torch.save({"schema": 1, "step": Evil()}, step / STATE)
    with pytest.raises(CheckpointError, match="cannot be read as a training state"):
        resumed(data, stopped)
    assert not (tmp_path / "evil").exists()


# --- states that are no states ---------------------------------------------------------------------------------------


def rewrite(step: Path, change: Any) -> None:
    """Change the state of a step, and hash it again as if it had been written so."""
    state = torch.load(step / STATE, weights_only=True)
    change(state)
    torch.save(state, step / STATE)
    names = sorted(path.name for path in step.iterdir() if path.name != STEP)
    files = {name: {"sha256": file_hash(step / name), "bytes": (step / name).stat().st_size} for name in names}
    data = {"schema": 2, "files": files}
    write_json(step / STEP, {**data, "sha256": manifest_hash(data)})


def put(**fields: Any) -> Any:
    return lambda state: state.update(fields)


def moment(key: str, change: Any) -> Any:
    """Change one tensor of the optimiser, of a matrix; None takes it away."""

    def edit(state: dict[str, Any]) -> None:
        values = state["optimizer"]["decoder.layers.0.mlp.up_proj.weight"]
        value = change(values[key])
        values.pop(key) if value is None else values.update({key: value})

    return edit


def holding(value: float) -> Any:
    return lambda tensor: torch.full_like(tensor, value)


WRONG: dict[str, tuple[Any, str]] = {
    "step text": (put(step="4"), "step is"),
    "step real": (put(step=4.0), "step is 4.0"),
    "step tensor": (put(step=torch.tensor(4)), "step is"),
    "step true": (put(step=True), "step is true"),
    "step beyond": (put(step=100), "step is 100"),
    "step below": (put(step=-4), "step is -4"),
    "step of another folder": (put(step=2), "step is 2"),
    "step missing": (lambda state: state.pop("step"), "has no step"),
    "schema text": (put(schema="2"), 'schema "2"'),
    "schema of tomorrow": (put(schema=3), "schema 3"),
    "identity list": (put(identity=[]), "identity is []"),
    "identity tensor": (lambda state: state["identity"].update(seed=torch.zeros(2)), "identity.seed is"),
    "counts list": (put(counts=[]), "counts is []"),
    "counts of text": (lambda state: state["counts"].update(bad="0"), 'counts.bad is "0"'),
    "counts below": (lambda state: state["counts"].update(bad=-1), "counts.bad is -1"),
    "counts missing": (lambda state: state["counts"].pop("bad"), "counts has no bad"),
    "counts more": (lambda state: state["counts"].update(odd=0), "unknown field 'odd'"),
    "no optimizer": (put(optimizer=None), "optimizer is null"),
    "optimizer of lists": (put(optimizer={"x": []}), "optimizer.x is []"),
    "optimizer of others": (lambda state: state["optimizer"].update(x={}), "the first difference is x"),
    "moment missing": (moment("exp_avg", lambda _: None), "has no exp_avg"),
    "moment misshapen": (moment("exp_avg", lambda _: torch.zeros(3)), "exp_avg is [3]"),
    "moment of one number": (moment("exp_avg_sq", lambda _: torch.zeros(())), "exp_avg_sq is []"),
    "moment whole": (moment("exp_avg", lambda t: t.long()), "exp_avg is a tensor of torch.int64"),
    "moment double": (moment("exp_avg", lambda t: t.double()), "torch.float64"),
    "moment sparse": (moment("exp_avg", lambda t: t.to_sparse()), "torch.sparse_coo"),
    "moment text": (moment("exp_avg", lambda _: "x"), 'exp_avg is "x"'),
    "moment NaN": (moment("exp_avg", holding(torch.nan)), "exp_avg holds a number that is NaN"),
    "moment infinite": (moment("exp_avg_sq", holding(torch.inf)), "exp_avg_sq holds a number that is NaN or inf"),
    "squares below": (moment("exp_avg_sq", holding(-1.0)), "exp_avg_sq holds a negative"),
    "moment unknown": (
        lambda state: next(iter(state["optimizer"].values())).update(odd=torch.zeros(1)),
        "unknown field 'odd'",
    ),
    "steps text": (moment("step", lambda _: "4"), 'step is "4"'),
    "steps in part": (moment("step", holding(0.5)), "step is 0.5"),
    "steps beyond": (moment("step", holding(5.0)), "step is 5.0"),
    "steps many": (moment("step", lambda _: torch.ones(4)), "step is [1.0"),
    "no extra": (put(extra=None), "extra is null"),
    "extra of others": (put(extra={"x": torch.zeros(1)}), "extra has an unknown tensor x"),
    "nothing": (lambda state: state.clear(), "schema null"),
    "more fields": (put(more=1), "unknown field 'more'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_is_checked_before_torch_gets_it(data: Path, stopped: Path, name: str) -> None:
    change, says = WRONG[name]
    step = stopped / "step-00000004"
    rewrite(step, change)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as refused:
        resumed(data, stopped)
    message = str(refused.value)
    assert message.startswith(str(step / STATE)) and says in message and "\n" not in message
    assert f"remove {step} to go on from there" in message or "freeze the same parts" in message
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_the_states_of_muon_are_checked_too(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(config(data, out, max_steps=2, muon_lr=1e-3), quiet)
    shutil.rmtree(out / "model")
    rewrite(out / "step-00000002", moment("momentum_buffer", lambda _: torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"momentum_buffer is \[3\]"):
        resumed(data, out, max_steps=2, muon_lr=1e-3)


@pytest.mark.parametrize("name", [LOG, f"step-00000004/{STEP}", f"step-00000004/{STATE}", "step-00000004/config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_not_waited_for(data: Path, stopped: Path, name: str, kind: str) -> None:
    path = stopped / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path if kind == "pipe" else stopped / "pipe")
        if kind == "link":
            path.symlink_to(stopped / "pipe")
    if name.endswith(STATE):  # as if the step were none: the one before is gone on from, up to where that one stands
        (stopped / "step-00000002" / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"no regular file|missing|move it away"):
        resumed(data, stopped)


# --- what a step does not hold ----------------------------------------------------------------------------------------


def test_a_lora_run_goes_on_over_the_same_base_alone(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = Path(shutil.copytree(EMBEDDED["nano"], tmp_path / "base"))
    more = {"model": str(base), "random_weights": False, "lora": Lora(rank=2), "max_steps": 2, "save_every": 1}
    out = tmp_path / "out"
    train(config(data, out, **more), quiet)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "step-00000002")
    content = (base / "model.safetensors").read_bytes()
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"made with base weights of SHA-256 .*, this run has .*; use the same"):
        resumed(data, out, **more)
    (base / "model.safetensors").write_bytes(content)
    rewrite(out / "step-00000001", lambda state: state["identity"].pop("base weights of SHA-256"))
    assert "without a hash of the base that LoRA adapts" in "\n".join(resumed(data, out, **more))


def test_a_run_with_a_teacher_goes_on_with_the_same_one_alone(data: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(EMBEDDED["nano"], tmp_path / "teacher"))
    rates = dataclasses.replace(STAGES[1].rates.scaled_to(1e-3), distill=1e-3)
    more = {"stage": 1, "rates": rates, "teacher": teacher, "max_steps": 2, "save_every": 1}
    out = tmp_path / "out"
    train(config(data, out, **more), quiet)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "step-00000002")
    settings = (teacher / "config.json").read_text()
    changed = json.loads(settings)
    changed["vision_encoder_config"]["rope_theta"] = 77.0
    (teacher / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"made with a teacher of SHA-256 .*, this run has .*; use the same"):
        resumed(data, out, **more)
    (teacher / "config.json").write_text(settings)
    assert "step 1 of 2" in "\n".join(resumed(data, out, **more))


# --- what is the user's -----------------------------------------------------------------------------------------------


def test_copies_of_steps_are_neither_resumed_nor_removed(data: Path, stopped: Path) -> None:
    for name in ("step-best", "step-00000002.bak", "step-2", "step-99999999-old"):
        shutil.copytree(stopped / "step-00000002", stopped / name)
    said = resumed(data, stopped, keep=1)
    assert "step 4 of 6" in "\n".join(said)
    left = sorted(path.name for path in stopped.glob("step-*"))
    assert left == ["step-00000002.bak", "step-00000006", "step-2", "step-99999999-old", "step-best"]


def test_steps_with_files_of_the_user_are_kept(data: Path, stopped: Path) -> None:
    (stopped / "step-00000002" / "notes.txt").write_text("the best so far")
    resumed(data, stopped, keep=1)
    assert (stopped / "step-00000002" / "notes.txt").read_text() == "the best so far"
    assert check_step(stopped / "step-00000002") and not (stopped / "step-00000004").exists()
    assert not list(stopped.glob(".*"))


@pytest.mark.parametrize("name", ["step-00000006/kept.safetensors", "step-00000005/notes.txt", "model/mine.txt"])
def test_what_stands_where_the_run_will_write_is_refused_at_the_start(data: Path, stopped: Path, name: str) -> None:
    (stopped / name).parent.mkdir()
    (stopped / name).write_text("mine")
    log = (stopped / LOG).read_bytes()
    with pytest.raises(CheckpointError, match="move it away"):
        resumed(data, stopped)
    assert (stopped / name).read_text() == "mine"
    assert not (stopped / "step-00000006" / STATE).exists() and (stopped / LOG).read_bytes()[:50] == log[:50]


@pytest.mark.parametrize("text", ['{"event": "login"}\n{"event": "logout"}\n', "dear diary\nmore\n", "[1]\n[2]\n"])
def test_a_log_of_something_else_is_not_cut(data: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOG).write_text(text)
    with pytest.raises(CheckpointError, match="none of a run's log"):
        resumed(data, tmp_path / "out")
    assert (tmp_path / "out" / LOG).read_text() == text


def test_a_log_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / LOG).symlink_to("elsewhere")
    cut_log(tmp_path, 1)
    assert os.readlink(tmp_path / LOG) == "elsewhere" and (tmp_path / "elsewhere").read_text() == '{"step": 1}\n'


# --- kills and full disks ---------------------------------------------------------------------------------------------


def cli(data: Path, out: Path, *flags: Any, **options: Any) -> subprocess.Popen[str]:
    given = ["--stage", 3, "--model", "tiny", "--random-weights", "--data", data, "-o", out, "--precision", "fp32"]
    given += ["--batch-size", 2, "--learning-rate", "1e-3", "--threads", 1, "--device", "cpu", "--peak-flops", 1e11]
    given += ["--no-length-group", "--no-gradient-checkpointing", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "penguin_edge", "train", *map(str, given)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        **options,
    )


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_a_killed_loader_process_is_one_sentence(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = cli(data, out, "--workers", 1, "--max-steps", 100_000, "--save-every", 3)
    until(lambda: checkpoints(out) and children(process.pid), process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("penguin-edge: a loader process died")
    assert all(check_step(step) for step in checkpoints(out)) and not list(out.glob(".*"))


def test_loader_processes_end_with_a_killed_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = cli(data, out, "--workers", 2, "--max-steps", 100_000, "--save-every", 3)
    until(lambda: checkpoints(out) and len(children(process.pid)) > 1, process)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    until_gone(workers)


def until_gone(pids: list[int]) -> None:
    for _ in range(1000):
        if not any(running(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pids} live on")


def running(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_whole_steps(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    process = cli(data, out, "--workers", 1, "--max-steps", 100_000, "--save-every", 1)
    until(lambda: len(checkpoints(out)) > 1, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert err.strip().splitlines()[-1] == "stopped"
    assert checkpoints(out) and all(check_step(step) for step in checkpoints(out)) and not list(out.glob(".*"))


def test_a_full_disk_leaves_no_half_step(data: Path, stopped: Path) -> None:
    """A limit on file size stands for it; the log and the steps that are there are smaller, the weights larger."""
    before = sorted(path.name for path in stopped.iterdir())

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = cli(data, stopped, "--workers", 0, "--max-steps", STEPS, "--save-every", 2, "--resume", preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("penguin-edge: ") and "step-00000004 is complete: make room and resume from it" in last
    assert sorted(path.name for path in stopped.iterdir()) == before


def test_rests_of_a_killed_save_are_cleared_by_resuming(data: Path, stopped: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom penguin_edge.errors import PenguinError\n"
        "from penguin_edge.folders import refuse_any, whole\n"
        "out = Path(sys.argv[1])\n"
        "with whole(out, refuse_any(out, PenguinError), PenguinError) as f:\n"
        "    (f / 'model.safetensors').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(stopped / "step-00000077")])
    assert len(list(stopped.glob(".*"))) == 1
    resumed(data, stopped)
    assert not list(stopped.glob(".*"))


def test_the_result_of_a_lora_run_is_whole(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from penguin_edge.training import state as trainer_state

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    given = config(data, tmp_path / "out", max_steps=2, lora=Lora(rank=2))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_state, "save_adapter", fails)
        with pytest.raises(PenguinError, match="the last step is complete"):
            train(given, quiet)
    assert not (tmp_path / "out" / "model").exists()
    train(dataclasses.replace(given, resume=True), quiet)
    assert (tmp_path / "out" / "model" / "adapter").is_dir()
