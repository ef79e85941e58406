"""Every setting of a training run, and what the four stages of the published recipe set (fact sheet, section 9.3).

Needs no torch, so that the command line can show the defaults where it is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from penguin_edge.dataset.samples import DataOptions
from penguin_edge.errors import InputError
from penguin_edge.training.schedule import Grouping, Rates

if TYPE_CHECKING:
    from penguin_edge.training.losses import Form, Scope
    from penguin_edge.training.packing import Backend

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainStage:
    """What differs between the stages (fact sheet, section 9.3)."""

    name: str
    rates: Rates
    data: DataOptions
    distill: bool = False


STAGES: dict[int, TrainStage] = {
    1: TrainStage(
        "encoder",
        Rates(projector=1e-3, encoder=3e-4, patch_embedding=1e-3, distill=1e-3),
        DataOptions(model_max_length=4096, mm_max_length=2048),
        distill=True,
    ),
    2: TrainStage("encoder at high resolution", Rates(llm=1e-5, projector=1e-4, encoder=1e-4), DataOptions()),
    3: TrainStage("pre-training", Rates(llm=1e-5, projector=1e-5, encoder=1e-5), DataOptions()),
    4: TrainStage("instruction tuning", Rates(llm=1e-5, projector=1e-5, encoder=1e-5), DataOptions()),
}


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the language model; defaults of the reference."""

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Defaults are those of the published recipe, except where a line says otherwise."""

    stage: int
    model: str
    """A checkpoint folder, a hub id, or a preset."""
    data: tuple[tuple[Path, float], ...]
    """Annotation files or folders, each with how often its records come per epoch."""
    out: Path
    random_weights: bool = False
    """Begin with weights drawn from `seed` in a preset's shape (`penguin_edge.training.initialise`)."""
    media_root: Path | None = None
    allow_outside: bool = False
    """Take media that lie outside the folder of their annotations, or `media_root`."""

    batch_size: int = 2
    """Samples of one micro-batch of one process; the published recipe has 128 per step over all processes."""
    accumulate: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    """Optimiser steps; None follows from `epochs`."""
    rates: Rates | None = None
    """None: those of the stage."""
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    warmup_lr_ratio: float | None = 0.1
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    muon_lr: float | None = None
    """Matrices inside the blocks learn by Muon at this rate, everything else by AdamW; None: all by AdamW. Not in the
    published recipe; from nothing, a small model took about a third fewer steps with it, and on a CPU as much time."""
    max_grad_norm: float = 1.0
    grouping: Grouping = "sound"
    """`reference` puts norms in the decaying half."""
    scope: Scope = "batch"
    options: DataOptions | None = None
    """None: those of the stage."""
    length_group: bool = True
    """Samples of like length share a step; builds every sample once to measure it."""
    length_jitter: float = 0.1

    teacher: Path | None = None
    """An encoder checkpoint (such as tencent/Penguin-Encoder, downloaded)."""
    distill: bool | None = None
    """None: as the stage does."""
    distill_form: Form = "edge"
    distill_weight: float = 1.0
    lora: Lora | None = None
    """Train the language model through low-rank adapters; its own weights stay."""

    seed: int = 42
    precision: Precision = "bf16"
    """bf16: autocast; weights, gradients and optimiser stay fp32."""
    attention: Backend = "padded"
    gradient_checkpointing: bool = True
    fsdp: bool = False
    """Shard parameters and optimiser over the processes (FSDP2); otherwise each process holds all (DDP)."""
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None
    workers: int = 2
    """Loader processes; the published recipe has 16."""
    prefetch: int = 4
    """Micro-batches that each loader process keeps ready."""

    save_every: int = 1000
    keep: int = 2
    max_shard_bytes: int = 5_000_000_000
    resume: bool = False
    max_bad_share: float = 0.1
    """Stop when more than this share of the samples seen was unreadable or too long."""
    peak_flops: float | None = None
    """Per process, for MFU; None measures a matrix product."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InputError(f"stage {self.stage} is unknown; known: {', '.join(map(str, STAGES))}")
        for name in ("batch_size", "accumulate", "save_every", "keep", "prefetch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("warmup_ratio", "min_lr_ratio", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; wanted a share between 0 and 1")
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}; wanted 0 or more")
        if self.muon_lr is not None and (self.fsdp or self.muon_lr <= 0):
            raise InputError("Muon needs whole matrices and a rate above 0; leave out --fsdp, or --muon-lr")
        if self.epochs <= 0 or (self.max_steps is not None and self.max_steps < 1):
            raise InputError("nothing to train; wanted epochs above 0 and at least one step")
