"""Memory given back to the system: nothing that was written is lost, and what is read again is right."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penguin_edge.bundle.folder import Bundle
from penguin_edge.machine import page_out, resident_mb, trim_heap
from penguin_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says which pages are resident")


def mapped_kb(path: Path) -> int:
    """Resident kilobytes of this process's mappings of a file."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(str(path.resolve()))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    wanted = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8)
    with path.open("wb") as stream:
        stream.write(wanted.data)
        stream.flush()
        os.fsync(stream.fileno())  # pages that are not on the disk yet would stay
    mapped = np.memmap(path, np.uint8, "c")
    mapped[5] = 77  # a private copy of its page, which the file does not have
    assert int(mapped[wanted != 0].sum()) and mapped_kb(path) >= 4096
    page_out(path)
    assert mapped_kb(path) <= 1024  # a large page that holds the private one may stay whole
    assert mapped[5] == 77 and np.array_equal(mapped[4096:], wanted[4096:])
    page_out(tmp_path / "another")
    trim_heap()
    assert resident_mb() > 0 and resident_mb(2**22 + 1) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize("compact", [False, True])
def test_pictures_do_not_come_from_the_heap(compact: bool) -> None:
    """Blocks of 1 MB that the C library maps one by one, after one of 8 MB was freed, which raises its own limit."""
    program = """
import ctypes, sys
import numpy as np
from penguin_edge.machine import keep_heap_compact
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u f o k c".split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
if sys.argv[1] == "True":
    keep_heap_compact()
for _ in range(2):
    np.ones(8 << 20, np.uint8)
before = mallinfo().hblks
kept = [np.ones(1 << 20, np.uint8) for _ in range(5)]
print(mallinfo().hblks - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(compact)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == (5 if compact else 0)


def test_an_engine_gives_back_the_weights_that_it_has_copied(
    nano_bundle: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy, and on the disk: the system pages nothing out that another process has mapped or that is not written yet.
    bundle = Bundle.read(shutil.copytree(nano_bundle("onnx", "int4"), tmp_path / "bundle"))
    data = bundle.path("decoder.onnx.data")
    with data.open("rb+") as stream:
        os.fsync(stream)

    def loaded() -> tuple[int, OnnxRuntimeEngine]:
        engine = OnnxRuntimeEngine.open(bundle, threads=1)
        engine._session("decoder")
        return mapped_kb(data), engine

    with monkeypatch.context() as without:
        without.setattr("penguin_edge.runtime.engines.onnxruntime.page_out", lambda path: None)
        kept, engine = loaded()
        wanted = engine.forward(engine.new_cache(), engine.embed(np.arange(20)), np.array([-1]))
        del engine
    left, engine = loaded()
    assert left < kept / 4, "the runtime keeps no file mapped any more: paging out can go"
    assert np.array_equal(engine.forward(engine.new_cache(), engine.embed(np.arange(20)), np.array([-1])), wanted)
