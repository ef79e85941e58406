"""Bundles that are exported once for a whole run of the tests, whichever process asks first.

Tests that run side by side (pytest-xdist) are in processes with session fixtures of their own, and an export of
penguin-nano takes from half a minute to two. Here the first that needs a bundle makes it while the others wait for it.
Nobody may write into it: who does is told at the end, and a test that changes a bundle changes a copy.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

Stamps = dict[str, tuple[int, int]]


class Exports:
    """Exports into `root`, a folder that all processes of the run share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, Stamps] = {}

    def nano(self, target: str, quant: str) -> Path:
        """penguin-nano for a target at a preset. Nothing is verified: that is what tests are for."""
        options = ["--model", "nano", "--target", target, "--quant", quant, "--max-seq-len", "512", "--no-verify"]
        return self.once(f"{target}-{quant}", [sys.executable, "-m", "penguin_edge", "export", *options, "-o"])

    def once(self, name: str, command: list[str]) -> Path:
        """The folder `name`, which the command makes when it is given that path as its last argument."""
        out = self.root / name
        if name not in self._found:
            with (self.root / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, also when its process is killed
                if not out.exists():
                    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=False)
                    assert done.returncode == 0, done.stderr
            self._found[name] = stamps(out)
        return out

    def check(self) -> None:
        """That every bundle is as it was when this process first saw it."""
        for name, found in self._found.items():
            now = stamps(self.root / name)
            changed = sorted({file for file, _ in found.items() ^ now.items()})
            assert not changed, f"a test wrote {', '.join(changed)} of {name}, which all share: have it change a copy"


def stamps(folder: Path) -> Stamps:
    """Size and time of writing of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
