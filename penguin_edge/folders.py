"""Folders that are written aside and take their place whole, and what a kill leaves of them.

    PARENT/.NAME.1a2b3c4d.partial/   one writer's, locked while that process lives
        penguin-edge.json            whose it is, and the name it is to take
        new/                         what is being written
        old/                         what stood there, from the moment before `new` takes its place

Whenever the writer is killed, the old folder or the new one is there, whole: in its place, or as `old` here, from where
the next writer of the same name brings it back. A leftover is cleared only if it carries our mark, belongs to this user
and this machine, and its lock is free: then the process that made it is gone, whatever its number is used for now.
Where a file system has no locks, the mark's process tells: its number and the time of its start, on the same boot and
in the same container. Where even that tells nothing, a leftover stays, and is named when it has the only copy of a
folder. Folders for work in the system's temporary folder are marked, locked and cleared in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from penguin_edge.errors import PenguinError
from penguin_edge.files import LONGEST_NAME, read_json, sync

MARK = "penguin-edge.json"
SUFFIX = ".partial"
HELD = ".held"
SCRATCH = "penguin-edge-"
ANY_NAME = r".+\."
MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux lists what is mounted where, as this process sees it."""

MayReplace = Callable[[Path, bool], None]
"""Takes what stands in a place, and whether it appeared while the new folder was written; raises if it has to stay."""


def refuse_any(out: str | Path, error: type[PenguinError], *, but_empty: bool = True) -> MayReplace:
    """Make a check for a writer that never replaces anything, except perhaps an empty folder."""

    def may_replace(found: Path, appeared: bool) -> None:
        if not (but_empty and found.is_dir()):
            raise error(f"{out} exists; it is left as it is: choose another name, or remove it first")
        if any(found.iterdir()):
            raise error(
                f"{out} exists and is not empty; it is left as it is: choose another folder, or remove it first"
            )

    return may_replace


def refuse_others(names: Collection[str], error: type[PenguinError]) -> MayReplace:
    """Make a check for a folder that may hold plain files of these names, and nothing else."""

    def may_replace(found: Path, appeared: bool) -> None:
        for path in sorted(found.iterdir()):
            if path.name not in names or path.is_symlink() or not path.is_file():
                raise error(f"{path}: not one of the files that were written there; move it away first")

    return may_replace


def check_place(out: str | Path, may_replace: MayReplace, error: type[PenguinError]) -> Path:
    """Refuse before long work what `whole` would refuse; return the absolute path that `out` means.

    Raises:
        PenguinError: what stands there may not be replaced.
    """
    place = place_of(out, error)
    clear(place, error)
    if os.path.lexists(place):
        _check(place, False, may_replace, error)
    return place


def place_of(out: str | Path, error: type[PenguinError]) -> Path:
    """The absolute path that `out` means: through links, without `.` and `..`.

    Raises:
        PenguinError: it is the root, or a link to nothing.
    """
    try:
        place = Path(os.path.realpath(out))
        dangling = Path(out).is_symlink() and not os.path.lexists(place)
    except (OSError, ValueError) as found:  # a name with a NUL in it is a ValueError
        raise error(f"{str(out)!r}: cannot be used as a folder ({found}); choose another name") from found
    if dangling or place.is_symlink():
        raise error(f"{out} is a link, and {place} is not there; make that folder, or remove the link")
    if not place.name:
        raise error(f"{out} is the root of the file system; choose another folder")
    return place


