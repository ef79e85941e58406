"""Sessions: answers equal eager generation, and nothing is computed twice."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLIP, Alone, CountingEngine, picture, tiny_model, tiny_tokenizer

from penguin_edge.errors import BudgetError, InputError
from penguin_edge.media.frames import read_video
from penguin_edge.media.preprocess import preprocess_image
from penguin_edge.model.eager import EagerEngine
from penguin_edge.model.generate import generate
from penguin_edge.prompt.chat import render
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session

SHORT = SamplingOptions(max_new_tokens=8)


def session(**options: Any) -> tuple[Session, CountingEngine]:
    engine = CountingEngine()
    return Session(engine, tiny_tokenizer(), **options), engine


def answer(of: Session, question: str, **options: Any) -> list[int]:
    return [token.id for token in of.ask(question, options=SHORT, **options)]


def test_an_image_answer_equals_eager_generation() -> None:
    run, _ = session()
    image = picture(1)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}
    ]
    got = [token.id for token in run.converse(messages, SHORT)]
    model, config = tiny_model(), tiny_model().config
    patches = preprocess_image(image, config.image, 1)
    ids = tiny_tokenizer().encode_pieces(render(messages, [patches.tokens]))
    with torch.no_grad():
        visual = model.visual([patches])
    wanted, _ = generate(model, torch.tensor([ids]), visual, max_new_tokens=8, stop=config.eos_token_ids)
    assert got == wanted
    assert run.report.visual_tokens == patches.tokens and run.report.prompt_tokens == len(ids)


def test_each_image_keeps_its_own_size_and_order() -> None:
    run, engine = session()
    content = [{"type": "image", "image": picture(1, 56, 140)}, {"type": "image", "image": picture(2, 140, 56)}]
    list(run.converse([{"role": "user", "content": [*content, {"type": "text", "text": "Compare."}]}], SHORT))
    assert run.report.images == 2 and engine.encoded_frames == 2
    sizes = {(visual.height, visual.width) for visual in run.features}
    assert sizes == {(56, 140), (140, 56)}


def test_a_flag_gives_all_images_the_first_ones_size_as_the_reference_does() -> None:
    run, _ = session(shared_image_size=True)
    content = [{"type": "image", "image": picture(1, 56, 140)}, {"type": "image", "image": picture(2, 140, 56)}]
    list(run.converse([{"role": "user", "content": [*content, {"type": "text", "text": "Compare."}]}], SHORT))
    assert {(visual.height, visual.width) for visual in run.features} == {(56, 140)}


def test_a_second_question_encodes_nothing_and_prefills_only_itself() -> None:
    run, engine = session()
    for i in range(6):
        run.push(picture(i // 3), time=float(i))
    answer(run, "What changed?")
    assert engine.encoded_frames == 6 or engine.encoded_frames == 2  # equal pictures are computed once per size
    prompt = run.report.prompt_tokens
    engine.reset()
    answer(run, "And what came first?")
    assert engine.encoded_frames == engine.projected_frames == 0
    assert (
        engine.forwarded_tokens == (run.report.prompt_tokens - run.report.reused_tokens) + len(run.report.token_ids) - 1
    )
    question = tiny_tokenizer().encode("\nAnd what came first?")
    template = tiny_tokenizer().encode("\nassistant\n<think>\n\n</think>\n\n")
    assert run.report.prompt_tokens - run.report.reused_tokens <= len(question) + len(template) + 3
    assert run.report.reused_tokens > 0.5 * prompt


def test_reuse_does_not_change_answers() -> None:
    warm, _ = session()
    for i in range(5):
        warm.push(picture(i % 2), time=float(i))
        answer(warm, f"What is in frame {i}?")
    cold, _ = session()
    for i in range(5):
        cold.push(picture(i % 2), time=float(i))
    assert answer(warm, "What now?") == answer(cold, "What now?")


def test_kept_turns_stay_and_others_are_forgotten() -> None:
    run, engine = session()
    run.push(picture(3), time=0.0)
    answer(run, "Forgotten?")
    first = answer(run, "What is this?", keep=True)
    length = run.report.prompt_tokens
    engine.reset()
    second = answer(run, "And then?", keep=True)
    assert run.report.prompt_tokens > length + len(first)
    assert run.report.reused_tokens >= length and engine.encoded_frames == 0
    fresh, _ = session()
    fresh.push(picture(3), time=0.0)
    assert answer(fresh, "What is this?", keep=True) == first
    assert answer(fresh, "And then?", keep=True) == second


@pytest.mark.parametrize(("held", "times"), [(64 << 20, 1), (1 << 20, 2)])
def test_a_clip_is_decoded_once_and_a_large_one_again_for_its_pixels(
    monkeypatch: pytest.MonkeyPatch, held: int, times: int
) -> None:
    import penguin_edge.runtime.core.media as media

    opened = []
    monkeypatch.setattr(media, "read_video", lambda *a, **k: opened.append(a) or read_video(*a, **k))
    monkeypatch.setattr(media, "HELD_BYTES", held)
    run, engine = session(budget=300)
    video = {"type": "video", "video": {"video_path": str(CLIP), "fps": 1, "max_frames": 6}}
    ask = lambda text: [{"role": "user", "content": [video, {"type": "text", "text": text}]}]  # noqa: E731
    list(run.converse(ask("What?"), SHORT))
    assert run.report.frames == 6 and run.report.visual_tokens <= 300 and len(opened) == times
    assert run.report.keys + run.report.intermediates + run.report.dropped == 6
    engine.reset()
    list(run.converse(ask("Where?"), SHORT))
    assert len(opened) == times and engine.encoded_frames == 0


def test_held_frames_stay_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import penguin_edge.runtime.core.media as media

    frame = 608 * 342 * 3
    monkeypatch.setattr(media, "HELD_BYTES", 5 * frame)
    library, clock = media.Library(tiny_model().config.image, "strict"), media.Clock()
    clips = []
    for count, wanted in [(2, [2]), (3, [2, 3]), (1, [0, 3, 1]), (6, [0, 3, 1, 0]), (5, [0, 0, 0, 0, 5])]:
        clips.append(library.clip(CLIP, {"fps": 1, "max_frames": count}, clock))
        assert [len(clip.held or []) for clip in clips] == wanted


@pytest.mark.parametrize("budget", [1, 7, 40, 333])
def test_the_budget_is_never_exceeded(budget: int) -> None:
    run, _ = session(budget=budget)
    for i in range(9):
        run.push(picture(i // 4, 140, 196), time=float(i))
    answer(run, "What?")
    assert 1 <= run.report.visual_tokens <= budget == run.report.budget


def test_without_a_budget_the_context_is_the_limit() -> None:
    engine = CountingEngine(max_seq_len=256)
    run = Session(engine, tiny_tokenizer())
    for i in range(40):
        run.push(picture(i // 10, 280, 280), time=float(i))
    answer(run, "What?")
    assert run.report.prompt_tokens + 8 <= 256
    assert run.report.dropped > 0 and run.report.notes
    assert run.report.prompt_tokens > 0.7 * 256


def test_two_clips_and_an_image_share_one_prompt() -> None:
    run, _ = session(budget=400)
    clip = {"type": "video", "video": {"video_path": str(CLIP), "max_frames": 3}}
    later = {"type": "video", "video": {"video_path": str(CLIP), "max_frames": 3, "start_time": 10.0}}
    content = [clip, {"type": "image", "image": picture(5)}, later, {"type": "text", "text": "Compare."}]
    list(run.converse([{"role": "user", "content": content}], SHORT))
    assert run.report.frames == 6 and run.report.images == 1 and run.report.visual_tokens <= 400


def test_history_given_as_messages() -> None:
    run, engine = session()
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    got = [token.id for token in run.converse(history, SHORT)]
    ids = tiny_tokenizer().encode_pieces(render(history))
    wanted, _ = generate(
        tiny_model(), torch.tensor([ids]), None, max_new_tokens=8, stop=tiny_model().config.eos_token_ids
    )
    assert got == wanted and engine.encoded_frames == 0


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    run = Session(CountingEngine(max_seq_len=64), tiny_tokenizer())
    with pytest.raises(BudgetError, match="max_seq_len is 64"):
        answer(run, "word " * 100)
    assert answer(run, "ok")


def test_stopping_early_leaves_a_usable_session() -> None:
    run, _ = session()
    run.push(picture(1))
    stream = run.ask("What?", options=SHORT)
    list(itertools.islice(stream, 3))
    stream.close()
    assert run.report.finish_reason == "cancelled"
    fresh, _ = session()
    fresh.push(picture(1))
    assert answer(run, "What?") == answer(fresh, "What?")


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)]
)
def test_bad_frames_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="wanted uint8"):
        session()[0].push(bad)


def test_a_frame_of_another_size_is_refused() -> None:
    run, _ = session()
    run.push(picture(1))
    with pytest.raises(InputError, match="one size"):
        run.push(picture(1, 42, 42))


def test_old_frames_give_way() -> None:
    run, _ = session(max_frames=4)
    for i in range(7):
        run.push(picture(i), time=float(i))
    answer(run, "What?")
    assert run.report.frames == 4


def test_eager_engine_truncates_to_any_prefix() -> None:
    engine = Alone(EagerEngine(tiny_model(), max_seq_len=64))
    embeds = engine.embed(np.arange(40))
    last = np.array([-1])
    whole = engine.forward(embeds, last)
    for prefix in (0, 1, 17, 39):
        engine.truncate(prefix)
        np.testing.assert_allclose(engine.forward(embeds[prefix:], last), whole, atol=2e-5)


def test_a_camera_may_reuse_its_buffer() -> None:
    run, _ = session()
    buffer = picture(1)
    for seed in (1, 2):
        buffer[:] = picture(seed)
        run.push(buffer)
    fresh, _ = session()
    for seed in (1, 2):
        fresh.push(picture(seed))
    assert answer(run, "What?") == answer(fresh, "What?")


def test_an_answer_cannot_go_on_after_the_next_question() -> None:
    run, _ = session()
    first = run.ask("What?", options=SHORT)
    next(first)
    second = answer(run, "And?")
    with pytest.raises(InputError, match="another question"):
        list(first)
    assert answer(session()[0], "And?") == second


def test_frames_pushed_during_an_answer_follow_it() -> None:
    run, _ = session()
    run.push(picture(1), time=0.0)
    for i, _token in enumerate(run.ask("What?", keep=True, options=SHORT)):
        run.push(picture(2 + i), time=1.0 + i)
    assert [turn.frames for turn in run.turns] == [1]


@pytest.mark.parametrize("budget", [3, 4, 17, 90, 397])
def test_pictures_and_clips_share_the_budget(budget: int) -> None:
    run, _ = session(budget=budget)
    clip = {"type": "video", "video": {"video_path": str(CLIP), "max_frames": 2}}
    short = {"type": "video", "video": {"video_path": str(CLIP), "max_frames": 1}}
    image = {"type": "image", "image": picture(5, 280, 280)}
    list(run.converse([{"role": "user", "content": [short, image, clip, {"type": "text", "text": "?"}]}], SHORT))
    assert run.report.visual_tokens <= budget


def test_a_budget_below_one_token_each_is_refused() -> None:
    run, _ = session(budget=2)
    content = [{"type": "image", "image": picture(i)} for i in range(3)]
    with pytest.raises(BudgetError, match="3 images"):
        list(run.converse([{"role": "user", "content": content}], SHORT))


def test_a_deadline_ends_an_answer_at_a_token() -> None:
    run, _ = session()
    run.push(picture(1), 0.0)
    late = SamplingOptions(max_new_tokens=50, max_ms=1e-6)
    assert len(list(run.ask("What is it?", options=late))) == 1 and run.report.finish_reason == "deadline"
    soon = SamplingOptions(max_new_tokens=3, max_ms=1e9)
    assert len(list(run.ask("What is it?", options=soon))) == 3 and run.report.finish_reason == "length"
    with pytest.raises(InputError, match="max_ms"):
        SamplingOptions(max_ms=0.0)


def test_conversations_that_ask_nothing_or_of_an_unknown_role_are_refused() -> None:
    run, _ = session()
    with pytest.raises(InputError, match="an empty list"):
        next(run.converse([]))
    for role in ("robot", "User", ""):
        with pytest.raises(InputError, match=r"has role .*; wanted one of system, user, assistant"):
            next(run.converse([{"role": role, "content": "hi"}]))
    assert list(run.converse([{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}], SHORT))


def test_what_is_no_engine_tokenizer_or_option_is_refused() -> None:
    engine = CountingEngine()
    for call in (
        lambda: Session("out/nano"),  # type: ignore[arg-type]
        lambda: Session(engine, "tokenizer.json"),  # type: ignore[arg-type]
        lambda: session()[0].ask("hi", options=3),  # type: ignore[arg-type]
        lambda: session()[0].converse([], options={}),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match="wanted"):
            call()


def test_a_closed_session_takes_no_frame() -> None:
    run, _ = session()
    run.push(picture(0), time=0.0)
    run.close()
    with pytest.raises(InputError, match="this session was closed"):
        run.push(picture(1), time=1.0)


def test_times_that_are_missing_or_go_back_are_told() -> None:
    run, _ = session()
    run.push(picture(0), time=1.0)
    with pytest.raises(InputError, match="a frame without a time among frames with one"):
        run.push(picture(1))
    run.push(picture(1), time=0.5)
    answer(run, "What?")
    assert run.report.notes == ["the frames' times go back: the prompt has them as they came"]
    run, _ = session()
    run.push(picture(0))
    with pytest.raises(InputError, match="a frame without a time among frames with one"):
        run.push(picture(1), time=1.0)
    answer(run, "What?")
    assert run.report.notes == ["the frames have no times: the prompt says nothing of when they were"]
