"""Chat format and tokenizer: text stays text, ids stream back to the same characters."""

from __future__ import annotations

import base64
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER, Checkpoint
from penguin_edge.prompt.chat import END, IMAGE, START, as_text, render
from penguin_edge.prompt.tokenizer import PROBE, TextStream, Tokenizer

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


def test_a_tokenizer_that_was_trained_with_dropout_gives_the_same_ids_each_time(tmp_path: Path) -> None:
    text = "The same text, and a long one at that, " * 4
    opened = opened_with(tmp_path, model={**DATA["model"], "dropout": 0.5})
    copy = pickle.loads(pickle.dumps(opened))
    for _ in range(3):
        assert opened.encode(text) == TOKENIZER.encode(text) == copy.encode(text)


DATA = json.loads(DEFAULT_TOKENIZER.read_text())
BPE: dict[str, Any] = DATA["model"]
PIECES = [[token, -1.0] for token in BPE["vocab"]]


def opened_with(folder: Path, **changes: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps({**DATA, **changes}))
    return Tokenizer.open(folder / "tokenizer.json", image_token_id=-1, vocab_size=640)


def template(*texts: str) -> dict[str, Any]:
    single = [{"Sequence": {"id": text, "type_id": 0}} for text in texts]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


def replacing(**pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": "x"}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no table": ({"normalizer": charsmap(b"")}, "precompiled_charsmap is damaged"),
    "no base64": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "charsmap is damaged"),
    "a table cut off": ({"normalizer": charsmap(b"\0\1\0\0" + bytes(8))}, "charsmap is damaged"),
    "a table of one place": ({"normalizer": charsmap(b"\4\0\0\0" + bytes(5))}, "charsmap is damaged"),
    "in a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, charsmap(b"")]}},
        "normalizers[1].precompiled_charsmap is damaged",
    ),
    "replaces nothing": ({"normalizer": replacing(String="")}, "pattern.String"),
    "replaces an empty match": ({"normalizer": replacing(Regex="a*")}, "pattern.Regex"),
    "replaces what begins": ({"normalizer": replacing(Regex="^")}, "pattern.Regex"),
    "prepends nothing": ({"normalizer": {"type": "Prepend", "prepend": ""}}, "prepend"),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
    "no kind": ({"pre_tokenizer": {"length": 0}}, "pre_tokenizer has no type"),
    "a template of another text": ({"post_processor": template("B")}, "wanted the text A once"),
    "a template without text": ({"post_processor": template()}, "wanted the text A once"),
    "strips at both ends": (
        {"decoder": {"type": "Strip", "content": "h", "start": 1, "stop": 1}},
        "decoder strips at both ends",
    ),
    "no words": ({"model": {**BPE, "vocab": {}, "merges": []}, "added_tokens": []}, "model.vocab"),
    "no model": ({"model": None}, "model is null"),
    "words, no unknown": ({"model": {"type": "WordLevel", "vocab": BPE["vocab"], "unk_token": "[UNK]"}}, "'[UNK]'"),
    "pieces of words, no unknown": (
        {"model": {"type": "WordPiece", "vocab": BPE["vocab"], "unk_token": "[UNK]"}},
        "'[UNK]'",
    ),
    "pieces, no unknown": ({"model": {"type": "Unigram", "vocab": PIECES, "unk_id": None}}, "unk_id is null"),
    "pieces, unknown outside": ({"model": {"type": "Unigram", "vocab": PIECES, "unk_id": 9999}}, "unk_id is 9999"),
    "no pieces": ({"model": {"type": "Unigram", "vocab": [], "unk_id": 0}}, "model.vocab"),
    "BPE, no unknown": (
        {"model": {**BPE, "vocab": {"a": 0}, "merges": [], "unk_token": "nope"}, "pre_tokenizer": None},
        "cannot encode a text",
    ),
    "a prefix that merges lack": ({"model": {**BPE, "continuing_subword_prefix": "##"}}, "model.merges"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_would_fail_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    changes, says = BROKEN[name]
    with pytest.raises(CheckpointError) as caught:
        opened_with(tmp_path, **changes)
    assert says in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": replacing(String=" ")},
        {"normalizer": replacing(Regex=" {2,}")},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}]}},
        {"post_processor": template("A")},
        {"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}},
        {"model": {**BPE, "unk_token": "<|elsewhere|>"}},
        {"model": {key: value for key, value in BPE.items() if key != "type"}},
        {"model": {"type": "Unigram", "vocab": PIECES, "unk_id": 0}},
    ],
)
def test_steps_of_published_tokenizers_are_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    opened = opened_with(tmp_path, **changes)
    opened.decode(opened.encode("Some text,  and 漢字 é"))


def test_a_table_of_sentencepiece_is_taken_whole_and_refused_damaged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentences = iter([f"some words and {number}" for number in range(200)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=written, vocab_size=30, minloglevel=9
    )
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    table: bytes = model.normalizer_spec.precompiled_charsmap
    opened = opened_with(tmp_path, normalizer=charsmap(table))
    assert opened.encode("\uff46\uff55\uff4c\uff4c \ufb01") == TOKENIZER.encode("full fi")
    size = int.from_bytes(table[:4], "little")
    capfd.readouterr()
    for damaged in (
        table[: 4 + size // 2],
        table[:-1] + b"x",
        table[: 4 + size] + b"\0",
        table[:4] + b"\xff\xfe\xff\x7f" + table[8:],
        bytes(3) + b"\1" + table[4:],
        table[:4] + bytes(size // 4 * 4)[:-4] + b"\0\xff\xff\x7f" + table[4 + size :],
    ):
        with pytest.raises(CheckpointError, match="charsmap is damaged"):
            opened_with(tmp_path, normalizer=charsmap(damaged))
    assert capfd.readouterr().err == ""


def test_a_text_that_the_tokenizer_fails_at_is_one_sentence(tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate(sorted({*PROBE, "b"}))}
    model = {**BPE, "vocab": letters, "merges": [], "unk_token": "nope"}
    opened = opened_with(tmp_path, model=model, pre_tokenizer=None, added_tokens=[])
    assert opened.encode("b") == [letters["b"]]
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot encode a text \(Unk token"):
        opened.encode("bq")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="Unicode"):
        TOKENIZER.encode("\ud800")
