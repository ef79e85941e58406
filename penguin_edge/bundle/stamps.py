"""What tells a file from another one under the same name: noted when a bundle is opened, compared before it is used.

| field    | what changes it                                                          |
|----------|--------------------------------------------------------------------------|
| device   | another file system is mounted there                                     |
| inode    | the file, or a folder above it, was replaced                             |
| size     | it was cut off or extended                                               |
| mtime_ns | it was written to                                                        |
| ctime_ns | the same, and what does not change content: another name, owner or mode  |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """See the top of this file."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp | None:
        """The stamp of a path or of an open file; None where there is no such file."""
        try:
            found = os.stat(file)
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def same_file(self, other: Stamp | None) -> bool:
        """Whether the other is this file with this content, unless its time stamps were set back."""
        return other is not None and self[:4] == other[:4]
