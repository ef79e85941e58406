"""Checkpoints: every published form loads, what is saved loads again bit for bit, damage is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penguin_edge.config import PRESETS, PenguinConfig, TextConfig
from penguin_edge.errors import CheckpointError, SettingError
from penguin_edge.model.checkpoint import DEFAULT_IDS, Checkpoint, meta_model, save
from penguin_edge.model.penguin import PARTS
from penguin_edge.model.weights import published_name

VLM = Path(__file__).parents[1] / "golden" / "vlm"
QUIET = {"note": lambda line: None}


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = dict(a.named_parameters(remove_duplicate=False)), dict(b.named_parameters(remove_duplicate=False))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The recorded checkpoint without its neighbour, to be changed by a test."""
    return Path(shutil.copytree(VLM, tmp_path / "vlm"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("name", "count"), [("2b", 2_167_941_120), ("8b", 8_652_785_664)])
def test_presets_have_the_published_parameter_counts(name: str, count: int) -> None:
    assert sum(p.numel() for p in meta_model(PRESETS[name]).parameters()) == count


def test_encoder_prefixes_are_all_read(copy: Path) -> None:
    wanted = Checkpoint.open(copy, **QUIET).load()
    tensors = load_file(copy / "model.safetensors")
    for prefix in ("model.vision_encoder.", "vision_encoder.", ""):
        renamed = {name.replace("model.vision_encoder.vision_encoder.", prefix): t for name, t in tensors.items()}
        save_file(renamed, copy / "model.safetensors")
        same(Checkpoint.open(copy, **QUIET).load(), wanted)


def test_missing_encoder_configuration_is_read_from_shapes(copy: Path) -> None:
    notes: list[str] = []
    found = Checkpoint.open(copy, note=notes.append).config.vision
    assert found == Checkpoint.open(VLM, **QUIET).config.vision
    assert any("shapes" in note for note in notes)


def test_embedded_encoder_configuration(copy: Path) -> None:
    embedded = json.loads((VLM.parent / "tiny-penguin-encoder" / "config.json").read_text())
    edit_config(copy, vision_encoder=None, mm_vision_encoder=None, vision_encoder_config=embedded)
    same(Checkpoint.open(copy, **QUIET).load(), Checkpoint.open(VLM, **QUIET).load())


def test_training_leftovers_are_ignored_with_one_note(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    extra = {
        "model.vision_encoder_teacher.vision_encoder.encoder.norm.weight": torch.ones(72),
        "model.vision_distill_layer.weight": torch.ones(72, 64),
        "model.audio_projector.readout.0.weight": torch.ones(4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    }
    save_file({**tensors, **extra}, copy / "model.safetensors")
    notes: list[str] = []
    same(Checkpoint.open(copy, note=notes.append).load(), Checkpoint.open(VLM, **QUIET).load())
    assert sum("ignored 4 tensors" in note for note in notes) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [10**9, 300_000])
def test_saved_checkpoints_load_bit_for_bit(tmp_path: Path, tied: bool, dtype: torch.dtype, shard: int) -> None:
    config = dataclasses.replace(
        PRESETS["tiny"], text=dataclasses.replace(PRESETS["tiny"].text, tie_word_embeddings=tied), **DEFAULT_IDS
    )
    source = Checkpoint("tiny", config, Checkpoint.open("tiny", **QUIET).tokenizer)
    model = source.load(dtype=dtype)
    save(model, tmp_path / "out", source.tokenizer, max_shard_bytes=shard)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard < 10**6)
    again = Checkpoint.open(tmp_path / "out", **QUIET)
    assert again.config == config and again.notes == []
    same(again.load(), model)
    assert (again.load().decoder.lm_head.weight is again.load().embedding.weight) is False


def test_tied_head_is_shared_and_parts_load_alone() -> None:
    model = Checkpoint.open(VLM, **QUIET).load()
    assert model.decoder.lm_head.weight is model.embedding.weight
    alone = Checkpoint.open(VLM, **QUIET).load(("decoder",))
    assert alone.encoder is None and torch.equal(alone.decoder.lm_head.weight, model.embedding.weight)


def test_preset_parts_do_not_depend_on_what_else_is_loaded() -> None:
    whole, part = Checkpoint.open("tiny", **QUIET).load(), Checkpoint.open("tiny", **QUIET).load(("decoder",))
    same(whole.decoder, part.decoder)
    other = Checkpoint.open("tiny", seed=1, **QUIET).load(("decoder",))
    assert not torch.equal(other.decoder.lm_head.weight, part.decoder.lm_head.weight)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_text_models_agree_with_transformers(tmp_path: Path, kind: str) -> None:
    """A second oracle: logits within 1e-4 of transformers' own model (another attention implementation, fp32)."""
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind == "llama",
    }
    if kind == "qwen3":
        oracle = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text, head_dim=16))
    else:
        oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, rope_theta=10_000.0))
    torch.manual_seed(0)
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    oracle.eval().save_pretrained(tmp_path / "text")
    model = Checkpoint.open(tmp_path / "text", **QUIET).load()
    assert model.config.text.qk_norm == (kind == "qwen3") and model.config.vision is None
    ids = torch.randint(0, 320, (2, 40))
    with torch.no_grad():
        wanted = oracle(ids).logits
        got = model.decoder.logits(model(ids), torch.arange(40))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_loading_peaks_below_a_fifth_above_the_weights(tmp_path: Path) -> None:
    """Measured in a process of its own, at a size where the interpreter's own growth is small beside the weights."""
    text = TextConfig(32_000, 1024, 3072, 8, 8, 4, 128)
    config = PenguinConfig(vision=None, text=text, image_token_id=-1, eos_token_ids=(600,), pad_token_id=601)
    source = Checkpoint("preset", config, Checkpoint.open("tiny", **QUIET).tokenizer)
    model = source.load(dtype=torch.bfloat16)
    save(model, tmp_path / "big", source.tokenizer)
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    code = (
        "import resource, sys, torch\n"
        "from penguin_edge.model.checkpoint import Checkpoint\n"
        "Checkpoint.open('tiny', note=lambda line: None).load()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = Checkpoint.open(sys.argv[1], note=lambda line: None).load(dtype=torch.bfloat16)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.2 * size


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = published_name("decoder.layers.1.mlp.up_proj.weight")
    if how == "missing tensor":
        del tensors[name]
        save_file(tensors, weights)
    elif how == "misshapen tensor":
        tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, weights)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 4096)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "other model":
        edit_config(folder, model_type="bert")
    elif how == "rope scaling":
        edit_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    elif how == "odd projector":
        edit_config(folder, vision_projector_type="identity")
    elif how == "odd projector, embedded":
        edit_config(folder, vision_projector_type="mlp3x_gelu", vision_encoder_config={})
    elif how == "quantized":
        tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, weights)
    elif how == "odd mean":
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5]}))
    elif how == "missing shard":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {name: "model-00001-of-00002.safetensors"}})
        )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing tensor", "up_proj.weight [256, 96] is missing"),
        ("misshapen tensor", "[255, 96], wanted [256, 96]"),
        ("truncated", "cut off"),
        ("garbage", "not a readable safetensors"),
        ("empty", "not a readable safetensors"),
        ("no weights", "no *.safetensors"),
        ("no config", "config.json"),
        ("broken config", "JSON"),
        ("other model", "model_type 'bert'"),
        ("rope scaling", "rope scaling"),
        ("odd projector", "identity"),
        ("odd projector, embedded", "mlp3x_gelu"),
        ("quantized", "int8"),
        ("odd mean", "image_mean"),
        ("missing shard", "shard"),
    ],
)
def test_damage_is_named(copy: Path, how: str, says: str) -> None:
    damage(copy, how)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(copy, **QUIET).load()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_partial_encoder_configuration_is_completed_from_shapes(copy: Path) -> None:
    edit_config(copy, vision_encoder=None, mm_vision_encoder=None, vision_encoder_config={"rms_norm_eps": 1e-6})
    same(Checkpoint.open(copy, **QUIET).load(), Checkpoint.open(VLM, **QUIET).load())


