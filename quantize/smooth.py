"""Channels made even before rounding: SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978).

A channel j that a norm or an `up_proj` makes is divided by s_j there, and the columns that read it are multiplied by
it: the block computes the same. SmoothQuant evens out activations that are to be rounded with one scale per row; AWQ
gives more of the weights' few levels to the columns that matter.

| name    | shape  | dtype | what                                                        |
|---------|--------|-------|-------------------------------------------------------------|
| factor  | [K]    | f32   | s_j, positive                                               |
| largest | [K]    | f32   | largest magnitude of each input of a layer over all data    |
| hessian | [K, K] | f32   | sum of outer products of a layer's inputs                   |
| weights | [N, K] | float | of a layer that reads the channels                          |

`o_proj` stays as it is: what it reads comes out of the attention, whose values another graph may share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from penguin_edge.quantize.linear import Scheme, quantize_weight

GROUPS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
"""What makes the channels, and the layers that read them, the first of which names the factors."""
READ = tuple(readers[0] for _, readers in GROUPS)
AWQ = "awq"
STEPS = 10
"""Strengths that AWQ tries, from 0 on."""


def smooth_factor(weights: Sequence[Tensor], largest: Tensor, strength: float) -> Tensor:
    """SmoothQuant: largest_j^a / max |W_:j|^(1-a); 1 where a channel is never used."""
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0).clamp(min=1e-5)
    factor = largest**strength / columns ** (1 - strength)
    return torch.where((largest > 0) & (factor > 1e-5), factor, torch.ones_like(factor))


@torch.no_grad()
def awq_factor(weights: Sequence[Tensor], schemes: Sequence[Scheme | None], hessian: Tensor) -> Tensor:
    """AWQ: rms(x_j)^a, with the a whose rounded weights give the smallest squared error of the products.

    Args:
        schemes: how each weight will be rounded; None: not at all.
    """
    power = hessian.diagonal().clamp(min=0).sqrt()
    power = torch.where(power > 0, power, power[power > 0].amin() if bool((power > 0).any()) else 1.0)
    best, least = torch.ones_like(power), float("inf")
    for step in range(STEPS):
        factor = power ** (step / STEPS)
        factor = factor / (factor.amax() * factor.amin()).sqrt()
        missed = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            if scheme is not None:
                plain = replace(scheme, method="rtn")
                error = quantize_weight(weight.float() * factor, plain).weight() / factor - weight.float()
                missed += float(((error @ hessian) * error).sum())
        if missed < least:
            best, least = factor, missed
    return best


@torch.no_grad()
def apply_factors(block: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Divide what makes the channels and multiply what reads them, in place; by the names of `READ`."""
    for source, readers in GROUPS:
        factor = factors[readers[0]]
        made = block.get_submodule(source).get_parameter("weight")
        made.div_(factor if made.ndim == 1 else factor[:, None])
        for name in readers:
            block.get_submodule(name).get_parameter("weight").mul_(factor)
