"""Several callers over one engine: each gets the answers that it gets alone, or is refused; never another's."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Alone, CountingEngine, picture, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BusyError, InputError, PenguinError
from penguin_edge.guard import Guard
from penguin_edge.model.decoder import KVCache
from penguin_edge.model.eager import EagerEngine
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.runtime.core.answer import Token
from penguin_edge.runtime.core.options import SessionChanges, SessionOptions, StreamChanges, StreamOptions
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.base import Engine
from penguin_edge.runtime.engines.opening import open_engine
from penguin_edge.runtime.engines.self_check import open_tokenizer
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.live_options import LiveChanges, LiveOptions
from penguin_edge.runtime.session import Session
from penguin_edge.runtime.stream import Stream

SHORT = SamplingOptions(max_new_tokens=5)
QUESTIONS = ("What is it?", "Which colours are there, and where?")
Answer = Generator[Token, None, None]


def asked(of: Session, question: str, seed: int) -> Answer:
    """A question about a picture of a conversation's own."""
    image = {"type": "image", "image": picture(seed)}
    return of.converse([{"role": "user", "content": [image, {"type": "text", "text": question}]}], SHORT)


def ids(answer: Answer) -> list[int]:
    return [token.id for token in answer]


def meddle(stranger: Alone, how: str) -> None:
    """What a caller of the engine itself may do with a cache of its own, between two questions of somebody else."""
    if how == "truncate":
        stranger.truncate(stranger.length // 2)
    elif how == "again":
        stranger.truncate(0)
        stranger.forward(stranger.embed(np.arange(40, 60)), np.empty(0, np.int64))
    elif how == "append" and stranger.length + 2 <= stranger.bounds.max_seq_len:
        stranger.forward(stranger.embed(np.arange(2)), np.empty(0, np.int64))
    elif how == "move" and stranger.length > 3:
        stranger.move(2, stranger.length, 1)


MEDDLING = ("truncate", "again", "append", "move")


def tiny(max_seq_len: int = 512) -> tuple[Engine, Tokenizer]:
    return EagerEngine(tiny_model(), max_seq_len=max_seq_len), tiny_tokenizer()


@pytest.fixture(params=["eager", "onnx", pytest.param("onnx int8-prefill", marks=pytest.mark.slow)], scope="module")
def opened(
    request: pytest.FixtureRequest, nano_bundle: Callable[[str, str], Path]
) -> Callable[[], tuple[Engine, Tokenizer]]:
    """Opens one more engine of a kind that takes several sessions, with its tokenizer."""
    if request.param == "eager":
        return tiny
    target, _, quant = request.param.partition(" ")
    bundle = Bundle.read(nano_bundle(target, quant or "fp32"))
    words = Tokenizer.of(bundle)
    return lambda: (open_engine(bundle, threads=1), words)


def alone(opened: Callable[[], tuple[Engine, Tokenizer]], question: str, seed: int) -> list[int]:
    return ids(asked(Session(*opened()), question, seed))


def test_sessions_over_one_engine_answer_as_they_do_alone(opened: Callable[[], tuple[Engine, Tokenizer]]) -> None:
    """Questions in turn, an answer cut short, tokens in turn, and a caller that uses the engine itself."""
    right = {(q, seed): alone(opened, q, seed) for q in QUESTIONS for seed in range(3)}
    assert len({tuple(answer) for answer in right.values()}) > 1, "the answers were to differ"
    engine, words = opened()
    one, two, three = (Session(engine, words) for _ in range(3))
    stranger, (first, second) = Alone(engine), QUESTIONS
    for seed in range(2):
        assert ids(asked(one, first, seed)) == right[first, seed]
        assert ids(asked(two, second, seed + 1)) == right[second, seed + 1]
        next(asked(three, second, 0))
        assert ids(asked(one, first, seed)) == right[first, seed]
        for how in MEDDLING:
            meddle(stranger, how)
            assert ids(asked(two, second, seed)) == right[second, seed]
    going = {0: asked(one, first, 0), 1: asked(two, second, 1), 2: asked(three, first, 2)}
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for turn, how in zip(range(40), itertools.cycle((None, *MEDDLING)), strict=False):
        meddle(stranger, how or "")
        token = next(going[turn % 3], None)
        got[turn % 3] += [token.id] if token is not None else []
    assert got == {0: right[first, 0], 1: right[second, 1], 2: right[first, 2]}


def test_each_session_reuses_its_own_prefix_and_nobody_elses() -> None:
    engine = CountingEngine()
    one, two = (Session(engine, tiny_tokenizer()) for _ in range(2))
    ids(asked(one, QUESTIONS[0], 0))
    ids(asked(two, QUESTIONS[0], 0))
    assert two.report.reused_tokens == 0 and engine.encoded_frames == 2  # Features are the session's own.
    ids(asked(one, QUESTIONS[1], 0))
    assert one.report.reused_tokens > 0


# An engine with room for one cache.


def test_a_second_session_of_an_engine_with_one_cache_is_refused(nano_bundle: Callable[[str, str], Path]) -> None:
    bundle = Bundle.read(nano_bundle("executorch", "fp32"))
    engine, words = open_engine(bundle, threads=1), open_tokenizer(bundle)
    assert engine.capacity == 1
    one = Session(engine, words)
    right = ids(asked(one, QUESTIONS[0], 0))
    answer = asked(one, QUESTIONS[0], 0)
    first = next(answer).id
    for kind in (Session, Stream):
        with pytest.raises(BusyError, match="holds 1 KV cache at a time, and a session has it; close that session"):
            kind(engine, words)
    assert [first, *ids(answer)] == right
    one.close()
    with Session(engine, words) as two:
        assert ids(asked(two, QUESTIONS[0], 0)) == right
    # A session that is dropped is as good as one that was closed; it may lie in a cycle of references.
    three = Session(engine, words)
    assert ids(asked(three, QUESTIONS[0], 0)) == right
    del three
    assert ids(asked(Session(engine, words), QUESTIONS[1], 2)) != right


def test_what_was_closed_is_refused(opened: Callable[[], tuple[Engine, Tokenizer]]) -> None:
    engine, words = opened()
    run, other = Session(engine, words), Session(engine, words)
    ids(asked(run, QUESTIONS[0], 0))
    answer = asked(run, QUESTIONS[0], 0)
    next(answer)
    run.close()
    run.close()
    for call in (lambda: next(answer), lambda: next(asked(run, QUESTIONS[0], 0))):
        with pytest.raises(InputError, match="this session was closed"):
            call()
    assert ids(asked(other, QUESTIONS[0], 0)) == alone(opened, QUESTIONS[0], 0)
    engine.close()
    calls: list[Callable[[], Any]] = [
        lambda: next(asked(other, QUESTIONS[0], 0)),
        lambda: next(other.converse([{"role": "user", "content": "What?"}])),
        lambda: Session(engine, words),
        lambda: other.cache.truncate(0),
    ]
    for call in calls:
        with pytest.raises(InputError, match="this engine was closed"):
            call()


def test_a_cache_of_another_engine_is_refused(opened: Callable[[], tuple[Engine, Tokenizer]]) -> None:
    engine, other = opened()[0], opened()[0]
    embeds, last = engine.embed(np.arange(6)), np.array([-1])
    with engine.new_cache() as cache, other.new_cache() as theirs:
        for wrong, said in ((theirs, "belongs to another engine"), (None, "NoneType for a cache"), (3, "int for")):
            for call in (
                lambda wrong=wrong: engine.forward(wrong, embeds, last),
                lambda wrong=wrong: engine.move(wrong, 1, 2, 0),
            ):
                with pytest.raises(InputError, match=said):
                    call()
        with pytest.raises(InputError, match="2 keys for 6 positions"):
            engine.forward(cache, embeds, last, [1, 2])
        assert cache.length == theirs.length == 0
    with pytest.raises(InputError, match="this cache was closed"):
        engine.forward(cache, embeds, last)


STEP = st.tuples(st.integers(0, 2), st.sampled_from(("ask", "next", "next", "next", "close", *MEDDLING)))


@settings(deadline=None, max_examples=12)
@given(steps=st.lists(STEP, min_size=8, max_size=40), cache=st.sampled_from(["recompute", "rebase"]))
def test_any_interleaving_of_sessions_and_streams(steps: list[tuple[int, str]], cache: Any) -> None:
    """Two conversations and a stream, in any order; what is finished is what was right alone."""
    engine, words = tiny()
    sessions = [
        Session(engine, words),
        Stream(engine, words, budget=40, window_s=3.0, cache=cache, question_tokens=32, answer_tokens=8),
        Session(engine, words),
    ]
    stranger = Alone(engine)
    going: dict[int, tuple[Answer, list[int], tuple[Any, ...]]] = {}
    pushed = 0
    for who, what in steps:
        session = sessions[who]
        if what == "ask" and who not in going:
            if who == 1:
                session.push(picture(pushed), float(pushed))
                pushed += 1
                going[who] = session.ask(QUESTIONS[pushed % 2], options=SHORT), [], (pushed, QUESTIONS[pushed % 2])
            else:
                seed, question = len(steps) % 3, QUESTIONS[who // 2]
                going[who] = asked(session, question, seed), [], (seed, question)
        elif what == "next" and who in going:
            token = next(going[who][0], None)
            if token is not None:
                going[who][1].append(token.id)
                continue
            _, got, (seed, question) = going.pop(who)
            if who != 1:
                assert got == alone(tiny, question, seed)
            elif cache == "recompute":
                fresh = Stream(*tiny(), budget=40, window_s=3.0, question_tokens=32, answer_tokens=8)
                for i in range(seed):
                    fresh.push(picture(i), float(i))
                assert got == ids(fresh.ask(question, options=SHORT))
        elif what == "close" and who in going:
            going.pop(who)[0].close()
        else:
            meddle(stranger, what)


def test_a_stream_goes_on_after_another_has_used_its_engine() -> None:
    for cache in ("recompute", "rebase"):
        engine = CountingEngine(max_seq_len=1024)
        run = Stream(engine, tiny_tokenizer(), cache=cache)  # type: ignore[arg-type]
        fresh = Stream(EagerEngine(tiny_model(), max_seq_len=1024), tiny_tokenizer())
        other = Session(engine, tiny_tokenizer())
        for i in range(5):
            run.push(picture(i), float(i))
            fresh.push(picture(i), float(i))
            ids(asked(other, QUESTIONS[0], i))
        assert ids(run.ask("What?", options=SHORT)) == ids(fresh.ask("What?", options=SHORT))
        run.push(picture(9), 9.0)
        assert run.cache.keys == run.prompt_keys()


def test_live_and_a_session_over_one_engine() -> None:
    engine, words = tiny(1024)
    right = alone(tiny, QUESTIONS[0], 1)
    fresh = Stream(*tiny(1024))
    other = Session(engine, words)
    with Live(Stream(engine, words)) as live:
        for i in range(4):
            live.push(picture(i), float(i))
            fresh.push(picture(i), float(i))
            live.wait()
            assert ids(asked(other, QUESTIONS[0], 1)) == right
        got = [token.id for token in live.ask("What?", options=SHORT)]
        assert got == ids(fresh.ask("What?", options=SHORT))


# One thread at a time.


class Gated(CountingEngine):
    """Stands in `forward` until it is let go."""

    def __init__(self) -> None:
        super().__init__(max_seq_len=512)
        self.inside, self.gate = threading.Event(), threading.Event()

    def hold(self, call: Callable[[], Any]) -> threading.Thread:
        """A thread inside the engine, at a gate."""
        attend = KVCache.attend

        def gated(*arguments: Any) -> Any:
            self.inside.set()
            assert self.gate.wait(20)
            return attend(*arguments)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(KVCache, "attend", gated)
            thread = threading.Thread(target=call)
            thread.start()
            assert self.inside.wait(20)
        return thread


def test_a_second_thread_in_an_engine_is_refused_and_changes_nothing() -> None:
    gated = Gated()
    engine = gated.inner
    assert isinstance(engine, EagerEngine)
    embeds, last = engine.embed(np.arange(20)), np.array([-1])
    cache, other = engine.new_cache(), engine.new_cache()
    want = engine.forward(cache, embeds, last)
    cache.truncate(0)
    got: list[Any] = []
    thread = gated.hold(lambda: got.append(engine.forward(cache, embeds, last)))
    for call in (
        lambda: engine.forward(cache, embeds, last),
        lambda: engine.forward(other, embeds, last),
        lambda: engine.close(),
        lambda: cache.truncate(0),
        lambda: engine.move(cache, 1, 2, 0),
        lambda: engine.project(np.zeros((1, 1, 4, 64), np.float32)),
        lambda: engine.encode(np.zeros((1, 4, 588), np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64)),
    ):
        with pytest.raises(BusyError, match="at work for another thread; give each thread one of its own"):
            call()
    assert np.array_equal(engine.embed(np.arange(20)), embeds)  # Looking up embeddings is for everyone.
    gated.gate.set()
    thread.join()
    assert np.array_equal(got[0], want) and cache.length == 20


@pytest.mark.parametrize("kind", ["onnx", "executorch"])
def test_a_second_thread_in_a_bundles_engine_is_refused(nano_bundle: Callable[[str, str], Path], kind: str) -> None:
    """The guard is held while the native call runs; here a thread holds it and makes none."""
    engine = open_engine(Bundle.read(nano_bundle(kind, "fp32")), threads=1)
    embeds, last = engine.embed(np.arange(20)), np.array([-1])
    cache = engine.new_cache()
    want = engine.forward(cache, embeds, last)
    entered, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        guard: Guard = engine.guard  # type: ignore[attr-defined]
        with guard:
            entered.set()
            assert leave.wait(20)

    thread = threading.Thread(target=occupy)
    thread.start()
    assert entered.wait(20)
    places = np.zeros(4, np.int64)
    for call in (
        lambda: engine.forward(cache, embeds, last),
        lambda: cache.truncate(0),
        lambda: engine.move(cache, 1, 2, 0),
        lambda: engine.project(np.zeros((1, 1, 4, 128), np.float32)),
        lambda: engine.encode(np.zeros((1, 4, 588), np.float32), places, places),
    ):
        with pytest.raises(BusyError, match="this engine is at work for another thread"):
            call()
    assert np.array_equal(engine.embed(np.arange(20)), embeds) and cache.length == 20
    leave.set()
    thread.join()
    cache.truncate(0)
    assert np.array_equal(engine.forward(cache, embeds, last), want)


@pytest.mark.parametrize("kind", [Session, Stream])
def test_a_second_thread_in_a_session_is_refused(kind: type[Session] | type[Stream]) -> None:
    gated = Gated()
    run = kind(gated, tiny_tokenizer())
    run.push(picture(0), 0.0)
    fresh = kind(EagerEngine(tiny_model(), max_seq_len=512), tiny_tokenizer())
    fresh.push(picture(0), 0.0)
    got: list[int] = []
    answer = run.ask("What?", options=SHORT)
    thread = gated.hold(lambda: got.extend(ids(answer)))
    calls: list[Callable[[], Any]] = [
        lambda: run.push(picture(1), 1.0),
        lambda: next(run.ask("And?")),
        lambda: next(answer),
    ]
    if isinstance(run, Session):
        calls.append(lambda: next(run.converse([{"role": "user", "content": "Hello"}])))
    if isinstance(run, Stream):
        calls += [run.restart, run.warm_up, run.forget_features, lambda: run.set_budget(20)]
    for call in calls:
        with pytest.raises(BusyError, match=f"this {kind.__name__.lower()} is at work for another thread"):
            call()
    with pytest.raises(BusyError, match="next token is being computed"):
        answer.close()
    gated.gate.set()
    thread.join()
    assert got == ids(fresh.ask("What?", options=SHORT))
    # Between tokens any thread may take over.
    run.push(picture(1), 1.0)
    fresh.push(picture(1), 1.0)
    assert ids(run.ask("And?", options=SHORT)) == ids(fresh.ask("And?", options=SHORT))


def test_threads_that_try_at_once_get_right_answers_or_a_refusal(
    opened: Callable[[], tuple[Engine, Tokenizer]],
) -> None:
    """Unsynchronized threads, each with a session, over one engine: the guard is the only thing between them."""
    engine, words = opened()
    right = [alone(opened, QUESTIONS[seed % 2], seed) for seed in range(3)]
    wrong: list[Any] = []
    done = [0, 0, 0]

    def work(seed: int) -> None:
        session = Session(engine, words)
        for turn in range(4000):
            try:
                got = ids(asked(session, QUESTIONS[seed % 2], seed))
            except BusyError:
                time.sleep(0.0003 * ((turn + seed) % 5))  # not in step with the others
                continue
            except Exception as error:
                wrong.append(error)
                continue
            done[seed] += 1
            if got != right[seed]:
                wrong.append(got)
            if done[seed] == 30:
                return

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sum(done) > 0


# Wrong types, in one sentence.


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"budget": "600"}, 'budget is "600", wanted a whole number'),
        ({"budget": float("nan")}, "budget is NaN"),
        ({"budget": 6.5}, "budget is 6.5"),
        ({"budget": True}, "budget is true"),
        ({"max_frames": "3"}, 'max_frames is "3"'),
        ({"max_frames": 0}, "max_frames is 0, wanted a whole number, at least 1"),
        ({"tra": None}, "tra mode None"),
        ({"thinking": "no"}, 'thinking is "no", wanted true or false'),
        ({"policy": 3}, "policy: int, wanted a function"),
        ({"bugdet": 600}, "there is no option 'bugdet'; known: budget, tra, max_frames"),
        ({"options": {"budget": 600}}, "options: dict, wanted SessionOptions"),
    ],
)
def test_options_of_a_session(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        Session(*tiny(), **options)
    Session(*tiny(), budget=np.int64(600))  # type: ignore[arg-type]  # NumPy's numbers are numbers.


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"window_s": float("nan")}, "window_s is NaN, wanted a finite number and above 0"),
        ({"window_s": "60"}, 'window_s is "60"'),
        ({"question_tokens": 12.5}, "question_tokens is 12.5"),
        ({"answer_tokens": -1}, "answer_tokens is -1"),
        ({"budget": [600]}, "budget is \\[600\\]"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"policy": None}, "there is no option 'policy'; known: budget, tra, window_s"),
        ({"tra": "reference"}, "a stream has no tra mode 'reference'; known: adaptive, strict"),
        ({"options": SessionOptions()}, "options: SessionOptions, wanted StreamOptions"),
    ],
)
def test_options_of_a_stream(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        Stream(*tiny(), **options)
    run = Stream(*tiny(), budget=40, question_tokens=32, answer_tokens=8)
    run.push(picture(0), 0.0)
    with pytest.raises(InputError, match='budget is "20"'):
        run.set_budget("20")  # type: ignore[arg-type]
    assert run.budget == 40 and ids(run.ask("What?", options=SHORT))


def test_options_may_be_given_as_a_whole_and_changed_by_name() -> None:
    whole = SessionOptions(budget=60, max_frames=3)
    assert Session(*tiny(), whole).options == whole == Session(*tiny(), options=whole).options
    assert Session(*tiny(), whole, budget=50).options == SessionOptions(budget=50, max_frames=3)
    assert Stream(*tiny(), StreamOptions(window_s=3.0), budget=50).options == StreamOptions(budget=50, window_s=3.0)
    for options, changes in (
        (SessionOptions, SessionChanges),
        (StreamOptions, StreamChanges),
        (LiveOptions, LiveChanges),
    ):
        named = {field.name: field.type for field in dataclasses.fields(options)}
        assert named == {name: kind.__forward_arg__ for name, kind in changes.__annotations__.items()}


def test_a_bundles_engine_brings_its_tokenizer(nano_bundle: Callable[[str, str], Path]) -> None:
    folder = nano_bundle("onnx", "fp32")
    engine = open_engine(folder, threads=1)
    assert open_engine(str(folder), threads=1).name == engine.name
    wanted = ids(asked(Session.open(folder, threads=1), QUESTIONS[0], 1))
    assert ids(asked(Session(engine), QUESTIONS[0], 1)) == wanted
    with Stream(engine) as stream, Stream.open(folder, threads=1) as other:
        for run in (stream, other):
            run.push(picture(0), 0.0)
        assert ids(stream.ask("What?", options=SHORT)) == ids(other.ask("What?", options=SHORT))
    with pytest.raises(InputError, match="this stream was closed"):
        stream.push(picture(1), 1.0)
    with pytest.raises(InputError, match="pass the tokenizer"):
        Session(tiny()[0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": float("nan")}, "temperature is NaN"),
        ({"temperature": float("inf")}, "temperature is Infinity"),
        ({"temperature": "0.7"}, 'temperature is "0.7", wanted a finite number'),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": True}, "temperature is true"),
        ({"top_p": 0.0}, "top_p is 0.0, wanted a finite number and above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is NaN"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"seed": None}, "seed is null"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": "8"}, 'max_new_tokens is "8"'),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is NaN"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, wanted a whole number, at least 1"),
        ({"max_ms": float("nan")}, "max_ms is NaN"),
        ({"max_ms": "1"}, 'max_ms is "1"'),
    ],
)
def test_sampling_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        SamplingOptions(**options)


def test_prompts_that_are_no_text() -> None:
    run = Session(*tiny())
    for wrong in (None, b"What?", 3, ["What?"]):
        with pytest.raises(InputError, match=r"prompt is .*, wanted a string"):
            next(run.ask(wrong))  # type: ignore[arg-type]
    for messages in (None, 3, "What?", [{"role": "user"}], [{"role": "user", "content": None}]):
        with pytest.raises(PenguinError):
            next(run.converse(messages))  # type: ignore[arg-type]
        assert run.report.finish_reason == "error"
    assert ids(run.ask("What?", options=SHORT))


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_arrays_of_another_shape_or_dtype(nano_bundle: Callable[[str, str], Path], target: str) -> None:
    engine = open_engine(Bundle.read(nano_bundle(target, "fp32")), threads=1)
    embeds, last = engine.embed(np.arange(6)), np.array([-1])
    cache = engine.new_cache()
    want = engine.forward(cache, embeds, last)
    places = np.arange(4)
    wrong: list[Callable[[], Any]] = [
        lambda: engine.forward(cache, embeds[0], last),
        lambda: engine.forward(cache, embeds[:, :-1], last),
        lambda: engine.forward(cache, embeds.astype(np.int64), last),
        lambda: engine.forward(cache, embeds.tolist(), last),
        lambda: engine.forward(cache, embeds, np.array([-1.0])),
        lambda: engine.forward(cache, embeds, [-1]),  # type: ignore[arg-type]
        lambda: cache.truncate(2.0),  # type: ignore[arg-type]
        lambda: cache.truncate("2"),  # type: ignore[arg-type]
        lambda: cache.truncate(True),
        lambda: engine.embed(np.array([1.0])),
        lambda: engine.embed([1]),  # type: ignore[arg-type]
        lambda: engine.embed(np.array([[1]])),
        # One place for four patches would be spread over all of them.
        lambda: engine.encode(np.zeros((1, 4, 588), np.float32), places[:1], places),
        lambda: engine.encode(np.zeros((4, 588), np.float32), places, places),
        lambda: engine.encode(np.zeros((1, 4, 587), np.float32), places, places),
        lambda: engine.project(np.zeros((1, 4, 128), np.float32)),
    ]
    for call in wrong:
        with pytest.raises(InputError, match="wanted"):
            call()
    assert cache.length == 6
    cache.truncate(0)
    assert np.array_equal(engine.forward(cache, embeds, last), want)
