"""JSON from anywhere is read within bounds, or refused in one sentence."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.errors import BundleError, InputError
from penguin_edge.files import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, parse_json, parse_json_at, read_json, write_json
from penguin_edge.schema import Flag, Free, Maybe, Real, Record, Rows, Rule, SchemaError, Table, Text, Whole

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(json_values)
def test_what_json_holds_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


@given(st.text() | st.binary())
def test_any_text_is_a_value_or_refused(text: str | bytes) -> None:
    try:
        value = parse_json(text, "x")
    except InputError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
    else:
        assert json.loads(json.dumps(value)) == value


BAD = {
    "depth of lists": ("[" * 100_000 + "]" * 100_000, f"deeper than {MAX_DEPTH}"),
    "depth of objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, f"deeper than {MAX_DEPTH}"),
    "depth just above the limit": ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), f"deeper than {MAX_DEPTH}"),
    "unclosed depth": ("[" * 100_000, f"deeper than {MAX_DEPTH}"),
    "digits": ("9" * 5000, f"5000 digits, wanted at most {MAX_DIGITS}"),
    "digits of a fraction": ("0." + "3" * 5000, "longer than"),
    "an exponent": ("1e999", "outside of what a float holds"),
    "NaN": ("[NaN]", "NaN is no JSON number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no JSON number"),
    "a key twice": ('{"theta": 1, "b": 2, "theta": 3}', "'theta' stands twice"),
    "half a surrogate": ('"\\ud800"', "half a surrogate pair"),
    "half a surrogate in a key": ('{"\\udfff": 1}', "half a surrogate pair"),
    "another encoding": ("ä".encode("latin-1"), "not UTF-8 at byte 0"),
    "nothing": ("", "not JSON"),
    "two values": ("1 2", "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_said_in_one_sentence(case: str, tmp_path: Path) -> None:
    text, said = BAD[case]
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BundleError) as error:
        read_json(path, error=BundleError, advice="copy it again")
    assert said in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("; copy it again") and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "x.json") == {}


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole of a terabyte
    with pytest.raises(InputError, match=f"wanted at most {MAX_BYTES}"):
        read_json(path)


@pytest.mark.parametrize("path", ["missing.json", ".", "a\0b"])
def test_what_cannot_be_opened_is_said(path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_json(f"{tmp_path}/{path}")


def test_a_value_within_a_text_is_read_by_the_same_rules() -> None:
    assert parse_json_at('[{"a": 1}, 2]', 1, "x") == ({"a": 1}, 9)
    for text in ('{"a": 1, "a": 2}', "[" * 1000, "NaN"):
        with pytest.raises(InputError, match="x: "):
            parse_json_at(text, 0, "x")


def test_numbers_that_json_has_not_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}})
    assert read_json(tmp_path / "x.json") == {"a": [None, [None, 1.5]], "b": {"c": None}}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


RULES: list[tuple[Rule, list[Any], list[Any]]] = [
    (Whole(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, [], 2**70]),
    (Real(0.0, 1.0), [0, 1, 0.5], [-0.1, 2, True, "0", None, math.nan, math.inf]),
    (Real(above=0.0), [1e-9], [0, -1]),
    (Flag(), [True, False], [0, 1, "true", None]),
    (Text(longest=3), ["", "abc"], ["abcd", 1, None, []]),
    (Text(("a", "b")), ["a"], ["c", "", None]),
    (Text(pattern="[a-z]+"), ["ab"], ["ab\n", "A", ""]),
    (Rows(Whole(), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], [True], {}, "1", None]),
    (Record({"a": Whole()}, {"b": Flag()}), [{"a": 1}, {"a": 1, "b": True}], [{}, {"a": 1, "c": 1}, {"a": None}, []]),
    (Record({"a": Whole()}, open=True), [{"a": 1, "c": None}], [{"c": 1}]),
    (Table(Text(pattern="[a-z]"), Whole(), 1, 2), [{"a": 1}], [{}, {"A": 1}, {"a": "1"}, [], None]),
    (Maybe(Whole()), [None, 1], ["1", False]),
    (Free(), [None, 1, "a", [], {}], []),
]


@pytest.mark.parametrize(("rule", "good", "bad"), RULES, ids=[repr(rule)[:40] for rule, _, _ in RULES])
def test_a_rule_takes_what_it_says(rule: Rule, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        rule.check(value, "x")
    for value in bad:
        with pytest.raises(SchemaError, match="x"):
            rule.check(value, "x")


def test_a_broken_rule_is_said_with_its_place() -> None:
    rule = Record({"a": Table(Text(), Rows(Record({"b": Whole(1, 5)})))})
    with pytest.raises(InputError) as error:
        parse_json('{"a": {"k": [{"b": 1}, {"b": 7}]}}', "f.json", rule=rule, advice="mend it")
    assert str(error.value) == "f.json: a.k[1].b is 7, wanted a whole number, 1 to 5; mend it"


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, "9" * 5000, '{"a": NaN}', "[]"])
def test_the_command_line_says_one_sentence(content: str, tmp_path: Path) -> None:
    """A manifest and a conversation: with neither is there a traceback."""
    (tmp_path / "bundle.json").write_text(content)
    (tmp_path / "talk.json").write_text(content)
    for command in (["verify", str(tmp_path)], ["run", "nano", "--conversation", str(tmp_path / "talk.json")]):
        done = subprocess.run(
            [sys.executable, "-m", "penguin_edge", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
