"""Single files: the one reader of JSON that comes from outside, and the one writer that leaves no half of a file.

What is read is input, whoever wrote it: its size, its depth and the length of its numbers are bounded before anything
is made of it. What other readers would understand differently (a key twice, NaN, half a character) is refused. What a
value must be is said by a rule of `penguin_edge.schema`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from penguin_edge.errors import InputError, PenguinError, WriteError
from penguin_edge.schema import Rule

MAX_BYTES = 64 << 20
"""The largest JSON file that is read; the largest that penguin-edge writes itself has about 10 MB."""
MAX_DEPTH = 48
"""Objects and lists inside one another; penguin-edge's own files have 8."""
MAX_DIGITS = 64
"""Characters of one number."""
LONGEST_NAME = 48
"""Characters of a name that its temporary file repeats: a file system that takes one name takes the other."""
STREAMS = ("/dev/fd/", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/proc/")
"""Names of what a process has open already: a file that stdout goes to is written to, not replaced."""
NAME_ANOTHER = "name another file, or make room"
"""What to do about a file that cannot be written."""
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of fsync where the file system has none: it writes when it likes, and nothing is lost by that."""

ASSETS = Path(__file__).parent / "assets"
"""What is installed beside the code: penguin-nano's weights, a tokenizer, pictures, the live view's page."""


def parse_json(
    text: str | bytes,
    what: str,
    *,
    rule: Rule | None = None,
    error: type[PenguinError] = InputError,
    advice: str = "",
) -> Any:
    """The value of a JSON text.

    Args:
        what: names the text in the message, such as a path or `clip.jsonl: line 3`.
        rule: what the value must be.
        error: what is raised.
        advice: the end of the message, which says what to do.
    Raises:
        PenguinError: not JSON, larger, deeper or with longer numbers than the limits above, ambiguous, or against the
            rule.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} bytes, wanted at most {MAX_BYTES}")
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = _DECODER.decode(text)
        _check_depth(value)
        if rule is not None:
            rule.check(value, "")
        return value
    except (ValueError, RecursionError) as found:
        raise _refusal(found, what, error, advice) from found


def parse_json_at(text: str, at: int, what: str, *, advice: str = "") -> tuple[Any, int]:
    """The JSON value that begins at a character of a longer text, and where it ends; arguments as `parse_json`.

    Raises:
        InputError: as `parse_json`, but for the size, which is the caller's.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
        _check_depth(value)
        return value, end
    except (ValueError, RecursionError) as found:
        raise _refusal(found, what, InputError, advice) from found


def read_json(
    path: str | Path,
    *,
    what: str = "",
    rule: Rule | None = None,
    error: type[PenguinError] = InputError,
    advice: str = "",
) -> Any:
    """The value of a JSON file; arguments as `parse_json`, `what` in place of the path.

    Raises:
        PenguinError: as `parse_json`, or the file cannot be read.
    """
    what = what or str(path)
    try:
        with Path(path).open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as found:  # a name with a NUL in it is a ValueError
        reason = getattr(found, "strerror", None) or found
        raise error(f"{what}: cannot be read ({reason}){'; ' if advice else ''}{advice}") from found
    return parse_json(text, what, rule=rule, error=error, advice=advice)


def write_json(path: str | Path, data: Any) -> None:
    """Write a JSON file as `replacing` does. Numbers that are not finite become null.

    Raises:
        WriteError: it cannot be written.
        TypeError: a value that JSON has no form for.
    """
    write_text(path, json.dumps(finite(data), indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str, *, advice: str = NAME_ANOTHER) -> None:
    """Write a file of UTF-8 text as `replacing` does; `advice` as there.

    Raises:
        WriteError: it cannot be written.
    """
    with replacing(path, advice=advice) as aside:
        aside.write_text(text, encoding="utf-8")


def write_picture(path: str | Path, figure: Any) -> None:
    """Write a figure of matplotlib as a PNG file, whatever the name ends with, as `replacing` does.

    Raises:
        WriteError: it cannot be written.
    """
    with replacing(path, "cannot write the picture", advice="give a file in a folder that exists") as aside:
        figure.savefig(aside, format="png")


def manifest_hash(data: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything but the hash itself."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


ASIDE = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names of the files that `replacing` writes; a kill leaves one."""


@contextlib.contextmanager
def replacing(path: str | Path, what: str = "cannot be written", *, advice: str = NAME_ANOTHER) -> Iterator[Path]:
    """A file to write beside `path`, which it becomes when the block ends well; otherwise `path` stays as it was.

    A link stays a link: what it points to is replaced. What is no file, such as a pipe or `/dev/stdout`, is written to.
    The new content of an existing file is readable by its owner alone until it has that file's mode, and is on the disk
    before the old is given up. No failure leaves the file beside, Ctrl-C included; a kill does.

    Args:
        what: what the message says of the path.
        advice: the end of the message, which says what to do.
    Raises:
        WriteError: the system refuses to write or to rename, in the block or after it.
    """
    path = Path(path)
    try:
        if os.path.abspath(path).startswith(STREAMS) or (path.exists() and not path.is_file()):
            yield path
            return
        place = Path(os.path.realpath(path))
        aside = place.with_name(f".{place.name[:LONGEST_NAME]}.{uuid.uuid4().hex[:8]}")
        try:
            if place.exists():
                os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield aside
            if place.exists():
                shutil.copymode(place, aside)
                sync(os.open(aside, os.O_RDONLY))
            aside.replace(place)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as found:
        reason = found.strerror or str(found)
        raise WriteError(f"{path}: {what} ({reason}); {advice}", reason) from found


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, and close it.

    Raises:
        OSError: the disk is full or damaged.
    """
    try:
        os.fsync(descriptor)
    except OSError as found:
        if found.errno not in UNSYNCED:
            raise
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """Plain data with null in place of NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refusal(found: Exception, what: str, error: type[PenguinError], advice: str) -> PenguinError:
    reason = str(found)
    if isinstance(found, RecursionError):
        reason = f"nested deeper than {MAX_DEPTH} levels"
    elif isinstance(found, UnicodeDecodeError):
        reason = f"not JSON (not UTF-8 at byte {found.start})"
    elif isinstance(found, json.JSONDecodeError):
        reason = f"not JSON ({found})"
    return error(f"{what}: {reason}{'; ' if advice else ''}{advice}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return out


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, wanted at most {MAX_DIGITS}")
    return int(text)


def _real(text: str) -> float:
    value = float(text) if len(text) <= MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is outside of what a float holds, or longer than {MAX_DIGITS} digits")
    return value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _check_depth(value: Any) -> None:
    """Refuse deep nesting, and characters that cannot be written to a file or a terminal.

    Raises:
        ValueError: either.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                _check_characters(item)
        level = below
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair, which is no character") from None


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_whole, parse_float=_real, parse_constant=_not_a_number
)
