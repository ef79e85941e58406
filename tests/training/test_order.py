"""The order of samples and the length index: invariants. The recorded order is in golden_schedule.py."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.errors import InputError
from penguin_edge.training.feed import Run, steps_of
from penguin_edge.training.order import UNUSABLE, LengthIndex, Order, build_index, index_path, read_index, write_index

SETTINGS = {"model_max_length": 100, "tokenizer": "abc"}


@st.composite
def orders(draw: st.DrawFn) -> Order:
    world, accumulate = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(1, 50), min_size=sum(sizes), max_size=sum(sizes))))
    if sum(sizes) < world * accumulate:
        sizes[0] += world * accumulate
        lengths = None
    return Order(
        tuple(sizes),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 2**40)),
        (),
        world,
        accumulate,
        None if lengths is None else tuple(lengths),
        draw(st.sampled_from([0.0, 0.1])),
    )


@given(order=orders(), epoch=st.integers(0, 5))
def test_an_epoch_is_every_sample_once_in_micro_batches_that_are_never_empty(order: Order, epoch: int) -> None:
    steps = order.steps(epoch)
    assert len(steps) == order.steps_per_epoch
    parts = [p for step in steps for rank in range(order.world_size) for p in order.micro_batches(step, rank)]
    assert sorted(itertools.chain(*parts)) == list(range(sum(order.sizes)))
    assert all(parts)
    assert len(parts) == len(steps) * order.world_size * order.accumulate
    # A rest too small for every micro-batch joins the step before it, one sample per micro-batch at most.
    assert max(map(len, parts)) <= order.batch_size + 1


@given(order=orders(), begin=st.integers(0, 30), more=st.integers(1, 30))
def test_any_step_can_be_resumed_from(order: Order, begin: int, more: int) -> None:
    end = begin + more
    assert list(steps_of(order, begin, end)) == list(steps_of(order, 0, end))[begin:]
    for rank in range(order.world_size):
        whole = list(Run(order, rank, 0, end))
        assert list(Run(order, rank, begin, end)) == whole[begin * order.accumulate :]
        assert len(Run(order, rank, begin, end)) == more * order.accumulate


def test_epochs_differ_and_seeds_differ() -> None:
    order, other = Order((50,), 4, seed=1), Order((50,), 4, seed=2)
    assert order.steps(0) == order.steps(0)
    assert order.steps(0) != order.steps(1)
    assert order.steps(0) != other.steps(0)


def test_grouping_brings_like_lengths_together_and_mixes_neighbours() -> None:
    lengths = tuple((i * 7919) % 997 + 100 for i in range(600))
    order = Order((600,), 10, seed=3, lengths=lengths)

    def spread(steps: list[list[int]]) -> float:
        ranges = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
        return sum(ranges) / len(ranges)

    grouped, mixed = order.steps(0), Order((600,), 10, seed=3).steps(0)
    # 600 lengths over 1000: a step of ten neighbours spans about 17, with the noise of a tenth about 120.
    assert spread(grouped) < 200 < 700 < spread(mixed)
    partners = [{frozenset(step) for step in order.steps(epoch)} for epoch in (0, 1)]
    assert not partners[0] & partners[1]
    still = Order((600,), 10, seed=3, lengths=tuple(range(600)), jitter=0)
    assert {frozenset(step) for step in still.steps(0)} == {frozenset(range(i, i + 10)) for i in range(0, 600, 10)}


def test_unusable_records_keep_their_place_and_are_never_drawn() -> None:
    lengths = [5] * 20
    lengths[3] = lengths[17] = UNUSABLE
    order = Order((20,), 4, seed=0, lengths=tuple(lengths))
    assert sorted(itertools.chain(*order.steps(0))) == [i for i in range(20) if i not in (3, 17)]


@pytest.mark.parametrize("grouped", [False, True])
def test_weights_say_how_often_a_file_comes_per_epoch(grouped: bool) -> None:
    lengths = tuple(range(1, 41)) if grouped else None
    order = Order((10, 10, 20), 7, seed=5, weights=(1.0, 2.5, 0.5), lengths=lengths)
    for epoch in range(3):
        drawn = Counter(itertools.chain(*order.steps(epoch)))
        assert [drawn[i] for i in range(10)] == [1] * 10
        assert sorted(drawn[i] for i in range(10, 20)) == [2] * 5 + [3] * 5
        assert sorted(drawn[i] for i in range(20, 40)) == [0] * 10 + [1] * 10
        assert sum(drawn.values()) == order.samples_per_epoch
    halves = [{i for step in order.steps(e) for i in step if i >= 20} for e in range(3)]
    assert halves[0] != halves[1]


def test_orders_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="cannot fill 8 micro-batches"):
        Order((7,), 2, 0, (), 4, 2)
    with pytest.raises(InputError, match="wanted numbers above 0"):
        Order((7,), 2, 0, (0.0,))
    with pytest.raises(InputError, match="2 weights for 1 files"):
        Order((7,), 2, 0, (1.0, 1.0))


def test_an_index_is_used_only_for_the_file_and_the_settings_it_was_made_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n3\n")
    index = build_index([7, "2: no such file", 9])
    assert index == LengthIndex((7, UNUSABLE, 9), {1: "2: no such file"})
    assert write_index(path, index, SETTINGS)
    assert read_index(path, 3, SETTINGS) == index
    assert read_index(path, 4, SETTINGS) is None
    assert read_index(path, 3, {**SETTINGS, "tokenizer": "abd"}) is None
    path.write_text("1\n2\n4\n")
    assert read_index(path, 3, SETTINGS) is None
    path.write_text("1\n2\n3\n")
    assert read_index(path, 3, SETTINGS) == index
    stored = index_path(path).read_text()
    one_digit = stored.replace("[7,", "[8,")
    assert one_digit != stored
    for damaged in (stored[:-5], "[]", "{}", one_digit, json.dumps({**json.loads(stored), "lengths": [1, 2, "x"]})):
        index_path(path).write_text(damaged)
        assert read_index(path, 3, SETTINGS) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.lengths.json"]


def test_a_folder_that_cannot_be_written_costs_the_index_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n")
    index_path(path).mkdir()  # even root cannot rename a file over a folder
    assert not write_index(path, build_index([1]), SETTINGS)
    assert read_index(path, 1, SETTINGS) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.lengths.json"]
