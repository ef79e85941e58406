"""The published configuration files: read into `PenguinConfig`, and written back.

Source: reference `penguinvl/model/penguinvl_qwen3.py`,
`penguinvl/model/penguinvl_encoder/configuration_penguinvl_encoder.py`
and its image processor. Three forms of the encoder's configuration are met: a dict inside `config.json`, a folder named
there, or nothing that can be resolved; then the weights' shapes tell.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penguin_edge.config import (
    IMAGE_RULES,
    MAX_VOCABULARY,
    PATCH,
    TOKEN,
    ImageConfig,
    PenguinConfig,
    TextConfig,
    VisionConfig,
    read_json,
)
from penguin_edge.errors import CheckpointError
from penguin_edge.model.foreign import refuse_versioned
from penguin_edge.model.hf_stack import check, read_stack
from penguin_edge.schema import Flag, Maybe, Record, Rows, Rule, Text, Whole

Shapes = dict[str, tuple[int, ...]]
TEXT_TYPES = {"penguinvl_qwen3": True, "qwen3": True, "llama": False}
"""Model types whose decoder is known, and whether q and k are normed per head."""


@dataclass(frozen=True)
class TokenIds:
    """A token id, a list of them, or null: a rule of its own, since the published files have all three."""

    def check(self, value: Any, where: str) -> None:
        """Refuse anything else.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        if isinstance(value, list):
            Rows(TOKEN, most=4096).check(value, where)
        else:
            Maybe(TOKEN).check(value, where)


NAME = Maybe(Text(pattern=r"[^\0]*", longest=1024))
MODEL = Record(
    {},
    optional={
        "vision_encoder": NAME,
        "mm_vision_encoder": NAME,
        "vision_encoder_config": Maybe(Record({}, open=True)),
        "vision_projector_type": Maybe(Text(longest=64)),
        "image_token_index": Maybe(TOKEN),
        "image_token_id": Maybe(TOKEN),
        "max_frames": Maybe(Whole(1, 1_000_000)),
        "eos_token_id": TokenIds(),
        "pad_token_id": Maybe(Whole(-1, MAX_VOCABULARY)),
    },
    open=True,
)
GENERATION = Record(
    {}, optional={"eos_token_id": TokenIds(), "pad_token_id": Maybe(Whole(-1, MAX_VOCABULARY))}, open=True
)
IMAGE_FIELDS: dict[str, Rule] = {name: Maybe(rule) for name, rule in IMAGE_RULES.items()}
NEVER_NULL = ("rope_theta", "rms_norm_eps")
"""Numbers that the weights' shapes do not tell."""
STEPS = ("do_resize", "do_rescale", "do_normalize")
PROCESSOR = Record(
    {},
    optional={
        **IMAGE_FIELDS,
        **dict.fromkeys((*STEPS, "do_center_crop", "do_pad"), Maybe(Flag())),
        "patch_size": Maybe(Whole()),
        "resample": Maybe(Whole()),
        "image_processor": Maybe(Record({}, open=True)),
    },
    open=True,
)


def config_from_folder(
    folder: Path, data: dict[str, Any], shapes: Shapes
) -> tuple[PenguinConfig, Path | None, list[str]]:
    """The configuration of a checkpoint folder, the folder of its encoder if one is named and there, and notes.

    Args:
        data: the content of its `config.json`.
        shapes: shapes of the stored tensors, by our names.
    Raises:
        CheckpointError: a file is missing or damaged, or asks for something the model cannot compute.
    """
    path = folder / "config.json"
    notes: list[str] = []
    if data.get("model_type") == "penguinvl_vision_encoder":
        vision = read_stack(VisionConfig, data, path)
        check_layers(vision.num_hidden_layers, "encoder", shapes, path)
        return PenguinConfig(vision=vision), None, notes
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_TYPES:
        raise CheckpointError(f"{path}: model_type {kind!r} is unknown; known: {', '.join(sorted(TEXT_TYPES))}")
    check(MODEL, data, path)
    text = dataclasses.replace(read_stack(TextConfig, data, path), qk_norm=TEXT_TYPES[kind])
    check_layers(text.num_hidden_layers, "decoder", shapes, path)
    found, encoder_folder, more = _vision(folder, data, shapes)
    notes += more
    config = PenguinConfig(
        vision=found,
        text=text,
        image=_image(folder, data, notes) if found else ImageConfig(),
        image_token_id=_image_token(data, path) if found else -1,
        eos_token_ids=_stop_ids(folder, data, text.vocab_size),
        pad_token_id=max(0, data.get("pad_token_id") or 0),
    )
    return config, encoder_folder, notes


