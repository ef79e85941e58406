"""What training minimises: cross entropy on the answers, and distillation of a teacher's visual features.

| name     | shape     | dtype | what                                                                   |
|----------|-----------|-------|------------------------------------------------------------------------|
| hidden   | [1, S, H] | float | the decoder's output for a packed batch                                |
| logits   | [K, V]    | f32   | only where the next token is a target                                  |
| features | [B, T, C] | float | student, one tensor per group of a batch: encoder output after merging |
| S        | [B, T, E] | f32   | student features through the adapter, in the teacher's width           |
| Z        | [B, T, E] | f32   | teacher features of the same pixels, grids and merge sizes             |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from penguin_edge.errors import InputError
from penguin_edge.model.decoder import Decoder
from penguin_edge.model.encoder import Encoder
from penguin_edge.training.packing import Backend, Batch, encode_groups

Scope = Literal["batch", "sequence"]
Form = Literal["edge", "reference", "paper"]

CHUNK = 2048
"""Targets whose logits are held at once; more are computed piece by piece, and again for the gradient."""
GRAM_CHUNK = 1 << 24
"""Entries of a relation matrix that are held at once; likewise."""
BETA = 0.001
"""Where smooth L1 turns from a parabola to a line."""


def count_items(batch: Batch, scope: Scope) -> int:
    """Number that this batch adds to `items`: its targets, or its samples, counted on the host.

    Sum it over the micro-batches and the processes that share one optimiser step.
    """
    if scope == "batch":
        return len(batch.targets)
    if scope == "sequence":
        return len(batch.lengths)
    raise InputError(f"unknown loss scope {scope!r}; known: batch, sequence")


def cross_entropy(
    decoder: Decoder, hidden: Tensor, batch: Batch, *, scope: Scope = "batch", items: float | Tensor | None = None
) -> Tensor:
    """Cross entropy of the targets, the head being applied to their positions alone.

    Args:
        scope: `batch`: sum over the targets / items. `sequence`: sum over the targets of 1 / (targets in the same
            sample) / items. `count_items` says what `items` counts.
        items: for the whole optimiser step; None gives the mean over this batch's targets in either scope. Where
            gradients are averaged over processes, multiply the loss by their number.
    Returns:
        A scalar, float32; 0 with a graph to every parameter when there is no target.
    Source: reference `penguinvl/model/loss.py`.
    """
    count_items(batch, scope)  # refuses an unknown scope
    if not len(batch.targets):
        return (decoder.lm_head(hidden[0, :1]).float() * 0.0).sum()
    at = hidden[0].index_select(0, batch.target_index)
    weights = batch.target_weights if scope == "sequence" and items is not None else None
    if len(at) <= CHUNK:
        total = _weighted_sum(decoder, at, batch.targets, weights)
    else:
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(at), CHUNK):
            part = slice(begin, begin + CHUNK)
            some = None if weights is None else weights[part]
            total = total + checkpoint(_weighted_sum, decoder, at[part], batch.targets[part], some, use_reentrant=False)
    return total / (len(at) if items is None else items)


def _weighted_sum(decoder: Decoder, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    logits = decoder.lm_head(hidden).float()
    if weights is None:
        return functional.cross_entropy(logits, targets, reduction="sum")
    return functional.cross_entropy(logits, targets, reduction="none") @ weights


class DistillLoss(NamedTuple):
    """The weighted loss, and its unweighted parts for the log (detached)."""

    loss: Tensor
    amplitude: Tensor
    direction: Tensor
    relation: Tensor


class Distiller(nn.Module):
    """Amplitude, direction and relation of a teacher's visual features, in one of three forms.

    With sums over visual tokens i and means over channels c and over the tokens j that i is related to:

        amplitude = Σ_i mean_c |S_ic - Z_ic|       direction = Σ_i (1 - cos(S_i, Z_i))
        relation  = Σ_i mean_j |cos(S_i, S_j) - cos(Z_i, Z_j)|

    `reference`: penguinvl_qwen3.py of the reference, to the last term. |.| is smooth L1 with beta 0.001; j runs over
    the whole pack; dummy patches count, one for each sample without images (`pack(dummy_per_text=True)`). Added:
    (parts / tokens of this pack) * (3 - epoch) / items, where items is that of the cross entropy or 1: the weight
    depends on the amount of text, and grows with the number of micro-batches.

    `paper`: the paper's three terms at equal weight, as the fact sheet gives them. |.| is the absolute difference, j
    runs over the tokens of the same image, no schedule. The paper prints the direction as the trace of the cosines,
    to be maximised; here it is 1 - cosine, to be minimised, which has the same optimum. The norm of the relation and
    the normalisation are not known to us: L1, and the mean over visual tokens.

    `edge` (ours): the terms of the paper with the smooth L1 of the reference (its gradient fades at the optimum), and
    weight * (1 - epoch / (3 * epochs)), which falls evenly by a third over the run, as the reference's factor does in
    its single epoch, but depends neither on the text nor on the number of micro-batches.

    In `paper` and `edge` dummy patches do not count, and items is the number of visual tokens of the whole step.
    The adapter (student width to teacher width) is the reference's; the paper mentions none.
    """

    def __init__(
        self, teacher: Encoder, student_size: int, form: Form = "edge", *, weight: float = 1.0, epochs: float = 1.0
    ) -> None:
        super().__init__()
        if form not in ("edge", "reference", "paper"):
            raise InputError(f"unknown form of distillation {form!r}; known: edge, paper, reference")
        self.form, self.weight, self.epochs = form, weight, epochs
        self.teacher = teacher.eval().requires_grad_(False)
        self.vision_distill_layer = nn.Linear(student_size, teacher.config.hidden_size)

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode as any module does, except that the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def count_items(self, batch: Batch, scope: Scope) -> int:
        """What this batch adds to `items`; to be summed over the micro-batches and processes of one step."""
        return count_items(batch, scope) if self.form == "reference" else len(batch.visual_order)

    def factor(self, epoch: float) -> float:
        """The weight of the three parts at a fractional epoch, from 0."""
        if self.form == "reference":
            return 3.0 - epoch
        return self.weight * (1.0 if self.form == "paper" else 1.0 - epoch / (3.0 * self.epochs))

    def forward(
        self,
        batch: Batch,
        features: Sequence[Tensor],
        *,
        epoch: float = 0.0,
        items: float | Tensor | None = None,
        backend: Backend = "padded",
    ) -> DistillLoss:
        """The loss to add to the cross entropy of the same batch.

        Args:
            features: those of `forward_packed`, with their graph.
            items: see `count_items`; None normalises by this batch alone.
        Raises:
            InputError: called in evaluation mode, where there is nothing to learn from the teacher.
        """
        if not self.training:
            raise InputError("distillation was asked for in evaluation mode; call it while training")
        with torch.no_grad():
            taught = [x.float() for x in encode_groups(self.teacher, batch, backend)]
        students = [self.vision_distill_layer(x).float() for x in features]
        zero = sum(x.sum() for x, group in zip(students, batch.groups, strict=True) if group.dummy) * 0.0
        if self.form == "reference":
            pairs = [(_joined(students), _joined(taught))]
        else:
            pairs = [(s, z) for s, z, group in zip(students, taught, batch.groups, strict=True) if not group.dummy]
        parts = [torch.zeros((), device=batch.pixels.device) for _ in range(3)]
        for s, z in pairs:
            for index, value in enumerate(_parts(s, z, 0.0 if self.form == "paper" else BETA)):
                parts[index] = parts[index] + value
        tokens = max(1, sum(s.shape[0] * s.shape[1] for s, _ in pairs))
        if self.form == "reference":
            share = 1.0 / (tokens * (1.0 if items is None else items))
        else:
            share = 1.0 / (tokens if items is None else items)
        loss = (parts[0] + parts[1] + parts[2]) * self.factor(epoch) * share + zero
        return DistillLoss(loss, *(part.detach() / tokens for part in parts))


def _joined(features: Sequence[Tensor]) -> Tensor:
    """Groups [B, T, C] to [1, N, C]."""
    return torch.cat([x.flatten(0, 1) for x in features])[None]


def _parts(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Amplitude, direction and relation of [B, T, C] float32, summed over all B*T tokens."""
    # Half precision would be left with nothing of a difference of two cosines.
    with torch.autocast(student.device.type, enabled=False):
        amplitude = functional.smooth_l1_loss(student, teacher, reduction="sum", beta=beta) / student.shape[-1]
        direction = (1.0 - functional.cosine_similarity(student, teacher, dim=-1)).sum()
        return amplitude, direction, _relation(student, teacher, beta)


def _relation(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Sum over images b and tokens i of the mean over tokens j; [B, T, T] in pieces of `GRAM_CHUNK`."""
    images, tokens, _ = student.shape
    s, z = (functional.normalize(x, dim=-1) for x in (student, teacher))
    rows = min(tokens, max(1, GRAM_CHUNK // tokens))
    some = max(1, GRAM_CHUNK // (tokens * rows))
    if rows == tokens and some >= images:
        return _gram_distance(s, z, s, z, beta) / tokens
    total = student.new_zeros(())
    for image in range(0, images, some):
        a, b = s[image : image + some], z[image : image + some]
        for row in range(0, tokens, rows):
            part = slice(row, row + rows)
            total = total + checkpoint(_gram_distance, a[:, part], b[:, part], a, b, beta, use_reentrant=False)
    return total / tokens


def _gram_distance(s_rows: Tensor, z_rows: Tensor, s: Tensor, z: Tensor, beta: float) -> Tensor:
    return functional.smooth_l1_loss(s_rows @ s.transpose(1, 2), z_rows @ z.transpose(1, 2), reduction="sum", beta=beta)
