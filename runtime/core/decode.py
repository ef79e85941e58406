"""An answer, from a planned prompt to its last token: prefill what the cache lacks, then one token after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from penguin_edge.errors import BusyError, InputError, PenguinError
from penguin_edge.machine import peak_mb
from penguin_edge.prompt import chat
from penguin_edge.prompt.tokenizer import TextStream, Tokenizer
from penguin_edge.runtime.core.answer import Layout, Token, describe, refuse_media
from penguin_edge.runtime.core.features import Features
from penguin_edge.runtime.core.media import Clip, Picture
from penguin_edge.runtime.core.prefill import extend_to
from penguin_edge.runtime.core.report import Clock, Report
from penguin_edge.runtime.core.sampling import Sampler, SamplingOptions
from penguin_edge.runtime.engines.base import F32, Engine
from penguin_edge.runtime.engines.cache import Cache, Key


@dataclass(frozen=True)
class Parts:
    """What answers are made with: an engine, the cache of one conversation, and the features of its pictures."""

    engine: Engine
    tokenizer: Tokenizer
    cache: Cache
    features: Features

    def keys(self, layout: Layout) -> list[Key]:
        """What stands in each slot of a prompt; where only a share is kept, its features have to be computed before."""
        keys: list[Key] = []
        for piece in layout.pieces:
            if isinstance(piece, chat.VisualTokens):
                visual = layout.visuals[piece.index]
                keys += [(visual, i) for i in self.features.numbers(visual)]
            else:
                keys += self.tokenizer.encode_pieces([piece])
        return keys

    def prefill(self, keys: Sequence[Key], *, logits: bool) -> tuple[int, F32]:
        """Bring the cache to `keys`; positions that were reused, and the logits [V] after the last one if asked for."""
        done = extend_to(self.engine, self.cache, keys, self.features.embeds, logits=logits)
        return done.reused, done.logits


def check_parts(engine: object, tokenizer: object) -> None:
    """Refuse what is no engine and no tokenizer, such as the path of a bundle.

    Raises:
        InputError: either.
    """
    if not hasattr(engine, "new_cache"):
        raise InputError(f"engine: {type(engine).__name__}, wanted what open_engine(bundle) gives")
    if tokenizer is not None and not hasattr(tokenizer, "encode_pieces"):
        raise InputError(f"tokenizer: {type(tokenizer).__name__}, wanted a Tokenizer, or None for the bundle's own")


def answer(
    parts: Parts,
    report: Report,
    plan: Callable[[], Layout],
    media: list[Picture | Clip],
    clock: Clock,
    options: SamplingOptions,
    asked_again: Callable[[], bool],
) -> Generator[Token, None, None]:
    """The tokens of an answer; `report` says what each step took.

    Args:
        plan: makes the prompt, as part of the time to the first token.
        media: where the pixels of the prompt's pictures come from.
        clock: what was spent on reading them counts from the beginning.
        asked_again: whether another answer was begun meanwhile, which has taken the cache.
    Raises:
        BudgetError: the prompt does not fit.
        BusyError: another answer was begun before this one had ended.
        PenguinError: no token follows, because the model's numbers are NaN or infinite.
    """
    begin = time.monotonic_ns() - sum(clock.spent.values())
    refuse_media(parts.engine.config, bool(media))
    with clock("plan"):
        layout = plan()
        describe(report, media, layout, parts.tokenizer)
    parts.features.compute(media, layout.visuals, clock, layout.references)
    with clock("plan"):
        keys = parts.keys(layout)
    with clock("prefill"):
        report.reused_tokens, logits = parts.prefill(keys, logits=True)
        report.prompt_tokens = len(keys)
    for token in _decode(parts, report, logits, begin, clock, options):
        yield token
        if report.finish_reason == UNFINISHED and asked_again():
            raise BusyError("another question was asked meanwhile; read an answer to its end, or close it, first")


UNFINISHED = "cancelled"
"""What ends an answer that nobody reads to its end."""


def _decode(
    parts: Parts, report: Report, logits: F32, begin: int, clock: Clock, options: SamplingOptions
) -> Generator[Token, None, None]:
    """Tokens one by one after `logits` [V]; `begin` is when the question was asked, in nanoseconds."""
    stops = parts.engine.config.eos_token_ids
    sampler, stream = Sampler(options), TextStream(parts.tokenizer)
    report.finish_reason = UNFINISHED
    last = begin
    try:
        while True:
            token = _pick(parts.cache, sampler, logits)
            now = time.monotonic_ns()
            if report.first_token_ms is None:
                report.first_token_ms = (now - begin) / 1e6
                clock.spent["other"] = now - begin - sum(clock.spent.values())
                report.phases_ms = {name: ns / 1e6 for name, ns in clock.spent.items()}
            else:
                report.token_ms.append((now - last) / 1e6)
            last = now
            report.token_ids.append(token)
            ended = token in stops
            text = stream.push(token)
            full = len(report.token_ids) == options.max_new_tokens
            late = options.max_ms is not None and now - begin >= 1e6 * options.max_ms
            finished = ended or full or late
            if finished:
                text += stream.flush()
                report.finish_reason = "stop" if ended else "length" if full else "deadline"
            report.text += text
            yield Token(token, text)
            if finished:
                return
            logits = parts.engine.forward(parts.cache, parts.features.embeds([token]), np.array([-1]), [token])[0]
    finally:
        if report.token_ms:
            report.tokens_per_s = 1e3 * len(report.token_ms) / sum(report.token_ms)
        report.peak_mb = peak_mb()


def _pick(cache: Cache, sampler: Sampler, logits: F32) -> int:
    try:
        return sampler.pick(logits)
    except PenguinError:
        # Whatever is not finite may lie in the cache, too: the next question is to find none of it.
        cache.forget()
        raise
