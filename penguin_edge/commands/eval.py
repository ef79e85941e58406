"""`penguin-edge eval MODEL`: accuracy per task beside its baselines, perplexity and KL on a text, or layers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from penguin_edge.commands.common import check_outputs, emit, open_model, positive, say, table
from penguin_edge.commands.eval_layers import run_layers
from penguin_edge.commands.options import add_allow_outside, add_budget, add_engine, add_json, add_keep_visual, add_tra
from penguin_edge.dataset.records import missing_media, read_records
from penguin_edge.errors import InputError
from penguin_edge.evaluation.budget_study import Ask, Prune, Reply, draw_study, study
from penguin_edge.evaluation.score import (
    Answer,
    Question,
    ask_all,
    difference,
    limited,
    questions_of,
    read_answers,
    read_training_answers,
    save_answers,
    score,
)
from penguin_edge.evaluation.text import measure_text
from penguin_edge.machine import peak_mb
from penguin_edge.prompt.chat import Message
from penguin_edge.runtime.core.options import SessionOptions
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session
from penguin_edge.tra.clip import Policy

LENGTH = 256
"""Tokens of a piece of text."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("eval", help="accuracy on questions, perplexity and KL on a text, or errors of layers")
    parser.add_argument("model", metavar="BUNDLE|CHECKPOINT|PRESET")
    parser.add_argument("--data", metavar="DIR", help="folder with annotations.jsonl, or such a file")
    parser.add_argument("--text", metavar="FILE", help="plain text: perplexity, and with --against KL and agreement")
    parser.add_argument(
        "--layers",
        action="store_true",
        help="cosine and SNR of every layer, and of the encoder's features, on --data, --text or a built-in set",
    )
    parser.add_argument("--against", metavar="BUNDLE|CHECKPOINT", help="with --text or --layers: the unquantized model")
    parser.add_argument("--quant", metavar="NAME|FILE", help="with --layers: try a recipe on a checkpoint")
    parser.add_argument("--calibration", metavar="DIR|FILE", help="with --layers: the data for a calibrated recipe")
    parser.add_argument(
        "--pieces", type=positive, default=4, help="with --text or --layers: number of pieces (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=positive, help="tokens of a piece (default: 256 with --text, 512 with --layers)"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --layers: seed of the samples (default: %(default)s)")
    add_allow_outside(parser)
    parser.add_argument("--answers", metavar="FILE", help="write every answer, one JSON object per line")
    parser.add_argument("--over", metavar="FILE", help="compare with the --answers of another model")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N questions of each task, evenly spread")
    add_budget(parser, "(default: what the context leaves)", usage=False)
    add_tra(parser)
    add_keep_visual(parser, "; with --budget-study a way of its own, prune")
    add_engine(parser)
    parser.add_argument(
        "--budget-study",
        action="store_true",
        help="accuracy against budget for TRA (strict, adaptive), dropping and shrinking frames; with --keep-visual "
        "also adaptive plans of which a share is kept",
    )
    parser.add_argument("-o", "--out", metavar="PNG", help="a picture of the budget study or the layers")
    add_json(parser)
    parser.set_defaults(run=run, usage=parser.error)


