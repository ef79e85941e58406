"""One constant scale for all that goes into a layer: gathered while data is read, chosen by the error that it leaves.

| name   | shape   | dtype | what                                                           |
|--------|---------|-------|----------------------------------------------------------------|
| x      | [.., K] | f32   | what goes into a layer                                         |
| counts | [BINS]  | i64   | how many values had which magnitude, from 0 to `reach`         |
| scale  | []      | f32   | positive; x becomes clamp(round(x / scale), -128, 127) * scale |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from penguin_edge.errors import InputError

BINS = 1 << 14
"""Bins of the histogram: at least 64 to a step of the widest scale, four to a step of the narrowest."""
STEPS, OCTAVE = 33, 8
"""Scales that are tried, from the one of the largest value down to a 16th of it, eight to a halving."""
SLAB = 1 << 22
"""Values that are counted at a time."""


class Spread:
    """Magnitudes of what went into a layer. Counts are whole numbers: their order does not matter."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.reach = self.largest = 0.0

    def add(self, x: Tensor, name: str = "the layer") -> None:
        """Count the values of `x`.

        Raises:
            InputError: one is NaN or infinite; the message names the layer.
        """
        sizes = x.detach().float().abs().flatten()
        largest = float(sizes.amax())
        if not math.isfinite(largest):
            raise InputError(f"{name}: an activation of the calibration data is NaN or infinite; check model and data")
        self.largest = max(self.largest, largest)
        if self.largest >= self.reach:
            # Powers of two, so that a wider reach joins whole bins and loses nothing.
            wider = 2.0 ** max(math.frexp(self.largest)[1], -100)
            while 0 < self.reach < wider:
                self.counts = torch.cat((self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)))
                self.reach *= 2
            self.reach = wider
        for part in sizes.split(SLAB):
            self.counts += (part * (BINS / self.reach)).long().bincount(minlength=BINS)

    def scale(self, narrower: bool) -> Tensor:
        """The scale of the largest value or, where `narrower` ones may do, the one with the least squared error."""
        largest = self.largest if self.largest > 1e-30 else 127.0  # nothing ever went in: any scale will do
        if not narrower:
            return torch.tensor(largest / 127)
        kept = self.counts.nonzero()[:, 0]
        counts, values = self.counts[kept].double(), (kept.double() + 0.5) * (self.reach / BINS)
        best, least = largest / 127, math.inf
        for step in range(STEPS):
            scale = largest / 127 * 2.0 ** (-step / OCTAVE)
            missed = float((((values / scale).round().clamp(max=127) * scale - values).square() * counts).sum())
            if missed < least:
                best, least = scale, missed
        return torch.tensor(best)


def measure(
    layers: Mapping[str, nn.Module], run: Callable[[int], Tensor], count: int
) -> tuple[dict[str, Spread], list[Tensor]]:
    """What goes into each layer while `run` computes each of `count` inputs, and what it computes.

    Layers that read the very same tensor share what was counted.

    Raises:
        InputError: an activation is NaN or infinite; the message names the layer.
    """
    spreads: dict[str, Spread] = {}
    last: tuple[Tensor, Spread] | None = None

    def gather(name: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and last[0] is x:
            spreads[name] = last[1]
            return
        spreads.setdefault(name, Spread()).add(x, name)
        last = (x, spreads[name])

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: gather(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        out = [run(index) for index in range(count)]
    finally:
        for handle in hooks:
            handle.remove()
    return spreads, out
