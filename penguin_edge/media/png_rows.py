"""Pixel data of a PNG that end too soon: whole chunks with right sums, but fewer rows than the header says.

Pillow reads such a file without a word, and what is missing is black.

| chunk | what it says                                               |
|-------|------------------------------------------------------------|
| IHDR  | width, height, bits of a sample, kind of colour, interlace |
| IDAT  | pixel data of the first picture, deflated, in pieces       |
| fcTL  | size of an animation's next picture                        |
| fdAT  | pixel data of that one, after four bytes of numbering      |
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import IO

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by the kind of colour."""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps, of what an interlaced picture gives one after the other."""
PIECE = 1 << 16
"""Bytes that are read or inflated at a time."""


def first_short(stream: IO[bytes], pictures: int) -> int | None:
    """The first of so many pictures whose data end before its last row; None where all are whole.

    The stream is left where it was. What is wrong in another way is for others to find.
    """
    before = stream.tell()
    try:
        stream.seek(8)
        return _first_short(_chunks(stream), pictures)
    except struct.error:
        return None
    finally:
        stream.seek(before)


def _first_short(chunks: Iterator[tuple[bytes, int, IO[bytes]]], pictures: int) -> int | None:
    number, missing, form = -1, 0, (0, 0, 0)
    width = height = 0
    inflate, begins = zlib.decompressobj(), True
    for kind, length, stream in chunks:
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", stream.read(13))
            form = (depth, colour, interlaced)
        elif kind == b"fcTL":
            _, width, height = struct.unpack(">III", stream.read(12))
            begins = True
        elif kind == b"IEND":
            break
        if kind in (b"IDAT", b"fdAT"):
            if begins:
                if missing:
                    return number
                number, missing, inflate = number + 1, _bytes(width, height, *form), zlib.decompressobj()
                if number >= pictures:
                    return None
                begins = False
            if kind == b"fdAT":
                stream.read(4)
                length -= 4
            missing = _inflated(stream, length, inflate, missing)
    return number if missing else None


def _chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, int, IO[bytes]]]:
    """Kind and length of each chunk, with the stream at its content."""
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        at = stream.tell()
        yield kind, length, stream
        stream.seek(at + length + 4)


def _bytes(width: int, height: int, depth: int, colour: int, interlaced: int) -> int:
    """Bytes of a picture's rows, each with one before it that says how it is filtered."""
    bits = depth * SAMPLES.get(colour, 0)
    total = 0
    for left, top, right, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflated(stream: IO[bytes], length: int, inflate: zlib._Decompress, missing: int) -> int:
    """Bytes that are still missing after a chunk; no more than those are inflated."""
    while missing and length > 0:
        piece = stream.read(min(length, PIECE))
        if not piece:
            break
        length -= len(piece)
        while piece and missing:
            try:
                missing -= len(inflate.decompress(piece, min(PIECE, missing)))
            except zlib.error:
                return missing
            piece = inflate.unconsumed_tail
    return missing
