"""Learning rates, freezing and parameter groups: invariants. The recorded tables are in golden_schedule.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.config import PRESETS
from penguin_edge.errors import InputError
from penguin_edge.model.checkpoint import meta_model
from penguin_edge.training.schedule import Rates, cosine_with_min_lr, freeze, parameter_groups, part_of, with_muon
from penguin_edge.training.train_config import STAGES

TINY = PRESETS["tiny"]
UNTIED = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tie_word_embeddings=False))
MODELS = pytest.mark.parametrize("shape", [TINY, UNTIED], ids=["tied", "untied"])


def named(shape: object) -> dict[str, torch.nn.Parameter]:
    """A model's parameters as they are named in training, the adapter to a teacher among them."""
    out = dict(meta_model(shape).named_parameters())
    with torch.device("meta"):
        adapter = torch.nn.Linear(64, 72)
    return out | {f"distill.{name}": parameter for name, parameter in adapter.named_parameters()}


@given(
    total=st.integers(1, 400),
    warmup=st.floats(0, 1),
    least=st.floats(0, 1),
    start=st.one_of(st.none(), st.floats(0, 1)),
)
def test_learning_rate_rises_then_falls_to_its_minimum(
    total: int, warmup: float, least: float, start: float | None
) -> None:
    steps = int(warmup * (total - 1))
    factors = [
        cosine_with_min_lr(i, warmup_steps=steps, total_steps=total, min_lr_ratio=least, warmup_lr_ratio=start)
        for i in range(total + 3)
    ]
    # One rounding of a sum near 1.
    assert all(0 <= f <= 1 + 1e-15 for f in factors)
    assert factors[:steps] == sorted(factors[:steps])
    assert factors[steps:] == sorted(factors[steps:], reverse=True)
    assert factors[total - 1 :] == pytest.approx([least] * 4, abs=1e-15)
    if steps > 1:
        assert factors[steps - 1] == pytest.approx(1, abs=1e-15)
        assert factors[0] == pytest.approx(1 / steps if start is None else start, abs=1e-15)


@MODELS
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("grouping", ["sound", "reference"])
def test_every_trainable_tensor_is_in_one_group_and_no_frozen_one(shape: object, stage: int, grouping: str) -> None:
    parameters, rates = named(shape), STAGES[stage].rates
    if rates.distill is None:
        parameters = {name: p for name, p in parameters.items() if not name.startswith("distill.")}
    freeze(parameters.items(), rates)
    groups = parameter_groups(parameters.items(), rates, 0.1, grouping)
    grouped = [name for group in groups for name in group.names]
    assert sorted(grouped) == sorted(name for name, p in parameters.items() if p.requires_grad)
    frozen = {part_of(name) for name, p in parameters.items() if not p.requires_grad}
    assert frozen == ({"llm"} if stage == 1 else set()), "stage 1 freezes the language model with its head, tied or not"


@MODELS
def test_vectors_do_not_decay_unless_the_reference_is_asked_for(shape: object) -> None:
    parameters, rates = named(shape), Rates(1.0, 1.0, 1.0, 1.0, 1.0)
    freeze(parameters.items(), rates)

    def decaying(grouping: str) -> set[str]:
        groups = parameter_groups(parameters.items(), rates, 0.1, grouping)
        return {name for group in groups if group.weight_decay for name in group.names}

    assert decaying("sound") == {name for name, p in parameters.items() if p.ndim == 2}
    more = decaying("reference") - decaying("sound")
    assert more == {name for name in parameters if "norm" in name}


def test_the_adapter_learns_with_its_own_rate() -> None:
    parameters = named(TINY)
    rates = Rates(llm=1.0, projector=2.0, encoder=3.0, patch_embedding=4.0, distill=5.0)
    freeze(parameters.items(), rates)
    of = {n: g.learning_rate for g in parameter_groups(parameters.items(), rates, 0) for n in g.names}
    assert of["distill.weight"] == 5.0 and of["encoder.patch_embedding.weight"] == 4.0
    as_recorded = parameter_groups(parameters.items(), rates, 0, "reference")
    assert {g.learning_rate for g in as_recorded if "distill.weight" in g.names} == {4.0}


def test_patches_learn_with_the_encoder_when_they_have_no_rate() -> None:
    parameters = named(TINY)
    rates = Rates(encoder=3.0)
    freeze(parameters.items(), rates)
    (decaying, rest) = parameter_groups(parameters.items(), rates, 0.1)
    assert "encoder.patch_embedding.weight" in decaying.names and "encoder.patch_embedding.bias" in rest.names


def test_nothing_to_learn_and_a_missing_rate_are_refused() -> None:
    parameters = named(TINY)
    freeze(parameters.items(), Rates())
    with pytest.raises(InputError, match="every part is frozen"):
        parameter_groups(parameters.items(), Rates(), 0)
    parameters["projector.readout.0.weight"].requires_grad_(True)
    with pytest.raises(InputError, match=r"projector\.readout\.0\.weight is trainable but projector has no"):
        parameter_groups(parameters.items(), Rates(encoder=1.0), 0)
    with pytest.raises(InputError, match="belongs to no part"):
        part_of("head.weight")


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else() -> None:
    parameters = dict(meta_model(TINY).named_parameters())
    rates = Rates(llm=1e-3, projector=1e-3, encoder=1e-3)
    groups = with_muon(parameter_groups(parameters.items(), rates, 0.1), 0.02)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(parameters) and len(set(names)) == len(names)
    for group in groups:
        for name in group.names:
            assert group.muon == (".layers." in name and parameters[name].ndim == 2)
        assert group.learning_rate == (0.02 if group.muon else 1e-3)
