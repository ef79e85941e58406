"""Embedding tables in four bits: where they lie, and that their rows are the head's where both are one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from penguin_edge.bundle.contract import EMBEDDING
from penguin_edge.bundle.folder import Bundle
from penguin_edge.bundle.manifest import TablePlace
from penguin_edge.errors import BundleError, InputError
from penguin_edge.export.pipeline import shares_table
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.quantize.apply import embedding_scheme, load_quantized
from penguin_edge.quantize.linear import QuantizedLinear, Scheme
from penguin_edge.quantize.recipe import PRESETS, Recipe
from penguin_edge.runtime.engines.embedding import EmbeddingTable


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """What the eager model of the preset reads."""
    model, _ = load_quantized(Checkpoint.open("nano"), ("embedding",), PRESETS["int4"], "block")
    assert model.embedding is not None
    return model.embedding.weight


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_rows_are_those_of_the_eager_model(
    nano_bundle: Callable[[str, str], Path], table: torch.Tensor, target: str
) -> None:
    bundle = Bundle.read(nano_bundle(target, "int4"))
    place, ids = bundle.manifest.embedding, np.array([0, len(table) - 1, 7, 7, 300])
    assert place is not None and bundle.manifest.embedding_dtype == "int4"
    got = EmbeddingTable.of(bundle)
    assert_array_equal(got.lookup(ids), table[torch.from_numpy(ids)].numpy())
    assert got.lookup(np.zeros(0, np.int64)).shape == (0, table.shape[1])
    with pytest.raises(InputError, match="token id"):
        got.lookup(np.array([len(table)]))
    # One tensor in the checkpoint is one in the bundle, where the format allows.
    assert (EMBEDDING in bundle.manifest.files) == (target == "executorch")
    assert place.file == (EMBEDDING if target == "executorch" else "decoder.onnx.data")


def test_a_tied_head_has_the_same_numbers(table: torch.Tensor) -> None:
    model, _ = load_quantized(Checkpoint.open("nano"), ("decoder", "embedding"), PRESETS["int4"], "block")
    assert model.decoder is not None and model.embedding is not None
    head = model.decoder.get_submodule("lm_head")
    assert isinstance(head, QuantizedLinear)
    assert torch.equal(head.integers.weight(), table) and torch.equal(model.embedding.weight, table)


def test_only_a_head_of_the_same_numbers_is_shared() -> None:
    checkpoint, four = Checkpoint.open("nano"), Scheme(4, 64)
    assert shares_table(checkpoint, Recipe("r", lm_head=four, embedding="int4"))
    # No 4-bit symmetric head: a scheme of its own. And a calibrated head's levels suit its inputs alone.
    for head in (None, Scheme(8), Scheme(4, 64, False), Scheme(4, 64, method="gptq")):
        recipe = Recipe("r", lm_head=head, embedding="int4")
        assert not shares_table(checkpoint, recipe) and embedding_scheme(recipe, 128) == four
    assert not shares_table(checkpoint, Recipe("r", lm_head=four, embedding="int8"))
    assert embedding_scheme(Recipe("r", lm_head=Scheme(4, 32), embedding="int4"), 128) == Scheme(4, 32)
    assert embedding_scheme(Recipe("r", embedding="int4"), 96) == Scheme(4, 32)
    with pytest.raises(InputError, match="embedding: rows of 100 are not divisible by 16; take int8"):
        embedding_scheme(Recipe("r", embedding="int4"), 100)


def test_a_place_outside_of_its_file_is_refused(nano_bundle: Callable[[str, str], Path]) -> None:
    bundle = Bundle.read(nano_bundle("onnx", "int4"))
    for place in (TablePlace("decoder.onnx.data", 1 << 40, 0, 64), TablePlace("absent.bin", 0, 0, 64)):
        with pytest.raises(BundleError, match="holds no int4 table where the manifest says"):
            EmbeddingTable.of(Bundle(bundle.folder, replace(bundle.manifest, embedding=place)))
