"""What all tests share is made once, by however many processes at a time, and is told of when it was changed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from exports import Exports

# Leaves a mark of each call beside what it makes, and takes long enough that another one would come in between.
MAKE = """
import pathlib, sys, time, uuid
out = pathlib.Path(sys.argv[1])
(out.parent / f"call-{uuid.uuid4()}").touch()
time.sleep(0.2)
out.mkdir()
(out / "graph").write_text("whole")
"""
COMMAND = [sys.executable, "-c", MAKE]


def test_many_at_a_time_make_one(tmp_path: Path) -> None:
    # Locks of several opened files exclude each other in one process as in many.
    asking = [Exports(tmp_path) for _ in range(4)]
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda one=one: found.append((one.once("b", COMMAND) / "graph").read_text()))
        for one in asking
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4
    assert len(list(tmp_path.glob("call-*"))) == 1


def test_a_failure_is_told_and_tried_again(tmp_path: Path) -> None:
    exports = Exports(tmp_path)
    with pytest.raises(AssertionError, match="no space"):
        exports.once("b", [sys.executable, "-c", "raise SystemExit('no space')"])
    assert (exports.once("b", COMMAND) / "graph").read_text() == "whole"


@pytest.mark.parametrize("change", ["graph", "profile.json"])
def test_who_writes_into_it_is_told(tmp_path: Path, change: str) -> None:
    exports = Exports(tmp_path)
    folder = exports.once("b", COMMAND)
    exports.check()
    (folder / change).write_text("something else")
    with pytest.raises(AssertionError, match=f"wrote {change} of b"):
        exports.check()
