"""Checkpoints of a run: the published form plus one file with what training needs to go on.

    OUT/
      log.jsonl            one line per optimiser step
      step-00001000/       a checkpoint like any published one …
        config.json  model.safetensors  tokenizer.json  …
        training.pt        … and the optimiser, the position in the data and the identity of the run
      model/               the result, without training.pt

A checkpoint is written aside and renamed when complete: a full disk or a killed process leaves the previous one valid.
There is no random state to store: every step seeds its own generators from (seed, step, process).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penguin_edge.checkpoint import save
from penguin_edge.errors import CheckpointError
from penguin_edge.model import PenguinModel
from penguin_edge.trainee import like, whole

STATE = "training.pt"
LOG = "log.jsonl"
RESULT = "model"
SCHEMA = 1


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


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in out.glob("step-*") if (folder / STATE).is_file())


def save_step(
    out: Path, model: PenguinModel, tokenizer: Path, state: TrainingState, *, keep: int, max_shard_bytes: int
) -> Path:
    """Write the checkpoint of one step and remove all but the last `keep`.

    Raises:
        CheckpointError: it cannot be written, such as on a full disk; earlier checkpoints stay as they are.
    """
    folder = step_folder(out, state.step)
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save(model, aside, tokenizer, max_shard_bytes=max_shard_bytes)
        torch.save({"schema": SCHEMA, **vars(state)}, aside / STATE)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a failed write in their own ways
        shutil.rmtree(aside, ignore_errors=True)
        before = checkpoints(out)
        hint = f"{before[-1].name} is complete: make room and resume from it" if before else "make room and start again"
        raise CheckpointError(f"{folder}: cannot be written ({_first_line(error)}); {hint}") from error
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_state(folder: Path, identity: dict[str, Any]) -> TrainingState:
    """The training state of a checkpoint, if it belongs to this run.

    Raises:
        CheckpointError: unreadable, or of a run with another stage, shape, data or layout; the message names the first
            difference.
    """
    path = folder / STATE
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        if data.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        state = TrainingState(**data)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as a training state ({_first_line(error)}); resume from an earlier checkpoint by "
            "removing this folder"
        ) from error
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
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > steps:
                break
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            break
        kept.append(line + "\n")
    aside = path.with_name(f".{LOG}")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], name_of: Callable[[torch.Tensor], str]
) -> dict[str, Any]:
    """The optimisers' tensors by parameter name, on the host; every process calls this when they are sharded."""
    return {
        name_of(parameter): {key: whole(value) for key, value in values.items()}
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
