"""A stream and the thread that works on it: frames never wait, questions come first, one at a time.

    with Live(Stream.open("out/penguin-nano")) as live:
        threading.Thread(target=camera, args=(live.push,)).start()
        for token in live.ask("What changed?"):
            print(token.text, end="")

One worker owns the stream. `push` puts a frame into a short queue and returns; when the queue is full its oldest frame
is given up for the new one. A question goes before frames that wait, and before what is left of the frame in work: that
is done in slices (`Stream.slices`), and a question waits for one of them. It is about what was ready then. One that is
to be kept, or that comes before the first frame is ready, waits for the whole frame. While a question is answered
frames queue up, so the queue also says how old a frame can get. An error of the worker is raised by the next call,
once; the stream goes on. With a `LatencyTarget` a controller (`runtime/latency`) chooses how large frames are, how many
tokens the window has, and which frames are left out.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from penguin_edge.errors import BudgetError, BusyError, InputError, PenguinError
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.core.answer import Token
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.core.options import PROMPT, given_options
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.latency.control import LatencyControl
from penguin_edge.runtime.latency.steering import Steering
from penguin_edge.runtime.live.events import Dropped, Observer, Ready, Said, Telling
from penguin_edge.runtime.live.live_options import LiveChanges, LiveOptions
from penguin_edge.runtime.live.watch import Answer, Watch
from penguin_edge.runtime.stream import Stream
from penguin_edge.schema import Maybe, Real

SAMPLES = 4096
"""Latest ages and answers that are kept."""


@dataclass
class LiveStats:
    """What came in and what became of it. Ages are from `push` to the end of the frame's prefill."""

    frames_in: int = 0
    processed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Frames that were never looked at, by reason: `rate`, `queue`, `late` (a newer one could still be ready in time),
    `error`, `closed`."""
    age_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


@dataclass
class _Question:
    prompt: str
    keep: bool
    options: SamplingOptions | None
    asked: int = field(default_factory=lambda: _now())
    tokens: queue.SimpleQueue[Token | BaseException | None] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Live:
    """See the top of this file. `push`, `ask`, `watch` and `close` may be called from any thread."""

    def __init__(
        self,
        stream: Stream,
        options: LiveOptions | None = None,
        *,
        observer: Observer | None = None,
        **changes: Unpack[LiveChanges],
    ) -> None:
        """
        Args:
            options: see `LiveOptions`; single ones may be given by name instead, such as `queued=8`.
            observer: is told what happens; see `events.py`.
        Raises:
            InputError: an option of the wrong type or out of range, a name that there is none of, or a target without a
                cost model.
        """
        self.options = given_options(LiveOptions, options, changes)
        if not isinstance(stream, Stream):
            raise InputError(f"got {type(stream).__name__} for a stream, wanted Stream(engine) or Stream.open(bundle)")
        if observer is not None and not isinstance(observer, Observer):
            raise InputError(f"observer: {type(observer).__name__}, wanted an Observer, or None")
        self._tell = Telling(observer or Observer(), self._fail)
        self._steering: Steering | None = None
        target, cost = self.options.target, self.options.cost
        if target is not None and cost is not None:
            taken = self.options
            self._steering = Steering(stream, target, cost, self._tell.decided, taken.rate or taken.fps, taken.size)
        self._told = 0
        self._offered = 0
        self.stream = stream
        self.stats = LiveStats()
        self._frames: deque[tuple[Frame, int]] = deque()
        self._question: _Question | None = None
        self._watches: list[Watch] = []
        self._taken: float | None = None
        self._error: BaseException | None = None
        self._closed, self._busy = False, True
        self._changed = threading.Condition()
        self._standing = stream.status()
        self._worker = threading.Thread(target=self._work, name="penguin-edge stream", daemon=True)
        self._worker.start()

    @property
    def control(self) -> LatencyControl | None:
        """The controller of a target, from the first frame on."""
        return self._steering.control if self._steering is not None else None

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def push(self, frame: Frame | NDArray[np.uint8], time: float | None = None) -> bool:
        """Hand over a frame; it is copied. Never waits for the model.

        Returns:
            Whether it was queued; False for a frame beyond `fps`.
        Raises:
            InputError: after `close`, or a time that is no finite number.
            PenguinError: what went wrong with an earlier frame.
        """
        given = frame if isinstance(frame, Frame) else Frame(frame, time)
        check_options(time=(given.time, Maybe(Real())))
        copied = Frame(np.array(given.pixels), given.time, given.index)
        with self._changed:
            self._check()
            self.stats.frames_in += 1
            lost = self._queue(copied)
            self._changed.notify_all()
        self._drop(*lost)
        return not any(reason == "rate" for _, reason in lost)

    def _queue(self, frame: Frame) -> list[tuple[Frame, str]]:
        """Take a frame, or leave it out; what was given up, and why."""
        wanted = not self._too_soon(frame.time)
        if self._steering is not None and wanted:
            self._steering.offered(frame.time)
        self._offered += wanted
        if not wanted or (self._steering is not None and self._offered % self._steering.stride):
            return [(frame, "rate")]
        lost = [(self._frames.popleft()[0], "queue")] if len(self._frames) == self.options.queued else []
        self._frames.append((frame, _now()))
        return lost

    def _drop(self, *lost: tuple[Frame, str]) -> None:
        """Count frames that were given up unseen, and tell of them; not while `_changed` is held."""
        for frame, reason in lost:
            with self._changed:
                self.stats.dropped[reason] += 1
            self._tell.frame_dropped(Dropped(frame.time, reason))

    def ask(
        self, prompt: str, *, keep: bool = False, options: SamplingOptions | None = None, wait: bool = False
    ) -> Iterator[Token]:
        """Answer a question about what is ready now; errors of the answer are raised where its tokens are read.

        Args:
            wait: until another question is answered, which otherwise is an error.
        Raises:
            BusyError: another question is being answered.
            InputError: the stream was closed.
            PenguinError: what went wrong with an earlier frame.
        """
        check_options(prompt=(prompt, PROMPT))
        question = _Question(prompt, keep, options)
        with self._changed:
            self._changed.wait_for(lambda: not (wait and self._question) or self._closed)
            self._check()
            if self._question is not None:
                raise BusyError(
                    "another question is being answered; read its answer to the end, or close it, and ask again"
                )
            self._question = question
            self._changed.notify_all()
        return self._tokens(question)

    def watch(
        self,
        prompt: str,
        *,
        every: float | None = None,
        on_change: bool = False,
        options: SamplingOptions | None = None,
    ) -> Watch:
        """Ask again and again: every so many seconds of the stream, at key frames (`on_change`), or both.

        Raises:
            InputError: neither of them, a pause that is none, or a closed stream.
        """
        check_options(prompt=(prompt, PROMPT), every=(every, Maybe(Real(above=0))))
        if every is None and not on_change:
            raise InputError("a watch that never speaks; name a pause in seconds (every), or on_change, or both")
        watch = Watch(prompt, every, on_change, options)
        with self._changed:
            self._check()
            self._watches = [one for one in self._watches if not one.closed] + [watch]
        return watch

    def status(self) -> dict[str, Any]:
        """Where the stream stood after the last frame or answer, as JSON; from any thread."""
        ages = self.stats.age_ms
        return {
            "frames_in": self.stats.frames_in,
            "frames_processed": self.stats.processed,
            "frames_dropped": dict(self.stats.dropped),
            "age_ms": ages[-1] if ages else None,
            **self._standing,
        }

    def wait(self) -> None:
        """Until all frames that were queued are ready and no question is open.

        Raises:
            PenguinError: what went wrong with a frame.
        """
        with self._changed:
            self._changed.wait_for(lambda: not (self._frames or self._question or self._busy) or self._closed)
            self._raise()

    def close(self) -> None:
        """End the worker after what it is doing; frames that wait are given up, watches end. May be called twice."""
        with self._changed:
            self._closed = True
            lost = self._give_up()
            if self._question is not None:
                self._question.cancelled.set()
            self._changed.notify_all()
        self._drop(*lost)
        if threading.current_thread() is not self._worker:
            self._worker.join()
        for watch in self._watches:
            if not watch.closed:
                watch.close()

    def _give_up(self) -> list[tuple[Frame, str]]:
        lost = [(frame, "closed") for frame, _ in self._frames]
        self._frames.clear()
        return lost

    def _tokens(self, question: _Question) -> Iterator[Token]:
        try:
            while True:
                item = question.tokens.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            question.cancelled.set()

    def _check(self) -> None:
        self._raise()
        if self._closed:
            raise InputError("the stream was closed; open another one")

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _too_soon(self, time: float | None) -> bool:
        if self.options.fps is None or time is None:
            return False
        # A little less than a period: time stamps are rounded.
        if self._taken is not None and 0 <= time - self._taken < 0.98 / self.options.fps:
            return True
        self._taken = time
        return False

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # A fault of ours, or an exit from a callback: nobody may wait for ever.
            self._fail(error)
        finally:
            self._end()

    def _end(self) -> None:
        """Let everyone go who waits for the worker, which has ended."""
        with self._changed:
            self._closed = True
            question, self._question = self._question, None
            self._busy = False
            lost = self._give_up()
            self._changed.notify_all()
        self._drop(*lost)
        if question is not None:
            question.tokens.put(self._error or InputError("the stream was closed; open another one"))
        for watch in self._watches:
            if not watch.closed:
                watch.close()

    def _serve(self) -> None:
        try:
            if self._steering is not None:
                self._steering.begin()
        except Exception as error:  # the caller is told by the next call
            self._fail(error)
        while True:
            with self._changed:
                self._standing, self._busy = self.stream.status(), False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._question or self._frames)
                question = self._question
                if question is None and self._closed:
                    return
                self._busy = True
                lost = []
                if self._steering is not None:
                    while len(self._frames) > 1 and self._steering.late(self._frames[0][1]):
                        self._steering.missed()
                        lost.append((self._frames.popleft()[0], "late"))
                item = self._frames.popleft() if question is None else None
            self._drop(*lost)
            if question is not None:
                self._answer(question)
            elif item is not None:
                self._add(*item)

    def _add(self, frame: Frame, arrived: int) -> None:
        try:
            if self._steering is not None:
                self._steering.before(frame)
        except BudgetError as error:
            self._fail(error)
        except Exception as error:  # whatever it is, the caller is told by the next call
            self._drop((frame, "error"))
            self._fail(error)
            return
        begun, paused = _now(), 0
        try:
            for _ in self.stream.slices(frame):
                if (question := self._between()) is not None:
                    asked = _now()
                    self._answer(question)
                    paused += _now() - asked
        except Exception as error:  # whatever it is, the caller is told by the next call
            self._drop((frame, "error"))
            self._fail(error)
            return
        ended = _now()
        age = (ended - arrived) / 1e6
        self.stats.processed += 1
        self.stats.age_ms.append(age)
        window, budget, kv_tokens = self.stream.window, self.stream.budget, self.stream.cache.length
        ready = Ready(frame, window[-1].number, age, (ended - begun - paused) / 1e6, window, budget, kv_tokens)
        try:
            if self._steering is not None:
                self._steering.frame(arrived, begun, ended, paused)
        except Exception as error:
            self._fail(error)
        self._tell.frame_ready(ready)
        for watch in list(self._watches):
            if watch.due(window[-1].kind, frame.time or 0.0):
                self._report(watch, frame.time)

    def _between(self) -> _Question | None:
        """The question that goes between two slices of a frame, if one waits."""
        with self._changed:
            question = self._question
        if question is None or question.keep or not self.stream.times:
            return None
        return question

    def _report(self, watch: Watch, at: float | None) -> None:
        """What a watch says; nothing when the stream is closed meanwhile."""
        try:
            text = ""
            with contextlib.closing(self._speak(watch.prompt, False, watch.options, _now())) as answer:
                for token in answer:
                    text += token.text
                    if self._closed:
                        return
            watch.put(Answer(at, text, self.stream.report))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep an error for the next call, unless it is to be told of an earlier one."""
        with self._changed:
            if self._error is None:
                self._error = error if isinstance(error, PenguinError) else _wrapped(error)

    def _speak(
        self, prompt: str, keep: bool, options: SamplingOptions | None, asked: int
    ) -> Generator[Token, None, None]:
        """An answer of the stream; the observer and the controller are told of it."""
        begun, past = _now(), self.stream.cache.length
        answer = self.stream.ask(prompt, keep=keep, options=options)
        self._told += 1
        times = self.stream.times
        said, first, error = Said(self._told, prompt, times[-1] if times else None), None, ""
        self._tell.said(said)
        try:
            for token in answer:
                first = (_now() - asked) / 1e6 if first is None else first
                self._tell.said(replace(said, text=token.text))
                yield token
        except Exception as wrong:
            error = str(wrong) or type(wrong).__name__
            raise
        finally:
            answer.close()
            if self._steering is not None and not error:
                self._steering.answer(asked, begun, past, self.stream.report)
            self._tell.said(replace(said, done=True, error=error, first_token_ms=None if error else first))

    def _answer(self, question: _Question) -> None:
        end: BaseException | None = None
        try:
            with contextlib.closing(
                self._speak(question.prompt, question.keep, question.options, question.asked)
            ) as answer:
                for token in answer:
                    question.tokens.put(token)
                    if question.cancelled.is_set():
                        break
        except Exception as error:  # raised again where the tokens are read
            end = error if isinstance(error, PenguinError) else _wrapped(error)
        with self._changed:
            self._question = None
            self._changed.notify_all()
        question.tokens.put(end)


def _wrapped(error: BaseException) -> PenguinError:
    wrapped = PenguinError(f"the stream's worker failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _now() -> int:
    return time.monotonic_ns()
