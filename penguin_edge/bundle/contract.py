"""The contract of a bundle's graphs: names, dtypes and shapes of every tensor, and the bounds of compiled graphs.

| graph     | inputs                                                                          | outputs                |
|-----------|---------------------------------------------------------------------------------|------------------------|
| encoder   | pixels [B,P,588] f32, rows [P] i64, cols [P] i64                                | features [B,P,C] f32   |
| projector | features [B,T,M,C] f32                                                          | visual [B,T,H] f32     |
| decoder   | embeds [1,S,H] f32, start [1] i64, logit_index [K] i64, positions [S] i64,      | logits [1,K,V] f32, KV |
|           | KV state; on ExecuTorch kv_positions [L] i64 = 0…L-1, so that the filled length is a shape               |
| prefill   | as decoder, on the same KV state: more than one position at a time, where a bundle has it                |
| embedding | not a graph: a raw row-major table, read by the runtime                         | embeds [S,H]           |

KV state is `[1, kv_heads, max_seq_len, D]` per layer for keys and for values, written in place at `start`: the slots of
the new tokens, which the causal mask counts. `positions` are their rotary positions, below `most_positions`: equal to
the slots, unless visual tokens were left out before. Decoders of earlier exports lack this input. ONNX Runtime
binds one buffer as `past_key_i`/`present_key_i` (and `…value_i`); ExecuTorch keeps mutable buffers inside, which the
program names `keys_i` and `values_i`.
Graph inputs and outputs are f32 whatever the graph computes in; only KV buffers have a dtype of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penguin_edge.config import PATCH_VALUES, PenguinConfig
from penguin_edge.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
EMBEDDING = "embedding.bin"
KV_SCALES = "kv_scales.bin"
"""Scales of int8 KV buffers, f32 [2L, kv, D]: of all keys' channels, then of all values'."""
CHECK = "check.safetensors"
VERIFY = "verify.json"
PROFILE = "profile.json"
"""What our verbs write beside the manifest, which does not name it."""
POSITIONS = "positions"
"""The input of a decoder that gives each new token its rotary position; decoders of earlier exports lack it."""
POSITIONS_PER_SLOT = 4
"""Rotary positions of a bundle for each slot of its cache: tokens that are left out leave gaps."""
EXECUTORCH_PATCHES = 4096
"""Patches of the largest picture for ExecuTorch: attention scores of one frame are `[heads, P, P]` in one piece, 1.1 GB
at 4096 patches, 17 GB at 16,384."""
EXECUTORCH_MERGED = 4
"""Patches that the projector of ExecuTorch makes at most one visual token of."""
COPY_AGAIN = "copy the bundle again or export it again"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at a graph's boundary; a dimension is a number or the name of a bound."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Bounds:
    """Upper limits fixed at export; engines plan memory from them and the runtime checks them before it calls.

    `patch_buckets` are the encoder's and projector's upper bounds of P, one compiled method each; engines that plan
    nothing ahead have a single bucket.
    """

    max_seq_len: int = 4096
    max_chunk: int = 128
    min_chunk: int = 1
    """Positions of a prompt that must be computed at once: 2 where single ones run through another graph."""
    max_logits: int = 8
    max_batch: int = 16
    patch_buckets: tuple[int, ...] = (16_384,)

    @property
    def max_patches(self) -> int:
        return max(self.patch_buckets)


def _bounds_onnx(max_seq_len: int, min_chunk: int) -> Bounds:
    """ONNX Runtime plans nothing from them; they limit the time and memory of one call."""
    return Bounds(max_seq_len, max_chunk=256, min_chunk=min_chunk)


def _bounds_executorch(max_seq_len: int, min_chunk: int) -> Bounds:
    """ExecuTorch reserves memory for the largest shapes: one frame at a time, small chunks."""
    # Four patches per visual token at merge size 2, and never more visual tokens than the cache holds.
    patches = min(EXECUTORCH_PATCHES, 4 * max_seq_len)
    return Bounds(max_seq_len, min(128, max_seq_len), min_chunk, max_batch=1, patch_buckets=(patches,))


COMPILED: dict[str, Callable[[int, int], Bounds]] = {"onnx": _bounds_onnx, "executorch": _bounds_executorch}
"""What graphs of each target are compiled for, from `max_seq_len` and `min_chunk`."""


def compiled_bounds(target: str, max_seq_len: int, *, prefill: bool = False) -> Bounds | None:
    """Bounds that an export for this target writes; None for a target that is not known here.

    Args:
        prefill: whether the bundle has a graph of its own for prompts.
    """
    bounds = COMPILED.get(target)
    return None if bounds is None else bounds(max_seq_len, 2 if prefill else 1)


def most_positions(config: PenguinConfig, bounds: Bounds) -> int:
    """Rotary positions that decoders take: 0 up to this number, exclusive."""
    return min(config.text.max_position_embeddings, POSITIONS_PER_SLOT * bounds.max_seq_len)


def signature(
    graph: str, config: PenguinConfig, bounds: Bounds, *, placed: bool = True
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of one graph, KV state not counted. `T` is P/m², `M` is m².

    Args:
        placed: whether decoders take `positions`, as all do but those of earlier exports.
    """
    text = config.text
    if graph in ("decoder", "prefill"):
        inputs = [
            TensorSpec("embeds", "f32", (1, "S", text.hidden_size)),
            TensorSpec("start", "i64", (1,)),
            TensorSpec("logit_index", "i64", ("K",)),
        ]
        if placed:
            inputs.append(TensorSpec(POSITIONS, "i64", ("S",)))
        return inputs, [TensorSpec("logits", "f32", (1, "K", text.vocab_size))]
    if config.vision is None:
        raise BundleError(f"a text-only model has no {graph}; its bundle holds the decoder and the embedding only")
    channels = config.vision.hidden_size
    if graph == "encoder":
        inputs = [
            TensorSpec("pixels", "f32", ("B", "P", PATCH_VALUES)),
            TensorSpec("rows", "i64", ("P",)),
            TensorSpec("cols", "i64", ("P",)),
        ]
        return inputs, [TensorSpec("features", "f32", ("B", "P", channels))]
    inputs = [TensorSpec("features", "f32", ("B", "T", "M", channels))]
    return inputs, [TensorSpec("visual", "f32", ("B", "T", text.hidden_size))]


def kv_names(layer: int) -> dict[str, str]:
    """Names of one layer's KV tensors where the graph takes and gives them."""
    return {
        "past_key": f"past_key_{layer}",
        "past_value": f"past_value_{layer}",
        "present_key": f"present_key_{layer}",
        "present_value": f"present_value_{layer}",
    }
