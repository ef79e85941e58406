"""GPTQ: round a weight column by column, and let the columns that are still to come make up for each error.

| name    | shape  | dtype | what                                                                             |
|---------|--------|-------|----------------------------------------------------------------------------------|
| weight  | [N, K] | float | of the layer that is quantized                                                   |
| hessian | [K, K] | f32   | sum of the outer products of what went into the layer, over the calibration data |

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. As in its published code columns with large inputs are rounded first; the groups and their scales are
those of the columns' own order, taken from the weights as they were, so that the integers have the plain layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penguin_edge.errors import InputError
from penguin_edge.quantize.linear import Integers, Scheme, bounds_of, quantize_weight

DAMP = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it, as in the paper."""
BLOCK = 128
"""Columns that are rounded before the columns behind them are corrected."""
SLAB_WEIGHTS = 1 << 24
"""Weights that are rounded at a time."""


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, name: str = "the layer") -> Integers:
    """Integers of a weight [N, K], chosen for the smallest error of products with inputs like the calibration data.

    Scales and zeros are those of the method `mse`.

    Raises:
        InputError: as `quantize_weight`; or an input of the layer was NaN or infinite, the message names the layer.
    """
    plain = quantize_weight(weight, scheme, name)
    if not bool(hessian.isfinite().all()):
        raise InputError(f"{name}: an activation of the calibration data is NaN or infinite; check model and data")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian, order)
    # Rows are independent; a head of 150,000 must not be in memory several times in fp32.
    slab = max(1, SLAB_WEIGHTS // weight.shape[1])
    parts = [
        _levels(weight[begin : begin + slab].detach().float(), plain.rows(begin, begin + slab), order, upper)
        for begin in range(0, len(weight), slab)
    ]
    return Integers(torch.cat(parts), plain.scales, plain.zeros, scheme)


def _levels(weight: Tensor, plain: Integers, order: Tensor, upper: Tensor) -> Tensor:
    rows, inputs = weight.shape
    group = plain.scheme.group or inputs
    lowest, top = bounds_of(plain.scheme)
    values = weight[:, order]
    scales = plain.scales.repeat_interleave(group, 1)[:, order]
    zeros = plain.zeros.float().repeat_interleave(group, 1)[:, order]
    levels = torch.empty(rows, inputs, dtype=torch.uint8)
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        errors = torch.zeros(rows, end - begin)
        for at in range(begin, end):
            column = values[:, at]
            level = ((column / scales[:, at]).round() + zeros[:, at]).clamp(lowest, top)
            levels[:, at] = level.to(torch.uint8)
            error = (column - (level - zeros[:, at]) * scales[:, at]) / upper[at, at]
            values[:, at:end] -= error[:, None] * upper[at, at:end]
            errors[:, at - begin] = error
        values[:, end:] -= errors @ upper[begin:end, end:]
    return levels[:, order.argsort()].contiguous()


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor [K, K] of the damped Hessian's inverse, rows and columns in `order`."""
    damped = hessian[order][:, order].clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    # An input that never moves says nothing of its column: any positive number leaves the column to itself.
    diagonal += DAMP * mean if mean > 0 else 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
