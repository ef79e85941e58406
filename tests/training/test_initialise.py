"""Weights to train from: what their docstring promises."""

from __future__ import annotations

import pytest
import torch

from penguin_edge.config import PRESETS, PenguinConfig
from penguin_edge.model.checkpoint import meta_model
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.training.initialise import initialise


def initialised(shape: PenguinConfig, seed: int) -> PenguinModel:
    model = meta_model(shape).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.tie()
    initialise(model, seed)
    return model


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_every_parameter_is_set_by_the_seed_alone(name: str) -> None:
    one, again, other = (dict(initialised(PRESETS[name], seed).named_parameters()) for seed in (5, 5, 6))
    for key, value in one.items():
        assert value.isfinite().all(), key
        assert torch.equal(value, again[key]), key
        if key.endswith("norm.weight"):
            assert (value == 1).all(), key
        elif key.endswith(".bias"):
            assert (value == 0).all(), key
        else:
            assert not torch.equal(value, other[key]), key


def test_the_model_begins_undecided() -> None:
    """Logits of about unit size: the loss begins near the logarithm of the vocabulary, not above it."""
    model = initialised(PRESETS["nano"], 0)
    assert model.decoder is not None and model.embedding is not None
    ids = torch.randint(0, 4000, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.decoder(model.embedding(ids), torch.arange(64))
        logits = model.decoder.logits(hidden, torch.arange(64))
    # N(0, 1) per logit up to the draw of the weights; a table of N(0, 1) entries would give sqrt(128).
    assert 0.7 < logits.std().item() < 1.4
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    vocabulary = torch.tensor(float(PRESETS["nano"].text.vocab_size)).log()
    assert vocabulary < loss < vocabulary + 1
