"""Samples of different lengths in one row: no padding between them, and none sees another.

| name         | shape      | dtype | what                                                                      |
|--------------|------------|-------|---------------------------------------------------------------------------|
| input_ids    | [1, S]     | int64 | all samples, one after another                                            |
| labels       | [1, S]     | int64 | -100 = no target; the first of each sample is always -100                 |
| positions    | [S]        | int64 | restart at 0 with each sample                                             |
| cu_seqlens   | [n+1]      | int64 | where each sample begins, and S                                           |
| pixels       | [P, 588]   | f32   | patches of all frames, frames of one grid and merge size side by side     |
| rows, cols   | [P]        | int64 | position of each patch in its frame                                       |
| features     | [B, T, C]  | float | of each group of B frames: encoder output after down-sampling to T tokens |
| visual       | [N, H]     | float | projected features in the order of the prompts                            |
| hidden       | [1, S, H]  | float | after the decoder's final norm                                            |

Every layer runs once over all patches and once over all tokens; just the attention is cut into samples and frames.
Source: reference `penguinvl/data` (batch flattening), where flash attention reads the cuts from the positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from penguin_edge.config import PATCH_VALUES
from penguin_edge.dataset.samples import NO_TARGET, Sample
from penguin_edge.errors import InputError
from penguin_edge.media.preprocess import Patches
from penguin_edge.model.encoder import Encoder
from penguin_edge.model.layers import Attend, Block
from penguin_edge.model.penguin import PenguinModel

Backend = Literal["padded", "mask", "varlen"]

TIGHTNESS = 0.75
"""Samples shorter than this share of the longest beside them are padded to a smaller length of their own."""


@dataclass(frozen=True)
class VisualGroup:
    """Frames of one grid and merge size. A dummy stands in for absent images and never reaches the decoder."""

    frames: int
    grid: tuple[int, int]
    merge_size: int
    dummy: bool = False

    @property
    def patches(self) -> int:
        """Patches per frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Visual tokens per frame."""
        return self.patches // self.merge_size**2


@dataclass(frozen=True)
class Batch:
    """Packed samples; the table is at the top of this file."""

    ids: tuple[str, ...]
    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    """Tokens per sample, on the host, so that no step waits for the device."""
    pixels: Tensor
    rows: Tensor
    cols: Tensor
    groups: tuple[VisualGroup, ...]
    visual_order: Tensor
    """[N] int64: row of the groups' concatenated tokens (dummies left out) for each visual token of the prompts."""
    target_index: Tensor
    """[K] int64: positions whose next token is a target."""
    targets: Tensor
    """[K] int64: those next tokens."""
    target_weights: Tensor
    """[K] float32: 1 / targets in the same sample."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


class PackedOutput(NamedTuple):
    """What `forward_packed` returns."""

    hidden: Tensor
    """[1, S, H] after the final norm."""
    features: list[Tensor]
    """[B, T, C] per group of the batch, dummies included: encoder output after down-sampling, before the projector."""


def pack(samples: Sequence[Sample], *, dummy_per_text: bool = False) -> Batch:
    """One batch from samples, in their order.

    A batch without any image gets one dummy frame of one zero patch, so that every process of a parallel run calls
    the encoder. `dummy_per_text` adds one for each sample without images, as the reference does; only its form of
    the distillation loss can tell the difference.

    Raises:
        InputError: no samples, an empty sample, or ids and labels of different lengths.
    """
    if not samples:
        raise InputError("got no samples to pack, wanted at least one")
    for sample in samples:
        if not len(sample.input_ids) or len(sample.input_ids) != len(sample.labels):
            raise InputError(
                f"sample {sample.id} has {len(sample.input_ids)} ids and {len(sample.labels)} labels; wanted as many "
                "labels as ids, and at least one"
            )
    lengths = np.array([len(sample.input_ids) for sample in samples])
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    labels = np.concatenate([sample.labels for sample in samples]).astype(np.int64)
    labels[cu_seqlens[:-1]] = NO_TARGET
    owner = np.repeat(np.arange(len(samples)), lengths)
    target_at = np.flatnonzero(labels != NO_TARGET)
    counts = np.bincount(owner[target_at], minlength=len(samples))

    frames = [frame for sample in samples for frame in sample.visuals]
    members: dict[tuple[tuple[int, int], int], list[int]] = {}
    for index, frame in enumerate(frames):
        members.setdefault((frame.grid, frame.merge_size), []).append(index)
    groups = [VisualGroup(len(found), grid, merge) for (grid, merge), found in members.items()]
    ordered = [frames[index] for found in members.values() for index in found]
    dummies = sum(not sample.visuals for sample in samples) if dummy_per_text else int(not frames)
    if dummies:
        groups.append(VisualGroup(dummies, (1, 1), 1, dummy=True))
        zero = Patches(np.zeros((1, PATCH_VALUES), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64), (1, 1), 1)
        ordered += [zero] * dummies
    return Batch(
        ids=tuple(sample.id for sample in samples),
        input_ids=torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]).astype(np.int64))[None],
        labels=torch.from_numpy(labels)[None],
        positions=torch.from_numpy(np.arange(len(owner)) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=tuple(lengths.tolist()),
        pixels=torch.from_numpy(np.concatenate([frame.pixels for frame in ordered])),
        rows=torch.from_numpy(np.concatenate([frame.rows for frame in ordered])),
        cols=torch.from_numpy(np.concatenate([frame.cols for frame in ordered])),
        groups=tuple(groups),
        visual_order=torch.from_numpy(_visual_order(frames, list(members.values()))),
        target_index=torch.from_numpy(target_at - 1),
        targets=torch.from_numpy(labels[target_at]),
        target_weights=torch.from_numpy((1.0 / counts[owner[target_at]]).astype(np.float32)),
    )


def _visual_order(frames: Sequence[Patches], members: Sequence[Sequence[int]]) -> np.ndarray:
    """[N]: where each token of the frames, in their order, lies when the frames stand in the order of `members`."""
    tokens = np.array([frame.tokens for frame in frames], dtype=np.int64)
    grouped = np.array([index for found in members for index in found], dtype=np.int64)
    starts = np.empty_like(tokens)
    starts[grouped] = np.cumsum(tokens[grouped]) - tokens[grouped]
    return np.repeat(starts - (np.cumsum(tokens) - tokens), tokens) + np.arange(tokens.sum())


def packed_attention(
    lengths: Sequence[int], *, causal: bool = True, backend: Backend = "padded", device: torch.device | str = "cpu"
) -> Attend:
    """Attention inside each of the segments that follow one another in a row of sum(lengths) positions.

    Args:
        backend: `padded`: segments of similar length side by side, right-padded, which causality hides (without
            causality just those of one length, which need no padding); runs everywhere. `mask`: one dense S×S mask;
            the oracle of the tests. `varlen`: `torch.nn.attention.varlen`, for CUDA and half precision.
    Returns:
        An `Attend` for q, k, v of batch size 1.
    Raises:
        InputError: an unknown backend, or, when called, one whose kernel does not run on this device.
    """
    if backend == "padded":
        runs = [(length, len(list(found))) for length, found in groupby(lengths)]
        return _padded(lengths, device) if causal and len(runs) > 1 else _runs(runs, causal)
    if backend == "mask":
        return _masked(lengths, causal, device)
    if backend == "varlen":
        return _varlen(lengths, causal, device)
    raise InputError(f"unknown attention backend {backend!r}; known: mask, padded, varlen")


def _runs(runs: Sequence[tuple[int, int]], causal: bool) -> Attend:
    """Segments of one length are a batch as they lie; `runs` are (length, how many)."""
    sizes = [length * count for length, count in runs]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def pieces(x: Tensor) -> Iterator[Tensor]:
            for (length, count), piece in zip(runs, x[0].split(sizes, dim=1), strict=True):
                yield piece.unflatten(1, (count, length)).transpose(0, 1)

        outs = [
            functional.scaled_dot_product_attention(*each, is_causal=causal, enable_gqa=True)
            for each in zip(pieces(q), pieces(k), pieces(v), strict=True)
        ]
        flat = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in outs]
        return (flat[0] if len(flat) == 1 else torch.cat(flat))[None]

    return attend


def _padded(lengths: Sequence[int], device: torch.device | str) -> Attend:
    """Causal. Samples of similar length side by side, each padded with its own last position.

    Causality hides the padding, and nothing of another sample enters, not even a NaN.
    """
    buckets: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        if not buckets or lengths[sample] < TIGHTNESS * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(sample)
    order = np.array([sample for bucket in buckets for sample in bucket])
    room = np.array([lengths[bucket[0]] for bucket in buckets for _ in bucket])
    sizes = np.array(lengths)
    begins = (np.cumsum(sizes) - sizes)[order]
    step = np.arange(room.sum()) - np.repeat(np.cumsum(room) - room, room)
    into = np.repeat(begins, room) + np.minimum(step, np.repeat(sizes[order] - 1, room))
    real = step < np.repeat(sizes[order], room)
    back = np.empty(sizes.sum(), dtype=np.int64)
    back[into[real]] = np.flatnonzero(real)
    source, target = torch.from_numpy(into).to(device), torch.from_numpy(back).to(device)
    inner = _runs([(lengths[bucket[0]], len(bucket)) for bucket in buckets], causal=True)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.index_select(2, source) for x in (q, k, v))
        return inner(layer, q, k, v).index_select(1, target)

    return attend


def _masked(lengths: Sequence[int], causal: bool, device: torch.device | str) -> Attend:
    sizes = torch.tensor(lengths, device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    mask = owner[:, None] == owner[None, :]
    if causal:
        mask = mask.tril()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def _varlen(lengths: Sequence[int], causal: bool, device: torch.device | str) -> Attend:
    """Not run on CPU, where the kernel does not exist; the tests hold its arguments against a stand-in."""
    from torch.nn.attention import varlen

    longest = max(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    window = (-1, 0) if causal else (-1, -1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Autocast leaves q and k in fp32 behind their norms, and does not know this kernel.
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))
        try:
            out = varlen.varlen_attn(q, k, v, ends, ends, longest, longest, window_size=window, enable_gqa=True)
        except NotImplementedError:
            raise InputError(
                f"attention backend varlen got {v.dtype} on {v.device.type}, wanted half precision on cuda; "
                "use padded, which runs everywhere"
            ) from None
        assert isinstance(out, Tensor)
        return out.flatten(1)[None]

    return attend


def forward_packed(model: PenguinModel, batch: Batch, backend: Backend = "padded") -> PackedOutput:
    """Pixels and ids to hidden states, with gradients.

    Raises:
        InputError: the prompts' image tokens and the images' features differ in number.
    """
    features: list[Tensor] = []
    visual, zero = None, None
    if model.encoder is not None and model.projector is not None:
        features = encode_groups(model.encoder, batch, backend)
        dummies = [x.flatten(0, 1) for x, group in zip(features, batch.groups, strict=True) if group.dummy]
        if len(batch.visual_order):
            visual = _project(model, prompt_order(batch, features))
        if dummies:
            zero = (_project(model, torch.cat(dummies)) * 0.0).sum()
    embeds = model.splice(batch.input_ids, visual)
    if zero is not None:
        # No value changes, but every encoder and projector parameter gets a gradient: parallel training waits for it.
        embeds = embeds + zero.to(embeds.dtype)
    assert model.decoder is not None, "this model was loaded without its decoder"
    attend = packed_attention(batch.lengths, backend=backend, device=embeds.device)
    return PackedOutput(model.decoder(embeds, batch.positions, attend), features)


def encode_groups(encoder: Encoder, batch: Batch, backend: Backend = "padded") -> list[Tensor]:
    """Features [B, T, C] of each group after down-sampling (the mean of each merge block), in one pass."""
    lengths = [group.patches for group in batch.groups for _ in range(group.frames)]
    attend = packed_attention(lengths, causal=False, backend=backend, device=batch.pixels.device)
    pixels = batch.pixels.to(encoder.patch_embedding.weight.dtype)
    x = encoder(pixels[None], batch.rows, batch.cols, attend)[0]
    pieces = x.split([group.frames * group.patches for group in batch.groups])
    return [
        piece.unflatten(0, (group.frames, group.tokens, -1)).mean(2)
        if group.merge_size > 1
        else piece.unflatten(0, (group.frames, group.tokens))
        for piece, group in zip(pieces, batch.groups, strict=True)
    ]


def _project(model: PenguinModel, features: Tensor) -> Tensor:
    """[N, C] -> [N, H]."""
    assert model.projector is not None, "this model was loaded without its projector"
    return model.projector(features[None, :, None])[0]


def prompt_order(batch: Batch, features: Sequence[Tensor]) -> Tensor:
    """[N, C]: the groups' features in the order of the prompts, dummies left out."""
    kept = [x.flatten(0, 1) for x, group in zip(features, batch.groups, strict=True) if not group.dummy]
    return torch.cat(kept).index_select(0, batch.visual_order)


def checkpoint_blocks(model: torch.nn.Module, on: bool = True) -> None:
    """Let every transformer block below `model` forget its activations and compute them again for the gradient.

    The names of parameters stay as they are. Copy a model (`copy.deepcopy`) before this call, not after it.
    """
    for block in model.modules():
        if isinstance(block, Block):
            block.__dict__.pop("forward", None)
            if on:
                block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
