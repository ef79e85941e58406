"""What learns how fast: the learning-rate schedule, which parts are frozen, and the optimiser's groups.

Parts of a model in training, by our parameter names:

| part            | names                      | reference's option                                            |
|-----------------|----------------------------|---------------------------------------------------------------|
| llm             | decoder.*, embedding.*     | llm_lr                                                        |
| projector       | projector.*                | vision_projector_lr                                           |
| encoder         | encoder.* but the patches  | vision_encoder_lr                                             |
| patch_embedding | encoder.patch_embedding.*  | embedding_lr, or vision_encoder_lr where that is null         |
| distill         | distill.*                  | embedding_lr, or llm_lr: its group depends on what is frozen  |

Source: the reference's `penguinvl_trainer.py` and `scripts/train` (fact sheet, section 9.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from penguin_edge.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    Named = Iterable[tuple[str, nn.Parameter]]

Grouping = Literal["sound", "reference"]


def cosine_with_min_lr(
    step: int, *, warmup_steps: int, total_steps: int, min_lr_ratio: float, warmup_lr_ratio: float | None
) -> float:
    """Factor of the learning rate for optimiser step `step` (from 0).

    The last of `total_steps` steps is taken at exactly `min_lr_ratio`, and so is every step after it.

    Args:
        warmup_lr_ratio: where the warm-up starts; None starts at 1/warmup_steps.
    """
    if step < warmup_steps:
        if warmup_lr_ratio is None:
            return (step + 1) / warmup_steps
        return warmup_lr_ratio + (1 - warmup_lr_ratio) * step / max(1, warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps + 1) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress)) * (1 - min_lr_ratio) + min_lr_ratio


@dataclass(frozen=True)
class Rates:
    """Learning rate of each part; None freezes it."""

    llm: float | None = None
    projector: float | None = None
    encoder: float | None = None
    patch_embedding: float | None = None
    """None: learns with the encoder."""
    distill: float | None = None
    """The adapter to the teacher's width; only there when a stage distills."""

    def of(self, name: str) -> float | None:
        """The learning rate of one of our parameter names.

        Raises:
            InputError: a name of no part.
        """
        part = part_of(name)
        if part == "patch_embedding" and self.patch_embedding is None:
            part = "encoder"
        rate: float | None = getattr(self, part)
        return rate

    def scaled_to(self, rate: float) -> Rates:
        """Every part that learns at all learns at `rate`."""
        return Rates(**{f.name: None if getattr(self, f.name) is None else rate for f in fields(self)})


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    Raises:
        InputError: a name of no part.
    """
    first = name.partition(".")[0]
    if name.startswith("encoder.patch_embedding."):
        return "patch_embedding"
    parts = {"decoder": "llm", "embedding": "llm", "projector": "projector", "encoder": "encoder", "distill": "distill"}
    if first not in parts:
        raise InputError(f"parameter {name} belongs to no part; known: {', '.join(parts)}")
    return parts[first]


@dataclass(frozen=True)
class Group:
    """One group of the optimiser: parameter names that share a learning rate and a weight decay."""

    part: str
    learning_rate: float
    weight_decay: float
    names: tuple[str, ...]
    muon: bool = False
    """Learns by Muon; otherwise by AdamW."""


def freeze(parameters: Named, rates: Rates) -> None:
    """Set `requires_grad` from the rates. A tied head is the embedding table and follows `llm` like an untied one.

    In the reference an untied head stays trainable though no group holds it; here null freezes all of the part.
    """
    for name, parameter in parameters:
        parameter.requires_grad_(rates.of(name) is not None)


def parameter_groups(parameters: Named, rates: Rates, weight_decay: float, grouping: Grouping = "sound") -> list[Group]:
    """Groups of all trainable parameters, empty groups left out.

    `sound`: matrices decay, vectors (biases and norms) do not; the distill adapter is a part of its own.
    `reference`: as recorded from the reference: norms decay, only biases do not; the adapter learns with the patch
    embedding when that has a rate, else with the language model.

    Args:
        parameters: our names, as of `PenguinModel.named_parameters`, plus `distill.*`; a tied head comes once.
    Raises:
        InputError: nothing learns, or a trainable parameter has no learning rate.
    """
    found: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        if part == "patch_embedding" and rates.patch_embedding is None:
            part = "encoder"
        if grouping == "reference" and part == "distill":
            part = "llm" if rates.patch_embedding is None else "patch_embedding"
        decays = not name.endswith(".bias") if grouping == "reference" else parameter.ndim >= 2
        found.setdefault((part, decays), []).append(name)
    if not found:
        raise InputError("every part is frozen; give at least one part a learning rate")
    groups = []
    for part in ("llm", "projector", "encoder", "patch_embedding", "distill"):
        for decays in (True, False):
            names = found.get((part, decays))
            if not names:
                continue
            rate: float | None = getattr(rates, part)
            if rate is None:
                raise InputError(
                    f"{names[0]} is trainable but {part} has no learning rate; give it one or freeze the parameter"
                )
            groups.append(Group(part, rate, weight_decay if decays else 0.0, tuple(names)))
    return groups


def with_muon(groups: Iterable[Group], rate: float) -> list[Group]:
    """The groups with the blocks' matrices in groups of their own, which learn by Muon at `rate`.

    Muon is for matrices between hidden activations: tables, heads and the patch embedding stay with AdamW.
    """
    adam, muon = [], []
    for group in groups:
        matrices = tuple(name for name in group.names if ".layers." in name and name.endswith("_proj.weight"))
        rest = tuple(name for name in group.names if name not in matrices)
        if rest:
            adam.append(replace(group, names=rest))
        if matrices:
            muon.append(replace(group, names=matrices, learning_rate=rate, muon=True))
    return adam + muon


def optimizers(
    groups: Sequence[Group], named: Mapping[str, nn.Parameter], betas: tuple[float, float], eps: float
) -> list[Optimizer]:
    """AdamW, then Muon where a group asks for it; their groups one after another are `groups`, as `with_muon` sorts."""
    import torch

    def options(muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": [named[n] for n in g.names], "lr": g.learning_rate, "weight_decay": g.weight_decay}
            for g in groups
            if g.muon == muon
        ]

    found: list[Optimizer] = []
    if options(False):
        found.append(torch.optim.AdamW(options(False), betas=betas, eps=eps, fused=True))
    if options(True):
        found.append(torch.optim.Muon(options(True)))
    return found
