"""penguin-nano's questions about clips, asked of a stream in any setting.

A stream answers from its window after the last frame. What it shows of a clip depends on what came before: two other
clips are streamed first, and have just left the window when the question is asked.

An answer depends on the sizes of a window alone. `ask` therefore takes them from `StreamPlanner` and asks a session
with these sizes, which keeps the features of every frame at every size: many settings cost little more than one. What
does not depend on sizes alone, `rebase` and `pool`, is asked of real streams (`real`).
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from penguin_edge.config import PATCH, PenguinConfig
from penguin_edge.dataset.records import read_records
from penguin_edge.evaluation.budget_study import about_clips
from penguin_edge.evaluation.score import Question, Z, answer_tokens, is_right, questions_of
from penguin_edge.media.frames import Frame, read_video
from penguin_edge.prompt.chat import part_kind
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.clip import DROPPED, FramePlan, KeyFrameDetector, Plan, Policy, size_ladder
from penguin_edge.tra.layout import cap_size, detection_mode, media_source
from penguin_edge.tra.stream import Limits, StreamPlanner

BEFORE = 2
"""Clips that were streamed before a question's own."""


@dataclass(frozen=True)
class Way:
    """A setting, in shares that mean the same for any clip.

    `budget`: visual tokens of the window over the native tokens of all frames that came. `frame`: tokens of the largest
    frame over its native ones. `stride`: every so many frames one is taken.
    """

    budget: float = 1.0
    frame: float = 1.0
    stride: int = 1
    tra: str = "adaptive"
    cache: str = "recompute"
    shrink: str = "encode"
    newest: int | None = None
    """Frames that are kept at most; None: all."""
    running: bool = True
    """Other clips were streamed before, and have just left the window; else the stream begins with the clip."""
    real: bool = False
    """Asked of a real stream; `rebase` and `pool` need it."""

    def __str__(self) -> str:
        parts = [f"budget {100 * self.budget:.3g} %", f"frames {100 * self.frame:.3g} %"]
        parts += [f"every {self.stride}"] if self.stride > 1 else []
        parts += [f"the last {self.newest}"] if self.newest else []
        parts += [self.tra] if self.tra != "adaptive" else []
        parts += [] if self.running else ["from its beginning"]
        parts += [f"{self.shrink}, {self.cache}, real"] if self.real else []
        return ", ".join(parts)


@dataclass
class Outcome:
    """What became of a way: for each question the share of its phases that were answered right, and visual tokens and
    frames of the window, means over phases."""

    right: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)

    def add(self, right: float, tokens: float, frames: float) -> None:
        self.right.append(right)
        self.tokens.append(tokens)
        self.frames.append(frames)


def read_questions(data: Path, count: int | None = None) -> list[Question]:
    """The first `count` questions of a data set about one clip each, asked in one turn."""

    def alone(question: Question) -> bool:
        content = question.messages[0]["content"]
        if len(question.messages) != 1 or isinstance(content, str):
            return False
        return part_kind(content[0]) == "video" and sum(part_kind(part) == "video" for part in content) == 1

    return [one for one in about_clips(questions_of(read_records(data))) if alone(one)][:count]


def frames_of(question: Question, config: PenguinConfig) -> list[Frame]:
    """Frames of a question's clip."""
    content = question.messages[0]["content"]
    assert not isinstance(content, str)
    source, options = media_source(content[0], config.image)
    return list(read_video(source, **(options or {})))


@lru_cache(maxsize=256)
def capped(size: tuple[int, int], most: float, factor: int) -> tuple[int, tuple[int, int]]:
    """`Stream.frame_tokens` for which frames of (height, width) pixels get the most tokens within `most`, at least one,
    and the (height, width) that a stream then plans them with."""
    limit = max(1, math.floor(most))
    return limit, cap_size(size, limit, factor)


def interval_of(frames: Sequence[Frame]) -> float:
    """Seconds between frames."""
    return (frames[1].time or 0.0) - (frames[0].time or 0.0)


