"""Packing: a packed batch is its samples one by one, whatever their lengths, and none of them sees another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import mixed, patches, sample
from torch import Tensor
from torch.nn import functional

from penguin_edge.dataset.samples import NO_TARGET, Sample
from penguin_edge.errors import InputError
from penguin_edge.model.layers import full_attention
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.training.losses import cross_entropy
from penguin_edge.training.packing import (
    checkpoint_blocks,
    encode_groups,
    forward_packed,
    pack,
    packed_attention,
    prompt_order,
)

ATTENTION = 1e-5
"""Absolute, fp32 at unit scale: the kernels differ in summation order alone."""
HIDDEN = 2e-4
"""Absolute, fp32: values reach 17 after the tiny preset's enlarged projections."""

lengths = st.lists(st.integers(1, 24), min_size=1, max_size=6)


def trained() -> PenguinModel:
    return copy.deepcopy(tiny_model()).requires_grad_(True).train()


def heads(total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q of 4 heads, k and v of 2, laid out as the blocks hand them over."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, total, 4, 8), (1, total, 2, 8), (1, total, 2, 8))
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes)
    return q, k, v


def attended(sizes: Sequence[int], causal: bool, backend: Any) -> list[Tensor]:
    """Output and the gradients of q, k, v for a fixed direction."""
    inputs = heads(sum(sizes))
    out = packed_attention(sizes, causal=causal, backend=backend)(0, *inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


# --- attention --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(sizes=lengths, causal=st.booleans())
def test_padded_attention_is_the_dense_mask_and_each_segment_alone(sizes: list[int], causal: bool) -> None:
    padded, dense = attended(sizes, causal, "padded"), attended(sizes, causal, "mask")
    for got, wanted in zip(padded, dense, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=ATTENTION)
    pieces = zip(*(x.split(sizes, dim=2) for x in heads(sum(sizes))), strict=True)
    alone = torch.cat([full_attention(causal)(0, *piece) for piece in pieces], dim=1)
    torch.testing.assert_close(padded[0], alone.detach(), rtol=0, atol=ATTENTION)


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 24), min_size=2, max_size=6), causal=st.booleans(), data=st.data())
def test_not_even_a_nan_passes_from_one_segment_to_another(sizes: list[int], causal: bool, data: Any) -> None:
    spoilt = data.draw(st.integers(0, len(sizes) - 1))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    attend = packed_attention(sizes, causal=causal)
    inputs = [x.detach() for x in heads(sum(sizes))]
    clean = attend(0, *inputs)
    broken = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for x in broken:
            x[:, :, owner == spoilt] = torch.nan
    out = attend(0, *broken)
    others = owner != spoilt
    assert torch.equal(out[:, others], clean[:, others])
    for gradient in torch.autograd.grad(out[:, others].sum(), broken):
        assert gradient[:, :, others].isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """The kernel needs CUDA: a stand-in with its documented contract takes its place, and must see nothing else."""
    from torch.nn.attention import varlen

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        assert window_size in ((-1, -1), (-1, 0)) and enable_gqa
        sizes = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(sizes) and sum(sizes) == len(query) == len(key) == len(value)
        pieces = zip(*(x.transpose(0, 1)[None].split(sizes, dim=2) for x in (query, key, value)), strict=True)
        outs = [
            functional.scaled_dot_product_attention(*piece, is_causal=window_size == (-1, 0), enable_gqa=True)
            for piece in pieces
        ]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    for got, wanted in zip(
        attended([5, 1, 9, 5], causal, "varlen"), attended([5, 1, 9, 5], causal, "mask"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=ATTENTION)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernel needs CUDA")
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_on_cuda(causal: bool) -> None:
    sizes = [40, 7, 64, 1]
    inputs = [x.detach().to("cuda", torch.bfloat16) for x in heads(sum(sizes))]
    wanted, got = (
        packed_attention(sizes, causal=causal, backend=backend, device="cuda")(0, *inputs)
        for backend in ("mask", "varlen")
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-2)  # bfloat16 has 8 bits


def test_varlen_on_a_cpu_says_what_to_use() -> None:
    inputs = [x.detach().bfloat16() for x in heads(9)]
    with pytest.raises(InputError, match="bfloat16 on cpu, wanted half precision on cuda; use padded"):
        packed_attention([4, 5], backend="varlen")(0, *inputs)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InputError, match="known: mask, padded, varlen"):
        packed_attention([3], backend="flash")  # type: ignore[arg-type]


