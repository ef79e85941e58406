"""Published records: what they become, and that every broken one is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penguin_edge.dataset.records import ANNOTATIONS, DataRecord, missing_media, read_records
from penguin_edge.errors import InputError


def turns(*values: str) -> list[dict[str, str]]:
    """Human and gpt in turns."""
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def write(folder: Path, *items: Any) -> Path:
    path = folder / ANNOTATIONS
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n", encoding="utf-8")
    return path


def read_one(folder: Path, item: Any) -> DataRecord:
    return read_records(write(folder, item))[0]


def image(path: Path) -> dict[str, Any]:
    return {"type": "image", "image": {"image_path": str(path)}}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_tags_say_where_the_images_stand(tmp_path: Path) -> None:
    item = {
        "id": 7,
        "image": ["a.png", "b.png", "c.png"],
        "conversations": turns("Compare <image> and\n<image>\n now ", " Same.", "<image> And this?", "No."),
        "task": "compare",
    }
    record = read_one(tmp_path, item)
    a, b, c = (tmp_path / name for name in item["image"])
    assert record.messages == (
        {"role": "user", "content": [text("Compare"), image(a), text("and"), image(b), text("now")]},
        {"role": "assistant", "content": " Same."},
        {"role": "user", "content": [image(c), text("And this?")]},
        {"role": "assistant", "content": "No."},
    )
    assert (record.id, record.kind, record.media, record.extra) == ("7", "image", (a, b, c), {"task": "compare"})
    assert record.where == f"{tmp_path / ANNOTATIONS}:1"


@pytest.mark.parametrize("key", ["image", "video"])
def test_without_a_tag_the_media_come_first(tmp_path: Path, key: str) -> None:
    files = ["a", "b"] if key == "image" else ["a"]
    record = read_one(tmp_path, {key: files, "conversations": turns("What is it?", "A chart.")})
    content = record.messages[0]["content"]
    assert [part["type"] for part in content] == [*[key] * len(files), "text"]
    assert content[0][key] == {f"{key}_path": str(tmp_path / "a")}
    assert content[-1] == text("What is it?") and record.kind == key


@pytest.mark.parametrize("empty", [{}, {"image": None}, {"image": [], "video": []}])
def test_a_record_without_media_is_text(tmp_path: Path, empty: dict[str, Any]) -> None:
    record = read_one(tmp_path, {**empty, "conversations": turns("Why?", "So.")})
    assert (record.kind, record.media, record.id) == ("text", (), f"{ANNOTATIONS}:1")


def test_turns_before_the_first_question_are_dropped_but_not_a_system_message(tmp_path: Path) -> None:
    spoken = [
        {"from": "gpt", "value": "dropped"},
        {"from": "system", "value": "Be short."},
        *turns("Hi", "Hello"),
        {"from": "system", "value": "Be long."},
        *turns("Hi again", "Hello!"),
    ]
    record = read_one(tmp_path, {"conversations": spoken})
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant", "system", "user", "assistant"]
    assert [m["content"] for m in record.messages if m["role"] == "system"] == ["Be short.", "Be long."]


def test_whoever_is_not_human_answers(tmp_path: Path) -> None:
    spoken = [{"from": "human", "value": "Hi"}, {"from": "bing", "value": "Hello"}]
    assert [m["role"] for m in read_one(tmp_path, {"conversations": spoken}).messages] == ["user", "assistant"]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_gives_what_lines_give_but_its_own_line_numbers(tmp_path: Path, indent: int | None) -> None:
    items = [{"id": str(i), "image": f"{i}.png", "conversations": turns("What?", f"{i}")} for i in range(5)]
    lines = read_records(write(tmp_path, *items), tmp_path / "media")
    array = tmp_path / "all.json"
    array.write_text("\ufeff\n" + json.dumps(items, indent=indent) + "\n", encoding="utf-8")
    from_array = read_records(array, tmp_path / "media")
    assert [(r.id, r.messages, r.media) for r in from_array] == [(r.id, r.messages, r.media) for r in lines]
    assert lines[0].media == (tmp_path / "media" / "0.png",)
    written = array.read_text(encoding="utf-8").split("\n")
    for record in from_array:
        at = int(record.where.rpartition(":")[2])
        assert written[at - 1].lstrip("[ ").startswith("{")
        assert indent is None or f'"id": "{record.id}"' in written[at]


def test_a_folder_is_its_annotations(tmp_path: Path) -> None:
    path = write(tmp_path, {"conversations": turns("a", "b")})
    assert read_records(tmp_path) == read_records(path)


ASKED = turns("What?", "That.")
BROKEN = [
    ("[1]", "a record is list"),
    ('{"id": 1', "not JSON"),
    ("7", "wanted a JSON object"),
    ({}, "no conversations"),
    ({"conversations": []}, "no conversations"),
    ({"conversations": ["hi"]}, "a turn is 'hi'"),
    ({"conversations": [{"from": "human", "value": None}]}, "a turn is"),
    ({"conversations": turns("a")}, "a question without an answer"),
    ({"conversations": turns("a", "b", "c")}, "a question without an answer"),
    ({"conversations": [ASKED[0], *ASKED]}, "a question without an answer"),
    ({"conversations": [*ASKED, ASKED[1]]}, "an answer without a question"),
    ({"conversations": [ASKED[1]]}, "no question"),
    ({"conversations": turns("a", " \n")}, "an empty answer"),
    ({"image": ["a"], "video": ["b"], "conversations": ASKED}, "both image and video"),
    ({"video": ["a", "b"], "conversations": ASKED}, "2 videos, wanted one"),
    ({"image": {"path": "a"}, "conversations": ASKED}, "wanted a list of paths"),
    ({"image": [3], "conversations": ASKED}, "wanted a list of paths"),
    ({"image": ["a"], "conversations": turns("<image> or <image>?", "b")}, "2 <image> tags in human text and 1 images"),
    ({"image": ["a", "b"], "conversations": turns("<image>?", "b")}, "1 <image> tags in human text and 2 images"),
    ({"conversations": turns("<video>?", "b")}, "1 <video> tags in human text and 0 videos"),
    ({"video": ["a"], "conversations": turns("<image>?", "b")}, "1 <image> tags in human text and 0 images"),
]


@pytest.mark.parametrize(("item", "said"), BROKEN, ids=[said for _, said in BROKEN])
@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, item: Any, said: str, array: bool) -> None:
    good = json.dumps({"conversations": ASKED})
    bad = item if isinstance(item, str) else json.dumps(item)
    path = tmp_path / "data.json"
    path.write_text(f"[\n{good},\n{bad}\n]" if array else f"{good}\n\n{bad}\n")
    wanted = "not JSON" if array and bad.count("{") > bad.count("}") else said
    with pytest.raises(InputError, match=wanted) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("text_", ["", "\n\n", "[]", " [ ] "])
def test_no_record_at_all(tmp_path: Path, text_: str) -> None:
    (tmp_path / "x.json").write_text(text_)
    with pytest.raises(InputError, match="no record in it"):
        read_records(tmp_path / "x.json")


@pytest.mark.parametrize("text_", ["[{} {}]", "[{},", "[", '[{"a": 1}\n\n]\n x'])
def test_a_broken_array(tmp_path: Path, text_: str) -> None:
    (tmp_path / "x.json").write_text(text_)
    with pytest.raises(InputError, match=r"x\.json:\d+: "):
        read_records(tmp_path / "x.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{ANNOTATIONS}: no such file"):
        read_records(tmp_path)
    (tmp_path / ANNOTATIONS).write_bytes(b'{"a": 1}\n{"b": "\xff"}\n')
    with pytest.raises(InputError, match=f"{ANNOTATIONS}:2: not UTF-8"):
        read_records(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["human", "gpt", "<image>x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "image", "video", "conversations", "id", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(item=VALUES, array=st.booleans())
def test_whatever_is_in_the_file_a_record_or_a_named_error_comes_out(tmp_path: Path, item: Any, array: bool) -> None:
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps([item] if array else {"conversations": item}))
    try:
        (record,) = read_records(path)
    except InputError as error:
        assert str(error).startswith(f"{path}:1: ")
    else:
        roles = [message["role"] for message in record.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) != []


def test_missing_media_are_found_without_opening_any(tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()  # empty: not a picture, but there
    items = [{"image": [name], "conversations": ASKED} for name in ("there.png", "gone.png", "there.png", "gone.png")]
    found = missing_media(read_records(write(tmp_path, *items)))
    assert len(found) == 1 and f"{ANNOTATIONS}:2: record" in found[0] and "gone.png does not exist" in found[0]
