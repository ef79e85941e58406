"""Quantizes a loaded part in place, layer by layer, so that at no time two copies of a part are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from penguin_edge.errors import InputError
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.decoder import KVForm
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.linear import Activations, Integers, QuantizedLinear, Scheme, quantize_weight
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.quantize.rows import by_parts
from penguin_edge.quantize.smooth import apply_factors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
DECODERS = {"prefill": "decoder"}
"""Graphs that are one module of the model under other schemes."""
KEPT = "kept by the recipe"
"""Reason why a layer is not quantized: a recipe file or a preset says so."""
SMALLER = (32, 16)
"""Groups that a lenient recipe tries where its own does not divide a layer."""


@dataclass(frozen=True)
class Calibrated:
    """Results of a calibration."""

    integers: Callable[[str, Scheme], Integers | None]
    """Integers of a layer; None where its scheme asks for none."""
    factors: Callable[[str], Mapping[str, torch.Tensor]]
    """Smoothing factors of a block, such as `prefill.layers.0`; see `quantize/smooth.py`."""
    kv_scales: Callable[[int], torch.Tensor]
    """Scales of the int8 caches of so many layers; see `KVForm`."""
    input_scale: Callable[[str], torch.Tensor | None] = lambda layer: None
    """Scale of a layer with static activations; see `quantize/static.py`."""


@dataclass(frozen=True)
class LayerRow:
    """What became of one linear layer. `scheme` None: not quantized, for the stated reason."""

    layer: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""
    error: float = 0.0
    """Norm of the weight's error over the norm of the weight."""


def module_of(model: PenguinModel, part: str) -> nn.Module:
    """The module of a part; `prefill` is the decoder under other schemes."""
    module: nn.Module = getattr(model, DECODERS.get(part, part))
    return module


