"""A session: frames, plan, feature cache, and what stands at each position of the KV cache.

    session = Session.open("out/penguin-tiny")
    for frame in read_video("street.mp4", fps=2):
        session.push(frame)
    for token in session.ask("What changed?"):
        print(token.text, end="")

Every position of the KV cache has a key: a token id, or (image or frame at a size, its n-th token). A new prompt
keeps the longest prefix whose keys are equal and prefills the rest, so reuse is exact whatever was asked before.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from penguin_edge import prompt as chat
from penguin_edge.bundle import Bundle
from penguin_edge.errors import BudgetError, BusyError, InputError, PenguinError
from penguin_edge.frames import Frame
from penguin_edge.guard import Guard
from penguin_edge.layout import fit_media, spell_out
from penguin_edge.machine import peak_mb
from penguin_edge.preprocess import Patches, preprocess_image
from penguin_edge.prompt import Message, Piece, Special, TextStream, Tokenizer, part_kind, parts_of, render
from penguin_edge.runtime.answer import (
    Answering,
    Layout,
    Render,
    Token,
    Turn,
    UnusablePicture,
    describe,
    ending,
    largest_fit,
    shapes,
)
from penguin_edge.runtime.cache import Key
from penguin_edge.runtime.engine import F32, Engine, sound
from penguin_edge.runtime.engines import open_engine
from penguin_edge.runtime.media import Clip, Library, Picture, Visual, open_media, own
from penguin_edge.runtime.options import check_options
from penguin_edge.runtime.prefill import extend_to
from penguin_edge.runtime.report import Clock, Report
from penguin_edge.runtime.sampling import Sampler, SamplingOptions
from penguin_edge.runtime.self_check import open_tokenizer
from penguin_edge.schema import LARGEST, Maybe, Text, Whole
from penguin_edge.tra import DROPPED, KEY, Mode, Plan, Policy

PATCHES_PER_CALL = 4096
"""Frames of one grid are encoded together up to this many patches; larger batches gain nothing and cost memory."""


class Session:
    """One conversation over one engine. One thread at a time: a second one is refused with `BusyError`.

    Sessions may share an engine; each has a KV cache of its own. An engine that holds one cache takes one session at a
    time. Close a session, or use it as a context manager, to make room for the next.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        budget: int | None = None,
        tra: Mode = "strict",
        max_frames: int | None = None,
        thinking: bool = False,
        shared_image_size: bool = False,
        max_pixels: int | None = None,
        max_packets: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        """As `open`, over an engine of the caller's.

        Args:
            policy: plans clips instead of TRA; may be changed between questions.
        """
        if tra not in ("strict", "reference"):
            raise InputError(f"tra mode {tra!r} is unknown; known: reference, strict")
        count = Maybe(Whole(1))
        check_options(
            max_frames=(max_frames, count),
            max_pixels=(max_pixels, count),
            max_packets=(max_packets, count),
            budget=(budget, Maybe(Whole(-LARGEST))),
        )
        if budget is not None and budget < 1:
            raise BudgetError(f"a budget of {budget} visual tokens holds nothing; wanted at least 1")
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = engine.config
        self.budget = budget
        self.tra = tra
        self.thinking = thinking
        self.shared_image_size = shared_image_size
        self.policy = policy
        self.max_frames = max_frames or self.config.image.max_frames
        self.report = Report()
        self.library = Library(self.config.image, tra, max_pixels, max_packets)
        self.new_clock: Callable[[], Clock] = Clock
        """Makes the clock of each answer."""
        self._frames: list[Frame] = []
        self._stream = self.library.new_clip(lambda: self._frames)
        self._turns: list[Turn] = []
        self._evicted = 0
        self._features: OrderedDict[Visual, F32] = OrderedDict()
        self._feature_rows = 0
        self.cache = engine.new_cache()
        """What this session has prefilled; `length` and `keys` are for reading."""
        self._guard = Guard("session", getattr(engine, "guard", None))

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        threads: int | None = None,
        budget: int | None = None,
        tra: Mode = "strict",
        max_frames: int | None = None,
        thinking: bool = False,
        shared_image_size: bool = False,
        max_pixels: int | None = None,
        max_packets: int | None = None,
    ) -> Session:
        """A session over a bundle's own engine.

        Args:
            threads: threads of the engine; None leaves the choice to it.
            budget: visual tokens of a prompt; None takes what the context leaves.
            max_frames: frames of the stream that are kept; None takes the model's number.
            thinking: leave out the empty think block.
            shared_image_size: give all images of a prompt the first one's size, as the reference does.
            max_pixels: of a picture or of a clip's frame; None takes the limits of `read_image` and `read_video`.
            max_packets: of a clip's video stream; None takes the limit of `read_video`.
        Raises:
            BundleError: the bundle is missing, damaged or of another schema.
            TargetUnavailable: its engine is not installed.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
        tokenizer = open_tokenizer(opened)
        engine = open_engine(opened, threads=threads)
        return cls(
            engine,
            tokenizer,
            budget=budget,
            tra=tra,
            max_frames=max_frames,
            thinking=thinking,
            shared_image_size=shared_image_size,
            max_pixels=max_pixels,
            max_packets=max_packets,
        )

    def close(self) -> None:
        """Give the KV cache back to the engine; what is asked afterwards is refused."""
        with self._guard:
            self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def push(self, frame: Frame | NDArray[np.uint8], time: float | None = None) -> None:
        """Add a frame to the stream: label it and keep it. Beyond `max_frames` the oldest frame is given up.

        Args:
            frame: a `Frame`, or pixels [H, W, 3] uint8 RGB with `time` in seconds.
        Raises:
            InputError: wrong shape or dtype, or another size than the frames before.
            BusyError: another thread uses the session.
        """
        with self._guard:
            self._push(frame, time)

    def _push(self, frame: Frame | NDArray[np.uint8], time: float | None) -> None:
        frame = own(frame, time, len(self._frames))
        self._stream.add(frame)
        self._frames.append(frame)
        if len(self._frames) > self.max_frames:
            self._frames.pop(0)
            self._evicted += 1
            for values in (self._stream.times, self._stream.kinds, self._stream.similarities, self._stream.digests):
                values.pop(0)
            self._stream.kinds[0] = KEY
            self._turns = [Turn(max(0, t.frames - 1), t.prompt, t.answer) for t in self._turns]

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
        return Answering(self._guard, self._ask(prompt, keep, options))

    def _ask(self, prompt: str, keep: bool, options: SamplingOptions | None) -> Generator[Token, None, None]:
        check_options(prompt=(prompt, Text(longest=LARGEST)))
        turns = [*self._turns, Turn(len(self._frames), prompt, ())]
        evicted = self._evicted
        media: list[Picture | Clip] = [self._stream] if self._frames else []

        def pieces(plans: list[Plan], counts: list[int]) -> list[Piece]:
            return self._turn_pieces(turns, plans[0] if plans else None)

        self.report = report = Report()
        with ending(report):
            yield from self._answer(report, pieces, media, self.new_clock(), options or SamplingOptions())
        if keep:
            stops = self.config.eos_token_ids
            answer = tuple(i for i in report.token_ids if i not in stops)
            # Frames may have come and gone while the answer was read.
            frames = max(0, turns[-1].frames - (self._evicted - evicted))
            self._turns.append(Turn(frames, prompt, answer))

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
        return Answering(self._guard, self._converse(messages, options))

    def _converse(self, messages: Sequence[Message], options: SamplingOptions | None) -> Generator[Token, None, None]:
        clock = self.new_clock()
        self.report = report = Report()
        with ending(report):
            if not isinstance(messages, Sequence):
                raise InputError(f"messages: {type(messages).__name__}, wanted a list of objects with role and content")
            self._refuse_media(any(part_kind(part) != "text" for part in parts_of(messages)))
            media = open_media(messages, self.library, clock)

            def pieces(plans: list[Plan], counts: list[int]) -> list[Piece]:
                return render(spell_out(messages, shapes(media), plans), counts, thinking=self.thinking)

            yield from self._answer(report, pieces, media, clock, options or SamplingOptions())

    def _refuse_media(self, given: bool) -> None:
        if given and self.config.vision is None:
            raise InputError("this model reads text only; leave out images, clips and frames")

    def _turn_pieces(self, turns: list[Turn], plan: Plan | None) -> list[Piece]:
        out: list[Piece] = []
        done = 0
        for index, turn in enumerate(turns):
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.prompt}]
            if plan is not None and turn.frames > done:
                content.insert(0, self._stream.part(plan, done, turn.frames))
                done = turn.frames
            out += render([{"role": "user", "content": content}], thinking=self.thinking)
            if index < len(turns) - 1:
                out += [chat.Ids(turn.answer), Special(chat.END), "\n"]
        counts = iter([f.tokens for f in plan.frames if f.kind != DROPPED] if plan else [])
        seen = 0
        for i, piece in enumerate(out):
            if isinstance(piece, chat.VisualTokens):
                out[i] = chat.VisualTokens(next(counts), seen)
                seen += 1
        return out

    def _fit(self, pieces: Render, media: list[Picture | Clip], limit: int) -> Layout:
        """Everything planned under `limit` visual tokens."""
        fit = fit_media(
            shapes(media),
            limit,
            self.config,
            tra=self.tra,
            shared_image_size=self.shared_image_size,
            max_patches=self.engine.bounds.max_patches,
            policy=self.policy,
        )
        plans = iter(fit.plans)
        flat = []
        for item, sizes in zip(media, fit.sizes, strict=True):
            names = item.kept(next(plans)) if isinstance(item, Clip) else [item.digest]
            flat += [Visual(name, *size, item.merge_size) for name, size in zip(names, sizes, strict=True)]
        rendered = pieces(fit.plans, [visual.tokens for visual in flat])
        return Layout(rendered, flat, fit.plans, limit, len(self.tokenizer.encode_pieces(rendered)))

    def _plan(self, pieces: Render, media: list[Picture | Clip], max_new_tokens: int) -> Layout:
        """The largest visual budget that leaves room for the text, its timestamps and the answer.

        Raises:
            BudgetError: no budget does.
        """
        capacity = self.engine.bounds.max_seq_len - max_new_tokens
        wanted = min(self.budget or self.config.image.max_tokens, self.config.image.max_tokens)
        least = max(1, len(media))
        if wanted < least:
            raise BudgetError(
                f"a budget of {wanted} visual tokens for {least} images and clips; each takes at least one token, "
                "so raise the budget or leave some out"
            )
        best = self._fit(pieces, media, wanted)
        if best.length > capacity and media and self.tra == "strict":
            best = largest_fit(lambda limit: self._fit(pieces, media, limit), least, wanted, capacity)
        if best.length > capacity:
            raise BudgetError(
                f"the prompt takes {best.length} tokens and the answer up to {max_new_tokens}, but max_seq_len is "
                f"{self.engine.bounds.max_seq_len}; shorten the text, lower --max-frames or --max-new-tokens, or "
                "export with a larger --max-seq-len"
            )
        used = sum(visual.tokens for visual in best.visuals)
        if used > best.budget and self.tra == "strict":
            raise BudgetError(
                f"the images take {used} visual tokens at the reference's size, the budget is {best.budget}; "
                "raise it or leave out --shared-image-size"
            )
        return best

    def _answer(
        self, report: Report, pieces: Render, media: list[Picture | Clip], clock: Clock, options: SamplingOptions
    ) -> Generator[Token, None, None]:
        begin = time.monotonic_ns() - sum(clock.spent.values())
        self._refuse_media(bool(media))
        with clock("plan"):
            layout = self._plan(pieces, media, options.max_new_tokens)
            keys = self._keys(layout)
            describe(report, media, layout, self.tokenizer)
        self._compute_features(media, layout.visuals, clock)
        with clock("prefill"):
            done = extend_to(self.engine, self.cache, keys, self._embeds, logits=True)
            report.prompt_tokens, report.reused_tokens, logits = len(keys), done.reused, done.logits
        sampler, stream = Sampler(options), TextStream(self.tokenizer)
        report.finish_reason = "cancelled"
        try:
            while True:
                token = self._pick(sampler, logits)
                now = time.monotonic_ns()
                if report.first_token_ms is None:
                    report.first_token_ms = (now - begin) / 1e6
                    clock.spent["other"] = now - begin - sum(clock.spent.values())
                    report.phases_ms = {name: ns / 1e6 for name, ns in clock.spent.items()}
                    last = now
                else:
                    report.token_ms.append((now - last) / 1e6)
                    last = now
                report.token_ids.append(token)
                ended = token in self.config.eos_token_ids
                text = stream.push(token)
                full = len(report.token_ids) == options.max_new_tokens
                late = options.max_ms is not None and now - begin >= 1e6 * options.max_ms
                finished = ended or full or late
                if finished:
                    text += stream.flush()
                    report.finish_reason = "stop" if ended else "length" if full else "deadline"
                report.text += text
                yield Token(token, text)
                if finished:
                    return
                if self.report is not report:
                    raise BusyError(
                        "another question was asked meanwhile; read an answer to its end, or close it, first"
                    )
                logits = self.engine.forward(self.cache, self._embeds([token]), np.array([-1]), [token])[0]
        finally:
            if report.token_ms:
                report.tokens_per_s = 1e3 * len(report.token_ms) / sum(report.token_ms)
            report.peak_mb = peak_mb()

    def _pick(self, sampler: Sampler, logits: F32) -> int:
        try:
            return sampler.pick(logits)
        except PenguinError:
            # Whatever is not finite may lie in the cache, too: the next question is to find none of it.
            self.cache.forget()
            raise

    def _keys(self, layout: Layout) -> list[Key]:
        """What stands at each position of the prompt."""
        keys: list[Key] = []
        for piece in layout.pieces:
            if isinstance(piece, chat.VisualTokens):
                keys += [(layout.visuals[piece.index], i) for i in range(piece.count)]
            else:
                keys += self.tokenizer.encode_pieces([piece])
        return keys

    def _compute_features(self, media: list[Picture | Clip], visuals: list[Visual], clock: Clock) -> None:
        """Fill the feature cache with what these visuals lack; each picture or frame is computed once per size."""
        lacking: dict[str, set[Visual]] = {}
        for visual in visuals:
            if visual in self._features:
                self._features.move_to_end(visual)
            else:
                lacking.setdefault(visual.digest, set()).add(visual)
        batch: list[tuple[Visual, Patches]] = []

        def flush() -> None:
            if batch:
                self._encode([v for v, _ in batch], [p for _, p in batch], clock)
                batch.clear()

        for item in media:
            names = item.digests if isinstance(item, Clip) else [item.digest]
            source = (
                item.pixels([name for name in names if name in lacking]) if lacking.keys() & set(names) else iter(())
            )
            phase = "decode_video" if isinstance(item, Clip) else "decode_image"
            while True:
                with clock(phase):
                    row = next(source, None)
                if row is None:
                    break
                for visual in sorted(lacking.pop(row[0], ()), key=lambda v: v.tokens):
                    with clock("preprocess"):
                        patches = preprocess_image(
                            row[1], self.config.image, visual.merge_size, size=(visual.height, visual.width)
                        )
                    count = patches.rows.shape[0]
                    full = (len(batch) + 1) * count > PATCHES_PER_CALL or len(batch) >= self.engine.bounds.max_batch
                    if batch and (
                        full or batch[0][1].grid != patches.grid or batch[0][0].merge_size != visual.merge_size
                    ):
                        flush()
                    batch.append((visual, patches))
        flush()
        limit, needed = 4 * self.engine.bounds.max_seq_len, len(set(visuals))
        while len(self._features) > needed and self._feature_rows > limit:
            self._feature_rows -= len(self._features.popitem(last=False)[1])

    def _encode(self, visuals: list[Visual], patches: list[Patches], clock: Clock) -> None:
        merged = visuals[0].merge_size ** 2
        with clock("encode"):
            features = self.engine.encode(np.stack([p.pixels for p in patches]), patches[0].rows, patches[0].cols)
        with clock("project"):
            batch, count, channels = features.shape
            rows = self.engine.project(features.reshape(batch, count // merged, merged, channels))
        kept = [bool(sound(one).all() and sound(row).all()) for one, row in zip(features, rows, strict=True)]
        for visual, row, usable in zip(visuals, rows, kept, strict=True):
            if usable:
                self._features[visual] = row
                self._feature_rows += len(row)
        if not all(kept):
            raise UnusablePicture([visual for visual, usable in zip(visuals, kept, strict=True) if not usable])

    def _embeds(self, keys: Sequence[Key]) -> F32:
        out = np.empty((len(keys), self.config.text.hidden_size), np.float32)
        text = [i for i, key in enumerate(keys) if not isinstance(key, tuple)]
        if text:
            out[text] = self.engine.embed(np.array([keys[i] for i in text], np.int64))
        last: Visual | None = None
        rows = out[:0]
        for i, key in enumerate(keys):
            if isinstance(key, tuple):
                if key[0] is not last:
                    last, rows = key[0], self._features[key[0]]
                out[i] = rows[key[1]]
        return out
