"""A stream and its moving window: frames are sized, encoded and prefilled as they come; a question pays for itself.

    session = Stream.open("out/penguin-nano")
    for frame in read_video("street.mp4", fps=2):
        session.push(frame)
    for token in session.ask("What changed?"):
        print(token.text, end="")

| held           | bound                                                                             |
|----------------|-----------------------------------------------------------------------------------|
| pixels         | each kept frame at its size in the prompt: 588 bytes per patch under the budget   |
| features       | one row of `hidden_size` f32 per visual token under the budget; with              |
|                | `keep_visual` also one per encoded token of its key frames                        |
| KV cache       | `max_seq_len` of the bundle; frames leave room for a question and its answer      |
| anything else  | one entry per kept frame, and the turns that were kept                            |

Sizes come from `penguin_edge.tra.stream`. When a frame changes or goes, the KV cache follows in one of two ways:

- `recompute`: from that frame on. What the cache holds is what a new session would compute for the same frames at the
  same sizes.
- `rebase`: frames behind it are moved down and their keys turned by the exact rotary angle; only the changed frame is
  computed. Positions are right, but a moved frame has still seen what stood before it then.

Where the way changes while a stream runs, what was moved before stays until it is computed again or leaves.

A question and its answer leave the cache when the next frame comes, unless they are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import most_positions
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BudgetError, BusyError, InputError
from penguin_edge.guard import Guard
from penguin_edge.media.frames import Frame
from penguin_edge.media.preprocess import preprocess_image
from penguin_edge.prompt.chat import frame_tag
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.answer import (
    Answering,
    Layout,
    Token,
    UnusablePicture,
    check_keep_visual,
    ending,
    refuse_media,
)
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.core.decode import Parts, answer, check_parts
from penguin_edge.runtime.core.features import Calls, Features
from penguin_edge.runtime.core.ledger import last_frame, rebase, to_last_frame
from penguin_edge.runtime.core.media import Library, own
from penguin_edge.runtime.core.options import PROMPT, Follow, Shrink, StreamChanges, StreamOptions, given_options
from penguin_edge.runtime.core.pool import put_pooled, retained
from penguin_edge.runtime.core.report import Clock, Kept, Report, StreamStats, Work
from penguin_edge.runtime.core.sampling import SamplingOptions, given_sampling
from penguin_edge.runtime.core.turns import Turn, Turns
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.cache import Key, Visual
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.slices import Slices, Steps
from penguin_edge.runtime.window import Window
from penguin_edge.schema import LARGEST, Whole
from penguin_edge.tra.layout import cap_size, largest_size
from penguin_edge.tra.stream import Change, Limits, StreamPlanner

WARM_PATCHES, WARM_PIXELS = 256, (448, 448)  # of a frame that warms up, where no size is known


class Stream:
    """One stream over one engine, for one thread: `penguin_edge.runtime.live.live` puts a thread and a queue before it.

    What changes the window is refused with `BusyError` while an answer is being read.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        options: StreamOptions | None = None,
        **changes: Unpack[StreamChanges],
    ) -> None:
        """A stream over an engine of the caller's.

        Args:
            tokenizer: of the model; None takes that of the engine's bundle.
            options: see `StreamOptions`; single ones may be given by name instead, such as `budget=600`.
        Raises:
            InputError: a text-only model, an option of the wrong type or out of range, or a name that there is none of.
            BudgetError: the context leaves no room for a frame.
            BusyError: the engine has no room for one more cache.
        """
        self.options = given_options(StreamOptions, options, changes)
        check_parts(engine, tokenizer)
        refuse_media(engine.config, True)
        check_keep_visual(engine, self.options.keep_visual)
        if self.options.cache == "rebase" and not engine.can_move:
            raise InputError(
                f"{engine.name} cannot move positions of this bundle's cache: it was exported before that was known; "
                "export the model again, or take cache='recompute'"
            )
        self.engine, self.config = engine, engine.config
        self._reach = most_positions(engine.config, engine.bounds)
        self.tokenizer = tokenizer or engine.tokenizer()
        self.report = Report()
        self.new_clock: Callable[[], Clock] = Clock
        """Makes the clock of each answer."""
        self.clock = Clock()
        """Adds up what frames take."""
        self.stats, self._answering = StreamStats(), 0
        self.frame_tokens: int | None = None
        """Most visual tokens of a frame that comes from now on, as encoded; None: no limit of its own."""
        self.follow: Follow = "recompute" if self.options.cache == "auto" else self.options.cache
        """How the KV cache follows from now on."""
        self.shrink: Shrink = "encode" if self.options.shrink == "auto" else self.options.shrink
        """What is done with frames that get smaller from now on."""
        self.last_work: Work | None = None
        """What the last frame made the engine do."""
        image = self.config.image
        self._encoded: Calls = []
        self._pieces, self._slicing = 1, False
        budget = self.options.budget or image.max_tokens
        planner = StreamPlanner(
            Limits(budget),
            mode=self.options.tra,
            tag_tokens=self._tag_tokens(0.0),
            min_tokens=image.min_tokens,
            merge_size=image.video_merge_size,
            config=self.config.tra,
            keep=self.options.keep_visual,
        )
        self._library = Library(image, self.options.tra)
        self._window = Window(self._library.new_clip, planner, Turns(self.options.thinking), self.options.keep_visual)
        planner.set_limits(self._limits(self._window, budget))
        self.features = Features(engine, self.options.keep_visual)
        self.cache = engine.new_cache()
        """What this stream has prefilled; `length` and `keys` are for reading."""
        self._parts = Parts(engine, self.tokenizer, self.cache, self.features)
        self._guard = Guard("stream", getattr(engine, "guard", None))

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        options: StreamOptions | None = None,
        *,
        threads: int | None = None,
        **changes: Unpack[StreamChanges],
    ) -> Stream:
        """A stream over a bundle's own engine.

        Args:
            threads: threads of the engine; None leaves the choice to it.
        Raises:
            BundleError: the bundle is missing, damaged or of another schema.
            TargetUnavailable: its engine is not installed.
            InputError, BudgetError: as of a stream over an engine.
        """
        return cls(open_engine(bundle, threads=threads), options=given_options(StreamOptions, options, changes))

    def close(self) -> None:
        """Give the KV cache back to the engine; what is asked afterwards is refused."""
        with self._guard:
            self.cache.close("stream")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def planner(self) -> StreamPlanner:
        """Sizes of the frames, and the limits that they keep; for reading."""
        return self._window.planner

    @property
    def turns(self) -> Turns:
        """Questions that were kept, with their answers."""
        return self._window.turns

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the window."""
        return self.planner.total_tokens

    @property
    def budget(self) -> int:
        """Visual tokens that the window may have."""
        return self.planner.limits.budget

    @property
    def times(self) -> list[float]:
        """Time stamps of the kept frames, in seconds."""
        return self._window.times

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The kept frames, as far as their pixels are: each at its size in the prompt."""
        return tuple(self._window.frames)

    @property
    def window(self) -> tuple[Kept, ...]:
        """The kept frames with their sizes now, oldest first."""
        return self._window.kept

    def status(self) -> dict[str, int]:
        """Where the stream stands, for JSON."""
        return {
            "frames_kept": len(self._window.frames),
            "visual_tokens": self.visual_tokens,
            "budget": self.budget,
            "level": self.planner.level,
            "kv_tokens": self.cache.length,
            "capacity": self.engine.bounds.max_seq_len,
        }

    def push(self, frame: Frame | NDArray[np.uint8], time: float | None = None) -> list[Change]:
        """Add a frame: label, size, encode and prefill it, after what had to shrink or go for it.

        A frame of another size than those before, or from before the last one, begins the stream anew. Where the
        encoder fails, the stream stays as it was.

        Args:
            frame: a `Frame`, or pixels [H, W, 3] uint8 RGB; `time` in seconds.
        Returns:
            What became of earlier frames.
        Raises:
            InputError: wrong shape or dtype, or no time.
            UnusablePicture: its features are not finite; the stream goes on without it.
        """
        return self.slices(frame, time).finish()

    def slices(self, frame: Frame | NDArray[np.uint8], time: float | None = None) -> Slices:
        """Add a frame slice by slice: each call of the encoder is one, and what follows them. Takes what `push` takes.

        Between two slices questions can be asked, about the window as it was before the frame. They have to be read to
        their end, or closed, before the next slice, and cannot be kept; the window cannot be changed otherwise.
        """
        return Slices(self._guard, self._unread, self._add(frame, time))

    def _add(self, frame: Frame | NDArray[np.uint8], time: float | None) -> Steps:
        self._idle()
        new = own(frame, time, self.stats.frames)
        if new.time is None:
            raise InputError("a frame without a time; a stream needs the time of each frame, in seconds")
        size = (new.pixels.shape[0], new.pixels.shape[1])
        window, gone = self._window.copy(), list[Change]()
        for reason, broken in (("size", size != window.clip.size), ("time", new.time < window.last_time)):
            if broken and window.frames:
                gone += self._cleared(window, reason)
        with self.clock("plan"):
            window.planner.tag_tokens = max(window.planner.tag_tokens, self._tag_tokens(new.time))
            bound = self.engine.bounds.max_patches // window.clip.merge_size**2
            if self.frame_tokens is not None:
                bound = min(bound, self.frame_tokens)
            capped = cap_size(size, bound, window.planner.factor)
            changes = window.add(new, capped)
        before, moved = self.stats.prefilled_tokens, self.stats.moved_tokens
        yield from self._follow(window, [*gone, *changes], arrived=True)
        prefilled = self.stats.prefilled_tokens - before
        self.last_work = Work(
            size[0] * size[1],
            tuple(self._encoded),
            prefilled,
            max(0, self.cache.length - prefilled),
            self._pieces,
            self.stats.moved_tokens - moved,
        )
        return [*gone, *changes]

    def warm_up(self, expected: tuple[int, int] | None = None) -> None:
        """Do each stage once, for frames of (height, width) pixels where known: the first call takes memory, and
        longer; what resizes is loaded by it."""
        most = self.engine.bounds.max_patches if expected else min(WARM_PATCHES, self.engine.bounds.max_patches)
        blank = np.zeros((*(expected or WARM_PIXELS), 3), np.uint8)
        size = largest_size(blank.shape[:2], most // self.config.image.video_merge_size**2, self.planner.factor)
        self._library.new_clip(tuple).add(Frame(blank, 0.0))
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
            return self._limit(self._window.copy(), budget)

    def restart(self, reason: str = "restart") -> list[Change]:
        """Forget all frames and the turns that were kept; the next frame begins a stream."""
        with self._guard:
            self._idle()
            window = self._window.copy()
            changes = self._cleared(window, reason)
            deque(self._follow(window, changes), 0)
            return changes

    def _cleared(self, window: Window, reason: str) -> list[Change]:
        changes = window.clear(reason)
        window.planner.set_limits(self._limits(window, self.budget))
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
        wanted = given_sampling(options, SamplingOptions(max_new_tokens=self.options.answer_tokens))
        return Answering(self._guard, self._ask(prompt, keep, wanted))

    def _ask(self, prompt: str, keep: bool, options: SamplingOptions) -> Generator[Token, None, None]:
        check_options(prompt=(prompt, PROMPT))
        if keep:
            self._whole()
            self._check_kept(prompt, options.max_new_tokens)
        window = self._window
        asked, gone = Turn(len(window.frames), prompt), window.turns.gone
        self.report = report = Report()
        self._answering += 1
        try:
            with ending(report):
                yield from answer(
                    self._parts,
                    report,
                    lambda: self._plan(asked, options.max_new_tokens),
                    window.media,
                    self.new_clock(),
                    options,
                    lambda: self.report is not report,
                )
        finally:
            self._answering -= 1
        if keep:
            stops = self.config.eos_token_ids
            window = self._window.copy()
            window.turns.keep(asked, [i for i in report.token_ids if i not in stops], gone)
            self._limit(window, self.budget)

    def forget_features(self) -> None:
        """Keep nothing but the frames: the next question encodes and prefills all of them."""
        with self._guard:
            self._idle()
            self.features.clear()
            self.cache.forget()

    def prompt_keys(self) -> list[Key]:
        """What stands at each position of the KV cache before a question is asked."""
        return to_last_frame(self._parts.keys(self._current(self._window)))

    def _tag_tokens(self, time: float) -> int:
        return len(self.tokenizer.encode("," + frame_tag(time)))

    def _check_kept(self, prompt: str, answer: int) -> None:
        left = self._limits(self._window, self.budget, Turn(len(self._window.frames), prompt, (0,) * answer)).left or 0
        if left <= self.planner.tag_tokens:
            raise BudgetError(
                f"kept, this question and its answer would leave {left} tokens for frames; ask without keep, shorten "
                "it, or restart the stream"
            )

    def _idle(self) -> None:
        self._whole()
        self._unread()

    def _unread(self) -> None:
        if self._answering:
            raise BusyError("an answer is being read; read it to its end, or close it, before the stream goes on")

    def _whole(self) -> None:
        if self._slicing:
            raise BusyError("a frame is being added; take its slices to the end, or close them, first")

    def _limits(self, window: Window, budget: int, *kept: Turn) -> Limits:
        """What is left for frames beside the text around them, kept turns and these, a question and an answer."""
        pieces = window.turns.pieces(window.clip, None, *kept, Turn(len(window.frames), ""))
        around = sum(len(self.tokenizer.encode_pieces([piece])) for piece in pieces)
        free = self.options.question_tokens + self.options.answer_tokens
        room, reach = (most - around - free for most in (self.engine.bounds.max_seq_len, self._reach))
        frames = self.options.max_frames or self.config.image.max_frames
        return Limits(budget, room, self.options.window_s, frames, reach)

    def _limit(self, window: Window, budget: int) -> list[Change]:
        """Let a window take the place of the one before, within a budget and what the text around it leaves."""
        changes = window.planner.set_limits(self._limits(window, budget))
        window.forget(changes)
        deque(self._follow(window, changes), 0)
        return changes

    def _plan(self, question: Turn, max_new_tokens: int) -> Layout:
        """The window as it is: a question that does not fit is refused, the frames stay."""
        found = self._window.layout(question, self.tokenizer)
        bound = self.engine.bounds.max_seq_len
        if found.length + max_new_tokens > bound or found.span + max_new_tokens > self._reach:
            raise BudgetError(
                f"frames, question and answer take {found.length + max_new_tokens} tokens of max_seq_len {bound}; "
                "shorten the question, or open the stream with more question_tokens or answer_tokens"
            )
        return found

    def _current(self, window: Window) -> Layout:
        """The prompt up to here, with an empty question."""
        return window.layout(Turn(len(window.frames), ""), self.tokenizer)

    def _follow(
        self, window: Window, changes: Sequence[Change], *, arrived: bool = False
    ) -> Generator[None, None, None]:
        """Compute what a changed window needs, put it in the place of the one before, and bring the KV cache to it.

        Args:
            arrived: its last frame is new.
        Raises:
            UnusablePicture: features that are not finite; the window is without these frames.
        """
        prompt = self._current(window)
        shrunk = {change.frame for change in changes if change.tokens}
        if self.shrink == "pool":
            smaller = [v for number, v in zip(window.numbers, prompt.visuals, strict=True) if number in shrunk]
            put_pooled(self.features, smaller, window.planner.factor)
        with self.clock("preprocess"):
            window.frames[:] = retained(window.frames, prompt.visuals)
        calls: Calls = []
        unusable: UnusablePicture | None = None
        try:
            for call in self.features.steps(window.media, prompt.visuals, self.clock, prompt.references):
                calls.append(call)
                yield from self._pause()
        except UnusablePicture as error:
            unusable = error
        self.stats.encoded += sum(frames for frames, _ in calls)
        if unusable is not None:
            gone = window.discard(prompt.visuals, unusable.visuals)
            changes = [one for one in changes if not one.tokens or one.frame in window.numbers]
            yield from self._follow(window, [*changes, *gone])
            raise unusable
        self._encoded = calls
        self._commit(window, changes, prompt.visuals, arrived=arrived)

    def _pause(self) -> Generator[None, None, None]:
        """The end of a slice."""
        self._slicing = True
        try:
            yield
        finally:
            self._slicing = False

    def _commit(self, window: Window, changes: Sequence[Change], visuals: Sequence[Visual], *, arrived: bool) -> None:
        """Everything is computed but the KV cache: the window takes the place of the one before."""
        self._window = window
        self.stats.frames = window.planner.pushed
        self.stats.reencoded += sum(change.tokens > 0 for change in changes)
        self.stats.given_up.update(change.reason for change in changes if not change.tokens)
        self.features.keep_only(visuals)
        with self.clock("plan"):
            keys = to_last_frame(self._parts.keys(self._current(window)))
        self._extend(keys, arrived=arrived)
        self.stats.max_visual_tokens = max(self.stats.max_visual_tokens, self.visual_tokens)

    def _extend(self, keys: list[Key], *, arrived: bool) -> None:
        """Bring the KV cache to `keys`, without logits."""
        if self.follow == "rebase":
            moved = rebase(self.engine, self.cache, keys, self.features.embeds, self.clock)
            self._pieces = moved.pieces
            self.stats.moved_tokens += moved.moved
            self._count(moved.computed, keys, arrived)
            return
        with self.clock("prefill"):
            reused, _ = self._parts.prefill(keys, logits=False)
        self._count(len(keys) - reused, keys, arrived)

    def _count(self, computed: int, keys: list[Key], arrived: bool) -> None:
        self.stats.prefilled_tokens += computed
        self.stats.reprefilled_tokens += max(0, computed - (last_frame(keys) if arrived else 0))
