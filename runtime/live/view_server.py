"""A web page on this machine that shows a running stream and takes questions.

    with Live(stream, observer=view) as live, ViewServer(view, live, socket_at(8765)) as server:
        print(server.address)

| path                  | answer                                                                                    |
|-----------------------|-------------------------------------------------------------------------------------------|
| GET /                 | the page; it loads nothing from elsewhere                                                 |
| GET /events           | server-sent events: `state`, `answers`, and `alive` when there is nothing to say          |
| GET /frames/N.jpg     | a picture of a recent frame                                                               |
| POST /ask             | {"prompt": …}; 202 when it was taken, else {"error": …}; the answer comes by `/events`    |

It listens on 127.0.0.1 alone and answers only to the names of this machine, so that no other machine and no page from
elsewhere (DNS rebinding, forms, frames) can look or ask. There are no queues: a page is sent what is newest when its
connection takes more, so that a slow one misses states in between and holds nothing up. What connections may take is
bounded (`view_limits.py`).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

from penguin_edge.errors import InputError, PenguinError, TargetUnavailable
from penguin_edge.files import ASSETS, parse_json
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.view import View
from penguin_edge.runtime.live.view_limits import HEAD_BYTES, ViewLimits, bounded
from penguin_edge.schema import Record, Text

PORT = 8765
TICK_S = 0.1
"""Between two looks at the stream for a page."""
PICTURE_S = 0.2
"""Between two pictures, at least."""
ALIVE_S = 5.0
"""A page without news for three times as long takes the connection for dead."""
DEFAULT = ViewLimits()
BODY, PROMPT = 65_536, 4_000
"""Bytes of a question's request, characters of a question."""
QUESTION = Record({"prompt": Text(longest=BODY)}, open=True)
"""What the page sends."""


def socket_at(port: int) -> socket.socket:
    """A bound socket on 127.0.0.1; port 0 takes a free one.

    Raises:
        InputError: the port is taken, or not one that this user may have.
        TargetUnavailable: the packages of the view are not installed.
    """
    _require()
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(("127.0.0.1", port))
        bound.listen(64)
    except OSError as error:
        bound.close()
        raise InputError(
            f"port {port} of 127.0.0.1 cannot be used ({error.strerror}); choose another with --port N, or --port 0 "
            "for any that is free"
        ) from None
    return bound


def _require() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise TargetUnavailable("the live view needs two packages: pip install 'penguin-edge[ui]'") from None


