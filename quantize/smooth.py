"""SmoothQuant (arXiv 2211.10438): channels that are large in the activations become large columns of the weights.

A channel j that a norm or an `up_proj` makes is divided by s_j there, and the columns that read it are multiplied by
it: the block computes the same, with activations that one scale per row fits better.

| name    | shape | dtype | what                                                     |
|---------|-------|-------|----------------------------------------------------------|
| maxima  | [K]   | f32   | largest magnitude of each input of a layer over all data |
| factor  | [K]   | f32   | s_j = maxima_j^a / max |W_:j|^(1-a)                      |

`o_proj` stays as it is: what it reads comes out of the attention, whose values another graph may share.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

GROUPS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
"""What makes the channels, and the layers that read them."""
READ = tuple(readers[0] for _, readers in GROUPS)
"""One layer of each group: the maxima of its inputs are all that is needed."""


@torch.no_grad()
def smooth_block(block: nn.Module, maxima: Mapping[str, Tensor], strength: float) -> None:
    """Move `strength` (0 to 1) of the channels' unevenness from activations to weights, in place.

    Args:
        maxima: by the names of `READ`.
    """
    for source, readers in GROUPS:
        layers = [block.get_submodule(name) for name in readers]
        weights = [layer.get_parameter("weight") for layer in layers]
        columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
        largest = maxima[readers[0]]
        factor = largest**strength / columns.clamp(min=1e-5) ** (1 - strength)
        factor = torch.where((largest > 0) & (factor > 1e-5), factor, torch.ones_like(factor))
        made = block.get_submodule(source).get_parameter("weight")
        made.div_(factor.to(made.dtype) if made.ndim == 1 else factor.to(made.dtype)[:, None])
        for weight in weights:
            weight.mul_(factor.to(weight.dtype))
