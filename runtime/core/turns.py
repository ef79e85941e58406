"""Turns of a conversation about pushed frames: which question follows which frame, and the prompt they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penguin_edge.prompt import chat
from penguin_edge.prompt.chat import Piece, Special, render
from penguin_edge.runtime.core.media import Clip
from penguin_edge.tra.clip import DROPPED, Plan


@dataclass(frozen=True)
class Turn:
    """A question after the first `frames` frames; one that was kept has its answer's tokens."""

    frames: int
    prompt: str
    answer: tuple[int, ...] = ()


class Turns:
    """The turns that were kept."""

    def __init__(self, thinking: bool) -> None:
        """`thinking` leaves out the empty think block."""
        self._thinking = thinking
        self._kept: list[Turn] = []
        self.gone = 0
        """Frames that have gone so far."""

    def copy(self) -> Turns:
        """Turns that go on by themselves from here."""
        found = Turns(self._thinking)
        found._kept, found.gone = list(self._kept), self.gone
        return found

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._kept)

    def keep(self, asked: Turn, answer: Sequence[int], gone: int) -> None:
        """Keep a question with its answer; `gone` was the count of that name when it was asked."""
        # Frames may have gone while the answer was read, the oldest ones.
        self._kept.append(Turn(max(0, asked.frames - (self.gone - gone)), asked.prompt, tuple(answer)))

    def frame_gone(self, index: int) -> None:
        """A frame has left: those behind it count one less."""
        self.gone += 1
        self._kept = [replace(turn, frames=turn.frames - (index < turn.frames)) for turn in self._kept]

    def clear(self) -> None:
        """Forget all turns."""
        self._kept.clear()

    def pieces(self, clip: Clip, plan: Plan | None, *last: Turn) -> list[Piece]:
        """The prompt: kept turns, then `last`, which are not; frames where they came, in the sizes of the plan.

        Without a plan it is the text alone.
        """
        turns = [*self._kept, *last]
        out: list[Piece] = []
        done = 0
        for index, turn in enumerate(turns):
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.prompt}]
            if plan is not None and turn.frames > done:
                content.insert(0, clip.part(plan, done, turn.frames))
                done = turn.frames
            out += render([{"role": "user", "content": content}], thinking=self._thinking)
            if index < len(turns) - 1:
                out += [chat.Ids(turn.answer), Special(chat.END), "\n"]
        counts = iter([f.tokens for f in plan.frames if f.kind != DROPPED] if plan else [])
        seen = 0
        for i, piece in enumerate(out):
            if isinstance(piece, chat.VisualTokens):
                out[i] = chat.VisualTokens(next(counts), seen)
                seen += 1
        return out
