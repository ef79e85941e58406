"""How many questions of a data set a model answers right, beside what is reached without looking.

A record asks one question per assistant turn, with the true earlier turns before it, as in training. Keys of a record
beyond the published format:

| key         | meaning                                                                              |
|-------------|--------------------------------------------------------------------------------------|
| `task`      | name under which its questions are counted; "all" where it is missing                |
| `choices`   | list of the possible answers; questions whose answer is none of them have chance 0   |
| `tolerance` | numeric answers: the first number may be this far from the first number of the truth |
| `weight`    | how much its questions count (default 1)                                             |

An answer is right when it equals the true one after `normalise`: space, case and one final full stop do not count.

Three baselines stand beside every score. `chance` is the mean share of the choices that are right. `majority` is the
most frequent true answer of the task, known from the very data. `question_only` is the most frequent training answer to
the same question text (`training_answers.json`: task -> question -> answer -> count), or of the task where the text is
new.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from penguin_edge import schema
from penguin_edge.dataset.records import DataRecord
from penguin_edge.errors import InputError
from penguin_edge.files import parse_json, read_json, write_text
from penguin_edge.prompt.chat import EMPTY_THINK, Message

TRAINING_ANSWERS = "training_answers.json"
_string = schema.Text(longest=1 << 20)
COUNTS = schema.Table(_string, schema.Table(_string, schema.Table(_string, schema.Whole(0))))
"""What `training_answers.json` holds."""
ANSWER = schema.Record({"id": _string, "question": _string, "answer": _string}, open=True)
"""A line that `save_answers` writes."""
WROTE = "a file that --answers wrote"
ALL = "all"
Z = 1.959964
"""Two-sided 95 % of the normal distribution."""
SLACK = 8
"""Tokens that an answer may take beyond the longest true answer of its task."""

Answer = Callable[[Sequence[Message], int], str]
"""(messages that end with a user turn, most tokens to decode) -> text."""
CountProgress = Callable[[int, int], None]
"""(questions answered, questions)."""
Counts = dict[str, int]
Training = dict[str, dict[str, Counts]]


@dataclass(frozen=True)
class Question:
    """One assistant turn of a record. `text` is the text of the user turn before it."""

    record: str
    task: str
    messages: tuple[Message, ...]
    text: str
    reference: str
    choices: tuple[str, ...] = ()
    """All possible answers; none where the question is open."""
    tolerance: float | None = None
    weight: float = 1.0

    @cached_property
    def target(self) -> str | float:
        """What an answer is compared with: a number where there is a tolerance, else the normalised text."""
        number = None if self.tolerance is None else first_number(self.reference)
        return normalise(self.reference) if number is None else number

    def accepts(self, target: Any) -> bool:
        """Whether an answer's own target is right."""
        if self.tolerance is None or isinstance(self.target, str):
            return bool(target == self.target)
        return target is not None and abs(target - self.target) <= self.tolerance + 1e-9


