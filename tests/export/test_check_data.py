"""Check data of quantized models: weights that are made anew by slabs give the tokens and logits of whole ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from penguin_edge.errors import PenguinError
from penguin_edge.export import check
from penguin_edge.export.cases import DECODED, Arrays
from penguin_edge.export.stages import Teller
from penguin_edge.export.worker import _record_check
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.decoder import KVForm
from penguin_edge.quantize import linear
from penguin_edge.quantize.apply import load_quantized
from penguin_edge.quantize.linear import Activations, Integers, QuantizedLinear, Scheme, quantize_weight
from penguin_edge.quantize.recipe import PRESETS, Recipe

TOKEN = Recipe("token", decoder=Scheme(8, None, activations="token"), lm_head=Scheme(8, None, activations="token"))
CASES: dict[str, tuple[Recipe, Activations]] = {
    "fp32": (PRESETS["fp32"], "block"),
    "int4": (PRESETS["int4"], "block"),
    "int8": (PRESETS["int8"], "block"),
    "int8 of executorch": (PRESETS["int8"], "token"),
    "activations per token": (TOKEN, "block"),
    "int8 cache": (PRESETS["int4"], "block"),
}
SMALL = 96 * 50
"""A slab of the tiny preset's decoder: some layers take one, most several, the last of them a shorter one."""
NEAR = 1e-4
"""The largest difference over the largest value. Products of some rows of a weight add up in another order than those
of all (1e-6 a layer); a rounded activation at the border of two levels would make more of it, and none of these
prompts' lies so close to one."""


def whole(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What a layer computes, its weight made in one piece."""
    y = x.float()
    rounded = {
        "float": lambda: y,
        "block": lambda: linear.rounded_blocks(y, layer.block),
        "token": lambda: linear.rounded_rows(y),
        "row": lambda: linear.rounded_symmetric_rows(y),
    }[layer.activations]()
    return functional.linear(rounded, layer.integers.weight(), layer.bias).to(x.dtype)


def check_data(recipe: Recipe, activations: Activations, *, int8_cache: bool) -> Arrays:
    """Prompt and answer of the tiny preset, as a text model: the pictures' features are given."""
    checkpoint = Checkpoint.open("tiny", note=lambda line: None)
    model, _ = load_quantized(checkpoint, ("decoder", "embedding"), recipe, activations)
    text = model.config.text
    assert model.decoder is not None
    if int8_cache:
        shape = (2 * text.num_hidden_layers, text.num_key_value_heads, 1, text.head_dim)
        model.decoder.kv_form = KVForm("int8", torch.full(shape, 0.02))
    rng = np.random.default_rng(0)
    arrays: Arrays = {"ids": rng.integers(0, 500, 40)}
    model.config = replace(model.config, vision=None)
    arrays |= check.check_prefill(model, arrays)
    return arrays | check.check_decoder(model, arrays)


@pytest.mark.parametrize("case", CASES)
def test_slabs_give_the_tokens_of_whole_weights(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, activations = CASES[case]
    monkeypatch.setattr(linear, "SLAB", SMALL)
    got = check_data(recipe, activations, int8_cache=case == "int8 cache")
    monkeypatch.setattr(QuantizedLinear, "forward", whole)
    wanted = check_data(recipe, activations, int8_cache=case == "int8 cache")
    assert len(set(wanted["tokens"].tolist())) > DECODED // 4, "an answer of one token would hide a difference"
    for name in ("tokens", "decode_top"):
        assert np.array_equal(got[name], wanted[name]), name
    for name in ("prefill", "decode"):
        assert np.abs(got[name] - wanted[name]).max() <= NEAR * np.abs(wanted[name]).max(), name


def test_no_step_of_an_answer_makes_a_weight_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """That took more than half of the time of a large export."""
    monkeypatch.setattr(linear, "SLAB", SMALL)
    made: list[int] = []
    weight = Integers.weight

    def counted(integers: Integers, out: Tensor | None = None) -> Tensor:
        made.append(integers.levels.numel())
        return weight(integers, out)

    checkpoint = Checkpoint.open("tiny", note=lambda line: None)
    model, _ = load_quantized(checkpoint, ("decoder", "embedding"), PRESETS["int4"], "block")
    monkeypatch.setattr(Integers, "weight", counted)
    assert model.decoder is not None and model.embedding is not None
    with torch.no_grad():
        hidden = model.decoder(model.embedding(torch.arange(3)[None]), torch.arange(3))
        model.decoder.logits(hidden, torch.tensor([-1]))
    assert made and max(made) <= SMALL
    assert sum(made) == sum(m.levels.numel() for m in model.decoder.modules() if isinstance(m, QuantizedLinear))


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(8, None), Scheme(8, 16, symmetric=False)]
)
@pytest.mark.parametrize("rows", [1, linear.FEW, linear.FEW + 1])
def test_a_layer_of_slabs_is_the_layer(scheme: Scheme, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SLAB", 64 * 7)
    generator = torch.Generator().manual_seed(rows)
    integers = quantize_weight(torch.randn((45, 64), generator=generator), scheme)
    for bias in (None, torch.randn(45, generator=generator)):
        layer = QuantizedLinear(integers, bias, "row")
        x = torch.randn((rows, 64), generator=generator)
        torch.testing.assert_close(layer(x), whole(layer, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x[None])[0], layer(x)), "a batch changes the shape alone"
    pieces = torch.cat([weight.clone() for _, weight in integers.slabs(0, 45)])
    assert torch.equal(pieces, integers.weight()), "the same numbers, bit for bit"


def test_a_gradient_passes_through_a_quantized_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SLAB", 64 * 7)
    integers = quantize_weight(torch.randn((45, 64), generator=torch.Generator().manual_seed(0)), Scheme(4, 32))
    x = torch.ones((2, 64), requires_grad=True)
    QuantizedLinear(integers, None, "float")(x).sum().backward()
    torch.testing.assert_close(x.grad, integers.weight().sum(0).expand(2, -1))


def test_a_model_that_overflows_is_refused_by_its_part(tmp_path: Path) -> None:
    """Weights that are finite can still give what the precision cannot hold; a bundle of that could answer nothing."""
    checkpoint = Checkpoint.open("tiny", note=lambda line: None)
    model = checkpoint.load().half()
    assert model.encoder is not None
    with torch.no_grad():
        model.encoder.layers[0].mlp.down_proj.weight.fill_(60_000.0)
    with pytest.raises(PenguinError, match=r"the encoder .* NaN or infinite numbers in float16 \(features_0"):
        _record_check("encoder", model, checkpoint, tmp_path, Teller([], print))
    assert not list(tmp_path.iterdir())
