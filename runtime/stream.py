"""A session over a stream: frames are sized, encoded and prefilled as they arrive; a question pays for itself alone.

    session = StreamSession.open("out/penguin-nano")
    for frame in read_video("street.mp4", fps=2):
        session.push(frame)
    for token in session.ask("What changed?"):
        print(token.text, end="")

| held           | bound                                                                             |
|----------------|-----------------------------------------------------------------------------------|
| pixels         | each kept frame at its size in the prompt: 588 bytes per patch under the budget   |
| features       | one row of `hidden_size` f32 per visual token under the budget                    |
| KV cache       | `max_seq_len` of the bundle; frames leave room for a question and its answer      |
| anything else  | one entry per kept frame, and the turns that were kept                            |

Sizes come from `penguin_edge.stream_plan`. When a frame changes or goes, the KV cache follows in one of two ways:

- `recompute`: from that frame on. What the cache holds is what a new session would compute for the same frames at the
  same sizes.
- `rebase`: frames behind it are moved down and their keys turned by the exact rotary angle; only the changed frame is
  computed. Positions are right, but a moved frame has still seen what stood before it then.

A question and its answer leave the cache when the next frame comes, unless they are kept.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle import Bundle
from penguin_edge.errors import BudgetError, BusyError, InputError
from penguin_edge.frames import Frame
from penguin_edge.layout import cap_size
from penguin_edge.preprocess import Patches, preprocess_image
from penguin_edge.prompt import Tokenizer, frame_tag
from penguin_edge.runtime.answer import Token, Turn, UnusablePicture
from penguin_edge.runtime.cache import Key
from penguin_edge.runtime.control import Device, Setting, Work, settings
from penguin_edge.runtime.engine import Engine
from penguin_edge.runtime.engines import open_engine
from penguin_edge.runtime.ledger import last_frame, rebase, to_last_frame
from penguin_edge.runtime.media import Visual, own
from penguin_edge.runtime.options import check_options
from penguin_edge.runtime.pool import pooled, retained
from penguin_edge.runtime.prefill import extend_to
from penguin_edge.runtime.report import Clock, StreamStats
from penguin_edge.runtime.sampling import SamplingOptions
from penguin_edge.runtime.self_check import open_tokenizer
from penguin_edge.runtime.session import Session
from penguin_edge.schema import LARGEST, Real, Whole
from penguin_edge.stream_plan import Change, Limits, StreamPlanner
from penguin_edge.tra import Plan, size_ladder

Shrink = Literal["encode", "pool"]
Following = Literal["recompute", "rebase"]
WARM_PATCHES = 256
QUESTION_TOKENS, ANSWER_TOKENS = 128, 128
"""Positions that frames leave free, beside what stands around them."""


class StreamSession(Session):
    """One stream over one engine, for one thread: `penguin_edge.runtime.live` puts a thread and a queue before it.

    What changes the window is refused with `BusyError` while an answer is being read.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        budget: int | None = None,
        window_s: float = 60.0,
        max_frames: int | None = None,
        shrink: Shrink = "encode",
        cache: Following = "recompute",
        question_tokens: int = QUESTION_TOKENS,
        answer_tokens: int = ANSWER_TOKENS,
        thinking: bool = False,
    ) -> None:
        """As `open`, over an engine of the caller's."""
        check_options(question_tokens=(question_tokens, Whole()), answer_tokens=(answer_tokens, Whole()))
        check_options(window_s=(window_s, Real(above=0)))
        if shrink not in ("encode", "pool"):
            raise InputError(f"frames cannot be shrunk by {shrink!r}; known: encode, pool")
        if cache not in ("recompute", "rebase"):
            raise InputError(f"the cache cannot follow by {cache!r}; known: recompute, rebase")
        if cache == "rebase" and not engine.can_move:
            raise InputError(
                f"{engine.name} cannot move positions of this bundle's cache: it was exported before that was known; "
                "export the model again, or take cache='recompute'"
            )
        super().__init__(
            engine, tokenizer, budget=budget, max_frames=max_frames, thinking=thinking, policy=self._planned
        )
        self._refuse_media(True)
        self.shrink, self.following = shrink, cache
        self.frame_tokens: int | None = None
        """Most visual tokens of a frame that comes from now on; None: no limit of its own."""
        self.last_work: Work | None = None
        """What the last frame made the engine do."""
        self.question_tokens, self.answer_tokens = question_tokens, answer_tokens
        self.stats = StreamStats()
        self.clock = Clock()
        self._encoded: list[tuple[int, int]] = []
        self._pieces = 1
        self._answering = 0
        self._numbers: list[int] = []
        self._window_s = window_s
        image = self.config.image
        self.planner = StreamPlanner(
            self._limits(),
            tag_tokens=self._tag_tokens(0.0),
            min_tokens=image.min_tokens,
            merge_size=image.video_merge_size,
            config=self.config.tra,
        )

    @classmethod
    def open(  # type: ignore[override]  # a stream has other options than a conversation
        cls,
        bundle: str | Path | Bundle,
        *,
        threads: int | None = None,
        budget: int | None = None,
        window_s: float = 60.0,
        max_frames: int | None = None,
        shrink: Shrink = "encode",
        cache: Following = "recompute",
        question_tokens: int = QUESTION_TOKENS,
        answer_tokens: int = ANSWER_TOKENS,
        thinking: bool = False,
    ) -> StreamSession:
        """A stream over a bundle's own engine.

        Args:
            threads: of the engine; None leaves the choice to it.
            budget: visual tokens of the window at any time; None takes the model's number. What the context leaves
                beside time stamps, question and answer is a limit of its own.
            window_s: seconds that frames are kept.
            max_frames: frames that are kept; None takes the model's number.
            shrink: what is done with a frame that gets smaller: `encode` its pixels again, or `pool` its features.
            cache: how the KV cache follows: `recompute` or `rebase`; see the top of this file.
            question_tokens: positions that are kept free for a question.
            answer_tokens: positions that are kept free for an answer.
        Raises:
            BundleError: the bundle is missing, damaged or of another schema.
            TargetUnavailable: its engine is not installed.
            BudgetError: the context leaves no room for a frame.
            InputError: a text-only model, or an option out of range.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
        tokenizer = open_tokenizer(opened)
        return cls(
            open_engine(opened, threads=threads),
            tokenizer,
            budget=budget,
            window_s=window_s,
            max_frames=max_frames,
            shrink=shrink,
            cache=cache,
            question_tokens=question_tokens,
            answer_tokens=answer_tokens,
            thinking=thinking,
        )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the window."""
        return self.planner.total_tokens

    @property
    def times(self) -> list[float]:
        """Time stamps of the kept frames, in seconds."""
        return [at or 0.0 for at in self._stream.times]

    def push(self, frame: Frame | NDArray[np.uint8], time: float | None = None) -> list[Change]:  # type: ignore[override]
        """Add a frame: label, size, encode and prefill it, after what had to shrink or go for it.

        A frame of another size than those before, or from before the last one, begins the stream anew.

        Args:
            frame: a `Frame`, or pixels [H, W, 3] uint8 RGB; `time` in seconds.
        Returns:
            What became of earlier frames.
        Raises:
            InputError: wrong shape or dtype, or no time.
            UnusablePicture: its features are not finite; the stream goes on without it.
        """
        with self._guard:
            return self._add(frame, time)

    def _add(self, frame: Frame | NDArray[np.uint8], time: float | None) -> list[Change]:
        self._idle()
        new = self._taken(frame, time)
        assert new.time is not None
        size = (new.pixels.shape[0], new.pixels.shape[1])
        changes: list[Change] = []
        for reason, broken in (("size", size != self._stream.size), ("time", new.time < self._last_time())):
            if broken and self._frames:
                changes += self._restart(reason)
        with self.clock("plan"):
            self._stream.add(new)
            if self._stream.digests[-1] in self._stream.digests[:-1]:
                # An older frame of the same picture may be kept smaller: neither pixels nor features are shared.
                self._stream.digests[-1] += f" {self.stats.frames}"
            self._frames.append(new)
            self._numbers.append(self.stats.frames)
            self.planner.tag_tokens = max(self.planner.tag_tokens, self._tag_tokens(new.time))
            bound = self.engine.bounds.max_patches // self._stream.merge_size**2
            if self.frame_tokens is not None:
                bound = min(bound, self.frame_tokens)
            capped = cap_size(size, bound * self.planner.factor**2)
            found = self.planner.push(self._stream.kinds[-1], capped, new.time)
            self.stats.frames += 1
            self._forget([change for change in found if not change.tokens])
            self._stream.kinds[-1] = self.planner.plan().frames[-1].kind
        before, moved = self.stats.prefilled_tokens, self.stats.moved_tokens
        self._update(found, arrived=True)
        prefilled = self.stats.prefilled_tokens - before
        self.last_work = Work(
            size[0] * size[1],
            tuple(self._encoded),
            prefilled,
            max(0, self.cache.length - prefilled),
            self._pieces,
            self.stats.moved_tokens - moved,
        )
        return changes + found

    def settings(self, size: tuple[int, int], budget: int) -> list[Setting]:
        """What a controller can choose from, for frames of (height, width) under a budget."""
        device, room = self.device(size), self.planner.limits.room
        native = [rows * columns for rows, columns in size_ladder(*size, self.planner.factor)][-1]
        largest = self.engine.bounds.max_patches // self.config.image.video_merge_size**2
        return settings(min(native, largest), device.floor_tokens, min(budget, room or budget))

    def device(self, size: tuple[int, int]) -> Device:
        """What predictions of the next frames need to know, if they are of (height, width)."""
        ladder = [rows * columns for rows, columns in size_ladder(*size, self.planner.factor)]
        floor = next(tokens for tokens in ladder if tokens >= min(self.planner.least_tokens, ladder[-1]))
        times, limits = self.times, self.planner.limits
        apart = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        return Device(
            self.engine.bounds,
            self.config.image.video_merge_size,
            self.planner.tag_tokens,
            self.question_tokens,
            self.following == "recompute",
            size[0] * size[1],
            floor,
            min(limits.max_frames, int(limits.window_s / max(apart, 1e-3)) + 1),
        )

    def warm_up(self) -> None:
        """Do each stage once: the first call takes memory, and longer; what resizes is loaded by it."""
        side = math.isqrt(min(WARM_PATCHES, self.engine.bounds.max_patches)) // self.config.image.video_merge_size
        size = (side * self.planner.factor, side * self.planner.factor)
        blank = np.zeros((2 * size[0], 2 * size[1], 3), np.uint8)
        self.library.new_clip(lambda: ()).add(Frame(blank, 0.0))
        patches = preprocess_image(blank, self.config.image, self.config.image.video_merge_size, size=size)
        with self._guard:
            features = self.engine.encode(patches.pixels[None], patches.rows, patches.cols)
            self.engine.project(features.reshape(1, patches.tokens, -1, features.shape[-1]))
            self.cache.truncate(0)
            for count in (self.engine.bounds.max_chunk, 1):
                if self.cache.length + count <= self.engine.bounds.max_seq_len:
                    self.engine.forward(self.cache, self.engine.embed(np.zeros(count, np.int64)), np.array([-1]))
            self.cache.truncate(0)

    def set_budget(self, budget: int) -> list[Change]:
        """Keep another budget of visual tokens from now on; frames that it has no room for shrink or go.

        Raises:
            BudgetError: a budget below one token.
        """
        check_options(budget=(budget, Whole(-LARGEST)))
        with self._guard:
            self._idle()
            limits = replace(self._limits(), budget=budget)
            changes = self.planner.set_limits(limits)
            self.budget = budget
            self._forget([change for change in changes if not change.tokens])
            self._update(changes)
            return changes

    def restart(self, reason: str = "restart") -> list[Change]:
        """Forget all frames and the turns that were kept; the next frame begins a stream."""
        with self._guard:
            return self._restart(reason)

    def _restart(self, reason: str) -> list[Change]:
        self._idle()
        changes = [
            Change(number, frame.tokens, 0, reason)
            for number, frame in zip(self.planner.numbers, self.planner.plan().frames, strict=True)
        ]
        self._turns.clear()
        self._forget(changes)
        self.planner.clear()
        self._stream = self.library.new_clip(lambda: self._frames)
        self._limit()
        return changes

    def ask(
        self, prompt: str, *, keep: bool = False, options: SamplingOptions | None = None
    ) -> Generator[Token, None, None]:
        """Answer a question about the window; `report` says what it cost.

        The question and its answer are forgotten when the next frame comes, unless `keep`: then later frames belong to
        the turn that follows.

        Raises:
            BudgetError: the question and its answer take more than is left beside the frames, or would leave no room
                for frames if they were kept.
            PenguinError: no token follows, because the model's numbers are NaN or infinite.
        """
        return super().ask(prompt, keep=keep, options=options)

    def _ask(self, prompt: str, keep: bool, options: SamplingOptions | None) -> Generator[Token, None, None]:
        options = options or SamplingOptions(max_new_tokens=self.answer_tokens)
        if keep:
            self._check_kept(prompt, options.max_new_tokens)
        self._answering += 1
        try:
            yield from super()._ask(prompt, keep, options)
        finally:
            self._answering -= 1
        if keep:
            self._limit()

    def forget_features(self) -> None:
        """Keep nothing but the frames: the next question encodes and prefills all of them."""
        with self._guard:
            self._idle()
            self._features.clear()
            self._feature_rows = 0
            self.cache.forget()

    def prompt_keys(self) -> list[Key]:
        """What stands at each position of the KV cache before a question is asked."""
        return to_last_frame(self._keys(self._current()))

    def _taken(self, frame: Frame | NDArray[np.uint8], time: float | None) -> Frame:
        new = own(frame, time, self.stats.frames)
        if new.time is None:
            raise InputError("a frame without a time; a stream needs the time of each frame, in seconds")
        return new

    def _last_time(self) -> float:
        return self._stream.times[-1] or 0.0 if self._stream.times else 0.0

    def _tag_tokens(self, time: float) -> int:
        return len(self.tokenizer.encode("," + frame_tag(time)))

    def _check_kept(self, prompt: str, answer: int) -> None:
        kept = Turn(len(self._frames), prompt, (0,) * answer)
        left = self._limits([*self._turns, kept]).room or 0
        if left <= self.planner.tag_tokens:
            raise BudgetError(
                f"kept, this question and its answer would leave {left} tokens for frames; ask without keep, "
                "shorten it, or restart the stream"
            )

    def _idle(self) -> None:
        if self._answering:
            raise BusyError("an answer is being read; read it to its end, or close it, before the stream goes on")

    def _limits(self, kept: Sequence[Turn] | None = None) -> Limits:
        """What is left for frames beside the text around them, the turns that were kept, a question and an answer."""
        turns = [*(self._turns if kept is None else kept), Turn(len(self._frames), "", ())]
        around = sum(len(self.tokenizer.encode_pieces([piece])) for piece in self._turn_pieces(turns, None))
        room = self.engine.bounds.max_seq_len - around - self.question_tokens - self.answer_tokens
        budget = self.budget or self.config.image.max_tokens
        return Limits(budget, room, self._window_s, self.max_frames)

    def _limit(self) -> None:
        changes = self.planner.set_limits(self._limits())
        self._forget([change for change in changes if not change.tokens])
        self._update(changes)

    def _planned(self, kinds: Sequence[str], size: tuple[int, int], budget: int, merge_size: int) -> Plan:
        return self.planner.plan()

    def _plan(self, pieces: Any, media: Any, max_new_tokens: int) -> Any:
        """The window as it is: a question that does not fit is refused, the frames stay."""
        layout = self._fit(pieces, media, self.planner.limits.budget)
        bound = self.engine.bounds.max_seq_len
        if layout.length + max_new_tokens > bound:
            raise BudgetError(
                f"frames and question take {layout.length} tokens and the answer up to {max_new_tokens}, but "
                f"max_seq_len is {bound}; shorten the question, or open the stream with more question_tokens or "
                "answer_tokens"
            )
        return layout

    def _current(self) -> Any:
        """The prompt up to here, with an empty question."""
        turns = [*self._turns, Turn(len(self._frames), "", ())]
        media: list[Any] = [self._stream] if self._frames else []
        return self._fit(
            lambda plans, counts: self._turn_pieces(turns, plans[0] if plans else None),
            media,
            self.planner.limits.budget,
        )

    def _forget(self, gone: Sequence[Change]) -> None:
        """Take frames out of the window."""
        for change in gone:
            index = self._numbers.index(change.frame)
            del self._numbers[index], self._frames[index]
            stream = self._stream
            for values in (stream.times, stream.kinds, stream.similarities, stream.digests):
                del values[index]
            self._turns = [replace(t, frames=t.frames - (index < t.frames)) for t in self._turns]
            self.stats.given_up[change.reason] += 1

    def _discard(self, visuals: Sequence[Visual], unusable: Sequence[Visual]) -> None:
        """Take frames out of the window whose features cannot be computed: those that come are to be told of."""
        gone = []
        for number, visual in zip(self._numbers, visuals, strict=True):
            if visual in unusable:
                gone.append(Change(number, self.planner.discard(number), 0, "unusable"))
        self._forget(gone)

    def _update(self, changes: Sequence[Change], *, arrived: bool = False) -> None:
        """Bring features, retained pixels and the KV cache to the plan; `arrived`: its last frame is new."""
        layout = self._current()
        self._encoded = []
        shrunk = {change.frame for change in changes if change.tokens}
        if self.shrink == "pool":
            self._pool(layout.visuals, shrunk)
        with self.clock("preprocess"):
            self._frames[:] = retained(self._frames, layout.visuals)
        try:
            self._compute_features([self._stream] if self._frames else [], layout.visuals, self.clock)
        except UnusablePicture as error:
            self._discard(layout.visuals, error.visuals)
            self._update([change for change in changes if change.frame in self._numbers])
            raise
        self.stats.encoded += sum(frames for frames, _ in self._encoded)
        self.stats.reencoded += len(shrunk)
        for visual in set(self._features) - set(layout.visuals):
            self._feature_rows -= len(self._features.pop(visual))
        with self.clock("plan"):
            keys = to_last_frame(self._keys(layout))
        self._extend(keys, arrived=arrived)
        self.stats.max_visual_tokens = max(self.stats.max_visual_tokens, self.visual_tokens)

    def _pool(self, visuals: Sequence[Visual], shrunk: set[int]) -> None:
        """Features of shrunk frames as means of what they had, where their size before is still known."""
        known = {visual.digest: visual for visual in self._features}
        for number, visual in zip(self._numbers, visuals, strict=True):
            before = known.get(visual.digest)
            if number in shrunk and before is not None and visual not in self._features:
                factor = self.planner.factor
                rows = pooled(
                    self._features[before],
                    (before.height // factor, before.width // factor),
                    (visual.height // factor, visual.width // factor),
                )
                self._features[visual] = rows
                self._feature_rows += len(rows)

    def _extend(self, keys: list[Key], *, arrived: bool) -> None:
        """Bring the KV cache to `keys`, without logits."""
        if self.following == "rebase":
            moved = rebase(self.engine, self.cache, keys, self._embeds, self.clock)
            self._pieces = moved.pieces
            self.stats.moved_tokens += moved.moved
            self._count(moved.computed, keys, arrived)
            return
        with self.clock("prefill"):
            done = extend_to(self.engine, self.cache, keys, self._embeds, logits=False)
        self._count(len(keys) - done.reused, keys, arrived)

    def _count(self, computed: int, keys: list[Key], arrived: bool) -> None:
        self.stats.prefilled_tokens += computed
        self.stats.reprefilled_tokens += max(0, computed - (last_frame(keys) if arrived else 0))

    def _encode(self, visuals: list[Visual], patches: list[Patches], clock: Clock) -> None:
        self._encoded.append((len(patches), len(patches[0].rows)))
        super()._encode(visuals, patches, clock)
