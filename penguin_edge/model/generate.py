"""Eager generation in PyTorch: the golden reference for every engine.

| name      | shape     | dtype | what                                                              |
|-----------|-----------|-------|-------------------------------------------------------------------|
| input_ids | [1, S]    | int64 | prompt with one image-token id per visual token                   |
| visual    | [N, H]    | float | projected features, in the order of the prompt                    |
| logits    | [K, V]    | f32   | at the positions asked for                                        |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penguin_edge.model.decoder import KVCache
from penguin_edge.model.penguin import PenguinModel


@torch.no_grad()
def generate(
    model: PenguinModel,
    input_ids: Tensor,
    visual: Tensor | None = None,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
) -> tuple[list[int], Tensor]:
    """Greedy decoding with a KV cache.

    Returns:
        The new ids (a stop id is included and ends the answer), and the f32 logits [n, V] that each was chosen from.
    """
    assert model.decoder is not None
    length = input_ids.shape[1] + max_new_tokens
    cache = KVCache(model.config.text, length, model.dtype, model.device, model.decoder.kv_form)
    return continue_greedy(model, cache, model.splice(input_ids, visual), max_new_tokens=max_new_tokens, stop=stop)


@torch.no_grad()
def continue_greedy(
    model: PenguinModel,
    cache: KVCache,
    embeds: Tensor,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    note: Callable[[int], None] = lambda index: None,
) -> tuple[list[int], Tensor]:
    """`generate` after what a cache holds, beginning with `embeds` [1, S, H]; `note` is told each token's index."""
    assert model.decoder is not None and model.embedding is not None
    ids: list[int] = []
    rows: list[Tensor] = []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in stop):
        note(len(ids))
        positions = cache.length + torch.arange(embeds.shape[1], device=model.device)
        hidden = model.decoder(embeds, positions, cache.attend)
        cache.length += embeds.shape[1]
        rows.append(model.decoder.logits(hidden, torch.tensor([-1], device=model.device))[0, 0].float())
        ids.append(int(rows[-1].argmax()))
        embeds = model.embedding(torch.tensor([[ids[-1]]], device=model.device))
    return ids, torch.stack(rows)
