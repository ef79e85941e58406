"""The processes of a run, and what ends all of them."""

from __future__ import annotations

from typing import Any

import torch

from penguin_edge.errors import InputError, PenguinError, TargetUnavailable
from penguin_edge.training.train_config import TrainConfig


class NonFiniteLoss(PenguinError):
    """The loss or its gradient is NaN or infinite; the message names the file with the records of the step."""


def accelerator_of(config: TrainConfig) -> Any:
    """The `accelerate.Accelerator` of this process.

    Raises:
        TargetUnavailable: accelerate is not installed.
        InputError: sharding without processes to shard over.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise TargetUnavailable("training needs accelerate; run `pip install 'penguin-edge[train]'`") from None
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available())
    if config.fsdp and not torch.distributed.is_initialized():
        raise InputError("--fsdp shards the model over processes; start it with torchrun")
    return accelerator
