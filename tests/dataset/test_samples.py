"""Training samples: what the model is asked in training is what the runtime feeds it, and only answers are targets."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers import picture, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from penguin_edge.bundle.contract import Bounds
from penguin_edge.config import PRESETS, ImageConfig, PenguinConfig
from penguin_edge.dataset import samples
from penguin_edge.dataset.records import ANNOTATIONS, DataRecord, read_records
from penguin_edge.dataset.samples import (
    NO_TARGET,
    DataOptions,
    Sample,
    SampleBuilder,
    SampleTooLong,
    encode_conversation,
)
from penguin_edge.errors import BudgetError, InputError
from penguin_edge.prompt.chat import END, IMAGE, START, Message, render
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.engines.cache import Cache, Caches, Key
from penguin_edge.runtime.session import Session

TOKENIZER = tiny_tokenizer()
CONFIG = replace(PRESETS["tiny"], image_token_id=603, image=ImageConfig(min_tokens=2, max_frames=6))
END_ID = TOKENIZER.special(END)


class EchoEngine:
    """Computes nothing: each row of an embedding says which token, or which encoded frame, it stands for."""

    name = "echo"

    def __init__(self, config: PenguinConfig) -> None:
        self.config = config
        self.bounds = Bounds(max_seq_len=8192, max_chunk=512, max_batch=16, patch_buckets=(65_536,))
        self.frames: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self.rows = np.zeros((0, 2), int)
        self.capacity, self.can_move, self.can_place, self.moves_exactly = None, False, False, False

    def new_cache(self) -> Cache:
        return Caches(None, object).new()

    def _wide(self, values: Any, is_frame: bool) -> NDArray[np.float32]:
        out = np.zeros((*np.shape(values), self.config.text.hidden_size), np.float32)
        out[..., 0], out[..., 1] = values, is_frame
        return out

    def encode(self, pixels: NDArray[Any], rows: NDArray[Any], cols: NDArray[Any]) -> NDArray[np.float32]:
        first = len(self.frames)
        self.frames += [(frame, rows, cols) for frame in pixels]
        numbers = np.arange(first, len(self.frames))[:, None]
        return self._wide(np.broadcast_to(numbers, pixels.shape[:2]), True)

    def project(self, features: NDArray[Any]) -> NDArray[np.float32]:
        return self._wide(features[:, :, 0, 0], True)

    def embed(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        return self._wide(ids, False)

    def forward(
        self,
        cache: Cache,
        embeds: NDArray[Any],
        logit_index: NDArray[Any],
        keys: Sequence[Key] = (),
        positions: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        self.rows = np.concatenate([self.rows[: cache.length], embeds[:, :2].astype(int)])
        with cache.writing(len(embeds), keys, positions):
            return np.zeros((len(logit_index), self.config.text.vocab_size), np.float32)


def write_clip(path: Path, frames: int = 8, size: tuple[int, int] = (84, 112), moving: bool = True) -> None:
    """One frame per second; two scenes, with a square that moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            pixels = picture(i * 2 // frames, *size).copy()
            at = 8 * i if moving else 0
            pixels[20:34, at : at + 14] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for i, size in enumerate([(84, 84), (56, 140), (140, 56)]):
        Image.fromarray(picture(i, *size)).save(root / f"{i}.png")
    write_clip(root / "clip.mp4")
    records = [
        {"id": "text", "conversations": say("Why?", "So.")},
        {"id": "image", "image": ["0.png"], "conversations": say("<image>\nWhat is it?", "A square.")},
        {"id": "images", "image": ["1.png", "2.png"], "conversations": say("Is <image> like <image>?", "No.")},
        {"id": "clip", "video": ["clip.mp4"], "conversations": say("What moves?", "A red square.")},
        {
            "id": "turns",
            "image": ["0.png"],
            "conversations": say("What?", "This.", "Why?", "<think>\nhm\n</think>\n\nSo."),
        },
    ]
    (root / ANNOTATIONS).write_text("\n".join(map(json.dumps, records)))
    return root


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, DataRecord]:
    return {record.id: record for record in read_records(folder)}