class ViewServer:
    """See the top of this file. Serves from a thread of its own between `__enter__` and `close`."""

    def __init__(
        self,
        view: View,
        live: Live,
        bound: socket.socket,
        *,
        options: SamplingOptions | None = None,
        limits: ViewLimits = DEFAULT,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            bound: from `socket_at`; closed with the server.
            options: for the answers to what is asked in the page.
            limits: what pages and connections may take.
            note: is told of errors of the stream that a question met.
        """
        import uvicorn

        self.view, self.live, self._options, self._note = view, live, options, note
        self.address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self._page, self._policy = _page()
        self._limits, self._open = limits, 0
        self._bound, self._over = bound, threading.Event()
        # Nothing of uvicorn's is printed, and no signal is taken: it runs beside the main thread.
        config = uvicorn.Config(
            self._app(),
            loop="asyncio",
            http=bounded(limits),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            backlog=limits.connections,
            timeout_keep_alive=limits.kept_s,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="penguin-edge view", daemon=True)

    def __enter__(self) -> ViewServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def wait(self) -> None:
        """Until `close`, which another thread or a signal has to bring about."""
        # Not `join`: where Ctrl-C ends that, Python takes the thread for one that has ended.
        self._over.wait()

    def close(self) -> None:
        """Tell the pages, and end the thread. May be called twice."""
        self.view.phase = "closed"
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._bound.close()
        self._over.set()

    def _serve(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        drawing = asyncio.create_task(self._draw())
        await self._server.serve(sockets=[self._bound])
        drawing.cancel()

    async def _draw(self) -> None:
        while True:
            try:
                self.view.encode()
            except Exception as error:  # The next picture may be drawn again.
                self._note(f"a frame could not be drawn: {error}")
            await asyncio.sleep(PICTURE_S)

    def _app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route

        def refused(status: int, why: str) -> JSONResponse:
            return JSONResponse({"error": why}, status)

        def foreign(request: Request) -> bool:
            """A page from elsewhere asks. Browsers say so; where they do not, they send no origin either."""
            origin, own = request.headers.get("origin"), f"http://{request.headers['host']}"
            return origin not in (None, own) or request.headers.get("sec-fetch-site") in ("cross-site", "same-site")

        async def page(request: Request) -> Response:
            headers = {"Content-Security-Policy": self._policy, "X-Frame-Options": "DENY", **NO_STORE}
            return Response(self._page, media_type="text/html", headers=headers)

        async def frame(request: Request) -> Response:
            number = request.path_params["number"]
            # Not more digits than a number of a frame can have: Python makes none of thousands.
            known = re.fullmatch("[0-9]{1,18}", number) is not None and not foreign(request)
            jpeg = self.view.jpeg(int(number)) if known else None
            if jpeg is None:
                return refused(404, "no such picture")
            headers = {"Cross-Origin-Resource-Policy": "same-origin", **NO_STORE}
            return Response(jpeg, media_type="image/jpeg", headers=headers)

        limits = self._limits

        class Page(StreamingResponse):
            """Counts itself where it is sent: between a count and a test elsewhere, others come in."""

            async def __call__(page, scope: Any, receive: Any, send: Any) -> None:
                if self._open >= limits.pages:
                    await refused(503, f"{limits.pages} pages look on already; close one")(scope, receive, send)
                    return
                self._open += 1
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    self._open -= 1

        async def events(request: Request) -> Response:
            if foreign(request):
                return refused(403, "not for pages from elsewhere")
            return Page(self._events(), media_type="text/event-stream", headers=NO_STORE)

        async def ask(request: Request) -> Response:
            if foreign(request) or "origin" not in request.headers:
                return refused(403, "only the page itself may ask")
            body = b""
            try:
                async with asyncio.timeout(limits.body_s):
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > BODY:
                            return refused(413, f"a question of more than {BODY} bytes; shorten it")
            except TimeoutError:
                return refused(408, f"the question was not sent within {limits.body_s:g} s; ask again")
            except ClientDisconnect:
                return refused(400, "the question was not sent to its end; ask again")
            try:
                prompt = parse_json(body, "the question", rule=QUESTION)["prompt"].strip()
            except InputError:
                return refused(400, 'wanted {"prompt": "…"} as JSON')
            if not 0 < len(prompt) <= PROMPT:
                return refused(400, f"a question has 1 to {PROMPT} characters, this one {len(prompt)}")
            try:
                # Its tokens are not read here: the view is told of them, and there are no more than `options` says.
                self.live.ask(prompt, options=self._options)
            except InputError as error:
                return refused(409, str(error))
            except PenguinError as error:  # of a frame before, told to whoever comes next; the stream goes on
                self._note(f"{error}")
                return refused(500, str(error))
            return JSONResponse({}, 202)

        routes = [
            Route("/", page),
            Route("/events", events),
            Route("/frames/{number}.jpg", frame),
            Route("/ask", ask, methods=["POST"]),
        ]
        own = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
        return Starlette(routes=routes, middleware=[own])

    async def _events(self) -> AsyncIterator[str]:
        seen, last, idle = 0, "", 0.0
        while True:
            closing = self._server.should_exit
            state = json.dumps(self.view.state(self.live), separators=(",", ":"))
            seen, answers = self.view.answers(seen)
            out = ""
            if state != last:
                out, last = f"event: state\ndata: {state}\n\n", state
            if answers:
                out += f"event: answers\ndata: {json.dumps(answers)}\n\n"
            idle = 0.0 if out else idle + TICK_S
            if idle >= ALIVE_S:
                out, idle = "event: alive\ndata:\n\n", 0.0
            if out:
                yield out
            if closing:
                return
            await asyncio.sleep(TICK_S)


NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets it run its own script and style and load nothing from elsewhere."""
    page = (ASSETS / "view.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert inside is not None
        return base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy
