"""What may be opened as a clip, and within which limits: nothing reaches beyond the file, or a playlist's own folder.

| input | handled |
|---|---|
| a container (MP4, MKV, WebM, AVI, MPEG-TS, …) or an elementary stream | opened; no other file is touched |
| HLS playlist (`.m3u8`) that ends | opened; every file it names must lie in the playlist's folder |
| ffconcat list | opened; as above, plain relative names only |
| DASH manifest, SDP, lists of pictures, devices, a single HEIF image | refused |
"""

from __future__ import annotations

import functools
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from penguin_edge.errors import InputError, TargetUnavailable
from penguin_edge.media.places import named, shown

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

MAX_FRAME_PIXELS = 2**25
"""Most pixels of a clip's frame, 33.5 million: 8K (7680 x 4320) is below. More must be asked for with `max_pixels`."""
MAX_PLAYLIST_BYTES = 2**20
"""Longest playlist that is read."""
MAX_BOXES = 2**20
"""Most boxes of an ISO file at its top level, a million: as fragments of a frame each, 2 hours and more."""
MAX_TABLE_BYTES = 2**29
"""Most bytes of an ISO file's tables, 537 million: 16 for each of `video.MAX_PACKETS` are below."""
SMALL_AREA = 256 * 256
"""Pictures up to this many pixels are decoded without threads, whose start costs more than they save."""

_GENERATE_TIMES = 0x0001  # AVFMT_FLAG_GENPTS
_TIMES_RESTART = 0x0200  # AVFMT_TS_DISCONT
_PLAYLISTS = {b"#EXTM3U": "hls", b"ffconcat version": "concat"}
_OUTWARD = {
    *("alias_pix", "applehttp", "concat", "dash", "ffmetadata", "hls", "image2", "image2pipe", "imf", "lavfi"),
    *("mlv", "rtp", "rtsp", "sap", "sdp", "tty", "vobsub", "webm_dash_manifest"),
}
"""Demuxers that open what a file names, or that take text for pictures."""
_BOX = re.compile(rb"(?s)....[a-zA-Z0-9 ]{4}")
"""How a box of an ISO file begins."""
_TABLES = re.compile(rb"(?s)(stsz|stz2|trun)(?<=\0\0[\0-\3].....)")
"""Short tables whose count of samples cannot be checked against their length: all samples may have one size."""
_PIECE, _LAP = 2**20, 32
"""Bytes of tables that are read at a time, and the overlap of two reads, so that no table is cut in two."""
_LISTED = re.compile(r"(file)\s+(?:'([\w./-]+)'|([\w./-]+))|(duration|inpoint|outpoint)\s+[\d.:]+", re.ASCII)
"""Directives of an ffconcat list that are understood."""


