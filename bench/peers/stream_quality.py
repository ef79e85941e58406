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
from pathlib import Path
from typing import Any

from clip_questions import frames_of, mean, read_questions, tokens_of

from penguin_edge.commands.common import open_model
from penguin_edge.config import PATCH
from penguin_edge.evaluation.score import answer_tokens, difference, is_right, wilson
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream

WAYS: dict[str, dict[str, Any]] = {
    "encode, recompute": {},
    "strict, encode, recompute": {"tra": "strict"},
    "pool, recompute": {"shrink": "pool"},
    "encode, rebase": {"cache": "rebase"},
    "pool, rebase": {"shrink": "pool", "cache": "rebase"},
}


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
    questions = read_questions(args.data, args.count)
    tokens = answer_tokens(questions)
    result: dict[str, Any] = {}
    for share in args.share:
        answers: dict[str, list[str]] = {}
        costs = {name: [0, 0, 0] for name in WAYS}
        for question in questions:
            frames = frames_of(question, config)
            factor = PATCH * config.image.video_merge_size
            height, width = frames[0].pixels.shape[:2]
            native = len(frames) * tokens_of((height, width), factor)
            budget = max(1, int(share * native))
            choice = SamplingOptions(tokens[question.task])
            for name in ("offline", "strict, offline", *WAYS):
                run: Session | Stream
                if "offline" in name:
                    run = Session(engine, tokenizer, budget=budget, tra="strict" if "strict" in name else "adaptive")
                else:
                    run = Stream(engine, tokenizer, budget=budget, **WAYS[name])
                for frame in frames:
                    run.push(frame)
                answers.setdefault(name, []).append(
                    "".join(token.text for token in run.ask(question.text, options=choice))
                )
                if isinstance(run, Stream):
                    spent = run.stats.frames, run.stats.reencoded, run.stats.reprefilled_tokens
                    costs[name] = [a + b for a, b in zip(costs[name], spent, strict=True)]
                run.close()
        base = answers["encode, recompute"]
        print(f"{share:g} of the native tokens, {len(questions)} questions")
        for name, given in answers.items():
            right = mean([is_right(question, text) for question, text in zip(questions, given, strict=True)])
            low, high = wilson(right, len(questions))
            same = sum(a == b for a, b in zip(given, base, strict=True)) / len(questions)
            row: dict[str, Any] = {"accuracy": right, "ci95": [low, high], "same": same}
            extra = ""
            if name in costs:
                count, again, tokens_again = costs[name]
                row |= {"reencoded": again / count, "reprefilled": tokens_again / count}
                extra = f"  encoded again {again / count:.2f}, prefilled again {tokens_again / count:.1f} per frame"
            row["over"] = difference(questions, given, base)
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
