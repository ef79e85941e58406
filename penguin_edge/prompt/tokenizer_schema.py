"""Rules for `tokenizer.json`: the kinds of steps that published tokenizers have, and what each of them must hold.

The library that reads the file ends in a panic for some files that it takes: it prints a trace, at times only at the
first text. So the file is checked as data before the library sees it. What the library itself refuses in words is left
to it.

| part           | what is checked beside the kinds                                                       |
|----------------|----------------------------------------------------------------------------------------|
| model          | a vocabulary that is not empty and holds the token for what is unknown                 |
| normalizer     | a pattern that matches no empty text; a table of characters whose places are inside it |
| post_processor | a template that holds the text once                                                    |
| decoder        | one that strips at one end alone                                                       |
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from penguin_edge.schema import LARGEST, Free, Maybe, Record, Rows, Rule, SchemaError, Table, Text, Whole


@dataclass(frozen=True)
class Kinds:
    """An object whose `type` chooses its rule, or a `Sequence` of such objects."""

    rules: Mapping[str, Rule]
    several: str
    """The field of a `Sequence` that lists its steps."""

    def check(self, value: Any, where: str) -> None:
        """Refuse a kind that is not listed, or one that breaks its rule.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        Record({"type": Text(words=("Sequence", *self.rules))}, open=True).check(value, where)
        if value["type"] == "Sequence":
            Record({self.several: Rows(self, most=64)}, open=True).check(value, where)
        else:
            self.rules[value["type"]].check(value, where)


@dataclass(frozen=True)
class Filled:
    """A list or an object that is not empty; its entries are the library's to check, which does so in words."""

    kind: type[list[Any]] | type[dict[Any, Any]]

    def check(self, value: Any, where: str) -> None:
        """Refuse what is empty or of another kind.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        if not isinstance(value, self.kind) or not value:
            raise SchemaError(f"{where} is {str(value)[:40]!r}, wanted a {self.kind.__name__} that is not empty")


@dataclass(frozen=True)
class Charsmap:
    """The table of a `Precompiled` normalizer in base64: a double-array trie, and texts that end in NUL.

    | bytes   | content                                                                     |
    |---------|-----------------------------------------------------------------------------|
    | 4       | size of the trie, little-endian                                             |
    | size    | units of 32 bits: label, where the next units begin, whether one is a value |
    | to the end | texts, in UTF-8; a value is the place of one                             |
    """

    def check(self, value: Any, where: str) -> None:
        """Refuse a table in which a text could lead to a place outside.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        Text(longest=LARGEST).check(value, where)
        try:
            whole = self._whole(base64.b64decode(value, validate=True))
        except ValueError:  # no base64, or texts that are no UTF-8
            whole = False
        if not whole:
            raise SchemaError(f"{where} is damaged, wanted a trie and its texts as SentencePiece writes them")

    @staticmethod
    def _whole(data: bytes) -> bool:
        size = int.from_bytes(data[:4], "little")
        texts = data[4 + size :]
        if not size or size % 4 or len(data) < 4 + size or not texts.endswith(b"\0"):
            return False
        texts.decode()
        units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
        places = np.flatnonzero(units >> 31 == 0)
        inner = units[places]
        begins = places ^ (inner >> 10 << ((inner & 0x200) >> 6))
        if ((begins | 0xFF) >= len(units)).any():
            return False
        values = units[begins[inner & 0x100 != 0]] & 0x7FFFFFFF
        if (values >= len(texts)).any():
            return False
        continued = np.frombuffer(texts, np.uint8)[values] & 0xC0 == 0x80
        return not continued.any()


