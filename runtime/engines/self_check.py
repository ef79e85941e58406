"""What a bundle's parts say of one another, compared at the first open on a machine.

A manifest whose numbers are all in range can still be another model's. The check data were recorded when the bundle was
made, the tokenizer came with the checkpoint: both tell what the manifest has to say.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import CHECK, COPY_AGAIN, TOKENIZER
from penguin_edge.bundle.folder import Bundle
from penguin_edge.bundle.manifest import config_hash
from penguin_edge.config import PATCH, PATCH_VALUES, ImageConfig
from penguin_edge.errors import BundleError, CheckpointError, InputError
from penguin_edge.media.preprocess import preprocess_image
from penguin_edge.prompt.chat import END
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.engines.embedding import EmbeddingTable

ROWS = 16
"""Rows of the embedding table that are compared."""
PATCHES_MEAN = 0.02
"""Mean difference of normalised pixels: versions of OpenCV differ by single levels (0.008) at single pixels."""
ROWS_RELATIVE = 0.1
"""Over the largest value; rounding a table to int4 and to half precision stays below 0.05."""


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        BundleError: unreadable, or not the one of the manifest's model.
    """
    try:
        with bundle.unchanged():
            return Tokenizer.of(bundle)
    except CheckpointError as error:
        raise BundleError(f"{error}; {COPY_AGAIN}") from error


def self_check(bundle: Bundle) -> None:
    """Refuse a bundle whose manifest does not belong to its other files.

    Raises:
        BundleError: the tokenizer, the check data or the embedding table say something else than the manifest.
    """
    config = bundle.manifest.model
    end = open_tokenizer(bundle).id_of(END) if TOKENIZER in bundle.manifest.files else None
    if end is not None and end not in config.eos_token_ids:
        raise BundleError(
            f"{bundle.folder}: {END} is token {end}, and answers end with {list(config.eos_token_ids)} alone, so they "
            f"would not end; {COPY_AGAIN}"
        )
    if CHECK in bundle.manifest.files:
        _compare_check_data(bundle)


def _compare_check_data(bundle: Bundle) -> None:
    config, path = bundle.manifest.model, bundle.path(CHECK)
    try:
        made_for, arrays = _read(path)
        ids, embeds = arrays["ids"][:ROWS], arrays["embeds"][:ROWS]
        used = len(arrays["ids"]) + len(arrays["tokens"]) - 1
        text = ids != config.image_token_id
        rows = EmbeddingTable.of(bundle).lookup(ids[text])
        off = [_patches_off(config.image, arrays, case) for case in ("0", "1") if f"image_{case}" in arrays]
        apart, largest = (float(np.abs(x).max(initial=0.0)) for x in (rows - embeds[text], embeds[text]))
    except (InputError, OSError, LookupError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: cannot be used as check data ({error}); {COPY_AGAIN}") from error
    if made_for is not None and made_for != config_hash(config):
        raise BundleError(f"{path}: made for another model configuration than the manifest states; {COPY_AGAIN}")
    if used > bundle.manifest.bounds.max_seq_len:
        raise BundleError(
            f"{path}: takes {used} tokens of a KV cache that has {bundle.manifest.bounds.max_seq_len} by the manifest; "
            f"{COPY_AGAIN}"
        )
    if not max(off, default=0.0) <= PATCHES_MEAN:
        raise BundleError(
            f"{path}: its pictures become other patches here than when the bundle was made, so that the manifest's "
            f"image settings or this machine's OpenCV differ; {COPY_AGAIN}"
        )
    if not (apart <= ROWS_RELATIVE * largest and math.isfinite(largest)):
        raise BundleError(f"{path}: the embedding table has other rows than when the bundle was made; {COPY_AGAIN}")


def _read(path: Path) -> tuple[str | None, dict[str, NDArray[Any]]]:
    """The hash of the configuration that the check data were made for, and the arrays that are compared.

    Raises:
        ValueError: not a file of tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            pictures = {f"{what}_{case}" for what in ("image", "size", "patches") for case in "01"}
            wanted = {"ids", "embeds", "tokens"} | pictures
            arrays = {name: stored.get_tensor(name) for name in wanted & set(stored.keys())}
            return (stored.metadata() or {}).get("model"), arrays
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _patches_off(config: ImageConfig, arrays: dict[str, NDArray[Any]], case: str) -> float:
    """Mean difference of the patches that a picture becomes here from those that were recorded."""
    size, patches = arrays[f"size_{case}"], arrays[f"patches_{case}"][0]
    if size.shape != (3,) or size.dtype.kind not in "iu":
        raise ValueError(f"size_{case} is {size.dtype} {list(size.shape)}, wanted three integers")
    if patches.ndim != 2 or patches.shape[1] != PATCH_VALUES:
        raise ValueError(f"patches_{case} is [1, {', '.join(map(str, patches.shape))}], wanted [1, P, {PATCH_VALUES}]")
    height, width, merge = size.tolist()
    # How many patches there are bounds what is computed before they are compared.
    if min(height, width) < PATCH or height // PATCH * (width // PATCH) != len(patches):
        raise ValueError(f"size_{case} is {size.tolist()}, which does not make the {len(patches)} patches stored")
    found = preprocess_image(arrays[f"image_{case}"], config, merge, size=(height, width)).pixels
    return float(np.abs(found - patches).mean())
