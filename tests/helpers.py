"""What several test files share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from penguin_edge.config import PenguinConfig
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.eager import EagerEngine
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.quantize.linear import QuantizedLinear
from penguin_edge.runtime.engines.base import F32, I64, Engine
from penguin_edge.runtime.engines.cache import Cache, Key

TESTS = Path(__file__).parent
CLIP = TESTS / "media" / "polar_bear.mp4"


@cache
def tiny_model() -> PenguinModel:
    """The tiny preset in fp32; shared, so do not change it."""
    return Checkpoint.open("tiny", note=lambda line: None).load()


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.of(Checkpoint.open("tiny", note=lambda line: None))


def picture(seed: int, height: int = 84, width: int = 112) -> NDArray[np.uint8]:
    """Smooth random picture: blocks of 14 pixels, so that pictures of two seeds are two scenes."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (-(-height // 14), -(-width // 14), 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((14, 14, 1), np.uint8))[:height, :width]


def asked_pictures(folder: Path, count: int) -> Path:
    """Pictures with questions, in the training format, of two sizes by turns; the folder."""
    lines = []
    for seed in range(count):
        Image.fromarray(picture(seed, 84, 84 + 28 * (seed % 2))).save(folder / f"{seed}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
        lines.append(json.dumps({"id": str(seed), "image": [f"{seed}.png"], "conversations": turns}))
    (folder / "annotations.jsonl").write_text("\n".join(lines))
    return folder


def products_of(layers: dict[str, QuantizedLinear]) -> dict[str, list[QuantizedLinear]]:
    """Layers that are quantized alike, by the name of their product in an ONNX file: those that read the same input
    lie in it one after another, unless their rows are rounded one by one."""
    out: dict[str, list[QuantizedLinear]] = {}
    for name, layer in layers.items():
        joined = name
        if layer.activations != "row":
            joined = re.sub("(gate|up)_proj$", "gate_up", re.sub("[qkv]_proj$", "qkv", name))
        out.setdefault(joined, []).append(layer)
    return out


class CountingEngine:
    """An engine that counts its calls and otherwise is the engine it wraps."""

    def __init__(self, inner: Engine | None = None, max_seq_len: int = 2048) -> None:
        self.inner: Engine = inner or EagerEngine(tiny_model(), max_seq_len=max_seq_len)
        self.name = self.inner.name
        self.config: PenguinConfig = self.inner.config
        self.bounds = self.inner.bounds
        self.can_move, self.can_place = self.inner.can_move, self.inner.can_place
        self.moves_exactly = self.inner.moves_exactly
        self.capacity = self.inner.capacity
        self.reset()

    def reset(self) -> None:
        self.encoded_frames = self.projected_frames = self.forwarded_tokens = self.forward_calls = 0

    def new_cache(self) -> Cache:
        return self.inner.new_cache()

    def close(self) -> None:
        self.inner.close()

    def encode(self, pixels: F32, rows: I64, cols: I64) -> F32:
        self.encoded_frames += len(pixels)
        return self.inner.encode(pixels, rows, cols)

    def project(self, features: F32) -> F32:
        self.projected_frames += len(features)
        return self.inner.project(features)

    def embed(self, ids: I64) -> F32:
        return self.inner.embed(ids)

    def forward(
        self, cache: Cache, embeds: F32, logit_index: I64, keys: Sequence[Key] = (), positions: I64 | None = None
    ) -> F32:
        self.forwarded_tokens += len(embeds)
        self.forward_calls += 1
        return self.inner.forward(cache, embeds, logit_index, keys, positions)

    def move(self, cache: Cache, begin: int, end: int, to: int, turn: int | None = None) -> None:
        self.inner.move(cache, begin, end, to, turn)


class Alone:
    """An engine and one cache of it, for tests in which there is no other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = engine.new_cache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def length(self) -> int:
        return self.cache.length

    @property
    def state(self) -> Any:
        """The engine's own numbers of the cache."""
        return self.engine._caches.state(self.cache)  # type: ignore[attr-defined]

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def forward(self, embeds: F32, logit_index: I64, positions: I64 | None = None) -> F32:
        return self.engine.forward(self.cache, embeds, logit_index, positions=positions)

    def move(self, begin: int, end: int, to: int, turn: int | None = None) -> None:
        self.engine.move(self.cache, begin, end, to, turn)
