"""Linear layers in the form of the ONNX Runtime operator that computes each.

| form          | operator                              | weight                                              |
|---------------|---------------------------------------|-----------------------------------------------------|
| Product       | MatMul                                | [K, N] f16 or f32                                   |
| BlockProduct  | MatMulNBits                           | [N, K/block, block*bits/8] u8, [N, K/block] f32     |
| RowProduct    | MatMulIntegerToFloat                  | [K, N] i8, [N] f32                                  |
| StaticProduct | MatMul of two DequantizeLinear        | [K, N] i8, [N] f32; see `static.py`                 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.export.targets.onnx.blocks import join
from penguin_edge.export.targets.onnx.static import StaticProduct
from penguin_edge.quantize.linear import SMALLEST, QuantizedLinear


@torch.library.custom_op("penguin_edge::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, outputs: int, bits: int, block: int
) -> Tensor:
    """What com.microsoft MatMulNBits computes; for tracing only, `QuantizedLinear` says the arithmetic.

    Args:
        x: [.., K] f32; packed: [N, K/block, block*bits/8] uint8, low bits first; scales: [N, K/block] f32.
        zeros: [N, bytes of K/block values] uint8, or None for the middle level.
    """
    raise NotImplementedError("traced, never run")


@matmul_nbits.register_fake
def _(x, packed, scales, zeros, inputs, outputs, bits, block):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op("penguin_edge::integer_product", mutates_args=())
def integer_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """What QuantizeLinear with a scale of 1 and then com.microsoft MatMulIntegerToFloat compute.

    Args:
        x: [.., K] f32 within -127 to 127; weight: [K, N] int8; scales: [N] f32.
    """
    return (x.round() @ weight.float()) * scales


@integer_product.register_fake
def _(x, weight, scales):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


class Product(nn.Module):
    """A linear layer as MatMul wants it: the weight as [in, out], cast to the dtype of `x` where it is used.

    Stored the other way round, every weight would be transposed anew by ONNX Runtime at load, in memory of its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.to(x.dtype)
        return out if self.bias is None else out + self.bias


class BlockProduct(nn.Module):
    """A `QuantizedLinear` as MatMulNBits wants it: integers packed by blocks, a scale for each block."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.levels.shape
        self.bits, self.block = linear.scheme.bits, linear.block
        blocks = self.inputs // self.block
        repeats = blocks // linear.scales.shape[1]
        self.register_buffer("packed", packed_bits(linear.levels.view(self.outputs, blocks, self.block), self.bits))
        self.register_buffer("scales", linear.scales.repeat_interleave(repeats, 1))
        zeros = None
        if not linear.scheme.symmetric:
            zeros = packed_bits(linear.zeros.repeat_interleave(repeats, 1), self.bits)
        self.register_buffer("zeros", zeros)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = matmul_nbits(x, self.packed, self.scales, self.zeros, self.inputs, self.outputs, self.bits, self.block)
        return out if self.bias is None else out + self.bias


class RowProduct(nn.Module):
    """A `QuantizedLinear` with one scale per row of weights and one per row of activations, as MatMulIntegerToFloat
    wants it."""

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.register_buffer("weight", (linear.levels.to(torch.int16) - 128).to(torch.int8).t().contiguous())
        self.register_buffer("scales", linear.scales[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # The largest magnitude without writing all magnitudes.
        reach = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
        scale = reach.clamp(min=SMALLEST) / 127
        out = integer_product(x / scale, self.weight, self.scales) * scale
        return out if self.bias is None else out + self.bias


PRODUCTS = (Product, BlockProduct, RowProduct, StaticProduct)
NODES = {
    BlockProduct: ["MatMulNBits"],
    RowProduct: ["MatMulIntegerToFloat"],
    StaticProduct: ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"],
}
"""The nodes that make a quantized product fast."""


def packed_bits(levels: Tensor, bits: int) -> Tensor:
    """The last dimension packed into bytes, low bits first; 4-bit values are padded to an even number."""
    if bits == 8:
        return levels.contiguous()
    if levels.shape[-1] % 2:
        levels = functional.pad(levels, (0, 1))
    return levels[..., 0::2] | (levels[..., 1::2] << 4)


def product(layer: nn.Module) -> nn.Module:
    """A linear layer in the form of the operator that computes it."""
    if isinstance(layer, QuantizedLinear):
        forms: dict[str, Callable[[QuantizedLinear], nn.Module]] = {"row": RowProduct, "static": StaticProduct}
        return forms.get(layer.activations, BlockProduct)(layer)
    assert isinstance(layer, nn.Linear)
    return Product(layer)


def prepare(module: nn.Module) -> nn.Module:
    """Turn linear layers into products and all other parameters into fp32, in place; no float weight is copied."""
    join(module, product)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | QuantizedLinear):
            setattr(module, name, product(child))
        elif not isinstance(child, PRODUCTS):
            prepare(child)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
    return module.eval()
