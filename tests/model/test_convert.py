"""Language model to encoder: on the diagonal, with causal attention, the encoder still is the language model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from penguin_edge.commands.cli import main
from penguin_edge.config import PenguinConfig, TextConfig
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.files import file_hash
from penguin_edge.model import convert
from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint, read_encoder, save
from penguin_edge.model.convert import RECORD, convert_language_model, save_encoder
from penguin_edge.model.layers import full_attention
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.chat import IMAGE
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.training.initialise import initialise

GOLDEN = Path(__file__).parents[1] / "golden"
QWEN = TextConfig(64, 32, 48, 5, 4, 2, 16, rope_theta=5e4)
LLAMA = TextConfig(64, 32, 48, 3, 4, 4, 8, rope_theta=1e4, rms_norm_eps=1e-5, qk_norm=False, tie_word_embeddings=False)


def language_model(text: TextConfig = QWEN) -> PenguinModel:
    """Random, with weights of every parameter unlike their initial ones."""
    torch.manual_seed(0)
    model = PenguinModel(PenguinConfig(vision=None, text=text, eos_token_ids=(1,)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


def as_language_model(encoder: nn.Module, embeds: Tensor, causal: bool = True) -> Tensor:
    """Token embeddings in place of patches, all on the diagonal."""
    encoder.patch_embedding = nn.Identity()
    diagonal = torch.arange(embeds.shape[1])
    return encoder(embeds, diagonal, diagonal, full_attention(causal))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_on_the_diagonal_it_is_the_donor(qk_norm: bool) -> None:
    model = language_model(QWEN if qk_norm else LLAMA)
    assert model.embedding is not None and model.decoder is not None
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    encoder, config = convert_language_model(model)
    if not qk_norm:
        # The norm of q and k is the one thing that a Llama-type donor does not have.
        for block in encoder.layers:
            block.self_attn.q_norm, block.self_attn.k_norm = nn.Identity(), nn.Identity()
    with torch.no_grad():
        wanted = model.decoder(model.embedding(ids), torch.arange(17))
        got = as_language_model(encoder, model.embedding(ids))
        other = as_language_model(encoder, model.embedding(ids), causal=False)
    assert torch.equal(got, wanted)
    assert not torch.allclose(other[:, :-1], wanted[:, :-1]), "its own attention looks ahead"
    assert config.rope_theta == model.config.text.rope_theta
    assert config.rms_norm_eps == model.config.text.rms_norm_eps


@pytest.mark.parametrize(
    ("layers", "choose", "kept"),
    [
        (None, "first", [0, 1, 2, 3, 4]),
        (2, "first", [0, 1]),
        (3, "spaced", [0, 2, 4]),
        (4, "spaced", [0, 1, 3, 4]),
        (5, "spaced", [0, 1, 2, 3, 4]),
        (1, "spaced", [0]),
    ],
)
def test_the_chosen_layers_are_the_donors(layers: int | None, choose: Any, kept: list[int]) -> None:
    model = language_model()
    assert model.decoder is not None
    encoder, config = convert_language_model(model, layers=layers, choose=choose)
    assert config.num_hidden_layers == len(encoder.layers) == len(kept)
    for block, index in zip(encoder.layers, kept, strict=True):
        donor = model.decoder.layers[index].state_dict()
        assert block.state_dict().keys() == donor.keys()
        for name, value in block.state_dict().items():
            assert torch.equal(value, donor[name]), name
    assert torch.equal(encoder.norm.weight, model.decoder.norm.weight)


def test_a_donor_without_qk_norm_keeps_directions_and_usual_lengths() -> None:
    model = language_model(LLAMA)
    assert model.decoder is not None
    encoder, _ = convert_language_model(model)
    inputs = torch.randn(4000, LLAMA.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block, donor in zip(encoder.layers, model.decoder.layers, strict=True):
            for side in ("q", "k"):
                raw = getattr(donor.self_attn, f"{side}_proj")(donor.input_layernorm(inputs)).unflatten(-1, (-1, 8))
                new = getattr(block.self_attn, f"{side}_norm")(raw)
                torch.testing.assert_close(nn.functional.cosine_similarity(raw, new, dim=-1), torch.ones(4000, 4))
                lengths = [x.square().mean(-1).sqrt() for x in (raw, new)]
                assert lengths[1].std() < 1e-3 * lengths[1].mean() < lengths[0].std()
                # Both are the root mean square over 16,000 vectors; the sample's own error is below one per cent.
                assert lengths[1].mean().item() == pytest.approx(lengths[0].square().mean().sqrt().item(), rel=0.02)


def test_the_patch_embedding_starts_at_the_size_of_the_embeddings() -> None:
    model = language_model()
    assert model.embedding is not None
    encoder, _ = convert_language_model(model)
    layer = encoder.patch_embedding
    pixels = torch.randn(2000, 588, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        size = layer(pixels).square().mean().sqrt().item()
        usual = model.embedding.weight.square().mean().sqrt().item()
    assert size == pytest.approx(usual, rel=0.03)  # 18,816 weights: their own spread is below one per cent
    assert layer.weight.abs().max().item() <= 2 * usual / 588**0.5 / 0.8796 and not layer.bias.any()
    again, other = (convert_language_model(model, seed=seed)[0].patch_embedding.weight for seed in (0, 1))
    assert torch.equal(layer.weight, again) and not torch.equal(layer.weight, other)


def test_the_donor_stays_as_it_is() -> None:
    model = language_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder, _ = convert_language_model(model)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    encoder, config = convert_language_model(language_model())
    save_encoder(encoder, tmp_path / "encoder")
    read_config, read = read_encoder(tmp_path / "encoder")
    assert read_config.vision == config
    for (name, a), b in zip(encoder.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(a, b), name
    stored = load_file(tmp_path / "encoder" / "model.safetensors")
    recorded = load_file(GOLDEN / "tiny-penguin-encoder" / "model.safetensors")
    shared = {name for name in stored if ".layers." not in name or int(name.split(".")[2]) < 2}
    assert shared == set(recorded), "the names of the published files"
    assert all(stored[name].dim() == value.dim() for name, value in recorded.items())
    with pytest.raises(CheckpointError, match="not empty"):
        save_encoder(encoder, tmp_path / "encoder")


@pytest.mark.parametrize("text", [QWEN, LLAMA], ids=["qwen3", "llama"])
def test_a_folder_is_a_donor_too(tmp_path: Path, text: TextConfig) -> None:
    model = language_model(text)
    save(model, tmp_path / "donor", Checkpoint.open("tiny", note=lambda line: None).tokenizer)
    wanted, config = convert_language_model(model, layers=2)
    got, read = convert_language_model(tmp_path / "donor", layers=2)
    assert read == config
    for (name, a), b in zip(wanted.named_parameters(), got.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wanted 1 to 5"):
        convert_language_model(language_model(), layers=6)
    with pytest.raises(InputError, match="known: first, spaced"):
        convert_language_model(language_model(), choose="last")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="load both"):
        convert_language_model(PenguinModel(PenguinConfig(vision=None, text=QWEN), ("decoder",)))
    with pytest.raises(CheckpointError, match="neither a checkpoint folder"):
        convert_language_model(tmp_path / "nowhere")


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    """A language model's folder with a vocabulary that the small tokenizer fits."""
    save(language_model(dataclasses.replace(QWEN, vocab_size=640)), tmp_path / "donor", DEFAULT_TOKENIZER)
    return tmp_path / "donor"


