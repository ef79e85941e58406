"""Exported graphs against the recorded reference: the same greedy tokens from every engine, with images and video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_model import LOGITS, VLM_CASES, VLMS, close, frames_of, vlm_of

from penguin_edge.bundle.folder import Bundle
from penguin_edge.export.pipeline import ExportOptions, export_bundle
from penguin_edge.export.targets.known import TARGETS
from penguin_edge.export.verify import prefill
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.runtime.engines.opening import open_engine


class Silent:
    """No progress."""

    def plan(self, expected: Mapping[str, float]) -> None: ...
    def begin(self, part: str, estimate_mb: float) -> None: ...
    def tick(self, part: str, seconds: float, resident_mb: float, stage: str, share: float | None) -> None: ...
    def done(self, part: str, seconds: float, peak_mb: float) -> None: ...


@pytest.fixture(scope="session", params=sorted(TARGETS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = Checkpoint.open(VLMS[0], note=lambda line: None)
    out = tmp_path_factory.mktemp("golden") / request.param
    return export_bundle(checkpoint, out, ExportOptions(target=request.param, max_seq_len=512), Silent())


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in VLM_CASES])
def test_greedy_tokens_of_the_reference(bundle: Bundle, path: Path) -> None:
    arrays: Any = np.load(path)
    if vlm_of(path.stem) != VLMS[0] or "generated_ids" not in arrays.files:
        return
    engine = open_engine(bundle, threads=1)
    ids = arrays["input_ids"][0]
    embeds = engine.embed(np.where(ids == engine.config.image_token_id, 0, ids))
    visual = []
    for frame in frames_of(arrays) if "grid_sizes" in arrays.files else []:
        features = engine.encode(frame.pixels[None], frame.rows, frame.cols)
        visual.append(engine.project(features.reshape(1, -1, frame.merge_size**2, features.shape[-1]))[0])
    if visual:
        embeds[ids == engine.config.image_token_id] = np.concatenate(visual)
    wanted = arrays["generated_ids"][0].tolist()
    cache = engine.new_cache()
    rows = [prefill(engine, cache, embeds, engine.bounds.max_chunk)[0]]
    for token in wanted[:-1]:
        rows.append(engine.forward(cache, engine.embed(np.array([token])), np.array([-1]))[0])
    assert np.stack(rows).argmax(-1).tolist() == wanted
    close(np.stack(rows), arrays["generated_logits"], LOGITS)
