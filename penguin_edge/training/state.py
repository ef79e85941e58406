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
import re
from collections.abc import Callable, Sequence
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
from penguin_edge.schema import Record, Whole
from penguin_edge.training.train_config import Lora
from penguin_edge.training.trainee import ADAPTER, like, save_adapter
from penguin_edge.training.trainee import whole as whole_tensor

STATE = "training.pt"
LOG = "log.jsonl"
STEP = "step.json"
RESULT = "model"
NAME = re.compile(r"step-(\d{8,})")
SCHEMA = 2
STEP_RULE = Record({"schema": Whole(), "files": FILES, "sha256": SHA256})
"""What `step.json` holds."""
UNHASHED = 1
"""The schema of steps that have no `step.json`."""


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
    found = {int(name[1]): path for path in out.glob("step-*") if (name := NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items()))


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
        CheckpointError: a folder of a step to come, or the result before the last step.
    """
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
    if not (folder / STEP).exists():
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
        schema = data.pop("schema")
        if schema not in (SCHEMA, UNHASHED):
            raise ValueError(f"schema {schema}, wanted {SCHEMA}")
        state = TrainingState(**data)
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
        if got != wanted:
            raise CheckpointError(
                f"{folder}: made with {key} {_brief(got)}, this run has {_brief(wanted)}; use the same settings to "
                "resume, or start a new run in another --out folder from --model " + str(folder)
            )
    return state


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "…"


def cut_log(out: Path, steps: int) -> None:
    """Remove log lines of steps that the checkpoint does not know: they will be taken again."""
    path = out / LOG
    if not path.is_file():
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


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], name_of: Callable[[torch.Tensor], str], saved: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` returned.

    Raises:
        CheckpointError: other parameters learn now than when it was saved.
    """
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = {name_of(parameter) for parameter in owners}
    if names != set(saved):
        odd = sorted(names ^ set(saved))
        raise CheckpointError(
            f"the checkpoint's optimiser knows {len(saved)} tensors and this run trains {len(names)}; the first "
            f"difference is {odd[0]}: freeze the same parts to resume"
        )
    for parameter, optimizer in owners.items():
        values = saved[name_of(parameter)]
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else like(value, parameter) for key, value in values.items()
        }
