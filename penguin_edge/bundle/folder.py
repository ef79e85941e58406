"""The bundle: the one folder that a runtime is given, opened, hashed and watched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from penguin_edge.bundle.contract import (
    COPY_AGAIN,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
)
from penguin_edge.bundle.manifest import FileEntry, Manifest
from penguin_edge.bundle.stamps import Stamp
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import BundleError, CheckpointError
from penguin_edge.files import file_hash, manifest_hash, read_json, write_json
from penguin_edge.schema import SchemaError


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its manifest, and what tells its files from others.

    Graphs are loaded when they are first needed. A folder that was replaced meanwhile would then hold another model's,
    so the files are noted when the bundle is opened, and `unchanged` compares them.
    """

    folder: Path
    manifest: Manifest
    _place: Path = field(init=False, repr=False, compare=False)
    """Path of the folder, links followed: neither a link set anew nor another working directory moves it."""
    _noted: dict[str, Stamp | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", self.folder.resolve())
        noted = {name: Stamp.of(self.path(name)) for name in (*self.manifest.files, MANIFEST)}
        object.__setattr__(self, "_noted", noted)

    def path(self, name: str) -> Path:
        return self._place / name

    @property
    def tokenizer(self) -> Path:
        """The path of `tokenizer.json`."""
        return self.path(TOKENIZER)

    @property
    def config(self) -> PenguinConfig:
        """The model's configuration, by the manifest."""
        return self.manifest.model

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Read files of the bundle in the block: they are those that were there when it was opened.

        Raises:
            BundleError: one of them was replaced, changed or removed, before the block or in it.
        """
        self._check_unchanged()
        try:
            yield
        finally:  # The message also tells why the block failed.
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        for name, noted in self._noted.items():
            now = Stamp.of(self.path(name))
            if now == noted:
                continue
            if now is not None and now.same_file(noted):
                # It may be another mode or name, or a time stamp set back: the content tells.
                entry = self.manifest.files.get(name)
                if entry is None or file_hash(self.path(name)) == entry.sha256:
                    self._noted[name] = now
                    continue
            raise self._changed(name)

    def _changed(self, name: str) -> BundleError:
        return BundleError(
            f"{self.path(name)}: replaced, changed or removed while the bundle was open; open the bundle again"
        )

    @classmethod
    def read(cls, folder: str | Path) -> Bundle:
        """Open a bundle, check schema, manifest hash and that every file is there with its size.

        Raises:
            BundleError: not a bundle, another schema, changed by hand, or a file missing or of another size.
        """
        if not isinstance(folder, str | Path):
            raise BundleError(f"got {type(folder).__name__} for a bundle, wanted the path of its folder")
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(
                f"{folder}: no {MANIFEST} there, so this is not a bundle; make one with `penguin-edge export`"
            )
        data = read_json(path, error=BundleError, advice=COPY_AGAIN)
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, bool) or not isinstance(schema, int):
            raise BundleError(f"{path}: not a manifest of penguin-edge, it has no schema version; {COPY_AGAIN}")
        if schema != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema version {schema}, wanted {SCHEMA_VERSION}; export the model again with this version "
                "of penguin-edge"
            )
        if data.get("sha256") != manifest_hash(data):
            raise BundleError(f"{path}: its own hash does not fit its content; {COPY_AGAIN}")
        try:
            manifest = Manifest.from_json(data)
        except (SchemaError, CheckpointError) as error:
            raise BundleError(f"{path}: {error}; {COPY_AGAIN}") from error
        bundle = cls(folder, manifest)
        for name, entry in manifest.files.items():
            bundle._check_size(name, entry)
        bundle._check_companions()
        return bundle

    def _check_companions(self) -> None:
        """A graph's weights in a file of their own are listed, too, since an engine reads them."""
        for graph in self.manifest.graphs.values():
            name = f"{graph.file}.data"
            if name not in self.manifest.files and self.path(name).exists():
                raise BundleError(
                    f"{self.path(name)}: {MANIFEST} does not list it, and its graph reads it; {COPY_AGAIN}"
                )

    def _check_size(self, name: str, entry: FileEntry) -> None:
        path = self.path(name)
        if not path.is_file():
            raise BundleError(f"{self.folder}: file {name} is missing; {COPY_AGAIN}")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{path}: leads out of the bundle's folder; copy the bundle with `cp -rL`")
        if path.stat().st_size != entry.bytes:
            raise BundleError(f"{path}: {path.stat().st_size} bytes, wanted {entry.bytes}; {COPY_AGAIN}")

    def check_hashes(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            BundleError: a file differs from what was exported.
        """
        for name, entry in self.manifest.files.items():
            self._check_size(name, entry)
            with self.path(name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
                read = Stamp.of(stream.fileno())
            if found != entry.sha256:
                raise BundleError(
                    f"{self.path(name)}: its content differs from what was exported (SHA-256 does not match); "
                    f"{COPY_AGAIN}"
                )
            if read is None or not read.same_file(self._noted[name]):
                raise self._changed(name)

    def check_hashes_once(self, also: Callable[[Bundle], None] = lambda bundle: None) -> None:
        """Hash the files at the first open on this machine; afterwards their stamps stand for their content.

        Args:
            also: a further check that belongs to the first open of this manifest.
        Raises:
            BundleError: as `check_hashes`.
        """
        self._check_unchanged()
        files = {name: [entry.sha256, self._noted[name]] for name, entry in self.manifest.files.items()}
        known = [str(self._place), self.manifest.to_json()["sha256"], files]
        key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        seen = _remembered(key)
        # A machine where nothing can be remembered hashes at every open: slower, never wrong.
        with contextlib.suppress(OSError):
            if seen is not None and seen.is_file():
                return
        self.check_hashes()
        also(self)
        with contextlib.suppress(OSError):
            if seen is not None:
                seen.parent.mkdir(parents=True, exist_ok=True)
                seen.touch()


def _remembered(key: str) -> Path | None:
    """The file whose presence says that a bundle was hashed here before; None without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "penguin-edge" / "verified" / key


def finish(folder: Path, manifest: Manifest) -> Bundle:
    """Hash every file in `folder`, write the manifest, and return the bundle."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for name in names:  # safetensors writes for its owner alone
        (folder / name).chmod((folder / name).stat().st_mode | 0o444)
    files = {name: FileEntry(file_hash(folder / name), (folder / name).stat().st_size) for name in names}
    complete = Manifest(**{**{f: getattr(manifest, f) for f in manifest.__dataclass_fields__}, "files": files})
    write_json(folder / MANIFEST, complete.to_json())
    return Bundle(folder, complete)
