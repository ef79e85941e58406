"""What streaming costs in answers: penguin-nano's questions about clips, offline TRA beside a stream's ways to keep up.

    penguin-edge data nano --split heldout --count 600 --seed 1 -o DIR
    python bench/peers/stream_quality.py --data DIR [--model nano] [--share 0.5 0.25 0.125] [--count 240]

Every clip gets the same share of its own native tokens. `offline` plans all of its frames at once; a stream gets them
one after another and is asked after the last one. Plans are adaptive, those of a name with `strict` are strict. `same`
is the share of answers that are those of a stream that encodes shrunk frames and recomputes its cache; `over` is the
difference from that stream in accuracy, with the paired 95 % interval. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from penguin_edge.commands.common import open_model
from penguin_edge.config import PATCH
from penguin_edge.dataset.records import read_records
from penguin_edge.evaluation.budget_study import about_clips
from penguin_edge.evaluation.score import Question, answer_tokens, difference, is_right, limited, questions_of, wilson
from penguin_edge.media.frames import Frame, read_video
from penguin_edge.prompt.chat import part_kind
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.clip import size_ladder
from penguin_edge.tra.layout import media_source

WAYS: dict[str, dict[str, Any]] = {
    "encode, recompute": {},
    "strict, encode, recompute": {"tra": "strict"},
    "pool, recompute": {"shrink": "pool"},
    "encode, rebase": {"cache": "rebase"},
    "pool, rebase": {"shrink": "pool", "cache": "rebase"},
}


def clip_of(question: Question, config: Any) -> tuple[list[Frame], str] | None:
    """Frames and text of a question about one clip, asked in one turn."""
    if len(question.messages) != 1 or isinstance(question.messages[0]["content"], str):
        return None
    parts = question.messages[0]["content"]
    clips = [part for part in parts if part_kind(part) == "video"]
    if len(clips) != 1 or part_kind(parts[0]) != "video":
        return None
    source, options = media_source(clips[0], config.image)
    return list(read_video(source, **(options or {}))), question.text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--share", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    engine, tokenizer = open_model(args.model, threads=args.threads, max_seq_len=2048)
    config = engine.config
    questions = limited(about_clips(questions_of(read_records(args.data))), None)[: args.count]
    tokens = answer_tokens(questions)
    result: dict[str, Any] = {}
    for share in args.share:
        answers: dict[str, list[str]] = {}
        asked: list[Question] = []
        costs = {name: [0, 0, 0] for name in WAYS}
        for question in questions:
            found = clip_of(question, config)
            if found is None:
                continue
            frames, text = found
            asked.append(question)
            factor = PATCH * config.image.video_merge_size
            native = len(frames) * math.prod(size_ladder(*frames[0].pixels.shape[:2], factor)[-1])
            budget = max(1, int(share * native))
            choice = SamplingOptions(tokens[question.task])
            for name in ("offline", "strict, offline", *WAYS):
                run: Session
                if "offline" in name:
                    run = Session(engine, tokenizer, budget=budget, tra="strict" if "strict" in name else "adaptive")
                else:
                    run = Stream(engine, tokenizer, budget=budget, **WAYS[name])
                for frame in frames:
                    run.push(frame)
                answers.setdefault(name, []).append("".join(token.text for token in run.ask(text, options=choice)))
                if isinstance(run, Stream):
                    spent = run.stats.frames, run.stats.reencoded, run.stats.reprefilled_tokens
                    costs[name] = [a + b for a, b in zip(costs[name], spent, strict=True)]
                run.close()
        base = answers["encode, recompute"]
        print(f"{share:g} of the native tokens, {len(asked)} questions")
        for name, given in answers.items():
            right = sum(is_right(question, text) for question, text in zip(asked, given, strict=True)) / len(asked)
            low, high = wilson(right, len(asked))
            same = sum(a == b for a, b in zip(given, base, strict=True)) / len(asked)
            row: dict[str, Any] = {"accuracy": right, "ci95": [low, high], "same": same}
            extra = ""
            if name in costs:
                count, again, tokens_again = costs[name]
                row |= {"reencoded": again / count, "reprefilled": tokens_again / count}
                extra = f"  encoded again {again / count:.2f}, prefilled again {tokens_again / count:.1f} per frame"
            row["over"] = difference(asked, given, base)
            print(
                f"  {name:25} {right:.3f} ({low:.3f} to {high:.3f})  same {same:.3f}  "
                f"over {row['over'][0]:+.3f} ({row['over'][1]:+.3f} to {row['over'][2]:+.3f}){extra}",
                flush=True,
            )
            result.setdefault(str(share), {})[name] = row
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
