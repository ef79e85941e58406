"""A clip and a question from end to end, as `penguin-edge run` has them.

`cold` is a new session on the loaded engine: decoding, planning, preprocessing, encoding, projecting and prefilling to
the first token; the file itself may lie in the system's memory. `warm` is the same question again: labels, features and
the prefix are kept, and only the end of the prompt is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penguin_edge.errors import InputError
from penguin_edge.prompt.chat import Message
from penguin_edge.runtime.bench.stages import percentiles
from penguin_edge.runtime.core.report import PHASES, Report
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session

QUESTION = "What happens in this video?"


@dataclass(frozen=True)
class VideoOptions:
    """What is asked: about which clip, with frames per second (None: the model's) and most tokens of an answer."""

    video: str
    question: str = QUESTION
    fps: float | None = None
    answer_tokens: int = 32
    repeat: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        if min(self.answer_tokens, self.repeat) < 1 or self.warmup < 0:
            raise InputError("wanted answers of at least one token, and at least one round")

    def messages(self) -> list[Message]:
        video: dict[str, Any] = {"video_path": self.video} | ({"fps": self.fps} if self.fps else {})
        text = {"type": "text", "text": self.question}
        return [{"role": "user", "content": [{"type": "video", "video": video}, text]}]


def bench_video(
    session: Callable[[], Session], options: VideoOptions, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Ask cold and warm, in turn; see the interface in docs/benchmarks/schema.md.

    Args:
        session: makes a new one over the engine that is measured.
    Raises:
        InputError: an unreadable clip, or a model that reads text only.
        BudgetError: the clip or the answer does not fit.
    """
    reports: dict[str, list[Report]] = {"cold": [], "warm": []}
    choice = SamplingOptions(max_new_tokens=options.answer_tokens)
    for round_ in range(-options.warmup, options.repeat):
        with session() as one:
            for kind, kept in reports.items():
                progress(f"round {max(0, round_ + 1)} of {options.repeat}: clip, {kind}")
                for _ in one.converse(options.messages(), choice):
                    pass
                if round_ >= 0:
                    kept.append(one.report)
    first = {kind: [found.first_token_ms or 0.0 for found in kept] for kind, kept in reports.items()}
    steps = [ms for kept in reports.values() for found in kept for ms in found.token_ms]
    phases = {
        kind: {name: [found.phases_ms[name] for found in kept] for name in PHASES if _spent(kept, name)}
        for kind, kept in reports.items()
    }
    cold, warm = reports["cold"][-1], reports["warm"][-1]
    tpot = sum(steps) / len(steps) if steps else None
    return {
        "source": options.video,
        "question": options.question,
        "frames": cold.frames,
        "visual_tokens": cold.visual_tokens,
        "budget": cold.budget,
        "prompt_tokens": cold.prompt_tokens,
        "reused_tokens": warm.reused_tokens,
        "answer_tokens": len(cold.token_ids),
        "first_token_ms": {kind: percentiles(values) for kind, values in first.items()},
        "phases_ms": {
            kind: {name: values[_middle(first[kind])] for name, values in spent.items()}
            for kind, spent in phases.items()
        },
        "tpot_ms": tpot,
        "inter_token_ms": percentiles(steps),
        "tokens_per_s": 1e3 / tpot if tpot else None,
        "samples": {"cold_ms": first["cold"], "warm_ms": first["warm"], "token_ms": steps},
        "phase_samples_ms": phases,
    }


def _spent(reports: list[Report], phase: str) -> bool:
    return any(found.phases_ms.get(phase) for found in reports)


def _middle(values: list[float]) -> int:
    """The index of the median; of an even number, of the lower one of the middle two."""
    return sorted(range(len(values)), key=values.__getitem__)[(len(values) - 1) // 2]
