"""Checkpoints of a run: the published form plus one file with what training needs to go on.

    OUT/
      log.jsonl            one line per optimiser step
      step-00001000/       a checkpoint like any published one, and
        config.json  model.safetensors  tokenizer.json  …
        training.pt        the optimiser, the position in the data and the identity of the run
        step.json          SHA-256 of every file of the step, checked before a run goes on from it
      model/               the result, without training.pt

A checkpoint is written aside and renamed when complete: a full disk or a killed process leaves the previous one valid.
Only steps that hold nothing but their own files are ever removed.
There is no random state to store: every step seeds its own generators from (seed, step, process).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from penguin_edge.bundle.rules import FILES, SHA256
from penguin_edge.errors import CheckpointError, PenguinError, WriteError
from penguin_edge.files import file_hash, manifest_hash, parse_json, read_json, write_json, write_text
from penguin_edge.folders import discard, refuse_any, refuse_others, whole
from penguin_edge.model.checkpoint import write_published
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.schema import Free, Record, Rule, SchemaError, Table, Text, Whole
from penguin_edge.training.train_config import Lora
from penguin_edge.training.trainee import ADAPTER, is_extra, like, save_adapter
from penguin_edge.training.trainee import whole as whole_tensor

STATE = "training.pt"
LOG = "log.jsonl"
STEP = "step.json"
RESULT = "model"
NAME = re.compile(r"step-(\d{8,18})")
SCHEMA = 2
STEP_RULE = Record({"schema": Whole(), "files": FILES, "sha256": SHA256})
"""What `step.json` holds."""
UNHASHED = 1
"""The schema of steps that have no `step.json`."""


COUNTS = ("samples", "tokens", "visual_tokens", "targets", "bad", "too_long")
"""What is counted per step and over the run."""
BASE, TEACHER = "base weights of SHA-256", "a teacher of SHA-256"
"""What a step does not hold, in the identity of its run."""
LATER = {BASE: "the base that LoRA adapts", TEACHER: "the teacher"}
"""What earlier versions did not write into the identity of a run, and what it is of."""


@dataclass(frozen=True)
class Stored:
    """A tensor with numbers in memory: none of a sparse, quantized or empty kind, which a file can hold as well."""

    def check(self, value: Any, where: str) -> None:
        """Refuse what is no such tensor, or holds a number that is not finite.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        if type(value) is not torch.Tensor:
            raise SchemaError(f"{where} is {_brief(value)}, wanted a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
            raise SchemaError(
                f"{where} is a tensor of {value.dtype} ({value.layout}, {value.device.type}), wanted plain "
                "floating-point numbers"
            )
        if value.numel() and not all(math.isfinite(float(limit)) for limit in value.aminmax()):
            raise SchemaError(f"{where} holds a number that is NaN or infinite")


@dataclass(frozen=True)
class Plain:
    """What JSON holds, to any depth."""

    def check(self, value: Any, where: str) -> None:
        """Refuse what JSON cannot hold.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            raise SchemaError(f"{where} is {_brief(value)}, wanted plain JSON values") from None


NAMES = Text(longest=512)
STATE_RULE = Record(
    {
        "step": Whole(1),
        "identity": Table(Text(), Plain()),
        "counts": Record(dict.fromkeys(COUNTS, Whole())),
        "optimizer": Table(NAMES, Table(NAMES, Stored())),
        "extra": Table(NAMES, Stored()),
    }
)
"""What `training.pt` holds beside its schema."""


@dataclass
class TrainingState:
    """What a resumed run needs beside the weights."""

    step: int
    """Optimiser steps taken."""
    identity: dict[str, Any]
    """What has to be the same for the run to go on: plain JSON values."""
    counts: dict[str, int]
    optimizer: dict[str, Any]
    extra: dict[str, torch.Tensor]
    """Trained tensors that are no part of the published model: the distillation adapter, LoRA factors."""


def step_folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08}"


def step_folders(out: Path) -> dict[int, Path]:
    """Folders that are named as steps, oldest first: a copy by another name, such as step-best, is the user's."""
    names = [name for path in out.glob("step-*") if (name := NAME.fullmatch(path.name)) and path.is_dir()]
    found = {int(name[1]): out / name[0] for name in names}
    return {step: path for step, path in sorted(found.items()) if path == step_folder(out, step)}


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [folder for folder in step_folders(out).values() if (folder / STATE).is_file()]


def save_step(
    out: Path, model: PenguinModel, tokenizer: Path, state: TrainingState, *, keep: int, max_shard_bytes: int
) -> Path:
    """Write the checkpoint of one step and remove all but the last `keep`.

    Raises:
        CheckpointError: it cannot be written, such as on a full disk; earlier checkpoints stay as they are.
    """
    folder = step_folder(out, state.step)
    try:
        with whole(folder, refuse_any(folder, CheckpointError), CheckpointError) as aside:
            write_published(model, aside, tokenizer, max_shard_bytes=max_shard_bytes)
            torch.save({"schema": SCHEMA, **vars(state)}, aside / STATE)
            names = sorted(path.name for path in aside.iterdir())
            files = {
                name: {"sha256": file_hash(aside / name), "bytes": (aside / name).stat().st_size} for name in names
            }
            data = {"schema": SCHEMA, "files": files}
            write_json(aside / STEP, {**data, "sha256": manifest_hash(data)})
    except WRITE_ERRORS as error:
        before = checkpoints(out)
        hint = f"{before[-1].name} is complete: make room and resume from it" if before else "make room and start again"
        raise CheckpointError(f"{folder}: cannot be written ({first_line(error)}); {hint}") from error
    for old in checkpoints(out)[:-keep]:
        with contextlib.suppress(PenguinError, OSError):  # what holds anything of the user's stays
            discard(old, refuse_others({*names, STEP}, CheckpointError), CheckpointError)
    return folder


def save_result(
    out: Path,
    model: PenguinModel,
    tokenizer: Path,
    *,
    adapter: tuple[dict[str, torch.Tensor], Lora, str] | None,
    max_shard_bytes: int,
) -> None:
    """Write OUT/model, with the adapter of a LoRA run in it.

    Raises:
        CheckpointError: it cannot be written.
    """
    result = out / RESULT
    try:
        with whole(result, refuse_any(result, CheckpointError), CheckpointError) as aside:
            write_published(model, aside, tokenizer, max_shard_bytes=max_shard_bytes)
            if adapter is not None:
                save_adapter(aside / ADAPTER, *adapter)
    except WRITE_ERRORS as error:
        raise CheckpointError(
            f"{result}: cannot be written ({first_line(error)}); the last step is complete: make room and resume"
        ) from error


def check_room(out: Path, begin: int, total: int) -> None:
    """Refuse what stands where a run will write; it would be lost, or be taken for the run's own.

    Args:
        begin: steps already taken, of `total`.
    Raises:
        CheckpointError: a folder of a step to come, or the result before the last step; or the log is no file.
    """
    log_file(out)
    taken = [folder for step, folder in step_folders(out).items() if step > begin and any(folder.iterdir())]
    if begin < total and (out / RESULT).exists():
        taken.append(out / RESULT)
    if taken:
        raise CheckpointError(
            f"{taken[0]} is there already, and the run stands at step {begin} of {total}; move it away"
        )


def check_step(folder: Path) -> bool:
    """Compare every file of a step with its SHA-256; False for a step without any.

    Raises:
        CheckpointError: a file differs or is missing.
    """
    if not regular(folder / STEP, "").exists():
        return False
    data = read_json(folder / STEP, rule=STEP_RULE, error=CheckpointError)
    files = data["files"]
    if data["sha256"] != manifest_hash(data) or STATE not in files:
        raise CheckpointError(f"{folder / STEP}: damaged")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its content is not what was written (SHA-256 does not match)")
    return True


def _before(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    for earlier in reversed([step for step in checkpoints(folder.parent) if step < folder]):
        with contextlib.suppress(CheckpointError):
            state = "is whole" if check_step(earlier) else "is the one before, without hashes to check"
            return f"{earlier.name} {state}: remove {folder} to go on from there"
    return "no earlier checkpoint is whole: start a new run in another --out folder"


WRITE_ERRORS = (WriteError, OSError, RuntimeError, SafetensorError)
"""How files that cannot be written are reported: torch and safetensors have ways of their own."""


def first_line(error: Exception) -> str:
    if isinstance(error, WriteError):
        return error.reason
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_state(folder: Path, identity: dict[str, Any], say: Callable[[str], None]) -> TrainingState:
    """The training state of a checkpoint, if it belongs to this run.

    Whether its tensors fit the parameters is seen when there are some: `load_extra`, `load_optimizer_state`.

    Raises:
        CheckpointError: a file of the step is damaged, or it is of a run with another stage, shape, data or layout;
            the message names the first difference.
    """
    path = folder / STATE
    try:
        checked = check_step(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_before(folder)}") from error
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        if type(schema) is not int or schema not in (SCHEMA, UNHASHED):
            raise ValueError(f"schema {_brief(schema)}, wanted {SCHEMA}")
        STATE_RULE.check(data, "")
        state = TrainingState(**data)
        if folder != step_folder(folder.parent, state.step):
            raise ValueError(f"step is {state.step}, wanted that of the folder's name")
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as a training state ({first_line(error)}); {_before(folder)}"
        ) from error
    if not checked and schema != UNHASHED:
        raise CheckpointError(f"{folder / STEP}: missing, so nothing says that the step is whole; {_before(folder)}")
    if not checked:
        say(f"note: {folder} was written without hashes, by an earlier version: its content cannot be checked")
    for key, wanted in identity.items():
        got = state.identity.get(key)
        if key in LATER and key not in state.identity and wanted is not None:
            say(
                f"note: {folder} was written without a hash of {LATER[key]}, by an earlier version: that the weights "
                "are the same cannot be checked"
            )
        elif got != wanted:
            raise CheckpointError(
                f"{folder}: made with {key} {_brief(got)}, this run has {_brief(wanted)}; use the same settings to "
                "resume, or start a new run in another --out folder from --model " + str(folder)
            )
    total = identity.get("steps")
    if isinstance(total, int) and state.step > total:
        raise CheckpointError(f"{path}: step is {state.step} in a run of {total} steps; {_before(folder)}")
    return state


def _brief(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "…"


def log_file(out: Path) -> Path:
    """The run's log, which may not be there yet.

    Raises:
        CheckpointError: something else has its name, such as a pipe, which would wait for a reader or a writer.
    """
    return regular(out / LOG)


def regular(path: Path, advice: str = "; move it away") -> Path:
    """A path at which a regular file stands, or nothing.

    Raises:
        CheckpointError: something else is there.
    """
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise CheckpointError(f"{path}: no regular file{advice}")
    return path


def cut_log(out: Path, steps: int) -> None:
    """Remove log lines of steps that the checkpoint does not know: they will be taken again."""
    path = log_file(out)
    if not path.exists():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            step = parse_json(line, f"{path}: line {number}")["step"]
            if not isinstance(step, int):
                raise TypeError
        except (PenguinError, KeyError, TypeError):
            if number == len(lines):  # cut off by a kill
                break
            raise CheckpointError(
                f"{path}: line {number} is none of a run's log, and lines would be removed; move the file away"
            ) from None
        if step > steps:
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], name_of: Callable[[torch.Tensor], str]
) -> dict[str, Any]:
    """The optimisers' tensors by parameter name, on the host; every process calls this when they are sharded."""
    return {
        name_of(parameter): {key: whole_tensor(value) for key, value in values.items()}
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
    }


