"""A stream and the thread that works on it: frames never wait, questions come first, one at a time.

    with Live(StreamSession.open("out/penguin-nano")) as live:
        threading.Thread(target=camera, args=(live.push,)).start()
        for token in live.ask("What changed?"):
            print(token.text, end="")

One worker owns the session. `push` puts a frame into a short queue and returns; when the queue is full its oldest frame
is given up for the new one. A question is taken once the frame in work is done, and what watches say of it, before
frames that wait: it is about what was ready then. While it is answered frames queue up, so the queue also says how old
a frame can get. An error of the worker is raised by the next call, once; the stream goes on. With a `LatencyTarget` a
controller (`control.py`) chooses how large frames are, how many tokens the window has, and which frames are left out.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penguin_edge.errors import BudgetError, BusyError, InputError, PenguinError
from penguin_edge.frames import Frame
from penguin_edge.runtime.answer import Token
from penguin_edge.runtime.control import Decision, LatencyControl, LatencyTarget
from penguin_edge.runtime.cost import CostModel
from penguin_edge.runtime.events import Kept, Ready, Said
from penguin_edge.runtime.options import check_options
from penguin_edge.runtime.report import Report
from penguin_edge.runtime.sampling import SamplingOptions
from penguin_edge.runtime.steering import Steering
from penguin_edge.runtime.stream import StreamSession
from penguin_edge.schema import LARGEST, Maybe, Real, Text, Whole
from penguin_edge.tra import KEY

QUEUE = 4
"""Frames that wait at most."""
SAMPLES = 4096
"""Latest ages and answers that are kept."""


@dataclass(frozen=True)
class Answer:
    """What a watch said: about the stream up to `time` seconds."""

    time: float | None
    text: str
    report: Report


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


class Watch:
    """Answers to a question that is asked again and again; iterate over it, or `close` it."""

    def __init__(self, prompt: str, every: float | None, on_change: bool, options: SamplingOptions | None) -> None:
        self.prompt, self.every, self.on_change, self.options = prompt, every, on_change, options
        self._answers: queue.Queue[Answer | None] = queue.Queue(maxsize=16)
        self._last: float | None = None
        self.closed = False
        self.missed = 0
        """Answers given up because nobody read them."""

    def __iter__(self) -> Iterator[Answer]:
        while True:
            answer = self._answers.get()
            if answer is None:
                return
            yield answer

    def close(self) -> None:
        """No more answers; an iteration ends after those that are there."""
        self.closed = True
        self._put(None)

    def due(self, kind: str, now: float) -> bool:
        """Whether a frame of this kind at `now` seconds of the stream is one to speak about."""
        if self.closed or (self.on_change and kind != KEY):
            return False
        if self.every is not None and self._last is not None and 0 <= now - self._last < self.every:
            return False
        self._last = now
        return True

    def _put(self, answer: Answer | None) -> None:
        while True:
            try:
                self._answers.put_nowait(answer)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):  # read meanwhile: then there is room
                    self._answers.get_nowait()
                    self.missed += 1


class Live:
    """See the top of this file. `push`, `ask`, `watch` and `close` may be called from any thread."""

    def __init__(
        self,
        session: StreamSession,
        *,
        queued: int = QUEUE,
        fps: float | None = None,
        target: LatencyTarget | None = None,
        cost: CostModel | None = None,
        rate: float | None = None,
        trace: Callable[[Decision], None] = lambda decision: None,
        ready: Callable[[Ready], None] | None = None,
        said: Callable[[Said], None] | None = None,
    ) -> None:
        """
        Args:
            queued: frames that wait at most.
            fps: frames taken per second of their own time; None takes all.
            target: what the controller keeps to, beginning with the first frame, before which the engine is warmed up
                (`wait` waits for it); a target that cannot be kept is an error of that frame, and given up.
            cost: what stages take on this machine (`penguin-edge profile`); a target needs it.
            rate: frames per second that the controller expects before they come; None: `fps`.
            trace: is told every decision, on the worker.
            ready: is told every frame that was worked on, on the worker: it must be quick and raise nothing.
            said: is told every answer as it comes, token by token, likewise.
        Raises:
            InputError: a queue without room, no rate, or a target without a cost model.
        """
        check_options(queued=(queued, Whole(1)), fps=(fps, Maybe(Real(above=0))), rate=(rate, Maybe(Real(above=0))))
        if target is not None and cost is None:
            raise InputError("a latency target needs to know this machine; run `penguin-edge profile BUNDLE` first")
        self._steering: Steering | None = None
        if target is not None and cost is not None:
            self._steering = Steering(session, target, cost, trace, rate or fps)
        self._ready, self._said, self._told = ready, said, 0
        self._offered = 0
        self.session = session
        self.stats = LiveStats()
        self._limit, self._fps = queued, fps
        self._frames: deque[tuple[Frame, int]] = deque()
        self._question: _Question | None = None
        self._watches: list[Watch] = []
        self._taken: float | None = None
        self._error: BaseException | None = None
        self._closed, self._busy = False, True
        self._changed = threading.Condition()
        self._standing = self._stand()
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
            wanted = not self._too_soon(copied.time)
            if self._steering is not None and wanted:
                self._steering.offered(copied.time)
            self._offered += wanted
            if not wanted or (self._steering is not None and self._offered % self._steering.stride):
                self.stats.dropped["rate"] += 1
                return False
            if len(self._frames) == self._limit:
                self._frames.popleft()
                self.stats.dropped["queue"] += 1
            self._frames.append((copied, _now()))
            self._changed.notify_all()
        return True

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
        check_options(prompt=(prompt, Text(longest=LARGEST)))
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
        check_options(prompt=(prompt, Text(longest=LARGEST)), every=(every, Maybe(Real(above=0))))
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
            self._give_up()
            if self._question is not None:
                self._question.cancelled.set()
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()
        for watch in self._watches:
            if not watch.closed:
                watch.close()

    def _give_up(self) -> None:
        while self._frames:
            self._frames.popleft()
            self.stats.dropped["closed"] += 1

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
        if self._fps is None or time is None:
            return False
        # A little less than a period: time stamps are rounded.
        if self._taken is not None and 0 <= time - self._taken < 0.98 / self._fps:
            return True
        self._taken = time
        return False

    def _stand(self) -> dict[str, Any]:
        """State of the session, which only the worker may look at."""
        session = self.session
        return {
            "frames_kept": len(session.times),
            "visual_tokens": session.visual_tokens,
            "budget": session.planner.limits.budget,
            "level": session.planner.level,
            "kv_tokens": session.cache.length,
            "capacity": session.engine.bounds.max_seq_len,
        }

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
            self._give_up()
            self._changed.notify_all()
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
                self._standing, self._busy = self._stand(), False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._question or self._frames)
                question = self._question
                if question is None and self._closed:
                    return
                self._busy = True
                if self._steering is not None:
                    while len(self._frames) > 1 and self._steering.late(self._frames[0][1]):
                        self._frames.popleft()
                        self.stats.dropped["late"] += 1
                item = self._frames.popleft() if question is None else None
            if question is not None:
                self._answer(question)
            elif item is not None:
                self._add(*item)

    def _add(self, frame: Frame, arrived: int) -> None:
        begun = _now()
        try:
            try:
                if self._steering is not None:
                    self._steering.before(frame)
            except BudgetError as error:
                self._fail(error)
            self.session.push(frame)
        except Exception as error:  # whatever it is, the caller is told by the next call
            self.stats.dropped["error"] += 1
            self._fail(error)
            return
        ended = _now()
        self.stats.processed += 1
        self.stats.age_ms.append((ended - arrived) / 1e6)
        try:
            if self._steering is not None:
                self._steering.frame(arrived, begun, ended)
            if self._ready is not None:
                number = self.session.stats.frames - 1
                self._ready(Ready(frame, number, self.stats.age_ms[-1], (ended - begun) / 1e6, self._window()))
        except Exception as error:
            self._fail(error)
        kind = self.session._stream.kinds[-1]
        for watch in list(self._watches):
            if watch.due(kind, frame.time or 0.0):
                self._report(watch, frame.time)

    def _report(self, watch: Watch, at: float | None) -> None:
        """What a watch says; nothing when the stream is closed meanwhile."""
        try:
            text = ""
            with contextlib.closing(self._speak(watch.prompt, False, watch.options, _now())) as answer:
                for token in answer:
                    text += token.text
                    if self._closed:
                        return
            watch._put(Answer(at, text, self.session.report))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep an error for the next call, unless it is to be told of an earlier one."""
        with self._changed:
            if self._error is None:
                self._error = error if isinstance(error, PenguinError) else _wrapped(error)

    def _window(self) -> tuple[Kept, ...]:
        session = self.session
        kept = zip(session.planner.numbers, session.times, session.planner.plan().frames, strict=True)
        return tuple(Kept(number, at, plan.kind, plan.tokens) for number, at, plan in kept)

    def _speak(
        self, prompt: str, keep: bool, options: SamplingOptions | None, asked: int
    ) -> Generator[Token, None, None]:
        """An answer of the session; `said` and the controller are told of it."""
        begun, past = _now(), self.session.cache.length
        answer = self.session.ask(prompt, keep=keep, options=options)
        self._told += 1
        times = self.session.times
        said, first, error = Said(self._told, prompt, times[-1] if times else None), None, ""
        tell = self._said or (lambda piece: None)
        tell(said)
        try:
            for token in answer:
                first = (_now() - asked) / 1e6 if first is None else first
                tell(replace(said, text=token.text))
                yield token
        except Exception as wrong:
            error = str(wrong) or type(wrong).__name__
            raise
        finally:
            answer.close()
            if self._steering is not None and not error:
                self._steering.answer(begun, past, self.session.report)
            tell(replace(said, done=True, error=error, first_token_ms=None if error else first))

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
