"""The tokenizer: text and pieces of a prompt to ids, and ids to text as they come."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from penguin_edge.config import PenguinConfig
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.files import MAX_BYTES, parse_json
from penguin_edge.prompt.chat import END, IMAGE, START, Ids, Piece, Special
from penguin_edge.prompt.tokenizer_schema import TOKENIZER

PROBE = "Any text: 12 é\n"
"""Encoded once when a tokenizer is opened, so that one that can encode nothing is refused there."""
SHORT, REMEMBERED = 32, 1024
"""Texts of at most so many characters, such as time stamps, are remembered: a stream renders them with every frame."""


class HasTokenizer(Protocol):
    """A folder with a model and its tokenizer: a checkpoint or a bundle."""

    @property
    def tokenizer(self) -> Path:
        """The path of `tokenizer.json`."""
        ...

    @property
    def config(self) -> PenguinConfig:
        """The model's configuration."""
        ...


OTHER = "use tokenizer.json of the same checkpoint"


@contextlib.contextmanager
def _told(what: str, advice: str) -> Iterator[None]:
    """Say in one sentence what the library, which is Rust, raises: bare `Exception`, or a panic, which is none.

    Raises:
        CheckpointError: either.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} ({reason}); {advice}") from error


class Tokenizer:
    """The checkpoint's `tokenizer.json`, with the image token added where the file lacks it."""

    def __init__(self, inner: FastTokenizer, image_token_id: int, source: str) -> None:
        self._inner = inner
        # Settings of training, which a saved tokenizer may carry.
        self._inner.no_truncation()
        self._inner.no_padding()
        if getattr(self._inner.model, "dropout", None) is not None:
            self._inner.model.dropout = None
        # Special tokens are written by the template only; text that looks like one stays text.
        self._inner.encode_special_tokens = True
        self._special_ids = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        self.image_token_id = image_token_id
        self.source = source
        self._known: dict[str, list[int]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._inner.encode_special_tokens = True  # not part of what the library pickles

    @classmethod
    def of(cls, source: HasTokenizer) -> Tokenizer:
        """Read the tokenizer of a checkpoint or of a bundle.

        Raises:
            CheckpointError: as `open`.
        """
        config = source.config
        return cls.open(source.tokenizer, image_token_id=config.image_token_id, vocab_size=config.text.vocab_size)

    @classmethod
    def open(cls, path: str | Path, *, image_token_id: int, vocab_size: int) -> Tokenizer:
        """Read a tokenizer and check that it belongs to the model.

        Args:
            image_token_id: the id that the model expects for `<image>`; -1 for a text-only model.
        Raises:
            CheckpointError: missing, unreadable, with steps that no published tokenizer has, without the chat tokens,
                or with ids outside the model's vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: the tokenizer is missing; copy tokenizer.json of the same checkpoint there")
        with _told(f"{path}: cannot be read as a tokenizer", "copy tokenizer.json again"):
            with path.open("rb") as stream:  # a path may hold bytes that are no UTF-8
                data = stream.read(MAX_BYTES + 1)
            parse_json(data, "its content", rule=TOKENIZER)
            inner = FastTokenizer.from_buffer(data)
        if image_token_id >= 0:
            if inner.token_to_id(IMAGE) is None:
                inner.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
            found = inner.token_to_id(IMAGE)
            missing = [name for name in (START, END) if inner.token_to_id(name) is None]
            if missing or found != image_token_id:
                what = (
                    f"has no {missing[0]}"
                    if missing
                    else f"has {IMAGE} as id {found}, the model wants {image_token_id}"
                )
                raise CheckpointError(f"{path}: this tokenizer {what}; use tokenizer.json of the same checkpoint")
        largest = max(inner.get_vocab(with_added_tokens=True).values())
        if largest >= vocab_size:
            raise CheckpointError(
                f"{path}: this tokenizer has ids up to {largest}, the model has {vocab_size}; use tokenizer.json "
                "of the same "
                "checkpoint"
            )
        opened = cls(inner, image_token_id, str(path))
        opened.encode(PROBE)
        return opened

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, or None."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of plain text.

        Raises:
            InputError: text that is not valid Unicode, such as half of a surrogate pair.
            CheckpointError: the tokenizer fails at this text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode ({error.reason}); wanted UTF-8") from None
        known = self._known.get(text)
        if known is None:
            with _told(f"{self.source}: cannot encode a text", OTHER):
                known = self._inner.encode(text, add_special_tokens=False).ids
            if len(text) <= SHORT:
                if len(self._known) == REMEMBERED:
                    self._known.clear()
                self._known[text] = known
        return list(known)

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            CheckpointError: the tokenizer does not have it.
        """
        found = self._inner.token_to_id(name)
        if found is None:
            raise CheckpointError(f"{self.source}: no token {name!r}; use tokenizer.json of the same checkpoint")
        return found

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a rendered conversation, image tokens repeated as often as each image needs."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                ids += self.encode(piece)
            elif isinstance(piece, Special):
                ids.append(self.special(piece.name))
            elif isinstance(piece, Ids):
                ids += piece.ids
            else:
                ids += [self.image_token_id] * piece.count
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no valid UTF-8 become U+FFFD.

        Raises:
            CheckpointError: the tokenizer fails at these ids.
        """
        with _told(f"{self.source}: cannot decode", OTHER):
            text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token_id: int, byte_of: dict[str, int]) -> bytes:
        """UTF-8 bytes of one token; none for special tokens and for ids that the vocabulary leaves free."""
        token = self._inner.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        if all(character in byte_of for character in token):
            return bytes(byte_of[character] for character in token)
        return token.encode()


def byte_characters() -> dict[int, str]:
    """The printable stand-in of each byte in a byte-level BPE vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class TextStream:
    """Turns ids into text as they come: never half of a character, and in sum what `Tokenizer.decode` gives."""

    _BYTES: ClassVar = {character: byte for byte, character in byte_characters().items()}

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that is complete after this token; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._BYTES))

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)
