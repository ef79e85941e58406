"""What quantization does to every linear layer: the quantized model beside the unquantized one, both eager.

Both are walked side by side, stage by stage (patch embedding, every block, projector, head), over the same samples.
Two errors per layer, each over all outputs of all samples:

| error       | the quantized layer reads                                                              |
|-------------|----------------------------------------------------------------------------------------|
| own         | what the unquantized layer reads: what its own weights and rounded activations cost    |
| accumulated | what the quantized model has computed so far: what arrives there                       |

Where channels are smoothed (`quantize/smooth.py`) the factors are taken out again before anything is compared. A
decoder reads whole samples at once; `prefill` and `decoder` are walked each for itself, from the same embeddings.

| name        | shape     | dtype | what                                                       |
|-------------|-----------|-------|------------------------------------------------------------|
| wanted, got | [1, S, H] | float | what a stage reads in either model, one tensor per sample  |

In memory: one part twice, the states before a stage, and the linear layers' activations of one block and sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from penguin_edge.dataset.samples import Sample
from penguin_edge.errors import InputError
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.encoder import rotary_2d
from penguin_edge.model.layers import full_attention, rotary_angles
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.apply import DECODERS, DTYPES, Calibrated, load_quantized, module_of
from penguin_edge.quantize.calibration.calibrate import stage_count
from penguin_edge.quantize.linear import Activations, QuantizedLinear
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.quantize.smooth import GROUPS

HEAD_ROWS = 64
"""Positions of a sample whose logits are compared, evenly spread: all of a large vocabulary take 0.3 GB."""
CountProgress = Callable[[int, int], None]
"""(stages done, stages)."""
Turns = list[tuple[Tensor, Tensor]]


@dataclass
class Distance:
    """How far some values are from those that are wanted, summed up in fp64."""

    wanted: float = 0.0
    got: float = 0.0
    both: float = 0.0
    missed: float = 0.0

    def add(self, got: Tensor, wanted: Tensor) -> None:
        a, b = got.double().flatten(), wanted.double().flatten()
        self.got += float(a @ a)
        self.wanted += float(b @ b)
        self.both += float(a @ b)
        self.missed += float((a - b).square().sum())

    @property
    def cosine(self) -> float:
        if not self.missed:
            return 1.0
        return self.both / max(math.sqrt(self.got) * math.sqrt(self.wanted), 1e-30)

    @property
    def snr_db(self) -> float | None:
        """10 log10 of the signal's power over the error's; None where nothing is missed."""
        return 10 * math.log10(max(self.wanted, 1e-30) / self.missed) if self.missed else None


@dataclass(frozen=True)
class LayerError:
    """One linear layer. `snr_db` None: not a bit is different."""

    layer: str
    scheme: str
    cosine: float
    snr_db: float | None
    own_cosine: float
    own_snr_db: float | None


@dataclass
class _ErrorWalk:
    """One part of both models."""

    reference: PenguinModel
    quantized: PenguinModel
    part: str
    dtype: torch.dtype
    factors: Callable[[str], Mapping[str, Tensor]] | None
    done: Callable[[], None]
    rows: list[LayerError] = field(default_factory=list)

    def through(
        self,
        leaf: str,
        run: Callable[[nn.Module, Tensor, int], Tensor],
        wanted: Sequence[Tensor],
        got: Sequence[Tensor],
        *,
        smoothed: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Compare both sides of a stage layer by layer; return what they compute. `leaf` names it inside its part."""
        right = module_of(self.reference, self.part).get_submodule(leaf).float()
        left = module_of(self.quantized, self.part).get_submodule(leaf)
        names = [name for name, module in right.named_modules() if isinstance(module, nn.Linear)]
        taken = _channel_factors(self.factors(f"{self.part}.{leaf}")) if self.factors and smoothed else {}
        sums = {name: (Distance(), Distance()) for name in names}
        outs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index in range(len(wanted)):
            with _watched(right, names) as seen, _watched(left, names) as found:
                outs[0].append(run(right, wanted[index], index))
                outs[1].append(run(left, got[index], index))
            for name in names:
                x, y = seen[name]
                before, after = taken.get(name, (None, None))
                own = left.get_submodule(name)((x if before is None else x / before).to(self.dtype)).float()
                arrived = found[name][1].float()
                if after is not None:
                    own, arrived = own * after, arrived * after
                sums[name][0].add(arrived, y)
                sums[name][1].add(own, y)
        for name, (arrived_at, own_error) in sums.items():
            whole = ".".join(filter(None, (self.part, leaf, name)))
            if not math.isfinite(arrived_at.missed + own_error.missed):
                raise InputError(f"{whole}: an output is NaN or infinite; verify the model before you measure it")
            layer = left.get_submodule(name)
            scheme = layer.scheme.label if isinstance(layer, QuantizedLinear) else "not quantized"
            self.rows.append(
                LayerError(
                    whole, scheme, arrived_at.cosine, arrived_at.snr_db, own_error.cosine, own_error.snr_db
                )
            )  # fmt: skip
        self.done()
        return outs

    def free(self, leaf: str) -> None:
        """Give back the memory of a stage that is done."""
        parent, _, attribute = leaf.rpartition(".")
        for model in (self.reference, self.quantized):
            setattr(module_of(model, self.part).get_submodule(parent), attribute, nn.Identity())

    def blocks(
        self, wanted: list[Tensor], got: list[Tensor], turns: Turns, causal: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All blocks and the norm behind them."""
        attend = full_attention(causal=causal)

        def run(block: nn.Module, x: Tensor, index: int) -> Tensor:
            cos, sin = turns[index]
            out: Tensor = block(x, cos.to(x.dtype), sin.to(x.dtype), 0, attend)
            return out

        layers = module_of(self.reference, self.part).get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        for index in range(len(layers)):
            wanted, got = self.through(f"layers.{index}", run, wanted, got, smoothed=True)
            self.free(f"layers.{index}")
        right = module_of(self.reference, self.part).get_submodule("norm").float()
        left = module_of(self.quantized, self.part).get_submodule("norm")
        return [right(x) for x in wanted], [left(x) for x in got]


def _channel_factors(factors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Divisors by layer: what its inputs were divided by, and what its outputs were divided by."""
    before = {name: factors[readers[0]] for _, readers in GROUPS for name in readers}
    after = {source: factors[readers[0]] for source, readers in GROUPS}
    return {name: (before.get(name), after.get(name)) for name in {*before, *after}}


@contextmanager
def _watched(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record input and output of the named layers, once they have run."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)

        return keep

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_errors(
    checkpoint: Checkpoint,
    recipe: Recipe,
    activations: Activations,
    ready: Calibrated | None,
    samples: Sequence[Sample],
    progress: CountProgress,
) -> list[LayerError]:
    """Every linear layer in the order of the model; encoder and projector only where a sample has pictures.

    Args:
        activations: how the engine rounds what goes into a product.
        ready: what calibration left, for a recipe that needs it.
    Raises:
        InputError: as `quantize_part`; or an output is NaN or infinite, the message names the layer.
    """
    visuals = [visual for sample in samples for visual in sample.visuals]
    text = checkpoint.config.text
    total = stage_count(checkpoint, bool(visuals)) + (text.num_hidden_layers + 1 if recipe.prefill else 0)
    rows: list[LayerError] = []
    stages = 0

    def done() -> None:
        nonlocal stages
        stages += 1
        progress(stages, total)

    def walk(part: str) -> _ErrorWalk:
        reference = checkpoint.load((DECODERS.get(part, part),))
        quantized, _ = load_quantized(checkpoint, (part,), recipe, activations, ready)
        factors = ready.factors if ready is not None and part in recipe.smooth else None
        return _ErrorWalk(reference, quantized, part, DTYPES[recipe.precision], factors, done, rows)

    wanted: list[Tensor] = []
    got: list[Tensor] = []
    if visuals:
        vision = checkpoint.config.vision
        assert vision is not None
        places = [(torch.from_numpy(item.rows), torch.from_numpy(item.cols)) for item in visuals]
        turns = [rotary_2d(*place, vision.head_dim, vision.rope_theta, torch.float32) for place in places]
        pair = walk("encoder")
        wanted = [torch.from_numpy(item.pixels)[None] for item in visuals]
        got = [x.to(pair.dtype) for x in wanted]
        wanted, got = pair.through("patch_embedding", lambda layer, x, index: layer(x), wanted, got)
        wanted, got = pair.blocks(wanted, got, turns, causal=False)
        pair = walk("projector")
        merged = [visual.merge_size**2 for visual in visuals]
        wanted, got = pair.through("", lambda m, x, index: m(x.unflatten(1, (-1, merged[index]))), wanted, got)
    plain = checkpoint.load(("embedding",), dtype=torch.float32)
    wanted = _spliced(plain, samples, wanted)
    del plain
    table, _ = load_quantized(checkpoint, ("embedding",), recipe, activations, ready)
    got = _spliced(table, samples, got)
    del table
    turns = []
    for sample in samples:
        angles = rotary_angles(torch.arange(len(sample.input_ids)), text.head_dim, text.rope_theta)
        angles = torch.cat((angles, angles), dim=-1)
        turns.append((angles.cos(), angles.sin()))
    for part in ("prefill", "decoder") if recipe.prefill else ("decoder",):
        pair = walk(part)
        hidden = pair.blocks(wanted, got, turns, causal=True)
        kept = [[_spread(x) for x in states] for states in hidden]
        pair.through("lm_head", lambda head, x, index: head(x), *kept)
    return rows


def _spliced(model: PenguinModel, samples: Sequence[Sample], features: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings [1, S, H] of every sample, with its pictures' features [1, T, H] in their places."""
    parts = iter(features)
    states = []
    for sample in samples:
        seen = [next(parts)[0] for _ in sample.visuals]
        states.append(model.splice(torch.from_numpy(sample.input_ids)[None], torch.cat(seen) if seen else None))
    return states


def _spread(states: Tensor) -> Tensor:
    """At most `HEAD_ROWS` positions of [1, S, H]."""
    count = states.shape[1]
    rows = torch.linspace(0, count - 1, min(count, HEAD_ROWS)).round().long()
    return states[:, rows]