MOMENTS: Mapping[str, tuple[str, ...]] = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
"""Tensors of each optimiser that are shaped as their parameter."""


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
    name_of: Callable[[torch.Tensor], str],
    state: TrainingState,
    path: Path,
) -> None:
    """Put back what `optimizer_state` returned; all of it is checked first, since torch trusts it.

    Args:
        path: the file that it was read from.
    Raises:
        CheckpointError: other parameters learn now than when it was saved, or a tensor does not fit its parameter.
    """
    saved = state.optimizer
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = {name_of(parameter) for parameter in owners}
    if names != set(saved):
        odd = sorted(names ^ set(saved))
        raise CheckpointError(
            f"{path}: the optimiser's state is of {len(saved)} tensors and this run trains {len(names)}; the first "
            f"difference is {odd[0][:80]}: freeze the same parts to resume"
        )
    for parameter, optimizer in owners.items():
        name = name_of(parameter)
        try:
            _check_moments(saved[name], f"optimizer.{name}", type(optimizer).__name__, parameter, state.step)
        except SchemaError as error:
            raise CheckpointError(f"{path}: {error}; {_before(path.parent)}") from error
    for parameter, optimizer in owners.items():
        values = saved[name_of(parameter)]
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else like(value, parameter) for key, value in values.items()
        }


