"""One thing from two places: equal to what transformers 5 computes from the same folder, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROPE, TOLERANCE, Edit, both, config, ids, make, off, ours, text, theirs, transformers, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from penguin_edge.errors import CheckpointError
from penguin_edge.model.checkpoint import Checkpoint, read_encoder

Q = "model.layers.0.self_attn.q_proj"
VLM = Path(__file__).parents[1] / "golden" / "vlm"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "qwen3": make(root / "qwen3"),
        "tied": make(root / "tied", tied=True),
        "llama": make(root / "llama", "llama"),
        "sharded": make(root / "sharded", shard="20KB"),
        "mha": make(root / "mha", num_key_value_heads=4),
        "wide": make(root / "wide", num_attention_heads=32, num_key_value_heads=32, head_dim=2),
    }


def half(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name] * 0.5


def stray(name: str) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        half(tensors)
        save_file(tensors, folder / name)

    return edit


def old_shards(folder: Path) -> None:
    """What an earlier save in shards leaves: an index, and its files."""
    source = make(folder.parent / "earlier", shard="20KB")
    for path in source.glob("model*"):
        shutil.copy(path, folder)
        if path.suffix == ".safetensors":
            weights(half, path.name)(folder)


def old_index(folder: Path) -> None:
    old_shards(folder)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()


def index(change: Callable[[dict[str, str]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        change(data["weight_map"])
        path.write_text(json.dumps(data))

    return edit


def stale_copy(folder: Path) -> None:
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    name = next(iter(load_file(folder / shards[0])))
    weights(lambda tensors: tensors.update({name: torch.zeros(3, 3)}), shards[-1])(folder)


def rename(old: str, new: str) -> Edit:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return weights(change)


def put(name: str, tensor: Tensor) -> Edit:
    return weights(lambda tensors: tensors.update({name: tensor}))


def drop(name: str) -> Edit:
    return weights(lambda tensors: tensors.pop(name))


def adapter(folder: Path) -> None:
    low = {f"base_model.model.{Q}.lora_A.weight": torch.randn(8, 32)}
    save_file({**low, f"base_model.model.{Q}.lora_B.weight": torch.randn(64, 8)}, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    text("adapter_config.json", {**about, "base_model_name_or_path": str(folder)})(folder)


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    for path in folder.glob("*model.safetensors"):
        if not path.name.startswith("adapter"):
            path.unlink()
    (folder / "config.json").unlink()


def peft_state(folder: Path) -> None:
    """The state of a PEFT model that was saved as it is, without merging."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    save_file({name: t.clone() for name, t in wrapped.state_dict().items()}, folder / "model.safetensors")


