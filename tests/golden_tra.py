"""TRA against arrays recorded from the reference: every case is found in the files, none is written down here."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from golden_set import GOLDEN, MEDIA, TABLES

from penguin_edge.config import PATCH
from penguin_edge.media.frames import read_video, read_video_by_number
from penguin_edge.tra.clip import INTERMEDIATE, KEY, Plan, plan_clip
from penguin_edge.tra.keyframes import KeyFrameDetector, compare_size, similarity

KINDS = (KEY, INTERMEDIATE)
LOADERS = {"load_video": read_video, "load_video_from_ids": read_video_by_number}
DECODE_CASES = TABLES.get("video_decode", {}).get("cases", {})
REAL = TABLES.get("video_real_preprocess", {})
DECODER_SLACK = 0.01
"""Decoders differ by one or two grey levels, which moves single patches; the tables round to 1e-6."""


def _loader(name: str) -> Any:
    """A recorded call, `loader {json arguments}`, as a function of the path; the reference's own default is 768."""
    loader, _, arguments = name.partition(" ")
    given = {key.removesuffix("_time"): value for key, value in json.loads(arguments or "{}").items()}
    return lambda path: LOADERS[loader](path, **{"fps": None, "max_frames": 768, **given})


def _detect(frames: Any) -> tuple[list[int], list[float | None], list[int]]:
    """Frame types, similarities and the frame each was compared with."""
    detector = KeyFrameDetector("exact")
    types: list[int] = []
    similarities: list[float | None] = []
    compared: list[int] = []
    last = 0
    for i, pixels in enumerate(frames):
        detection = detector.push(pixels)
        types.append(KINDS.index(detection.kind))
        similarities.append(detection.similarity)
        compared.append(last)
        last = i if detection.kind == KEY else last
    return types, similarities, compared


def _grids(plan: Plan) -> list[list[int]]:
    return [[1, frame.height // PATCH, frame.width // PATCH] for frame in plan.frames]


@pytest.mark.parametrize("row", TABLES.get("tra_compare_resize", []), ids=lambda r: f"{r['height']}x{r['width']}")
def test_comparison_size(row: dict[str, Any]) -> None:
    assert list(compare_size(row["height"], row["width"])) == row["out"]


@pytest.mark.parametrize("name", TABLES.get("tra_classification", {}).get("cases", {}))
def test_frame_types_and_similarities(name: str) -> None:
    case = TABLES["tra_classification"]["cases"][name]
    with np.load(GOLDEN / "tra_videos.npz") as videos:
        clip = videos[name]
    types, similarities, compared = _detect(clip)
    assert types == case["frame_types"]
    assert compared == case["compared_with"]
    assert list(compare_size(*clip.shape[1:3])) == case["compare_hw"]
    for got, wanted in zip(similarities, case["similarity_to_last_key"], strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or math.isclose(got, wanted, abs_tol=1e-6)


def _probes() -> int:
    path = GOLDEN / "tra_sim_probes.npz"
    if not path.exists():
        return 0
    with np.load(path) as probes:
        return len(probes["sim"])


@pytest.mark.parametrize("i", range(_probes()))
def test_similarity_of_frame_pairs(i: int) -> None:
    with np.load(GOLDEN / "tra_sim_probes.npz") as probes:
        a, b = (probes[f"{side}{i}"].transpose(1, 2, 0) for side in "ab")
        wanted = float(probes["sim"][i])
    assert similarity(a, b) == pytest.approx(wanted, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("row", TABLES.get("tra_budget", []))
def test_budget_table(row: dict[str, Any]) -> None:
    n, listed = row["n_frames"], row["key_indices"]
    keys = set(listed) if isinstance(listed, list) else set(range(row["n_key"]))
    plan = plan_clip(
        n,
        [KEY if i in keys else INTERMEDIATE for i in range(n)],
        (row["height"], row["width"]),
        row["max_tokens"],
        mode="reference",
        min_tokens=row["min_tokens"],
        merge_size=row["merge_size"],
    )
    for kind, name in zip(KINDS, ("key", "intermediate"), strict=True):
        found = {(frame.height, frame.width, frame.tokens) for frame in plan.frames if frame.kind == kind}
        recorded = row[f"{name}_hw"]
        assert found == ({(*recorded, row[f"{name}_tokens"])} if recorded else set())
    assert plan.total_tokens == row["total_tokens"]
    assert plan.over_budget == row["over_budget"]
    if row["tokens_per_frame"] is not None:  # long clips are recorded by their totals only
        assert [frame.tokens for frame in plan.frames] == row["tokens_per_frame"]


def _reference_plan(row: dict[str, Any], size: tuple[int, int]) -> Plan:
    return plan_clip(
        len(row["frame_types"]),
        [KINDS[i] for i in row["frame_types"]],
        size,
        row["max_tokens"],
        mode="reference",
        min_tokens=row["min_tokens"],
        merge_size=row["merge_size"],
    )


@pytest.mark.parametrize("name", TABLES.get("video_preprocess", {}))
def test_grids_of_synthetic_clips(name: str) -> None:
    row = TABLES["video_preprocess"][name]
    with np.load(GOLDEN / "tra_videos.npz") as videos:
        _, height, width, _ = videos[row["video"]].shape
    plan = _reference_plan(row, (height, width))
    assert _grids(plan) == row["grid_sizes"]
    assert [frame.tokens for frame in plan.frames] == row["llm_tokens"]
    assert plan.total_tokens == row["total_llm_tokens"]


@pytest.mark.parametrize("row", REAL.get("cases", []), ids=lambda row: str(row["max_tokens"]))
def test_grids_and_frame_types_of_a_real_clip(row: dict[str, Any]) -> None:
    frames = [frame.pixels for frame in read_video(MEDIA / TABLES["video_decode"]["file"], **REAL["load_args"])]
    assert _detect(frames)[0] == row["frame_types"]
    plan = _reference_plan(row, frames[0].shape[:2])
    assert _grids(plan) == row["grid_sizes"]
    assert [frame.tokens for frame in plan.frames] == row["llm_tokens"]
    assert plan.total_tokens == row["total"]


@pytest.mark.parametrize("name", [name for name in DECODE_CASES if name.partition(" ")[0] in LOADERS])
def test_frame_types_of_decoded_clips(name: str) -> None:
    case = DECODE_CASES[name]
    frames = [frame.pixels for frame in _loader(name)(MEDIA / TABLES["video_decode"]["file"])]
    types, similarities, compared = _detect(frames)
    assert types == case["frame_types"]
    assert compared == case["compared_with"]
    assert list(compare_size(*frames[0].shape[:2])) == case["compare_hw"]
    for got, wanted in zip(similarities, case["similarity_to_last_key"], strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or math.isclose(got, wanted, abs_tol=DECODER_SLACK)