@contextlib.contextmanager
def whole(out: str | Path, may_replace: MayReplace, error: type[PenguinError]) -> Iterator[Path]:
    """A folder aside that becomes `out` when the block ends well, and vanishes when it does not.

    Where `out` is a link, the folder that it points to is replaced.

    Raises:
        PenguinError: what stands there may not be replaced, or the parent cannot be written.
    """
    place = check_place(out, may_replace, error)
    made = [parent for parent in place.parents if not os.path.lexists(parent)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside, lock = _claim(place.parent, f".{place.name[:LONGEST_NAME]}.", SUFFIX, place.name)
    except OSError as found:
        raise error(f"{out}: cannot be created ({found.strerror}); choose a folder that can be written") from found
    new, old = aside / "new", aside / "old"
    try:
        with _told(f"{out}: cannot be written", error):
            new.mkdir()
        yield new
        with _told(f"{out}: cannot be written", error):
            _sync(new)
            if os.path.lexists(place):
                _check(place, True, may_replace, error)
                place.replace(old)
                may_replace(old, True)  # once more, where nobody adds to it
            new.replace(place)
            _sync_names(place.parent)
    finally:
        try:
            _settle(aside, place, error)
        finally:
            os.close(lock)
            if not os.path.lexists(place):
                for parent in made:
                    with contextlib.suppress(OSError):
                        parent.rmdir()


def clear(place: Path, error: type[PenguinError]) -> None:
    """Bring back what a killed writer had moved out of `place`, and remove its leftovers.

    Raises:
        PenguinError: something else stands in `place` now; neither of the two is touched.
    """
    for rest in _rests(place.parent, f".{place.name[:LONGEST_NAME]}.", SUFFIX):
        with _taken(rest) as name:
            if name == place.name:
                _settle(rest, place, error)
            elif name is None and (rest / "old").is_dir() and not os.path.lexists(place) and _unsure(rest, place.name):
                raise error(
                    f"{rest / 'old'} stood in the place of {place}, and this file system has no locks to tell whether "
                    f"its process still runs; if none does, move it to {place}, then remove {rest}"
                )


def _settle(rest: Path, place: Path, error: type[PenguinError]) -> None:
    """Bring back what was moved out of `place` unless `new` has taken the place, and remove the leftover.

    Raises:
        PenguinError: something else stands in `place` now; neither of the two is touched.
    """
    old = rest / "old"
    if os.path.lexists(old) and (os.path.lexists(rest / "new") or not os.path.lexists(place)):
        try:
            if os.path.lexists(place):  # a file would be replaced silently
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            old.replace(place)
        except OSError as found:
            if not os.path.lexists(place):
                raise error(f"{old} cannot be moved back to {place} ({found.strerror}); move it there") from found
            raise error(
                f"{old} stood in the place of {place} before, and something else is there now: "
                f"move one of the two away, then remove {rest}"
            ) from found
    _remove(rest)


@contextlib.contextmanager
def _told(what: str, error: type[PenguinError]) -> Iterator[None]:
    """Turn what the system refuses into one sentence."""
    try:
        yield
    except OSError as found:
        taken = found.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
        reason = "something appeared in its place meanwhile" if taken else found.strerror or found
        advice = "choose another name" if taken else "make room, or choose another folder"
        raise error(f"{what} ({reason}); {advice}") from found


@contextlib.contextmanager
def held(folder: Path, error: type[PenguinError]) -> Iterator[None]:
    """Keep a folder for this process, so that another one does not work in it, too.

    Raises:
        PenguinError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as found:
        raise error(f"{folder}: cannot be used ({found.strerror}); move it away") from found
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock)
        try:
            locked = _lock(lock)
        except BlockingIOError as found:
            raise error(f"{folder}: another process works there; wait for it, or choose another name") from found
        if not locked:
            stack.enter_context(_alone(folder, error))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came of it


@contextlib.contextmanager
def _alone(folder: Path, error: type[PenguinError]) -> Iterator[None]:
    """`held` without locks: a mark beside the folder, and no other one of a process that may live.

    Raises:
        PenguinError: there is another one. Of two that come at the same time, both may be refused, never none.
    """
    prefix = f".{folder.name[:LONGEST_NAME]}."
    with _told(f"{folder}: cannot be used", error):
        aside, lock = _claim(folder.parent, prefix, HELD, folder.name)
    try:
        for other in _rests(folder.parent, prefix, HELD):
            with _taken(other) as name:
                if name == folder.name:
                    _remove(other)
                elif other != aside and name is None:
                    raise error(
                        f"{folder}: another process works there, or did ({other.name} beside it, and this file system "
                        "has no locks); wait for it, or remove that if no process runs"
                    )
        yield
    finally:
        _remove(aside)
        os.close(lock)


def clear_all(parent: Path, error: type[PenguinError]) -> None:
    """Call `clear` for every place in a folder that a killed process was about to fill."""
    for rest in _rests(parent, ".", SUFFIX):
        with _taken(rest) as name:
            pass
        if name is not None:
            clear(parent / name, error)


def discard(folder: Path, may_remove: MayReplace, error: type[PenguinError]) -> None:
    """Remove a folder at once, as seen from outside, if nothing but what may be removed is in it.

    Raises:
        PenguinError: what `may_remove` raises, or it cannot be moved; the folder stays then, or stands aside if
            something else took its place meanwhile.
    """
    may_remove(folder, False)
    check_movable(folder.resolve(), error)
    with _told(f"{folder}: cannot be removed", error):
        aside, lock = _claim(folder.parent, f".{folder.name[:LONGEST_NAME]}.", SUFFIX, folder.name)
    new, old = aside / "new", aside / "old"
    try:
        with _told(f"{folder}: cannot be removed", error):
            new.mkdir()
            folder.replace(old)
            may_remove(old, True)  # once more, where nobody adds to it
            old.replace(new)  # from where nothing is brought back
    finally:
        try:
            _settle(aside, folder, error)
        finally:
            os.close(lock)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder for work, gone afterwards; those that killed processes left are removed first."""
    parent = Path(tempfile.gettempdir())
    for rest in _rests(parent, SCRATCH, ""):
        with _taken(rest) as name:
            if name == SCRATCH:
                _remove(rest)
    aside, lock = _claim(parent, SCRATCH, "", SCRATCH)
    try:
        work = aside / "work"
        work.mkdir()
        yield work
    finally:
        _remove(aside)
        os.close(lock)


def _check(place: Path, appeared: bool, may_replace: MayReplace, error: type[PenguinError]) -> None:
    """Refuse what may not be replaced, or cannot be."""
    may_replace(place, appeared)
    check_movable(place, error)


def check_movable(place: Path, error: type[PenguinError]) -> None:
    """Refuse a folder that the system does not let go, whatever is in it.

    Raises:
        PenguinError: it is a mount point, has one in it, or holds the working directory.
    """
    mounts = _mounts(place)
    if os.path.ismount(place) or place in mounts:
        raise error(f"{place} is a mount point, which cannot be replaced; choose a folder in it")
    if mounts:
        raise error(
            f"{place} has a mount point in it ({mounts[0].relative_to(place)}), so it cannot be replaced; unmount that "
            "first, or choose another folder"
        )
    with contextlib.suppress(FileNotFoundError):  # the working directory itself may be gone
        if Path.cwd().is_relative_to(place):
            raise error(f"{place} is the working directory, or holds it; go elsewhere to replace it")


def _mounts(place: Path) -> list[Path]:
    """Mount points at a path or below it, as far as the system tells.

    `os.path.ismount` compares devices, and so misses a folder or file that is mounted from its own file system.
    """
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return []
    points = (line.split(b" ")[4] for line in lines if line.count(b" ") > 4)
    # Blanks, tabs, ends of lines and backslashes are written as three octal digits.
    named = (re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point) for point in points)
    return sorted(path for path in map(Path, map(os.fsdecode, named)) if path.is_relative_to(place))


