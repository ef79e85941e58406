"""The two simple policies as plans, and the study as a user runs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers import CountingEngine, picture, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from penguin_edge.commands.eval import asker
from penguin_edge.errors import InputError
from penguin_edge.evaluation.budget_study import (
    SHARES,
    Prune,
    Reply,
    drop_frames,
    policies,
    shrink_frames,
    study,
    within,
)
from penguin_edge.evaluation.score import Question
from penguin_edge.runtime.session import Session
from penguin_edge.tra.clip import DROPPED, KEY, Mode, Plan, Policy, plan_clip, size_ladder

CASES = st.tuples(st.integers(1, 40), st.integers(14, 700), st.integers(14, 700), st.integers(1, 900))


def kept(plan: Plan) -> list[int]:
    return [i for i, frame in enumerate(plan.frames) if frame.kind != DROPPED]


@settings(deadline=None)
@given(CASES, st.sampled_from([drop_frames, shrink_frames]), st.sampled_from([1, 2]))
def test_plans_keep_the_budget_and_fit_the_engine(case: tuple[int, int, int, int], policy: Policy, merge: int) -> None:
    n, height, width, budget = case
    plan = policy([KEY] * n, (height, width), budget, merge)
    factor = 14 * merge
    ladder = size_ladder(height, width, factor)
    assert len(plan.frames) == n and 1 <= plan.total_tokens <= budget and kept(plan)[0] == 0
    sizes = {(frame.height, frame.width) for frame in plan.frames if frame.kind != DROPPED}
    assert len(sizes) == 1 and {(h // factor, w // factor) for h, w in sizes} <= set(ladder)
    assert plan.total_tokens == len(kept(plan)) * (math.prod(sizes.pop()) // factor**2)


@settings(deadline=None)
@given(CASES)
def test_drop_keeps_native_frames_evenly_spaced_and_as_many_as_fit(case: tuple[int, int, int, int]) -> None:
    n, height, width, budget = case
    native = math.prod(size_ladder(height, width, 28)[-1])
    plan = drop_frames([KEY] * n, (height, width), budget, 2)
    places = kept(plan)
    if budget < native:
        assert places == [0]
        return
    assert plan.frames[0].tokens == native and len(places) == min(n, budget // native)
    gaps = np.diff(places)
    assert len(places) == 1 or (places[-1] == n - 1 and gaps.max() - gaps.min() <= 1)


@settings(deadline=None)
@given(CASES)
def test_shrink_keeps_every_frame_and_cannot_be_larger(case: tuple[int, int, int, int]) -> None:
    n, height, width, budget = case
    plan = shrink_frames([KEY] * n, (height, width), budget, 2)
    assert len(kept(plan)) == min(n, budget)
    larger = [t for t in map(math.prod, size_ladder(height, width, 28)) if t > plan.frames[0].tokens]
    assert not larger or n > budget or n * larger[0] > budget


@settings(deadline=None)
@given(CASES)
def test_all_policies_agree_where_everything_fits(case: tuple[int, int, int, int]) -> None:
    n, height, width, _ = case
    known = policies(tiny_model().config)
    plans = [within(policy, 1.0)([KEY] * n, (height, width), 10**9, 2) for policy in known.values()]
    assert len({plan.frames for plan in plans}) == 1 and set(known) == {"tra", "adaptive", "drop", "shrink"}


@pytest.mark.parametrize(("name", "mode"), [("tra", "strict"), ("adaptive", "adaptive")])
def test_tra_is_the_plan_of_the_model(name: str, mode: Mode) -> None:
    config = tiny_model().config
    kinds = [KEY, "intermediate", "intermediate", KEY]
    plan = within(policies(config)[name], 0.25)(kinds, (280, 280), 10**9, 2)
    least = config.image.min_tokens
    assert plan == plan_clip(4, kinds, (280, 280), 100, mode=mode, min_tokens=least, config=config.tra)


# --- the study --------------------------------------------------------------------------------------------------------


def clip(path: Path, seed: int, frames: int = 4, side: int = 140) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for i in range(frames):
            pixels = np.asarray(Image.fromarray(picture(seed + i // 2, side, side)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def about(path: Path, text: str, reference: str, task: str) -> Question:
    content = [{"type": "video", "video": {"video_path": str(path)}}, {"type": "text", "text": text}]
    return Question("r", task, ({"role": "user", "content": content},), text, reference)


def test_every_run_gets_its_share_and_its_own_answer(tmp_path: Path) -> None:
    asked = [about(clip(tmp_path / f"{i}.mp4", 4 * i), f"{i}?", "x", "ab"[i % 2]) for i in range(3)]
    asked.append(Question("r", "text", ({"role": "user", "content": "no clip"},), "no clip", "x"))
    session = Session(CountingEngine(), tiny_tokenizer())
    ask = asker(session)
    seen: list[int] = []

    def noted(messages: Sequence[Any], most: int, policy: Policy) -> Reply:
        reply = ask(messages, most, policy)
        seen.append(reply.tokens)
        return Reply("x" if reply.frames == 4 else "y", reply.tokens, reply.frames)

    result = study(asked, noted, session.config, training={})
    entries = {(entry["policy"], entry["share"]): entry for entry in result["budget_study"]}
    assert len(entries) == 4 * len(SHARES) and len(seen) == 3 * len(entries) and set(result["tasks"]) == {"a", "b"}
    native = 4 * 25
    for (policy, share), entry in entries.items():
        assert 1 <= entry["visual_tokens"] <= max(1, share * native)
        assert entry["frames"] == 4 or policy != "shrink"
        assert entry["accuracy"] == (entry["frames"] == 4) == entry["tasks"]["a"]
        low, high = entry["interval"]
        assert low <= entry["accuracy"] <= high
        wanted = entry["accuracy"] - entries["tra", share]["accuracy"]
        assert entry["over_tra"] == [wanted] * 3  # all questions alike: no spread
        wanted = entry["accuracy"] - entries["drop", share]["accuracy"]
        assert entry["over_drop"] == [wanted] * 3
        row = result["study"][f"{share:g}"]["strict" if policy == "tra" else policy]
        assert row == {"accuracy": entry["accuracy"], "count": 3, "tokens": entry["visual_tokens"]}
    assert {len(row) for row in result["study"].values()} == {4} and len(result["study"]) == len(SHARES)
    assert entries["drop", 0.5]["frames"] == 2 and entries["drop", 1.0]["visual_tokens"] == native


def test_pruning_gets_the_same_share_counted_by_what_is_kept(tmp_path: Path) -> None:
    asked = [about(clip(tmp_path / f"{i}.mp4", 4 * i), f"{i}?", "x", "ab"[i % 2]) for i in range(2)]
    session = Session(CountingEngine(), tiny_tokenizer())
    pruning = Session(CountingEngine(), tiny_tokenizer(), keep_visual=0.25)
    prune = Prune(0.25, asker(pruning, afresh=True))
    result = study(asked, asker(session), session.config, training={}, prune=prune)
    entries = {(entry["policy"], entry["share"]): entry for entry in result["budget_study"]}
    assert len(entries) == 5 * len(SHARES) and result["keep_visual"] == 0.25
    for (policy, share), entry in entries.items():
        assert entry["visual_tokens"] <= max(1, share * 100)
        assert entry["encoded_tokens"] == entry["visual_tokens"] or policy == "prune"
        assert len(entry["over_adaptive"]) == 3
    # Frames of 25 tokens, of which 6 are kept: at a quarter all are encoded at native size.
    assert entries["prune", 0.25]["visual_tokens"] == 24 and entries["prune", 0.25]["encoded_tokens"] == 100
    assert entries["prune", 1.0]["visual_tokens"] == 24
    for row in result["study"].values():
        assert set(row) == {"strict", "adaptive", "drop", "shrink", "prune"}
        assert len(row["prune"]["over_adaptive"]) == 3 and "over_adaptive" not in row["adaptive"]


def test_without_clips_there_is_nothing_to_study() -> None:
    asked = [Question("r", "text", ({"role": "user", "content": "no clip"},), "no clip", "x")]
    with pytest.raises(InputError, match="questions about clips"):
        study(asked, lambda *_: Reply("", 0, 0), tiny_model().config)


def cli(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", "eval", "tiny", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_verb_draws_and_prints_a_study(tmp_path: Path) -> None:
    clip(tmp_path / "0.mp4", 0)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(i), "video": ["0.mp4"], "conversations": turns, "task": "ab"[i]} for i in range(2)]
    (tmp_path / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "study.png"
    done = cli("--data", tmp_path, "--budget-study", "--json", "-o", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(result["budget_study"]) == 20 and set(result["tasks"]) == {"a", "b"} and "average" in result
    assert list(result["study"]) == ["1", "0.5", "0.25", "0.125", "0.0625"]
    assert all(set(row) == {"strict", "adaptive", "drop", "shrink"} for row in result["study"].values())
    with Image.open(out) as image:
        assert image.width > 900
    done = cli("--data", tmp_path, "--budget-study", "--limit", 1)
    assert done.returncode == 0 and "over TRA" in done.stdout, done.stderr
    done = cli("--data", tmp_path, "--budget-study", "--limit", 1, "--keep-visual", 0.5)
    assert done.returncode == 0 and "prune" in done.stdout and "over adaptive" in done.stdout, done.stderr
    for flags, says in ((["-o", out], "--budget-study"), (["--budget-study", "--tra", "reference"], "reference")):
        done = cli("--data", tmp_path, *flags)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
