"""Losses: the formulas written out, and the same gradient however a global batch is cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import mixed, patches, sample
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.config import TextConfig, VisionConfig
from penguin_edge.dataset.samples import NO_TARGET, Sample
from penguin_edge.errors import InputError
from penguin_edge.model.decoder import Decoder
from penguin_edge.model.encoder import Encoder
from penguin_edge.training import losses
from penguin_edge.training.losses import BETA, Distiller, Form, count_items, cross_entropy
from penguin_edge.training.packing import Batch, encode_groups, pack

WIDTH, TAUGHT = 24, 40
EXACT = {"rtol": 1e-5, "atol": 1e-6}
"""fp32; sums of the same terms in another order."""


def head() -> Decoder:
    torch.manual_seed(0)
    return Decoder(TextConfig(700, 16, 32, 1, 2, 1, 8))


def hidden_of(batch: Batch) -> Tensor:
    """Made of ids and positions, so that a sample has the same hidden states in whatever batch it is."""
    table = torch.randn(700, 16, generator=torch.Generator().manual_seed(1))
    return (table[batch.input_ids] + 0.1 * batch.positions[:, None].cos()).requires_grad_()


def encoders() -> tuple[Encoder, Encoder]:
    """Student and teacher."""
    torch.manual_seed(2)
    return Encoder(VisionConfig(WIDTH, 48, 1, 2, 1, 12)), Encoder(VisionConfig(TAUGHT, 64, 1, 2, 2, 20))


def distiller(form: Form = "edge", **options: float) -> Distiller:
    teacher = encoders()[1]
    torch.manual_seed(3)
    return Distiller(teacher, WIDTH, form, **options).train()


def student_features(batch: Batch) -> list[Tensor]:
    return encode_groups(encoders()[0], batch)


def pairs(batch: Batch, module: Distiller) -> list[tuple[Tensor, Tensor]]:
    """(S, Z) of every image, [T, E] each, dummies left out."""
    found = []
    with torch.no_grad():
        for s, z, group in zip(
            student_features(batch), encode_groups(module.teacher, batch), batch.groups, strict=True
        ):
            if not group.dummy:
                found += list(zip(module.vision_distill_layer(s), z, strict=True))
    return found


# --- cross entropy ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.tuples(st.integers(2, 12), st.integers(0, 12)), min_size=1, max_size=5), items=st.integers(1, 90)
)
def test_scopes_are_their_formulas(shape: list[tuple[int, int]], items: int) -> None:
    batch = pack([sample(i, text=text, answer=min(answer, text)) for i, (text, answer) in enumerate(shape)])
    decoder, hidden = head(), hidden_of(batch)
    each = functional.cross_entropy(
        decoder.lm_head(hidden)[0, :-1], batch.labels[0, 1:], reduction="none", ignore_index=NO_TARGET
    )
    # The first label of a sample is none: a segment's targets are predicted inside the segment.
    owner = torch.repeat_interleave(torch.arange(len(shape)), torch.tensor(batch.lengths))[1:]
    target = batch.labels[0, 1:] != NO_TARGET
    got = {
        "mean": cross_entropy(decoder, hidden, batch),
        "batch": cross_entropy(decoder, hidden, batch, scope="batch", items=items),
        "sequence": cross_entropy(decoder, hidden, batch, scope="sequence", items=items),
    }
    per_sample = [each[target & (owner == i)] for i in range(len(shape))]
    wanted = {
        "mean": each.sum() / max(1, target.sum()),
        "batch": each.sum() / items,
        "sequence": sum((x.mean() for x in per_sample if len(x)), torch.zeros(())) / items,
    }
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}", **EXACT)
    assert count_items(batch, "batch") == target.sum() and count_items(batch, "sequence") == len(shape)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_micro_batches_add_up_to_the_global_batch(scope: Any) -> None:
    samples = [sample(i, text=5 + 3 * i, answer=2 * i) for i in range(5)]
    items = sum(count_items(pack([s]), scope) for s in samples)
    found = []
    for parts in ([samples], [samples[:2], samples[2:]], [[s] for s in samples]):
        decoder = head()
        total = torch.zeros(())
        for batch in map(pack, parts):
            loss = cross_entropy(decoder, hidden_of(batch), batch, scope=scope, items=items)
            loss.backward()
            total += loss.detach()
        found.append((total, decoder.lm_head.weight.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], **EXACT)
        torch.testing.assert_close(gradient, found[0][1], **EXACT)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_logits_in_pieces(monkeypatch: pytest.MonkeyPatch, scope: Any) -> None:
    batch = pack([sample(i, text=9, answer=5) for i in range(3)])
    found = []
    for chunk in (2048, 4):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        decoder, hidden, rows = head(), hidden_of(batch), []
        decoder.lm_head.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        loss = cross_entropy(decoder, hidden, batch, scope=scope, items=7)
        loss.backward()
        assert max(rows) == min(chunk, 15)
        found.append((loss.detach(), decoder.lm_head.weight.grad, hidden.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_without_a_target_the_loss_is_zero_and_has_a_graph() -> None:
    batch = pack([sample(0, answer=0)])
    decoder, hidden = head(), hidden_of(batch)
    loss = cross_entropy(decoder, hidden, batch, items=4)
    loss.backward()
    assert loss.item() == 0 and decoder.lm_head.weight.grad is not None and hidden.grad is not None
    assert not decoder.lm_head.weight.grad.any() and not hidden.grad.any()


def test_an_unknown_scope_is_refused() -> None:
    batch = pack([sample(0)])
    with pytest.raises(InputError, match="known: batch, sequence"):
        cross_entropy(head(), hidden_of(batch), batch, scope="tokens")  # type: ignore[arg-type]


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "edge"])
def test_parts_are_their_formulas(form: Form) -> None:
    batch, module = pack(mixed()), distiller(form)
    found = module(batch, student_features(batch))
    images = pairs(batch, module)
    beta = BETA if form == "edge" else 0.0

    def distance(a: Tensor, b: Tensor) -> Tensor:
        gap = (a - b).abs()
        return torch.where(gap < beta, gap**2 / (2 * beta), gap - beta / 2) if beta else gap

    tokens = sum(len(s) for s, _ in images)
    cosine = [functional.cosine_similarity(s[:, None], s[None], dim=-1) for s, _ in images]
    taught = [functional.cosine_similarity(z[:, None], z[None], dim=-1) for _, z in images]
    wanted = (
        sum(distance(s, z).mean(1).sum() for s, z in images) / tokens,
        sum((1 - functional.cosine_similarity(s, z)).sum() for s, z in images) / tokens,
        sum(distance(a, b).mean(1).sum() for a, b in zip(cosine, taught, strict=True)) / tokens,
    )
    for got, value in zip(found[1:], wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)  # 1 - cosine cancels leading digits
    torch.testing.assert_close(found.loss, sum(found[1:]), **EXACT)


@pytest.mark.parametrize("form", ["paper", "edge", "reference"])
def test_a_perfect_student_has_no_loss(form: Form) -> None:
    batch = pack(mixed(), dummy_per_text=form == "reference")
    module = distiller(form)
    module.vision_distill_layer = nn.Linear(TAUGHT, TAUGHT)
    with torch.no_grad():
        module.vision_distill_layer.weight.copy_(torch.eye(TAUGHT))
        module.vision_distill_layer.bias.zero_()
        found = module(batch, encode_groups(module.teacher, batch))
    assert found.loss.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", ["paper", "edge"])
def test_neither_text_nor_dummies_count(form: Form) -> None:
    module, images = distiller(form), [s for s in mixed() if s.visuals]
    plain = pack(images)
    wanted = module(plain, student_features(plain))
    relabelled = [Sample(s.id, s.input_ids, s.labels * 0 + NO_TARGET, s.visuals) for s in images]
    for samples, dummies in ((relabelled, False), ([*images, sample(8), sample(9)], True)):
        batch = pack(samples, dummy_per_text=dummies)
        for a, b in zip(module(batch, student_features(batch)), wanted, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_the_reference_counts_dummies_and_relates_images_of_one_pack() -> None:
    module, images = distiller("reference"), [s for s in mixed() if s.visuals]
    plain, more = pack(images), pack([*images, sample(8)], dummy_per_text=True)
    a, b = (module(batch, student_features(batch)) for batch in (plain, more))
    assert a.relation != b.relation and a.amplitude != b.amplitude
    alone = distiller("edge")(plain, student_features(plain))
    torch.testing.assert_close(a.amplitude, alone.amplitude, **EXACT)
    assert abs(a.relation - alone.relation) > 0.01 * alone.relation


def test_the_weights_are_as_stated() -> None:
    batch = pack(mixed())
    features = [x.detach() for x in student_features(batch)]

    def ratio(module: Distiller, **options: Any) -> float:
        found = module(batch, features, **options)
        return (found.loss / (found.amplitude + found.direction + found.relation)).item()

    assert ratio(distiller("reference"), epoch=0.25, items=49) == pytest.approx(2.75 / 49)
    assert ratio(distiller("reference")) == pytest.approx(3)
    assert ratio(distiller("paper"), epoch=0.9) == pytest.approx(1)
    assert ratio(distiller("edge", weight=2.0, epochs=4.0)) == pytest.approx(2)
    assert ratio(distiller("edge", weight=2.0, epochs=4.0), epoch=4.0) == pytest.approx(4 / 3)
    tokens = len(batch.visual_order)
    assert ratio(distiller("edge"), items=4 * tokens) == pytest.approx(1 / 4)


@pytest.mark.parametrize("form", ["paper", "edge"])
def test_distillation_adds_up_over_micro_batches(form: Form) -> None:
    samples = mixed()
    items = distiller(form).count_items(pack(samples), "batch")

    def gradient(parts: Sequence[list[Sample]]) -> tuple[Tensor, Tensor]:
        student, module, total = encoders()[0], distiller(form), torch.zeros(())
        for batch in map(pack, parts):
            loss = module(batch, encode_groups(student, batch), items=items).loss
            loss.backward()
            total += loss.detach()
        assert student.patch_embedding.weight.grad is not None
        return total, student.patch_embedding.weight.grad

    whole, cut = gradient([samples]), gradient([samples[:1], samples[1:3], samples[3:]])
    torch.testing.assert_close(cut[0], whole[0], **EXACT)
    assert (cut[1] - whole[1]).norm() <= 1e-4 * whole[1].norm()


@pytest.mark.parametrize("form", ["edge", "reference"])
@pytest.mark.parametrize("limit", [1, 40, 600])
def test_relation_in_pieces(monkeypatch: pytest.MonkeyPatch, form: Form, limit: int) -> None:
    """600 entries: a few images at once; 40: a few rows of an image; 1: row by row."""
    batch, found, largest = pack(mixed()), [], []
    real = losses._gram_distance

    def watched(a: Tensor, b: Tensor, s: Tensor, z: Tensor, beta: float) -> Tensor:
        largest.append(a.shape[0] * a.shape[1] * s.shape[1])
        return real(a, b, s, z, beta)

    monkeypatch.setattr(losses, "_gram_distance", watched)
    for size in (1 << 24, limit):
        monkeypatch.setattr(losses, "GRAM_CHUNK", size)
        largest.clear()
        student, module = encoders()[0], distiller(form)
        loss = module(batch, encode_groups(student, batch)).loss
        loss.backward()
        found.append((loss.detach(), student.patch_embedding.weight.grad))
    longest = max(g.tokens for g in batch.groups) if form == "edge" else len(batch.visual_order)
    assert max(largest) <= max(limit, longest)
    (wanted, gradient), (got, other) = found
    torch.testing.assert_close(got, wanted, **EXACT)
    assert gradient is not None and other is not None
    assert (other - gradient).norm() <= 1e-4 * gradient.norm()


def test_parts_keep_their_precision_under_autocast() -> None:
    generator = torch.Generator().manual_seed(4)
    s, z = (torch.randn((2, 9, TAUGHT), generator=generator) for _ in range(2))
    wanted = losses._parts(s, z, BETA)
    with torch.autocast("cpu", torch.bfloat16):
        got = losses._parts(s, z, BETA)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_the_teacher_does_not_learn() -> None:
    module, batch = distiller(), pack(mixed())
    module(batch, student_features(batch)).loss.backward()
    assert module.training and not module.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in module.vision_distill_layer.parameters())


@pytest.mark.parametrize("form", ["paper", "edge"])
def test_without_images_the_adapter_gets_a_zero_gradient(form: Form) -> None:
    module, batch = distiller(form), pack([sample(0), sample(1)])
    found = module(batch, student_features(batch))
    found.loss.backward()
    assert found.loss.item() == found.amplitude.item() == found.relation.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.vision_distill_layer.parameters())


def test_misuse_is_refused() -> None:
    batch = pack([sample(0, patches(1, (2, 2), 1))])
    with pytest.raises(InputError, match="evaluation mode"):
        distiller().eval()(batch, student_features(batch))
    with pytest.raises(InputError, match="known: edge, paper, reference"):
        Distiller(copy.deepcopy(encoders()[1]), WIDTH, "layerwise")  # type: ignore[arg-type]
