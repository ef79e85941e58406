"""KV caches: what lies at each position, and whose they are.

An engine keeps the numbers of a cache, in whatever form its graphs take them; `Caches` holds these states. The `Cache`
that a caller gets holds the key of every position. Whoever writes a position says what it is, so that what a cache
holds is never a matter of belief.

| name     | meaning                                                                       |
|----------|-------------------------------------------------------------------------------|
| Key      | a token id, or (a picture at a size, the number of one of its tokens)         |
| None     | a slot whose writer gave no key, or whose write failed; it is equal to no key |
| position | the rotary position of what stands in a slot; `positions_of` tells it by keys |
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

from penguin_edge.errors import BusyError, InputError
from penguin_edge.guard import Guard
from penguin_edge.runtime.engines.base import I64, check_truncate
from penguin_edge.tra.layout import token_count


class Visual(NamedTuple):
    """One image or frame as it enters the prompt: whose pixels, at what size. Compared for every visual token."""

    digest: str
    height: int
    width: int
    merge_size: int

    @property
    def tokens(self) -> int:
        return token_count((self.height, self.width), self.merge_size)


Key: TypeAlias = int | tuple[Visual, int]


def positions_of(keys: Sequence[Key]) -> list[int]:
    """The rotary position of each key of a prompt, which begins at 0.

    A token of a picture stands where it would stand if all tokens of the picture were there, and so does the text
    behind the picture: gaps are left for what is missing. With all tokens there, position and slot are the same.
    """
    positions: list[int] = []
    base, last, number = 0, None, -1  # begin of what stands here; the picture that it belongs to, and its last token
    for key in keys:
        if not isinstance(key, tuple):
            if last is not None:
                base, last = base + last.tokens, None
            positions.append(base)
            base += 1
            continue
        visual, index = key
        if last is not None and (visual != last or index <= number):
            base += last.tokens
        positions.append(base + index)
        last, number = visual, index
    return positions


State = TypeVar("State")


class Cache:
    """The KV cache of one conversation, made by `Engine.new_cache`. Close it, or drop it, when it is done with.

    Slots from `length` on keep what was written there until they are written again: they can still be moved.
    """

    def __init__(self, guard: Guard, owner: Caches[Any], state: object) -> None:
        """Use `Engine.new_cache`; `guard` and `state` are the engine's, `owner` holds the caches of one engine."""
        self._guard, self.owner, self.state = guard, owner, state
        self._keys: list[Key | None] = []
        self._positions: list[int] = []
        self._length = 0
        self._closed = ""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def keys(self) -> list[Key | None]:
        """What stands at each position below `length`."""
        return self._keys[: self._length]

    @property
    def positions(self) -> list[int]:
        """The rotary position of what stands in each slot below `length`."""
        return self._positions[: self._length]

    @property
    def following(self) -> int:
        """The rotary position behind the last one; 0 in an empty cache."""
        return self._positions[self._length - 1] + 1 if self._length else 0

    def common(self, keys: Sequence[Key]) -> int:
        """Positions from the first on that hold what `keys` want there."""
        same = 0
        for held, wanted in zip(self.keys, keys, strict=False):
            if held != wanted:
                break
            same += 1
        return same

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, at no cost.

        Raises:
            InputError: `length` is no whole number of 0 to `length`, or the cache was closed.
            BusyError: another thread uses the engine.
        """
        with self._guard:
            self.check_open()
            check_truncate(self._length, length)
            self._length = int(length)

    def forget(self) -> None:
        """Hold nothing, and nothing that could be moved: what was written is not to be trusted."""
        self._keys.clear()
        self._positions.clear()
        self._length = 0

    def check_open(self) -> None:
        """Refuse a cache that was closed.

        Raises:
            InputError: it was, or its engine was.
        """
        if self._closed:
            raise InputError(f"this {self._closed} was closed, and its cache with it; open another one")

    def writing(self, count: int, keys: Sequence[Key], positions: I64 | None = None) -> _Writing:
        """For engines: a block that appends `count` tokens. They are nobody's until it has ended well.

        Args:
            positions: rotary positions [count]; None: those that follow.
        Raises:
            InputError: keys for another number of tokens.
        """
        if keys and len(keys) != count:
            raise InputError(f"{len(keys)} keys for {count} positions, wanted one for each, or none")
        first = self.following
        places = range(first, first + count) if positions is None else positions.tolist()
        self._positions[self._length : self._length + count] = places
        return _Writing(self._keys, self._length, count, keys, self._grow)

    def _grow(self, length: int) -> None:
        self._length = length

    @contextmanager
    def moving(self, begin: int, end: int, to: int, turn: int | None = None) -> Iterator[None]:
        """For engines: give slots another place, and positions another number. After a failure the cache ends before
        them."""
        self._keys += [None] * (end - len(self._keys))
        # Slots that nobody wrote into count as their own positions.
        self._positions += range(len(self._positions), end)
        moved, by = self._keys[begin:end], to - begin if turn is None else turn
        places = [position + by for position in self._positions[begin:end]]
        self._keys[to : to + len(moved)] = [None] * len(moved)
        self._positions[to : to + len(moved)] = places
        self._length = min(self._length, to)
        yield
        self._keys[to : to + len(moved)] = moved
        self._length = to + len(moved)

    def close(self, what: str = "session") -> None:
        """Give the memory back to the engine; the cache cannot be used again. `what` was closed, for messages."""
        self._closed = self._closed or what
        self.forget()
        self.state = None
        self.owner.drop(self)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close("cache")


class _Writing:
    """See `Cache.writing`. A class, since a decoded token has time for little: a generator would take a microsecond."""

    __slots__ = ("_begin", "_count", "_grow", "_held", "_keys")

    def __init__(
        self, held: list[Key | None], begin: int, count: int, keys: Sequence[Key], grow: Callable[[int], None]
    ) -> None:
        self._held, self._begin, self._count, self._keys, self._grow = held, begin, count, keys, grow

    def __enter__(self) -> None:
        self._held[self._begin : self._begin + self._count] = [None] * self._count

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            end = self._begin + self._count
            if self._keys:
                self._held[self._begin : end] = self._keys
            self._grow(end)


class Caches(Generic[State]):
    """The open caches of one engine, each with the engine's own state of it, and whether the engine is open."""

    def __init__(self, capacity: int | None, make: Callable[[], State]) -> None:
        """
        Args:
            capacity: caches that may be open at once; None: as many as memory holds.
            make: an empty state.
        """
        self.guard = Guard("engine")
        self.capacity, self._make = capacity, make
        self._open: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._closed = False
        self._making = threading.RLock()

    def new(self) -> Cache:
        """An empty cache.

        Raises:
            BusyError: the engine has no more of them.
            InputError: the engine was closed.
        """
        with self._making:
            self.check_open()
            if self._full():
                gc.collect()  # of sessions that nobody holds any more
            if self._full():
                raise BusyError(
                    f"this engine holds {self.capacity} KV cache at a time, and a session has it; close that "
                    "session, or open the bundle again for an engine of its own"
                )
            cache = Cache(self.guard, self, self._make())
            self._open.add(cache)
            return cache

    def state(self, cache: Cache) -> State:
        """The engine's state of a cache of its own.

        Raises:
            InputError: the cache is another engine's, or was closed.
        """
        if self._closed or not isinstance(cache, Cache) or cache.owner is not self or cache.state is None:
            self._refuse(cache)
        return cast(State, cache.state)

    def _refuse(self, cache: object) -> NoReturn:
        self.check_open()
        if not isinstance(cache, Cache):
            raise InputError(f"got {type(cache).__name__} for a cache, wanted one of this engine's new_cache()")
        cache.check_open()
        raise InputError("this cache belongs to another engine; use one of this engine's new_cache()")

    def check_open(self) -> None:
        """Refuse an engine that was closed.

        Raises:
            InputError: it was.
        """
        if self._closed:
            raise InputError("this engine was closed; open the bundle again")

    def close(self) -> None:
        """Close all caches and refuse whatever comes.

        Raises:
            BusyError: another thread uses the engine.
        """
        with self.guard:
            self._closed = True
            for cache in list(self._open):
                cache.close("engine")

    def drop(self, cache: Cache) -> None:
        """Let go of a cache that was closed."""
        self._open.discard(cache)

    def _full(self) -> bool:
        return self.capacity is not None and len(self._open) >= self.capacity