def test_a_null_stop_token_falls_back_to_the_model_configuration(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Checkpoint.open(copy, **QUIET).config.eos_token_ids == (600,)


def test_unknown_source_lists_what_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"preset \(2b, 8b, nano, tiny\)"):
        Checkpoint.open("no-such-thing")


def test_a_hub_id_offline_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from penguin_edge.model.checkpoint import Checkpoint\n"
        "from penguin_edge.errors import CheckpointError\n"
        "try: Checkpoint.open('tencent/Penguin-VL-2B-that-is-not-cached')\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be downloaded" in done.stdout and len(done.stdout.strip().splitlines()) == 1


def test_parts_cover_the_model() -> None:
    whole = sum(p.numel() for p in meta_model(PRESETS["8b"]).parameters())
    assert sum(p.numel() for part in PARTS for p in meta_model(PRESETS["8b"], (part,)).parameters()) == whole


def test_presets_of_published_shapes_have_weights_in_the_published_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "2b", PRESETS["tiny"])
    checkpoint = Checkpoint.open("2b", **QUIET)
    assert checkpoint.dtype == torch.bfloat16 and Checkpoint.open("tiny", **QUIET).dtype == torch.float32
    # In whatever dtype it is asked for, it is the same weight.
    stored, wide = (checkpoint.tensor("embedding.weight", (8, 4), dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(stored.float(), wide)


def test_the_environment_raises_the_limit_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = json.loads(json.dumps(PRESETS["2b"].to_json()))
    deep["text"]["num_hidden_layers"] = 2000
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 2000, .*1 to 1,024.*PENGUIN_EDGE_MAX_LAYERS"):
        PenguinConfig.from_json(deep)
    monkeypatch.setenv("PENGUIN_EDGE_MAX_LAYERS", "2000")
    assert PenguinConfig.from_json(deep).text.num_hidden_layers == 2000
    for wrong in ("0", "-5", "many", "9" * 50, "1e3", ""):
        monkeypatch.setenv("PENGUIN_EDGE_MAX_LAYERS", wrong)
        says = r"^PENGUIN_EDGE_MAX_LAYERS in the environment is .*, wanted a whole number, .*; set one, or unset it$"
        for read in (lambda: PenguinConfig.from_json(deep), lambda: Checkpoint.open("tiny", **QUIET)):
            with pytest.raises(SettingError, match=says):
                read()


@pytest.mark.parametrize("source", ["tiny", "nano", "folder"])
def test_a_limit_of_layers_that_refuses_is_what_the_message_is_about(
    copy: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("PENGUIN_EDGE_MAX_LAYERS", "1")
    with pytest.raises(
        SettingError, match=r"num_hidden_layers is \d, and PENGUIN_EDGE_MAX_LAYERS .* 1; raise it, or u"
    ):
        Checkpoint.open(copy if source == "folder" else source, **QUIET)
