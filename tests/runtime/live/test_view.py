"""The live view: a page shows what the stream holds, on this machine alone, and the stream never waits for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import CountingEngine, picture, tiny_tokenizer
from PIL import Image
from test_live import SHORT, GatedEngine, held

from penguin_edge.errors import BudgetError, InputError, TargetUnavailable
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.core.report import Kept
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.latency.control import Decision, LatencyTarget, Setting
from penguin_edge.runtime.latency.cost import AXES, fit
from penguin_edge.runtime.live import view as bounds
from penguin_edge.runtime.live.events import Observer, Ready, Said
from penguin_edge.runtime.live.live import Live
from penguin_edge.runtime.live.view import View, thumbnail
from penguin_edge.runtime.live.view_limits import ViewLimits
from penguin_edge.runtime.live.view_server import BODY, PROMPT, ViewServer, socket_at
from penguin_edge.runtime.stream import Stream
from penguin_edge.tra.clip import KEY

CHEAP = fit({stage: {(1.0, 1.0)[:axes]: [0.1]} for stage, axes in AXES.items()})


@contextlib.contextmanager
def served(
    budget: int = 60, limits: ViewLimits | None = None, **options: Any
) -> Iterator[tuple[Live, GatedEngine, ViewServer]]:
    engine, view = GatedEngine(), View("street.mp4", "tiny on eager")
    session = Stream(engine, tiny_tokenizer(), budget=budget)
    with (
        Live(session, queued=100, observer=view, **options) as live,
        ViewServer(view, live, socket_at(0), options=SHORT, limits=limits or ViewLimits()) as server,
    ):
        yield live, engine, server


def words(live: Live, prompt: str) -> str:
    return "".join(token.text for token in live.ask(prompt, options=SHORT)).strip()


def send(server: ViewServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and body of one request; a host may be given."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=20)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {name.replace("_", "-"): text for name, text in headers.items()})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, text


def events(address: str) -> Iterator[tuple[str, Any]]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET", "/events")
    reply = connection.getresponse()
    assert reply.status == 200
    name = ""
    for line in reply:
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)
    connection.close()


# What Live tells.


def test_the_stream_tells_frames_and_answers_as_they_come() -> None:
    ready: list[Ready] = []
    said: list[Said] = []
    session = Stream(CountingEngine(max_seq_len=1024), tiny_tokenizer(), budget=40)

    class Listening(Observer):
        def frame_ready(self, one: Ready) -> None:
            ready.append(one)

        def said(self, piece: Said) -> None:
            said.append(piece)

    with Live(session, observer=Listening()) as live:
        for i in range(4):
            live.push(picture(i), float(i))
            live.wait()
        plan = session.planner.plan()
        assert [one.number for one in ready] == [0, 1, 2, 3] and [one.frame.time for one in ready] == [0.0, 1, 2, 3]
        assert [(kept.kind, kept.tokens) for kept in ready[-1].window] == [(f.kind, f.tokens) for f in plan.frames]
        assert sum(kept.tokens for kept in ready[-1].window) == session.visual_tokens <= 40
        assert all(0 < one.work_ms <= one.age_ms for one in ready)
        assert ready[-1].visual_tokens == session.visual_tokens and ready[-1].budget == 40
        assert ready[-1].kv_tokens == session.cache.length
        got = list(live.ask("What is it?", options=SHORT))
        assert [piece.text for piece in said] == ["", *(token.text for token in got), ""]
        assert [piece.done for piece in said] == [False] * (len(got) + 1) + [True]
        assert {piece.number for piece in said} == {1}
        # From asking, which is no later than the session's own beginning.
        assert said[-1].first_token_ms >= (session.report.first_token_ms or 0) > 0  # type: ignore[operator]
        said.clear()
        with pytest.raises(BudgetError):
            list(live.ask("word " * 600))
        assert said[-1].done and "shorten the question" in said[-1].error and said[-1].first_token_ms is None
        said.clear()
        asked = live.ask("What is it?", options=SamplingOptions(max_new_tokens=100))
        next(asked)
        asked.close()
        live.wait()
        assert said[-1].done and not said[-1].error and len(said) < 100
        said.clear()
        watch = live.watch("What is it?", every=1.0, options=SHORT)
        live.push(picture(5), 5.0)
        live.wait()
        assert said[-1].done and "".join(piece.text for piece in said) == next(iter(watch)).text
        assert {piece.time for piece in said} == {5.0}


def test_a_question_may_wait_for_another() -> None:
    engine = GatedEngine()
    with Live(Stream(engine, tiny_tokenizer())) as live:
        held(live, engine)
        first = live.ask("What is it?", options=SHORT)
        threading.Timer(0.05, engine.gate.set).start()
        second = live.ask("And now?", options=SHORT, wait=True)
        assert len(list(first)) == len(list(second)) == 4


# What a view holds.


def test_a_view_is_of_bounded_size() -> None:
    view = View()
    for i in range(200):
        view.frame_ready(Ready(Frame(picture(i % 3), float(i)), i, 5.0, 4.0, (Kept(i, float(i), KEY, 12),), 40, 50))
        assert view.encode() and not view.encode()
        view.said(Said(i, "?", float(i)))
        for _ in range(3):
            view.said(Said(i, "?", float(i), "x" * 9000))
        view.said(Said(i, "?", float(i), done=True, first_token_ms=3.0))
    with Live(Stream(CountingEngine(), tiny_tokenizer())) as live:
        state = view.state(live)
    assert [shot[0] for shot in state["shots"]] == list(range(200 - bounds.SHOTS, 200))
    assert view.jpeg(200 - bounds.STORED) and view.jpeg(199 - bounds.STORED) is None and view.jpeg(200) is None
    assert len(state["ages_ms"]) == len(state["firsts_ms"]) == bounds.POINTS
    version, answers = view.answers()
    assert [one["number"] for one in answers] == list(range(200 - bounds.ANSWERS, 200))
    assert {len(one["text"]) for one in answers} == {bounds.LONGEST} and view.answers(version) == (version, [])
    assert len(json.dumps(state)) < 20_000
    # Only the newest of the frames that nobody drew is held.
    frames = [Frame(picture(i), float(i)) for i in range(3)]
    for i, frame in enumerate(frames):
        view.frame_ready(Ready(frame, 300 + i, 5.0, 4.0, (Kept(300 + i, float(i), KEY, 12),), 40, 50))
    assert view.encode() and view.jpeg(301) is None and view.jpeg(302)


@pytest.mark.parametrize(("height", "width"), [(84, 112), (1080, 1920), (2000, 100), (1, 5000)])
def test_a_picture_is_small(height: int, width: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(thumbnail(picture(1, height, width)))
    with Image.open(path) as image:
        assert image.format == "JPEG" and image.width <= bounds.WIDTH and image.height <= 2 * bounds.WIDTH
        assert (image.width, image.height) == (width, height) or max(height, width) > bounds.WIDTH


# What a page shows.


def test_a_page_shows_the_stream_and_asks(page: Any) -> None:
    with served() as (live, _, server):
        page.goto(server.address)
        for i in range(5):
            live.push(picture(0 if i == 3 else i), float(i))
            live.wait()
            page.wait_for_selector(f"#shots li[data-number='{i}']")
        plan, session = live.stream.planner.plan(), live.stream
        assert {frame.kind for frame in plan.frames} and len(plan.frames) > 1
        last = plan.frames[-1]
        label = f"{'key' if last.kind == KEY else 'inter'} {last.tokens}"
        page.wait_for_function("text => document.querySelector('#shots .kind').textContent === text", arg=label)
        # The newest stands first, and is the large picture.
        assert page.locator("#shots li").first.get_attribute("data-number") == "4"
        assert page.locator("#tokens").inner_text() == f"{last.tokens} tokens"
        assert page.locator("#kind").inner_text() == last.kind
        page.wait_for_function("() => document.querySelector('#newest').naturalWidth > 0")
        # The bar holds one part for each frame, as wide as its tokens.
        parts = page.locator("#budget rect").evaluate_all(
            "all => all.map(r => [r.classList[0], Number(r.getAttribute('x')), Number(r.getAttribute('width'))])"
        )
        places, x = [], 0
        for frame in plan.frames:
            places.append([frame.kind, x, frame.tokens])
            x += frame.tokens
        assert parts == places and x == session.visual_tokens <= 60
        budget = page.locator("#budget")
        assert budget.get_attribute("viewBox") == "0 0 60 1" and budget.get_attribute("aria-valuenow") == str(x)
        assert page.locator("#used").inner_text() == str(x) and page.locator("#limit").inner_text() == "60"
        assert page.locator("#held").inner_text() == f"{session.cache.length:,}"
        assert page.locator("#phase").inner_text() == "live" and "street.mp4" in page.title()
        assert page.locator("#zoom rect").count() == 0
        wanted = words(live, "What is it?")
        page.wait_for_selector("#answers li:not(.going)")
        page.fill("#prompt", "What is it?")
        page.press("#prompt", "Enter")
        page.wait_for_function("() => document.querySelectorAll('#answers li:not(.going)').length === 2")
        assert page.locator("#answers .text").all_inner_texts() == [wanted, wanted]
        assert "first token after" in page.locator("#answers .cost").last.inner_text()
        assert page.locator("#spoken").text_content() == wanted and page.input_value("#prompt") == ""
        # Text is text, whatever it looks like; and a page that comes later sees all of it.
        tag = "<b id=injected>What</b>"
        other = page.context.browser.new_page()
        other.goto(server.address)
        other.wait_for_function("() => document.querySelectorAll('#answers li:not(.going)').length === 2")
        page.fill("#prompt", tag)
        page.click("#ask button")
        for one in (page, other):
            one.wait_for_function("() => document.querySelectorAll('#answers li:not(.going)').length === 3")
            assert one.locator("#answers .question span").nth(4).inner_text() == tag
            assert one.locator("#injected").count() == 0 and one.locator("#shots li").count() >= 5
        other.close()
        server.view.phase = "ended"
        page.wait_for_function("() => document.querySelector('#phase').textContent === 'source ended'")
        page.goto("about:blank")


def test_a_page_shows_errors_drops_and_decisions(page: Any) -> None:
    with served(2000, target=LatencyTarget(500.0, 400.0), cost=CHEAP) as (live, _, server):
        page.goto(server.address)
        live.push(picture(0, 280, 280), 0.0)
        live.wait()
        control = live.control
        assert control is not None
        control.decisions.append(Decision(7.0, Setting(200, 100), Setting(96, 25, 2), 321.0, 456.0, "because"))
        live.stats.dropped["queue"] += 3
        page.wait_for_selector("#decisions li")
        assert page.locator("#decisions li").inner_text().split("\n")[0:2] == [
            "7.0 s",
            "frame 100 → 25, budget 200 → 96, every frame → 1 frame in 2",
        ]
        page.wait_for_function("() => document.querySelectorAll('#zoom rect').length === 1")
        assert page.locator("#zoom").is_visible() and page.locator("#enlarged").is_visible()
        assert "because: observed 456 ms, predicted 321 ms" in page.locator("#decisions").inner_text()
        chosen = control.setting
        assert page.locator("#setting").inner_text().split("\n") == [
            f"frame ≤ {chosen.frame_tokens}",
            f"budget {chosen.budget:,}",
            "every frame",
        ]
        assert "target 400 ms" in page.locator("#age-target").inner_text()
        assert page.locator("#first-target").inner_text() == "target 500 ms"
        page.wait_for_function("() => document.querySelector('#counts').textContent.includes('queue was full3')")
        page.fill("#prompt", "word " * 600)
        page.click("#ask button")
        page.wait_for_selector("#answers .text.wrong")
        assert "shorten the question" in page.locator("#answers .text.wrong").inner_text()
        page.goto("about:blank")


def test_a_page_says_when_the_program_has_gone(_browser: Any) -> None:
    # Not the page fixture: a browser counts a server that has gone as an error.
    page = _browser.new_page()
    with served() as (live, _, server):
        live.push(picture(0), 0.0)
        live.wait()
        page.goto(server.address)
        page.wait_for_selector("#shots li")
    page.wait_for_function("() => document.querySelector('#phase').textContent === 'closed'")
    assert "has ended" in page.locator("#notice").inner_text() and page.locator("#ask button").is_disabled()
    page.close()


# Who may ask, and what happens then.


def test_only_this_machine_and_this_page_may_ask() -> None:
    with served() as (live, engine, server):
        live.push(picture(0), 0.0)
        live.wait()
        own, good = server.address, {"prompt": "What is it?"}
        assert send(server, "GET", "/")[0] == 200
        assert server._bound.getsockname()[0] == "127.0.0.1"
        for path in ("/", "/events", "/frames/0.jpg"):
            assert send(server, "GET", path, Host="evil.example")[0] == 400
        for foreign in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
            assert send(server, "GET", "/events", **foreign)[0] == 403
            assert send(server, "GET", "/frames/0.jpg", **foreign)[0] == 404
        asked = server.view.answers()[0]
        for headers in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}):
            assert send(server, "POST", "/ask", good, **headers)[0] == 403
        assert send(server, "POST", "/ask", good, Origin=own, Host="evil.example")[0] == 400
        assert send(server, "POST", "/ask", good, Origin=own, Sec_Fetch_Site="same-site")[0] == 403
        for wrong in (b"{", b"[]", b'{"text": 1}', b"\xff", {"prompt": " "}, {"prompt": "x" * (PROMPT + 1)}):
            assert send(server, "POST", "/ask", wrong, Origin=own)[0] == 400
        assert send(server, "POST", "/ask", b"x" * (BODY + 1), Origin=own)[0] == 413
        assert send(server, "GET", "/ask")[0] == 405 and send(server, "GET", "/frames/77.jpg")[0] == 404
        assert server.view.answers()[0] == asked
        held(live, engine)
        tunnel = {"Origin": "http://localhost:9000", "Host": "localhost:9000"}
        assert send(server, "POST", "/ask", good, **tunnel) == (202, b"{}")
        status, said = send(server, "POST", "/ask", good, Origin=own)
        assert status == 409 and "another question" in json.loads(said)["error"]
        engine.gate.set()
        live.wait()
        live.close()
        status, said = send(server, "POST", "/ask", good, Origin=own)
        assert status == 409 and "was closed" in json.loads(said)["error"]


def test_an_error_of_a_frame_is_noted_where_a_question_meets_it() -> None:
    engine, view, notes = GatedEngine(), View(), list[str]()
    with (
        Live(Stream(engine, tiny_tokenizer()), observer=view) as live,
        ViewServer(view, live, socket_at(0), note=notes.append) as server,
    ):
        held(live, engine)
        engine.broken = ZeroDivisionError("inside")
        engine.gate.set()
        with live._changed:
            assert live._changed.wait_for(lambda: live._error is not None, 20)
        status, said = send(server, "POST", "/ask", {"prompt": "What?"}, Origin=server.address)
        assert status == 500 and "inside" in json.loads(said)["error"] and "inside" in notes[0]


def test_a_page_that_does_not_read_holds_nothing_up() -> None:
    before = set(threading.enumerate())
    with served() as (live, _, server):
        port = int(server.address.rsplit(":", 1)[1])
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            silent.connect(("127.0.0.1", port))
            silent.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            seen = []
            for i, (_, state) in enumerate(one for one in events(server.address) if one[0] == "state"):
                seen.append(state["frames_processed"])
                if i == 12:
                    break
                live.push(picture(i % 4), float(i))
                live.wait()
            assert seen[-1] > seen[0] and live.stats.processed == 12
            server.close()
        assert not server._thread.is_alive()
    assert set(threading.enumerate()) <= before


def test_more_pages_than_there_is_room_for() -> None:
    with served(limits=ViewLimits(pages=1)) as (_, _, server):
        first = events(server.address)
        next(first)
        status, said = send(server, "GET", "/events")
        assert status == 503 and "close one" in json.loads(said)["error"]
        first.close()


# The command.


def test_a_port_that_is_taken_and_packages_that_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket_at(0) as bound:
        port = str(bound.getsockname()[1])
        with pytest.raises(InputError, match=f"port {port} .* --port N"):
            socket_at(int(port))
        command = [sys.executable, "-m", "penguin_edge", "stream", "tiny", "--source", str(Path(__file__).parents[2])]
        done = subprocess.run([*command, "--ui", "--port", port], capture_output=True, text=True)
        assert done.returncode == 1 and f"port {port} of 127.0.0.1 cannot be used" in done.stderr
        assert "Traceback" not in done.stderr
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(TargetUnavailable, match=r"pip install 'penguin-edge\[ui\]'"):
        socket_at(0)


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    command = [sys.executable, "-m", "penguin_edge", "stream", "tiny", "--source", str(tmp_path), "--fps", "3"]
    command += ["--fast", "--ui", "--port", "0", "--prompt", "What is it?", "--max-new-tokens", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        try:
            said = iter(running.stderr.readline, "")
            address = next(line.split()[-1] for line in said if line.startswith("live view: "))
            stays = next(line for line in said if "Ctrl-C" in line)
            assert address in stays
            stream = events(address)
            state = next(data for name, data in stream if name == "state" and data["phase"] == "ended")
            assert state["frames_processed"] == 4 and state["visual_tokens"] <= state["budget"]
            host = address.removeprefix("http://")
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.request("POST", "/ask", b'{"prompt": "What is it?"}', {"Origin": address})
            assert connection.getresponse().status == 202
            texts: dict[int, str] = {}
            for name, data in stream:
                texts |= {one["number"]: one["text"] for one in data if one["done"]} if name == "answers" else {}
                if len(texts) == 2:
                    break
            # Asked by the command and in the page, about the same frames.
            assert texts[1] == texts[2]
            running.send_signal(signal.SIGINT)
            rest = "".join(said)
            assert running.wait(60) == 130
            assert "Traceback" not in rest and "4 of 4 frames" in rest
            assert running.stdout.read().strip().endswith(texts[1].strip())
        finally:
            running.kill()
