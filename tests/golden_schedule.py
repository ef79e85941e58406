"""Learning rates, parameter groups, sampling order and token counts against the recorded tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_model import VLMS, load_vlm
from golden_set import TABLES

from penguin_edge.model.checkpoint import meta_model
from penguin_edge.model.weights import published_name
from penguin_edge.training.order import cut, visual_tokens
from penguin_edge.training.schedule import cosine_with_min_lr, freeze, parameter_groups
from penguin_edge.training.train_config import STAGES

GROUP_TABLES = sorted(name for name in TABLES if name.startswith("param_groups_stage")) if VLMS else []
SAMPLER = TABLES.get("length_sampler")


@pytest.mark.parametrize("row", TABLES.get("lr_schedule", []), ids=lambda r: "-".join(map(str, list(r.values())[:4])))
def test_learning_rate(row: dict[str, Any]) -> None:
    got = [
        cosine_with_min_lr(
            step,
            warmup_steps=row["num_warmup_steps"],
            total_steps=row["num_training_steps"],
            min_lr_ratio=row["min_lr_rate"],
            warmup_lr_ratio=row["warmup_lr_rate"],
        )
        for step in row["steps"]
    ]
    assert got == row["multipliers"]


@pytest.mark.parametrize("table", GROUP_TABLES)
def test_reference_parameter_groups(table: str) -> None:
    """The order inside a group does not matter to an optimiser; empty groups are left out."""
    rates = STAGES[int(table.removeprefix("param_groups_stage"))].rates
    named = dict(meta_model(load_vlm(VLMS[0])[0].config).named_parameters())
    distill = torch.nn.Linear(1, 1)
    named |= {f"distill.{name}": parameter for name, parameter in distill.named_parameters()}
    freeze(named.items(), rates)
    decay = max(group["weight_decay"] for group in TABLES[table])
    groups = parameter_groups(named.items(), rates, decay, "reference")
    got = [(g.learning_rate, g.weight_decay, sorted(map(in_training, g.names))) for g in groups]
    assert got == [(g["lr"], g["weight_decay"], sorted(g["params"])) for g in TABLES[table] if g["params"]]


def in_training(name: str) -> str:
    """The reference's name of one of our parameters while it trains."""
    if name.startswith("distill."):
        return "vision_distill_layer." + name.removeprefix("distill.")
    return published_name(name).replace("model.vision_encoder.", "model.vision_encoder.vision_encoder.")


@pytest.mark.parametrize("case", [SAMPLER] if SAMPLER else [], ids=["length_sampler"])
def test_grouped_order(case: dict[str, Any]) -> None:
    steps = cut(case["sorted_indices"], case["batch_size"] * case["world_size"])
    torch.manual_seed(case["torch_manual_seed"])
    assert [index for i in torch.randperm(len(steps)).tolist() for index in steps[i]] == case["order"]
    lengths = [case["lengths"][index] for step in steps for index in step]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    "row", TABLES.get("seqlen_visual", []), ids=lambda r: f"{r['height']}x{r['width']}x{r['frames']}"
)
def test_visual_tokens(row: dict[str, Any]) -> None:
    assert visual_tokens(row["height"], row["width"], row["frames"]) == row["tokens"]
