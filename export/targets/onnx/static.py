"""Products with static activations in the `.onnx` files: plain ONNX in the explicit Q/DQ form.

| name        | shape   | dtype | what                             |
|-------------|---------|-------|----------------------------------|
| x           | [.., K] | f32   | activations                      |
| input_scale | []      | f32   | one constant for all activations |
| weight      | [K, N]  | int8  | zero at 0                        |
| scales      | [N]     | f32   | one per output                   |

QuantizeLinear(x) -> DequantizeLinear -> MatMul <- DequantizeLinear(weight, axis 1), all zeros at 0: what TensorRT reads
its 8-bit products from, and what ONNX Runtime makes a MatMulIntegerToFloat of when it loads the graph. It does so only
where no other product reads the same rounded activations; otherwise it computes in fp32, with a weight made anew for
each call. Layers that read the same input are one product (`onnx_blocks.Joined`), so that none share it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penguin_edge.quantize.linear import QuantizedLinear, rounded_static


@torch.library.custom_op("penguin_edge::static_product", mutates_args=())
def static_product(x: Tensor, scale: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """MatMul of DequantizeLinear(QuantizeLinear(x)) and DequantizeLinear(weight), int8 with zeros at 0.

    Args:
        x: [.., K] f32; scale: [] f32; weight: [K, N] int8; scales: [N] f32.
    """
    return rounded_static(x, scale) @ (weight * scales)


@static_product.register_fake
def _(x, scale, weight, scales):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


class StaticProduct(nn.Module):
    """A `QuantizedLinear` with one scale per row of weights and one for all activations, in explicit Q/DQ."""

    weight: Tensor
    scales: Tensor
    input_scale: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.register_buffer("weight", (linear.levels.to(torch.int16) - 128).to(torch.int8).t().contiguous())
        self.register_buffer("scales", linear.scales[:, 0])
        self.register_buffer("input_scale", linear.input_scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = static_product(x, self.input_scale, self.weight, self.scales)
        return out if self.bias is None else out + self.bias


def translate_static(x, scale, weight, scales):  # type: ignore[no-untyped-def]
    """The nodes of a `static_product`, for onnxscript."""
    import onnx
    from onnxscript import opset23

    plain: Any = opset23
    zero = plain.Constant(value=onnx.numpy_helper.from_array(np.array(0, np.int8)))
    rounded = plain.DequantizeLinear(plain.QuantizeLinear(x, scale, zero), scale, zero)
    return plain.MatMul(rounded, plain.DequantizeLinear(weight, scales, axis=1))
