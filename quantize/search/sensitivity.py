"""How far the rounding of one layer alone moves what a model says next.

The unquantized model is walked stage by stage (patch embedding, every block, projector, embedding table, every block of
the decoder). At each stage every candidate of its layers is put in place, one at a time, and what then comes out goes
through the stages behind it: half a forward pass each on average. One block is in fp32 at a time, for all candidates
at once.

| name   | shape     | dtype | what                                                                             |
|--------|-----------|-------|----------------------------------------------------------------------------------|
| states | [1, S, H] | f32   | what a stage reads: one tensor per picture or frame, behind the table per sample |
| logits | [T, V]    | f32   | the unquantized model's, after every one of the T tokens                         |
| KL     |           | f64   | nats per position, from the unquantized model's distribution to the candidate's  |
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.dataset.samples import Sample
from penguin_edge.errors import InputError
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.encoder import rotary_2d
from penguin_edge.model.layers import full_attention, rotary_angles
from penguin_edge.model.penguin import PARTS, PenguinModel
from penguin_edge.quantize.apply import quantize_rows, rounding
from penguin_edge.quantize.linear import Activations, Integers, QuantizedLinear, Scheme, quantize_weight

SLAB = 8192
"""Rows of a head that are multiplied at a time."""
EMBEDDING, HEAD = "embedding", "decoder.lm_head"
ROWS = 128
"""Positions whose logits are in memory at once, beside those of the unquantized model."""
INT8_TABLE = "int8"
"""The table's only candidate: one scale per row."""
Measured = dict[str, dict[str, float]]
"""KL by layer and by the candidate's label."""
WorkProgress = Callable[[int, int, str], None]
"""(work done, all work, layer or stage): work is counted in stages that a candidate has gone through."""
Run = Callable[[nn.Module, list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class ModelStage:
    """A piece of the model by its module's name; `run` takes that module in fp32, and the states."""

    prefix: str
    run: Run


def needed_bytes(checkpoint: Checkpoint, samples: Sequence[Sample], candidates: int) -> int:
    """Memory for the whole model as stored, the logits, one block in fp32 and the states of its candidates."""
    config = checkpoint.config
    tokens = sum(len(sample.input_ids) for sample in samples)
    patches = sum(len(visual.rows) for sample in samples for visual in sample.visuals)
    blocks, states = [], []
    for shape, count in ((config.text, tokens), (config.vision, patches)):
        if shape is not None and count:
            attention = 2 * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
            blocks.append(shape.hidden_size * (3 * shape.intermediate_size + attention))
            states.append(count * (8 * candidates * shape.hidden_size + 4 * shape.intermediate_size))
    vocab = config.text.vocab_size
    logits = 4 * tokens * vocab + 40 * min(ROWS, tokens) * vocab
    head = 2 * vocab * config.text.hidden_size  # its integers, and what they are made from
    return checkpoint.loaded_bytes(parts_read(samples)) + logits + 4 * 4 * max(blocks) + 4 * max(states) + head


def parts_read(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Parts that these samples go through."""
    return PARTS if any(sample.visuals for sample in samples) else ("embedding", "decoder")


class SensitivityWalk:
    """A model, the samples that it reads, and its logits before quantization.

    Args:
        model: with the parts that `parts_read` names, in any dtype; it is left as it was.
        activations: how the target rounds what goes into a quantized product.
    Raises:
        InputError: an activation that is NaN or infinite; the message names the stage.
    """

    def __init__(self, model: PenguinModel, samples: Sequence[Sample], activations: Activations) -> None:
        assert model.decoder is not None
        self.model, self.samples, self.activations = model, samples, activations
        self.begin, self.stages = _stages(model, samples)
        self.head = model.decoder.lm_head
        with torch.no_grad():
            states = self.begin
            for stage in self.stages:
                states = stage.run(self._fp32(stage), states)
                self._check(stage.prefix, states)
            self.logits = torch.cat([_head(self.head, rows) for rows in _rows(states).split(ROWS)])
        self._check(HEAD, [self.logits])

    @torch.no_grad()
    def measure(
        self,
        candidates: Mapping[str, Sequence[Scheme]],
        known: Measured,
        keep: Callable[[Measured], None],
        progress: WorkProgress,
    ) -> Measured:
        """KL of every candidate of every layer, and of the table in 8 bits.

        Args:
            candidates: by layer; layers that are no part of what the samples go through are left out.
            known: what need not be measured again.
            keep: called with all that is known after each stage.
        Raises:
            InputError: a weight that is NaN or infinite, or a candidate that makes the logits so.
        """
        found: Measured = {layer: dict(row) for layer, row in known.items()}
        missing: list[list[tuple[str, str, Scheme | None]]] = []
        for prefix in [*(stage.prefix for stage in self.stages), HEAD]:
            own: list[tuple[str, str, Scheme | None]] = []
            if prefix == EMBEDDING:
                own.append((EMBEDDING, INT8_TABLE, None))
            for layer, schemes in candidates.items():
                if layer == prefix or layer.startswith(f"{prefix}."):
                    own += [(layer, scheme.label, scheme) for scheme in schemes]
            missing.append([item for item in own if item[1] not in found.get(item[0], {})])
        behind = len(missing)
        done, total = 0, sum(len(own) * (behind - at) for at, own in enumerate(missing))
        states = self.begin
        for at, (stage, own) in enumerate(zip([*self.stages, None], missing, strict=True)):
            if stage is None:
                for layer, label, scheme in own:
                    progress(done, total, layer)
                    assert scheme is not None
                    integers = quantize_weight(self.head.weight, scheme, layer)
                    found.setdefault(layer, {})[label] = self._divergence(states, layer, integers)
                    done += 1
                    keep(found)
                break
            module, variants = self._fp32(stage), []
            for layer, _, scheme in own:
                progress(done, total, layer)
                with self._changed(stage, module, {} if scheme is None else {layer: scheme}, table=scheme is None):
                    variants.append(stage.run(module, states))
                done += 1
            states = stage.run(module, states)
            del module
            for later in self.stages[at + 1 :] if variants else ():
                module = self._fp32(later)
                for index, variant in enumerate(variants):
                    progress(done, total, own[index][0])
                    variants[index] = later.run(module, variant)
                    done += 1
            for (layer, label, _), variant in zip(own, variants, strict=True):
                progress(done, total, layer)
                found.setdefault(layer, {})[label] = self._divergence(variant, layer)
                done += 1
            if own:
                keep(found)
        return found

    @torch.no_grad()
    def whole(self, schemes: Mapping[str, Scheme | None], progress: Callable[[str], None]) -> float:
        """KL of a model whose layers all have their schemes, and whose table is in 8 bits."""
        states = self.begin
        for stage in self.stages:
            progress(stage.prefix)
            module = self._fp32(stage)
            own = {
                layer: scheme
                for layer, scheme in schemes.items()
                if scheme is not None and (layer == stage.prefix or layer.startswith(f"{stage.prefix}."))
            }
            with self._changed(stage, module, own, table=stage.prefix == EMBEDDING):
                states = stage.run(module, states)
        scheme = schemes.get(HEAD)
        integers = None if scheme is None else quantize_weight(self.head.weight, scheme, HEAD)
        return self._divergence(states, "the whole recipe", integers)

    def _fp32(self, stage: ModelStage) -> nn.Module:
        """The stage's module, copied where it is stored in another dtype; a table is read by rows and stays."""
        module = self.model.get_submodule(stage.prefix)
        if stage.prefix == EMBEDDING or all(p.dtype == torch.float32 for p in module.parameters()):
            return module
        return copy.deepcopy(module).float()

    @contextlib.contextmanager
    def _changed(
        self, stage: ModelStage, module: nn.Module, schemes: Mapping[str, Scheme], table: bool
    ) -> Iterator[None]:
        """Put quantized layers in the place of some of the stage's, or rows of the table in 8 bits."""
        with contextlib.ExitStack() as undo:
            if table:
                undo.enter_context(contextlib.closing(_Hook(module)))
            for layer, scheme in schemes.items():
                leaf = layer.removeprefix(stage.prefix).removeprefix(".")
                linear = module.get_submodule(leaf)
                assert isinstance(linear, nn.Linear)
                integers = quantize_weight(linear.weight, scheme, layer)
                quantized = QuantizedLinear(integers, linear.bias, rounding(self.activations, scheme))
                if leaf:
                    parent, _, attribute = leaf.rpartition(".")
                    owner = module.get_submodule(parent)
                    undo.callback(setattr, owner, attribute, linear)
                    setattr(owner, attribute, quantized)
                else:  # the stage is this layer
                    handle = linear.register_forward_hook(partial(_instead, quantized))
                    undo.callback(handle.remove)
            yield

    def _divergence(self, states: list[Tensor], name: str, integers: Integers | None = None) -> float:
        """Mean over all positions; fp64, a few rows at a time."""
        total, at = 0.0, 0
        for rows in _rows(states).split(ROWS):
            if integers is None:
                got = _head(self.head, rows)
            else:
                got = _quantized_head(integers, rows, rounding(self.activations, integers.scheme))
            if not bool(got.isfinite().all()):
                raise InputError(f"{name}: quantized, it makes a logit NaN or infinite; repair the checkpoint first")
            p = self.logits[at : at + len(rows)].double().log_softmax(-1)
            q = got.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).clamp(min=0).sum())
            at += len(rows)
        return total / at

    @staticmethod
    def _check(name: str, states: list[Tensor]) -> None:
        if not all(bool(x.isfinite().all()) for x in states):
            raise InputError(f"{name}: an activation is NaN or infinite; repair the checkpoint first")


class _Hook:
    """Rounds the rows that are looked up; each has its own scale, so that the whole table need not be rounded."""

    def __init__(self, table: nn.Module) -> None:
        self._handle = table.register_forward_hook(self._rounded)

    @staticmethod
    def _rounded(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        levels, scales = quantize_rows(out.flatten(0, -2))
        return (levels * scales[:, None]).view(out.shape)

    def close(self) -> None:
        self._handle.remove()


def _instead(other: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    found: Tensor = other(*inputs)
    return found


def _rows(states: list[Tensor]) -> Tensor:
    return torch.cat([x[0] for x in states])


def _head(head: nn.Linear, rows: Tensor) -> Tensor:
    """Logits, the weight made fp32 a slab at a time."""
    return torch.cat([functional.linear(rows, weight.float()) for weight in head.weight.split(SLAB)], -1)


def _quantized_head(integers: Integers, rows: Tensor, activations: Activations) -> Tensor:
    count = len(integers.levels)
    slabs = (integers.rows(begin, begin + SLAB) for begin in range(0, count, SLAB))
    return torch.cat([QuantizedLinear(slab, None, activations)(rows) for slab in slabs], -1)


def _stages(model: PenguinModel, samples: Sequence[Sample]) -> tuple[list[Tensor], list[ModelStage]]:
    """What the first stage reads, and all stages before the head."""
    visuals = [visual for sample in samples for visual in sample.visuals]
    begin: list[Tensor] = []
    stages: list[ModelStage] = []

    def each(module: nn.Module, states: list[Tensor]) -> list[Tensor]:
        return [module(x) for x in states]

    def blocks(turns: list[tuple[Tensor, Tensor]], causal: bool) -> Run:
        attend = full_attention(causal=causal)
        return lambda module, states: [module(x, *turn, 0, attend) for x, turn in zip(states, turns, strict=True)]

    if visuals:
        assert model.encoder is not None and model.projector is not None
        config = model.encoder.config
        begin = [torch.from_numpy(item.pixels)[None].float() for item in visuals]
        places = [(torch.from_numpy(item.rows), torch.from_numpy(item.cols)) for item in visuals]
        run = blocks([rotary_2d(*at, config.head_dim, config.rope_theta, torch.float32) for at in places], causal=False)
        stages.append(ModelStage("encoder.patch_embedding", each))
        stages += [ModelStage(f"encoder.layers.{index}", run) for index in range(len(model.encoder.layers))]
        stages.append(ModelStage("encoder.norm", each))
        merged = [item.merge_size**2 for item in visuals]
        stages.append(
            ModelStage(
                "projector",
                lambda module, states: [
                    module(x.unflatten(1, (-1, size))) for x, size in zip(states, merged, strict=True)
                ],
            )
        )

    def splice(module: nn.Module, states: list[Tensor]) -> list[Tensor]:
        parts = iter(states)
        out = []
        for sample in samples:
            seen = [next(parts)[0] for _ in sample.visuals]
            ids = torch.from_numpy(sample.input_ids)[None]
            slots = ids == model.config.image_token_id
            embeds = module(ids.masked_fill(slots, 0)).float()
            out.append(embeds.masked_scatter(slots[..., None], torch.cat(seen)) if seen else embeds)
        return out

    stages.append(ModelStage(EMBEDDING, splice))
    text = model.config.text
    turns = []
    for sample in samples:
        angles = rotary_angles(torch.arange(len(sample.input_ids)), text.head_dim, text.rope_theta)
        angles = torch.cat((angles, angles), dim=-1)
        turns.append((angles.cos(), angles.sin()))
    assert model.decoder is not None
    run = blocks(turns, causal=True)
    stages += [ModelStage(f"decoder.layers.{index}", run) for index in range(len(model.decoder.layers))]
    stages.append(ModelStage("decoder.norm", each))
    return begin, stages