# --- pack -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(sizes=lengths, data=st.data())
def test_pack_keeps_every_sample(sizes: list[int], data: Any) -> None:
    answers = [data.draw(st.integers(0, size)) for size in sizes]
    samples = [sample(i, text=size, answer=answer) for i, (size, answer) in enumerate(zip(sizes, answers, strict=True))]
    batch = pack(samples)
    assert batch.ids == tuple(s.id for s in samples)
    assert list(batch.lengths) == batch.cu_seqlens.diff().tolist()
    for (begin, end), s in zip(pairwise(batch.cu_seqlens.tolist()), samples, strict=True):
        np.testing.assert_array_equal(batch.input_ids[0, begin:end], s.input_ids)
        np.testing.assert_array_equal(batch.labels[0, begin + 1 : end], s.labels[1:])
        assert batch.labels[0, begin] == NO_TARGET
        assert batch.positions[begin:end].tolist() == list(range(len(s.input_ids)))
    shifted = batch.labels[0, 1:]
    assert batch.target_index.tolist() == torch.nonzero(shifted != NO_TARGET).flatten().tolist()
    assert torch.equal(batch.targets, shifted[batch.target_index])
    answered = sum((s.labels[1:] != NO_TARGET).any() for s in samples)
    assert batch.target_weights.sum().item() == pytest.approx(answered, abs=1e-5)


def test_the_samples_arrays_stay_as_they_are() -> None:
    samples = [sample(0, answer=9)]
    before = samples[0].labels.copy()
    pack(samples)
    np.testing.assert_array_equal(samples[0].labels, before)


def test_every_tensor_of_a_batch_is_moved() -> None:
    moved = pack(mixed()).to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, Tensor)}
    assert len(tensors) == 11 and {str(value.device) for value in tensors.values()} == {"meta"}


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "at least one"),
        ([Sample("a", np.zeros(0, np.int64), np.zeros(0, np.int64), ())], "0 ids"),
        ([Sample("a", np.zeros(3, np.int64), np.zeros(2, np.int64), ())], "2 labels"),
    ],
)
def test_what_cannot_be_packed_is_named(samples: list[Sample], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pack(samples)


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["padded", "mask"])
def test_a_pack_is_its_samples_one_by_one(backend: Any) -> None:
    model, samples = tiny_model(), mixed()
    batch = pack(samples)
    with torch.no_grad():
        out = forward_packed(model, batch, backend)
        for s, hidden in zip(samples, out.hidden.split(list(batch.lengths), dim=1), strict=True):
            alone = model(torch.from_numpy(s.input_ids)[None], model.visual(s.visuals))
            torch.testing.assert_close(hidden, alone, rtol=0, atol=HIDDEN)
        frames = [frame for s in samples for frame in s.visuals]
        features = [
            model.encode(*(torch.from_numpy(x) for x in (frame.pixels[None], frame.rows, frame.cols)))
            .unflatten(1, (-1, frame.merge_size**2))
            .mean(2)[0]
            for frame in frames
        ]
    torch.testing.assert_close(prompt_order(batch, out.features), torch.cat(features), rtol=0, atol=5e-5)


def test_backends_give_the_same_gradients() -> None:
    found = []
    for backend in ("padded", "mask"):
        model = trained()
        assert model.decoder is not None
        batch = pack(mixed())
        cross_entropy(model.decoder, forward_packed(model, batch, backend).hidden, batch).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in found[1].items():
        got = found[0][name]
        assert got is not None and wanted is not None, name
        assert (got - wanted).norm() <= 1e-4 * wanted.norm(), name  # fp32, other summation order


