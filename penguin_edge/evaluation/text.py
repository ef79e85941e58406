"""What a model makes of text: perplexity, and how far it is from another model on the same text.

| name   | shape  | dtype | what                                               |
|--------|--------|-------|----------------------------------------------------|
| pieces | [N, S] | int64 | token ids; every piece begins with an empty cache  |
| logits | [S, V] | f32   | of one piece, after each of its tokens             |

Per position: KL divergence from the reference's distribution, in nats; whether the most likely token is the same
(top-1), and whether the reference's most likely token is among the five most likely (top-5). The reference's
distribution is the first argument of the divergence: what it finds likely must not be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.errors import InputError
from penguin_edge.runtime.engines.base import Engine, chunks

CountProgress = Callable[[int, int], None]
"""(pieces done, pieces)."""
CONTINUED = 64
"""Greedy tokens that are compared."""


@dataclass(frozen=True)
class Piece:
    """What is kept of one piece, per position."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    top1: NDArray[np.bool_]
    top5: NDArray[np.bool_]


def piece_logits(engine: Engine, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [S, V] after each token of a piece."""
    step = min(engine.bounds.max_chunk, engine.bounds.max_logits)
    embeds = engine.embed(ids)
    with engine.new_cache() as cache:
        logits = [
            engine.forward(cache, embeds[rows], np.arange(rows.stop - rows.start))
            for rows in chunks(len(ids), replace(engine.bounds, max_chunk=step))
        ]
    return np.concatenate(logits)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of the softmax over the last axis, in fp64.

    Raises:
        InputError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise InputError("a logit is NaN or infinite; verify the model before you measure it")
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare_piece(got: NDArray[np.float32], wanted: NDArray[np.float32], ids: NDArray[np.int64]) -> Piece:
    """Logits [S, V] of a model and of the reference for the same piece; `nll` is the model's."""
    nll, kl, top1, top5 = [], [], [], []
    # A few rows at a time: fp64 rows of 150,000 logits take 1.2 MB each.
    for begin in range(0, len(ids), 32):
        rows = slice(begin, begin + 32)
        p, q = log_softmax(wanted[rows]), log_softmax(got[rows])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        best = p.argmax(-1)
        top1.append(q.argmax(-1) == best)
        above = (q > np.take_along_axis(q, best[:, None], 1)).sum(-1)
        top5.append(above < 5)
        following = ids[1:][rows]
        nll.append(-q[np.arange(len(following)), following])
    return Piece(*(np.concatenate(values) for values in (nll, kl, top1, top5)))


def continuation(engine: Engine, ids: NDArray[np.int64], count: int) -> list[int]:
    """Greedy tokens after a piece; a token that ends an answer does not stop them."""
    embeds = engine.embed(ids)
    out: list[int] = []
    with engine.new_cache() as cache:
        while len(out) < count:
            for rows in chunks(len(embeds), engine.bounds):
                logits = engine.forward(cache, embeds[rows], np.full(int(rows.stop == len(embeds)), -1, np.int64))
            out.append(int(logits[0].argmax()))
            embeds = engine.embed(np.array(out[-1:], np.int64))
    return out


def measure_text(
    engine: Engine,
    pieces: NDArray[np.int64],
    reference: Engine | None,
    progress: CountProgress,
    *,
    continued: int = CONTINUED,
) -> dict[str, Any]:
    """Perplexity, and with a reference KL, top-1, top-5 and how long greedy texts stay the same.

    Greedy texts of `continued` tokens go on from the first half of each piece; 0 leaves them out.

    Raises:
        InputError: the reference has another vocabulary, or a piece does not fit a cache.
    """
    engines = [engine] if reference is None else [engine, reference]
    length = pieces.shape[1]
    for one in engines:
        if max(length, length // 2 + continued) > one.bounds.max_seq_len:
            raise InputError(
                f"pieces of {length} tokens, but the cache holds {one.bounds.max_seq_len}; use shorter pieces, or more "
                "KV positions"
            )
    if reference is not None and reference.config.text.vocab_size != engine.config.text.vocab_size:
        raise InputError("the two models have different vocabularies; name the model that the bundle was made from")
    found: list[Piece] = []
    same: list[int] = []
    for index, ids in enumerate(pieces):
        got = piece_logits(engine, ids)
        wanted = got if reference is None else piece_logits(reference, ids)
        found.append(compare_piece(got, wanted, ids))
        if reference is not None and continued:
            texts = [continuation(one, ids[: length // 2], continued) for one in engines]
            equal = [a == b for a, b in zip(*texts, strict=True)]
            same.append(equal.index(False) if False in equal else continued)
        progress(index + 1, len(pieces))
    nll = np.concatenate([piece.nll for piece in found])
    result: dict[str, Any] = {
        "pieces": len(pieces), "tokens": int(pieces.size), "perplexity": float(np.exp(nll.mean())),
    }  # fmt: skip
    if reference is not None:
        kl = np.concatenate([piece.kl for piece in found])
        result |= {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1_agreement": float(np.concatenate([piece.top1 for piece in found]).mean()),
            "top5_agreement": float(np.concatenate([piece.top5 for piece in found]).mean()),
        }
    if same:
        result |= {
            "greedy_tokens": continued,
            "greedy_tokens_equal": float(np.mean(same)),
            "greedy_texts_equal": float(np.mean([count == continued for count in same])),
        }
    return result
