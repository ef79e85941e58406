"""A cache that follows a prompt by moving frames: slots, positions and keys are those of the prompt computed anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from helpers import Alone, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from penguin_edge.model.eager import EagerEngine
from penguin_edge.runtime.core.ledger import blocks, last_frame, rebase, to_last_frame
from penguin_edge.runtime.core.report import Clock
from penguin_edge.runtime.engines.base import F32
from penguin_edge.runtime.engines.cache import Key, Visual, positions_of

SHOWN = [Visual("a", 56, 84, 2), Visual("a", 84, 84, 2), Visual("b", 56, 84, 2), Visual("c", 28, 28, 2)]
FRAME = st.tuples(
    st.lists(st.integers(0, 2), max_size=2),
    st.sampled_from(SHOWN),
    st.sampled_from([0, 1, 2]),
)
"""Text before it, what it shows, and which tokens of it are kept."""


def keys_of(frames: Sequence[tuple[list[int], Visual, int]]) -> list[Key]:
    keys: list[Key] = [7]
    for text, visual, choice in frames:
        keys += text
        kept = np.random.default_rng([choice, visual.tokens]).permutation(visual.tokens)[: 1 + visual.tokens // 3]
        keys += [(visual, int(i)) for i in (range(visual.tokens) if choice == 0 else sorted(kept))]
    return keys


def embeds(keys: Sequence[Key]) -> F32:
    """Rows that tell keys apart."""
    width = tiny_model().config.text.hidden_size
    seeds = [[0, key] if isinstance(key, int) else [1, SHOWN.index(key[0]), key[1]] for key in keys]
    return np.array([np.random.default_rng(seed).standard_normal(width) for seed in seeds], np.float32)


@settings(deadline=None, max_examples=60)
@given(before=st.lists(FRAME, min_size=1, max_size=5), after=st.lists(FRAME, min_size=1, max_size=2), data=st.data())
def test_a_moved_cache_is_in_step(
    before: list[tuple[list[int], Visual, int]], after: list[tuple[list[int], Visual, int]], data: st.DataObject
) -> None:
    """Frames go, change their size or what is kept of them, and new ones come."""
    stays = data.draw(st.lists(st.sampled_from(["stays", "goes", "changes"]), min_size=len(before)))
    now = []
    for frame, what in zip(before, stays, strict=False):
        if what != "goes":
            now.append(frame if what == "stays" else (frame[0], SHOWN[1], 1))
    engine = EagerEngine(tiny_model(), max_seq_len=256)
    cache = engine.new_cache()
    for frames in (before, [*now, *after], after):
        keys = keys_of(frames)
        done = rebase(engine, cache, keys, embeds, Clock())
        assert cache.keys == keys and cache.positions == positions_of(keys)
        assert done.computed + done.moved <= len(keys)
        fresh = Alone(EagerEngine(tiny_model(), max_seq_len=256))
        fresh.forward(embeds(keys), np.empty(0, np.int64), np.array(positions_of(keys)))
        # The first layer sees nothing of what stands before.
        for name in ("keys", "values"):
            states = (engine._caches.state(cache), fresh.state)
            got, wanted = (getattr(state, name)[0][:, :, : len(keys)] for state in states)
            assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_a_frame_turns_where_the_one_before_it_changes_though_no_slot_does() -> None:
    """As many tokens are kept of a smaller frame: what follows keeps its slots and gets other positions."""
    small, large, other = Visual("a", 56, 56, 2), Visual("a", 84, 84, 2), Visual("b", 28, 56, 2)
    before: list[Key] = [1, (large, 0), (large, 8), 2, (other, 0), (other, 1)]
    after: list[Key] = [1, (small, 1), (small, 3), 2, (other, 0), (other, 1)]
    engine = EagerEngine(tiny_model(), max_seq_len=64)
    cache = engine.new_cache()

    def rows(keys: Sequence[Key]) -> F32:
        return engine.embed(np.arange(len(keys)) + 5)

    rebase(engine, cache, before, rows, Clock())
    done = rebase(engine, cache, after, rows, Clock())
    assert (done.computed, done.moved) == (3, 3) and cache.keys == after
    assert cache.positions == positions_of(after) == [0, 2, 4, 5, 6, 7]


def test_frames_are_told_apart_by_what_is_kept_of_them() -> None:
    visual = Visual("a", 56, 84, 2)
    one: list[Key] = [1, 2, (visual, 0), (visual, 4)]
    other: list[Key] = [1, 2, (visual, 0), (visual, 5)]
    assert blocks(one)[0][1] == blocks(other)[0][1] == (0, 4)
    assert blocks(one)[0][0] != blocks(other)[0][0] == blocks([*other, 3, 3])[0][0]
    # The same frame twice, one after the other; a frame that was cut off; a slot that nobody knows.
    assert [slots for _, slots in blocks([*one, (visual, 0), (visual, 4)])] == [(0, 4), (4, 6)]
    assert blocks(one[:3])[0][0] != blocks(one)[0][0]
    assert len(blocks([(visual, 0), None, (visual, 4)])) == 2
    assert last_frame(one) == 4 and to_last_frame([*one, 3]) == one
