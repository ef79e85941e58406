"""Calibration: what goes into every layer while the model reads data, and integers that are made for it.

The model is walked stage by stage (patch embedding, every block, projector, head): the inputs of a stage's linear
layers are gathered, its layers are quantized, and what they then compute is what the next stage reads, so that each
layer makes up for the errors before it as far as it can. One block is in fp32 at a time. All inputs of a stage stay in
memory: 4 bytes times tokens times width.

| name    | shape     | dtype | what                                                       |
|---------|-----------|-------|------------------------------------------------------------|
| x       | [1, S, H] | f32   | what a stage reads, one tensor per frame or sample         |
| hessian | [K, K]    | f32   | sum of outer products of a layer's inputs, over all tokens |

Integers lie in one file per layer, and so do factors and scales of inputs, so that a run that was stopped goes on with
the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from penguin_edge.dataset.records import read_records
from penguin_edge.dataset.samples import DataOptions, Sample, SampleBuilder
from penguin_edge.errors import InputError
from penguin_edge.media.preprocess import Patches
from penguin_edge.model.checkpoint import Checkpoint, meta_model
from penguin_edge.model.encoder import rotary_2d
from penguin_edge.model.layers import full_attention, rotary_angles
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.quantize.apply import DECODERS, Calibrated, chosen, linears
from penguin_edge.quantize.calibration.builtin import builtin_pictures, builtin_text
from penguin_edge.quantize.calibration.kept import prepare, write_tensors
from penguin_edge.quantize.gptq import gptq
from penguin_edge.quantize.linear import SMALLEST, Integers, QuantizedLinear, Scheme, quantize_weight
from penguin_edge.quantize.recipe import LINEAR_PARTS, Recipe
from penguin_edge.quantize.smooth import AWQ, GROUPS, READ, apply_factors, awq_factor, smooth_factor
from penguin_edge.quantize.static import measure

StageProgress = Callable[[str], None]
"""Called with the name of each stage before its work begins."""
BUILTIN = "builtin"
"""A text that every Python brings, and photographs of this package for models that see; see `builtin.py`."""


@dataclass(frozen=True)
class CalibrationOptions:
    """`source`: records of the training format (a folder, .json, .jsonl), another file as plain text, or `builtin`."""

    source: str
    samples: int = 64
    """Most samples, drawn with `seed`."""
    length: int = 512
    """Tokens of a piece of text, or the most tokens of a record."""
    seed: int = 0
    allow_outside: bool = False
    """Whether records may name media outside their own folder."""

    def to_json(self) -> dict[str, str | int]:
        """What samples are read again from."""
        return {"source": self.source, "samples": self.samples, "length": self.length, "seed": self.seed}


def read_calibration(options: CalibrationOptions, checkpoint: Checkpoint) -> list[Sample]:
    """The samples to read.

    Raises:
        InputError: nothing there, nothing in it, not readable as text, or shorter than one piece.
    """
    path, config = Path(options.source), checkpoint.config
    tokenizer = Tokenizer.of(checkpoint)
    rng = np.random.default_rng(options.seed)
    if path.is_dir() or path.suffix in (".json", ".jsonl"):
        records = read_records(path, allow_outside=options.allow_outside)
        build = SampleBuilder(config, tokenizer, DataOptions(model_max_length=options.length))
        return [build(records[i]) for i in sorted(rng.permutation(len(records))[: options.samples].tolist())]
    if options.source == BUILTIN:
        seen = (options.samples + 1) // 2 if config.vision is not None else 0
        ids, length = tokenizer.encode(builtin_text()), options.length
        texts = text_samples(ids, samples=options.samples - seen, length=length, rng=rng, name=BUILTIN)
        return texts + builtin_pictures(config, tokenizer, count=seen, length=length, rng=rng)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a text file or a data folder") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}); name a text file or a data folder") from error
    return text_samples(tokenizer.encode(text), samples=options.samples, length=options.length, rng=rng, name=path.name)


def text_samples(ids: Sequence[int], *, samples: int, length: int, rng: np.random.Generator, name: str) -> list[Sample]:
    """Pieces of `length` tokens each, evenly cut out of a text, in its order.

    Raises:
        InputError: fewer than `length` tokens.
    """
    starts = np.arange(0, len(ids) - length + 1, length)
    if not len(starts):
        raise InputError(f"{name}: {len(ids)} tokens, wanted at least {length}; add text or shorten the pieces")
    kept = np.sort(rng.permutation(starts)[:samples])
    pieces = [np.asarray(ids[start : start + length], np.int64) for start in kept.tolist()]
    return [Sample(f"{name}:{start}", piece, piece, ()) for start, piece in zip(kept.tolist(), pieces, strict=True)]


def needed_bytes(checkpoint: Checkpoint, samples: Sequence[Sample]) -> int:
    """Memory for the largest part, the states before and after a stage, and one block in fp32 with its Hessians."""
    config = checkpoint.config
    tokens = sum(len(sample.input_ids) for sample in samples)
    patches = sum(len(visual.rows) for sample in samples for visual in sample.visuals)
    needs = []
    for part, count, shape in (("decoder", tokens, config.text), ("encoder", patches, config.vision)):
        if shape is None:
            continue
        width, inner = shape.hidden_size, shape.intermediate_size
        block = 4 * (3 * width * inner + 4 * width**2 + 4 * (2 * width**2 + inner**2))
        parts = ("decoder", "embedding") if part == "decoder" else (part,)
        needs.append(checkpoint.loaded_bytes(parts) + 8 * count * width + block)
    return max(needs)


def stage_count(checkpoint: Checkpoint, images: bool) -> int:
    """Number of times that `calibrate` reports: patch embedding, blocks, projector, head."""
    vision = checkpoint.config.vision
    seeing = vision.num_hidden_layers + 2 if images and vision is not None else 0
    return seeing + checkpoint.config.text.num_hidden_layers + 1


def digest(checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[Sample]) -> str:
    """SHA-256 over all that decides the integers."""
    found = hashlib.sha256(checkpoint.fingerprint().encode())
    found.update(json.dumps(recipe.to_json(), sort_keys=True).encode())
    for sample in samples:
        found.update(sample.input_ids.tobytes())
        for visual in sample.visuals:
            found.update(visual.pixels.tobytes())
    return found.hexdigest()


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint, recipe: Recipe, samples: Sequence[Sample], work: Path, progress: StageProgress
) -> str:
    """Write the integers of every layer of the recipe into `work`, one file each.

    Files that are there already are kept, unless they are damaged or made from other data, weights or schemes.

    Returns:
        A digest of all that decides the integers.
    Raises:
        InputError: a layer that needs images and data without any; weights or activations that are not finite.
    """
    visuals = [visual for sample in samples for visual in sample.visuals]
    if not visuals and checkpoint.config.vision is not None:
        if "encoder" in recipe.smooth:
            raise InputError(
                "encoder: smoothing reads images, and the calibration data has none; name a data folder in the "
                "training format, or leave out --calibration for the built-in pictures"
            )
        for part in ("encoder", "projector"):
            for name, linear in linears(meta_model(checkpoint.config, (part,)), part).items():
                scheme, _ = chosen(recipe, name, linear.in_features)
                if scheme is not None and scheme.calibrated:
                    raise InputError(
                        f"{name}: {scheme.label} reads images, and the calibration data has none; name a data folder "
                        "in the training format, or leave out --calibration for the built-in pictures"
                    )
    made_for = digest(checkpoint, recipe, samples)
    prepare(work, made_for)
    features: list[Tensor] = []
    if visuals:
        walk = _CalibrationWalk(checkpoint.load(("encoder",)), recipe, work, progress)
        features = _encode(walk, visuals)
        walk = _CalibrationWalk(checkpoint.load(("projector",)), recipe, work, progress)
        features = _project(walk, visuals, features)
    walk = _CalibrationWalk(checkpoint.load(("decoder", "embedding")), recipe, work, progress)
    _decode(walk, samples, features)
    return made_for


class _CalibrationWalk:
    """One loaded part, and the quantizing of a stage of it."""

    def __init__(self, model: PenguinModel, recipe: Recipe, work: Path, progress: StageProgress) -> None:
        self.model, self.recipe, self.work, self.progress = model, recipe, work, progress
        schemes = [getattr(recipe, part) for part in LINEAR_PARTS] + list(recipe.layers.values())
        self.rounds = any(scheme is not None and scheme.method == "gptq" for scheme in schemes)
        """Whether any integers depend on what is read; otherwise the model stays as it is while it is walked."""
        self.measures = any(scheme is not None and scheme.activations == "static" for scheme in schemes)
        """Whether any layer's inputs get a constant scale: that of what the smoothed block computes."""

    def through(self, prefix: str, run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """Quantize the linear layers under `prefix`; return what the stage then computes for each of `count` inputs."""
        self.progress(prefix)
        module = self.model.get_submodule(prefix).float()
        schemes: dict[str, Scheme] = {}
        for leaf, child in module.named_modules():
            if isinstance(child, nn.Linear):
                name = f"{prefix}.{leaf}" if leaf else prefix
                scheme, _ = chosen(self.recipe, name, child.in_features)
                if scheme is not None:
                    schemes[name] = scheme
        out = self._measure(schemes, run, count)
        if not self.rounds:
            return out or [run(index) for index in range(count)]
        gathered = {name for name, s in schemes.items() if s.method == "gptq" and not self.path(name).is_file()}
        hessians = self._gather(gathered, run, count)
        for name, scheme in schemes.items():
            linear = self.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            if self.path(name).is_file():
                integers = read_integers(self.path(name), scheme)
            elif name in hessians:
                integers = gptq(linear.weight, hessians[name], scheme, name)
                write_integers(self.path(name), integers)
            else:
                integers = quantize_weight(linear.weight, scheme, name)
            parent, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, QuantizedLinear(integers, linear.bias, "float"))
        return [run(index) for index in range(count)]

    def _measure(self, schemes: dict[str, Scheme], run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """Write the constant scale of each layer that asks for one; return what the stage computed, nothing if not
        run."""
        static = [name for name, scheme in schemes.items() if scheme.activations == "static"]
        missing = [name for name in static if not self.path(f"{name}.input").is_file()]
        if not missing:
            return []
        spreads, out = measure({name: self.model.get_submodule(name) for name in missing}, run, count)
        for name, spread in spreads.items():
            write_tensors(self.path(f"{name}.input"), {"scale": spread.scale(schemes[name].method != "rtn")})
        return out

    def smooth(self, prefix: str, run: Callable[[int], Tensor], count: int) -> list[Tensor] | None:
        """Write a block's factors for every part that asks for them; smooth the block if its own part does.

        Returns:
            What the block computed, if it was run.
        """
        part, _, leaf = prefix.partition(".")
        asking = [name for name in self.recipe.smooth if DECODERS.get(name, name) == part]
        missing = [name for name in asking if not self.path(f"{name}.{leaf}.factors").is_file()]
        block, out = self.model.get_submodule(prefix).float(), None
        if missing:
            largest: dict[str, Tensor] = {}

            def gather(name: str, x: Tensor) -> None:
                found = x.abs().flatten(0, -2).amax(0)
                largest[name] = torch.maximum(largest[name], found) if name in largest else found

            def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
                return lambda module, inputs: gather(name, inputs[0])

            hooks = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in READ]
            try:
                out = [run(index) for index in range(count)]
            finally:
                for handle in hooks:
                    handle.remove()
            for name, found in largest.items():
                if not bool(found.isfinite().all()):
                    raise InputError(f"{prefix}.{name}: an activation is NaN or infinite; repair the checkpoint first")
            hessians: dict[str, Tensor] = {}
            if AWQ in [self.recipe.smooth[name] for name in missing]:
                hessians = self._gather({f"{prefix}.{name}" for name in READ}, run, count)
            for name in missing:
                self._write_factors(block, f"{name}.{leaf}", prefix, largest, hessians)
        elif asking and not (self.rounds or self.measures):
            # Before smoothing, as above: a run that was stopped goes on with the same bits.
            out = [run(index) for index in range(count)]
        if part in asking:
            apply_factors(block, load_file(self.path(f"{prefix}.factors")))
        return out

    def _write_factors(
        self, block: nn.Module, name: str, prefix: str, largest: dict[str, Tensor], hessians: dict[str, Tensor]
    ) -> None:
        strength, factors = self.recipe.smooth[name.partition(".")[0]], {}
        for _, readers in GROUPS:
            weights = [block.get_submodule(reader).get_parameter("weight") for reader in readers]
            if isinstance(strength, str):
                schemes = [
                    chosen(self.recipe, f"{name}.{r}", w.shape[1])[0] for r, w in zip(readers, weights, strict=True)
                ]
                factors[readers[0]] = awq_factor(weights, schemes, hessians[f"{prefix}.{readers[0]}"])
            else:
                factors[readers[0]] = smooth_factor(weights, largest[readers[0]], strength)
        write_tensors(self.path(f"{name}.factors"), factors)

    def path(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def _gather(self, names: set[str], run: Callable[[int], Tensor], count: int) -> dict[str, Tensor]:
        """The Hessian of each layer; layers that read the very same tensor share one."""
        hessians: dict[str, Tensor] = {}
        last: tuple[Tensor, Tensor] | None = None

        def gather(name: str, x: Tensor) -> None:
            nonlocal last
            if last is not None and last[0] is x:
                hessians[name] = last[1]
                return
            rows = x.flatten(0, -2)
            if name not in hessians:
                hessians[name] = torch.zeros(rows.shape[1], rows.shape[1])
            hessians[name].addmm_(rows.T, rows)
            last = (x, hessians[name])

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: gather(name, inputs[0])

        hooks = [self.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in sorted(names)]
        try:
            for index in range(count if names else 0):
                run(index)
                last = None
        finally:
            for handle in hooks:
                handle.remove()
        return hessians

    def free(self, prefix: str) -> None:
        """Give back the memory of a stage that is done."""
        parent, _, attribute = prefix.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, nn.Identity())