def packed(suffixes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Edit:
    """Put tensors of a quantized form in the place of one projection."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[Q + ".weight"]
        for suffix, (shape, dtype) in suffixes.items():
            tensors[Q + suffix] = torch.zeros(shape).to(dtype)

    return weights(change)


def scaled(tensors: dict[str, Tensor]) -> None:
    tensors[Q + ".weight"] = (tensors[Q + ".weight"] * 100).round()
    tensors[Q + ".weight_scale"] = torch.full((64, 1), 0.01)


SAME = ""
MERGE = "merge it first (merge_and_unload"
I32, U8, F8 = torch.int32, torch.uint8, torch.float8_e4m3fn
SLIDING = ["full_attention", "sliding_attention"]
VARIANTS: list[tuple[str, str, Edit, str]] = [
    # Settings: the base is followed by what is changed and what must come of it.
    ("as saved", "qwen3", config(), SAME),
    ("as saved, tied", "tied", config(), SAME),
    ("as saved, llama", "llama", config(), SAME),
    ("as saved, sharded", "sharded", config(), SAME),
    ("theta in the old place", "qwen3", config(rope_parameters=..., rope_theta=1e6), SAME),
    ("theta in both, equal", "qwen3", config(rope_theta=1e6), SAME),
    ("theta in both", "qwen3", config(rope_theta=1e4), "rope_theta is 10000.0 and rope_parameters.rope_theta is 1000"),
    ("theta in the old dict", "qwen3", config(rope_parameters=..., rope_scaling={**ROPE, "type": "default"}), SAME),
    ("no theta at all", "qwen3", config(rope_parameters=...), SAME),
    ("rope in both dicts", "qwen3", config(rope_scaling={"type": "default"}), "rope_parameters is"),
    ("rope in both, equal", "qwen3", config(rope_scaling=dict(ROPE)), SAME),
    ("rope per layer type", "qwen3", config(rope_parameters={"full_attention": ROPE}), "'full_attention'"),
    ("yarn", "qwen3", config(rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    ("linear, old spelling", "llama", config(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    (
        "dynamic",
        "llama",
        config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, rope_parameters=...),
        "'dynamic'",
    ),
    ("llama3", "llama", config(rope_parameters={**ROPE, "rope_type": "llama3", "factor": 8.0}), "'llama3'"),
    ("two types", "qwen3", config(rope_parameters={**ROPE, "type": "yarn"}), "'yarn'"),
    ("mrope", "qwen3", config(rope_parameters={**ROPE, "mrope_section": [4, 2, 2]}), "'mrope_section'"),
    ("half rotary, nested", "llama", config(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}), "0.5"),
    ("half rotary, on top", "qwen3", config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    ("whole rotary", "qwen3", config(partial_rotary_factor=1.0), SAME),
    ("other dtype words", "qwen3", config(torch_dtype="float32", dtype=...), SAME),
    ("contradicting dtype words", "qwen3", config(torch_dtype="bfloat16"), SAME),
    ("null kv heads", "qwen3", config(num_key_value_heads=None), "k_proj.weight is [32, 32], wanted [64, 32]"),
    ("no kv heads, qwen3", "mha", config(num_key_value_heads=...), "num_key_value_heads is missing, which means 32"),
    ("null kv heads, fitting", "mha", config(num_key_value_heads=None), SAME),
    ("32 heads, kv heads not named", "wide", config(num_key_value_heads=...), SAME),
    ("null head_dim, qwen3", "qwen3", config(head_dim=None), "head_dim is null"),
    ("null theta", "qwen3", config(rope_parameters=..., rope_theta=None), "rope_theta is null"),
    ("null theta, llama", "llama", config(rope_parameters=None, rope_theta=None, rope_scaling=None), "theta is null"),
    ("null theta on top alone", "qwen3", config(rope_theta=None), SAME),
    (
        "null theta in the dict",
        "qwen3",
        config(rope_parameters={"rope_type": "default", "rope_theta": None}, rope_theta=1234.0),
        "rope_parameters.rope_theta is null",
    ),
    (
        "null theta in the old dict",
        "llama",
        config(rope_parameters=..., rope_scaling={"rope_type": "default", "rope_theta": None}, rope_theta=1234.0),
        "rope_scaling.rope_theta is null",
    ),
    ("null type", "qwen3", config(rope_parameters={**ROPE, "rope_type": None}), "rope_parameters.rope_type is null"),
    ("null type, old word", "qwen3", config(rope_parameters={"type": None, "rope_theta": 1e4}), ".type is null"),
    ("both words, one null", "qwen3", config(rope_parameters={**ROPE, "type": None}), SAME),
    ("null eps", "llama", config(rms_norm_eps=None), "rms_norm_eps is null"),
    ("no eps", "llama", config(rms_norm_eps=...), SAME),
    ("eps 0", "qwen3", config(rms_norm_eps=0), "rms_norm_eps is 0"),
    ("eps 1", "qwen3", config(rms_norm_eps=1), "rms_norm_eps is 1"),
    ("null where none is taken", "qwen3", config(max_position_embeddings=None), "max_position_embeddings is null"),
    ("no head_dim, llama", "llama", config(head_dim=...), SAME),
    ("null head_dim, llama", "llama", config(head_dim=None), SAME),
    ("no head_dim, qwen3", "qwen3", config(head_dim=...), "q_proj.weight is [64, 32], wanted [512, 32]"),
    ("windows in the list", "qwen3", config(layer_types=SLIDING, sliding_window=8), "'sliding_attention'"),
    (
        "windows on",
        "qwen3",
        config(layer_types=SLIDING, sliding_window=8, use_sliding_window=True),
        "'sliding_attention'",
    ),
    (
        "windows by number",
        "qwen3",
        config(layer_types=..., sliding_window=8, use_sliding_window=True, max_window_layers=1),
        "max_window_layers 1 of 2",
    ),
    (
        "windows from a layer that there is not",
        "qwen3",
        config(layer_types=..., sliding_window=8, use_sliding_window=True, max_window_layers=2),
        SAME,
    ),
    (
        "windows of nothing",
        "qwen3",
        config(layer_types=..., sliding_window=0, use_sliding_window=True, max_window_layers=0),
        "max_window_layers 0 of 2",
    ),
    (
        "windows of null",
        "qwen3",
        config(layer_types=..., sliding_window=None, use_sliding_window=True, max_window_layers=0),
        SAME,
    ),
    (
        "windows from null",
        "qwen3",
        config(layer_types=..., sliding_window=8, use_sliding_window=True, max_window_layers=None),
        "max_window_layers is null",
    ),
    ("a list of another length", "qwen3", config(layer_types=["full_attention"]), "names 1 layers"),
    ("biases", "qwen3", config(attention_bias=True), "attention_bias is True"),
    ("biases of the MLP", "llama", config(mlp_bias=True), "mlp_bias is True"),
    ("gelu", "qwen3", config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    ("swish is silu", "qwen3", config(hidden_act="swish"), SAME),
    ("not causal", "qwen3", config(is_causal=False), "is_causal is False"),
    ("a nested text model", "qwen3", config(text_config={"hidden_size": 16}), "text_config"),
    ("layers of their own", "qwen3", config(per_layer_config={"1": {"head_dim": 8}}), "per_layer_config"),
    (
        "another file",
        "qwen3",
        both(stray("half.safetensors"), config(transformers_weights="half.safetensors")),
        "transf",
    ),
    (
        "configurations by version",
        "qwen3",
        both(text("config.5.0.0.json", {}), config(configuration_files=["config.json", "config.5.0.0.json"])),
        "config.json: configuration_files names 'config.5.0.0.json'",
    ),
    ("configurations by version, of one", "qwen3", config(configuration_files=["config.json"]), SAME),
    ("configurations by version, null", "qwen3", config(configuration_files=None), "configuration_files is null"),
    (
        "tokenizers by version",
        "qwen3",
        text("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json"]}),
        "tokenizer_config.json: fast_tokenizer_files names 'tokenizer.4.0.0.json'",
    ),
    ("fewer layers", "qwen3", config(num_hidden_layers=1, layer_types=...), SAME),
    ("eps", "qwen3", config(rms_norm_eps=1e-3), SAME),
    # The head.
    ("tied, but another head", "qwen3", config(tie_word_embeddings=True), SAME),
    (
        "tied, and the same head",
        "tied",
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1})),
        SAME,
    ),
    ("tied, only the head", "tied", rename("model.embed_tokens", "lm_head"), SAME),
    ("not tied, no head", "tied", config(tie_word_embeddings=False), "lm_head.weight [640, 32] is missing; tie_word"),
    ("no flag, no head", "tied", config(tie_word_embeddings=...), "lm_head.weight [640, 32] is missing; tie_word"),
    # Files.
    ("an old index", "qwen3", old_index, SAME),
    ("old shards", "qwen3", old_shards, SAME),
    ("averaged weights beside", "qwen3", stray("model_ema.safetensors"), SAME),
    ("another spelling beside", "qwen3", stray("pytorch_model.safetensors"), SAME),
    ("no index", "sharded", lambda folder: (folder / "model.safetensors.index.json").unlink(), "neither model.safe"),
    (
        "a stray shard",
        "sharded",
        lambda f: save_file({"x": torch.ones(2)}, f / "model-00099-of-00099.safetensors"),
        SAME,
    ),
    ("a stale copy in a shard", "sharded", stale_copy, "lies in model-00001"),
    ("an index that names less", "sharded", index(lambda places: places.pop("model.norm.weight")), SAME),
    ("an index that names more", "sharded", index(lambda p: p.update(x=next(iter(p.values())))), "tensor x is said to"),
    (
        "a shard elsewhere",
        "sharded",
        index(lambda p: p.update({"model.norm.weight": "../x.safetensors"})),
        "plain name",
    ),
    ("an absolute shard", "sharded", index(lambda p: p.update({"model.norm.weight": "/x.safetensors"})), "plain name"),
    # Names.
    ("a base model's names", "tied", rename("model.", ""), SAME),
    ("a prefix too many", "qwen3", rename("model.", "model.model."), SAME),
    ("two names", "qwen3", put("norm.weight", torch.ones(32)), "model.norm.weight and norm.weight are two names"),
    ("a bias that nobody adds", "qwen3", put(Q + ".bias", torch.ones(64)), SAME),
    ("mixed dtypes", "qwen3", weights(lambda t: t.update({Q + ".weight": t[Q + ".weight"].bfloat16()})), SAME),
    ("float64", "qwen3", weights(lambda t: t.update({n: x.double() for n, x in t.items()})), SAME),
    ("a missing tensor", "qwen3", drop(Q + ".weight"), "q_proj.weight [64, 32] is missing"),
    # Adapters.
    ("an adapter beside", "qwen3", adapter, MERGE),
    ("an adapter alone", "qwen3", adapter_alone, MERGE),
    ("a PEFT state", "qwen3", peft_state, MERGE),
    ("a rest of LoRA", "qwen3", put(Q + ".lora_A.default.weight", torch.randn(8, 32)), MERGE),
    ("a configuration alone of an adapter", "qwen3", text("adapter_config.json", {}), MERGE),
    # Weights that were quantized elsewhere.
    ("AWQ", "qwen3", config(quantization_config={"quant_method": "awq", "bits": 4}), "('awq')"),
    ("MLX", "qwen3", config(quantization={"group_size": 64, "bits": 4}), "config.json: quantization says"),
    ("no quantization that is said", "qwen3", config(quantization_config={}), "quantization_config is {}"),
    ("false as a quantization", "qwen3", config(quantization_config=False), "quantization_config is False"),
    ("a list as a quantization", "qwen3", config(quantization_config=[]), "quantization_config is []"),
    ("null as a quantization", "qwen3", config(quantization_config=None), SAME),
    ("GPTQ's own file", "qwen3", text("quantize_config.json", {"bits": 4}), "quantize_config.json says"),
    ("GPTQ's tensors", "qwen3", packed({".qweight": ((4, 64), I32), ".qzeros": ((1, 8), I32)}), "GPTQ"),
    ("fp8", "qwen3", packed({".weight": ((64, 32), F8)}), "float8_e4m3fn"),
    (
        "fp8 with a scale",
        "qwen3",
        packed({".weight": ((64, 32), F8), ".weight_scale_inv": ((1,), torch.float32)}),
        "fp8",
    ),
    ("bitsandbytes", "qwen3", packed({".weight": ((1024, 1), U8), ".absmax": ((32,), torch.float32)}), "bitsandbytes"),
    (
        "packed",
        "qwen3",
        packed({".weight_packed": ((64, 4), I32), ".weight_scale": ((64, 1), torch.float32)}),
        "(as of fp8 or compressed-tensors)",
    ),
    ("floats with a scale", "qwen3", weights(scaled), "weight_scale"),
    (
        "quanto",
        "qwen3",
        packed({".weight._data": ((64, 32), torch.int8), ".weight._scale": ((1,), torch.float32)}),
        "quanto",
    ),
    ("int8 alone", "qwen3", packed({".weight": ((64, 32), torch.int8)}), "int8"),
    # Numbers.
    (
        "NaN",
        "tied",
        weights(lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(torch.nan)),
        "up_proj.weight holds",
    ),
    (
        "NaN in a rare row",
        "qwen3",
        weights(lambda t: t["model.embed_tokens.weight"][639].fill_(torch.nan)),
        "embed_tokens",
    ),
    ("infinite", "qwen3", weights(lambda t: t["model.norm.weight"][3].fill_(-torch.inf)), "norm.weight holds a number"),
    (
        "too large for fp32",
        "qwen3",
        weights(lambda t: t.update({"model.norm.weight": torch.full((32,), 1e39, dtype=torch.float64)})),
        "1e+39",
    ),
    ("more layers than weights", "qwen3", config(num_hidden_layers=1000, layer_types=...), "the weights hold 2 layers"),
    ("more layers than any model", "qwen3", config(num_hidden_layers=2**40), "1 to 1,024"),
]


@pytest.mark.parametrize(("base", "edit", "says"), [row[1:] for row in VARIANTS], ids=[row[0] for row in VARIANTS])
def test_equal_to_transformers_or_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, base: str, edit: Edit, says: str
) -> None:
    folder = Path(shutil.copytree(bases[base], tmp_path / "model"))
    edit(folder)
    if says == SAME:
        assert off(ours(folder), theirs(folder)) <= TOLERANCE
        return
    with pytest.raises(CheckpointError) as caught:
        ours(folder)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_merged_adapter_with_a_head_of_its_own(bases: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["tied"])
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wrapped = peft.get_peft_model(model, lora)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lm_head.modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        wanted = merged(ids()).logits[0]
    merged.save_pretrained(tmp_path / "merged")
    assert off(ours(tmp_path / "merged"), wanted) <= TOLERANCE


def test_a_second_save_into_the_same_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["qwen3"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert off(ours(tmp_path), theirs(tmp_path)) <= TOLERANCE


@pytest.mark.parametrize(
    ("base", "edit", "note"),
    [
        ("qwen3", stray("model_ema.safetensors"), "and not model_ema.safetensors"),
        ("qwen3", config(tie_word_embeddings=True), "lm_head.weight is stored with values of its own"),
        ("qwen3", config(num_hidden_layers=1, layer_types=...), "no part of the model, such as model.layers.1"),
    ],
)
def test_what_is_left_aside_is_said(bases: dict[str, Path], tmp_path: Path, base: str, edit: Edit, note: str) -> None:
    folder = Path(shutil.copytree(bases[base], tmp_path / "model"))
    edit(folder)
    notes: list[str] = []
    ours(folder, notes)
    assert any(note in line for line in notes), notes


@pytest.mark.parametrize(
    ("generation", "model", "stops"),
    [
        ({"eos_token_id": 601}, 601, (601, 600)),
        ({"eos_token_id": [5, 601]}, 7, (5, 601, 7, 600)),
        ({"eos_token_id": None}, None, (600,)),
        ({}, [], (600,)),
        ({"eos_token_id": 600}, 600, (600,)),
    ],
)
def test_stops_are_the_union_of_files_and_the_prompt_format(
    bases: dict[str, Path], tmp_path: Path, generation: Any, model: Any, stops: tuple[int, ...]
) -> None:
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    both(text("generation_config.json", generation), config(eos_token_id=model))(folder)
    assert Checkpoint.open(folder, note=[].append).config.eos_token_ids == stops


@pytest.mark.parametrize("value", [640, -1, True, "600", [600, 1e9], [[600]], {"a": 1}, 1.5])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_stop_that_is_no_token_is_refused(bases: dict[str, Path], tmp_path: Path, value: Any, file: str) -> None:
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        Checkpoint.open(folder, note=[].append)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")])
def test_weights_of_two_dtypes_are_held_in_one_that_holds_both(
    bases: dict[str, Path], tmp_path: Path, dtypes: tuple[str, str]
) -> None:
    """The table's dtype alone would round the others."""
    table, others = (getattr(torch, name) for name in dtypes)
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    weights(lambda t: t.update({n: x.to(table if "embed" in n else others) for n, x in t.items()}))(folder)
    model = Checkpoint.open(folder, note=[].append).load()
    assert model.dtype == torch.float32 and model.decoder is not None
    stored = load_file(folder / "model.safetensors")[Q + ".weight"]
    assert torch.equal(model.decoder.get_parameter("layers.0.self_attn.q_proj.weight"), stored.float())


def test_a_number_that_fp16_cannot_hold_is_refused_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    weights(lambda t: t["model.layers.1.mlp.down_proj.weight"][3].mul_(1e6))(folder)
    checkpoint = Checkpoint.open(folder, note=[].append)
    checkpoint.load(dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight holds .*float16 cannot hold"):
        checkpoint.load(dtype=torch.float16)


def test_a_patch_embedding_is_taken_in_its_two_shapes_alone(tmp_path: Path) -> None:
    """As many numbers are not enough: a transposed matrix has them, too."""
    folder = Path(shutil.copytree(VLM.parent / "tiny-penguin-encoder", tmp_path / "encoder"))
    name = "embeddings.patch_embedding.weight"
    read_encoder(folder)
    weights(lambda t: t.update({name: t[name].flatten(1)}))(folder)
    read_encoder(folder)
    weights(lambda t: t.update({name: t[name].t()}))(folder)
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight is \[588, 64\], wanted \[64, 588\]"):
        read_encoder(folder)


def copied_vlm(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VLM, tmp_path / "vlm"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("preprocessor_config.json", {"image_std": [0.5, 0.0, 0.5]}, "image_std[1] is 0.0"),
        ("preprocessor_config.json", {"rescale_factor": "0.1"}, "rescale_factor"),
        ("preprocessor_config.json", {"min_tokens": True}, "min_tokens is true"),
        ("preprocessor_config.json", {"max_tokens": 8}, "max_tokens 8 is below min_tokens 16"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is false"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop is set"),
        ("preprocessor_config.json", {"resample": 2}, "resample 3"),
        ("processor_config.json", {"fps": 0}, "fps is 0"),
        ("processor_config.json", {"max_frames": 16}, "max_frames is 180 in config.json and 16 in processor_config"),
        ("processor_config.json", {"image_processor": {"image_mean": [0.4, 0.5, 0.5]}}, "image_mean is [0.5"),
        ("config.json", {"image_token_id": 5}, "image_token_index is 603 and image_token_id is 5"),
        ("config.json", {"vision_encoder": "a\0b"}, "vision_encoder"),
        ("config.json", {"vision_encoder": 5}, "vision_encoder is 5"),
        ("config.json", {"max_frames": -1}, "max_frames"),
        ("config.json", {"vision_encoder_config": {"num_hidden_layers": 2**40}}, "num_hidden_layers"),
        ("config.json", {"vision_encoder_config": {"num_hidden_layers": 900}}, "hold 2 layers of the encoder"),
    ],
)
def test_what_describes_pictures_is_typed_and_said_once(
    tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = copied_vlm(tmp_path)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, note=[].append)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_image_processor_is_read_from_where_transformers_5_writes_it(tmp_path: Path) -> None:
    folder = copied_vlm(tmp_path)
    path = folder / "preprocessor_config.json"
    nested = {**json.loads(path.read_text()), "image_mean": [0.1, 0.2, 0.3]}
    path.unlink()
    text("processor_config.json", {"fps": 1, "image_processor": nested})(folder)
    notes: list[str] = []
    assert Checkpoint.open(folder, note=notes.append).config.image.image_mean == (0.1, 0.2, 0.3)
    assert not any("preprocessor_config" in line for line in notes)


def test_two_descriptions_of_an_encoder_must_agree(tmp_path: Path) -> None:
    folder = copied_vlm(tmp_path)
    encoder = Path(shutil.copytree(VLM.parent / "tiny-penguin-encoder", tmp_path / "tiny-penguin-encoder"))
    embedded = json.loads((encoder / "config.json").read_text())
    config(vision_encoder_config=embedded)(folder)
    Checkpoint.open(folder, note=[].append)
    config(vision_encoder_config={**embedded, "rope_theta": 100.0})(folder)
    with pytest.raises(CheckpointError, match="describe two different encoders"):
        Checkpoint.open(folder, note=[].append)


def test_a_file_written_again_between_header_and_tensor_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """The byte ranges of the old header would lie over other tensors of the new file."""
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    checkpoint = Checkpoint.open(folder, note=[].append)
    weights(half)(folder)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        checkpoint.load()


@pytest.mark.parametrize("name", ["model.x\x1b[2J.lora_A.weight", "a\nb", "\x00", "", "x" * 1000, "a\u2028b"])
def test_a_name_cannot_write_its_own_messages(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    put(name, torch.ones(2))(folder)
    with pytest.raises(CheckpointError, match="the name of a tensor is") as caught:
        ours(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["hidden_act", "quantization_config", "model_type", "rope_scaling", "layer_types"])
def test_nor_can_a_setting(bases: dict[str, Path], tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(bases["qwen3"], tmp_path / "model"))
    bad = "\x1b[2J\nall is well"
    values = {"quantization_config": {"quant_method": bad}, "rope_scaling": {"type": bad}, "layer_types": [bad] * 2}
    config(**{key: values.get(key, bad)})(folder)
    with pytest.raises(CheckpointError) as caught:
        ours(folder)
    assert str(caught.value).isprintable()
