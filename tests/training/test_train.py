"""Training: what a run promises whatever happens to it. Real processes where a process is the point."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from helpers import TESTS, picture, tiny_tokenizer
from PIL import Image

from penguin_edge.commands.train import source
from penguin_edge.dataset.records import DataRecord, read_records
from penguin_edge.dataset.samples import Sample, SampleBuilder
from penguin_edge.errors import CheckpointError, InputError, MemoryLimitError, PenguinError
from penguin_edge.model.checkpoint import Checkpoint, save
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.training.feed import Micro, Run, deliveries
from penguin_edge.training.initialise import initialise
from penguin_edge.training.losses import cross_entropy
from penguin_edge.training.order import Order
from penguin_edge.training.packing import forward_packed, pack
from penguin_edge.training.schedule import Rates, cosine_with_min_lr
from penguin_edge.training.state import STATE, checkpoints
from penguin_edge.training.train_config import STAGES, Lora, TrainConfig
from penguin_edge.training.trainee import Trainee, add_lora, named_tensors, published_model
from penguin_edge.training.trainer import NonFiniteLoss, train

pytest.importorskip("accelerate", reason="training needs the [train] extra")

TEACHER = TESTS / "golden" / "tiny-penguin-teacher"
RECORDS = 24
RATE = Rates(llm=1e-3, projector=1e-3, encoder=1e-3)


def quiet() -> Callable[[str], None]:
    return lambda line: None


def write_data(folder: Path) -> Path:
    """Text, images and clips in turns."""
    folder.mkdir()
    lines = []
    for number in range(RECORDS):
        record: dict[str, Any] = {"id": f"r{number}"}
        question, answer = f"Question {number} " + "more " * (number % 5), f"answer {number % 3}"
        if number % 3 == 1:
            Image.fromarray(picture(number, 84, 84)).save(folder / f"{number}.png")
            record["image"] = [f"{number}.png"]
        if number % 6 == 2:
            record["video"] = [f"{number}.mp4"]
            with av.open(str(folder / f"{number}.mp4"), "w") as out:
                stream = out.add_stream("mpeg4", rate=1)
                stream.width, stream.height, stream.pix_fmt = 84, 84, "yuv420p"
                for i in range(3):
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number * 10 + i, 84, 84), format="rgb24")))
                out.mux(stream.encode())
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(record))
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("training") / "data")


def config(data: Path, out: Path, **more: Any) -> TrainConfig:
    """A short run in fp32; everything in this process."""
    given: dict[str, Any] = {
        "stage": 3,
        "model": "tiny",
        "random_weights": True,
        "data": ((data, 1.0),),
        "out": out,
        "batch_size": 4,
        "max_steps": 3,
        "rates": RATE,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "length_group": False,
        "workers": 0,
        "device": "cpu",
        "threads": 1,
        "peak_flops": 1e11,
    }
    return TrainConfig(**{**given, **more})


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in log_of(out)]


def fresh() -> PenguinModel:
    """What a run on the tiny preset begins with."""
    model = Checkpoint.open("tiny", note=quiet()).load()
    initialise(model, TrainConfig(3, "tiny", (), Path()).seed)
    return model


def weights(source: Path | PenguinModel) -> dict[str, torch.Tensor]:
    model = source if isinstance(source, PenguinModel) else Checkpoint.open(source, note=quiet()).load()
    return {name: p.detach() for name, p in model.named_parameters()}


def command(data: Path, out: Path, *flags: Any) -> list[str]:
    fixed = ["--model", "tiny", "--random-weights", "--data", data, "--out", out, "--precision", "fp32"]
    quick = ["--batch-size", "4", "--learning-rate", "1e-3", "--threads", "1", "--device", "cpu", "--json"]
    return [*map(str, ("train", *fixed, *quick, *flags))]


def cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "penguin_edge", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        **options,
    )


# --- what a step computes ---------------------------------------------------------------------------------------------


def test_the_first_loss_is_the_cross_entropy_of_the_model(data: Path, tmp_path: Path) -> None:
    model = fresh()
    records = read_records(data)
    batch = pack([SampleBuilder(model.config, tiny_tokenizer(), STAGES[3].data)(record) for record in records])
    wanted = cross_entropy(model.decoder, forward_packed(model, batch).hidden, batch).item()
    train(config(data, tmp_path / "out", batch_size=RECORDS, max_steps=1), quiet())
    (line,) = log_of(tmp_path / "out")
    # The same samples in another order: sums in another order.
    assert line["loss"] == pytest.approx(wanted, rel=1e-5)
    assert line["tokens"] == sum(batch.lengths) and line["samples"] == RECORDS and line["targets"] == len(batch.targets)


def test_accumulation_is_the_same_step(data: Path, tmp_path: Path) -> None:
    for name, batch, accumulate in (("one", 8, 1), ("four", 2, 4)):
        train(config(data, tmp_path / name, batch_size=batch, accumulate=accumulate), quiet())
    # Sums over micro-batches come in another order; Adam divides by small gradients, which enlarges the rounding.
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    assert [line["ids"] for line in log_of(tmp_path / "four")] == [line["ids"] for line in log_of(tmp_path / "one")]


def test_checkpointed_activations_and_loader_processes_change_nothing(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "plain"), quiet())
    train(config(data, tmp_path / "saved", gradient_checkpointing=True, workers=2, prefetch=1), quiet())
    assert (tmp_path / "plain" / "log.jsonl").read_bytes() == (tmp_path / "saved" / "log.jsonl").read_bytes()


def test_bf16_stays_near_fp32(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "fp32", max_steps=2), quiet())
    train(config(data, tmp_path / "bf16", max_steps=2, precision="bf16"), quiet())
    # bf16 has 8 bits: about 1 % on a loss, and the result keeps the dtype of the model that it began with.
    assert losses_of(tmp_path / "bf16") == pytest.approx(losses_of(tmp_path / "fp32"), rel=2e-2)
    assert losses_of(tmp_path / "bf16") != losses_of(tmp_path / "fp32")
    assert Checkpoint.open(tmp_path / "bf16" / "model", note=quiet()).dtype == torch.float32


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_moves_the_parts_that_it_trains_and_no_others(stage: int, data: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"stage": stage, "rates": None, "max_steps": 1, "batch_size": 6}
    train(config(data, tmp_path / "out", teacher=TEACHER, **more), quiet())
    before, after = weights(fresh()), weights(tmp_path / "out" / "model")
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder", "projector"} | (set() if stage == 1 else {"decoder", "embedding"})
    assert all(torch.equal(before[n], after[n]) for n in before if n.partition(".")[0] not in moved)
    (line,) = log_of(tmp_path / "out")
    names = {"cross_entropy"} | ({"distillation", "amplitude", "direction", "relation"} if stage == 1 else set())
    assert set(line["parts"]) == names
    wanted = line["parts"]["cross_entropy"] + line["parts"].get("distillation", 0)
    assert line["loss"] == pytest.approx(wanted, rel=1e-6)


def test_learning_rates_of_the_log_follow_the_schedule(data: Path, tmp_path: Path) -> None:
    rates = Rates(llm=1e-3, projector=2e-3, encoder=3e-3)
    train(config(data, tmp_path / "out", rates=rates, max_steps=6, warmup_ratio=0.4, min_lr_ratio=0.2), quiet())
    for step, line in enumerate(log_of(tmp_path / "out")):
        factor = cosine_with_min_lr(step, warmup_steps=3, total_steps=6, min_lr_ratio=0.2, warmup_lr_ratio=0.1)
        assert line["lr"] == {"llm": 1e-3 * factor, "projector": 2e-3 * factor, "encoder": 3e-3 * factor}


def test_training_learns(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "out", batch_size=12, max_steps=24), quiet())
    losses = losses_of(tmp_path / "out")
    # 24 records seen 12 times by half a million parameters: from chance to nearly by heart.
    assert losses[-1] < 0.2 * losses[0]


# --- stop and go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--stage", 3),
        ("--stage", 1, "--teacher", TEACHER),
        ("--stage", 4, "--lora-rank", 2),
        ("--stage", 3, "--muon-lr", 0.01),
    ],
    ids=["stage3", "distilled", "lora", "muon"],
)
def test_a_killed_run_goes_on_bit_for_bit(flags: tuple[Any, ...], data: Path, tmp_path: Path) -> None:
    if "--lora-rank" in flags:
        pytest.importorskip("peft")
    more = (*flags, "--max-steps", 14, "--save-every", 4, "--workers", 1, "--keep", 3)
    done = cli(*command(data, tmp_path / "whole", *more))
    assert done.returncode == 0, done.stderr

    out = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-m", "penguin_edge", *command(data, out, *more)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        # Six steps make an epoch; past step 8 there is a checkpoint in the middle of the second one.
        while process.poll() is None and len(checkpoints(out)) < 2:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    saved = len(checkpoints(out))
    assert 2 <= saved <= 3 and not (out / "model").exists(), "the kill came too late to show anything"
    with (out / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 99, "lo')  # what a kill can leave
    done = cli(*command(data, out, *more, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {out}/step-{4 * saved:08}" in done.stderr
    assert (out / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    a, b = weights(out / "model"), weights(tmp_path / "whole" / "model")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_last_checkpoints_are_kept_and_a_finished_run_stays_finished(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = config(data, out, max_steps=5, save_every=2, keep=2)
    first = train(given, quiet())
    assert [folder.name for folder in checkpoints(out)] == ["step-00000004", "step-00000005"]
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "model", "step-00000004", "step-00000005"]
    log = (out / "log.jsonl").read_bytes()
    again = train(dataclasses.replace(given, resume=True), quiet())
    assert first is not None and again is not None
    assert again["samples"] == first["samples"] == 20
    assert (out / "log.jsonl").read_bytes() == log
    saved, result = weights(out / "step-00000005"), weights(out / "model")
    assert all(torch.equal(saved[name], result[name]) for name in saved)


def test_a_checkpoint_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = config(data, out, resume=True)
    train(given, quiet())
    with pytest.raises(CheckpointError, match="made with stage 3, this run has 4"):
        train(dataclasses.replace(given, stage=4), quiet())
    other = shutil.copytree(data, tmp_path / "other")
    text = (other / "annotations.jsonl").read_text(encoding="utf-8")
    (other / "annotations.jsonl").write_text(text.replace("Question 1 ", "Query 1 "), encoding="utf-8")
    with pytest.raises(CheckpointError, match="made with data "):
        train(dataclasses.replace(given, data=((other, 1.0),)), quiet())
    with pytest.raises(CheckpointError, match="made with steps 3, this run has 4"):
        train(dataclasses.replace(given, max_steps=4), quiet())
    small = Checkpoint.open("tiny", note=quiet())
    shape = dataclasses.replace(small.config, text=dataclasses.replace(small.config.text, num_hidden_layers=1))
    save(dataclasses.replace(small, config=shape).load(), tmp_path / "small", small.tokenizer)
    with pytest.raises(CheckpointError, match="made with shape "):
        train(dataclasses.replace(given, model=str(tmp_path / "small"), random_weights=False), quiet())
    with pytest.raises(InputError, match="is not empty; continue that run with --resume"):
        train(dataclasses.replace(given, resume=False), quiet())
    state = checkpoints(out)[-1] / STATE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        train(given, quiet())


def test_a_full_disk_leaves_the_checkpoint_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    given = config(data, out, max_steps=6, save_every=2)
    write, calls = torch.save, []

    def full(value: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-00000002 is complete: make room and resume"):
        train(given, quiet())
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "step-00000002"]
    train(dataclasses.replace(given, resume=True), quiet())
    train(dataclasses.replace(given, out=tmp_path / "whole"), quiet())
    assert losses_of(out) == losses_of(tmp_path / "whole")


# --- what can be wrong with data --------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_records(data: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("tiny", note=quiet())
    model = checkpoint.load()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(3e38)  # finite as stored, and infinities of both signs behind it
    save(model, tmp_path / "broken", checkpoint.tokenizer)
    flags = command(data, tmp_path / "out", "--stage", 3, "--max-steps", 2, "--workers", 0)
    flags[flags.index("tiny")] = str(tmp_path / "broken")
    flags.remove("--random-weights")
    done = cli(*flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    path = tmp_path / "out" / "nonfinite-step-1.json"
    assert f"the loss of step 1 is nan and its gradient norm nan; the ids of its 4 records are in {path}" in done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert len(found["ids"]) == 4 and set(found["ids"]) <= {f"r{i}" for i in range(RECORDS)}
    assert not (tmp_path / "out" / "model").exists()
    with pytest.raises(NonFiniteLoss):
        train(config(data, tmp_path / "again", model=str(tmp_path / "broken"), random_weights=False), quiet())


@pytest.mark.parametrize("grouped", [False, True])
def test_unusable_records_are_named_counted_and_left_out(
    grouped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    (data / "1.png").unlink()
    (data / "4.png").write_bytes(b"no picture")
    path = data / "annotations.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[6] = lines[6].replace("answer", "answer " * 300)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said: list[str] = []
    options = dataclasses.replace(STAGES[3].data, model_max_length=300)
    given = config(data, tmp_path / "out", options=options, length_group=grouped, max_steps=None, max_bad_share=0.5)
    result = train(given, said.append)
    text = "\n".join(said) + capsys.readouterr().err
    assert result is not None
    assert result["samples"] == RECORDS - 3
    for line, name in ((2, "r1"), (5, "r4"), (7, "r6")):
        assert text.count(f"{path}:{line}: record '{name}'") == 1, text
    if grouped:
        assert f"3 of {RECORDS} records of {path} cannot be used" in text
    else:
        assert (result["bad"], result["too_long"]) == (2, 1)
        with pytest.raises(InputError, match=r"3 of 24 samples cannot be used \(2 unreadable, 1 too long\), more than"):
            train(dataclasses.replace(given, out=tmp_path / "strict", max_bad_share=0.1), said.append)


def test_a_step_without_any_usable_sample_changes_no_weight_by_gradient(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    for picture_file in data.glob("*.png"):
        picture_file.unlink()
    lines = (data / "annotations.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "annotations.jsonl").write_text("\n".join(lines[1::3]) + "\n", encoding="utf-8")
    train(config(data, tmp_path / "out", max_steps=1, max_bad_share=1.0), quiet())
    (line,) = log_of(tmp_path / "out")
    assert (line["samples"], line["targets"], line["bad"], line["loss"], line["grad_norm"]) == (0, 0, 4, 0, 0)
    before, after = weights(fresh()), weights(tmp_path / "out" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loader_process_that_dies_is_said_to_have_died(data: Path) -> None:
    def killed(record: DataRecord) -> Sample:
        os._exit(9)

    records = read_records(data)
    order = Order((RECORDS,), 4, seed=0)
    micro = Micro(records, killed, 601, False)
    with pytest.raises(MemoryLimitError, match="a loader process died"):
        list(deliveries(micro, Run(order, 0, 0, 2), 1, 1))


def test_a_changed_file_is_measured_again(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    said: list[str] = []

    def measured() -> bool:
        said.clear()
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        train(config(data, out, length_group=True, max_steps=1), said.append)
        return any(line.startswith("measuring") for line in said)

    assert [measured(), measured()] == [True, False]
    path = data / "annotations.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Question 2 ", "A longer question 2 "), encoding="utf-8")
    assert [measured(), measured()] == [True, False]


def test_files_are_joined_with_their_weights(data: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "other")
    sources = ((data, 1.0), (other / "annotations.jsonl", 0.5))
    result = train(dataclasses.replace(config(data, tmp_path / "out", max_steps=None), data=sources), quiet())
    assert result is not None and result["samples"] == RECORDS + RECORDS // 2


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_lora_is_merged_and_its_adapter_is_one_of_peft(data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    train(config(data, out, lora=Lora(rank=2, alpha=8)), quiet())
    before, after = weights(fresh()), weights(out / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n for n in moved if n.startswith("decoder.")} == {
        n for n in before if n.startswith("decoder.layers") and "norm" not in n
    }
    assert "embedding.weight" not in moved and any(n.startswith("projector.") for n in moved)
    # The adapter on transformers' Qwen3 with the weights from before is the merged model.
    text = Checkpoint.open("tiny", note=quiet()).config.text
    fields = {f.name: getattr(text, f.name) for f in dataclasses.fields(text) if f.name != "qk_norm"}
    llm = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()

    def load(values: dict[str, torch.Tensor]) -> None:
        state = {"model." + n.removeprefix("decoder."): v for n, v in values.items() if n.startswith("decoder.")}
        state |= {"model.embed_tokens.weight": values["embedding.weight"], "lm_head.weight": values["embedding.weight"]}
        llm.load_state_dict(state)

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        load(after)
        merged = llm(ids).logits
        load(before)
        plain = llm(ids).logits
        adapted = peft.PeftModel.from_pretrained(llm, out / "model" / "adapter").eval()(ids).logits
    # fp32: W + BA applied as one matrix or as two.
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert (plain - merged).abs().max() > 1e-2


def test_lora_changes_nothing_before_it_learns() -> None:
    pytest.importorskip("peft")
    checkpoint = Checkpoint.open("tiny", note=quiet())
    model = checkpoint.load()
    lora = Lora(rank=3)
    add_lora(model, lora)
    trainee = Trainee(model, scope="batch", backend="padded", precision="fp32", distiller=None)
    assert sum(".lora_" in name for name, _ in named_tensors(trainee)) == 2 * 7 * 3
    merged, extra = published_model(trainee, checkpoint.config, lora)
    assert len(extra) == 2 * 7 * 3
    wanted = dict(checkpoint.load().named_parameters())
    assert {n: torch.equal(p, wanted[n]) for n, p in merged.named_parameters()} == dict.fromkeys(wanted, True)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [(), ("--fsdp",)], ids=["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(how: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    more = ("--stage", 1, "--teacher", TEACHER, "--max-steps", 4, "--save-every", 2, "--workers", 0)
    done = cli(*command(data, tmp_path / "one", *more, "--batch-size", 8))
    assert done.returncode == 0, done.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = tmp_path / "two"

    def start(*flags: Any) -> subprocess.CompletedProcess[str]:
        run = [*launch, "-m", "penguin_edge", *command(data, both, *more, *how, *flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(run, capture_output=True, text=True, timeout=300, check=False, env=environment)

    done = start()
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1, "the first process alone reports"
    one, two = log_of(tmp_path / "one"), log_of(both)
    # The sum over processes adds in another order; Adam divides by small gradients, which enlarges the rounding.
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    for key in ("ids", "tokens", "samples", "targets"):
        assert [line[key] for line in two] == [line[key] for line in one]
    a, b = weights(tmp_path / "one" / "model"), weights(both / "model")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    # Resumed from step 2, the two processes repeat themselves to the bit.
    shutil.rmtree(both / "step-00000004")
    shutil.rmtree(both / "model")
    done = start("--resume")
    assert done.returncode == 0, done.stderr
    assert log_of(both) == two
    assert all(torch.equal(b[name], value) for name, value in weights(both / "model").items())


# --- the command line -------------------------------------------------------------------------------------------------


def test_data_arguments() -> None:
    assert source("a/b.jsonl") == (Path("a/b.jsonl"), 1.0)
    assert source("a/b.jsonl=0.5") == (Path("a/b.jsonl"), 0.5)
    assert source("a=b/c.jsonl") == (Path("a=b/c.jsonl"), 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stage": 1}, "stage 1 distills from a teacher; name one with --teacher, or use --no-distill"),
        ({"fsdp": True}, "--fsdp shards the model over processes; start it with torchrun"),
        ({"rates": Rates(projector=1.0), "lora": Lora()}, "LoRA adapts the language model, which is frozen here"),
        ({"distill": True, "teacher": TEACHER}, "the adapter to the teacher has no learning rate"),
        ({"max_bad_share": 2.0}, "max_bad_share is 2.0; wanted a share between 0 and 1"),
        ({"stage": 5}, "stage 5 is unknown; known: 1, 2, 3, 4"),
        ({"batch_size": 0}, "batch_size is 0; wanted at least 1"),
        ({"model": "nowhere"}, "'nowhere' is neither a checkpoint folder, nor a preset"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], says: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(PenguinError, match=says):
        train(config(data, tmp_path / "out", **changes), quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "tiny is a preset and has random weights; add --random-weights if that is what you want"),
        (["--random-weights", "--learning-rate", "frozen"], "--learning-rate frozen trains nothing"),
    ],
)
def test_the_command_line_says_what_is_wrong(flags: list[str], says: str, data: Path, tmp_path: Path) -> None:
    done = cli("train", "--stage", "3", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "out"), *flags)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_tensorboard_holds_the_log(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(data, tmp_path / "out", tensorboard=True), quiet())
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert np.allclose([e.value for e in events.Scalars("loss")], losses_of(tmp_path / "out"))
    assert {"lr/llm", "parts/cross_entropy", "grad_norm", "tokens"} <= set(events.Tags()["scalars"])
