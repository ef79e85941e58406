"""How far keys of an int8 or fp16 KV cache drift when their positions move again and again, and what logits see of it.

    penguin-edge export --model nano --quant fp32 --kv-cache-dtype int8 --max-seq-len 2048 -o BUNDLE
    penguin-edge data nano --split heldout --count 600 --seed 1 -o DIR
    python bench/peers/kv_moves.py --bundle BUNDLE --data DIR [--model nano] [--moves 1 10 50] [--streams 8]
                                   [--filled 1000] [--step 16]

A stream of held-out clips fills the cache. Its last 200 positions then move down by `step` at a time, as when the
oldest frame leaves. `exact` has their unrounded keys turned once, `computed` these rounded, as if computed where they
now stand, `moved` what the moves have left. Values, and what stands before, are rounded and the same in all
three. KL is that of the first tokens of answers to the clips' own questions, in nats, each after the greedy tokens of
`exact`. The eager engine does it, with the scales of the bundle. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penguin_edge.bundle.contract import KV_SCALES
from penguin_edge.bundle.folder import Bundle
from penguin_edge.dataset.records import read_records
from penguin_edge.evaluation.score import Question, questions_of
from penguin_edge.media.frames import Frame, read_video
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.decoder import KVForm
from penguin_edge.model.eager import EagerEngine
from penguin_edge.model.layers import rotate
from penguin_edge.prompt.chat import part_kind
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.cache import Cache
from penguin_edge.runtime.engines.kv_shift import turn
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.layout import media_source

KEPT, ANSWER = 200, 8
"""Positions that move, and tokens of an answer."""


class Recording(KVForm):
    """A form that remembers the keys of every layer before they are rounded."""

    def stored(self, index: int, x: Tensor) -> Tensor:
        seen.setdefault(index, []).append(x)
        return super().stored(index, x)


seen: dict[int, list[Tensor]] = {}


def clips(questions: list[Question], config: Any, frames: int) -> list[tuple[list[Frame], list[str]]]:
    """Frames of clips of one size put one after another, `frames` and more each, with the questions about them."""
    out: list[tuple[list[Frame], list[str]]] = []
    run: list[Frame] = []
    texts: list[str] = []
    for question in questions:
        content = question.messages[0]["content"]
        videos = [part for part in content if part_kind(part) == "video"] if not isinstance(content, str) else []
        if len(question.messages) != 1 or len(videos) != 1:
            continue
        source, options = media_source(videos[0], config.image)
        read = list(read_video(source, **(options or {})))
        if run and read[0].pixels.shape != run[0].pixels.shape:
            continue
        run += read
        texts.append(question.text)
        if len(run) >= frames:
            out.append((run, texts))
            run, texts = [], []
    return out


def probabilities(
    engine: EagerEngine, cache: Cache, start: int, asked: Any, chosen: list[int]
) -> tuple[Tensor, list[int]]:
    """Log-probabilities [ANSWER, V] after a question; `chosen` tokens are fed, or the most likely ones if none."""
    cache.truncate(start)
    rows, fed = [], []
    embeds = asked
    for index in range(ANSWER):
        rows.append(engine.forward(cache, embeds, np.array([-1]))[0])
        fed.append(chosen[index] if chosen else int(rows[-1].argmax()))
        embeds = engine.embed(np.array(fed[-1:]))
    return torch.from_numpy(np.stack(rows)).double().log_softmax(-1), fed


def kl(wanted: Tensor, got: Tensor) -> float:
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def measure(
    engine: EagerEngine,
    tokenizer: Tokenizer,
    clip: tuple[list[Frame], list[str]],
    filled: int,
    step: int,
    moves: list[int],
) -> dict[int, dict[str, float]]:
    """Errors and divergences for one stream, by the number of moves; none of a stream that is too short."""
    frames, texts = clip
    text, cache = engine.config.text, engine.new_cache()
    kv = engine._caches.state(cache)
    form = kv.form
    assert form is not None
    run = Stream(engine, tokenizer, window_s=1e9, max_frames=10_000, budget=10**6)
    for index, frame in enumerate(frames):
        run.push(Frame(frame.pixels, float(index), index))
    if len(run.prompt_keys()) < filled:
        return {}
    keys = run.prompt_keys()[:filled]
    begin, end = filled - KEPT, filled
    list(run.ask(texts[0], options=SamplingOptions(max_new_tokens=1)))
    asked = run.features.embeds([key for key in run.cache.keys[len(run.prompt_keys()) :] if key is not None])
    embeds = run.features.embeds(keys)
    seen.clear()
    for at in range(0, len(keys), 256):
        engine.forward(cache, embeds[at : at + 256], np.empty(0, np.int64))
    exact = [torch.cat(seen[layer], 2)[:, :, begin:end] for layer in range(text.num_hidden_layers)]
    held = [buffer.clone() for buffer in kv.keys + kv.values]
    found: dict[int, dict[str, float]] = {}
    for count in moves:
        for buffer, before in zip(kv.keys + kv.values, held, strict=True):
            buffer.copy_(before)
        for index in range(count):
            engine.move(cache, begin - index * step, end - index * step, begin - (index + 1) * step)
        to = begin - count * step
        there = slice(to, to + KEPT)
        cos, sin = (torch.from_numpy(np.tile(x, 2)) for x in turn(to - begin, text.head_dim, text.rope_theta))
        wanted = [rotate(one, cos, sin) for one in exact]
        ways = {
            "exact": wanted,
            "computed": [form.stored(layer, one) for layer, one in enumerate(wanted)],
            "moved": [buffer[:, :, there].clone() for buffer in kv.keys],
        }
        row = {"to": float(to)}
        total = math.sqrt(sum(float(one.square().sum()) for one in wanted))
        logs, fed = {}, []
        for name, put in ways.items():
            for buffer, one in zip(kv.keys, put, strict=True):
                buffer[:, :, there] = one
            logs[name], fed = probabilities(engine, cache, there.stop, asked, fed)
            lost = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(put, wanted, strict=True)))
            row |= {f"{name}_error": lost / total, f"{name}_kl": kl(logs["exact"], logs[name])}
        row["moved_from_computed_kl"] = kl(logs["computed"], logs["moved"])
        row["same_choice"] = float((logs["moved"].argmax(-1) == logs["computed"].argmax(-1)).double().mean())
        found[count] = row
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--moves", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--filled", type=int, default=1000)
    parser.add_argument("--step", type=int, default=16)
    args = parser.parse_args()
    if KEPT + args.step * max(args.moves) > args.filled:
        parser.error(f"{max(args.moves)} moves by {args.step}, and {KEPT} positions, do not fit in {args.filled}")
    checkpoint = Checkpoint.open(args.model, note=lambda line: None)
    model, bundle = checkpoint.load(dtype=torch.float32), Bundle.read(args.bundle)
    assert model.decoder is not None
    text = checkpoint.config.text
    if bundle.manifest.kv_dtype == "int8":
        shape = (2 * text.num_hidden_layers, text.num_key_value_heads, 1, text.head_dim)
        scales = np.fromfile(bundle.path(KV_SCALES), "<f4").reshape(shape)
        model.decoder.kv_form = Recording("int8", torch.from_numpy(scales))
    else:
        model.decoder.kv_form = Recording("fp16")
    engine = EagerEngine(model, max_seq_len=2048)
    tokenizer = Tokenizer.of(checkpoint)
    streams = clips(questions_of(read_records(args.data)), checkpoint.config, args.filled // 14)
    rows: list[dict[int, dict[str, float]]] = []
    for clip in streams:
        if row := measure(engine, tokenizer, clip, args.filled, args.step, args.moves):
            rows.append(row)
        if len(rows) == args.streams:
            break
    result: dict[str, Any] = {"streams": len(rows)}
    for count in args.moves:
        means = {key: float(np.mean([row[count][key] for row in rows])) for key in rows[0][count]}
        print(f"{count:3} moves, to {means['to']:.0f}: " + ", ".join(f"{k} {v:.2e}" for k, v in means.items()))
        result[str(count)] = means
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
