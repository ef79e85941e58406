"""Ids, labels and pixels of training samples against those of the reference's processor and data set.

Every case is discovered from the set: `labels` and `dataset` of its tables, and its `annotations.jsonl`. `frame_sample`
is a case of `golden_pixels`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from golden_model import VLMS, load_vlm
from golden_pixels import EXACT_PIXELS, GREY_LEVEL, is_picture
from golden_set import GOLDEN, MEDIA, TABLES
from PIL import Image

from penguin_edge.dataset.records import ANNOTATIONS, DataRecord, missing_media, read_records
from penguin_edge.dataset.samples import NO_TARGET, DataOptions, SampleBuilder, encode_conversation
from penguin_edge.media.preprocess import Patches

LABELS = TABLES.get("labels", {}) if VLMS else {}
DATASET = TABLES.get("dataset", {}) if VLMS and (GOLDEN / ANNOTATIONS).is_file() else {}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    case = LABELS[name]
    tokenizer = load_vlm(VLMS[0])[2]
    merge = case["merge_size"]
    counts = [h * w // merge**2 for t, h, w in case["grid_sizes"] or [] for _ in range(t)]
    caption = any(message["role"] is None for message in case["messages"])
    ids, labels = encode_conversation(case["messages"], counts, tokenizer, reference_captions=caption)
    assert ids.tolist() == case["input_ids"]
    assert labels.tolist() == case["labels"]
    if "decoded_targets" in case:
        assert tokenizer.decode(labels[labels != NO_TARGET], skip_special=False) == case["decoded_targets"]


@cache
def dataset_records() -> list[DataRecord]:
    return read_records(GOLDEN / ANNOTATIONS, MEDIA)


def dataset_rows() -> list[Any]:
    """The recorded samples whose media the set has."""
    found = [row for row in DATASET.get("rows", []) if not missing_media([dataset_records()[row["index"]]])]
    return [pytest.param(row, id=str(row["index"])) for row in found]


def dataset_builder(settings: dict[str, Any]) -> SampleBuilder:
    """The reference's rules under the recorded settings."""
    checkpoint, _, tokenizer = load_vlm(VLMS[0])
    image = checkpoint.config.image
    merges = {name: settings.get(name, getattr(image, name)) for name in ("image_merge_size", "video_merge_size")}
    return SampleBuilder(
        replace(checkpoint.config, image=replace(image, **merges)),
        tokenizer,
        DataOptions(
            mm_max_length=settings.get("max_tokens", image.max_tokens),
            min_tokens=settings.get("min_tokens"),
            fps=settings.get("fps"),
            max_frames=settings.get("max_frames"),
            tra="reference",
            shared_image_size=True,
        ),
    )


def pixel_tolerance(record: DataRecord) -> float:
    """Tolerance of the mean: nearly none for exact decoders, a grey level for JPEG, a twentieth of one over a clip."""
    if record.kind == "video":
        return GREY_LEVEL / 20
    formats = [Image.open(path).format for path in record.media if is_picture(path)]
    return GREY_LEVEL if "JPEG" in formats else EXACT_PIXELS


@pytest.mark.parametrize("row", dataset_rows())
def test_dataset(row: dict[str, Any]) -> None:
    record = dataset_records()[row["index"]]
    sample = dataset_builder(DATASET.get("settings", {}))(record)
    assert sample.input_ids.tolist() == row["input_ids"]
    assert sample.labels.tolist() == row["labels"]
    assert {*row["modals"]} == {record.kind}
    if record.kind == "text":  # the reference brings a dummy patch along
        assert not sample.visuals
        return
    visuals: list[Patches] = list(sample.visuals)
    assert [[1, *patches.grid] for patches in visuals] == row["grid_sizes"]
    assert [patches.merge_size for patches in visuals] == row["merge_sizes"]
    pixels = np.concatenate([patches.pixels for patches in visuals])
    assert list(pixels.shape) == row["pixel_shape"]
    assert pixels.mean(dtype=np.float64) == pytest.approx(row["pixel_mean"], abs=pixel_tolerance(record))
