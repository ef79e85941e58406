"""The demo's questions: asks every given bundle about a data set, and prints each answer beside the true one.

python tools/demo_questions.py build/demo/questions build/demo/nano-onnx build/demo/nano-executorch
"""

from __future__ import annotations

import sys
from pathlib import Path

from penguin_edge.dataset.records import read_records
from penguin_edge.evaluation.score import is_right, questions_of
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session


def main(data: str, bundles: list[str]) -> int:
    records = read_records(Path(data))
    rows = []
    for record in records:
        *_, question, answer = record.messages
        rows.append([_text(question), _text(answer)])
    for bundle in bundles:
        session = Session.open(bundle)
        for row, record in zip(rows, records, strict=True):
            row.append("".join(t.text for t in session.converse(record.messages[:-1], SamplingOptions(16))))
    names = [Path(bundle).name for bundle in bundles]
    print("\nQuestions about clips and pictures made of combinations that were never trained on:\n")
    print(f"  {'question':<45}" + "".join(f"{name:>18}" for name in ("true", *names)))
    for question, *answers in rows:
        print(f"  {question:<45}" + "".join(f"{answer:>18}" for answer in answers))
    asked = questions_of(records)
    right = [sum(is_right(q, row[2 + i]) for q, row in zip(asked, rows, strict=True)) for i in range(len(bundles))]
    print(
        "\n  right, the time of a change to the frame before or after: "
        + ", ".join(f"{name} {n} of {len(rows)}" for name, n in zip(names, right, strict=True))
    )
    return 0 if all(row[2:] == [row[2]] * len(bundles) for row in rows) else 1


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part["text"].strip() for part in content if "text" in part)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