def test_another_samples_content_changes_nothing() -> None:
    """Bit for bit: the shapes, and with them the order of every sum, are the same."""
    model, samples = tiny_model(), mixed()
    changed = list(samples)
    changed[2] = sample(77, *(patches(70 + i, f.grid, f.merge_size) for i, f in enumerate(samples[2].visuals)), text=15)
    with torch.no_grad():
        before, after = (forward_packed(model, pack(each)).hidden for each in (samples, changed))
    sizes = list(pack(samples).lengths)
    for index, (a, b) in enumerate(zip(before.split(sizes, 1), after.split(sizes, 1), strict=True)):
        assert torch.equal(a, b) == (index != 2), index


def test_the_order_of_samples_does_not_matter() -> None:
    model, samples = tiny_model(), mixed()
    forward, backward = (pack(each) for each in (samples, samples[::-1]))
    with torch.no_grad():
        a = forward_packed(model, forward).hidden.split(list(forward.lengths), 1)
        b = forward_packed(model, backward).hidden.split(list(backward.lengths), 1)
    for x, y in zip(a, b[::-1], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=HIDDEN)


def test_without_images_every_visual_parameter_gets_a_zero_gradient() -> None:
    model, samples = trained(), [sample(0), sample(1, text=5)]
    assert model.encoder is not None and model.projector is not None and model.decoder is not None
    batch = pack(samples)
    out = forward_packed(model, batch)
    cross_entropy(model.decoder, out.hidden, batch).backward()
    for part in (model.encoder, model.projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name
    for s, hidden in zip(samples, out.hidden.split(list(batch.lengths), 1), strict=True):
        alone = model(torch.from_numpy(s.input_ids)[None])
        torch.testing.assert_close(hidden, alone, rtol=0, atol=HIDDEN)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the norm falls back to its plain form
def test_half_precision_training() -> None:
    """Under autocast: weights in fp32, products in bfloat16; its 8 bits leave a cosine of 0.9965 at the worst token."""
    model, batch = trained(), pack(mixed())
    assert model.decoder is not None
    wanted = forward_packed(model, batch).hidden
    with torch.autocast("cpu", torch.bfloat16):
        got = forward_packed(model, batch).hidden
        loss = cross_entropy(model.decoder, got, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert functional.cosine_similarity(got.float(), wanted, dim=-1).min() > 0.99
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dummies_stay_out_of_the_prompt() -> None:
    model, samples = tiny_model(), mixed()
    with torch.no_grad():
        plain, padded = (forward_packed(model, pack(samples, dummy_per_text=flag)) for flag in (False, True))
    torch.testing.assert_close(padded.hidden, plain.hidden, rtol=0, atol=HIDDEN)
    assert [g.frames for g in pack([*samples, sample(9)], dummy_per_text=True).groups if g.dummy] == [2]
    assert not any(g.dummy for g in pack(samples).groups)


def test_the_encoder_runs_once() -> None:
    """Processes of a sharded run must call it equally often, whatever grids their images have."""
    calls: list[int] = []
    model = copy.deepcopy(tiny_model())
    assert model.encoder is not None
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    batch = pack(mixed())
    with torch.no_grad():
        assert len(encode_groups(model.encoder, batch)) == len(batch.groups) == 4
    assert len(calls) == 1


def test_a_missing_image_is_named() -> None:
    s = sample(0, patches(1, (4, 6), 1))
    with pytest.raises(InputError, match="24 image tokens and the images give 0"):
        forward_packed(tiny_model(), pack([Sample(s.id, s.input_ids, s.labels, ())]))


def test_checkpointing_computes_the_same_twice() -> None:
    found, counts = [], []
    for mode in ("off", "on", "off again"):
        model, calls = trained(), []
        assert model.decoder is not None and model.encoder is not None
        if mode != "off":
            checkpoint_blocks(model)
        if mode == "off again":
            checkpoint_blocks(model, on=False)
        for block in (*model.encoder.layers, *model.decoder.layers):
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = pack(mixed())
        loss = cross_entropy(model.decoder, forward_packed(model, batch).hidden, batch)
        loss.backward()
        counts.append(len(calls))
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert counts == [5, 10, 5]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