def linears(model: PenguinModel, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a part by our names; the head is the decoder's."""
    module = module_of(model, part)
    return {f"{part}.{name}": child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def chosen(recipe: Recipe, layer: str, inputs: int) -> tuple[Scheme | None, str]:
    """The scheme of a layer, and why it has none or another than its part's.

    Raises:
        InputError: a group that does not divide the layer, in a recipe that is not lenient.
    """
    scheme = recipe.scheme_of(layer)
    if scheme is None:
        return None, KEPT
    blocked = (
        scheme.group is not None
        or scheme.activations == "static"  # No target packs it into blocks.
        or any(inputs % size == 0 for size in SMALLER)
    )
    if scheme.fits(inputs) and blocked:
        return scheme, ""
    if not recipe.lenient:
        sizes = [size for size in (128, 64, *SMALLER) if inputs % size == 0]
        fitting = f"wanted one of {', '.join(map(str, sizes))}" if sizes else "no group divides it: set it to null"
        raise InputError(f"{recipe.name}: {layer} has {inputs} inputs, which {scheme.label} does not divide; {fitting}")
    for size in SMALLER:
        if inputs % size == 0:
            return replace(scheme, group=size), f"{inputs} inputs are not divisible by {scheme.group}"
    return None, f"no group divides its {inputs} inputs"


def check_layers(recipe: Recipe, layers: dict[str, tuple[int, int]]) -> None:
    """Refuse a recipe that cannot be carried out, before any work.

    Args:
        layers: shape [N, K] of every linear layer of the model.
    Raises:
        InputError: the recipe names a layer that the model lacks, or a group does not divide one.
    """
    for name in recipe.layers:
        if not any(fnmatchcase(layer, name) for layer in layers):
            known = ", ".join(_sample(layers))
            raise InputError(f"{recipe.name}: the model has no linear layer {name!r}; known: {known}")
    for name, (_, inputs) in layers.items():
        scheme, _ = chosen(recipe, name, inputs)
        if scheme is not None and scheme.calibrated and name.startswith("prefill.layers."):
            other = "activations per token" if scheme.activations == "static" else "rtn or mse"
            raise InputError(f"{recipe.name}: {name}: {scheme.label} is made for the decoder alone; take {other}")


def _sample(layers: dict[str, tuple[int, int]]) -> list[str]:
    names = list(layers)
    return names if len(names) <= 8 else [*names[:7], f"… ({len(names)} in all)"]


def rounding(activations: Activations, scheme: Scheme) -> Activations:
    """Rounding of a layer's inputs: the engine's own, or what the scheme asks for where the engine has the choice."""
    if activations != "block":
        return activations
    return {"token": "row", "static": "static"}.get(scheme.activations or "", activations)  # type: ignore[return-value]


@torch.no_grad()
def quantize_part(
    model: PenguinModel,
    part: str,
    recipe: Recipe,
    activations: Activations,
    ready: Calibrated | None = None,
    note: Callable[[str], None] = lambda layer: None,
) -> list[LayerRow]:
    """Put `QuantizedLinear` in the place of linear layers, in place; a tied head leaves its table as it is.

    Args:
        activations: how the engine rounds them where a scheme does not ask for another way.
        ready: what calibration left, for methods that need it.
        note: told the name of each layer that is quantized, before it is.
    Returns:
        One row for every linear layer of the part.
    Raises:
        InputError: a weight that is not finite, a group that does not divide a layer, or integers that are not ready.
    """
    rows = []
    smoothed = ""
    found = linears(model, part)
    for name in list(found):
        linear = found.pop(name)  # so that its weight is gone once its place is taken
        block = name.split(".self_attn.")[0].split(".mlp.")[0]
        if part in recipe.smooth and block not in (name, smoothed):
            _smooth(model, part, block, ready)
            smoothed = block
        shape = (linear.out_features, linear.in_features)
        scheme, reason = chosen(recipe, name, linear.in_features)
        if scheme is None:
            rows.append(LayerRow(name, shape, None, reason))
            continue
        note(name)
        # Both decoder graphs have the same head.
        ready_name = "decoder.lm_head" if name == "prefill.lm_head" else name
        integers = ready.integers(ready_name, scheme) if ready is not None else None
        rounded = rounding(activations, scheme)
        input_scale = ready.input_scale(ready_name) if ready is not None and rounded == "static" else None
        if (integers is None and scheme.method == "gptq") or (input_scale is None and rounded == "static"):
            raise InputError(f"{name}: {scheme.label} needs calibration data; name some with --calibration")
        if integers is None:
            integers = quantize_weight(linear.weight, scheme, name)
        error = _relative_error(linear.weight, integers)
        rows.append(LayerRow(name, shape, scheme, reason, error))
        parent, _, attribute = name.removeprefix(f"{part}.").rpartition(".")
        owner = module_of(model, part).get_submodule(parent)
        setattr(owner, attribute, QuantizedLinear(integers, linear.bias, rounded, input_scale))
    return rows


def _smooth(model: PenguinModel, part: str, block: str, ready: Calibrated | None) -> None:
    """Smooth one block in fp32: in bf16 the divisor of a norm and the factor of a weight would not be equal."""
    if ready is None:
        raise InputError(f"{block}: smoothing needs calibration data; name some with --calibration")
    apply_factors(module_of(model, part).get_submodule(block.removeprefix(f"{part}.")).float(), ready.factors(block))


def _relative_error(weight: torch.Tensor, integers: Integers) -> float:
    """Relative error by slabs of rows, so that a head of 150,000 rows is not in memory twice more."""

    def squares(begin: int, end: int) -> tuple[float, float]:
        missed = whole = 0.0
        for rows, made in integers.slabs(begin, end):
            wanted = weight[rows].float()
            missed += float(made.sub_(wanted).square_().sum())
            whole += float(wanted.square().sum())
        return missed, whole

    missed, whole = (sum(parts) for parts in zip(*by_parts(len(weight), squares), strict=True))
    return math.sqrt(missed / max(whole, 1e-30))


def load_quantized(
    checkpoint: Checkpoint,
    parts: tuple[str, ...],
    recipe: Recipe,
    activations: Activations,
    ready: Calibrated | None = None,
    note: Callable[[str], None] = lambda layer: None,
) -> tuple[PenguinModel, list[LayerRow]]:
    """A model, or some parts of it, as the recipe says; what is not quantized has the recipe's precision.

    Parts to quantize are loaded in the stored dtype, so that a large one never stands there in fp32.

    Args:
        note: as `quantize_part`.
    Raises:
        InputError: as `quantize_part`.
    """
    dtype = DTYPES[recipe.precision]
    if not recipe.quantized:
        return checkpoint.load(parts, dtype=dtype), []
    model = checkpoint.load([DECODERS.get(part, part) for part in parts])
    rows = [
        row
        for part in parts
        if part != "embedding"
        for row in quantize_part(model, part, recipe, activations, ready, note)
    ]
    if model.embedding is not None and recipe.embedding == "int8":
        levels, scales = quantize_rows(model.embedding.weight)
        model.embedding.weight = nn.Parameter(levels * scales[:, None], requires_grad=False)
    elif model.embedding is not None and recipe.embedding == "int4":
        table, head = model.embedding.weight, getattr(model.decoder, "lm_head", None)
        scheme = embedding_scheme(recipe, table.shape[1])
        if model.config.text.tie_word_embeddings and isinstance(head, QuantizedLinear) and head.scheme == scheme:
            integers = head.integers
        else:
            integers = quantize_weight(table, scheme, "embedding")
        model.embedding.weight = nn.Parameter(integers.weight(), requires_grad=False)
    if model.decoder is not None:
        model.decoder.kv_form = kv_form(recipe, len(model.decoder.layers), ready)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = parameter.detach().to(dtype)
            if not all(math.isfinite(float(limit)) for limit in value.aminmax()):
                raise InputError(
                    f"{path}.{name}: a number becomes infinite in {recipe.precision}; take another precision, or "
                    "quantize this layer"
                )
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model, rows


def embedding_scheme(recipe: Recipe, width: int) -> Scheme:
    """Scheme of an int4 table: that of a 4-bit head, whose numbers a tied table then shares, else groups of 64.

    Raises:
        InputError: no group divides a row.
    """
    head, _ = chosen(recipe, "decoder.lm_head", width)
    if head is not None and shareable(head):
        return head
    group = next((size for size in (64, *SMALLER) if width % size == 0), None)
    if group is None:
        raise InputError(f"{recipe.name}: embedding: rows of {width} are not divisible by 16; take int8")
    return Scheme(4, group)


def shareable(head: Scheme) -> bool:
    """Whether an embedding table can share the levels of a head."""
    return (head.bits, head.symmetric, head.calibrated) == (4, True, False) and head.group is not None


def kv_form(recipe: Recipe, layers: int, ready: Calibrated | None) -> KVForm | None:
    """How the recipe stores the KV cache.

    Raises:
        InputError: int8 without calibration.
    """
    if recipe.kv != "int8":
        return KVForm("fp16") if recipe.kv else None
    if ready is None:
        raise InputError("kv: int8 needs calibration data; name some with --calibration")
    return KVForm("int8", ready.kv_scales(layers))


def quantize_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding table [V, H] as int8 [V, H] and one scale per row, f32 [V]; see `runtime/engines/embedding.py`.

    Raises:
        InputError: an entry is NaN or infinite.
    """
    values = table.float()
    if not bool(values.isfinite().all()):
        raise InputError("embedding.weight: an entry is NaN or infinite; repair the checkpoint before you quantize it")
    scales = values.abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (values / scales[:, None]).round().to(torch.int8), scales
