"""Parity of pixels, sizes, positions and decoding with arrays recorded from the reference.

Every case is discovered from the files of the set; what a set lacks gives no case.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_set import GOLDEN, MEDIA, TABLES
from PIL import Image

from penguin_edge.config import PATCH, ImageConfig
from penguin_edge.media.frames import read_image, read_video, read_video_by_number, sample_numbers
from penguin_edge.media.preprocess import image_size, image_sizes, positions, preprocess_image

EXACT_PIXELS = 1e-5
"""Float32 rounding; the resampler is the recorded one."""
GREY_LEVEL = 1 / 255 / 0.5
"""One 8-bit step after normalisation. JPEG and video decoders may differ by one or two of them."""


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of one recorded file, empty when the set lacks it."""
    path = GOLDEN / name
    if not path.exists():
        return {}
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    with np.load(path) as data:
        return {key: data[key] for key in data.files}


def image_config() -> ImageConfig:
    recorded = TABLES.get("image_preprocess", {})
    default = ImageConfig()
    return ImageConfig(
        image_mean=tuple(recorded.get("mean", default.image_mean)),
        image_std=tuple(recorded.get("std", default.image_std)),
    )


def is_picture(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (OSError, ValueError):
        return False


def image_cases() -> list[Any]:
    cases = TABLES.get("image_preprocess", {}).get("cases", [])
    known = [c for c in cases if c["image"] in arrays("image_inputs.npz") or is_picture(MEDIA / c["image"])]
    return [pytest.param(c, id=f"{c['image']}|{c['min_tokens']}|{c['max_tokens']}|{c['merge_size']}") for c in known]


@pytest.mark.parametrize("case", image_cases())
def test_image_preprocess(case: dict[str, Any]) -> None:
    inputs = arrays("image_inputs.npz")
    name = case["image"]
    frame = read_image(inputs[name] if name in inputs else MEDIA / name)
    lossy = name not in inputs and Image.open(MEDIA / name).format == "JPEG"
    height, width = frame.pixels.shape[:2]
    assert (height, width) == (case["height"], case["width"])
    limits = {"min_tokens": case["min_tokens"], "max_tokens": case["max_tokens"]}
    size = image_size(height, width, image_config(), case["merge_size"], **limits)
    assert list(size) == case["target_hw"]
    patches = preprocess_image(frame, image_config(), case["merge_size"], size)
    assert [[1, *patches.grid]] == case["grid_sizes"] and len(patches.pixels) == case["n_patches"]
    tolerance = GREY_LEVEL if lossy else EXACT_PIXELS
    assert patches.pixels.mean(dtype=np.float64) == pytest.approx(case["mean"], abs=tolerance)
    assert patches.pixels.std(dtype=np.float64, ddof=1) == pytest.approx(case["std"], abs=tolerance)
    if case.get("sample_values") is not None:
        got = patches.pixels.reshape(-1)[case["sample_flat_index"]]
        np.testing.assert_allclose(got, case["sample_values"], rtol=0, atol=2 * tolerance if lossy else tolerance)
    if case.get("stored"):
        key = f"{name}|min{case['min_tokens']}|max{case['max_tokens']}|merge{case['merge_size']}"
        wanted = arrays("image_preprocess.npz")[key]
        np.testing.assert_allclose(patches.pixels, wanted, rtol=0, atol=2 * tolerance if lossy else tolerance)


def test_every_stored_image_has_a_case() -> None:
    stored = {k.split("|")[0] for k in arrays("image_preprocess.npz")}
    reachable = {n for n in stored if n in arrays("image_inputs.npz") or is_picture(MEDIA / n)}
    assert reachable <= {c.values[0]["image"] for c in image_cases()}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(r, id="{height}x{width}|{min_tokens}|{max_tokens}|{merge_size}".format(**r))
        for r in TABLES.get("image_target_sizes", [])
    ],
)
def test_image_target_sizes(row: dict[str, Any]) -> None:
    merge = row["merge_size"]
    limits = {"min_tokens": row["min_tokens"], "max_tokens": row["max_tokens"]}
    height, width = image_size(row["height"], row["width"], image_config(), merge, **limits)
    assert (height, width) == (row["target_h"], row["target_w"])
    assert [height // PATCH, width // PATCH] == row["grid"]
    assert height * width // (PATCH * merge) ** 2 == row["llm_tokens"]


@pytest.mark.parametrize("name", ["image_preprocess_multi.npz"] if arrays("image_preprocess_multi.npz") else [])
def test_image_preprocess_multi(name: str) -> None:
    """All synthetic images in one call: the first one's size for all, a shared budget."""
    recorded = arrays(name)
    images = list(arrays("image_inputs.npz").values())
    merges = recorded["merge_sizes"].tolist()
    sizes = [(int(h) * PATCH, int(w) * PATCH) for _, h, w in recorded["grid_sizes"]]
    pixels = [preprocess_image(i, image_config(), m, s).pixels for i, m, s in zip(images, merges, sizes, strict=True)]
    np.testing.assert_allclose(np.concatenate(pixels), recorded["pixel_values"], rtol=0, atol=EXACT_PIXELS)
    # The limits of this call stand in the set's description only.
    readme = (GOLDEN / "README.md").read_text() if (GOLDEN / "README.md").exists() else ""
    limits = re.search(r"image_preprocess_multi\.npz.*?min (\d+), max (\d+) tokens", readme)
    if limits:
        least, most = map(int, limits.groups())
        native = [(i.shape[0], i.shape[1]) for i in images]
        shared = image_sizes(native, image_config(), merges[0], shared=True, min_tokens=least, max_tokens=most)
        assert shared == sizes


VIDEO_CASES = [n for n in TABLES.get("video_preprocess", {}) if arrays(f"video_preprocess_{n}.npz")]


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_video_preprocess(name: str) -> None:
    case, recorded = TABLES["video_preprocess"][name], arrays(f"video_preprocess_{name}.npz")
    clip = arrays("tra_videos.npz")[case["video"]]
    merge = case["merge_size"]
    assert recorded["grid_sizes"].tolist() == case["grid_sizes"]
    patches = [
        preprocess_image(pixels, image_config(), merge, (h * PATCH, w * PATCH))
        for pixels, (_, h, w) in zip(clip, case["grid_sizes"], strict=True)
    ]
    assert [p.tokens for p in patches] == case["llm_tokens"]
    got = np.concatenate([p.pixels for p in patches])
    np.testing.assert_allclose(got, recorded["pixel_values"], rtol=0, atol=EXACT_PIXELS)


DECODE = TABLES.get("video_decode", {})
CLIP = MEDIA / DECODE.get("file", "")
REAL = TABLES.get("video_real_preprocess", {})


@functools.cache
def decoded(call: str) -> list[Any]:
    """Frames of one recorded call, written as the loader's name and its arguments in JSON."""
    loader, arguments = call.split(" ", 1)
    options = json.loads(arguments)
    for theirs, ours in (("start_time", "start"), ("end_time", "end")):
        if theirs in options:
            options[ours] = options.pop(theirs)
    read = {"load_video": read_video, "load_video_from_ids": read_video_by_number}[loader]
    # The reference's own default is more frames than any recorded call yields.
    return list(read(CLIP, **{"fps": None, "max_frames": 768, **options}))


@pytest.mark.parametrize("call", DECODE.get("cases", {}) if CLIP.is_file() else {})
def test_video_decode(call: str) -> None:
    case = DECODE["cases"][call]
    frames = decoded(call)
    assert len(frames) == case["n"]
    pixels = [f.pixels.transpose(2, 0, 1) if case["layout"] == "chw" else f.pixels for f in frames]
    assert {p.shape for p in pixels} == {tuple(case["frame_shape"])}
    # recorded with six decimals
    np.testing.assert_allclose([f.time for f in frames], case["timestamps"], rtol=0, atol=1e-6)
    # Two neighbouring frames differ by 0.1 of a level; decoders differ by less, for they round a few pixels otherwise.
    means = [f.pixels.mean(axis=(0, 1)) for f in frames]
    np.testing.assert_allclose(means, case["channel_mean"], rtol=0, atol=0.02)
    if "sha256_first_frame" in case and platform.machine() == "x86_64":  # other processors round colours otherwise
        assert hashlib.sha256(pixels[0].tobytes()).hexdigest() == case["sha256_first_frame"]


@pytest.mark.parametrize("case", REAL.get("cases", []) if CLIP.is_file() else [], ids=lambda c: str(c["max_tokens"]))
def test_video_real_preprocess(case: dict[str, Any]) -> None:
    total = square = 0.0
    count = 0
    frames = decoded("load_video " + json.dumps(REAL["load_args"]))
    for frame, (_, h, w), tokens in zip(frames, case["grid_sizes"], case["llm_tokens"], strict=True):
        patches = preprocess_image(frame, image_config(), case["merge_size"], (h * PATCH, w * PATCH))
        assert patches.tokens == tokens
        values = patches.pixels.astype(np.float64)
        total, square, count = total + values.sum(), square + (values**2).sum(), count + values.size
    mean = total / count
    # a video decoder may differ: a twentieth of a grey level in the mean
    assert mean == pytest.approx(case["pixel_mean"], abs=GREY_LEVEL / 20)
    assert np.sqrt(square / count - mean**2) == pytest.approx(case["pixel_std"], abs=GREY_LEVEL / 20)


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.glob("encoder_*.safetensors")))
def test_encoder_positions(name: str) -> None:
    recorded = arrays(name)
    rows, cols = [], []
    for (t, h, w), merge in zip(recorded["grid_sizes"].tolist(), recorded["merge_sizes"].tolist(), strict=True):
        row, col = positions((h, w), merge)
        rows += [row] * t
        cols += [col] * t
    np.testing.assert_array_equal(np.stack([np.concatenate(rows), np.concatenate(cols)]), recorded["position_ids"])


@pytest.mark.parametrize("row", TABLES.get("frame_sample", []), ids=lambda r: json.dumps(r["args"]))
def test_frame_sample(row: dict[str, Any]) -> None:
    args = row["args"]
    if args["mode"] == "fps":
        assert sample_numbers(args["duration"], args["vid_fps"], args["fps"], None) == row["indices"]
    else:
        assert sample_numbers(args["duration"], 1, None, args["num_frames"]) == row["indices"]
