"""What others may take from a live view: pages, connections and their time, over sockets of the test's own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import CountingEngine, picture, tiny_tokenizer

pytest.importorskip("uvicorn", reason="the live view's packages are not installed")

from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.view import View
from penguin_edge.runtime.live.view_limits import HEAD_BYTES, ViewLimits
from penguin_edge.runtime.live.view_server import ViewServer, socket_at
from penguin_edge.runtime.stream import Stream

LONG = 60.0
"""Seconds after which a test has failed; nothing here takes long on an idle machine."""


class Visitors:
    """Connections to a view."""

    def __init__(self, live: Live, server: ViewServer, stack: contextlib.ExitStack) -> None:
        self.live, self.server, self._stack = live, server, stack
        self.port = int(server.address.rsplit(":", 1)[1])

    def open(self, text: str = "", receive: int | None = None) -> socket.socket:
        """A connection that has sent so much; `receive` bounds what the system buffers for it."""
        one = self._stack.enter_context(socket.socket())
        if receive is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        one.settimeout(LONG)
        one.connect(("127.0.0.1", self.port))
        one.sendall(text.encode())
        return one

    def get(self, path: str, rest: str = "\r\n") -> socket.socket:
        return self.open(f"GET {path} HTTP/1.1\r\nHost: localhost:{self.port}\r\n{rest}")

    def status(self, path: str = "/") -> int:
        return status(self.get(path, "Connection: close\r\n\r\n"))


def status(one: socket.socket) -> int:
    """The status of the answer; 0 where the connection was closed without one."""
    try:
        text = one.recv(12)
    except ConnectionResetError:
        return 0
    return status_of(text) if text else 0


def status_of(text: bytes) -> int:
    return int(text.split()[1])


def ended(one: socket.socket) -> bool:
    """Waits until the other side has closed."""
    with contextlib.suppress(ConnectionResetError):
        while one.recv(65_536):
            pass
    return True


@contextlib.contextmanager
def visited(limits: ViewLimits) -> Iterator[Visitors]:
    view = View()
    session = Stream(CountingEngine(max_seq_len=512), tiny_tokenizer(), budget=30)
    options = SamplingOptions(max_new_tokens=2)
    with (
        Live(session, observer=view) as live,
        ViewServer(view, live, socket_at(0), options=options, limits=limits) as server,
        contextlib.ExitStack() as stack,
    ):
        yield Visitors(live, server, stack)


class Page:
    """A page that looks on, and reads."""

    def __init__(self, visitors: Visitors) -> None:
        self._socket = visitors.get("/events")
        assert status(self._socket) == 200
        self._text = b""

    def sees(self, words: bytes) -> bool:
        while words not in self._text:
            more = self._socket.recv(65_536)
            if not more:
                return False
            self._text += more
        return True


def test_pages_are_bounded_exactly_however_they_come() -> None:
    with visited(ViewLimits(pages=16, connections=300)) as visitors:
        several = [visitors.get("/events") for _ in range(100)]
        assert Counter(map(status, several)) == {200: 16, 503: 84}
        for one in several:
            one.close()
        # Those that went make room, and a page that goes before it was sent a byte counts no more.
        until = time.monotonic() + LONG
        while visitors.server._open and time.monotonic() < until:
            visitors.get("/events").close()
            time.sleep(0.05)
            while visitors.server._open and time.monotonic() < until:
                time.sleep(0.05)
        assert visitors.server._open == 0
        assert Counter(status(visitors.get("/events")) for _ in range(20)) == {200: 16, 503: 4}


def test_half_sent_requests_keep_nobody_out() -> None:
    """Those that wait longest go first; a page that looks on, its pictures and its questions go on."""
    with visited(ViewLimits(connections=24, head_s=LONG, body_s=LONG)) as visitors:
        visitors.live.push(picture(0), 0.0)
        visitors.live.wait()
        page = Page(visitors)
        assert page.sees(b'"frames_processed":1,')
        host = f"Host: localhost:{visitors.port}\r\n"
        origin = f"{host}Origin: http://localhost:{visitors.port}\r\n"
        for half in ("", "GET / HTTP/1.1\r\nX: ", f"POST /ask HTTP/1.1\r\n{origin}Content-Length: 9\r\n\r\n{{"):
            waiting = [visitors.open(half) for _ in range(60)]
            assert visitors.status() == 200 and len(visitors.server._server.server_state.connections) <= 24
            assert all(map(ended, waiting[:30]))
            body = '{"prompt": "What?"}'
            asked = visitors.open(f"POST /ask HTTP/1.1\r\n{origin}Content-Length: {len(body)}\r\n\r\n{body}")
            assert status(asked) == 202
            visitors.live.wait()
        assert visitors.status("/events") == 200
        visitors.live.push(picture(1), 1.0)
        assert page.sees(b'"frames_processed":2,') and page.sees(b'"done": true')


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "GET / HTTP/1.1\r\nX: ",
        # A second request on a connection that is kept, and the rest of one that was answered without it.
        "GET /frames/9.jpg HTTP/1.1\r\nHost: localhost\r\n\r\nGET",
        "GET /frames/9.jpg HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nx",
    ],
)
def test_a_head_has_its_time(sent: str) -> None:
    with visited(ViewLimits(head_s=0.2, kept_s=60)) as visitors:
        one = visitors.open(sent)
        stop = threading.Event()

        def drip() -> None:
            # A byte now and then does not put the deadline off.
            with contextlib.suppress(OSError):
                while sent and not stop.wait(0.05):
                    one.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        assert ended(one)
        stop.set()
        thread.join()
        assert visitors.status() == 200


def head_of(length: int, path: str = "/") -> str:
    """A request's head of so many bytes."""
    begin, end = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: ", "\r\n\r\n"
    return begin + "c" * (length - len(begin) - len(end)) + end