def _encode(walk: _CalibrationWalk, visuals: Sequence[Patches]) -> list[Tensor]:
    encoder = walk.model.encoder
    assert encoder is not None
    config = encoder.config
    pixels = [torch.from_numpy(item.pixels)[None].float() for item in visuals]
    places = [(torch.from_numpy(item.rows), torch.from_numpy(item.cols)) for item in visuals]
    turns = [rotary_2d(*place, config.head_dim, config.rope_theta, torch.float32) for place in places]
    states = walk.through("encoder.patch_embedding", lambda i: encoder.patch_embedding(pixels[i]), len(pixels))
    attend = full_attention(causal=False)
    for index in range(len(encoder.layers)):
        states = _block(walk, f"encoder.layers.{index}", states, turns, attend)
    norm = encoder.norm.float()
    return [norm(x) for x in states]


def _project(walk: _CalibrationWalk, visuals: Sequence[Patches], features: list[Tensor]) -> list[Tensor]:
    return walk.through("projector", lambda i: walk.model.project(features[i], visuals[i].merge_size), len(features))


def _decode(walk: _CalibrationWalk, samples: Sequence[Sample], features: list[Tensor]) -> None:
    decoder, text = walk.model.decoder, walk.model.config.text
    assert decoder is not None
    parts = iter(features)
    states, turns = [], []
    for sample in samples:
        seen = [next(parts)[0] for _ in sample.visuals]
        states.append(walk.model.splice(torch.from_numpy(sample.input_ids)[None], torch.cat(seen) if seen else None))
        angles = rotary_angles(torch.arange(len(sample.input_ids)), text.head_dim, text.rope_theta)
        angles = torch.cat((angles, angles), dim=-1)
        turns.append((angles.cos(), angles.sin()))
    states = [x.float() for x in states]
    causal, peaks = full_attention(causal=True), dict[int, Tensor]()

    def attend(sample: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps the largest key and value of each channel, [2, kv, D], of the last time that a sample was read."""
        peaks[sample] = torch.stack((k, v)).abs().amax((1, 3))
        return causal(sample, q, k, v)

    for index in range(len(decoder.layers)):
        states = _block(walk, f"decoder.layers.{index}", states, turns, attend)
        if walk.recipe.kv == "int8":
            largest = torch.stack(list(peaks.values())).amax(0)
            if not bool(largest.isfinite().all()):
                raise InputError(
                    f"decoder.layers.{index}: a key or value is NaN or infinite; repair the checkpoint first"
                )
            scales = (largest / 127).clamp(min=SMALLEST)
            write_tensors(walk.path(f"decoder.layers.{index}.kv"), {"scales": scales})
    norm = decoder.norm.float()
    states = [norm(x) for x in states]
    # Nothing reads the logits: one number each is kept.
    walk.through("decoder.lm_head", lambda i: decoder.lm_head(states[i])[..., :1].clone(), len(states))


def _block(
    walk: _CalibrationWalk,
    prefix: str,
    states: list[Tensor],
    turns: list[tuple[Tensor, Tensor]],
    attend: Callable[..., Tensor],
) -> list[Tensor]:
    block = walk.model.get_submodule(prefix)

    def run(index: int) -> Tensor:
        # The sample's number, where a cache would want the layer's.
        out: Tensor = block(states[index], *turns[index], index, attend)
        return out

    out = walk.smooth(prefix, run, len(states))
    if out is None or walk.rounds or walk.measures:
        out = walk.through(prefix, run, len(states))
    else:
        walk.progress(prefix)
    walk.free(prefix)
    return out


def write_integers(path: Path, integers: Integers) -> None:
    write_tensors(path, {name: getattr(integers, name) for name in ("levels", "scales", "zeros")})


def read_integers(path: Path, scheme: Scheme) -> Integers:
    arrays = load_file(path)
    return Integers(arrays["levels"], arrays["scales"], arrays["zeros"], scheme)


def ready_from(work: Path) -> Calibrated:
    """What `calibrate` wrote, read layer by layer."""

    def integers(layer: str, scheme: Scheme) -> Integers | None:
        path = work / f"{layer}.safetensors"
        return read_integers(path, scheme) if path.is_file() else None

    def kv_scales(layers: int) -> Tensor:
        """[2L, kv, 1, D]: all keys', then all values'."""
        files = [load_file(work / f"decoder.layers.{index}.kv.safetensors")["scales"] for index in range(layers)]
        return torch.stack(files, 1).flatten(0, 1)[:, :, None]

    def input_scale(layer: str) -> Tensor | None:
        path = work / f"{layer}.input.safetensors"
        return load_file(path)["scale"] if path.is_file() else None

    return Calibrated(integers, lambda block: load_file(work / f"{block}.factors.safetensors"), kv_scales, input_scale)
