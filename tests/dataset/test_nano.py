"""The data set of penguin-nano: what is held out stays out, and a seed gives the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from penguin_edge.config import PRESETS
from penguin_edge.dataset.nano import split as held
from penguin_edge.dataset.nano.assets import OBJECTS, Assets, load_assets
from penguin_edge.dataset.nano.build import ALL_TASKS, Blank, build, draw, training_answers, write_record
from penguin_edge.dataset.nano.scenes import CELL, FRAMES, SIDE, Array, Painter, Placed
from penguin_edge.dataset.nano.tasks import NAMES, TASKS, Scene
from penguin_edge.dataset.nano.vocabulary import KEPT, SPECIAL, cut_tokenizer, special_id
from penguin_edge.dataset.records import read_records
from penguin_edge.errors import InputError
from penguin_edge.media.frames import read_video
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.tra.keyframes import KeyFrameDetector

TOKENIZER = Path(__file__).parents[2] / "penguin_edge" / "assets" / "nano" / "tokenizer.json"
DRAWS = 400


class Spy(Blank):
    """Remembers which objects were painted, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.painted: list[Sequence[Placed]] = []

    def paint(self, background: Array, objects: Sequence[Placed]) -> Array:
        self.painted.append(tuple(objects))
        return super().paint(background, objects)


