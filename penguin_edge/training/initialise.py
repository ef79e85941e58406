"""Weights to start a training from nothing with.

`checkpoint.random_tensor` makes weights whose outputs are varied, for tests and for measuring; these are made to learn.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from penguin_edge.model.layers import Block, RMSNorm
from penguin_edge.model.penguin import PenguinModel

GAIN = 0.7


@torch.no_grad()
def initialise(model: PenguinModel, seed: int) -> None:
    """Overwrite all parameters.

    Linear weights are N(0, (0.7²)/fan_in), those that write to the residual stream divided by sqrt(2 * layers), the
    embedding N(0, 1/width), so that a tied head begins with logits of about unit size; norms 1, biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, GAIN / math.sqrt(module.in_features), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    for part in (model.encoder, model.decoder):
        blocks = [module for module in (part.modules() if part else ()) if isinstance(module, Block)]
        for block in blocks:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.div_(math.sqrt(2 * len(blocks)))
    if model.embedding is not None:
        model.embedding.weight.normal_(0, model.embedding.weight.shape[1] ** -0.5, generator=generator)