def normalise(text: str) -> str:
    """The form in which two answers are compared."""
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def first_number(text: str) -> float | None:
    """The first number of a text such as "at 3.5 s"."""
    found = re.search(r"-?\d+(?:\.\d+)?", text)
    return float(found[0]) if found else None


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer counts; see the top of this file."""
    return question.accepts(normalise(answer) if question.tolerance is None else first_number(answer))


def questions_of(records: Iterable[DataRecord]) -> list[Question]:
    """The questions of a data set, in order.

    Raises:
        InputError: a record without an answer or with an extra key of the wrong kind, or no records at all.
    """
    out: list[Question] = []
    for record in records:
        out += _questions(record)
    if not out:
        raise InputError("the data set has no records; wanted at least one question with its answer")
    return out


def _questions(record: DataRecord) -> list[Question]:
    extra, name = record.extra, record.name
    task, choices = extra.get("task", ALL), extra.get("choices") or []
    tolerance, weight = extra.get("tolerance"), extra.get("weight", 1)
    if not isinstance(task, str) or not task:
        raise InputError(f"{name}: task is {task!r}; wanted a name")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{name}: choices is {choices!r}; wanted a list of answers")
    for key, value in (("tolerance", 0 if tolerance is None else tolerance), ("weight", weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise InputError(f"{name}: {key} is {value!r}; wanted a number of at least 0")
    known = {normalise(choice) for choice in choices}
    history: list[Message] = []
    out: list[Question] = []
    asked = ""
    for message in record.messages:
        text = _text(message).strip()
        if message["role"] != "assistant":
            history.append(message)
            asked = text if message["role"] == "user" else asked
            continue
        near = None if tolerance is None or first_number(text) is None else float(tolerance)
        out.append(
            Question(
                record=name,
                task=task,
                messages=tuple(history),
                text=asked,
                reference=text,
                choices=tuple(choices) if normalise(text) in known else (),
                tolerance=near,
                weight=float(weight),
            )
        )
        # Training sees an empty think block before every answer, earlier ones included.
        history.append({**message, "content": text if "<think>" in text else EMPTY_THINK + text})
    if not out:
        raise InputError(f"{name}: no answer to compare with; wanted an assistant turn")
    return out


def _text(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def limited(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions of each task, evenly spread, in their order."""
    if limit is None:
        return list(questions)
    places: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        places[question.task].append(i)
    kept: set[int] = set()
    for items in places.values():
        keep = min(limit, len(items))
        kept |= {items[j * len(items) // keep] for j in range(keep)}
    return [question for i, question in enumerate(questions) if i in kept]


def read_training_answers(folder: Path) -> Training | None:
    """`training_answers.json` of a data set, None where it has none.

    Raises:
        InputError: not of the form task -> question -> answer -> count.
    """
    path = folder / TRAINING_ANSWERS
    if not path.is_file():
        return None
    data = read_json(path, rule=COUNTS, advice="wanted task -> question -> answer -> count")
    return {task: {text.strip(): counts for text, counts in asked.items()} for task, asked in data.items()}


def evaluate(
    questions: Sequence[Question],
    answer: Answer,
    *,
    training: Training | None = None,
    progress: CountProgress | None = None,
) -> dict[str, Any]:
    """Ask every question and score the answers; see `ask_all` and `score`."""
    return score(questions, ask_all(questions, answer, progress), training=training)


def ask_all(questions: Sequence[Question], answer: Answer, progress: CountProgress | None = None) -> list[str]:
    """The answers, in the order of the questions.

    Questions about the same files are asked one after the other, so that a session can use again what it has computed.
    """
    longest = answer_tokens(questions)
    answers = [""] * len(questions)
    for done, i in enumerate(by_media(questions), 1):
        try:
            answers[i] = answer(questions[i].messages, longest[questions[i].task])
        except InputError as error:
            raise InputError(f"{questions[i].record}: {error}") from error
        if progress:
            progress(done, len(questions))
    return answers


def save_answers(path: str | Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """One JSON object per question: id, task, question, reference, answer, right; written aside, then renamed.

    Raises:
        InputError: `path` cannot be written.
    """
    rows = [
        {"id": q.record, "task": q.task, "question": q.text, "reference": q.reference, "answer": a}
        | {"right": is_right(q, a)}
        for q, a in zip(questions, answers, strict=True)
    ]
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows), advice="name another file for the answers")


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """What `save_answers` wrote for the very same questions.

    Raises:
        InputError: not such a file, or of other questions.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted {WROTE}") from error
    rows = [parse_json(line, f"{path}:{i}", rule=ANSWER, advice=f"wanted {WROTE}") for i, line in enumerate(lines, 1)]
    asked, answers = [(row["id"], row["question"]) for row in rows], [row["answer"] for row in rows]
    if asked != [(q.record, q.text) for q in questions]:
        raise InputError(f"{path}: answers to other questions; ask both models with the same --data and --limit")
    return answers


def difference(questions: Sequence[Question], a: Sequence[str], b: Sequence[str]) -> list[float]:
    """Weighted mean of right(a) - right(b), and its 95 % interval (normal, paired): [mean, low, high]."""
    rows = [(q.weight, float(is_right(q, x)) - float(is_right(q, y))) for q, x, y in zip(questions, a, b, strict=True)]
    total = sum(weight for weight, _ in rows)
    mean = sum(weight * value for weight, value in rows) / total
    half = Z * math.sqrt(sum(weight**2 * (value - mean) ** 2 for weight, value in rows)) / total
    return [mean, mean - half, mean + half]


def answer_tokens(questions: Sequence[Question]) -> dict[str, int]:
    """Tokens that an answer of each task may take: byte-level tokens are never more than bytes."""
    longest: dict[str, int] = {}
    for question in questions:
        longest[question.task] = max(longest.get(question.task, 0), len(question.reference.encode()) + SLACK)
    return longest


def by_media(questions: Sequence[Question]) -> list[int]:
    """Order of asking: questions that begin with the same media together, otherwise as they come."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        media = [part for m in question.messages if not isinstance(m["content"], str) for part in m["content"]]
        groups[repr([part for part in media if part.get("type") != "text"])].append(i)
    return [i for group in groups.values() for i in group]


def score(questions: Sequence[Question], answers: Sequence[str], *, training: Training | None = None) -> dict[str, Any]:
    """Accuracy and baselines of every task.

    Returns:
        `tasks`: name -> `n`, `accuracy`, `interval` (Wilson, 95 %), `chance`, `majority`, `question_only`;
        `average`: the mean of the tasks' accuracies; `baselines`: the same mean of each baseline;
        `question_only_from`: "training answers", or "leave-one-out" where there are none.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        groups[question.task].append(i)
    tasks: dict[str, dict[str, Any]] = {}
    for task, members in groups.items():
        asked = [questions[i] for i in members]
        weights = [question.weight for question in asked]
        total = sum(weights)
        if not total:
            raise InputError(f"task {task}: all weights are 0; give one question a weight above 0")

        def mean(values: Iterable[float], weights: list[float] = weights, total: float = total) -> float:
            return sum(w * value for w, value in zip(weights, values, strict=True)) / total

        accuracy = mean(is_right(question, answers[i]) for question, i in zip(asked, members, strict=True))
        blind = _left_out(asked) if training is None else _trained(asked, training.get(task, {}))
        tasks[task] = {
            "n": len(asked),
            "accuracy": accuracy,
            "interval": list(wilson(accuracy, total**2 / sum(w * w for w in weights))),
            "chance": mean(_chance(question) for question in asked),
            "majority": _majority(asked) / total,
            "question_only": mean(blind),
        }
    names = ("chance", "majority", "question_only")
    return {
        "tasks": tasks,
        "average": sum(row["accuracy"] for row in tasks.values()) / len(tasks),
        "baselines": {name: sum(row[name] for row in tasks.values()) / len(tasks) for name in names},
        "question_only_from": "leave-one-out" if training is None else "training answers",
    }


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share seen in `n` trials (Wilson 1927); with weights, `n` is the effective number."""
    middle = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + Z * Z / n) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # at 0 and 1 rounding may leave the share outside


