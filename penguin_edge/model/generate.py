"""Eager generation in PyTorch: the golden reference for every engine.

| name      | shape     | dtype | what                                                              |
|-----------|-----------|-------|-------------------------------------------------------------------|
| input_ids | [1, S]    | int64 | prompt with one image-token id per visual token                   |
| visual    | [N, H]    | float | projected features, in the order of the prompt                    |
| logits    | [K, V]    | f32   | at the positions asked for                                        |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penguin_edge.bundle.contract import Bounds
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError
from penguin_edge.model.decoder import KVCache
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.engines.base import check_encode, check_forward, check_move, check_project
from penguin_edge.runtime.engines.cache import Cache, Caches, Key


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


class EagerEngine:
    """The `Engine` protocol of the runtime over the PyTorch model, without bounds of its own but `max_seq_len`."""

    name = "eager"

    def __init__(self, model: PenguinModel, *, max_seq_len: int = 4096) -> None:
        self.model = model
        self.config: PenguinConfig = model.config
        self.bounds = Bounds(
            max_seq_len=max_seq_len, max_chunk=512, max_logits=64, max_batch=16, patch_buckets=(65_536,)
        )
        # Kept: the model looks for them among all of its parameters, which takes longer than a step of a small one.
        self._dtype, self._device = model.dtype, model.device
        self._caches = Caches(None, self._new_state)
        self.guard = self._caches.guard

    @property
    def capacity(self) -> int | None:
        return self._caches.capacity

    def tokenizer(self) -> Tokenizer:
        raise InputError("this engine was made from a model alone, without a tokenizer; pass the tokenizer, too")

    def load(self, *, media: bool) -> None:
        """Nothing: the model is there."""

    def new_cache(self) -> Cache:
        return self._caches.new()

    def close(self) -> None:
        self._caches.close()

    def _new_state(self) -> KVCache:
        form = self.model.decoder.kv_form if self.model.decoder is not None else None
        return KVCache(self.config.text, self.bounds.max_seq_len, self._dtype, self._device, form)

    def _float(self, values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, self._dtype)

    def _int(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    @torch.no_grad()
    def encode(
        self, pixels: NDArray[np.float32], rows: NDArray[np.int64], cols: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        check_encode(self.bounds, pixels, rows, cols)
        with self.guard:
            self._caches.check_open()
            return self.model.encode(self._float(pixels), self._int(rows), self._int(cols)).float().cpu().numpy()

    @torch.no_grad()
    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        assert self.model.projector is not None
        check_project(self.bounds, features)
        with self.guard:
            self._caches.check_open()
            return self.model.projector(self._float(features)).float().cpu().numpy()

    @torch.no_grad()
    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self.model.embedding is not None
        return self.model.embedding(self._int(ids)).float().cpu().numpy()

    @torch.no_grad()
    def forward(
        self, cache: Cache, embeds: NDArray[np.float32], logit_index: NDArray[np.int64], keys: Sequence[Key] = ()
    ) -> NDArray[np.float32]:
        assert self.model.decoder is not None
        with self.guard:
            kv = self._caches.state(cache)
            check_forward(self.bounds, cache.length, embeds, logit_index, self.config.text.hidden_size)
            with cache.writing(len(embeds), keys):
                kv.length = cache.length
                positions = kv.length + torch.arange(len(embeds), device=self._device)
                hidden = self.model.decoder(self._float(embeds)[None], positions, kv.attend)
                return self.model.decoder.logits(hidden, self._int(logit_index))[0].float().cpu().numpy()

    can_move = True

    @torch.no_grad()
    def move(self, cache: Cache, begin: int, end: int, to: int) -> None:
        """Positions [begin, end) stand at `to` from now on, keys turned; see `penguin_edge.runtime.engines.base`."""
        check_move(self.bounds.max_seq_len, begin, end, to)
        with self.guard:
            kv = self._caches.state(cache)
            with cache.moving(begin, end, to):
                kv.move(begin, end, to, self.config.text.rope_theta)
