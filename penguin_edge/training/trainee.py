"""The model in training: losses as its forward, LoRA, sharding, and its way back to a published model.

| our names in training                                 | published                       | saved in                   |
|-------------------------------------------------------|---------------------------------|----------------------------|
| encoder.* projector.* embedding.* decoder.*           | see `model/checkpoint.py`       | the checkpoint             |
| distill.{weight [T,E], bias [T]}                      | not: `vision_distill_layer.*`   | training.pt                |
| decoder.….lora_A.weight [r,in], lora_B.weight [out,r] | added to the weight beside them | training.pt and `adapter/` |

The teacher's tensors have no name here: they neither learn nor are saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from penguin_edge.config import PenguinConfig
from penguin_edge.errors import TargetUnavailable
from penguin_edge.model.checkpoint import meta_model
from penguin_edge.model.layers import Block
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.model.weights import published_name
from penguin_edge.training.losses import Distiller, Scope, cross_entropy
from penguin_edge.training.packing import Backend, Batch, forward_packed
from penguin_edge.training.train_config import Lora, Precision

ADAPTER = "adapter"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every matrix of the language model's blocks, as in the reference."""


class Trainee(nn.Module):
    """A model and perhaps a teacher. One call is one micro-batch, so that parallel wrappers see a single forward."""

    def __init__(
        self,
        penguin: PenguinModel,
        *,
        scope: Scope,
        backend: Backend,
        precision: Precision,
        distiller: Distiller | None,
    ) -> None:
        super().__init__()
        self.penguin, self.distiller = penguin, distiller
        self.scope, self.backend, self.precision = scope, backend, precision

    def forward(self, batch: Batch, items: float, distill_items: float, epoch: float) -> dict[str, Tensor]:
        """Scalars, float32: `loss`, whose gradient is wanted, and its parts.

        `cross_entropy` and `distillation` add up to the loss and are shares of the whole step, already divided by its
        items. `amplitude`, `direction` and `relation` are unweighted means over this batch.
        """
        with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = forward_packed(self.penguin, batch, self.backend)
            assert self.penguin.decoder is not None
            loss = cross_entropy(self.penguin.decoder, out.hidden, batch, scope=self.scope, items=items)
            if self.distiller is None:
                return {"loss": loss, "cross_entropy": loss.detach()}
            distilled = self.distiller(batch, out.features, epoch=epoch, items=distill_items, backend=self.backend)
        return {
            "loss": loss + distilled.loss,
            "cross_entropy": loss.detach(),
            "distillation": distilled.loss.detach(),
            "amplitude": distilled.amplitude,
            "direction": distilled.direction,
            "relation": distilled.relation,
        }


MEANS = ("amplitude", "direction", "relation")
"""Parts that are means over a batch; the others are shares of a step and add up."""


def named_tensors(trainee: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter but the teacher's, under our names, whatever wraps the model."""
    for name, parameter in trainee.named_parameters():
        name = name.removeprefix("module.")
        if name.startswith("distiller.teacher."):
            continue
        name = name.removeprefix("penguin.").replace("distiller.vision_distill_layer.", "distill.")
        yield name.replace(".base_layer.", ".").replace(".default.", "."), parameter


def is_adapter(name: str) -> bool:
    """A LoRA factor."""
    return ".lora_" in name


def is_extra(name: str) -> bool:
    """A trained tensor that is no part of the published model."""
    return is_adapter(name) or name.startswith("distill.")


def add_lora(penguin: PenguinModel, lora: Lora) -> None:
    """Put low-rank adapters, which change nothing yet, beside the matrices of the language model.

    Raises:
        TargetUnavailable: peft is not installed.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise TargetUnavailable("LoRA needs peft; run `pip install 'penguin-edge[train]'`") from None
    assert penguin.decoder is not None
    inject_adapter_in_model(_peft_config(lora), penguin.decoder)


def _peft_config(lora: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(LORA_TARGETS), bias="none"
    )


def shard(trainee: Trainee) -> None:
    """FSDP2: every block is a unit, the rest is one; parameters become shards on all processes.

    PyTorch's own call, not the plugin of accelerate: that one ignores FSDP on a CPU, where our tests run it.
    """
    from torch.distributed.fsdp import fully_shard

    for module in trainee.penguin.modules():
        if isinstance(module, Block):
            fully_shard(module)
    # The frozen teacher is used whole on every process.
    teacher = set() if trainee.distiller is None else set(trainee.distiller.teacher.parameters())
    fully_shard(trainee, ignored_params=teacher)


def whole(value: Tensor) -> Tensor:
    """A tensor on the host, put together from its shards where it has some; then every process has to call this."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.detach().cpu()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor laid out as `parameter` is: on its device, and cut into its shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)


def published_model(
    trainee: nn.Module, config: PenguinConfig, lora: Lora | None
) -> tuple[PenguinModel, dict[str, Tensor]]:
    """The model as it is published, LoRA merged, on the host; and the trained tensors that are no part of it.

    Every process has to call this when the parameters are sharded.
    """
    tensors = {name: whole(parameter) for name, parameter in named_tensors(trainee)}
    extra = {name: tensors.pop(name) for name in list(tensors) if is_extra(name)}
    if lora is not None:
        for name in [name for name in extra if name.endswith("lora_A.weight")]:
            base = name.removesuffix("lora_A.weight")
            delta = extra[base + "lora_B.weight"] @ extra[name] * (lora.alpha / lora.rank)
            tensors[base + "weight"] = tensors[base + "weight"] + delta
    model = meta_model(config)
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    model.tie()
    return model, extra


def save_adapter(folder: Path, extra: dict[str, Tensor], lora: Lora, base: str) -> None:
    """LoRA in peft's own form with the published names, so that `PeftModel` puts it on a Qwen3 of transformers."""
    folder.mkdir()
    names = {n: "base_model.model." + published_name(n) for n in extra if is_adapter(n)}
    save_file({names[n]: extra[n].contiguous() for n in names}, folder / "adapter_model.safetensors")
    config = _peft_config(lora)
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
