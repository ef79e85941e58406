"""The eager model as an engine, so that sessions and streams run on it: the reference for all others.

Tensors are those of `penguin_edge.runtime.engines.base`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penguin_edge.bundle.contract import Bounds, most_positions
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError
from penguin_edge.model.decoder import KVCache
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.engines.base import check_encode, check_forward, check_move, check_positions, check_project
from penguin_edge.runtime.engines.cache import Cache, Caches, Key


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
        self._most = most_positions(self.config, self.bounds)
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
        self,
        cache: Cache,
        embeds: NDArray[np.float32],
        logit_index: NDArray[np.int64],
        keys: Sequence[Key] = (),
        positions: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        assert self.model.decoder is not None
        with self.guard:
            kv = self._caches.state(cache)
            check_forward(self.bounds, cache.length, embeds, logit_index, self.config.text.hidden_size)
            places = check_positions(
                positions, len(embeds), cache.length, cache.following, self._most, can_place=self.can_place
            )
            with cache.writing(len(embeds), keys, places):
                kv.length = cache.length
                hidden = self.model.decoder(self._float(embeds)[None], self._int(places), kv.attend)
                return self.model.decoder.logits(hidden, self._int(logit_index))[0].float().cpu().numpy()

    can_move = can_place = True

    @property
    def moves_exactly(self) -> bool:
        """See `penguin_edge.runtime.engines.base.Engine`."""
        form = self.model.decoder.kv_form if self.model.decoder is not None else None
        return form is None or form.dtype != "int8"

    @torch.no_grad()
    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        """Slots [begin, end) stand at `to` from now on, keys turned; see `penguin_edge.runtime.engines.base`."""
        check_move(self.bounds.max_seq_len, begin, end, to, turn)
        with self.guard:
            kv = self._caches.state(cache)
            with cache.moving(begin, end, to, turn):
                kv.move(begin, end, to, self.config.text.rope_theta, turn)