class CountLine:
    """Work done, rate, time left and peak memory on stderr: rewritten on a terminal, else every 10 seconds."""

    def __init__(self, what: str = "questions") -> None:
        self._what = what
        self._begin = self._last = time.monotonic()
        self._rewrites = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < (0.5 if self._rewrites else 10):
            return
        self._last = now
        rate = done / max(now - self._begin, 1e-9)
        left = f"about {(total - done) / rate:.0f} s left"
        line = f"[{done}/{total}] {rate:.1f} {self._what}/s, {left}, peak {peak_mb():.0f} MB"
        if self._rewrites:
            print(f"\r\x1b[K{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            say(line)


def read_questions(data: Path, limit: int | None, *, allow_outside: bool = False) -> list[Question]:
    """The questions of a data set, checked as far as is possible before the model is opened.

    Raises:
        InputError: no data there, a record that cannot be used, a file that a record names and that is missing.
    """
    records = read_records(data, allow_outside=allow_outside)
    missing = missing_media(records)
    if missing:
        more = f" ({len(missing)} files are missing)" if len(missing) > 1 else ""
        raise InputError(missing[0] + more)
    return limited(questions_of(records), limit)


def answerer(session: Session) -> Answer:
    """Greedy answers of a session."""

    def answer(messages: Sequence[Message], most: int) -> str:
        for _ in session.converse(messages, SamplingOptions(max_new_tokens=most)):
            pass
        return session.report.text

    return answer


def asker(session: Session, *, afresh: bool = False) -> Ask:
    """Greedy answers of a session whose clips are planned by the policy that is given with each question.

    Args:
        afresh: compute every clip anew, since which tokens are kept would else depend on the questions before.
    """

    def ask(messages: Sequence[Message], most: int, policy: Policy) -> Reply:
        session.policy = policy
        if afresh:
            session.features.clear()
            session.cache.forget()
        for _ in session.converse(messages, SamplingOptions(max_new_tokens=most)):
            pass
        report = session.report
        return Reply(report.text, report.visual_tokens, report.frames - report.dropped, report.encoded_tokens)

    return ask


def run(args: argparse.Namespace) -> int:
    check_outputs(args, ["out", "answers"], ["model", "data", "against", "calibration", "over", "text"])
    if args.layers:
        return run_layers(args, CountLine)
    if not args.data and not args.text:
        args.usage("one of the arguments --data --text --layers is required")
    if args.data and args.text:
        args.usage("argument --text: not allowed with argument --data")
    for name in ("quant", "calibration"):
        if getattr(args, name):
            raise InputError(f"--{name} is about layers; use it with --layers")
    if args.text:
        return run_text(args)
    if args.against:
        raise InputError("--against compares two models on a text; name one with --text")
    if args.out and not args.budget_study:
        raise InputError("-o draws a budget study; add --budget-study")
    if args.budget_study and (args.answers or args.over):
        raise InputError("a budget study asks every question many times; leave out --answers and --over")
    if args.budget_study and args.tra == "reference":
        raise InputError("a budget study compares plans that keep the budget; leave out --tra reference")
    data = Path(args.data)
    questions = read_questions(data, args.limit, allow_outside=args.allow_outside)
    training = read_training_answers(data if data.is_dir() else data.parent)
    other = read_answers(args.over, questions) if args.over else None
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=args.max_seq_len)
    planned = SessionOptions(budget=args.budget, tra=args.tra)
    pruned = replace(planned, keep_visual=args.keep_visual)
    session = Session(engine, tokenizer, planned if args.budget_study else pruned)
    begin = time.monotonic()
    if args.budget_study:
        prune = None
        if args.keep_visual is not None:
            if engine.capacity == 1:
                raise InputError(
                    f"a budget study with --keep-visual needs two KV caches, and {engine.name} holds one; name a "
                    "checkpoint or a bundle for onnx"
                )
            prune = Prune(args.keep_visual, asker(Session(engine, tokenizer, pruned), afresh=True))
        config, line = engine.config, CountLine()
        result = study(questions, asker(session), config, training=training, progress=line, prune=prune)
    else:
        answers = ask_all(questions, answerer(session), CountLine())
        result = score(questions, answers, training=training)
        if args.answers:
            save_answers(args.answers, questions, answers)
        if other is not None:
            result["over"] = {"answers": args.over, "difference": difference(questions, answers, other)}
    seconds = time.monotonic() - begin
    if args.out:
        draw_study(result, args.out)
        say(f"picture: {args.out}")
    if args.json:
        asked = sum(row["n"] for row in result["tasks"].values()) * len(result.get("budget_study", [0]))
        speed = {"seconds": seconds, "questions_per_s": asked / seconds, "peak_mb": peak_mb()}
        emit({"model": args.model, "data": args.data, "engine": engine.name, **result, **speed})
    else:
        print(report(result))
        if args.budget_study:
            print(f"\n{study_report(result)}")
    return 0