def test_the_verb_writes_what_the_functions_make(
    donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoder"
    assert main(["convert", str(donor), "--layers", "3", "--choose", "spaced", "--seed", "7", "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and "3 of 5 blocks" in said.err
    wanted, config = convert_language_model(donor, layers=3, choose="spaced", seed=7)
    read_config, read = read_encoder(out)
    assert read_config.vision == config
    for (name, a), b in zip(wanted.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(a, b), name
    record = json.loads((out / RECORD).read_text())
    assert (record["donor"], record["layers"], record["seed"]) == (str(donor), [0, 2, 4], 7)
    assert record["fingerprint"] == Checkpoint.open(donor).fingerprint()
    assert sorted(os.listdir(out)) == sorted([*record["files"], RECORD])
    assert all(entry["sha256"] == file_hash(out / name) for name, entry in record["files"].items())
    assert sorted(os.listdir(tmp_path)) == ["donor", "encoder"]


def test_a_model_begins_with_it(donor: Path, tmp_path: Path) -> None:
    """As docs/training.md has it."""
    assert main(["convert", str(donor), "-o", str(tmp_path / "encoder")]) == 0
    with pytest.raises(CheckpointError, match="just an encoder"):
        Checkpoint.open(tmp_path / "encoder")
    answers = Checkpoint.open(donor)
    seen, encoder = read_encoder(tmp_path / "encoder")
    config = dataclasses.replace(answers.config, vision=seen.vision, image=seen.image, image_token_id=603)
    model = PenguinModel(config)
    initialise(model, seed=0)
    known = answers.load(("embedding", "decoder"), dtype=torch.float32)
    assert model.encoder and model.embedding and model.decoder and known.embedding and known.decoder
    model.encoder.load_state_dict(encoder.state_dict())
    model.embedding.load_state_dict(known.embedding.state_dict())
    model.decoder.load_state_dict(known.decoder.state_dict())
    save(model, tmp_path / "start", answers.tokenizer)
    begun = Checkpoint.open(tmp_path / "start")
    assert begun.config.vision == seen.vision and begun.config.text == answers.config.text
    assert Tokenizer.of(begun).special(IMAGE) == 603
    loaded = begun.load(dtype=torch.float32)
    assert loaded.encoder is not None and loaded.projector is not None
    for (name, a), b in zip(loaded.encoder.named_parameters(), encoder.parameters(), strict=True):
        assert torch.equal(a, b), name


def refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: object, code: int = 1) -> None:
    """One sentence, nothing on stdout."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert said.out == "" and says in said.err.splitlines()[-1] and "Traceback" not in said.err, said.err


def test_what_stands_there_stays(donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "encoder"
    assert main(["convert", str(donor), "--layers", "1", "-o", str(out)]) == 0
    refused(capsys, "exists already; choose another folder or pass --overwrite", donor, "-o", out)
    assert main(["convert", str(donor), "--layers", "2", "--overwrite", "-o", str(out)]) == 0
    assert json.loads((out / RECORD).read_text())["layers"] == [0, 1]
    (out / "notes.txt").write_text("years of work")
    refused(capsys, "notes.txt: not one of the files", donor, "--overwrite", "-o", out)
    assert (out / "notes.txt").read_text() == "years of work" and read_encoder(out)


@pytest.mark.parametrize("case", ["downloaded", "changed record", "no JSON", "a file", "the donor"])
def test_overwrite_replaces_what_a_conversion_wrote_and_nothing_else(
    donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    out = tmp_path / "encoder"
    assert main(["convert", str(donor), "--layers", "1", "-o", str(out)]) == 0
    if case == "downloaded":  # the same files, but from elsewhere
        (out / RECORD).unlink()
    elif case == "changed record":
        data = json.loads((out / RECORD).read_text())
        data["files"]["thesis.txt"] = {}
        (out / RECORD).write_text(json.dumps(data))
    elif case == "no JSON":
        (out / RECORD).write_text("letter")
    elif case == "a file":
        out = out / "model.safetensors"
    else:
        out = donor
    names = sorted(str(path) for path in tmp_path.rglob("*"))
    refused(capsys, str(out), donor, "--overwrite", "-o", out)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names


def test_an_empty_folder_is_taken_with_overwrite(donor: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    assert main(["convert", str(donor), "--overwrite", "-o", str(tmp_path / "encoder")]) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_no_half_of_a_folder_is_left(
    donor: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(convert, "save_file", stop)
    stopped = isinstance(error, KeyboardInterrupt)
    says = "stopped" if stopped else "encoder: cannot be written (No space left on device); make room"
    refused(capsys, says, donor, "-o", tmp_path / "encoder", code=130 if stopped else 1)
    assert os.listdir(tmp_path) == ["donor"]


def test_bad_options_are_named(donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "encoder"
    refused(capsys, "got 6 layers to keep, wanted 1 to 5", donor, "--layers", 6, "-o", out)
    refused(capsys, "is neither a checkpoint folder", tmp_path / "nowhere", "-o", out)
    for usage in ([str(donor)], [str(donor), "--layers", "0", "-o", str(out)], [str(donor), "--choose", "last"]):
        with pytest.raises(SystemExit) as ended:
            main(["convert", *usage])
        assert ended.value.code == 2
    assert os.listdir(tmp_path) == ["donor"]
