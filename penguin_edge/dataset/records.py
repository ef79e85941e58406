"""Training records in the published form: one JSON object per record, in a JSON array or one per line.

    {"id": "a", "image": ["a.png"], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", …

`image` lists pictures, `video` holds exactly one clip, a record without either is text. `<image>` and `<video>` in
human text say where the media stand; without any tag they come first. Turns before the first human one are dropped,
and whoever is neither human nor `system` is the assistant.

Two departures from the reference (`penguinvl/train/dataset.py`): a `system` turn stays one, also in front, where the
reference drops it or trains on it as an answer; and a record that cannot be right is refused, not replaced by another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penguin_edge.errors import InputError
from penguin_edge.files import parse_json, parse_json_at
from penguin_edge.media.places import exists, local_path, named, scheme_of, shown
from penguin_edge.prompt.chat import IMAGE, Message

ANNOTATIONS = "annotations.jsonl"
"""The file that a data set in a folder is read from."""
MAX_PATH, MAX_NAME = 4096, 255
"""Characters of a path and of each name in it, beyond which no file system here has one."""
VIDEO = "<video>"
ROLES = {"human": "user", "user": "user", "system": "system"}
FORMAT_KEYS = {"id", "image", "video", "conversations"}

_TAG = re.compile(f"({IMAGE}|{VIDEO})")

Kind = Literal["text", "image", "video"]


@dataclass(frozen=True)
class DataRecord:
    """One training conversation.

    `messages` are what `runtime.Session.converse` takes; `media` are the files that they name, in order. `extra` holds
    the keys that are not of the format. `where` is "FILE:LINE", empty for a record made in code.
    """

    id: str
    kind: Kind
    media: tuple[Path, ...]
    messages: tuple[Message, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def name(self) -> str:
        """How an error calls it."""
        return f"{self.where}: record {self.id!r}" if self.where else f"record {self.id!r}"


@dataclass(frozen=True)
class MediaFolder:
    """Where the media of records lie. Annotations are input: unless allowed, they name nothing outside of `root`."""

    root: Path
    allow_outside: bool = False
    _real: dict[Path, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """The file that a record names, by a path relative to the folder or an absolute one.

        Raises:
            InputError: no name of a file here, or one of a file elsewhere, links followed.
        """
        if scheme_of(name) == "data":
            raise InputError(f"{shown(name)}: a data: address; save the picture as a file, and name that")
        path = self.root / local_path(name)
        if len(name) > MAX_PATH or any(len(part) > MAX_NAME for part in path.parts):
            raise InputError(f"{shown(name)}: is too long to be the name of a file; check the name")
        try:
            inside = self.allow_outside or self._resolved(path).is_relative_to(self._folder(self.root))
        except ValueError as error:
            raise InputError(f"{shown(name)}: cannot be a file ({error}); check the name") from error
        if not inside:
            raise InputError(
                f"{shown(name)}: lies outside {named(self.root)}; copy it there, or allow it with --allow-outside"
            )
        return path

    def _resolved(self, path: Path) -> Path:
        if path.name in ("", "..") or os.path.islink(path):
            return Path(os.path.realpath(path))
        return self._folder(path.parent) / path.name

    def _folder(self, folder: Path) -> Path:
        """A folder with its links followed: once, since a data set has few folders for many files."""
        if folder not in self._real:
            self._real[folder] = Path(os.path.realpath(folder))
        return self._real[folder]


def read_records(path: Path, media_root: Path | None = None, *, allow_outside: bool = False) -> list[DataRecord]:
    """All records of a file, in order.

    Args:
        path: a JSON array or JSON lines (decided by content), or a folder with `annotations.jsonl`.
        media_root: folder that media paths are relative to; default: the file's own.
        allow_outside: take media outside that folder too.
    Raises:
        InputError: an unreadable file, a record that breaks the format or names media outside the folder; the message
            names file and line. Whether the media exist is not looked at, see `missing_media`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ANNOTATIONS
    root = MediaFolder(path.parent if media_root is None else Path(media_root), allow_outside)
    records = [_record(item, f"{named(path)}:{line}", path.name, line, root) for line, item in _objects(path)]
    if not records:
        raise InputError(f"{named(path)}: no record in it; wanted one JSON object per line, or a JSON array of them")
    return records