@pytest.mark.parametrize(("length", "wanted"), [(HEAD_BYTES, 200), (HEAD_BYTES + 1, 400), (17_000, 400), (99_999, 400)])
@pytest.mark.parametrize("sent", ["in one piece", "in two", "behind another"])
def test_a_head_has_its_length_however_it_comes(length: int, wanted: int, sent: str) -> None:
    with visited(ViewLimits()) as visitors:
        if sent == "in two":
            one = visitors.open(head_of(length)[:100])
            time.sleep(0.05)
            one.sendall(head_of(length)[100:].encode())
        elif sent == "behind another":
            one = visitors.open(head_of(100, "/frames/1.jpg") + head_of(length))
            found = b""
            while found.count(b"HTTP/1.1") < 2:
                found += one.recv(65_536)
            assert status_of(found) == 404
            assert status_of(found[found.rindex(b"HTTP/1.1") :]) == wanted
            return
        else:
            one = visitors.open(head_of(length))
        assert status(one) == wanted
        assert visitors.status() == 200


def test_a_head_is_as_long_as_it_was_sent_blanks_included() -> None:
    with visited(ViewLimits()) as visitors:
        blanks = " " * 20_000
        assert status(visitors.open(f"GET / HTTP/1.1\r\nHost: localhost\r\nX:{blanks}x\r\n\r\n")) == 400


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 19, "-1", "1e3", "%D9%A3", "1%0A", "x", "1.5", "%00"])
def test_what_is_no_number_of_a_frame_is_not_found(number: str) -> None:
    with visited(ViewLimits()) as visitors:
        assert visitors.status(f"/frames/{number}.jpg") == 404
        assert visitors.status() == 200


def test_a_body_has_its_time() -> None:
    with visited(ViewLimits(body_s=0.2)) as visitors:
        head = f"POST /ask HTTP/1.1\r\nHost: localhost:{visitors.port}\r\nOrigin: http://localhost:{visitors.port}\r\n"
        one = visitors.open(f"{head}Content-Length: 40\r\n\r\n{{")
        assert status(one) == 408
        assert ended(visitors.open(f"{head}Transfer-Encoding: chunked\r\n\r\n5\r\n{{")) and visitors.status() == 200


def test_a_reader_that_takes_nothing_loses_its_place() -> None:
    with visited(ViewLimits(pages=1, stalled_s=0.2)) as visitors:
        silent = visitors.open(f"GET /events HTTP/1.1\r\nHost: localhost:{visitors.port}\r\n\r\n", receive=1)
        # More than the system buffers, for a reader that reads nothing: answers of the longest kind.
        view, until = visitors.server.view, time.monotonic() + LONG
        from penguin_edge.runtime.live.events import Said

        number = 0
        while not visitors.server._open:  # it may not have been let in yet
            time.sleep(0.01)
            assert time.monotonic() < until, "the page was never let in"
        while visitors.server._open:
            number += 1
            view.said(Said(number, "?", 0.0, "x" * 20_000))
            time.sleep(0.01)
            assert time.monotonic() < until, "the page was never let go"
        # What the system holds for it comes all the same, and through the least of buffers that takes minutes.
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert ended(silent)
        page = Page(visitors)
        assert page.sees(b"answers")


def test_pages_that_read_slowly_are_kept() -> None:
    with visited(ViewLimits(stalled_s=LONG)) as visitors:
        slow = visitors.open(f"GET /events HTTP/1.1\r\nHost: localhost:{visitors.port}\r\n\r\n", receive=2048)
        seen = b""
        for i in range(8):
            visitors.live.push(picture(i), float(i))
            visitors.live.wait()
            seen += slow.recv(300)
        while b'"frames_processed":8,' not in seen:
            seen += slow.recv(300)


def test_a_frame_that_cannot_be_drawn_is_noted_and_the_next_one_is_drawn(monkeypatch: Any) -> None:
    view, notes, told = View(), list[str](), threading.Event()
    encode, failing = view.encode, [True]

    def broken() -> bool:
        if failing[0]:
            told.wait(0.01)
            raise ValueError("no such colour")
        return encode()

    monkeypatch.setattr(view, "encode", broken)

    def note(line: str) -> None:
        notes.append(line)
        failing[0] = False
        told.set()

    with (
        Live(Stream(CountingEngine(max_seq_len=512), tiny_tokenizer()), observer=view) as live,
        ViewServer(view, live, socket_at(0), note=note),
    ):
        assert told.wait(LONG)
        live.push(picture(0), 0.0)
        live.wait()
        until = time.monotonic() + LONG
        while view.jpeg(0) is None and time.monotonic() < until:
            time.sleep(0.02)
        assert view.jpeg(0) is not None and notes == ["a frame could not be drawn: no such colour"]
