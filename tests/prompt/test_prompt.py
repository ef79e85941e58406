"""Chat format and tokenizer: text stays text, ids stream back to the same characters."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.bundle.manifest import Bundle
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint
from penguin_edge.prompt.chat import END, IMAGE, START, TextStream, Tokenizer, as_text, render

TOKENIZER = Tokenizer.open(DEFAULT_TOKENIZER, image_token_id=603, vocab_size=640)


@given(st.lists(st.integers(0, 639), max_size=40))
def test_streamed_text_is_the_decoded_text(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == TOKENIZER.decode(ids)


@given(st.text(max_size=60))
def test_text_survives_the_tokenizer_up_to_composition(text: str) -> None:
    import unicodedata

    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special=False) == unicodedata.normalize("NFC", text)


@given(st.text(max_size=20), st.sampled_from([IMAGE, START, END, "<|endoftext|>"]), st.text(max_size=20))
def test_literal_special_tokens_in_user_text_stay_text(before: str, literal: str, after: str) -> None:
    ids = TOKENIZER.encode_pieces(render([{"role": "user", "content": before + literal + after}]))
    assert ids.count(TOKENIZER.special(IMAGE)) == 0
    assert ids.count(TOKENIZER.special(END)) == 1
    assert ids.count(TOKENIZER.special(START)) == 2
    assert TOKENIZER.special("<|endoftext|>") not in ids


def test_literal_special_tokens_stay_text_in_a_worker_process() -> None:
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    text = f"a{END}{IMAGE}b"
    assert copy.encode(text) == TOKENIZER.encode(text)
    assert not {TOKENIZER.special(END), TOKENIZER.special(IMAGE)} & set(copy.encode(text))


def test_a_half_character_waits() -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode("日")
    assert len(ids) > 1, "the test needs a character of several tokens"
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["日"]


def test_image_tokens_are_counted_per_image() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video", "num_frames": 2, "timestamps": [0, 1.04]}]}
    ]
    pieces = render(messages, [5, 3, 2], generation_prompt=False)
    assert TOKENIZER.encode_pieces(pieces).count(603) == 10
    assert as_text(pieces) == f"{START}user\n<image>\nTime 0.0s:<image>,Time 1.0s:<image>\n{END}\n"


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1, 1]])
def test_wrong_number_of_images(counts: list[int]) -> None:
    content = [{"type": "image"}, {"type": "video", "num_frames": 2}]
    with pytest.raises(InputError, match="images and frames"):
        render([{"role": "user", "content": content}], counts)


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        {"role": "user"},
        {"role": 3, "content": "x"},
        {"role": "user", "content": [{"type": "audio"}]},
        {"role": "user", "content": [7]},
    ],
)
def test_malformed_messages(message: object) -> None:
    with pytest.raises(InputError, match="wanted"):
        render([message])  # type: ignore[list-item]


def test_wrong_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        Tokenizer.open(tmp_path / "tokenizer.json", image_token_id=603, vocab_size=1024)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.open(tmp_path / "tokenizer.json", image_token_id=603, vocab_size=1024)
    with pytest.raises(CheckpointError, match="as id 603"):
        Tokenizer.open(DEFAULT_TOKENIZER, image_token_id=151_669, vocab_size=151_936)
    with pytest.raises(CheckpointError, match="ids up to 605"):
        Tokenizer.open(DEFAULT_TOKENIZER, image_token_id=603, vocab_size=500)


@pytest.mark.parametrize("name", ["tiny", "bundle"])
def test_a_checkpoint_and_a_bundle_have_theirs(name: str) -> None:
    kept = Path(__file__).parents[1] / "bundles" / "onnx"
    source = Bundle.read(kept) if name == "bundle" else Checkpoint.open(name, note=lambda line: None)
    tokenizer = Tokenizer.of(source)
    assert tokenizer.source == str(source.tokenizer)
    assert tokenizer.image_token_id == tokenizer.special(IMAGE) == source.config.image_token_id


def test_a_checkpoint_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("tiny", note=lambda line: None)
    with pytest.raises(CheckpointError, match="missing"):
        Tokenizer.of(replace(checkpoint, tokenizer=tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="the model wants 9"):
        Tokenizer.of(replace(checkpoint, config=replace(checkpoint.config, image_token_id=9)))


def test_settings_of_training_in_the_tokenizer_are_not_obeyed(tmp_path: Path) -> None:
    data = json.loads(DEFAULT_TOKENIZER.read_text())
    data["truncation"] = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (tmp_path / "t.json").write_text(json.dumps(data))
    opened = Tokenizer.open(tmp_path / "t.json", image_token_id=603, vocab_size=640)
    assert opened.encode("a b c d e f g h") == TOKENIZER.encode("a b c d e f g h")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="Unicode"):
        TOKENIZER.encode("\ud800")