def _check_moments(values: dict[str, torch.Tensor], where: str, kind: str, parameter: torch.Tensor, taken: int) -> None:
    """Compare the stored state of one parameter with it.

    Args:
        kind: of the optimiser.
        taken: steps of the run, which no parameter can have learned more of.
    Raises:
        SchemaError: one sentence that begins with `where`.
    """
    moments = MOMENTS[kind]
    fields: dict[str, Rule] = dict.fromkeys(moments, Free())
    Record({**fields, "step": Free()} if kind == "AdamW" else fields).check(values, where)
    for key in moments:
        _fit(values[key], f"{where}.{key}", parameter)
    if kind == "AdamW":
        steps = values["step"]
        if steps.numel() != 1 or steps.ndim or steps.dtype != torch.float32 or float(steps) not in range(1, taken + 1):
            raise SchemaError(f"{where}.step is {str(steps.tolist())[:40]}, wanted a whole number, 1 to {taken}")
        if values["exp_avg_sq"].numel() and float(values["exp_avg_sq"].min()) < 0:
            raise SchemaError(f"{where}.exp_avg_sq holds a negative number, wanted squares")


def _fit(value: torch.Tensor, where: str, parameter: torch.Tensor) -> None:
    if value.shape != parameter.shape or value.dtype != parameter.dtype:
        raise SchemaError(
            f"{where} is {list(value.shape)} of {value.dtype}, wanted {list(parameter.shape)} of {parameter.dtype}"
        )


def load_extra(named: Mapping[str, torch.Tensor], state: TrainingState, path: Path) -> None:
    """Put trained tensors that are no part of the published model back into theirs.

    Args:
        named: all tensors of the model in training.
        path: the file that they were read from.
    Raises:
        CheckpointError: other ones are there than the model has, or one does not fit.
    """
    wanted = {name for name in named if is_extra(name)}
    try:
        if wanted != set(state.extra):
            odd = sorted(wanted ^ set(state.extra))[0]
            raise SchemaError(f"extra has {'no' if odd in wanted else 'an unknown'} tensor {odd[:80]}")
        for name in sorted(wanted):
            _fit(state.extra[name], f"extra.{name}", named[name])
    except SchemaError as error:
        raise CheckpointError(f"{path}: {error}; {_before(path.parent)}") from error
    with torch.no_grad():
        for name in sorted(wanted):
            named[name].copy_(state.extra[name])
