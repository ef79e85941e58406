"""Where a bundle is written, and what may be removed to make room for it.

`--overwrite` replaces a folder that an export made and nobody else has put anything into: its manifest is readable and
fits its own hash, and every file in it is one that the manifest names, or one that our verbs put beside it. Whatever
else lies there, or whatever cannot be told, is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from penguin_edge import folders
from penguin_edge.bundle.contract import MANIFEST, PROFILE, VERIFY
from penguin_edge.errors import BundleError
from penguin_edge.files import manifest_hash, read_json
from penguin_edge.folders import MayReplace, whole

BESIDE = frozenset({MANIFEST, VERIFY, PROFILE})
"""What our verbs write into a bundle's folder; the manifest does not name it."""
HALF_WRITTEN = re.compile(r"\.(bundle|verify|profile)\.json\.[0-9a-f]{8}")
"""Names of what a killed verb leaves of these files."""


@contextlib.contextmanager
def writing(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder aside that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        BundleError: `out` exists and is not to be overwritten, or holds anything that no export put there.
    """
    with whole(out, _rule(out, overwrite), BundleError) as folder:
        yield folder


def check_place(out: str | Path, *, overwrite: bool) -> Path:
    """Refuse before hours of work what `writing` would refuse; return the absolute path that `out` means.

    Raises:
        BundleError: as `writing`.
    """
    return folders.check_place(out, _rule(out, overwrite), BundleError)


def _rule(out: str | Path, overwrite: bool) -> MayReplace:
    def may_replace(found: Path, appeared: bool) -> None:
        if not overwrite and appeared:
            raise BundleError(f"{out} appeared while the bundle was made; it is left as it is, choose another folder")
        if not overwrite:
            raise BundleError(f"{out} exists already; choose another folder or pass --overwrite")
        if not found.is_dir():
            raise BundleError(f"{out} exists and is not a bundle; it is left as it is, choose another folder")
        names = sorted(os.listdir(found))
        if not names:
            return
        if MANIFEST not in names:
            raise BundleError(
                f"{out} exists and is not a bundle (it holds {names[0]}); it is left as it is, choose another folder"
            )
        if strange := next(_strangers(found, _named(found, out)), None):
            raise BundleError(
                f"{out} holds {strange}, which is not part of the bundle; move it away before you overwrite"
            )

    return may_replace


def _named(folder: Path, out: str | Path) -> frozenset[str]:
    """Relative paths of the files that the manifest names.

    Raises:
        BundleError: it is not a manifest of ours, or damaged; what else lies there cannot be told then.
    """
    advice = f"{out} is left as it is: if nothing in it is of use, remove it yourself, or choose another folder"
    manifest = folder / MANIFEST
    if not stat.S_ISREG(manifest.lstat().st_mode):
        raise BundleError(f"{out}: its {MANIFEST} is not a plain file, so this is not a bundle; {advice}")
    data = read_json(manifest, what=f"{out}/{MANIFEST}", error=BundleError, advice=advice)
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or "schema" not in data or "sha256" not in data:
        raise BundleError(f"{out}: its {MANIFEST} was not written by penguin-edge; {advice}")
    if data["sha256"] != manifest_hash(data):
        raise BundleError(f"{out}: its {MANIFEST} is damaged, or was changed by hand; {advice}")
    return frozenset(files)


def _strangers(folder: Path, named: frozenset[str]) -> Iterator[str]:
    """Relative paths in a bundle's folder that no export put there: by path, not by name, and links are never ours."""
    known = named | BESIDE
    parents = {parent.as_posix() for name in known for parent in Path(name).parents}

    def refuse(error: OSError) -> None:
        raise BundleError(
            f"{error.filename}: cannot be looked into ({error.strerror}), so it may hold anything; look at it, "
            "or choose another folder"
        )

    for place, inner, files in os.walk(folder, onerror=refuse):
        for name in sorted(inner) + sorted(files):
            path = Path(place) / name
            relative, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISDIR(mode):
                ours = relative in parents
            else:
                ours = stat.S_ISREG(mode) and (relative in known or HALF_WRITTEN.fullmatch(relative) is not None)
            if not ours:
                yield relative