def cell_of(item: Placed) -> str:
    """The cell that the middle of an object lies in."""
    middle = item.x + item.side / 2, item.y + item.side / 2
    return held.CELLS[int(middle[1] // CELL) * 3 + int(middle[0] // CELL)]


def drawn(task: str, split: str, count: int = DRAWS) -> list[tuple[Scene, Spy]]:
    out = []
    for index in range(count):
        spy = Spy()
        out.append((draw(spy, [task], split, 7, index), spy))
    return out


def painted_assets() -> Assets:
    """Stand-ins for the fetched pictures: every object a colour and pattern of its own."""
    rng = np.random.default_rng(0)
    sprites = {}
    for name in OBJECTS:
        sprite = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        sprite[..., 3] = 255
        sprites[name] = sprite
    return Assets(sprites, tuple(rng.integers(0, 256, (200, 260, 3), dtype=np.uint8) for _ in range(3)))


PLACES = ("naming", "lookup", "position", "relation", "before_cut", "order")


@pytest.mark.parametrize(
    ("task", "split"), [*((t, "train") for t in (*PLACES, "describe")), *((t, "shown") for t in PLACES)]
)
def test_training_never_shows_a_held_out_place(task: str, split: str) -> None:
    for _, spy in drawn(task, split):
        for objects in spy.painted:
            assert not {(item.name, cell_of(item)) for item in objects} & held.HELD_CELLS


@pytest.mark.parametrize("task", ["before_cut", "scene_change", "order", "motion"])
def test_training_never_shows_a_held_out_pair_in_one_clip(task: str) -> None:
    for _, spy in drawn(task, "train"):
        names = {item.name for objects in spy.painted for item in objects}
        assert not {(a, b) for a in names for b in names} & held.HELD_PAIRS


def test_training_never_shows_a_held_out_direction() -> None:
    for scene, spy in drawn("motion", "train"):
        for turn in scene.turns:
            name = turn.question.removeprefix("Which way does the ").removesuffix(" move?")
            assert (name, turn.answer) not in held.HELD_DIRECTIONS
            track = [item for objects in spy.painted for item in objects if item.name == name]
            moved = (track[-1].x - track[0].x, track[-1].y - track[0].y)
            way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[turn.answer]
            assert (np.sign(moved[0]), np.sign(moved[1])) == way


def test_training_never_shows_a_held_out_count_or_text() -> None:
    with_held = {name for name, _ in held.HELD_COUNTS}
    for task in ("counting", "count_any"):
        for scene, spy in drawn(task, "train"):
            counts = Counter(item.name for item in spy.painted[0])
            asked = scene.turns[0].question.removeprefix("How many ").removesuffix(" pictures are there?")
            assert counts[asked] == int(scene.turns[0].answer)
            assert (asked, counts[asked]) not in held.HELD_COUNTS
            assert task == "counting" or asked not in with_held
    for scene, spy in drawn("count_both", "train"):
        counts = Counter(item.name for item in spy.painted[0])
        asked = scene.turns[0].question.removeprefix("How many ").removesuffix(" pictures are there?").split(" and ")
        assert sum(counts[name] for name in asked) == int(scene.turns[0].answer)
        assert not {(name, counts[name]) for name in asked} & held.HELD_COUNTS
    for scene, spy in drawn("tally", "train"):
        counts = Counter(item.name for item in spy.painted[0])
        answers = {
            turn.question.removeprefix("How many ").removesuffix(" pictures are there?"): int(turn.answer)
            for turn in scene.turns
        }
        assert counts == answers and len(answers) > 1
        assert counts == answers and len(answers) > 1
        assert not set(answers.items()) & held.HELD_COUNTS
    for scene, spy in drawn("census", "train"):
        counts = Counter(item.name for item in spy.painted[0])
        assert scene.turns and not set(counts.items()) & held.HELD_COUNTS
        for turn in scene.turns:
            asked = turn.question.split()[-2 if turn.question.startswith("Where") else 2]
            number = turn.answer if turn.answer.isdigit() else str(len(turn.answer.split(", ")))
            assert number == str(counts[asked]) and asked not in with_held
    for task in ("reading", "transcribe"):
        for scene, _ in drawn(task, "train"):
            lines = scene.turns[0].answer.replace(" ", "").split(",")
            assert not any(held.held_text(line) for line in lines)


def test_heldout_draws_nothing_else() -> None:
    for task in ("naming", "lookup", "position", "relation"):
        for scene, spy in drawn(task, "heldout"):
            asked = scene.turns[0].question + " " + scene.turns[0].answer
            shown = {(item.name, cell_of(item)) for item in spy.painted[0] if item.name in asked}
            assert shown & held.HELD_CELLS
    for scene, _ in drawn("motion", "heldout"):
        name = scene.turns[0].question.removeprefix("Which way does the ").removesuffix(" move?")
        assert (name, scene.turns[0].answer) in held.HELD_DIRECTIONS
    for task in ("before_cut", "scene_change", "order"):
        for _, spy in drawn(task, "heldout"):
            names = {item.name for objects in spy.painted for item in objects}
            assert {(a, b) for a in names for b in names} & held.HELD_PAIRS
    assert all(held.held_text(s.turns[0].answer.replace(" ", "")) for s, _ in drawn("reading", "heldout"))


def test_few_combinations_are_held_out() -> None:
    for combinations, per_object in (
        (held.HELD_CELLS, len(held.CELLS)),
        (held.HELD_DIRECTIONS, len(held.DIRECTIONS)),
        (held.HELD_COUNTS, len(held.COUNTS)),
        (held.HELD_PAIRS, len(NAMES) - 1),
    ):
        assert 0.03 < len(combinations) / (len(NAMES) * per_object) < 0.08


@pytest.mark.parametrize("task", TASKS)
def test_a_question_does_not_give_its_answer_away(task: str) -> None:
    """The most frequent training answer to the same question text is right hardly more often than a guess."""
    answers = training_answers([task])[task]
    scenes = [scene.turns[0] for scene, _ in drawn(task, "shown", 600)]
    best = {question: max(counts, key=lambda a: counts[a]) for question, counts in answers.items()}
    right = np.mean([best.get(turn.question) == turn.answer for turn in scenes])
    chance = np.mean([1 / len(turn.choices) if turn.choices else 0 for turn in scenes])
    # Six standard errors of 600 coin tosses at most.
    assert right < chance + 6 * np.sqrt(max(chance * (1 - chance), 0.01) / 600)


def test_records_are_independent_of_count_and_evenly_spread() -> None:
    painter = Painter(painted_assets())
    tasks = list(TASKS)
    scene = draw(painter, tasks, "heldout", 3, 17)
    again = draw(painter, tasks, "heldout", 3, 17)
    assert scene.turns == again.turns
    assert all(np.array_equal(a, b) for a, b in zip(scene.frames, again.frames, strict=True))
    counts = Counter(draw(Blank(), tasks, "heldout", 3, i).turns[0].task for i in range(10 * len(tasks)))
    assert set(counts.values()) == {10} and set(counts) == set(TASKS)


def test_clips_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    painter = Painter(painted_assets())
    scene = draw(painter, ["scene_change"], "train", 0, 5)
    record = write_record(tmp_path, scene, 5, "train")
    assert record["video"] == ["videos/000005.mp4"]
    frames = list(read_video(tmp_path / record["video"][0], fps=1, max_frames=180))
    assert [frame.time for frame in frames] == list(range(FRAMES))
    assert all(frame.pixels.shape == (SIDE, SIDE, 3) for frame in frames)


def test_a_larger_frame_holds_the_same_scene() -> None:
    """Objects keep their size and their place relative to the frame; nothing else that was drawn depends on it."""
    assets = painted_assets()
    for task in ("position", "motion", "reading"):
        small, large = (draw(Painter(assets, side), [task], "train", 0, 3) for side in (SIDE, 2 * SIDE))
        assert small.turns == large.turns and len(small.frames) == len(large.frames)
        assert {frame.shape for frame in large.frames} == {(2 * SIDE, 2 * SIDE, 3)}
    plain = np.full((2 * SIDE, 2 * SIDE, 3), 200, dtype=np.uint8)
    item = Placed("cat", 28, 56, 28)
    rows, columns = np.nonzero((Painter(assets, 2 * SIDE).paint(plain, [item]) != plain).any(2)[2:-2, 2:-2])
    # The middle of the cell (1, 2) of the grid, at twice the distance: 84 +- 14 and 140 +- 14.
    assert (columns.min() + 2, columns.max() + 2) == (70, 97) and (rows.min() + 2, rows.max() + 2) == (126, 153)


def test_the_cut_tokenizer_is_the_shipped_one() -> None:
    config = PRESETS["nano"]
    tokenizer = Tokenizer.open(TOKENIZER, image_token_id=config.image_token_id, vocab_size=config.text.vocab_size)
    assert tokenizer.image_token_id == special_id("<image>") == KEPT + len(SPECIAL) - 1
    assert config.eos_token_ids == (special_id("<|im_end|>"),)
    assert config.pad_token_id == special_id("<|endoftext|>")
    for text in ("What is at the top left?", "1234567", "naïve café 你好 🐧", "  two  spaces\n\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < KEPT
    # Ids of Qwen's own vocabulary for tokens that the cut keeps.
    assert tokenizer.encode("What is") == [3838, 374]


def test_unreachable_packages_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/" if name == "PIP_INDEX_URL" else "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    command = [sys.executable, "-m", "penguin_edge", "data", "nano", "--split", "train", "--count", "3"]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be fetched with pip" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [82, 85])
def test_a_side_that_cannot_be_drawn_is_refused(side: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"frames of {side} pixels"):
        build(tmp_path / "out", split="train", count=1, seed=0, side=side)
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "django-emoji-2.2.2.whl").write_bytes(b"not it")
    with pytest.raises(InputError, match="sha256"):
        load_assets(tmp_path)


def test_unknown_tasks_and_existing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'dancing'"):
        build(tmp_path / "a", split="train", count=1, seed=0, tasks=["dancing"])
    with pytest.raises(InputError, match="unknown task 'describe' for the heldout split"):
        build(tmp_path / "a", split="heldout", count=1, seed=0, tasks=["describe"])
    with pytest.raises(InputError, match="exists"):
        build(tmp_path, split="train", count=1, seed=0)


@pytest.mark.slow
def test_the_real_set_is_the_same_for_every_run_and_process_count(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        command = [sys.executable, "-m", "penguin_edge", "data", "nano", "--split", "heldout", "--count", "600"]
        command += ["--seed", "5", "--workers", str(workers), "-o", str(tmp_path / name)]
        subprocess.run(command, check=True)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 600 + 3
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    records = read_records(tmp_path / "a")
    assert Counter(record.extra["task"] for record in records) == dict.fromkeys(TASKS, 60)
    assert all(len(record.messages) == 2 for record in records)


@pytest.mark.slow
def test_the_detector_sees_the_cuts_of_real_scenes() -> None:
    """TRA has something to do: nearly every cut gives a key frame, and nothing else does."""
    painter = Painter(load_assets())
    found = []
    for index in range(100):
        scene = draw(painter, ["scene_change"], "shown", 0, index)
        detector = KeyFrameDetector("exact")
        keys = [i for i, frame in enumerate(scene.frames) if detector.push(frame).kind == "key"]
        found.append(keys == [0, int(float(scene.turns[0].answer.rstrip("s")))])
    assert np.mean(found) > 0.9


@pytest.mark.slow
def test_the_shipped_tokenizer_comes_from_the_published_vocabulary() -> None:
    assert json.loads(TOKENIZER.read_text(encoding="utf-8")) == cut_tokenizer()


def test_all_tasks_draw() -> None:
    painter = Painter(painted_assets())
    for index, task in enumerate(ALL_TASKS):
        scene = draw(painter, [task], "train", 1, index)
        assert len(scene.frames) in (1, FRAMES)
        assert all(frame.shape == (SIDE, SIDE, 3) and frame.dtype == np.uint8 for frame in scene.frames)