def run_text(args: argparse.Namespace) -> int:
    """Perplexity of a text, and the distance from another model on it."""
    for name in ("budget_study", "out", "answers", "over", "limit", "keep_visual"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is about questions; use it with --data")
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{args.text}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{args.text}: is not UTF-8 text ({error.reason}); name a text file") from error
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=args.max_seq_len)
    ids = tokenizer.encode(text)
    length = args.length or LENGTH
    count = min(args.pieces, len(ids) // length)
    if not count or length < 2:
        raise InputError(
            f"{args.text}: {len(ids)} tokens in pieces of {length}; wanted at least one piece of two or more"
        )
    pieces = np.array(ids[: count * length], np.int64).reshape(count, length)
    reference = None
    if args.against:
        reference, other = open_model(args.against, threads=args.threads, max_seq_len=args.max_seq_len)
        if other.encode(text) != ids:
            raise InputError(
                f"{args.model} and {args.against} split this text differently; name the model that was quantized"
            )
    begin = time.monotonic()
    result = measure_text(engine, pieces, reference, CountLine("pieces"))
    seconds = time.monotonic() - begin
    if args.json:
        speed = {"seconds": seconds, "peak_mb": peak_mb()}
        against = {"against": args.against} if args.against else {}
        emit({"model": args.model, "text": args.text, "engine": engine.name, **against, **result, **speed})
        return 0
    rows: list[tuple[str, ...]] = [(f"{count} pieces of {length} tokens", "")]
    rows += [(key.replace("_", " "), f"{result[key]:.4f}") for key in result if key not in ("pieces", "tokens")]
    print(table(rows, indent=""))
    return 0


def report(result: dict[str, Any]) -> str:
    """The table for a reader."""
    rows: list[tuple[str, ...]] = [("task", "n", "accuracy", "95 % interval", "chance", "majority", "question only")]
    for name, row in result["tasks"].items():
        low, high = row["interval"]
        blind = [f"{row[key]:.3f}" for key in ("chance", "majority", "question_only")]
        rows.append((name, str(row["n"]), f"{row['accuracy']:.3f}", f"{low:.3f} - {high:.3f}", *blind))
    average = [f"{result['baselines'][key]:.3f}" for key in ("chance", "majority", "question_only")]
    n = sum(row["n"] for row in result["tasks"].values())
    rows.append(("average of tasks", str(n), f"{result['average']:.3f}", "", *average))
    source = result["question_only_from"]
    over = ""
    if "over" in result:
        mean, low, high = result["over"]["difference"]
        over = f"\nover {result['over']['answers']}: {mean:+.4f} ({low:+.4f} to {high:+.4f}) of all questions"
    return f"{table(rows, indent='')}\nquestion only: the most frequent answer to the same text, from {source}{over}"


def study_report(result: dict[str, Any]) -> str:
    """The table of a budget study for a reader."""
    head = ("policy", "budget", "tokens", "frames", "accuracy", "95 % interval", "over TRA (strict)", "over dropping")
    others = ("tra", "drop", "adaptive") if result["keep_visual"] is not None else ("tra", "drop")
    rows: list[tuple[str, ...]] = [(*head, "over adaptive") if len(others) == 3 else head]
    for entry in result["budget_study"]:
        low, high = entry["interval"]
        over = [
            "" if entry["policy"] == other else "{:+.3f} ({:+.3f} to {:+.3f})".format(*entry[f"over_{other}"])
            for other in others
        ]
        cost = (f"{100 * entry['share']:.3g} %", f"{entry['visual_tokens']:.1f}", f"{entry['frames']:.1f}")
        rows.append((entry["policy"], *cost, f"{entry['accuracy']:.3f}", f"{low:.3f} - {high:.3f}", *over))
    return table(rows, indent="")
