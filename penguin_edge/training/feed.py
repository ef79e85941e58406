"""Records to batches in worker processes, in an order that does not depend on them.

The order is laid out by `order.Order`; a worker is handed the indices of one micro-batch and returns a `Delivery`.
What a record lacks is reported there, never replaced by another record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from penguin_edge.child import quiet_worker
from penguin_edge.dataset.records import ANNOTATIONS, DataRecord, read_records
from penguin_edge.dataset.samples import NO_TARGET, Sample, SampleBuilder, SampleTooLong
from penguin_edge.errors import MemoryLimitError, PenguinError
from penguin_edge.files import file_hash
from penguin_edge.training.order import Order, build_index, index_path, read_index, write_index
from penguin_edge.training.packing import Batch, pack


@dataclass(frozen=True)
class Corpus:
    """The records of all annotation files, one after another."""

    files: tuple[Path, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    records: tuple[DataRecord, ...]

    @classmethod
    def read(
        cls, sources: Sequence[tuple[Path, float]], media_root: Path | None = None, *, allow_outside: bool = False
    ) -> Corpus:
        """Read files or folders, each with how often its records come per epoch; the rest as `read_records`.

        Raises:
            InputError: a file that cannot be read as records.
        """
        files, sizes, records = [], [], list[DataRecord]()
        for path, _ in sources:
            found = read_records(path, media_root, allow_outside=allow_outside)
            files.append(path / ANNOTATIONS if path.is_dir() else path)
            sizes.append(len(found))
            records += found
        return cls(tuple(files), tuple(weight for _, weight in sources), tuple(sizes), tuple(records))

    def fingerprint(self) -> str:
        """SHA-256 over the annotation files and their weights; says whether a run can be resumed on this data."""
        parts = [f"{file_hash(file)}:{weight!r}" for file, weight in zip(self.files, self.weights, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Delivery:
    """One micro-batch, and what happened to the records that are not in it."""

    batch: Batch
    samples: int
    """In the batch; 0 when every record was unusable: the batch then holds one empty stand-in without a target."""
    bad: tuple[str, ...]
    too_long: tuple[str, ...]


class Micro(Dataset[Delivery]):
    """Indices of one micro-batch -> `Delivery`."""

    def __init__(
        self, records: Sequence[DataRecord], builder: Callable[[DataRecord], Sample], pad_id: int, dummy_per_text: bool
    ) -> None:
        self.records, self.builder = records, builder
        self.dummy_per_text = dummy_per_text
        ids = np.array([pad_id, pad_id], dtype=np.int64)
        self.stand_in = Sample("", ids, np.full_like(ids, NO_TARGET), ())

    def __getitem__(self, indices: Sequence[int]) -> Delivery:
        samples, bad, too_long = [], [], []
        for index in indices:
            try:
                samples.append(self.builder(self.records[index]))
            except SampleTooLong as error:
                too_long.append(str(error))
            except (PenguinError, OSError) as error:
                bad.append(str(error))
        batch = pack(samples or [self.stand_in], dummy_per_text=self.dummy_per_text)
        return Delivery(batch, len(samples), tuple(bad), tuple(too_long))


class Length(Dataset[int | str]):
    """Index -> tokens of that sample, or the reason why it cannot be used."""

    def __init__(self, records: Sequence[DataRecord], builder: SampleBuilder) -> None:
        self.records, self.builder = records, builder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int | str:
        try:
            return len(self.builder(self.records[index]).input_ids)
        except (PenguinError, OSError) as error:
            return str(error)


class Run(Sampler[list[int]]):
    """The micro-batches of one process from optimiser step `begin` to `end`, over as many epochs as that takes."""

    def __init__(self, order: Order, rank: int, begin: int, end: int) -> None:
        self.order, self.rank, self.begin, self.end = order, rank, begin, end

    def __iter__(self) -> Iterator[list[int]]:
        for step in steps_of(self.order, self.begin, self.end):
            yield from self.order.micro_batches(step, self.rank)

    def __len__(self) -> int:
        return (self.end - self.begin) * self.order.accumulate


def steps_of(order: Order, begin: int, end: int) -> Iterator[list[int]]:
    """The samples of steps `begin` to `end`, counted through all epochs."""
    per_epoch = order.steps_per_epoch
    for epoch in range(begin // per_epoch, -(-end // per_epoch)):
        first = epoch * per_epoch
        yield from order.steps(epoch)[max(begin - first, 0) : end - first]


def deliveries(micro: Micro, run: Run, workers: int, prefetch: int) -> Iterator[Delivery]:
    """Every micro-batch of `run`, in its order whatever the number of workers.

    Raises:
        MemoryLimitError: a worker was killed, as happens when memory runs out.
    """
    yield from _loaded(micro, run, workers, prefetch)


def measure_lengths(
    records: Sequence[DataRecord], builder: SampleBuilder, workers: int, report: Callable[[int], None]
) -> Iterator[int | str]:
    """Tokens of every record by building it, in file order; a string says why a record cannot be used.

    Raises:
        MemoryLimitError: a worker was killed.
    """
    for done, length in enumerate(_loaded(Length(records, builder), None, workers, 64)):
        report(done + 1)
        yield length


def measured_lengths(
    corpus: Corpus, builder: SampleBuilder, workers: int, say: Callable[[str], None]
) -> tuple[int, ...]:
    """Tokens of every record, `UNUSABLE` where it cannot be used, from each file's index or by building every sample.

    What cannot be used is said, and counted per file; a measured index is stored beside its file.
    """
    image, tra = (dataclasses.asdict(part) for part in (builder.config.image, builder.config.tra))
    options = dataclasses.asdict(builder.options)
    tokenizer = file_hash(Path(builder.tokenizer.source))
    settings = json.loads(json.dumps({"options": options, "image": image, "tra": tra, "tokenizer": tokenizer}))
    lengths: list[int] = []
    for file, size in zip(corpus.files, corpus.sizes, strict=True):
        records = corpus.records[len(lengths) : len(lengths) + size]
        index = read_index(file, size, settings)
        if index is None:
            say(f"measuring {size} samples of {file}")
            index = build_index(measure_lengths(records, builder, workers, _Countdown(size, say)))
            if not write_index(file, index, settings):
                say(f"note: {index_path(file)} cannot be written; the samples will be measured again")
        for problem in index.problems.values():
            say(f"left out: {problem}")
        if index.problems:
            say(f"{len(index.problems)} of {size} records of {file} cannot be used")
        lengths += index.lengths
    return tuple(lengths)


class _Countdown:
    """Report every ten seconds how far a count has come."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.began = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said >= 10:
            self.said = now
            left = (now - self.began) / done * (self.total - done)
            self.say(f"  {done} of {self.total}, {left:.0f} s left")


def _loaded(dataset: Dataset, sampler: Sampler | None, workers: int, prefetch: int) -> Iterator[Any]:
    """Yield what worker processes make of each index, in order.

    Raises:
        MemoryLimitError: a worker was killed; it is raised here and nowhere else, so that no step is half taken.
    """
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_is,
        worker_init_fn=_quiet_worker,
    )
    with _no_alarm():
        items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # torch notices a dead worker itself, or fails to fetch a tensor from it; a failure inside a worker comes
            # with its traceback.
            lost = workers and (not isinstance(error, RuntimeError) or "DataLoader worker" in str(error))
            if not lost or "Traceback" in str(error):
                raise
            raise MemoryLimitError(
                "a loader process died, most likely for want of memory; use fewer --workers, or resume to try again"
            ) from error
        yield item


@contextlib.contextmanager
def _no_alarm() -> Iterator[None]:
    """Take back what torch does on SIGCHLD: it raises wherever the main thread is, in the middle of a step or a save.

    A worker that is gone is noticed when the next item does not come.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def _quiet_worker(number: int) -> None:
    quiet_worker()


def _as_is(item: object) -> object:
    return item