def tokens_of(size: tuple[int, int], factor: int) -> int:
    """Native tokens of a frame of (height, width) pixels."""
    return math.prod(size_ladder(*size, factor)[-1])


@dataclass(frozen=True)
class Clip:
    """The frames of a question, those that were streamed before, at times below 0, and what shares of a clip are."""

    frames: list[Frame]
    before: list[Frame]
    factor: int

    @classmethod
    def of(cls, clips: Sequence[list[Frame]], factor: int) -> Clip:
        """The last of some clips of as many frames, after the others."""
        before = [frame for clip in clips[:-1] for frame in clip]
        interval = interval_of(clips[-1])
        return cls(
            clips[-1],
            [Frame(frame.pixels, (i - len(before)) * interval) for i, frame in enumerate(before)],
            factor,
        )

    def seen(self, way: Way, phase: int) -> list[Frame]:
        """What a stream takes, with the clip's frames last."""
        before = self.before[phase :: way.stride] if way.running else []
        return before + self.frames[phase :: way.stride]

    @property
    def window_s(self) -> float:
        """Seconds that hold the clip, and nothing from before it."""
        return (len(self.frames) - 0.5) * interval_of(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.frames[0].pixels.shape[:2]
        return height, width

    def budget(self, way: Way) -> int:
        return max(1, round(way.budget * len(self.frames) * tokens_of(self.size, self.factor)))

    def cap(self, way: Way) -> tuple[int, tuple[int, int]]:
        # A hundredth of a token: shares such as 16/36 are rounded numbers.
        return capped(self.size, way.frame * tokens_of(self.size, self.factor) + 0.01, self.factor)


def ask(engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question], ways: Sequence[Way]) -> dict[Way, Outcome]:
    """Ask every question in every way. A way with a stride is asked in each of its phases; their mean counts."""
    ways = list(dict.fromkeys(ways))
    found = {way: Outcome() for way in ways}
    longest = answer_tokens(questions)
    factor = PATCH * engine.config.image.video_merge_size
    phases = [(stride, phase) for stride in sorted({way.stride for way in ways}) for phase in range(stride)]
    clips = deque((frames_of(question, engine.config) for question in questions[-BEFORE:]), maxlen=BEFORE + 1)
    for done, question in enumerate(questions, 1):
        clips.append(frames_of(question, engine.config))
        clip = Clip.of(list(clips), factor)
        asked = Asked(question.text, SamplingOptions(longest[question.task]))
        parts: dict[Way, list[tuple[float, float, float]]] = {way: [] for way in ways}
        session: Session | None = None
        for stride, phase in phases:
            answers: dict[Way, Answer] = {}
            if planned := [way for way in ways if way.stride == stride and not way.real]:
                session = _session(engine, tokenizer, clip.frames[phase::stride], session)
                answers = _planned(session, clip, phase, planned, asked)
            for way in ways:
                if way.stride == stride and way.real:
                    answers[way] = _real(engine, tokenizer, clip, phase, way, asked)
            for way, answer in answers.items():
                parts[way].append((is_right(question, answer.text), answer.tokens, answer.frames))
        if session is not None:
            session.close()
        for way, rows in parts.items():
            found[way].add(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))
        if done % 20 == 0 or done == len(questions):
            print(f"{done} of {len(questions)} questions, {len(ways)} ways", file=sys.stderr, flush=True)
    return found


@dataclass(frozen=True)
class Asked:
    """A question's text, and how it is answered."""

    text: str
    options: SamplingOptions


@dataclass(frozen=True)
class Answer:
    """An answer, and visual tokens and frames of the window that it is about."""

    text: str
    tokens: int
    frames: int