@dataclass(frozen=True)
class Template:
    """The pieces of a template: the text once, and special tokens."""

    def check(self, value: Any, where: str) -> None:
        """Refuse a template without the text, with it twice, or with a second text.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        Rows(Table(Text(words=("Sequence", "SpecialToken")), Record({"id": Free()}, open=True)), most=64).check(
            value, where
        )
        texts = [piece["Sequence"]["id"] for piece in value if "Sequence" in piece]
        if texts != ["A"]:
            raise SchemaError(f"{where} holds the texts {str(texts)[:40]}, wanted the text A once")


@dataclass(frozen=True)
class Model:
    """The model by its `type`; a file without one is a BPE, as the first tokenizers were saved."""

    def check(self, value: Any, where: str) -> None:
        """Refuse a model that cannot give ids to every text.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        Record({}, {"type": Text(words=("BPE", "Unigram", "WordPiece", "WordLevel"))}, open=True).check(value, where)
        kind = value.get("type", "BPE")
        if kind == "Unigram":
            Record({"vocab": Filled(list), "unk_id": Whole()}, open=True).check(value, where)
            Whole(0, len(value["vocab"]) - 1).check(value["unk_id"], f"{where}.unk_id")
            return
        token: Rule = Text() if kind != "BPE" else Maybe(Text())
        vocabulary: dict[str, Rule] = {"vocab": Filled(dict)}
        Record(
            vocabulary if kind == "BPE" else {**vocabulary, "unk_token": token},
            {"unk_token": token, "continuing_subword_prefix": Maybe(Text())},
            open=True,
        ).check(value, where)
        # A BPE of all bytes never asks for it, and published ones name tokens that stand elsewhere.
        if kind != "BPE" and value["unk_token"] not in value["vocab"]:
            raise SchemaError(f"{where}.unk_token is {value['unk_token'][:40]!r}, wanted a token of its vocabulary")
        prefix: str = (value.get("continuing_subword_prefix") or "") if kind == "BPE" else ""
        merges = value.get("merges")
        for merge in merges if prefix and isinstance(merges, list) else ():
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(parts, list) or not parts or not str(parts[-1]).startswith(prefix):
                raise SchemaError(
                    f"{where}.merges has {str(merge)[:40]!r}, wanted a second part that begins with the "
                    f"continuing_subword_prefix {prefix[:40]!r}"
                )


@dataclass(frozen=True)
class Strip:
    """A decoder that strips characters at one end of a token; the library cannot strip a whole token from both."""

    def check(self, value: Any, where: str) -> None:
        """Refuse one that strips at both ends.

        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        Record({"start": Whole(), "stop": Whole()}, open=True).check(value, where)
        if value["start"] and value["stop"]:
            raise SchemaError(f"{where} strips at both ends, wanted start or stop to be 0")


ITEM = r"(?:[^\W_]|[ \"'`,;:!_▁-]|\\[\\.+*?()\[\]{}|^$nrts])(?:\{[1-9][0-9]*(?:,[0-9]*)?\}|\+)?"
PATTERN = Record(
    {},
    {
        "String": Text(pattern=r"(?s:.+)", called="a string that is not empty"),
        "Regex": Text(
            pattern=f"(?:{ITEM})+",
            called="an expression of plain characters and repetitions, which matches no empty text",
        ),
    },
)
REPLACE = Record({"pattern": PATTERN}, open=True)
ANY = Record({}, open=True)


def _of(*names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, ANY)


NORMALIZER = Kinds(
    {
        **_of("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "ByteLevel"),
        "Replace": REPLACE,
        "Prepend": Record({"prepend": Text(pattern=r"(?s:.+)", called="a string that is not empty")}, open=True),
        "Precompiled": Record({"precompiled_charsmap": Charsmap()}, open=True),
    },
    "normalizers",
)
PRE_TOKENIZER = Kinds(
    {
        **_of("ByteLevel", "Split", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
        **_of("BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"),
    },
    "pretokenizers",
)
POST_PROCESSOR = Kinds(
    {
        **_of("ByteLevel", "BertProcessing", "RobertaProcessing"),
        "TemplateProcessing": Record({"single": Template()}, open=True),
    },
    "processors",
)
DECODER = Kinds(
    {
        **_of("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece", "BPEDecoder"),
        "Replace": REPLACE,
        "Strip": Strip(),
    },
    "decoders",
)
TOKENIZER = Record(
    {"model": Model()},
    {
        "normalizer": Maybe(NORMALIZER),
        "pre_tokenizer": Maybe(PRE_TOKENIZER),
        "post_processor": Maybe(POST_PROCESSOR),
        "decoder": Maybe(DECODER),
    },
    open=True,
)
"""What `tokenizer.json` must be; other fields are the library's to check."""
