"""Moved positions of a KV cache: the same in numpy, in PyTorch and in ONNX Runtime's buffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Alone, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import InputError
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.decoder import KVCache, KVForm
from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.engines.kv_shift import move_positions
from penguin_edge.runtime.engines.opening import open_engine

SPAN = st.tuples(st.integers(0, 599), st.integers(0, 599), st.integers(0, 599)).map(sorted)


@settings(deadline=None)
@given(span=SPAN, dtype=st.sampled_from([torch.float32, torch.float16]))
def test_numpy_and_torch_move_alike_and_nothing_else(span: list[int], dtype: torch.dtype) -> None:
    to, begin, end = span[0], span[1], span[2] + 1
    text = tiny_model().config.text
    cache = KVCache(text, 600, dtype, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    for buffer in cache.keys + cache.values:
        buffer.copy_(torch.randn(buffer.shape, generator=random))
    keys, values = (one[0].numpy().copy() for one in (cache.keys, cache.values))
    before = keys.copy(), values.copy()
    move_positions(keys, values, begin, end, to, text.rope_theta)
    cache.move(begin, end, to, text.rope_theta)
    stop = to + end - begin
    assert cache.length == stop
    # fp16: one unit in the last place of values of at most 8.
    assert np.abs(keys - cache.keys[0].numpy()).max() <= (1e-5 if dtype == torch.float32 else 8e-3)
    assert np.array_equal(values, cache.values[0].numpy()) and np.array_equal(
        values[:, :, to:stop], before[1][:, :, begin:end]
    )
    for now, then in zip((keys, values), before, strict=True):
        assert np.array_equal(now[:, :, :to], then[:, :, :to]) and np.array_equal(now[:, :, end:], then[:, :, end:])


@settings(deadline=None)
@given(span=SPAN, seed=st.integers(0, 3))
def test_int8_keys_are_rounded_alike_in_numpy_and_torch(span: list[int], seed: int) -> None:
    """From the same integers both come to the same integers: they say the same sums in the same order."""
    to, begin, end = span[0], span[1], span[2] + 1
    text = tiny_model().config.text
    random = np.random.default_rng(seed)
    shape = (1, text.num_key_value_heads, 600, text.head_dim)
    keys, values = (random.integers(-128, 128, shape).astype(np.int8) for _ in range(2))
    layers = text.num_hidden_layers
    # Channels of one pair differ up to 30 times, so that some come to more than they can hold.
    scales = np.exp(random.uniform(-5.0, -1.6, (2 * layers, shape[1], 1, shape[3]))).astype(np.float32)
    form = KVForm("int8", torch.from_numpy(scales))
    cache = KVCache(text, 600, torch.float32, torch.device("cpu"), form)
    cache.keys[0].copy_(torch.from_numpy(keys * scales[0]))
    cache.values[0].copy_(torch.from_numpy(values * scales[layers]))
    before = keys.copy(), values.copy()
    move_positions(keys, values, begin, end, to, text.rope_theta, scales[0])
    cache.move(begin, end, to, text.rope_theta)
    stop = to + end - begin
    assert cache.length == stop
    assert np.array_equal(keys * scales[0], cache.keys[0].numpy())
    assert np.array_equal(values[:, :, to:stop], before[1][:, :, begin:end])
    for now, then in zip((keys, values), before, strict=True):
        assert np.array_equal(now[:, :, :to], then[:, :, :to]) and np.array_equal(now[:, :, end:], then[:, :, end:])


def test_int8_keys_are_turned_to_within_half_a_step_and_cut_off() -> None:
    """Against the exact turn of what the integers stand for."""
    random = np.random.default_rng(0)
    keys = random.integers(-128, 128, (1, 2, 60, 16)).astype(np.int8)
    scale = np.exp(random.uniform(-2.0, 0.0, (2, 1, 16))).astype(np.float32)
    exact = keys * scale
    move_positions(exact, exact.copy(), 20, 60, 3, 10_000.0)
    move_positions(keys, keys.copy(), 20, 60, 3, 10_000.0, scale)
    wanted = np.clip(exact[:, :, 3:43] / scale, -128, 127)
    assert np.abs(keys[:, :, 3:43] - wanted).max() <= 0.5 + 1e-4
    # Some are cut off, at both ends: a conversion would have wrapped around.
    assert (exact[:, :, 3:43] / scale).max() > 140 and (exact[:, :, 3:43] / scale).min() < -140


def test_a_cache_in_half_precision_is_rounded_after_a_move() -> None:
    """An fp32 model with an fp16 cache: what is turned is stored as everything else is."""
    text = tiny_model().config.text
    cache = KVCache(text, 40, torch.float32, torch.device("cpu"), KVForm("fp16"))
    keys = torch.randn(cache.keys[0].shape, generator=torch.Generator().manual_seed(0)).half()
    cache.keys[0].copy_(keys)
    cache.move(10, 40, 0, text.rope_theta)
    numpy_keys = keys.numpy().copy()
    move_positions(numpy_keys, numpy_keys.copy(), 10, 40, 0, text.rope_theta)
    assert np.array_equal(cache.keys[0][:, :, :30].half().numpy(), numpy_keys[:, :, :30])
    assert torch.equal(cache.keys[0], cache.keys[0].half().float())


def test_a_turn_is_exact() -> None:
    """The same token at another place: its key in the first layer is that of a token computed there."""
    engine, there = (Alone(EagerEngine(tiny_model(), max_seq_len=600)) for _ in range(2))
    embeds = engine.embed(np.arange(500) % 600)
    engine.forward(embeds[:450], np.empty(0, np.int64))
    there.forward(embeds[400:450], np.empty(0, np.int64))
    for begin in range(400, 0, -50):  # in steps, each of which rounds
        engine.move(begin, begin + 50, begin - 50)
    assert engine.length == 50
    got, wanted = (one.state.keys[0][:, :, :50] for one in (engine, there))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_onnx_runtime_moves_as_eager_does(nano_bundle: Callable[[str, str], Path]) -> None:
    checkpoint = Checkpoint.open("nano", note=lambda line: None)
    eager = Alone(EagerEngine(checkpoint.load(), max_seq_len=512))
    engine = Alone(open_engine(Bundle.read(nano_bundle("onnx", "fp32")), threads=1))
    assert engine.can_move
    random = np.random.default_rng(0)
    ids = random.integers(0, 4000, 300)
    found = []
    for one in (eager, engine):
        embeds = one.embed(ids)
        for begin in range(0, 300, 100):
            one.forward(embeds[begin : begin + 100], np.empty(0, np.int64))
        one.truncate(100)
        one.move(180, 300, 100)
        assert one.length == 220
        found.append(one.forward(embeds[:3], np.array([0, 2])))
        with pytest.raises(InputError, match="wanted 0 <= to"):
            one.move(10, 20, 15)
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[0]).max()