def _session(engine: Engine, tokenizer: Tokenizer, frames: Sequence[Frame], before: Session | None) -> Session:
    """A session over frames, with the features that another one has computed, which is closed."""
    session = Session(engine, tokenizer)
    if before is not None:
        for visual in before.features:
            session.features.put(visual, before.features[visual])
        before.close()
    for frame in frames:
        session.push(frame)
    return session


def _planned(session: Session, clip: Clip, phase: int, ways: Sequence[Way], asked: Asked) -> dict[Way, Answer]:
    """Answers from windows as a stream would have them; equal windows are asked about once."""
    kinds = {
        running: _kinds(clip.seen(Way(stride=ways[0].stride, running=running), phase)) for running in (False, True)
    }
    known: dict[tuple[tuple[int, int], ...], Answer] = {}
    out: dict[Way, Answer] = {}
    for way in ways:
        plan = window(session.config, clip, phase, kinds[way.running], way)
        sizes = tuple((frame.height, frame.width) for frame in plan.frames)
        if sizes not in known:
            session.policy = _always(plan)
            answer = "".join(token.text for token in session.ask(asked.text, options=asked.options))
            kept = sum(frame.kind != DROPPED for frame in plan.frames)
            known[sizes] = Answer(answer, session.report.visual_tokens, kept)
        out[way] = known[sizes]
    return out


def _kinds(frames: Sequence[Frame]) -> list[str]:
    detector = KeyFrameDetector(detection_mode("adaptive"))
    return [detector.push(frame.pixels).kind for frame in frames]


def _always(plan: Plan) -> Policy:
    return lambda kinds, size, budget, merge_size: plan


def window(config: PenguinConfig, clip: Clip, phase: int, kinds: Sequence[str], way: Way) -> Plan:
    """What a stream's window holds of a clip after its last frame, with an entry for each frame that was taken.

    Args:
        kinds: labels of all frames that the stream has taken, those before the clip included.
    """
    budget = clip.budget(way)
    limits = Limits(budget, window_s=clip.window_s)
    planner = StreamPlanner(
        limits if way.newest is None else replace(limits, max_frames=way.newest),
        mode="strict" if way.tra == "strict" else "adaptive",
        min_tokens=config.image.min_tokens,
        merge_size=config.image.video_merge_size,
        config=config.tra,
    )
    size, frames = clip.cap(way)[1], clip.seen(way, phase)
    for frame, kind in zip(frames, kinds, strict=True):
        planner.push(kind, size, frame.time or 0.0)
    kept = dict(zip(planner.numbers, planner.plan().frames, strict=True))
    count = len(clip.frames[phase :: way.stride])
    gone = FramePlan(DROPPED, 0, 0, 0)
    entries = tuple(kept.get(i, gone) for i in range(len(frames) - count, len(frames)))
    return Plan(entries, budget, clip.factor, "stream", "")


def _real(engine: Engine, tokenizer: Tokenizer, clip: Clip, phase: int, way: Way, asked: Asked) -> Answer:
    options: dict[str, Any] = {"tra": way.tra, "cache": way.cache, "shrink": way.shrink, "max_frames": way.newest}
    with Stream(engine, tokenizer, budget=clip.budget(way), window_s=clip.window_s, **options) as stream:
        stream.frame_tokens = clip.cap(way)[0]
        for frame in clip.seen(way, phase):
            stream.push(frame)
        if max(kept.tokens for kept in stream.window) > way.frame * tokens_of(clip.size, clip.factor) + 0.01:
            raise RuntimeError(f"frame_tokens {stream.frame_tokens} let larger frames pass than asked for: {way}")
        answer = "".join(token.text for token in stream.ask(asked.text, options=asked.options))
        return Answer(answer, stream.visual_tokens, len(stream.times))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Mean of a - b over the same questions and its 95 % interval (normal, paired): [mean, low, high]."""
    values = [x - y for x, y in zip(a, b, strict=True)]
    middle = mean(values)
    half = Z * math.sqrt(sum((value - middle) ** 2 for value in values)) / len(values)
    return [middle, middle - half, middle + half]