def missing_media(records: Iterable[DataRecord]) -> list[str]:
    """One sentence for each media file that does not exist; nothing is opened."""
    known: dict[Path, bool] = {}
    found = []
    for record in records:
        for path in record.media:
            if path not in known:
                known[path] = exists(path)
                if not known[path]:
                    found.append(
                        f"{named(record.name)}: {named(path)} does not exist; check the path and the media folder"
                    )
    return found


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Every JSON value of a file with the line that it begins on."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{named(path)}: no such file; wanted JSON or JSON lines, or a folder with {ANNOTATIONS}"
        ) from None
    except OSError as error:
        raise InputError(f"{named(path)}: cannot be read ({error.strerror}); check the file") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{named(path)}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    yield from _array(path, text) if text.lstrip()[:1] == "[" else _lines(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{named(path)}:{number}", advice="wanted one object per line")


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        item, at = parse_json_at(text, at, f"{named(path)}:{line}", advice="wanted an array of objects")
        yield line, item
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise InputError(
                f"{named(path)}:{line}: not JSON (no comma or ] after a record); wanted an array of objects"
            )
    if text[at + 1 :].strip():
        line += text.count("\n", counted, _skip(text, at + 1))
        raise InputError(f"{named(path)}:{line}: text after the end of the array; wanted one array of objects")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _record(item: Any, where: str, name: str, line: int, root: MediaFolder) -> DataRecord:
    if not isinstance(item, dict):
        raise InputError(f"{where}: a record is {type(item).__name__}, wanted a JSON object")
    images, clips = (_paths(item, key, where, root) for key in ("image", "video"))
    if images and clips:
        raise InputError(f"{where}: a record has both image and video; make two records of it")
    if len(clips) > 1:
        raise InputError(f"{where}: a record has {len(clips)} videos, wanted one; make one record for each")
    kind: Kind = "image" if images else "video" if clips else "text"
    messages = _messages(_turns(item, where), images, clips, where)
    extra = {key: value for key, value in item.items() if key not in FORMAT_KEYS}
    given = item.get("id")
    return DataRecord(
        f"{name}:{line}" if given is None else str(given), kind, (*images, *clips), messages, extra, where
    )


def _paths(item: dict[str, Any], key: str, where: str, root: MediaFolder) -> tuple[Path, ...]:
    value = item.get(key)
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where}: {key} is {str(value)[:60]!r}, wanted a list of paths")
    try:
        return tuple(root.path(name) for name in names)
    except InputError as error:
        raise InputError(f"{where}: {key} {error}") from error


def _turns(item: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(role, text) of every turn, those before the first human one dropped; questions and answers alternate."""
    value = item.get("conversations")
    if not isinstance(value, list) or not value:
        raise InputError(f'{where}: no conversations; wanted a list of {{"from": "human" or "gpt", "value": …}}')
    turns = []
    for turn in value:
        fields = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(fields[0], str) or not isinstance(fields[1], str):
            raise InputError(f'{where}: a turn is {str(turn)[:60]!r}, wanted {{"from": "human" or "gpt", "value": …}}')
        turns.append((ROLES.get(fields[0], "assistant"), fields[1]))
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise InputError(f"{where}: no question; wanted human and gpt in turns")
    turns = [turn for turn in turns[:first] if turn[0] == "system"] + turns[first:]
    answered = True
    for role, text in turns:
        if role == "system":
            continue
        if answered != (role == "user"):
            wrong = "an answer without a question" if answered else "a question without an answer"
            raise InputError(f"{where}: {wrong} at {text[:40]!r}; wanted human and gpt in turns")
        if role == "assistant" and not text.strip():
            raise InputError(f"{where}: an empty answer; wanted text, or leave the record out")
        answered = role == "assistant"
    if not answered:
        raise InputError(f"{where}: a question without an answer at the end; wanted human and gpt in turns")
    return turns


def _messages(
    turns: list[tuple[str, str]], images: tuple[Path, ...], clips: tuple[Path, ...], where: str
) -> tuple[Message, ...]:
    """Messages with the tags of human text replaced by image and video parts."""
    asked = [i for i, (role, _) in enumerate(turns) if role == "user"]
    tags = [tag for i in asked for tag in _TAG.findall(turns[i][1])]
    if not tags:
        text = f"{IMAGE}\n" * len(images) + VIDEO * len(clips) + turns[asked[0]][1]
        turns = [("user", text) if i == asked[0] else turn for i, turn in enumerate(turns)]
    else:
        for tag, media in ((IMAGE, images), (VIDEO, clips)):
            if tags.count(tag) != len(media):
                what = "images" if tag == IMAGE else "videos"
                raise InputError(
                    f"{where}: {tags.count(tag)} {tag} tags in human text and {len(media)} {what}; wanted one tag each"
                )
    files = {IMAGE: iter(images), VIDEO: iter(clips)}
    messages: list[Message] = []
    for role, text in turns:
        if role != "user":
            messages.append({"role": role, "content": text})
            continue
        parts: list[dict[str, Any]] = []
        for chunk in _TAG.split(text):
            if chunk in files:
                kind = "image" if chunk == IMAGE else "video"
                parts.append({"type": kind, kind: {f"{kind}_path": str(next(files[chunk]))}})
            elif chunk.strip():
                parts.append({"type": "text", "text": chunk.strip()})
        messages.append({"role": role, "content": parts})
    return tuple(messages)
