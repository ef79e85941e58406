"""Annotations name media of their own folder; what lies elsewhere must be allowed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import CLIP, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from penguin_edge.dataset.records import ANNOTATIONS, DataRecord, MediaFolder, missing_media, read_records
from penguin_edge.errors import InputError
from penguin_edge.media.frames import read_video, read_video_by_number


def annotate(folder: Path, *names: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    lines = [json.dumps({"id": str(i), "image": [name], "conversations": said}) for i, name in enumerate(names)]
    path = folder / ANNOTATIONS
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read_one(folder: Path, name: str, **options: Any) -> DataRecord:
    return read_records(annotate(folder, name), **options)[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set beside a picture that is not of it, with links into it, within it and out of it."""
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "elsewhere" / "a.png", folder / "pictures" / "a.png"):
        Image.fromarray(picture(1)).save(path)
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(folder / "pictures" / "a.png")
    (folder / "outer").symlink_to(tmp_path / "elsewhere")
    (folder / "inner").symlink_to("pictures")
    (folder / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(folder)
    return folder


def test_media_of_the_folder_are_taken(data: Path) -> None:
    inside = [
        "pictures/a.png",
        "./pictures/../pictures/a.png",
        "in.png",
        "inner/a.png",
        str(data / "pictures" / "a.png"),
    ]
    inside += [f"file://{data}/pictures/a.png", "pictures/not there yet.png", "../data/pictures/a.png", "..."]
    for root in (data, data.parent / "link"):
        for name in inside:
            (path,) = read_one(root, name).media
            assert name.startswith(("file:", "/")) or path == root / name


def test_media_elsewhere_must_be_allowed(data: Path) -> None:
    outside = ["../secret.png", "pictures/../../secret.png", str(data.parent / "secret.png"), "/etc/passwd", "out.png"]
    outside += ["outer/a.png", "outer", "..", "../..", "outer/..", "inner/../../secret.png", "file:///etc/passwd"]
    outside += [f"FILE://localhost{data.parent}/secret.png", "/dev/zero", "../data2/a.png", "file:%2e%2e/secret.png"]
    for name in outside:
        with pytest.raises(InputError, match=rf"{ANNOTATIONS}:1: image .*--allow-outside"):
            read_one(data, name)
        assert len(read_one(data, name, allow_outside=True).media) == 1
    # A folder of media that was named is the one that counts.
    path = annotate(data, "secret.png", "data/pictures/a.png")
    assert read_records(path, data.parent)[0].media == (data.parent / "secret.png",)
    with pytest.raises(InputError, match="outside"):
        read_records(annotate(data, "pictures/a.png", "../secret.png"), data / "pictures")


def test_names_that_are_none(data: Path) -> None:
    for name in ("data:image/png;base64,AAAA", "http://host/a.png", "a" * 300, "a/" * 3000, "a\0b", "file://host/a"):
        for allowed in (False, True):
            with pytest.raises(InputError) as caught:
                found = missing_media([read_one(data, name, allow_outside=allowed)])
                raise InputError(*found)
            assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert len(missing_media([read_one(data, "loop", allow_outside=True)])) == 1


@given(st.lists(st.sampled_from(["..", ".", "pictures", "inner", "outer", "a.png", "new", ""]), min_size=1, max_size=6))
def test_what_is_taken_lies_inside(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "folders"
    (base / "data" / "pictures").mkdir(parents=True, exist_ok=True)
    (base / "elsewhere").mkdir(exist_ok=True)
    for name, target in (("inner", "pictures"), ("outer", "../elsewhere")):
        if not (base / "data" / name).is_symlink():
            (base / "data" / name).symlink_to(target)
    name = "/".join(parts)
    inside = bool(name) and (base / "data" / name).resolve().is_relative_to((base / "data").resolve())
    try:
        assert MediaFolder(base / "data").path(name) and inside
    except InputError:
        assert not inside


def test_the_flag_allows_it(data: Path, tmp_path: Path) -> None:
    annotate(data, "../secret.png")
    command = [sys.executable, "-m", "penguin_edge", "eval", "tiny", "--data", str(data), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "--allow-outside" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*command, "--allow-outside"], capture_output=True, text=True, check=False, timeout=120)
    assert "--allow-outside" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    for verb in ("train", "export", "verify", "eval"):
        told = subprocess.run([*command[:3], verb, "--help"], capture_output=True, text=True, check=True, timeout=60)
        assert "--allow-outside" in told.stdout


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40).map(lambda s: f"a{s}"))
def test_names_of_an_annotation_do_not_act_on_a_terminal(name: str) -> None:
    said = missing_media([DataRecord(name, "image", (Path("gone") / name,), (), {}, "")])
    assert len(said) == 1 and said[0].isprintable()
    assert not name.isprintable() or said[0].startswith(f"record {name!r}: gone/{name} does not exist")


def test_every_reader_names_a_file_in_printable_words(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb.mp4"
    shutil.copy(CLIP, path)
    cut = tmp_path / "cut\x1b[2J.mp4"
    cut.write_bytes(CLIP.read_bytes()[:2000])
    empty = tmp_path / "em\npty"
    empty.mkdir()
    for file, options in ((path, {"start": 1e6}), (path, {"max_pixels": 9}), (cut, {}), (empty, {})):
        for read in (read_video, read_video_by_number):
            with pytest.raises(InputError) as caught:
                list(read(file, **options))  # type: ignore[operator]
            assert str(caught.value).isprintable(), caught.value
