"""Where a picture or a clip lies: a path, or a `file:` or `data:` address. Told apart before anything is opened.

Whoever writes a conversation writes these, so they are input: nothing here reads the network, waits for a pipe, or
repeats a long source in a message.
"""

from __future__ import annotations

import base64
import binascii
import re
import stat
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from penguin_edge.errors import InputError

MAX_DATA = 64 << 20
"""Bytes that a `data:` address may hold."""
SHOWN = 80
"""Characters of a source that a message repeats."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter alone would be a drive


def shown(source: object) -> str:
    """A source as a message repeats it: on one line, and of a long one both ends."""
    text = str(source)
    text = text if len(text) <= SHOWN else f"{text[: SHOWN // 2 - 2]}…{text[1 - SHOWN // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def named(path: str | Path) -> str:
    """A path as a message begins with it: whole, for it may be copied, but nothing that would act on a terminal."""
    text = str(path)
    return text if text.isprintable() else shown(text)


def scheme_of(source: str) -> str:
    """The part of an address before its first colon, in lower case; empty for a plain path."""
    found = _SCHEME.match(source)
    return found[1].lower() if found else ""


def is_data(source: object) -> bool:
    """Whether this is a `data:` address."""
    return isinstance(source, str) and scheme_of(source) == "data"


def data_bytes(source: str) -> bytes:
    """What a `data:` address holds, base64 or percent-encoded; its media type is not looked at.

    Raises:
        InputError: no comma, not base64, or more than `MAX_DATA` bytes.
    """
    head, comma, body = source.partition(",")
    if not comma or len(head) > MAX_DATA:
        raise InputError(f"{shown(source)}: a data: address without a comma; wanted data:image/png;base64,…")
    # Percent-encoding takes three characters for a byte, and base64 itself may be percent-encoded.
    if len(body) > 4 * MAX_DATA:
        raise InputError(f"{shown(head)}: a data: address of more than {MAX_DATA >> 20} MB; name a file instead")
    data = unquote_to_bytes(body)
    if head.lower().rstrip().endswith(";base64"):
        packed = b"".join(data.split()).rstrip(b"=")
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{shown(head)}: what follows is not base64; encode the bytes of the file anew") from error
    if len(data) > MAX_DATA:
        raise InputError(f"{shown(head)}: a data: address of more than {MAX_DATA >> 20} MB; name a file instead")
    return data


def local_path(source: str | Path) -> Path:
    """The path that a source names: a `file:` address gives its path, anything else is a path itself.

    Raises:
        InputError: an address of another kind, or on another machine; nothing that names a place.
    """
    if isinstance(source, Path):
        return source
    if not isinstance(source, str):
        raise InputError(f"got {shown(repr(source))} for a file, wanted its path")
    if not source:
        raise InputError("got an empty name, wanted a path; an empty one would be the working directory")
    scheme = scheme_of(source)
    if scheme == "file":
        return _file_path(source)
    if scheme == "data":
        raise InputError(f"{shown(source.partition(',')[0])}: a data: address holds no clip here; name a file")
    if scheme and source[len(scheme) : len(scheme) + 3] == "://":
        raise InputError(f"{shown(source)}: an address, wanted a file of this machine; download it first")
    return Path(source)


def _file_path(source: str) -> Path:
    rest = source.partition(":")[2]
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        rest = slash + rest
        if host.lower() not in ("", "localhost") or not slash:
            raise InputError(f"{shown(source)}: names the machine {shown(host)!r}; wanted file:///PATH of this one")
    if not rest:
        raise InputError(f"{shown(source)}: names nothing; wanted file:///PATH")
    return Path(unquote(rest, errors="surrogateescape"))


def exists(path: Path) -> bool:
    """Whether anything is there; a name that cannot be one has nothing."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def existing(path: Path, wanted: str) -> Path:
    """The path, if something is there that can be asked about.

    Raises:
        InputError: nothing is there, or the name cannot be one.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{shown(path)}: no such file; wanted {wanted}") from None
    except (OSError, ValueError) as error:  # too long, a loop of links, a NUL, no right to look
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown(path)}: cannot be opened ({reason}); wanted {wanted}") from None
    return path


def regular_file(path: Path, wanted: str) -> Path:
    """The path, if it is a file that has an end: reading a pipe or a device might wait, or go on, for ever.

    Raises:
        InputError: anything else.
    """
    mode = existing(path, wanted).stat().st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{shown(path)}: is a folder, wanted {wanted}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{shown(path)}: is a pipe, a socket or a device, wanted {wanted}")
    return path
