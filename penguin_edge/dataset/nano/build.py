"""Writes a data set of penguin-nano: media files and `annotations.jsonl` in the published format.

| file                    | what                                                                                       |
|-------------------------|--------------------------------------------------------------------------------------------|
| `images/*.png`          | pictures, 84x84 pixels                                                                     |
| `videos/*.mp4`          | clips of 8 frames of that size, one frame a second, MPEG-4                                 |
| `annotations.jsonl`     | one record per line, with `task`, and where they apply `choices` and `tolerance` (seconds) |
| `training_answers.json` | `{task: {question: {answer: count}}}` of the training split, for a baseline                |
| `source.json`           | what the set was drawn with                                                                |

Every record is drawn from a generator of its own, seeded with the seed, the split and the record's number: neither the
count nor the number of processes changes what record 17 is.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
from PIL import Image

from penguin_edge.child import quiet_worker
from penguin_edge.dataset.nano.assets import Assets, load_assets
from penguin_edge.dataset.nano.scenes import SIDE, Array, Light, Painter, Placed
from penguin_edge.dataset.nano.tasks import DENSE, TASKS, Scene, Split
from penguin_edge.dataset.records import ANNOTATIONS
from penguin_edge.errors import InputError, MemoryLimitError
from penguin_edge.folders import refuse_any, whole

ALL_TASKS = {**TASKS, **DENSE}
SURVEYED = 2000
"""Training questions counted per task for `training_answers.json`: some 30 for each of 64 names."""

FF_QP2LAMBDA = 118
"""libavutil's factor from a quantizer scale to `global_quality`; scale 2 is next to the finest."""


class Blank(Painter):
    """A painter that draws nothing, for questions without their pictures."""

    def __init__(self) -> None:
        super().__init__(Assets({}, ()))
        self._frame: Array = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)

    def background(self, rng: np.random.Generator, light: Light | None = None) -> Array:
        return self._frame

    def paint(self, background: Array, objects: Sequence[Placed]) -> Array:
        return self._frame

    def write(
        self, background: Array, text: str, middle: float, colour: tuple[int, int, int], rng: np.random.Generator
    ) -> Array:
        return self._frame


def generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random numbers of one record."""
    return np.random.default_rng([seed, get_args(Split).index(split), index])


def draw(painter: Painter, tasks: Sequence[str], split: Split, seed: int, index: int) -> Scene:
    """Record `index` of a data set over `tasks`, which take turns."""
    return ALL_TASKS[tasks[index % len(tasks)]](painter, generator(seed, split, index), split)


def training_answers(tasks: Sequence[str], per_task: int = SURVEYED) -> dict[str, dict[str, dict[str, int]]]:
    """Count how often the training split gives each answer to the same question text, over its first turns."""
    counts: dict[str, dict[str, Counter[str]]] = {task: {} for task in tasks}
    painter = Blank()
    for index in range(per_task * len(tasks)):
        turn = draw(painter, tasks, "shown", 0, index).turns[0]
        counts[turn.task].setdefault(turn.question, Counter())[turn.answer] += 1
    return {task: {question: dict(c) for question, c in questions.items()} for task, questions in counts.items()}


def write_clip(path: Path, frames: Sequence[Array]) -> None:
    """An MPEG-4 file of one frame a second; the same bytes for the same frames, which libx264 does not promise."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"flags": "+qscale+bitexact", "global_quality": str(2 * FF_QP2LAMBDA), "g": "12"}
        stream = container.add_stream("mpeg4", rate=1, options=options)
        (stream.height, stream.width, _), stream.pix_fmt = frames[0].shape, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_record(folder: Path, scene: Scene, index: int, split: Split) -> dict[str, Any]:
    """Write the media of a scene; the record that names them."""
    if len(scene.frames) == 1:
        name, tag = f"images/{index:06d}.png", "<image>"
        Image.fromarray(scene.frames[0]).save(folder / name, compress_level=1)
    else:
        name, tag = f"videos/{index:06d}.mp4", "<video>"
        write_clip(folder / name, scene.frames)
    conversations = []
    for number, turn in enumerate(scene.turns):
        question = turn.question if number else f"{tag}\n{turn.question}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    first = scene.turns[0]
    record: dict[str, Any] = {"id": f"{split}-{index:06d}", tag.strip("<>"): [name], "conversations": conversations}
    record["task"] = first.task
    if split != "train":
        if first.choices is not None:
            record["choices"] = list(first.choices)
        if first.tolerance is not None:
            record["tolerance"] = first.tolerance
    return record


def _write_part(
    indices: range, *, folder: Path, tasks: Sequence[str], split: Split, seed: int, side: int, cache: Path | None
) -> list[str]:
    painter = Painter(load_assets(cache), side)
    lines = []
    for index in indices:
        if _Worker.stopped is not None and _Worker.stopped.is_set():
            break
        lines.append(json.dumps(write_record(folder, draw(painter, tasks, split, seed, index), index, split)))
    return lines


def build(
    out: Path,
    *,
    split: Split,
    count: int,
    seed: int,
    tasks: Sequence[str] | None = None,
    side: int = SIDE,
    workers: int = 1,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw `count` records, spread evenly over the tasks, and put the folder in place when it is complete.

    Args:
        tasks: names of `TASKS`, on the training split also of `DENSE`; default: all of the split.
        side: width and height of a frame in pixels, even and at least 84.
        progress: told the records written so far, and all.
    Raises:
        InputError: an unknown task, a side that cannot be drawn, a folder that exists, or packages that cannot be
            fetched.
    """
    if side < SIDE or side % 2:
        raise InputError(f"got frames of {side} pixels, wanted an even number from {SIDE} on")
    known = list(ALL_TASKS if split == "train" else TASKS)
    tasks = list(tasks or known)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise InputError(f"unknown task {unknown[0]!r} for the {split} split; there are {', '.join(known)}")
    with whole(out, refuse_any(out, InputError, but_empty=False), InputError) as folder:
        load_assets(cache)
        for name in ("images", "videos"):
            (folder / name).mkdir()
        write = partial(_write_part, folder=folder, tasks=tasks, split=split, seed=seed, side=side, cache=cache)
        parts = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
        done = 0
        with (folder / ANNOTATIONS).open("w", encoding="utf-8") as file, _pool(workers) as pool:
            for part, lines in zip(parts, pool.map(write, parts), strict=True):
                file.writelines(f"{line}\n" for line in lines)
                done += len(part)
                if progress:
                    progress(done, count)
        asked = [task for task in tasks if task in TASKS]
        (folder / "training_answers.json").write_text(json.dumps(training_answers(asked)), encoding="utf-8")
        source = {"split": split, "seed": seed, "count": count, "tasks": tasks, "side": side}
        (folder / "source.json").write_text(json.dumps(source), encoding="utf-8")


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, which end with the record that they draw when the block fails.

    Raises:
        MemoryLimitError: one was killed.
    """
    stopped = multiprocessing.Event()
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(stopped,)) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise MemoryLimitError(
                "a drawing process died, most likely for want of memory; nothing was written: use fewer --workers"
            ) from error
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Worker:
    """What a worker process knows: whether the one that started it has given up."""

    stopped: Event | None = None


def _begin(stopped: Event) -> None:
    quiet_worker()
    # A signal to the whole group stops them through the process that gathers; a pool that breaks at the same time as it
    # is cancelled has its thread fail.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _Worker.stopped = stopped
