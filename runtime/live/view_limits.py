"""How much a live view lets others take: connections and their time. See `ViewLimits`.

uvicorn bounds requests, not what is sent half: a head that never ends would hold its connection for ever, and a number
of them would keep everybody out. Here such a connection has a deadline, and is the first to go when there are too many.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

HEAD_BYTES = 16_384
"""Longest head of a request: browsers send the cookies of all programs on this machine along."""


@dataclass(frozen=True)
class ViewLimits:
    """Bounds of a `ViewServer`; times in seconds."""

    pages: int = 16
    """Open at the same time."""
    connections: int = 64
    """Pages, requests and connections that wait, all together; beyond it what has waited longest is closed."""
    head_s: float = 10.0
    """From the connection, or the first byte of a further request, to the end of the request's head."""
    body_s: float = 10.0
    """From there to the end of its body."""
    stalled_s: float = 20.0
    """Seconds that a reader may take no byte while there is more for it than the system buffers."""
    kept_s: int = 5
    """Seconds that a connection waits for a further request."""


def bounded(limits: ViewLimits) -> type[asyncio.Protocol]:
    """uvicorn's protocol, within these limits."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        """Closes connections beyond the limit, the oldest whose request has not come in whole first."""

        _head: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        @property
        def half_sent(self) -> bool:
            return not self._answering or self.cycle.more_body

        @property
        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            conn, next_event = self.conn, self.conn.next_event

            def checked() -> Any:
                """The next event; a head is too long in one piece, too, while h11 itself counts those that lack more.

                Raises:
                    RemoteProtocolError: as h11 does, which is answered with 400.
                """
                before = len(conn.trailing_data[0])
                event = next_event()
                if isinstance(event, h11.Request) and before - len(conn.trailing_data[0]) > HEAD_BYTES:
                    raise h11.RemoteProtocolError("head too long", error_status_hint=431)
                return event

            conn.next_event = checked  # type: ignore[method-assign]
            self.since = self.loop.time()
            self._head = self.loop.call_later(limits.head_s, self._abort)
            if len(self.connections) > limits.connections:
                waiting = [one for one in self.connections if isinstance(one, Bounded) and one.half_sent]
                min(waiting, key=lambda one: one.since)._abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._call_off("_head")
            self._call_off("_stalled")
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answering:
                self._call_off("_head")
            elif self._head is None:
                # The beginning of a further request, or the rest of one that was answered before its end.
                self._head = self.loop.call_later(limits.head_s, self._abort)

        def on_response_complete(self) -> None:
            self.since = self.loop.time()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(limits.stalled_s, self._abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._call_off("_stalled")

        def _abort(self) -> None:
            self.connections.discard(self)
            self.transport.abort()

        def _call_off(self, name: str) -> None:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    return Bounded
