"""The streaming planner: limits hold after every frame, whatever comes, and little is encoded again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penguin_edge.errors import BudgetError, InputError
from penguin_edge.tra.clip import INTERMEDIATE, KEY, plan_clip, size_ladder
from penguin_edge.tra.keeping import kept_tokens
from penguin_edge.tra.stream import KEYS, STREAM_MODES, Change, Limits, StreamMode, StreamPlanner, rungs

SIDES = st.one_of(st.integers(1, 200), st.integers(28, 2160))
LIMITS = st.builds(
    Limits,
    budget=st.one_of(st.integers(1, 60), st.integers(1, 20_000)),
    room=st.one_of(st.none(), st.integers(20, 30_000)),
    window_s=st.sampled_from([0.5, 10.0, 60.0]),
    max_frames=st.sampled_from([1, 2, 180]),
    reach=st.one_of(st.none(), st.integers(20, 60_000)),
)


class Planning(RuleBasedStateMachine):
    """Frames of any kind and size, pauses, and other limits, beside a ledger that only believes the changes."""

    @initialize(
        limits=LIMITS,
        tag=st.integers(0, 11),
        least=st.sampled_from([1, 16]),
        mode=st.sampled_from(STREAM_MODES),
        keep=st.sampled_from([None, 1.0, 0.5, 0.07]),
    )
    def begin(self, limits: Limits, tag: int, least: int, mode: StreamMode, keep: float | None) -> None:
        self.planner = StreamPlanner(limits, mode=mode, tag_tokens=tag, min_tokens=least, keep=keep)
        self.keep = keep
        self.time, self.next = 0.0, 0
        self.ledger: dict[int, int] = {}
        self.times: dict[int, float] = {}
        self.size = (480, 640)

    def apply(self, changes: list[Change]) -> None:
        for change in changes:
            assert self.ledger[change.frame] == change.before, change
            assert change.tokens < change.before or (change.tokens == change.before and self.keep is not None)
            self.ledger[change.frame] = change.tokens
            if not change.tokens:
                del self.ledger[change.frame]

    @rule(key=st.booleans(), pause=st.sampled_from([0.0, 0.1, 1.0, 61.0]), many=st.integers(1, 30))
    def push(self, key: bool, pause: float, many: int) -> None:
        self.time += pause
        for _ in range(many):
            kinds = dict(zip(self.planner.numbers, (f.kind for f in self.planner.plan().frames), strict=True))
            changes = self.planner.push(KEY if key else INTERMEDIATE, self.size, self.time)
            self.next += 1
            frames = dict(zip(self.planner.numbers, self.planner.plan().frames, strict=True))
            newest = frames[self.next - 1]  # What is seen now is never left out.
            for change in changes:
                if change.reason in ("window", "full"):
                    del kinds[change.frame]
            # Where no key frame was left, this one is key.
            assert newest.kind == KEY or KEY in kinds.values()
            self.ledger[self.next - 1] = newest.tokens
            self.times[self.next - 1] = self.time
            self.apply(changes)

    @rule(height=SIDES, width=SIDES)
    def another_size(self, height: int, width: int) -> None:
        self.size = (height, width)

    @rule(limits=LIMITS)
    def other_limits(self, limits: Limits) -> None:
        self.apply(self.planner.set_limits(limits))

    @rule()
    def clear(self) -> None:
        self.planner.clear()
        self.ledger.clear()

    @invariant()
    def the_limits_hold(self) -> None:
        if not hasattr(self, "planner"):
            return
        plan, limits = self.planner.plan(), self.planner.limits
        assert self.ledger == dict(zip(self.planner.numbers, (f.tokens for f in plan.frames), strict=True))
        assert plan.total_tokens == self.planner.total_tokens <= limits.budget
        assert len(plan.frames) <= limits.max_frames
        encoded = [(frame.height // plan.factor) * (frame.width // plan.factor) for frame in plan.frames]
        assert [frame.tokens for frame in plan.frames] == [kept_tokens(count, self.keep) for count in encoded]
        assert self.planner.encoded_tokens == sum(encoded)
        if limits.reach is not None:
            assert sum(encoded) + self.planner.tag_tokens * len(encoded) <= limits.reach
        if limits.room is not None:
            assert plan.total_tokens + self.planner.tag_tokens * len(plan.frames) <= limits.room
        kept = [self.times[number] for number in self.planner.numbers]
        assert kept == sorted(kept) and list(self.planner.numbers) == sorted(self.planner.numbers)


TestPlanning = Planning.TestCase
TestPlanning.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@given(data=st.data(), n=st.integers(1, 40), mode=st.sampled_from(STREAM_MODES))
def test_what_fits_natively_is_planned_as_a_clip(data: st.DataObject, n: int, mode: StreamMode) -> None:
    kinds = data.draw(st.lists(st.sampled_from([KEY, INTERMEDIATE]), min_size=n, max_size=n))
    size = data.draw(st.tuples(SIDES, SIDES))
    rows, columns = size_ladder(*size, 28)[-1]
    budget = n * rows * columns + data.draw(st.integers(0, 100))
    planner = StreamPlanner(Limits(budget), mode=mode)
    assert not any(planner.push(kind, size, float(i)) for i, kind in enumerate(kinds))
    assert planner.plan().frames == plan_clip(n, kinds, size, budget, mode=mode).frames


@settings(deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 150),
    budget=st.one_of(st.integers(1, 600), st.integers(1, 20_000)),
    least=st.sampled_from([1, 16]),
)
def test_adaptive_key_frames_stay_legible_or_a_fourth_of_the_limit(
    data: st.DataObject, n: int, budget: int, least: int
) -> None:
    size = data.draw(st.tuples(SIDES, SIDES))
    kinds = data.draw(st.lists(st.sampled_from([KEY, INTERMEDIATE, INTERMEDIATE]), min_size=n, max_size=n))
    planner = StreamPlanner(Limits(budget), mode="adaptive", min_tokens=least)
    tokens = [rows * columns for rows, columns in size_ladder(*size, 28)]
    floor = next((t for t in tokens if t >= 1.5 * least), tokens[-1])
    legible = next(t for t in tokens if t >= min(25 * least, 2 / 3 * tokens[-1]))
    wanted = max([floor, *(t for t in tokens if t <= min(legible, budget // 4))])
    pushed = 0
    for i, kind in enumerate(kinds):
        planner.push(kind, size, float(i))
        frames = planner.plan().frames
        pushed += frames[-1].kind == KEY
        if len(frames) > 1:
            assert all(frame.tokens >= (wanted if frame.kind == KEY else floor) for frame in frames)
        if KEYS * floor <= budget:
            assert sum(frame.kind == KEY for frame in frames) >= min(pushed, KEYS - 2), "the past is not lost"


def test_levels_of_key_frames_end_where_they_are_legible() -> None:
    """Rungs 0 to 5 of 168 by 168 pixels have 1, 4, 9, 16, 25 and 36 tokens."""
    assert rungs((168, 168), 28, 1.5, 16) == ((5, 5), (5, 1), (2, 1), (1, 1))
    assert rungs((168, 168), 28, 1.5, 16, 25, 1000) == ((5, 5), (5, 1), (4, 1))
    assert rungs((168, 168), 28, 1.5, 16, 25, 18) == ((5, 5), (5, 1), (3, 1))
    assert rungs((168, 168), 28, 1.5, 16, 25, 3) == rungs((168, 168), 28, 1.5, 16)


def test_other_limits_are_another_least_size() -> None:
    wide = Limits(300, window_s=20.0)
    planner = StreamPlanner(wide, mode="adaptive", min_tokens=1)
    for i in range(30):
        planner.push(KEY, (168, 168), float(i))
    assert {frame.tokens for frame in planner.plan().frames} <= {25, 36}
    changes = planner.set_limits(replace(wide, budget=72))
    kept = [frame.tokens for frame in planner.plan().frames]
    # 18 tokens are a fourth now: four frames of 16 stay, where two of 25 would.
    assert len(kept) == 4 and set(kept) == {16} and any(0 < change.tokens < change.before for change in changes)
    planner.set_limits(wide)
    for i in range(30, 60):
        planner.push(KEY, (168, 168), float(i))
    assert {frame.tokens for frame in planner.plan().frames} <= {25, 36}


@pytest.mark.parametrize("mode", STREAM_MODES)
@pytest.mark.parametrize("window_s", [1.0, 86_400.0])
@pytest.mark.parametrize("budget", [1, 300])
def test_a_second_and_a_day(mode: StreamMode, window_s: float, budget: int) -> None:
    planner = StreamPlanner(Limits(budget, window_s=window_s), mode=mode)
    random = np.random.default_rng(0)
    times = np.cumsum(random.exponential(100.0 if window_s > 1 else 0.2, 900))
    for time in times:
        planner.push(KEY if random.random() < 0.1 else INTERMEDIATE, (480, 640), float(time))
        assert planner.total_tokens <= budget and planner.numbers
        assert time - times[planner.numbers[0]] <= window_s
    assert len(planner.numbers) == 1 if budget == 1 else len(planner.numbers) > 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="known: adaptive, strict"):
        StreamPlanner(Limits(100), mode="reference")  # type: ignore[arg-type]


def test_what_labels_save_is_told() -> None:
    planner = StreamPlanner(Limits(2000))
    assert planner.saved_share == 0
    planner.push(KEY, (280, 280), 0.0)
    assert planner.saved_share == 0 and planner.total_tokens == 100
    for i in range(1, 30):
        planner.push(INTERMEDIATE, (280, 280), float(i))
    keys = [frame.tokens for frame in planner.plan().frames if frame.kind == KEY]
    assert planner.saved_share == pytest.approx(1 - planner.total_tokens / (30 * keys[0]))
    assert 0.2 < planner.saved_share < 1


def clip(seed: int, seconds: int, fps: float) -> list[tuple[str, float]]:
    """Shots of random length, some of them busy."""
    random = np.random.default_rng(seed)
    frames, until, busy = [], 0.0, 0.0
    for i in range(int(seconds * fps)):
        if i / fps >= until:
            until, busy = i / fps + random.exponential(8), random.choice([0.0, 0.02, 0.3, 1.0])
            kind = KEY
        else:
            kind = KEY if random.random() < busy else INTERMEDIATE
        frames.append((kind, i / fps))
    return frames


def run(frames: list[tuple[str, float]], size: tuple[int, int], budget: int, mode: StreamMode) -> dict[str, Any]:
    planner = StreamPlanner(Limits(budget), mode=mode)
    again, used, wanted = 0, [], []
    labels: dict[int, str] = {}
    for i, (kind, time) in enumerate(frames):
        labels[i] = kind
        again += sum(change.tokens > 0 for change in planner.push(kind, size, time))
        if i % 7 == 0:
            window = [kind for kind, t in frames[: i + 1] if time - t <= 60.0][-180:]
            used.append(planner.total_tokens)
            wanted.append(plan_clip(len(window), window, size, budget, mode=mode).total_tokens)
    return {"again": again / len(frames), "filled": float(np.mean(np.array(used) / np.array(wanted)))}


@pytest.mark.parametrize("mode", STREAM_MODES)
@pytest.mark.parametrize("size", [(120, 160), (480, 640), (720, 1280), (1080, 1920)])
@pytest.mark.parametrize("budget", [300, 2048, 16_384])
def test_few_frames_are_encoded_again_and_the_budget_is_used(
    size: tuple[int, int], budget: int, mode: StreamMode
) -> None:
    found = [run(clip(seed, 150, fps), size, budget, mode) for seed, fps in enumerate((0.5, 1.0, 2.0, 3.0))]
    assert max(one["again"] for one in found) <= 1.5
    # Against the plan of the same window as one clip, which sees the future and sizes all frames anew each time.
    assert float(np.mean([one["filled"] for one in found])) >= 0.7, found


def test_the_oldest_step_down_first_and_new_ones_rise_again() -> None:
    planner = StreamPlanner(Limits(2000, window_s=30.0))
    for i in range(30):
        planner.push(KEY, (480, 640), float(i))
    busy = planner.level
    tokens = [frame.tokens for frame in planner.plan().frames]
    assert busy > 1 and tokens == sorted(tokens)
    for i in range(30, 120):
        planner.push(INTERMEDIATE, (480, 640), float(i))
    assert planner.level < busy
    kinds = [frame.kind for frame in planner.plan().frames]
    assert kinds.count(KEY) == 1  # The first one after the last key frame had left.


def test_bad_frames_and_limits_are_refused() -> None:
    planner = StreamPlanner(Limits(100))
    planner.push(KEY, (480, 640), 5.0)
    with pytest.raises(InputError, match="must not go back"):
        planner.push(KEY, (480, 640), 4.0)
    with pytest.raises(InputError, match="unknown kind"):
        planner.push("loud", (480, 640), 6.0)
    with pytest.raises(InputError, match="wanted at least one"):
        planner.push(KEY, (0, 640), 6.0)
    assert planner.numbers == (0,)
    for wrong in ({"budget": 0}, {"budget": 5, "room": 0}):
        with pytest.raises(BudgetError):
            Limits(**wrong)
    with pytest.raises(InputError, match="more than nothing"):
        Limits(5, window_s=0.0)
    with pytest.raises(BudgetError, match="a time stamp alone takes 11"):
        StreamPlanner(Limits(100, room=11), tag_tokens=11)
    with pytest.raises(BudgetError, match="shorten"):
        StreamPlanner(Limits(100), tag_tokens=11).set_limits(replace(planner.limits, room=5))


@settings(deadline=None)
@given(data=st.data(), n=st.integers(1, 60), mode=st.sampled_from(STREAM_MODES), budget=st.integers(1, 900))
def test_keeping_all_is_the_plan_without_a_share(data: st.DataObject, n: int, mode: StreamMode, budget: int) -> None:
    kinds = data.draw(st.lists(st.sampled_from([KEY, INTERMEDIATE]), min_size=n, max_size=n))
    one, other = (StreamPlanner(Limits(budget), mode=mode, keep=keep) for keep in (None, 1.0))
    for i, kind in enumerate(kinds):
        assert one.push(kind, (168, 224), float(i)) == other.push(kind, (168, 224), float(i))
    assert one.plan() == other.plan()


def test_a_frame_that_is_encoded_smaller_is_told_of_though_as_much_is_kept() -> None:
    planner = StreamPlanner(Limits(6, reach=60), mode="strict", min_tokens=1, keep=0.05)
    for i in range(5):
        before = dict(zip(planner.numbers, planner.plan().frames, strict=True))
        changes = planner.push(KEY, (168, 168), float(i))
        after = dict(zip(planner.numbers, planner.plan().frames, strict=True))
        resized = {number for number, frame in before.items() if number in after and after[number] != frame}
        assert resized == {change.frame for change in changes if change.tokens}
    assert any(change.tokens == change.before for change in planner.set_limits(Limits(6, reach=20)))