def check_layers(layers: int, part: str, shapes: Shapes, path: Path) -> None:
    """Refuse more layers than there are weights for, before a model of that size is made.

    Args:
        part: "encoder" or "decoder"; one whose weights are not in `shapes` at all passes.
    Raises:
        CheckpointError: the configuration has more layers than the weights.
    """
    numbers = [int(found[1]) for name in shapes if (found := re.match(rf"{part}\.layers\.(\d{{1,9}})\.", name))]
    if numbers and layers > max(numbers) + 1:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {layers}, but the weights hold {max(numbers) + 1} layers of the {part}; "
            "copy configuration and weights of one checkpoint"
        )


def _stop_ids(folder: Path, data: dict[str, Any], vocabulary: int) -> tuple[int, ...]:
    """What ends an answer: the union of what the generation configuration and the model configuration name."""
    path = folder / "generation_config.json"
    generation = read_json(path, "the generation configuration") if path.is_file() else {}
    check(GENERATION, generation, path)
    out: dict[int, None] = {}
    for source, found in ((path, generation), (folder / "config.json", data)):
        ids = found.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if token >= vocabulary:
                raise CheckpointError(
                    f"{source}: eos_token_id is {token}, wanted an id below the model's vocab_size of {vocabulary}"
                )
            out[token] = None
    return tuple(out)


def _image_token(data: dict[str, Any], path: Path) -> int:
    old, new = data.get("image_token_index"), data.get("image_token_id")
    if old is not None and new is not None and old != new:
        raise CheckpointError(
            f"{path}: image_token_index is {old} and image_token_id is {new}; leave out the wrong one"
        )
    found = new if old is None else old
    return PenguinConfig.image_token_id if found is None else found


def _vision(folder: Path, data: dict[str, Any], shapes: Shapes) -> tuple[VisionConfig | None, Path | None, list[str]]:
    path = folder / "config.json"
    embedded = data.get("vision_encoder_config")
    names = [name for key in ("vision_encoder", "mm_vision_encoder") if (name := data.get(key))]
    if embedded is None and not names and not any(key.startswith("encoder.") for key in shapes):
        return None, None, []
    kind = data.get("vision_projector_type") or "mlp2x_gelu"
    if kind != "mlp2x_gelu":
        raise CheckpointError(f"{path}: vision_projector_type {kind!r} is not supported; wanted 'mlp2x_gelu'")
    found: dict[Path, VisionConfig] = {}
    if embedded is not None:
        # What the dict leaves out is read from the weights, as if there were no dict.
        given = {key: value for key, value in embedded.items() if value is not None or key in NEVER_NULL}
        complete = {item.name for item in dataclasses.fields(VisionConfig)} <= given.keys()
        known = {} if complete else _vision_from_shapes(shapes, path)
        if given.keys() & {"rope_scaling", "rope_parameters"}:
            known.pop("rope_theta", None)
        found[path] = read_stack(VisionConfig, {**known, **given}, path)
    encoder_folder = None
    for name in dict.fromkeys(names):
        for candidate in dict.fromkeys((folder / name, folder.parent / name, Path(name))):
            config = candidate / "config.json"
            if config.is_file():
                refuse_versioned(candidate)
                found[config] = read_stack(VisionConfig, read_json(config, "the encoder configuration"), config)
                encoder_folder = encoder_folder or candidate
    if not found:
        missing = f"encoder configuration {names[0] if names else None!r} not found; taken from the weights' shapes"
        return read_stack(VisionConfig, _vision_from_shapes(shapes, path), path), None, [missing]
    (first, vision), *others = found.items()
    for other, stack in others:
        if stack != vision:
            raise CheckpointError(
                f"{first} and {other} describe two different encoders; leave one of them, or its name in {path}, out"
            )
    check_layers(vision.num_hidden_layers, "encoder", shapes, first)
    return vision, encoder_folder, []


def _vision_from_shapes(shapes: Shapes, path: Path) -> dict[str, Any]:
    try:
        block = "encoder.layers.0."
        head_dim = shapes[block + "self_attn.q_norm.weight"][0]
        stack = VisionConfig(
            hidden_size=shapes["encoder.norm.weight"][0],
            intermediate_size=shapes[block + "mlp.gate_proj.weight"][0],
            num_hidden_layers=1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers.")),
            num_attention_heads=shapes[block + "self_attn.q_proj.weight"][0] // head_dim,
            num_key_value_heads=shapes[block + "self_attn.k_proj.weight"][0] // head_dim,
            head_dim=head_dim,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: no encoder configuration, and the encoder's weights are missing ({error})"
        ) from error
    return dataclasses.asdict(stack)