def _here() -> dict[str, str]:
    """Identify this machine among those that see the same files: not all file systems share locks."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        boot = ""
    return {"host": platform.node(), "boot": boot}


def _start(pid: int) -> str:
    """When a process began, in ticks since the boot; empty if it does not run, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _process() -> dict[str, Any]:
    """Identify this process among all on this boot: process numbers count only in their own name space."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {"space": space, "pid": os.getpid(), "start": _start(os.getpid())}


def _lives(mark: Any) -> bool | None:
    """Whether the process of a mark runs; None if that cannot be told from here."""
    here = {**_here(), **_process()}
    if not isinstance(mark, dict) or not all(here[key] and mark.get(key) == here[key] for key in ("boot", "space")):
        return None
    pid, start = mark.get("pid"), mark.get("start")
    if not here["start"] or not start or type(pid) is not int:
        return None
    return _start(pid) == start


def _unsure(rest: Path, name: str) -> bool:
    """Whether a leftover carries our mark, but neither a lock nor the process list tells if its process lives."""
    try:
        descriptor = os.open(rest, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            mine = os.fstat(descriptor).st_uid == os.geteuid() and not _lock(descriptor)
        finally:
            os.close(descriptor)
        mark = read_json(rest / MARK) if mine else None
    except (OSError, PenguinError):
        return False
    return isinstance(mark, dict) and mark.get("name") == name and _lives(mark) is None


def _claim(parent: Path, prefix: str, suffix: str, name: str) -> tuple[Path, int]:
    """A new folder, locked and then marked; the file descriptor holds the lock."""
    while True:
        folder = parent / f"{prefix}{uuid.uuid4().hex[:8]}{suffix}"
        try:
            folder.mkdir(mode=0o777 if suffix else 0o700)
        except FileExistsError:
            continue
        lock = -1
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            _lock(lock)
            (folder / MARK).write_text(json.dumps({"name": name, **_here(), **_process()}), encoding="utf-8")
            return folder, lock
        except (FileNotFoundError, BlockingIOError):  # taken for a leftover in the moment before it was locked
            if lock >= 0:
                os.close(lock)
        except BaseException:
            _remove(folder)
            if lock >= 0:
                os.close(lock)
            raise


def _lock(descriptor: int) -> bool:
    """Lock a folder for as long as this process has it open; False where the file system has no such locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _rests(parent: Path, prefix: str, suffix: str) -> list[Path]:
    """Folders whose names are as `_claim` makes them; the prefix `.` stands for those of any name."""
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return []
    form = re.compile(re.escape(prefix) + ANY_NAME * (prefix == ".") + "[0-9a-f]{8}" + re.escape(suffix), re.DOTALL)
    return [parent / name for name in names if form.fullmatch(name)]


