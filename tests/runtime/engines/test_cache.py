"""What a cache says of its positions, whatever is appended, moved, cut off or fails."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from helpers import picture, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.errors import InputError
from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.core.prefill import extend_to
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.cache import Caches, Key, Visual
from penguin_edge.runtime.session import Session

VISUAL = Visual("picture", 28, 28, 2)
KEY = st.one_of(st.integers(0, 3), st.tuples(st.just(VISUAL), st.integers(0, 1)))
STEP = st.one_of(
    st.tuples(st.just("write"), st.lists(KEY, min_size=1, max_size=5), st.booleans()),
    st.tuples(st.just("move"), st.integers(0, 12), st.integers(1, 6), st.integers(0, 12), st.booleans()),
    st.tuples(st.just("truncate"), st.integers(0, 12)),
    st.tuples(st.just("forget")),
)


class Broken(Exception):
    pass


@given(steps=st.lists(STEP, max_size=20))
def test_a_key_is_where_it_was_written_or_moved_to(steps: list[tuple[Any, ...]]) -> None:
    """Beside a plain list of what each position holds, in which a failed write leaves nothing."""
    cache, held, length = Caches(None, object).new(), [None] * 200, 0
    for what, *how in steps:
        if what == "write":
            keys, fails = how
            end = length + len(keys)
            with suppress(Broken), cache.writing(len(keys), keys):
                held[length:end] = [None] * len(keys)
                if fails:
                    raise Broken
                held[length:end] = keys
                length = end
        elif what == "move":
            begin, count, down, fails = how
            to = max(0, begin - down)
            moved = held[begin : begin + count]
            with suppress(Broken), cache.moving(begin, begin + count, to):
                held[to : to + count] = [None] * count
                if fails:
                    length = min(length, to)
                    raise Broken
                held[to : to + count] = moved
                length = to + count
        elif what == "truncate" and how[0] <= length:
            length = how[0]
            cache.truncate(length)
        elif what == "forget":
            held, length = [None] * 200, 0
            cache.forget()
        assert cache.length == length and cache.keys == held[:length]


def test_truncating_to_what_is_not_there_is_refused() -> None:
    cache = Caches(None, object).new()
    with cache.writing(3, [1, 2, 3]):
        pass
    for wrong in (4, -1, 1.0, True, "1", None):
        with pytest.raises(InputError, match="the cache holds 3; wanted 0 to 3"):
            cache.truncate(wrong)  # type: ignore[arg-type]
    assert cache.keys == [1, 2, 3]


@given(
    first=st.lists(st.integers(3, 9), min_size=1, max_size=30),
    second=st.lists(st.integers(3, 9), min_size=1, max_size=30),
)
def test_a_prompt_is_computed_from_where_it_differs(first: list[Key], second: list[Key]) -> None:
    engine = EagerEngine(tiny_model(), max_seq_len=64)
    cache, fresh = engine.new_cache(), engine.new_cache()

    def rows(keys: Any) -> Any:
        return engine.embed(np.array(keys, np.int64))

    extend_to(engine, cache, first, rows, logits=False)
    assert cache.keys == first
    done = extend_to(engine, cache, second, rows, logits=True)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert cache.keys == second and done.reused == min(same, len(second) - 1)
    wanted = extend_to(engine, fresh, second, rows, logits=True).logits
    # Sums of other chunks, in another order.
    assert np.abs(done.logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_what_failed_half_way_is_never_taken_for_computed() -> None:
    """An engine that fails in the middle of a prompt: the next question computes what it did not."""
    engine = EagerEngine(tiny_model(), max_seq_len=512)
    options = SamplingOptions(max_new_tokens=4)
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    right = [token.id for token in Session(engine, tiny_tokenizer()).converse(messages, options)]
    run = Session(engine, tiny_tokenizer())
    logits = engine.model.decoder.logits  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.model.decoder, "logits", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(run.converse(messages, options))
    assert engine.model.decoder.logits == logits  # type: ignore[union-attr]
    assert run.cache.length == 0 and run.report.finish_reason == "error"
    assert [token.id for token in run.converse(messages, options)] == right
