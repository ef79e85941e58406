"""The published configuration files: read into `PenguinConfig`, and written back.

Source: reference `penguinvl/model/penguinvl_qwen3.py`,
`penguinvl/model/penguinvl_encoder/configuration_penguinvl_encoder.py`
and its image processor. Three forms of the encoder's configuration are met: a dict inside `config.json`, a folder named
there, or nothing that can be resolved; then the weights' shapes tell.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from penguin_edge.config import PATCH, ImageConfig, PenguinConfig, TextConfig, VisionConfig, read_json
from penguin_edge.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
Stack = TypeVar("Stack", VisionConfig, TextConfig)
TEXT_TYPES = {"penguinvl_qwen3": True, "qwen3": True, "llama": False}
"""Model types whose decoder is known, and whether q and k are normed per head."""


def config_from_folder(folder: Path, shapes: Shapes) -> tuple[PenguinConfig, Path | None, list[str]]:
    """The configuration of a checkpoint folder, the folder of its encoder if one is named and there, and notes.

    Args:
        shapes: shapes of the stored tensors, by our names.
    Raises:
        CheckpointError: a file is missing or damaged, or asks for something the model cannot compute.
    """
    path = folder / "config.json"
    data = read_json(path, "the model configuration")
    notes: list[str] = []
    if data.get("model_type") == "penguinvl_vision_encoder":
        return PenguinConfig(vision=_stack(VisionConfig, data, path)), None, notes
    kind = data.get("model_type")
    if kind not in TEXT_TYPES:
        raise CheckpointError(f"{path}: model_type {kind!r} is unknown; known: {', '.join(sorted(TEXT_TYPES))}")
    text = dataclasses.replace(_stack(TextConfig, data, path), qk_norm=TEXT_TYPES[kind])
    vision, encoder_folder, more = _vision(folder, data, shapes)
    notes += more
    if vision and not (folder / "preprocessor_config.json").is_file():
        notes.append("preprocessor_config.json not found; the published constants are used (mean and std 0.5)")
    generation = (
        read_json(folder / "generation_config.json", "") if (folder / "generation_config.json").is_file() else {}
    )
    eos = generation.get("eos_token_id")
    eos = data.get("eos_token_id") if eos is None else eos
    config = PenguinConfig(
        vision=vision,
        text=text,
        image=_image(folder, data) if vision else ImageConfig(),
        image_token_id=_image_token(data, path) if vision else -1,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        pad_token_id=int(data.get("pad_token_id") or 0),
    )
    return config, encoder_folder, notes


def _image_token(data: dict[str, Any], path: Path) -> int:
    value = data.get("image_token_index")
    if value is not None and not isinstance(value, int):
        raise CheckpointError(f"{path}: image_token_index is {value!r}, wanted a token id")
    return PenguinConfig.image_token_id if value is None else value


def _stack(kind: type[Stack], data: dict[str, Any], path: Path) -> Stack:
    """The transformer fields that encoder and decoder share. A value that the model cannot honour is refused."""
    scaling = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise CheckpointError(f"{path}: rope scaling {scaling} is not supported; wanted the default rotary embedding")
    if data.get("attention_bias") or data.get("mlp_bias"):
        raise CheckpointError(f"{path}: attention_bias or mlp_bias is set; wanted a model without biases in its blocks")
    if data.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {data['hidden_act']!r} is not supported; wanted 'silu'")
    if data.get("use_sliding_window"):
        raise CheckpointError(f"{path}: use_sliding_window is set; wanted full attention")
    if data.get("patch_size", PATCH) != PATCH:
        raise CheckpointError(f"{path}: patch_size {data['patch_size']}, wanted {PATCH}")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if data.get(item.name) is not None:
            values[item.name] = data[item.name]
    if "rope_theta" not in values:
        values["rope_theta"] = scaling.get("rope_theta", 10_000.0)
    if kind is TextConfig:
        values.setdefault("tie_word_embeddings", False)
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in wanted if name not in values]
    if missing:
        raise CheckpointError(f"{path}: field {missing[0]} is missing; copy the checkpoint's config.json again")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    # A file without head_dim means hidden/heads for Llama, and Qwen3's own default otherwise.
    llama = data.get("model_type") == "llama"
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"] if llama else kind.head_dim)
    try:
        stack = kind(**{name: _typed(name, value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a field has an unusable value ({error})") from error
    if stack.num_attention_heads % stack.num_key_value_heads or stack.head_dim % 2:
        raise CheckpointError(
            f"{path}: {stack.num_attention_heads} heads over {stack.num_key_value_heads} kv heads of "
            f"{stack.head_dim}; wanted "
            "a whole ratio and an even head_dim"
        )
    return stack


def _typed(name: str, value: Any) -> Any:
    if name in ("rope_theta", "rms_norm_eps"):
        return float(value)
    if name in ("tie_word_embeddings", "qk_norm"):
        return bool(value)
    if int(value) < 1:
        raise ValueError(f"{name} is {value}, wanted a positive number")
    return int(value)


def _vision(folder: Path, data: dict[str, Any], shapes: Shapes) -> tuple[VisionConfig | None, Path | None, list[str]]:
    path = folder / "config.json"
    embedded = data.get("vision_encoder_config")
    name = data.get("vision_encoder") or data.get("mm_vision_encoder")
    if not isinstance(embedded, dict) and not name and not any(key.startswith("encoder.") for key in shapes):
        return None, None, []
    kind = data.get("vision_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise CheckpointError(f"{path}: vision_projector_type {kind!r} is not supported; wanted 'mlp2x_gelu'")
    if isinstance(embedded, dict):
        # What the dict leaves out is read from the weights, as if there were no dict.
        given = {key: value for key, value in embedded.items() if value is not None}
        complete = {item.name for item in dataclasses.fields(VisionConfig)} <= given.keys()
        known = {} if complete else dataclasses.asdict(_vision_from_shapes(shapes, path))
        return _stack(VisionConfig, {**known, **given}, path), None, []
    for candidate in (folder / str(name), folder.parent / str(name), Path(str(name))):
        if name and (candidate / "config.json").is_file():
            encoder = read_json(candidate / "config.json", "the encoder configuration")
            return _stack(VisionConfig, encoder, candidate / "config.json"), candidate, []
    return (
        _vision_from_shapes(shapes, path),
        None,
        [f"encoder configuration {name!r} not found; taken from the weights' shapes"],
    )


def _vision_from_shapes(shapes: Shapes, path: Path) -> VisionConfig:
    try:
        block = "encoder.layers.0."
        head_dim = shapes[block + "self_attn.q_norm.weight"][0]
        return VisionConfig(
            hidden_size=shapes["encoder.norm.weight"][0],
            intermediate_size=shapes[block + "mlp.gate_proj.weight"][0],
            num_hidden_layers=1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers.")),
            num_attention_heads=shapes[block + "self_attn.q_proj.weight"][0] // head_dim,
            num_key_value_heads=shapes[block + "self_attn.k_proj.weight"][0] // head_dim,
            head_dim=head_dim,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no encoder configuration, and the encoder's weights are missing ({error})"
        ) from error


def _image(folder: Path, data: dict[str, Any]) -> ImageConfig:
    """Preprocessing constants, with those that the reference ignores in its files (merge sizes, fps, max_frames)."""
    values: dict[str, Any] = {"max_frames": data.get("max_frames") or ImageConfig.max_frames}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        found = read_json(path, "the preprocessing configuration") if path.is_file() else {}
        if found.get("patch_size", PATCH) != PATCH or found.get("resample", 3) != 3:
            raise CheckpointError(f"{path}: wanted patch_size {PATCH} and resample 3 (bicubic)")
        for item in dataclasses.fields(ImageConfig):
            if found.get(item.name) is not None:
                value = found[item.name]
                values[item.name] = tuple(float(x) for x in value) if isinstance(value, list) else value
    for name, value in values.items():
        default = getattr(ImageConfig, name)
        if isinstance(default, tuple) != isinstance(value, tuple) or (isinstance(value, tuple) and len(value) != 3):
            raise CheckpointError(f"{folder}: {name} is {value!r}, wanted something like {default!r}")
        if not isinstance(value, tuple) and not isinstance(value, (int, float)):
            raise CheckpointError(f"{folder}: {name} is {value!r}, wanted a number")
    return ImageConfig(**values)


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
