"""Scores and baselines against counts by hand and by brute force, and the `eval` verb as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import CountingEngine, picture, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from penguin_edge.commands.eval import answerer, read_questions
from penguin_edge.dataset.records import DataRecord
from penguin_edge.errors import InputError
from penguin_edge.evaluation.score import (
    SLACK,
    Question,
    by_media,
    difference,
    evaluate,
    is_right,
    limited,
    normalise,
    questions_of,
    read_answers,
    save_answers,
    score,
    wilson,
)
from penguin_edge.prompt.chat import EMPTY_THINK, Message
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session

WORDS = st.sampled_from(["red", "green", "blue", "white"])


def question(reference: str, text: str = "Colour?", **options: Any) -> Question:
    messages = ({"role": "user", "content": text},)
    return Question("r", options.pop("task", "colour"), messages, text, reference, **options)


def record(*turns: str, **extra: Any) -> DataRecord:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))
    return DataRecord("r1", "text", (), messages, extra)


# --- questions and scoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["Red", " red\n", "RED.", "red ."])
def test_space_case_and_a_full_stop_do_not_count(answer: str) -> None:
    assert is_right(question("red"), answer)


@pytest.mark.parametrize("answer", ["", "red green", "reds", "red..", "the red"])
def test_anything_else_does(answer: str) -> None:
    assert not is_right(question("red"), answer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("2 s", True), ("about 3.0", True), ("4.01", False), ("1.9, not 3", False), ("-3", False), ("soon", False)],
)
def test_numbers_within_a_tolerance(answer: str, right: bool) -> None:
    assert is_right(question("at 3 s", tolerance=1.0), answer) == right


def test_every_assistant_turn_is_a_question_after_the_true_turns_before_it() -> None:
    first, second = questions_of([record("A?", "one", "B?", "2", task="t", choices=["one", "two"], tolerance=1)])
    assert (first.text, first.reference, first.choices, first.tolerance) == ("A?", "one", ("one", "two"), None)
    assert (second.text, second.reference, second.choices, second.tolerance) == ("B?", "2", (), 1.0)
    assert [m["content"] for m in second.messages] == ["A?", EMPTY_THINK + "one", "B?"]
    assert first.messages == second.messages[:1]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (record("A?"), "no answer"),
        (record("A?", "one", task=3), "task is 3"),
        (record("A?", "one", choices="one"), "choices is 'one'"),
        (record("A?", "one", tolerance="1"), "tolerance is '1'"),
        (record("A?", "one", weight=-1), "weight is -1"),
    ],
)
def test_unusable_records_are_named(bad: DataRecord, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        questions_of([bad])
    assert "r1" in str(error.value)


def test_a_limit_spreads_over_each_task() -> None:
    asked = [question(str(i), task="ab"[i % 3 == 0]) for i in range(12)]
    assert [q.reference for q in limited(asked, 2)] == ["0", "1", "6", "7"]
    assert limited(asked, None) == asked and limited(asked, 100) == asked


def test_questions_about_one_file_follow_each_other() -> None:
    def about(path: str) -> Question:
        content = [{"type": "image", "image": {"image_path": path}}, {"type": "text", "text": "?"}]
        return Question("r", "t", ({"role": "user", "content": content},), "?", "x")

    assert by_media([about("a"), about("b"), about("a"), about("b")]) == [0, 2, 1, 3]


# --- scores and baselines ---------------------------------------------------------------------------------------------


def test_a_score_by_hand() -> None:
    asked = [
        question("red", choices=("a", "b", "c", "red")),
        question("red", choices=("a", "b", "c", "red")),
        question("blue", choices=("Red", "blue", "red."), weight=2.0),
        question("3 s", "When?", task="time", tolerance=0.5, choices=("2 s", "2.5 s", "3 s", "4 s")),
    ]
    training = {"colour": {"Colour?": {"blue": 5, "red": 3}, "Other?": {"red": 9}}, "time": {"Else?": {"3.4": 1}}}
    result = score(asked, ["red", "blue", "blue", "2.5"], training=training)
    colour, time = result["tasks"]["colour"], result["tasks"]["time"]
    assert (colour["n"], colour["accuracy"], colour["majority"]) == (3, 0.75, 0.5)
    assert colour["chance"] == pytest.approx((0.25 + 0.25 + 2 * 0.5) / 4)
    assert colour["question_only"] == 0.5 and time["question_only"] == 1.0  # an unknown question: the task's answers
    assert (time["accuracy"], time["chance"], time["majority"]) == (1.0, 0.5, 1.0)
    assert result["average"] == 0.875 and result["baselines"]["majority"] == 0.75
    assert result["question_only_from"] == "training answers"
    low, high = colour["interval"]
    assert low < 0.75 < high and wilson(0.75, 16 / 6) == (low, high)


def test_leaving_one_out_does_not_punish_balance() -> None:
    balanced = [question(word) for word in ["red", "blue"] * 50]
    result = score(balanced, [""] * 100)
    assert result["tasks"]["colour"]["question_only"] == 0.5 and result["question_only_from"] == "leave-one-out"
    telling = [question(word, text) for word, text in [("red", "A?"), ("blue", "B?")] * 50]
    assert score(telling, [""] * 100)["tasks"]["colour"]["question_only"] == 1.0
    alone = [question(f"word {i}", f"{i}?") for i in range(10)]
    assert score(alone, [""] * 10)["tasks"]["colour"]["question_only"] == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 1.0, 2.5])), min_size=1, max_size=30))
def test_no_constant_number_beats_the_majority_baseline(truths: list[tuple[int, float]]) -> None:
    asked = [question(f"{value / 2}", tolerance=tolerance) for value, tolerance in truths]
    row = score(asked, [""] * len(asked))["tasks"]["colour"]
    best = max(sum(is_right(q, f"{c / 4}") for q in asked) for c in range(-20, 120))
    assert row["majority"] == pytest.approx(best / len(asked))
    assert 0 <= row["question_only"] <= 1


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, st.sampled_from(["A?", "B?"])), min_size=1, max_size=30))
def test_bounds_of_every_score(rows: list[tuple[str, str, str]]) -> None:
    asked = [question(truth, text) for truth, _, text in rows]
    row = score(asked, [answer for _, answer, _ in rows])["tasks"]["colour"]
    assert row["accuracy"] == sum(truth == answer for truth, answer, _ in rows) / len(rows)
    assert 0 <= row["interval"][0] <= row["accuracy"] <= row["interval"][1] <= 1
    truths = [truth for truth, _, _ in rows]
    assert row["majority"] == max(map(truths.count, truths)) / len(rows)
    assert score(asked, truths)["average"] == 1


def test_a_wilson_interval_from_the_literature() -> None:
    low, high = wilson(15 / 20, 20)  # Newcombe 1998, Statistics in Medicine 17: table of worked examples
    assert (round(low, 3), round(high, 3)) == (0.531, 0.888)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("A. B.", "ÄÖ ", "", ". .", "x.\n"):
        assert normalise(normalise(text)) == normalise(text) or text == ". ."


# --- the model --------------------------------------------------------------------------------------------------------


def data_set(folder: Path, rows: Sequence[dict[str, Any]], pictures: int = 2) -> Path:
    for i in range(pictures):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(name: str, image: str, asked: str, answer: str | None, **extra: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{asked}"}]
    turns += [] if answer is None else [{"from": "gpt", "value": answer}]
    return {"id": name, "image": [image], "conversations": turns, **extra}


def test_answers_are_those_of_a_fresh_session_and_pictures_are_encoded_once(tmp_path: Path) -> None:
    rows = [row(f"q{i}", f"{i % 2}.png", f"What is {i}?", "abcd") for i in range(6)]
    asked = read_questions(data_set(tmp_path, rows), None)
    engine, given = CountingEngine(), {}
    answer = answerer(Session(engine, tiny_tokenizer()))

    def noted(messages: Sequence[Message], most: int) -> str:
        given[messages[0]["content"][-1]["text"]] = (answer(messages, most), most)
        return given[messages[0]["content"][-1]["text"]][0]

    steps: list[tuple[int, int]] = []
    evaluate(asked, noted, progress=lambda done, total: steps.append((done, total)))
    assert engine.encoded_frames == 2 and steps == [(i, 6) for i in range(1, 7)]
    assert list(given) == [f"What is {i}?" for i in (0, 2, 4, 1, 3, 5)]
    for one in asked:
        text, most = given[one.text]
        fresh = Session(CountingEngine(), tiny_tokenizer())
        assert "".join(t.text for t in fresh.converse(one.messages, SamplingOptions(most))) == text
        assert most == 4 + SLACK


def cli(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", "eval", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_verb_prints_a_table_or_json(tmp_path: Path) -> None:
    rows = [row(f"q{i}", f"{i % 2}.png", "What?", "red", task="colour", choices=["red", "blue"]) for i in range(4)]
    data_set(tmp_path, [*rows, row("n", "0.png", "How many?", "3", task="count", tolerance=1)])
    (tmp_path / "training_answers.json").write_text(json.dumps({"colour": {"What?": {"blue": 2}}, "count": {}}))
    done = cli("tiny", "--data", tmp_path, "--json", "--limit", 3, "--threads", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    colour = result["tasks"]["colour"]
    assert {"n", "accuracy", "interval", "chance", "majority", "question_only"} <= colour.keys()
    assert (colour["n"], colour["chance"], colour["majority"], colour["question_only"]) == (3, 0.5, 1.0, 0.0)
    assert result["tasks"]["count"]["question_only"] == 0.0 and 0 <= result["average"] <= 1
    assert "questions/s" in done.stderr and "peak" in done.stderr
    done = cli("tiny", "--data", tmp_path / "annotations.jsonl")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["task", "n", "accuracy"] and lines[1].split()[:2] == ["colour", "4"]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no folder", "nothing"),
        ("empty folder", "annotations.jsonl"),
        ("no records", "annotations.jsonl"),
        ("no answer", "annotations.jsonl:1"),
        ("missing media", "9.png"),
        ("damaged media", "q0"),
        ("unknown model", "no-such-model"),
        ("budget", "budget"),
        ("training answers", "training_answers.json"),
    ],
)
def test_bad_input_is_one_sentence(case: str, says: str, tmp_path: Path) -> None:
    model, folder, more = "tiny", tmp_path, []
    good = row("q0", "0.png", "What?", "red")
    if case == "no folder":
        folder = tmp_path / "nothing"
    elif case == "no records":
        data_set(tmp_path, [])
    elif case == "no answer":
        data_set(tmp_path, [row("q0", "0.png", "What?", None)])
    elif case == "missing media":
        data_set(tmp_path, [row("q0", "9.png", "What?", "red")])
    elif case != "empty folder":
        data_set(tmp_path, [good])
    if case == "damaged media":
        (tmp_path / "0.png").write_bytes(b"no picture")
    elif case == "unknown model":
        model = "no-such-model"
    elif case == "budget":
        more = ["--budget", "0"]
    elif case == "training answers":
        (tmp_path / "training_answers.json").write_text('{"all": 3}')
    done = cli(model, "--data", folder, *more)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("penguin-edge")]
    assert len(message) == 1 and says in message[0], done.stderr


def test_usage() -> None:
    assert cli("tiny").returncode == 2
    assert cli("tiny", "--data", "x", "--limit", "0").returncode == 2


def test_answers_are_kept_and_compared(tmp_path: Path) -> None:
    questions = [
        Question(f"r{i}", "t", ({"role": "user", "content": f"q{i}"},), f"q{i}", str(i), weight=1.0 + (i == 0))
        for i in range(8)
    ]
    right = [str(i) for i in range(8)]
    worse = ["no", "no", *right[2:]]
    path = tmp_path / "answers.jsonl"
    save_answers(path, questions, worse)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["right"] for row in rows] == [False, False] + [True] * 6
    assert read_answers(path, questions) == worse
    # The first question counts twice: 3 of 9.
    mean, low, high = difference(questions, worse, right)
    assert mean == pytest.approx(-3 / 9) and low < mean < high and high - mean == pytest.approx(mean - low)
    assert difference(questions, worse, worse) == [0, 0, 0]
    for bad, says in (
        (questions[1:], "other questions"),
        ([dataclasses.replace(questions[0], text="?"), *questions[1:]], "other questions"),
    ):
        with pytest.raises(InputError, match=says):
            read_answers(path, bad)
    for content in ("{", '{"id": 1}', "[]"):
        path.write_text(content)
        with pytest.raises(InputError, match="--answers wrote"):
            read_answers(path, questions)
    with pytest.raises(InputError, match="cannot be written"):
        save_answers(tmp_path / "none" / "x", questions, worse)
