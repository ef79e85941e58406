"""The frames that a stream keeps: their pixels, names, labels and sizes, and the turns that stand between them.

A stream changes a copy of its window, and puts it in the place of the window when all that it needs has been computed.
Until then questions are about the window as it was, and what fails has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from penguin_edge.media.frames import Frame
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.answer import Layout, kept_visuals, key_frames, layout
from penguin_edge.runtime.core.media import Clip, Picture
from penguin_edge.runtime.core.report import Kept
from penguin_edge.runtime.core.turns import Turn, Turns
from penguin_edge.runtime.engines.cache import Visual
from penguin_edge.tra.stream import Change, StreamPlanner

NewClip = Callable[[Callable[[], Iterable[Frame]]], Clip]
"""Makes an empty clip of what gives its frames again."""


class Window:
    """See the top of this file. Of each frame there is an entry in `frames`, `numbers`, the clip and the planner."""

    def __init__(self, new_clip: NewClip, planner: StreamPlanner, turns: Turns, keep: float | None) -> None:
        """
        Args:
            planner, turns: the window's own from now on.
            keep: share of each frame's visual tokens that enters the decoder; None: all.
        """
        self._new_clip, self._keep = new_clip, keep
        self.planner, self.turns = planner, turns
        self.frames: list[Frame] = []
        """Pixels of each frame, at its size in the prompt."""
        self.numbers: list[int] = []
        self.clip = new_clip(lambda: self.frames)

    def copy(self) -> Window:
        """A window that stands where this one does, and changes by itself."""
        found = Window(self._new_clip, self.planner.copy(), self.turns.copy(), self._keep)
        found.frames, found.numbers = list(self.frames), list(self.numbers)
        found.clip = self.clip.copy(lambda: found.frames)
        return found

    @property
    def media(self) -> list[Picture | Clip]:
        """Where the pixels of the frames come from."""
        return [self.clip] if self.frames else []

    @property
    def last_time(self) -> float:
        """Time of the newest frame, in seconds; 0 when there is none."""
        return self.clip.times[-1] or 0.0 if self.clip.times else 0.0

    @property
    def times(self) -> list[float]:
        """Time stamps of the frames, in seconds."""
        return [at or 0.0 for at in self.clip.times]

    @property
    def kept(self) -> tuple[Kept, ...]:
        """The frames with their sizes now, oldest first."""
        rows = zip(self.planner.numbers, self.times, self.planner.plan().frames, strict=True)
        return tuple(Kept(number, at, frame.kind, frame.tokens) for number, at, frame in rows)

    def add(self, frame: Frame, size: tuple[int, int]) -> list[Change]:
        """Label a frame and give it a size, of at most (height, width) `size`; what became of others.

        Raises:
            InputError: pixels that cannot be labelled, or a time before the last frame's.
        """
        assert frame.time is not None
        number = self.planner.pushed
        self.clip.add(frame)
        if self.clip.digests[-1] in self.clip.digests[:-1]:
            # An older frame of the same picture may be kept smaller: neither pixels nor features are shared.
            self.clip.digests[-1] += f" {number}"
        self.frames.append(frame)
        self.numbers.append(number)
        changes = self.planner.push(self.clip.kinds[-1], size, frame.time)
        self.forget(changes)
        self.clip.kinds[-1] = self.planner.plan().frames[-1].kind
        return changes

    def forget(self, changes: Sequence[Change]) -> None:
        """Take out the frames that a planner has given up."""
        for change in changes:
            if not change.tokens:
                index = self.numbers.index(change.frame)
                del self.numbers[index], self.frames[index]
                self.clip.remove(index)
                self.turns.frame_gone(index)

    def discard(self, visuals: Sequence[Visual], unusable: Sequence[Visual]) -> list[Change]:
        """Take out the frames whose features cannot be computed; `visuals` are those of all."""
        pairs = zip(self.numbers, visuals, strict=True)
        bad = [number for number, visual in pairs if visual in unusable]
        gone = [Change(number, self.planner.discard(number), 0, "unusable") for number in bad]
        self.forget(gone)
        return gone

    def clear(self, reason: str) -> list[Change]:
        """Forget all frames and turns."""
        frames = zip(self.planner.numbers, self.planner.plan().frames, strict=True)
        gone = [Change(number, frame.tokens, 0, reason) for number, frame in frames]
        self.turns.clear()
        self.forget(gone)
        self.planner.clear()
        self.clip = self._new_clip(lambda: self.frames)
        return gone

    def layout(self, question: Turn, tokenizer: Tokenizer) -> Layout:
        """The prompt of a question about the window."""
        plans = [self.planner.plan()] if self.frames else []
        visuals = kept_visuals(self.clip, plans[0]) if plans else []
        references = key_frames(visuals, plans[0]) if plans else []
        pieces = self.turns.pieces(self.clip, plans[0] if plans else None, question)
        return layout(pieces, visuals, references, plans, self.planner.limits.budget, tokenizer, self._keep)