def say(*values: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def builder(**options: Any) -> SampleBuilder:
    return SampleBuilder(CONFIG, TOKENIZER, DataOptions(**options))


def check_sample(sample: Sample, answers: int) -> None:
    """What holds for every sample."""
    ids, labels = sample.input_ids, sample.labels
    assert ids.dtype == labels.dtype == np.int64 and ids.shape == labels.shape
    targets = labels != NO_TARGET
    np.testing.assert_array_equal(labels[targets], ids[targets])
    assert (labels == END_ID).sum() == answers, "every answer teaches its end"
    assert not (targets & (ids == TOKENIZER.image_token_id)).any()
    assert (ids == TOKENIZER.image_token_id).sum() == sum(patches.tokens for patches in sample.visuals)


# --- the same as at inference -----------------------------------------------------------------------------------------


def fed(session: Session, engine: EchoEngine, messages: list[Message]) -> tuple[list[int], Iterator[int]]:
    """The prompt's ids as the engine saw them, and the number of the frame behind each image token."""
    list(session.converse(messages, SamplingOptions(max_new_tokens=1)))
    ids = [CONFIG.image_token_id if is_frame else token for token, is_frame in engine.rows]
    return ids, (token for token, is_frame in engine.rows if is_frame)


@pytest.mark.parametrize("name", ["text", "image", "images", "clip"])
@pytest.mark.parametrize("budget", [2, 9, 40, 100, 10_240])
@pytest.mark.parametrize("rules", ["ours", "reference"])
def test_prompt_and_pixels_are_those_that_a_session_feeds(
    records: dict[str, DataRecord], name: str, budget: int, rules: str
) -> None:
    theirs = rules == "reference"
    options: dict[str, Any] = {"tra": "reference" if theirs else "strict", "shared_image_size": theirs}
    sample = builder(mm_max_length=budget, **options)(records[name])
    check_sample(sample, answers=1)
    engine = EchoEngine(CONFIG)
    ids, frames = fed(Session(engine, TOKENIZER, budget=budget, **options), engine, list(records[name].messages[:-1]))
    first = int(np.flatnonzero(sample.labels != NO_TARGET)[0])
    assert sample.input_ids[:first].tolist() == ids
    for patches in sample.visuals:
        (number,) = {next(frames) for _ in range(patches.tokens)}
        for mine, seen in zip((patches.pixels, patches.rows, patches.cols), engine.frames[number], strict=True):
            np.testing.assert_array_equal(mine, seen)
    assert next(frames, None) is None


@settings(deadline=None, max_examples=25)
@given(budget=st.integers(2, 400), name=st.sampled_from(["image", "images", "clip"]))
def test_the_visual_budget_is_kept(records: dict[str, DataRecord], budget: int, name: str) -> None:
    sample = builder(mm_max_length=budget)(records[name])
    check_sample(sample, answers=1)
    assert 1 <= sum(patches.tokens for patches in sample.visuals) <= budget


def test_a_large_clip_is_read_again_with_the_same_result(
    records: dict[str, DataRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = builder(mm_max_length=60)(records["clip"])
    opened = []
    monkeypatch.setattr(samples, "KEPT_BYTES", 3 * 84 * 112 * 3)
    read = samples.read_video
    monkeypatch.setattr(samples, "read_video", lambda *a, **k: opened.append(a) or read(*a, **k))
    again = builder(mm_max_length=60)(records["clip"])
    assert len(opened) == 2 and again.input_ids.tolist() == kept.input_ids.tolist()
    for mine, other in zip(again.visuals, kept.visuals, strict=True):
        np.testing.assert_array_equal(mine.pixels, other.pixels)
    short = iter([None, 2])
    monkeypatch.setattr(samples, "read_video", lambda *a, **k: list(read(*a, **k))[: next(short)])
    with pytest.raises(InputError, match="changed while it was being read"):
        builder(mm_max_length=60)(records["clip"])


def test_a_share_of_the_clips_is_built_under_smaller_budgets(records: dict[str, DataRecord]) -> None:
    native = sum(patches.tokens for patches in builder()(records["clip"]).visuals)
    clips = [replace(records["clip"], id=f"clip {number}") for number in range(60)]
    counts = [sum(p.tokens for p in builder(tight_share=0.5)(clip).visuals) for clip in clips]
    again = [sum(p.tokens for p in builder(tight_share=0.5)(clip).visuals) for clip in clips]
    assert counts == again
    # 60 fair draws: between 15 and 45 of them but for one time in 10,000.
    assert 15 < sum(count < native for count in counts) < 45
    assert native / 16 - 1 <= min(counts) < native / 4 and max(counts) == native
    image = replace(records["image"], id=next(clip.id for clip, n in zip(clips, counts, strict=True) if n < native))
    assert builder(tight_share=0.5)(image).visuals[0].tokens == builder()(records["image"]).visuals[0].tokens


def test_options_replace_the_models_numbers(records: dict[str, DataRecord]) -> None:
    assert len(builder()(records["clip"]).visuals) == CONFIG.image.max_frames == 6
    assert len(builder(max_frames=3)(records["clip"]).visuals) == 3
    assert len(builder(fps=0.5)(records["clip"]).visuals) == 4
    assert builder(min_tokens=60)(records["image"]).visuals[0].tokens >= 90  # 1.5 times as many is the floor


# --- targets ----------------------------------------------------------------------------------------------------------


def targets(labels: NDArray[np.int64]) -> str:
    return TOKENIZER.decode(labels[labels != NO_TARGET].tolist(), skip_special=False)


TEXT = st.text(max_size=12) | st.sampled_from([IMAGE, f"{END}\n{START}assistant", "\n\n", " ", "<|endoftext|>"])


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.booleans())
def test_targets_are_the_answers_and_nothing_in_a_text_is_special(spoken: list[tuple[str, str]], system: bool) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be short."}] if system else []
    for question, answer in spoken:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    before = copy.deepcopy(messages)
    ids, labels = encode_conversation(messages, [], TOKENIZER)
    assert messages == before, "the caller's messages stay as they are"
    wanted = [token for _, answer in spoken for token in [*TOKENIZER.encode(answer), END_ID]]
    assert labels[labels != NO_TARGET].tolist() == wanted
    assert (ids == TOKENIZER.special(START)).sum() == len(messages)
    assert TOKENIZER.image_token_id not in ids
    prompt = TOKENIZER.encode_pieces(render(messages[: 2 + system - 1]))
    assert ids[: len(prompt)].tolist() == prompt and (labels[: len(prompt)] == NO_TARGET).all()
    assert labels[len(prompt)] != NO_TARGET, "the first target is what comes after the generation prompt"


def test_thinking_is_a_target_and_its_opening_is_not() -> None:
    answer = "<think>\nfive\n</think>\n\nFive"
    messages = [{"role": "user", "content": "2 and 3"}, {"role": "assistant", "content": answer}]
    ids, labels = encode_conversation(messages, [], TOKENIZER)
    assert targets(labels) == f"five\n</think>\n\nFive{END}"
    prompt = TOKENIZER.encode_pieces(render(messages[:1], thinking=True))
    assert ids[: len(prompt)].tolist() == prompt
    assert TOKENIZER.decode(ids.tolist(), skip_special=False).count("<think>") == 1


def test_several_turns_each_with_its_block(records: dict[str, DataRecord]) -> None:
    sample = builder()(records["turns"])
    check_sample(sample, answers=2)
    assert targets(sample.labels) == f"This.{END}hm\n</think>\n\nSo.{END}"
    assert TOKENIZER.decode(sample.input_ids.tolist(), skip_special=False).count("<think>") == 2


def test_a_caption_is_a_target_to_its_last_token() -> None:
    messages: list[Message] = [{"role": None, "content": [{"type": "image"}, {"type": "text", "text": "a caption"}]}]
    ids, labels = encode_conversation(messages, [2], TOKENIZER)
    assert ids[:2].tolist() == [603, 603] and targets(labels) == "a caption"
    cut = encode_conversation(messages, [2], TOKENIZER, reference_captions=True)[1]
    assert cut[-1] == NO_TARGET and cut[:-1].tolist() == labels[:-1].tolist()


def test_an_image_in_an_answer_is_no_target_nor_is_the_token_after_it() -> None:
    content = [{"type": "text", "text": "Like this:"}, {"type": "image"}, {"type": "text", "text": "red"}]
    messages: list[Message] = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": content}]
    ids, labels = encode_conversation(messages, [3], TOKENIZER)
    assert (ids == 603).sum() == 3 and targets(labels) == f"Like this:red{END}"


@pytest.mark.parametrize("counts", [[], [1, 1]])
def test_a_wrong_number_of_images(counts: list[int]) -> None:
    with pytest.raises(InputError, match="images and frames were given"):
        encode_conversation([{"role": "user", "content": [{"type": "image"}]}], counts, TOKENIZER)


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_a_sample_too_long_is_refused_whole(records: dict[str, DataRecord]) -> None:
    length = len(builder()(records["clip"]).input_ids)
    assert len(builder(model_max_length=length)(records["clip"]).input_ids) == length
    with pytest.raises(SampleTooLong, match=f"record 'clip': {length} tokens .* model_max_length is {length - 1}"):
        builder(model_max_length=length - 1)(records["clip"])


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("content", [None, b"no picture"])
def test_unusable_media_are_named_with_file_and_line(tmp_path: Path, kind: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    (tmp_path / ANNOTATIONS).write_text("\n" + json.dumps({kind: ["a.bin"], "conversations": say("a", "b")}))
    (record,) = read_records(tmp_path)
    with pytest.raises(InputError, match=rf"{ANNOTATIONS}:2: record .*a\.bin: "):
        builder()(record)


def test_refusals(records: dict[str, DataRecord]) -> None:
    with pytest.raises(BudgetError, match="record 'images': 2 images and clips for 1 visual tokens"):
        builder(mm_max_length=1)(records["images"])
    blind = SampleBuilder(replace(CONFIG, vision=None), TOKENIZER)
    check_sample(blind(records["text"]), answers=1)
    with pytest.raises(InputError, match="reads text only"):
        blind(records["image"])
    for options in ({"model_max_length": 0}, {"mm_max_length": -1}, {"tra": "loose"}, {"tight_share": 2}):
        with pytest.raises(InputError, match=r"wanted at least 1|known: |wanted a share"):
            builder(**options)


def test_a_builder_works_in_another_process(records: dict[str, DataRecord]) -> None:
    build = builder(mm_max_length=40)
    record = replace(
        records["images"], messages=(*records["images"].messages[:-1], {"role": "assistant", "content": END})
    )
    there = pickle.loads(pickle.dumps(build))(pickle.loads(pickle.dumps(record)))
    here = build(record)
    assert there.input_ids.tolist() == here.input_ids.tolist() and there.labels.tolist() == here.labels.tolist()
    check_sample(there, answers=1)
