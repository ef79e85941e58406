"""A conversation: its prompts are planned under a budget, and each prefills only what the one before did not.

    session = Session.open("out/penguin-tiny")
    for frame in read_video("street.mp4", fps=2):
        session.push(frame)
    for token in session.ask("What changed?"):
        print(token.text, end="")

Every position of the KV cache has a key: a token id, or (image or frame at a size, its n-th token). A new prompt
keeps the longest prefix whose keys are equal and prefills the rest, so reuse is exact whatever was asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray

from penguin_edge.bundle.contract import most_positions
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.guard import Guard
from penguin_edge.media.frames import Frame
from penguin_edge.prompt.chat import Message, Piece, check_roles, part_kind, parts_of, render
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.answer import (
    Answering,
    Layout,
    Render,
    Token,
    check_keep_visual,
    ending,
    kept_visuals,
    key_frames,
    largest_fit,
    layout,
    refuse_media,
    shapes,
)
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.core.decode import Parts, answer, check_parts
from penguin_edge.runtime.core.features import Features
from penguin_edge.runtime.core.media import Clip, Library, Picture, open_media, own
from penguin_edge.runtime.core.options import PROMPT, SessionChanges, SessionOptions, given_options
from penguin_edge.runtime.core.report import Clock, Report
from penguin_edge.runtime.core.sampling import SamplingOptions, given_sampling
from penguin_edge.runtime.core.turns import Turn, Turns
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.cache import Visual
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.tra.clip import KEY, Plan
from penguin_edge.tra.keeping import kept_tokens
from penguin_edge.tra.layout import fit_media, spell_out


class Session:
    """One conversation over one engine. One thread at a time: a second one is refused with `BusyError`.

    Sessions may share an engine; each has a KV cache of its own. An engine that holds one cache takes one session at a
    time. Close a session, or use it as a context manager, to make room for the next.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        options: SessionOptions | None = None,
        **changes: Unpack[SessionChanges],
    ) -> None:
        """A session over an engine of the caller's.

        Args:
            tokenizer: of the model; None takes that of the engine's bundle.
            options: see `SessionOptions`; single ones may be given by name instead, such as `budget=600`.
        Raises:
            InputError: an option of the wrong type or out of range, or a name that there is none of.
            InputError: `keep_visual` over a bundle that cannot do it.
            BudgetError: a budget below one token.
            BusyError: the engine has no room for one more cache.
        """
        self.options = given_options(SessionOptions, options, changes)
        check_parts(engine, tokenizer)
        check_keep_visual(engine, self.options.keep_visual)
        self.engine, self.config = engine, engine.config
        self.tokenizer = tokenizer or engine.tokenizer()
        self.policy = self.options.policy
        """Plans clips instead of TRA; may be changed between questions."""
        self.report = Report()
        self.new_clock: Callable[[], Clock] = Clock
        """Makes the clock of each answer."""
        self.features = Features(engine, self.options.keep_visual)
        self.cache = engine.new_cache()
        """What this session has prefilled; `length` and `keys` are for reading."""
        self._parts = Parts(engine, self.tokenizer, self.cache, self.features)
        image, given = self.config.image, self.options
        self._max_frames = given.max_frames or image.max_frames
        self._library = Library(image, given.tra, given.max_pixels, given.max_packets)
        self._frames: list[Frame] = []
        self._clip = self._library.new_clip(lambda: self._frames)
        self.turns = Turns(given.thinking)
        """Questions that were kept, with their answers."""
        self._guard = Guard("session", getattr(engine, "guard", None))

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        options: SessionOptions | None = None,
        *,
        threads: int | None = None,
        **changes: Unpack[SessionChanges],
    ) -> Session:
        """A session over a bundle's own engine.

        Args:
            threads: threads of the engine; None leaves the choice to it.
        Raises:
            BundleError: the bundle is missing, damaged or of another schema.
            TargetUnavailable: its engine is not installed.
            InputError, BudgetError: as of a session over an engine.
        """
        wanted = given_options(SessionOptions, options, changes)
        return cls(open_engine(bundle, threads=threads), options=wanted)

    def close(self) -> None:
        """Give the KV cache back to the engine; what is asked afterwards is refused."""
        with self._guard:
            self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def push(self, frame: Frame | NDArray[np.uint8], time: float | None = None) -> None:
        """Add a frame to what `ask` is about: label it and keep it. Beyond `max_frames` the oldest frame is given up.

        Args:
            frame: a `Frame`, or pixels [H, W, 3] uint8 RGB with `time` in seconds.
        Raises:
            InputError: wrong shape or dtype, another size than the frames before, or a time where those have none.
            BusyError: another thread uses the session.
        """
        with self._guard:
            self.cache.check_open()
            new = own(frame, time, len(self._frames))
            if self._clip.times and (new.time is None) != (self._clip.times[-1] is None):
                raise InputError(
                    "a frame without a time among frames with one; give each frame its time in seconds, or none of them"
                )
            self._clip.add(new)
            self._frames.append(new)
            if len(self._frames) > self._max_frames:
                del self._frames[0]
                self._clip.remove(0)
                self._clip.kinds[0] = KEY
                self.turns.frame_gone(0)

    def ask(
        self, prompt: str, *, keep: bool = False, options: SamplingOptions | None = None
    ) -> Generator[Token, None, None]:
        """Answer a question about the frames pushed so far; `report` says what it cost.

        The question is forgotten afterwards unless `keep`: then it and its answer stay, and a new turn opens. Either
        way the frames stay prefilled.

        Raises:
            BudgetError: it does not fit into the bundle's `max_seq_len`.
            BusyError: another thread uses the session or its engine.
            PenguinError: no token follows, because the model's numbers are NaN or infinite.
        """
        return Answering(self._guard, self._ask(prompt, keep, given_sampling(options, SamplingOptions())))

    def _ask(self, prompt: str, keep: bool, options: SamplingOptions) -> Generator[Token, None, None]:
        check_options(prompt=(prompt, PROMPT))
        asked, gone = Turn(len(self._frames), prompt), self.turns.gone
        media: list[Picture | Clip] = [self._clip] if self._frames else []

        def pieces(plans: list[Plan], counts: list[int]) -> list[Piece]:
            return self.turns.pieces(self._clip, plans[0] if plans else None, asked)

        self.report = report = Report()
        with ending(report):
            yield from self._answer(report, pieces, media, self.new_clock(), options)
        if keep:
            stops = self.config.eos_token_ids
            self.turns.keep(asked, [i for i in report.token_ids if i not in stops], gone)

    def converse(
        self, messages: Sequence[Message], options: SamplingOptions | None = None
    ) -> Generator[Token, None, None]:
        """Answer a whole conversation in the published format; images and clips are named in its parts.

        Raises:
            InputError: a malformed conversation or unreadable media.
            BudgetError: it does not fit into the bundle's `max_seq_len`.
            BusyError: another thread uses the session or its engine.
            PenguinError: no token follows, because the model's numbers are NaN or infinite.
        """
        return Answering(self._guard, self._converse(messages, given_sampling(options, SamplingOptions())))

    def _converse(self, messages: Sequence[Message], options: SamplingOptions) -> Generator[Token, None, None]:
        clock = self.new_clock()
        self.report = report = Report()
        with ending(report):
            if not isinstance(messages, Sequence):
                raise InputError(f"messages: {type(messages).__name__}, wanted a list of objects with role and content")
            check_roles(messages)
            refuse_media(self.config, any(part_kind(part) != "text" for part in parts_of(messages)))
            media = open_media(messages, self._library, clock)

            def pieces(plans: list[Plan], counts: list[int]) -> list[Piece]:
                return render(spell_out(messages, shapes(media), plans), counts, thinking=self.options.thinking)

            yield from self._answer(report, pieces, media, clock, options)

    def _answer(
        self, report: Report, pieces: Render, media: list[Picture | Clip], clock: Clock, options: SamplingOptions
    ) -> Generator[Token, None, None]:
        return answer(
            self._parts,
            report,
            lambda: self._plan(pieces, media, options.max_new_tokens),
            media,
            clock,
            options,
            lambda: self.report is not report,
        )

    def _fit(self, pieces: Render, media: list[Picture | Clip], limit: int) -> Layout:
        """Everything planned under `limit` visual tokens."""
        fit = fit_media(
            shapes(media),
            limit,
            self.config,
            tra=self.options.tra,
            shared_image_size=self.options.shared_image_size,
            max_patches=self.engine.bounds.max_patches,
            policy=self.policy,
            keep=self.options.keep_visual,
        )
        plans = iter(fit.plans)
        visuals: list[Visual] = []
        references: list[Visual | None] = []
        for item, sizes in zip(media, fit.sizes, strict=True):
            if isinstance(item, Clip):
                plan = next(plans)
                frames = kept_visuals(item, plan)
                visuals += frames
                references += key_frames(frames, plan)
            else:
                visuals.append(Visual(item.digest, *sizes[0], item.merge_size))
                references.append(None)
        keep = self.options.keep_visual
        made = pieces(fit.plans, [kept_tokens(one.tokens, keep) for one in visuals])
        return layout(made, visuals, references, fit.plans, limit, self.tokenizer, keep)

    def _plan(self, pieces: Render, media: list[Picture | Clip], max_new_tokens: int) -> Layout:
        """The largest visual budget that leaves room for the text, its timestamps and the answer.

        Raises:
            BudgetError: no budget does.
        """
        capacity = self.engine.bounds.max_seq_len - max_new_tokens
        reach = most_positions(self.config, self.engine.bounds) - max_new_tokens
        guarded, most = self.options.tra != "reference", self.config.image.max_tokens
        wanted, least = min(self.options.budget or most, most), max(1, len(media))
        if wanted < least:
            raise BudgetError(
                f"a budget of {wanted} visual tokens for {least} images and clips; each takes at least one token, "
                "so raise the budget or leave some out"
            )

        def fits(one: Layout) -> bool:
            return one.length <= capacity and one.span <= reach

        best = self._fit(pieces, media, wanted)
        if not fits(best) and media and guarded:
            best = largest_fit(lambda limit: self._fit(pieces, media, limit), least, wanted, capacity, fits)
        if best.length > capacity:
            raise BudgetError(
                f"the prompt takes {best.length} tokens and the answer up to {max_new_tokens}, but max_seq_len is "
                f"{self.engine.bounds.max_seq_len}; shorten the text, lower --max-frames or --max-new-tokens, or "
                "export with a larger --max-seq-len"
            )
        if best.span > reach:
            raise BudgetError(
                f"the prompt spans {best.span} positions and the answer up to {max_new_tokens}, of "
                f"{reach + max_new_tokens}; keep more of the visual tokens, or shorten the prompt"
            )
        used = best.visual_tokens
        if used > best.budget and guarded:
            raise BudgetError(
                f"the images take {used} visual tokens at the reference's size, the budget is {best.budget}; "
                "raise it or leave out --shared-image-size"
            )
        return best
