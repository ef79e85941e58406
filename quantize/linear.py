"""Linear layers in 8 or 4 bits: the integers (offline), and the module that computes with them (online).

| name    | shape    | dtype | what                                                          |
|---------|----------|-------|---------------------------------------------------------------|
| weight  | [N, K]   | float | of the layer that is quantized                                |
| levels  | [N, K]   | uint8 | 0 to 2^bits - 1, one per byte; targets pack them              |
| scales  | [N, K/G] | f32   | positive; G is the group, K for one scale per row; values of  |
|         |          |       | 4-bit layers are ones that bf16 holds, as XNNPACK stores them |
| zeros   | [N, K/G] | uint8 | the level of zero; 2^(bits-1) everywhere when symmetric       |

A weight is `(level - zero) * scale`. Every target is given these three tensors and packs them in its own way, so that
what was measured on one is what runs on all.

Engines quantize the activations, too, while they run: `Activations` names how, and `QuantizedLinear` repeats it, so
that an exported graph is compared with the arithmetic that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.errors import InputError
from penguin_edge.quantize.rows import by_parts

Method = Literal["rtn", "mse", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "mse", "gptq")
Activations = Literal["float", "block", "token", "row", "static"]
"""How an engine rounds what goes into a product: not at all; to int8 with one scale per row and `block` inputs (ONNX
Runtime's MatMulNBits at accuracy level 4); to int8 with scale and zero per row (XNNPACK); to int8 with one scale per
row (ONNX Runtime's MatMulIntegerToFloat between rows that are scaled to one range); to int8 with one constant scale
for all (QuantizeLinear and DequantizeLinear, as TensorRT wants them)."""
BITS = (4, 8)
SMALLEST = 1e-30
"""Takes the place of the largest activation of a row of zeros."""
SLAB = 3 << 18
"""Weights that are made anew at a time: 3 MB of fp32, which a cache holds until they are multiplied."""
ROUNDED = 1 << 19
"""Weights that are rounded at a time."""
FEW = 128
"""Rows of activations up to which the memory that a weight goes through takes longer than the sums."""
SHRINK = 20
"""Scales that `mse` tries per group, from the plain one down to half of it."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of one layer are stored.

    `group` None is one scale per row. `rtn` rounds to the nearest level of the full range; `mse` also tries narrower
    ranges and takes the one with the smallest squared error of the weights; `gptq` takes its scales and chooses the
    levels for what goes into the layer (`quantize/gptq.py`), which needs calibration data. The scale of static
    activations goes by the same words: `rtn` that of the largest value, otherwise the smallest squared error.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    method: Method = "mse"
    activations: Literal["block", "token", "static"] | None = None
    """Scales of the activations: one per row and block of inputs, or one per row, which computes many rows faster where
    an engine has both, or one constant from calibration (`quantize/static.py`). None: the engine's own way."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"{self.bits} bits, wanted one of {', '.join(map(str, BITS))}")
        if self.group is not None and (self.group < 16 or self.group & (self.group - 1)):
            raise InputError(f"a group of {self.group} weights, wanted a power of two from 16 on")
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if self.activations not in (None, "block", "token", "static"):
            raise InputError(f"unknown activations {self.activations!r}; known: block, token, static")
        if self.activations == "static" and (self.bits, self.group, self.symmetric) != (8, None, True):
            raise InputError(f"{self.label}, wanted 8 bits, symmetric, with one scale per row (a group of null)")

    @property
    def label(self) -> str:
        group = "per row" if self.group is None else f"group {self.group}"
        inputs = f", activations per {self.activations}" if self.activations else ""
        if self.activations == "static":
            inputs = ", static activations"
        return f"int{self.bits} {group}{'' if self.symmetric else ' asymmetric'} {self.method}{inputs}"

    @property
    def calibrated(self) -> bool:
        """Whether the integers, or the scale of the activations, depend on data that the model reads."""
        return self.method == "gptq" or self.activations == "static"

    def fits(self, inputs: int) -> bool:
        """Whether the group divides a layer of this many inputs."""
        return self.group is None or inputs % self.group == 0


@dataclass(frozen=True)
class Integers:
    """A quantized weight; see the top of this file."""

    levels: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme

    def rows(self, begin: int, end: int) -> Integers:
        """Integers of some of the N outputs."""
        return Integers(self.levels[begin:end], self.scales[begin:end], self.zeros[begin:end], self.scheme)

    def weight(self, out: Tensor | None = None) -> Tensor:
        """[N, K] f32, in the first rows of `out` [.., K] where that is given."""
        rows, groups = self.scales.shape
        # In place: a head of 150,000 rows is not to be in memory three times.
        values = torch.empty(self.levels.shape, device=self.levels.device) if out is None else out[:rows]
        grouped = values.view(rows, groups, -1).copy_(self.levels.view(rows, groups, -1))
        grouped.sub_(self.zeros[..., None]).mul_(self.scales[..., None])
        return values

    def slabs(self, begin: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """The weight of some of the N outputs, about `SLAB` weights at a time; a slab is overwritten by the next."""
        inputs = self.levels.shape[1]
        step = min(max(1, SLAB // inputs), end - begin)
        room = torch.empty((step, inputs), device=self.levels.device)
        for at in range(begin, end, step):
            rows = slice(at, min(at + step, end))
            yield rows, self.rows(rows.start, rows.stop).weight(room)


def quantize_weight(weight: Tensor, scheme: Scheme, name: str = "the layer") -> Integers:
    """Round a weight [N, K] to integers; fp32 inside, a slab of rows at a time.

    Raises:
        InputError: the group does not divide K, or a weight is NaN or infinite; the message names the layer.
    """
    inputs = weight.shape[1]
    if not scheme.fits(inputs):
        sizes = [size for size in (16, 32, 64, 128, 256) if inputs % size == 0]
        raise InputError(
            f"{name}: {inputs} inputs are not divisible by a group of {scheme.group}; "
            + (f"wanted one of {', '.join(map(str, sizes))}" if sizes else "no group divides it: keep it unquantized")
        )
    outputs, group = len(weight), scheme.group or inputs
    # Made before the slabs, which would otherwise lie between what is kept: half of the heap would be holes.
    levels = torch.empty((outputs, inputs), dtype=torch.uint8)
    scales = torch.empty((outputs, inputs // group))
    zeros = torch.empty((outputs, inputs // group), dtype=torch.uint8)
    step = max(1, ROUNDED // inputs)

    def round_part(begin: int, end: int) -> None:
        for at in range(begin, end, step):
            rows = slice(at, min(at + step, end))
            values = weight.detach()[rows].to(torch.float32).unflatten(1, (-1, group))
            if not bool(values.isfinite().all()):
                raise InputError(f"{name}: a weight is NaN or infinite; repair the checkpoint before you quantize it")
            rounded, scales[rows], zeros[rows] = _round(values, scheme)
            levels[rows] = rounded.flatten(1)

    by_parts(outputs, round_part)
    return Integers(levels, scales, zeros, scheme)


def _round(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """[N, groups, G] -> levels of that shape, scales and zeros [N, groups]."""
    lowest, top = bounds_of(scheme)
    reach = _reach(values, scheme)
    scales, zeros = _ranges(*reach, scheme, 1.0)
    if scheme.method != "rtn":
        half = 2 ** (scheme.bits - 1)
        error, work = torch.full_like(scales, torch.inf), torch.empty_like(values)
        for step in range(SHRINK):
            found, middle = _ranges(*reach, scheme, 1 - step / (2 * SHRINK))
            # In place: memory that is fresh for every operation takes longer than the arithmetic.
            torch.div(values, found[..., None], out=work)
            if scheme.symmetric:  # one middle for all: the same numbers in one operation instead of three
                work.round_().clamp_(lowest - half, top - half)
            else:
                work.round_().add_(middle[..., None]).clamp_(lowest, top).sub_(middle[..., None])
            miss = work.mul_(found[..., None]).sub_(values).square_().sum(-1)
            better = miss < error
            error = torch.where(better, miss, error)
            scales, zeros = torch.where(better, found, scales), torch.where(better, middle, zeros)
    levels = ((values / scales[..., None]).round_().add_(zeros[..., None])).clamp_(lowest, top)
    return levels.to(torch.uint8), scales, zeros.to(torch.uint8)


def bounds_of(scheme: Scheme) -> tuple[int, int]:
    """Lowest and highest level. Symmetric schemes use the lowest with 4 bits only, where one of 16 counts."""
    return int(scheme.symmetric and scheme.bits == 8), 2**scheme.bits - 1


def _reach(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, zero included; for symmetric schemes the largest magnitude either way."""
    if scheme.symmetric:
        largest = values.abs().amax(-1)
        return -largest, largest
    return values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)


def _ranges(low: Tensor, high: Tensor, scheme: Scheme, width: float) -> tuple[Tensor, Tensor]:
    """Scales and zeros, both f32, of a range of `width` times the full one."""
    low, high = low * width, high * width
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        scales = high / (half - 0.5 if scheme.bits == 4 else half - 1)
        zeros = torch.full_like(high, half)
    else:
        _, top = bounds_of(scheme)
        scales = (high - low) / top
        zeros = (-low / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, top)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # a group of zeros
    if scheme.bits == 4:
        scales = scales.bfloat16().float()
    return scales, zeros


def rounded_blocks(x: Tensor, block: int) -> Tensor:
    """`x` as int8 with one scale per row and `block` inputs, and back (MatMulNBits, accuracy level 4)."""
    parts = x.unflatten(-1, (-1, block))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((parts / scale).round() * scale).flatten(-2)


def rounded_rows(x: Tensor) -> Tensor:
    """`x` as int8 with scale and zero of each row, and back (torchao's asymmetric per-token form, for XNNPACK)."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def rounded_symmetric_rows(x: Tensor) -> Tensor:
    """`x` as int8 with one scale per row, and back (`RowProduct` of the ONNX Runtime target)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / 127
    return (x / scale).round() * scale


def rounded_static(x: Tensor, scale: Tensor) -> Tensor:
    """`x` as int8 with one scale for all, and back: ONNX's QuantizeLinear, halves to even, what is beyond cut off."""
    return (x / scale).round().clamp(-128, 127) * scale


class QuantizedLinear(nn.Module):
    """A linear layer [.., K] -> [.., N] with quantized weights; the weight is made anew for each call, by slabs.

    Computes in fp32 and gives back the dtype of `x`. `input_scale` [] f32 is that of static activations.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor
    input_scale: Tensor | None

    def __init__(
        self, integers: Integers, bias: Tensor | None, activations: Activations, input_scale: Tensor | None = None
    ) -> None:
        super().__init__()
        assert (input_scale is not None) == (activations == "static"), "static activations come with their scale"
        self.scheme, self.activations = integers.scheme, activations
        for name in ("levels", "scales", "zeros"):
            self.register_buffer(name, getattr(integers, name))
        self.register_buffer("input_scale", input_scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    @property
    def integers(self) -> Integers:
        return Integers(self.levels, self.scales, self.zeros, self.scheme)

    @property
    def form(self) -> tuple[float | str | None, ...]:
        """Layers of one form can be computed as one, if they read the same input."""
        scheme, scale = self.scheme, self.input_scale
        inputs = self.activations, self.levels.shape[1], None if scale is None else float(scale)
        return scheme.bits, scheme.group, scheme.symmetric, *inputs

    @property
    def block(self) -> int:
        """Inputs per scale where a target wants blocks: the group, or the largest size up to 128 that divides a row."""
        inputs = self.levels.shape[1]
        return self.scheme.group or next(size for size in (128, 64, 32, 16) if inputs % size == 0)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.activations == "block":
            y = rounded_blocks(y, self.block)
        elif self.activations == "token":
            y = rounded_rows(y)
        elif self.activations == "row":
            y = rounded_symmetric_rows(y)
        elif self.input_scale is not None:
            y = rounded_static(y, self.input_scale)
        # A whole weight is written to memory and read back three times, which only many rows are worth. Elsewhere than
        # on a processor a call costs more than the memory, and a gradient would need the slabs that are gone.
        few = y.device.type == "cpu" and not y.requires_grad and y.numel() <= FEW * y.shape[-1]
        if not few:
            return functional.linear(y, self.integers.weight(), self.bias).to(x.dtype)
        integers, bias = self.integers, self.bias
        out = torch.empty((*y.shape[:-1], len(self.levels)), device=y.device)

        def multiply(begin: int, end: int) -> None:
            for rows, weight in integers.slabs(begin, end):
                out[..., rows] = functional.linear(y, weight, None if bias is None else bias[rows])

        by_parts(len(self.levels), multiply)
        return out.to(x.dtype)