@contextlib.contextmanager
def _taken(rest: Path) -> Iterator[str | None]:
    """The name in the mark of a leftover that nobody uses any more, locked meanwhile; None for any other folder."""
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(rest, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            mine = os.fstat(lock).st_uid == os.geteuid()
            locked = mine and _lock(lock)
        except OSError:
            mine = locked = False
        name = None
        if mine:
            try:
                mark = read_json(rest / MARK)
                here = _here()
                ours = any(here[key] and mark[key] == here[key] for key in here)
                if ours if locked else _lives(mark) is False:
                    name = str(mark["name"])
            except (PenguinError, KeyError, TypeError):
                with contextlib.suppress(OSError):  # killed before it was marked; a leftover with anything in it stays
                    if locked and (rest / MARK).is_file() and not (rest / MARK).stat().st_size:
                        (rest / MARK).unlink()
                    if locked:
                        rest.rmdir()
        yield name


def _remove(aside: Path) -> None:
    """Remove a writer's folder; its mark goes last, so that a kill leaves what the next one knows as ours."""
    for name in ("new", "old", "work"):
        shutil.rmtree(aside / name, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush everything in a folder to the disk, before what it replaces is removed.

    Raises:
        OSError: the disk is full or damaged.
    """
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(os.open(Path(parent) / name, os.O_RDONLY | os.O_NOFOLLOW))
        _sync_names(Path(parent))


def _sync_names(folder: Path) -> None:
    """Flush the names in a folder to the disk; a folder that may be written but not read is left to the system.

    Raises:
        OSError: the disk is full or damaged.
    """
    with contextlib.suppress(PermissionError):
        sync(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