# --- baselines --------------------------------------------------------------------------------------------------------


def _chance(question: Question) -> float:
    """Share of the choices that are right: one of them, or more within a tolerance."""
    if not question.choices:
        return 0.0
    choices = {normalise(choice) for choice in question.choices}
    return sum(is_right(question, choice) for choice in choices) / len(choices)


def _best_number(spans: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The constant within most of the spans (value, tolerance, weight), and the weight of those it is within."""
    edges = sorted(
        [(v - t, 0, w) for v, t, w in spans] + [(v + t, 1, w) for v, t, w in spans], key=lambda edge: edge[:2]
    )
    covered = most = best = 0.0
    for value, closes, weight in edges:
        covered += -weight if closes else weight
        if covered > most:
            most, best = covered, value
    return best, most


def _majority(asked: Sequence[Question]) -> float:
    """Weight that the best constant answers get: one text, and one number for questions with a tolerance."""
    texts: dict[Any, float] = defaultdict(float)
    for question in asked:
        if question.tolerance is None:
            texts[question.target] += question.weight
    spans = [(float(q.target), q.tolerance, q.weight) for q in asked if q.tolerance is not None]
    return max(texts.values(), default=0.0) + _best_number(spans)[1]


def _trained(asked: Sequence[Question], training: dict[str, Counts]) -> list[float]:
    """1 where the most frequent training answer to the question's text is right."""
    whole: Counter[str] = Counter()
    for counts in training.values():
        whole.update(counts)
    known: dict[tuple[str, float | None], str] = {}
    out = []
    for question in asked:
        key = (question.text, question.tolerance)
        if key not in known:
            known[key] = _likeliest(training.get(question.text, whole), question.tolerance)
        out.append(float(is_right(question, known[key])))
    return out


def _likeliest(counts: Counts, tolerance: float | None) -> str:
    """The most frequent answer, or the number within `tolerance` of most answers."""
    if tolerance is None:
        merged: Counter[str] = Counter()
        for answer, count in counts.items():
            merged[normalise(answer)] += count
        return max(merged, key=merged.__getitem__, default="")
    values = [(value, tolerance, count) for a, count in counts.items() if (value := first_number(a)) is not None]
    return f"{_best_number(values)[0]:.6f}" if values else ""


def _left_out(asked: Sequence[Question]) -> list[float]:
    """Credit of the most frequent answer among the other questions of the same text, else of the same task.

    Leaving a question out costs its own answer one count: where answers are balanced it would always come second. So
    answers one count behind share the first place.
    """
    by_text: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        by_text[question.text].append(question)
    tables: dict[tuple[str | None, float | None], Counter[Any]] = {}

    def counts_of(question: Question, text: str | None) -> Counter[Any]:
        key = (text, question.tolerance)
        if key not in tables:
            group = asked if text is None else by_text[text]
            tables[key] = _candidates([q for q in group if q.tolerance == question.tolerance])
        return tables[key]

    out = []
    for question in asked:
        credit = 0.0
        for text in (question.text, None):
            others = {c: n - question.accepts(c) for c, n in counts_of(question, text).items()}
            lead = max(others.values())
            if lead > 0:
                first = [c for c, n in others.items() if n >= max(1, lead - 1)]
                credit = sum(question.accepts(c) for c in first) / len(first)
                break
        out.append(credit)
    return out


def _candidates(group: Sequence[Question]) -> Counter[Any]:
    """Every constant answer worth giving, and how many of the group, which has one tolerance, it answers."""
    targets = Counter(question.target for question in group)
    if group[0].tolerance is None:
        return targets
    # The best constant lies at the upper end of some question's range.
    ends = {float(target) + group[0].tolerance for target in targets} | set(targets)
    asked = {question.target: question for question in group}
    return Counter({c: sum(n for target, n in targets.items() if asked[target].accepts(c)) for c in ends})
