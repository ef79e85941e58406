"""The fields of a published `config.json` that describe one stack of transformer blocks, as rules and as a reading.

A setting that has an old and a new spelling may stand there twice. Both are read; where they differ, different
versions of transformers would compute different things, and the file is refused by a sentence that names both.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from penguin_edge.config import PATCH, STACK_RULES, TEXT_RULES, TextConfig, VisionConfig
from penguin_edge.errors import CheckpointError
from penguin_edge.schema import Flag, Free, Maybe, Real, Record, Rows, Rule, SchemaError, Table, Text, Whole

Stack = TypeVar("Stack", VisionConfig, TextConfig)

ROPE = Record(
    {},
    optional={
        "rope_type": Maybe(Text(longest=64)),
        "type": Maybe(Text(longest=64)),
        "rope_theta": Maybe(STACK_RULES["rope_theta"]),
        "partial_rotary_factor": Maybe(Real(0, 1)),
    },
    open=True,
)
MAX_NAMED_LAYERS = 999_999
EPS = Real(above=0, most=0.5)
"""No whole number: transformers 5 takes none here, not even 0 or 1."""
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL: dict[str, Rule] = {
    **{name: rule for name, rule in TEXT_RULES.items() if name not in REQUIRED},
    "rms_norm_eps": EPS,
    "qk_norm": Free(),
    "num_key_value_heads": Maybe(STACK_RULES["num_key_value_heads"]),
    "head_dim": Maybe(STACK_RULES["head_dim"]),
    "rope_theta": Maybe(STACK_RULES["rope_theta"]),
    "partial_rotary_factor": Maybe(Real(0, 1)),
    "rope_scaling": Maybe(ROPE),
    "rope_parameters": Maybe(ROPE),
    "attention_bias": Flag(),
    "mlp_bias": Flag(),
    "hidden_act": Text(longest=64),
    "is_causal": Maybe(Flag()),
    "use_sliding_window": Flag(),
    "sliding_window": Maybe(Whole()),
    "max_window_layers": Whole(),
    "layer_types": Maybe(Rows(Text(longest=64), most=MAX_NAMED_LAYERS)),
    "patch_size": Maybe(Whole()),
    "per_layer_config": Maybe(Table(Text(), Free())),
    "transformers_weights": Maybe(Text()),
}
"""Null stands where transformers 5 takes it for a value of its own, and is refused where it takes none."""
STACK = Record({name: STACK_RULES[name] for name in REQUIRED}, OPTIONAL, open=True)

LIMITS = {"penguinvl_qwen3": 32_768, "qwen3": 32_768, "llama": 2048}
"""Positions of a model whose file does not say, as in transformers."""
KV_HEADS = 32
"""Heads of keys and values of a Qwen3 whose file does not name them; null means as many as of queries, as for Llama."""
WINDOW, WINDOW_FROM = 4096, 28
"""Defaults of Qwen3: the window, and the first layer that has it when `use_sliding_window` is set."""


def check(rule: Rule, value: Any, path: Path) -> None:
    """Refuse what a file of a checkpoint must not hold.

    Raises:
        CheckpointError: the rule's own sentence, with the file before it.
    """
    try:
        rule.check(value, path.name)
    except SchemaError as error:
        raise CheckpointError(f"{path.parent}: {error}; copy the checkpoint again") from error


def read_stack(kind: type[Stack], data: dict[str, Any], path: Path) -> Stack:
    """The transformer fields that encoder and decoder share.

    Raises:
        CheckpointError: a field that is missing, ill-typed or out of range, or a value that the model cannot honour.
    """
    check(STACK, data, path)
    given = {key: value for key, value in data.items() if value is not None}
    _refuse(given, path)
    _refuse_windows(data, path)
    values: dict[str, Any] = {item.name: given[item.name] for item in dataclasses.fields(kind) if item.name in given}
    values["rope_theta"] = float(_theta(data, path))
    if "rms_norm_eps" in values:
        values["rms_norm_eps"] = float(values["rms_norm_eps"])
    model = given.get("model_type")
    if kind is TextConfig:
        values.pop("qk_norm", None)
        values.setdefault("tie_word_embeddings", False)
        values.setdefault("max_position_embeddings", LIMITS.get(str(model), 32_768))
    heads = values["num_attention_heads"]
    if "num_key_value_heads" not in values:
        told = model == "llama" or "num_key_value_heads" in data
        values["num_key_value_heads"] = heads if told else KV_HEADS
        if not told and heads % KV_HEADS:
            raise CheckpointError(
                f"{path}: num_key_value_heads is missing, which means {KV_HEADS} to transformers, and they do not fit "
                f"{heads} attention heads; name the number that the weights have"
            )
    if model != "llama" and "head_dim" in data and data["head_dim"] is None:
        raise CheckpointError(f"{path}: head_dim is null; wanted a whole number, as transformers does")
    # A file without head_dim means hidden/heads for Llama, and Qwen3's own default otherwise.
    share = values["hidden_size"] // values["num_attention_heads"]
    values.setdefault("head_dim", share if model == "llama" else kind.head_dim)
    stack = kind(**values)
    if stack.num_attention_heads % stack.num_key_value_heads or stack.head_dim < 2 or stack.head_dim % 2:
        raise CheckpointError(
            f"{path}: {stack.num_attention_heads} heads over {stack.num_key_value_heads} kv heads of "
            f"{stack.head_dim}; wanted a whole ratio and an even head_dim"
        )
    return stack


def _refuse(given: dict[str, Any], path: Path) -> None:
    """Everything that other values of other fields would compute, and this model does not."""

    def refuse(name: str, wanted: str) -> NoReturn:
        raise CheckpointError(f"{path}: {name} is {repr(given[name])[:60]}, which is not supported; wanted {wanted}")

    for name in ("attention_bias", "mlp_bias"):
        if given.get(name):
            refuse(name, "a model without biases in its blocks")
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "'silu'")
    if given.get("is_causal") is False:
        refuse("is_causal", "a causal decoder")
    if given.get("patch_size", PATCH) != PATCH:
        refuse("patch_size", str(PATCH))
    if given.get("per_layer_config"):
        refuse("per_layer_config", "layers that are all alike")
    if given.get("transformers_weights", "model.safetensors") != "model.safetensors":
        refuse("transformers_weights", "weights in files of their usual names")
    for name in ("text_config", "llm_config"):
        if name in given:
            refuse(name, "the text model's fields at the top level, as Penguin-VL, Qwen3 and Llama have them")


def _refuse_windows(data: dict[str, Any], path: Path) -> None:
    layers = data["num_hidden_layers"]
    types = data.get("layer_types")
    if types is not None and len(types) != layers:
        raise CheckpointError(
            f"{path}: layer_types names {len(types)} layers, num_hidden_layers is {layers}; wanted one type for each"
        )
    # `attention` is the old word for it.
    other = next((name for name in types or () if name not in ("full_attention", "attention")), None)
    if other is not None:
        raise CheckpointError(f"{path}: layer_types names {other!r}, wanted full_attention in every layer")
    # A window of no tokens is one; null is none.
    windowed = data.get("use_sliding_window") and data.get("sliding_window", WINDOW) is not None
    if windowed and types is None and data.get("max_window_layers", WINDOW_FROM) < layers:
        raise CheckpointError(
            f"{path}: use_sliding_window is set, with max_window_layers "
            f"{data.get('max_window_layers', WINDOW_FROM)} of {layers}; wanted full attention in every layer"
        )


def _theta(data: dict[str, Any], path: Path) -> float:
    """The base of the rotary embedding, which must be the default one."""
    old, new = data.get("rope_scaling") or {}, data.get("rope_parameters") or {}
    if old and new and old != new:
        raise CheckpointError(
            f"{path}: rope_scaling is {str(old)[:80]} and rope_parameters is {str(new)[:80]}; they are the old and the "
            "new spelling of one setting: leave out the one that does not hold"
        )
    stated, called = old or new, "rope_scaling" if old else "rope_parameters"
    rope = {key: value for key, value in stated.items() if value is not None}
    # transformers takes null for the value itself; a theta on top counts only where the dict has none.
    kind = "rope_type" if "rope_type" in stated else "type"
    for place, found, name in (
        (f"{called}.", stated, "rope_theta"),
        (f"{called}.", stated, kind),
        ("", data, "rope_theta"),
    ):
        if name in found and found[name] is None and (place or "rope_theta" not in stated):
            raise CheckpointError(f"{path}: {place}{name} is null; wanted a value, or no such field")
    nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise CheckpointError(
            f"{path}: {called} has parameters of its own for {nested[:40]!r}; wanted one set for all layers"
        )
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key, "default") != "default"]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    more = sorted(set(rope) - known)
    if kinds or more:
        raise CheckpointError(
            f"{path}: rope scaling {kinds[0] if kinds else more[0]!r} in {called} is not supported; wanted the default "
            "rotary embedding"
        )
    for where, factor in ((called, rope.get("partial_rotary_factor")), ("it", data.get("partial_rotary_factor"))):
        if factor not in (None, 1):
            raise CheckpointError(
                f"{path}: partial_rotary_factor is {factor}{f' in {where}' if where != 'it' else ''}; wanted a rotary "
                "embedding over the whole head"
            )
    outer, inner = data.get("rope_theta"), rope.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise CheckpointError(
            f"{path}: rope_theta is {outer} and {called}.rope_theta is {inner}; transformers 4 takes the first and 5 "
            "the second: leave out the one that the model was not trained with"
        )
    theta: float = next((value for value in (inner, outer) if value is not None), 10_000.0)
    return theta