def _image(folder: Path, data: dict[str, Any], notes: list[str]) -> ImageConfig:
    """Preprocessing constants, with those that the reference ignores in its files (merge sizes, fps, max_frames)."""
    first, second = folder / "preprocessor_config.json", folder / "processor_config.json"
    files = {path: read_json(path, "the preprocessing configuration") for path in (first, second) if path.is_file()}
    if not files or (first not in files and not files[second].get("image_processor")):
        notes.append("preprocessor_config.json not found; the published constants are used (mean and std 0.5)")
    values: dict[str, Any] = {}
    told: dict[str, str] = {}

    def add(found: dict[str, Any], where: str) -> None:
        for name in IMAGE_FIELDS:
            if found.get(name) is None:
                continue
            if name in told and values[name] != found[name]:
                raise CheckpointError(
                    f"{folder}: {name} is {values[name]} in {told[name]} and {found[name]} in {where}; leave out the "
                    "wrong one"
                )
            values[name], told[name] = found[name], where

    add({"max_frames": data.get("max_frames")}, "config.json")
    for path, content in files.items():
        check(PROCESSOR, content, path)
        # transformers 5 writes the image processor into the other file.
        nested = content.get("image_processor") or {}
        check(PROCESSOR, nested, path)
        for found in (content, nested):
            _check_steps(found, path)
            add(found, path.name)
    fields: dict[str, Any] = {n: tuple(map(float, v)) if isinstance(v, list) else v for n, v in values.items()}
    out = ImageConfig(**fields)
    if out.max_tokens < out.min_tokens:
        raise CheckpointError(f"{folder}: max_tokens {out.max_tokens} is below min_tokens {out.min_tokens}")
    return out


def _check_steps(found: dict[str, Any], path: Path) -> None:
    if (found.get("patch_size") or PATCH) != PATCH or (3 if found.get("resample") is None else found["resample"]) != 3:
        raise CheckpointError(f"{path}: wanted patch_size {PATCH} and resample 3 (bicubic)")
    for step in STEPS:
        if found.get(step) is False:
            raise CheckpointError(f"{path}: {step} is false; images are always resized, rescaled and normalised here")
    for step in ("do_center_crop", "do_pad"):
        if found.get(step):
            raise CheckpointError(f"{path}: {step} is set; images are neither cropped nor padded here")


def published_json(config: PenguinConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint in the published form, by file name."""
    text = dataclasses.asdict(config.text)
    normed = text.pop("qk_norm")
    model: dict[str, Any] = {
        **text,
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_scaling": None,
        "torch_dtype": dtype,
    }
    model["eos_token_id"] = list(config.eos_token_ids) or None
    model["pad_token_id"] = config.pad_token_id
    files: dict[str, dict[str, Any]] = {
        "generation_config.json": {"eos_token_id": model["eos_token_id"], "pad_token_id": config.pad_token_id},
    }
    if config.vision is None:
        model["model_type"] = "qwen3" if normed else "llama"
        model["architectures"] = ["Qwen3ForCausalLM" if normed else "LlamaForCausalLM"]
        return {"config.json": model, **files}
    model["model_type"] = "penguinvl_qwen3"
    model["architectures"] = ["PenguinVLQwen3ForCausalLM"]
    model["image_token_index"] = config.image_token_id
    model["vision_projector_type"] = "mlp2x_gelu"
    model["vision_hidden_size"] = config.vision.hidden_size
    model["max_frames"] = config.image.max_frames
    model["use_reconstruct"] = False
    model["vision_encoder"] = None
    model["vision_encoder_config"] = {
        **dataclasses.asdict(config.vision),
        "model_type": "penguinvl_vision_encoder",
        "patch_size": PATCH,
        "num_channels": 3,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    image = dataclasses.asdict(config.image)
    processor = {name: image.pop(name) for name in ("image_merge_size", "video_merge_size", "fps", "max_frames")}
    files["processor_config.json"] = {**processor, "processor_class": "PenguinVLQwen3Processor"}
    files["preprocessor_config.json"] = {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in image.items()},
        **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_processor_type": "PenguinVLImageProcessor",
        "patch_size": PATCH,
        "resample": 3,
    }
    return {"config.json": model, **files}
