"""Threads for work on slabs of a weight, which a cache holds and whose operations take some tens of microseconds.

Where torch shares each operation among threads, each ends with a wait for the slowest, and while another process has
one of the processors, that wait is a time slice: an eager pass over a 4-bit 2B decoder took 0.6 s on two free cores and
6 s beside one busy process; by parts it takes 0.7 and 1.0 s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on the calling thread without others; a thread that starts meanwhile stays alone for good."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that are kept: a new one costs as much as a slab. A forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")


def by_parts(rows: int, work: Callable[[int, int], T]) -> list[T]:
    """Call `work(begin, end)` for as many parts of `rows` as torch has threads; what it gave, in the order of parts.

    Calls run side by side, one torch thread each. What `work` raises is raised here.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads < 2:
        return [work(0, rows)]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def part(index: int) -> T:
        # Threads inherit neither.
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(rows * index // threads, rows * (index + 1) // threads)

    with one_thread():
        return list(_pool(threads, os.getpid()).map(part, range(threads)))