@contextmanager
def opened(path: Path, max_pixels: int = MAX_FRAME_PIXELS) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream (cover art is not one).

    Raises:
        InputError: not a clip, or one that names files elsewhere, or with frames of more than `max_pixels`.
    """
    try:
        import av
    except ImportError:
        raise TargetUnavailable("reading video needs PyAV: pip install av") from None
    with _open(path, max_pixels) as container:
        kind = container.format.name
        if kind.endswith("_pipe"):
            raise InputError(f"{named(path)}: not a video but {kind}; give an MP4, MKV, WebM, AVI or similar clip")
        # Without this PyAV makes up presentation times of packets that have none.
        container.flags &= ~_GENERATE_TIMES
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic:
                if stream.codec_context is None:
                    raise InputError(
                        f"{named(path)}: the codec of the video stream is unknown here; convert it to H.264"
                    )
                check_pixels(path, stream, max_pixels)
                small = stream.codec_context.width * stream.codec_context.height <= SMALL_AREA
                stream.thread_type = "NONE" if small else "AUTO"
                stream.codec_context.options = {"max_pixels": str(max_pixels)}
                yield container, stream
                return
        raise InputError(f"{named(path)}: has no video stream (format {kind}); give a clip with pictures")


def check_pixels(path: Path | str, stream: VideoStream, max_pixels: int) -> None:
    """Refuse frames that are too large, before one is decoded.

    Raises:
        InputError: width times height is beyond `max_pixels`.
    """
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels:
        raise InputError(
            f"{named(path)}: frames of {width}x{height} are {width * height:,} pixels, the limit is {max_pixels:,}; "
            "reduce the clip first, or raise the limit (max_pixels)"
        )


def restarts(container: InputContainer) -> bool:
    """Whether the clock of this kind of container may start again."""
    return bool(container.format.flags & _TIMES_RESTART)


@contextmanager
def _open(path: Path, max_pixels: int) -> Iterator[InputContainer]:
    import av

    with path.open("rb") as file:
        head = file.read(64)
    playlist = next((kind for mark, kind in _PLAYLISTS.items() if head.startswith(mark)), None)
    if playlist == "concat":
        _check_concat(path)
    elif head.lstrip().startswith((b"<MPD", b"<?xml")):
        raise InputError(f"{named(path)}: a DASH manifest or other XML, not a clip; give the clip that it names")
    elif head.startswith(b"v=0") or head.lstrip().startswith(b"[playlist]"):
        raise InputError(f"{named(path)}: describes a stream elsewhere and is no clip; give the stream's own address")
    elif _BOX.match(head):
        _check_boxes(path)
    folder = _Folder(path)
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(sorted(_self_contained() | {playlist or "mov"})),
        "max_pixels": str(max_pixels),
    }
    try:
        container = av.open(
            f"file:{path.resolve() if playlist else path}",
            format=playlist,
            metadata_errors="replace",
            options=options,
            io_open=folder.open if playlist == "hls" else None,
        )
    except (av.FFmpegError, ValueError, InputError) as error:
        raise folder.refusal or InputError(
            f"{named(path)}: not a readable video; the file is damaged, cut short or of another kind"
        ) from error
    with container:
        try:
            yield container
        except (av.FFmpegError, InputError) as error:
            if folder.refusal is None or error is folder.refusal:
                raise
            raise folder.refusal from error
    # The demuxer goes on without a file that it was refused.
    if folder.refusal:
        raise folder.refusal


@functools.cache
def _self_contained() -> frozenset[str]:
    import av

    return frozenset(av.formats_available - _OUTWARD)


class _Folder:
    """The folder of a playlist: opens what lies in it for the demuxer; `refusal` says why it did not."""

    def __init__(self, playlist: Path) -> None:
        self.playlist = playlist
        self.root = playlist.resolve().parent
        self.refusal: InputError | None = None

    def open(self, url: str, flags: int, options: dict[str, str]) -> BinaryIO:
        """The file that `url` names.

        Raises:
            InputError: it lies elsewhere, is missing, or is a playlist without an end.
        """
        try:
            return self._open(url)
        except InputError as error:
            self.refusal = self.refusal or error
            raise

    def _open(self, url: str) -> BinaryIO:
        path = inside(self.playlist, url.removeprefix("file:"), self.root, self.root)
        try:
            file = path.open("rb")
        except OSError as error:
            raise InputError(f"{named(self.playlist)}: {named(path)} cannot be read ({error.strerror})") from error
        if file.read(7) == b"#EXTM3U":
            self._check_playlist(file.read(MAX_PLAYLIST_BYTES + 1), path.parent)
        file.seek(0)
        return file

    def _check_playlist(self, text: bytes, folder: Path) -> None:
        if len(text) > MAX_PLAYLIST_BYTES:
            raise InputError(
                f"{named(self.playlist)}: a playlist of more than {MAX_PLAYLIST_BYTES:,} bytes; join the clips first"
            )
        if b"#EXTINF" in text and b"#EXT-X-ENDLIST" not in text:
            raise InputError(
                f"{named(self.playlist)}: a playlist without #EXT-X-ENDLIST, which goes on for ever; add that line, or "
                "give the clips themselves"
            )
        lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
        for line in lines:
            for name in [line] if not line.startswith("#") else re.findall(r'URI="([^"]*)"', line):
                if name:
                    inside(self.playlist, name.removeprefix("file:"), folder, self.root)


def inside(playlist: Path, name: str, folder: Path, root: Path) -> Path:
    """The plain file that a playlist in `folder` means by `name`, which must lie below `root`.

    Raises:
        InputError: it does not, or is missing.
    """
    try:
        target = (folder / name).resolve()
        found = target.is_relative_to(root) and not re.match(r"[A-Za-z][\w+.-]*[:,]", name)
        exists = found and target.is_file()
    except (OSError, ValueError, RuntimeError):
        raise InputError(
            f"{named(playlist)}: names '{shown(name)}', which is no name of a file; copy the playlist again"
        ) from None
    if not found:
        raise InputError(
            f"{named(playlist)}: names '{shown(name)}', which is outside the playlist's own folder; put the clips "
            "beside it"
        )
    if not exists:
        raise InputError(f"{named(playlist)}: names '{shown(name)}', which is missing; copy all clips of the playlist")
    return target


def _check_concat(path: Path) -> None:
    text = path.read_bytes()[: MAX_PLAYLIST_BYTES + 1]
    if len(text) > MAX_PLAYLIST_BYTES:
        raise InputError(f"{named(path)}: a list of more than {MAX_PLAYLIST_BYTES:,} bytes; join the clips first")
    for number, line in enumerate(text.decode("latin-1").splitlines()[1:], 2):
        directive = line.split("#", 1)[0].strip()
        if not directive:
            continue
        found = _LISTED.fullmatch(directive)
        if found is None:
            raise InputError(
                f"{named(path)}: line {number} is not understood; wanted file NAME (letters, digits, . _ - and /) in "
                "the list's own folder, duration, inpoint or outpoint"
            )
        name = found[2] or found[3]
        if found[1]:
            folder = path.resolve().parent
            with inside(path, name, folder, folder).open("rb") as file:
                head = file.read(32)
            if head.startswith(tuple(_PLAYLISTS)):
                raise InputError(f"{named(path)}: names '{shown(name)}', which is a playlist itself; name clips only")


def _check_boxes(path: Path) -> None:
    """Check in an ISO file (MP4, MOV, HEIF) what the demuxer would take on trust.

    A file that is cut short meanwhile ends there.

    Raises:
        InputError: its top level has an item of meta data and no track, a picture in one or many tiles; or its tables
            claim more frames than the file has bytes, each of which costs memory; or it is beyond the limits.
    """
    kinds: set[bytes] = set()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = boxes = tables = 0
        while at + 16 <= size:
            file.seek(at)
            header = file.read(16)
            if len(header) < 16:
                break
            length, kind = struct.unpack_from(">I4s", header)
            length = struct.unpack_from(">Q", header, 8)[0] if length == 1 else length or size - at
            boxes += 1
            kinds.add(kind)
            if kind in (b"moov", b"moof"):
                end = min(at + length, size)
                tables += end - at
                if tables <= MAX_TABLE_BYTES:
                    _check_tables(path, file, at, end, size)
            if boxes > MAX_BOXES or tables > MAX_TABLE_BYTES:
                raise InputError(
                    f"{named(path)}: more than {MAX_BOXES:,} boxes or {MAX_TABLE_BYTES:,} bytes of tables; write the "
                    "clip anew as an MKV file, or split it first"
                )
            if length < 8:
                break
            at += length
    if b"meta" in kinds and b"moov" not in kinds:
        raise InputError(f"{named(path)}: a single HEIF image, not a clip; convert it to JPEG or PNG")


def _check_tables(path: Path, file: BinaryIO, begin: int, end: int, size: int) -> None:
    """Refuse tables between `begin` and `end` that claim more frames than a file of `size` bytes can have."""
    for at in range(begin, end, _PIECE):
        file.seek(at)
        data = file.read(min(_PIECE + _LAP, end - at))
        for table in _TABLES.finditer(data):
            counts = table.end() + (4 if table[1] == b"trun" else 8)
            claimed = int.from_bytes(data[counts : counts + 4], "big")
            if claimed > max(size, 2**16):
                raise InputError(f"{named(path)}: claims {claimed:,} frames in a file of {size:,} bytes; copy it again")
