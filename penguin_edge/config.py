"""What Penguin-VL is, in numbers: frozen dataclasses, the published JSON forms, and named presets.

Field names are those of the published `config.json` files. Defaults are the published values, except where a
class docstring says otherwise.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penguin_edge import files
from penguin_edge.errors import CheckpointError, SettingError
from penguin_edge.schema import Flag, Maybe, Real, Record, Rows, Rule, SchemaError, Whole

PATCH = 14
"""Side of a patch in pixels."""
PATCH_VALUES = 3 * PATCH * PATCH
"""Numbers per patch: channel, row, column."""


@dataclass(frozen=True)
class VisionConfig:
    """The encoder: a bidirectional Qwen3 stack with 2D-RoPE (fact sheet, sections 1 and 3)."""

    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0


@dataclass(frozen=True)
class TextConfig:
    """The decoder: Qwen3, or a Llama-type text model when `qk_norm` is off."""

    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40_960
    tie_word_embeddings: bool = True
    qk_norm: bool = True

    @property
    def kv_values(self) -> int:
        """Numbers that one position takes in the KV cache: keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of images and frames (fact sheet, sections 2.3, 2.4 and 5)."""

    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    min_tokens: int = 16
    max_tokens: int = 16_384
    image_merge_size: int = 1
    video_merge_size: int = 2
    fps: float = 1
    max_frames: int = 180


@dataclass(frozen=True)
class TraConfig:
    """Temporal Redundancy-Aware compression (fact sheet, section 7)."""

    similarity_threshold: float = 0.95
    """A frame less similar than this to the last key frame becomes key."""
    patch_cosine: float = 0.7
    """Two patches are similar when their cosine in HSV is above this."""
    area_ratio: int = 16
    """Area of a key frame over the area of an intermediate frame."""
    min_factor: float = 1.5
    """Floor per frame, and per image, in units of `min_tokens`."""
    max_factor: float = 0.95
    """Share of the budget that images and reference mode fill before they round; strict mode uses all of it."""


@dataclass(frozen=True)
class PenguinConfig:
    """A whole model. `vision` is None for a text-only decoder."""

    vision: VisionConfig | None = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    tra: TraConfig = field(default_factory=TraConfig)
    image_token_id: int = 151_669
    eos_token_ids: tuple[int, ...] = (151_645,)
    pad_token_id: int = 151_643

    def to_json(self) -> dict[str, Any]:
        """The manifest form: nested plain dicts, read back by `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> PenguinConfig:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: a field is missing, unknown, of another type or out of range, or two do not go together.
        """
        try:
            CONFIG.check(data, "model")
        except SchemaError as error:
            raise CheckpointError(f"the model configuration is not one of penguin-edge: {error}") from error
        image: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["image"].items()}
        config = cls(
            vision=None if data["vision"] is None else VisionConfig(**data["vision"]),
            text=TextConfig(**data["text"]),
            image=ImageConfig(**image),
            tra=TraConfig(**data["tra"]),
            image_token_id=data["image_token_id"],
            eos_token_ids=tuple(data["eos_token_ids"]),
            pad_token_id=data["pad_token_id"],
        )
        config.check()
        return config

    def check(self) -> None:
        """Refuse numbers that do not go together.

        Raises:
            CheckpointError: two numbers do not go together; the message names them and what they have to fulfil.
        """
        for name, part in (("text", self.text), ("vision", self.vision)):
            if part is None:
                continue
            if part.num_attention_heads % part.num_key_value_heads:
                raise CheckpointError(
                    f"{name}: {part.num_attention_heads} attention heads over {part.num_key_value_heads} of keys and "
                    "values; wanted a multiple"
                )
            if part.head_dim % 2:
                raise CheckpointError(f"{name}: head_dim is {part.head_dim}; rotary embedding needs an even one")
        last = self.text.vocab_size - 1
        for token in (*self.eos_token_ids, max(self.image_token_id, 0)):
            if not 0 <= token <= last:
                raise CheckpointError(f"token id {token} is outside of the vocabulary; wanted 0 to {last}")
        if (self.image_token_id < 0) != (self.vision is None):
            raise CheckpointError(
                f"image_token_id is {self.image_token_id} {'with' if self.vision else 'without'} an encoder; wanted -1 "
                "where there is no encoder, and the id of <image> where there is one"
            )
        if self.image.min_tokens > self.image.max_tokens:
            raise CheckpointError(
                f"images have at least {self.image.min_tokens} and at most {self.image.max_tokens} tokens; wanted the "
                "first to be the smaller"
            )


MAX_LAYERS = 1024
LAYERS_VARIABLE = "PENGUIN_EDGE_MAX_LAYERS"
MAX_WIDTH = 1 << 18
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 24
"""Limits of the models that are accepted at all; the largest published model of this kind stays a tenth below each."""
TOKEN = Whole(0, MAX_VOCABULARY)


@dataclass(frozen=True)
class Layers:
    """A number of layers up to `MAX_LAYERS`, or up to what the environment says.

    The limit is an environment variable, since exports and training read the configuration again in processes of their
    own, which inherit it.
    """

    def check(self, value: Any, where: str) -> None:
        """Refuse any other value.

        Raises:
            SchemaError: one sentence.
            SettingError: the variable is no number, or it is what refuses the value.
        """
        most = max_layers()
        try:
            Whole(1, most).check(value, where)
        except SchemaError as error:
            if type(value) is int and most < value <= MAX_LAYERS:
                raise SettingError(
                    f"{where} is {value}, and {LAYERS_VARIABLE} in the environment is {most}; raise it, or unset it"
                ) from None
            raise SchemaError(f"{error} ({LAYERS_VARIABLE} in the environment raises the limit)") from None


def max_layers() -> int:
    """The largest number of layers that is taken.

    Raises:
        SettingError: the environment's value is no number.
    """
    given = os.environ.get(LAYERS_VARIABLE, str(MAX_LAYERS))
    if not re.fullmatch("[1-9][0-9]{0,5}", given):
        raise SettingError(
            f"{LAYERS_VARIABLE} in the environment is {given[:40]!r}, wanted a whole number, 1 to 999,999; set one, or "
            "unset it"
        )
    return int(given)


STACK_RULES: dict[str, Rule] = {
    "hidden_size": Whole(1, MAX_WIDTH),
    "intermediate_size": Whole(1, MAX_WIDTH),
    "num_hidden_layers": Layers(),
    "num_attention_heads": Whole(1, MAX_HEADS),
    "num_key_value_heads": Whole(1, MAX_HEADS),
    "head_dim": Whole(2, MAX_HEAD_DIM),
    "rms_norm_eps": Real(0, 1),
    "rope_theta": Real(1, 1e12),
}
"""What encoder and decoder share."""
TEXT_RULES: dict[str, Rule] = {
    **STACK_RULES,
    "vocab_size": Whole(1, MAX_VOCABULARY),
    "max_position_embeddings": Whole(1, MAX_POSITIONS),
    "tie_word_embeddings": Flag(),
    "qk_norm": Flag(),
}
IMAGE_RULES: dict[str, Rule] = {
    "image_mean": Rows(Real(-100, 100), 3, 3),
    "image_std": Rows(Real(above=0, most=1000), 3, 3),
    "rescale_factor": Real(above=0, most=1),
    "min_tokens": Whole(1, 1 << 20),
    "max_tokens": Whole(1, 1 << 20),
    "image_merge_size": Whole(1, 16),
    "video_merge_size": Whole(1, 16),
    "fps": Real(above=0, most=1000),
    "max_frames": Whole(1, 1_000_000),
}
CONFIG = Record(
    {
        "vision": Maybe(Record(STACK_RULES)),
        "text": Record(TEXT_RULES),
        "image": Record(IMAGE_RULES),
        "tra": Record(
            {
                "similarity_threshold": Real(0, 1),
                "patch_cosine": Real(-1, 1),
                "area_ratio": Whole(1, 4096),
                "min_factor": Real(0, 4096),
                "max_factor": Real(above=0, most=1),
            }
        ),
        "image_token_id": Whole(-1, MAX_VOCABULARY),
        "eos_token_ids": Rows(TOKEN, most=16_384),
        "pad_token_id": TOKEN,
    }
)
"""What each number of `PenguinConfig.to_json` may be. Published files have the same rules: see `hf_config.py`."""

PRESETS: dict[str, PenguinConfig] = {
    "tiny": PenguinConfig(
        vision=VisionConfig(64, 160, 2, 4, 2, 16),
        text=TextConfig(640, 96, 256, 3, 4, 2, 32, max_position_embeddings=4096),
    ),
    "nano": PenguinConfig(
        vision=VisionConfig(128, 256, 4, 4, 2, 32, rope_theta=100.0),
        text=TextConfig(4160, 128, 256, 3, 4, 2, 32, rope_theta=10_000.0, max_position_embeddings=4096),
        image=ImageConfig(min_tokens=1, image_merge_size=2),
        # The first 4,096 tokens of Qwen's vocabulary, then its special tokens: `dataset/nano/vocabulary.py`.
        image_token_id=4122,
        eos_token_ids=(4098,),
        pad_token_id=4096,
    ),
    "2b": PenguinConfig(),
    "8b": PenguinConfig(text=TextConfig(151_936, 4096, 12_288, 36, 32, 8, 128, tie_word_embeddings=False)),
}
"""Shapes by name; a preset is taken wherever a checkpoint is. `nano` has trained weights, the others random ones."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """One JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: missing, not JSON, or not an object; `what` names the file's role in the message.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {what} is missing; a checkpoint folder needs it")
    data = files.read_json(path, what=f"{path}: {what}", error=CheckpointError, advice="copy the checkpoint again")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: {what} holds {type(data).__name__}, wanted a JSON object")
    return data
