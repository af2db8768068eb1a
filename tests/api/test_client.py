"""The transport for clients: whatever is cut, and wherever, the application reads what it would have read."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from api import client as module
from api.client import MAX_FORGOTTEN_ROUNDS, ResumingTransport
from shared.errors import (
    APIError,
    BadRequest,
    CompletionNotFound,
    Conflict,
    Draining,
    Overloaded,
    PositionNotReached,
    StreamLost,
    Unauthorized,
    Unavailable,
)
from tests.api.conftest import KEYS
from tests.api.scripted import WAIT_S, ScriptedWorker, ask, until
from tests.api.test_http import CHAT, DONE
from tests.api.test_resume import OPTIONS, parts, say_all
from tests.switch import switch
from tests.system import System

KEY = {"authorization": f"Bearer {KEYS[0]}"}
BOTH = pytest.mark.parametrize("library", [pytest.param(library, id=library.__name__) for library in (httpx, httpx2)])
EACH = pytest.mark.parametrize("is_async", [pytest.param(False, id="sync"), pytest.param(True, id="async")])


class Application:
    """What posts and reads to the end, synchronously or not: it sees what the transport lets it see."""

    def __init__(self, library: Any, is_async: bool, url: str, **options: Any) -> None:
        self.is_async = is_async
        make = library.AsyncClient if is_async else library.Client
        self.client = make(base_url=url, timeout=WAIT_S, transport=ResumingTransport(**options), headers=KEY)

    async def post(self, body: Any, **headers: str) -> Any:
        """The response, its body read."""
        if self.is_async:
            return await self.client.post(CHAT, json=body, headers=headers)
        return await asyncio.to_thread(self.client.post, CHAT, json=body, headers=headers)

    async def close(self) -> None:
        await self.client.aclose() if self.is_async else self.client.close()


@asynccontextmanager
async def application(library: Any, is_async: bool, url: str, **options: Any) -> AsyncIterator[Application]:
    it = Application(library, is_async, url, **options)
    try:
        yield it
    finally:
        await it.close()


@pytest.fixture
def worker(pair_worker: ScriptedWorker) -> ScriptedWorker:
    return pair_worker


# ── pods behind a switch ──


@BOTH
@EACH
async def test_wherever_a_stream_is_cut_the_application_reads_the_same_bytes(
        pair: System, pods: list[httpx.AsyncClient], worker: ScriptedWorker, library: Any, is_async: bool) -> None:
    """Before the first event, after each, and inside: what came half is not seen, and nothing twice."""
    body, key = ask(worker.model, stream=True, **OPTIONS), {"idempotency-key": worker.model}
    asked = asyncio.create_task(pods[0].post(CHAT, json=body, headers=key))
    await say_all(await worker.claim())
    whole = re.sub(": keep-alive\n", "", (await asked).text)
    num_events = len(parts(whole)) - 1
    async with switch(next(iter(pair.pods))) as door, application(library, is_async, door.url) as app:
        places = [(number, 0) for number in range(num_events)]
        places += [(number, more) for more in (1, 40) for number in range(0, num_events, 7)]
        for num_cuts, (number, more) in enumerate(places, 1):
            door.cut_after(number, more)
            assert (await app.post(body, **key)).text == whole, f"cut {more} bytes after event {number}"
            assert door.num_cuts == num_cuts
    assert (await worker.queue.counters())["submitted"] == 1


@BOTH
@EACH
@pytest.mark.parametrize("stream", [True, False])
async def test_a_connection_that_fails_before_the_answer_costs_no_second_generation(
        pair: System, worker: ScriptedWorker, library: Any, is_async: bool, stream: bool) -> None:
    """Refused at first, then cut while the job runs already: it is joined, under the same key."""
    async with switch("http://127.0.0.1:1") as door, application(library, is_async, door.url) as app:
        asked = asyncio.create_task(app.post(ask(worker.model, stream=stream)))
        await until("two tries were refused", lambda: door.num_connections >= 2)
        door.target = next(iter(pair.pods))
        script = await worker.claim()
        door.cut_now()
        await until("it asks again", lambda: door.num_connections >= 4)
        await script.answer("Hello")
        answer = await asked
        assert door.num_cuts == 1
        assert answer.status_code == 200
        assert answer.text.endswith(DONE) if stream else answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert (await worker.queue.counters())["submitted"] == 1


@EACH
async def test_further_servers_are_tried_in_turn(pair: System, worker: ScriptedWorker, is_async: bool) -> None:
    """The first is no server at all, and the second dies in the middle: no load balancer is needed."""
    first, second = pair.pods
    async with (switch(first) as door,
                application(httpx2, is_async, "http://127.0.0.1:1", origins=[door.url, second]) as app):
        door.cut_after(3)
        asked = asyncio.create_task(app.post(ask(worker.model, stream=True)))
        await (await worker.claim()).answer("Hello")
        assert (await asked).text.count("data: ") == 1 + 5 + 1 + 1
        assert (door.num_cuts, door.num_connections) == (1, 1)


# ── servers by script: when it returns, and when it does not ──


Reply = tuple[int, dict[str, str], str]
HEAD = {"content-type": "text/event-stream", "x-baton-completion-id": "chatcmpl-1"}
BEAT, BEAT_S = ": keep-alive\n", 0.1                    # a heartbeat, and how long it takes to come
ONE, TWO = 'id: 1\ndata: {"n":1}\n\n', 'id: 2\ndata: {"n":2}\n\n'


def event(error: APIError) -> str:
    return f"data: {json.dumps(error.body())}\n\n"


def refusal(error: APIError, **headers: str) -> Reply:
    return error.status, {"content-type": "application/json"} | headers, json.dumps(error.body())


class Server:
    """Gives its replies in order, and remembers what it was asked. A reply without a status cuts the connection."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []
        self.heads: list[str] = []
        self.times_s: list[float] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if length := re.search(r"content-length: (\d+)", head, re.IGNORECASE):
            await reader.readexactly(int(length[1]))
        self.heads.append(head.lower())
        self.asked.append(head.partition(" HTTP")[0])
        self.times_s.append(asyncio.get_running_loop().time())
        status, headers, body = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if status:
            lines = [f"HTTP/1.1 {status} x", "connection: close", *(f"{k}: {v}" for k, v in headers.items())]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            for piece in body.splitlines(keepends=True):
                if piece == BEAT:
                    await asyncio.sleep(BEAT_S)
                writer.write(piece.encode())
        writer.close()


@asynccontextmanager
async def scripted(is_async: bool, *replies: Reply, **options: Any) -> AsyncIterator[tuple[Server, Application]]:
    server = Server(*replies)
    async with (await asyncio.start_server(server, "127.0.0.1", 0) as listening,
                application(httpx2, is_async, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}",
                            **options) as app):
        yield server, app


BODY = ask("m", stream=True)
GET = f"GET {CHAT}/chatcmpl-1?stream=true&starting_after="


@EACH
async def test_an_end_that_is_none_is_returned_to(is_async: bool) -> None:
    """Clean, without [DONE]; then said by the server itself, without a position: neither is seen."""
    async with scripted(is_async, (200, HEAD, ONE), (200, HEAD, TWO + event(Draining())),
                        (200, HEAD, DONE)) as (server, app):
        assert (await app.post(BODY)).text == ONE + TWO + DONE
        assert server.asked == [f"POST {CHAT}", f"{GET}1", f"{GET}2"]
        assert all("authorization: bearer sk-first\r\n" in head for head in server.heads)
        assert ["idempotency-key: " in head for head in server.heads] == [True, False, False]


@EACH
async def test_what_may_pass_is_waited_for_as_long_as_it_says(is_async: bool) -> None:
    """A position that is not reached yet, a server that is not ready, a proxy without one."""
    async with scripted(is_async, (200, HEAD, ONE), refusal(PositionNotReached(), **{"retry-after-ms": "300"}),
                        refusal(Unavailable(), **{"retry-after": "0.4"}), (502, {}, "<html>"), (0, {}, ""),
                        (200, HEAD, DONE)) as (server, app):
        assert (await app.post(BODY)).text == ONE + DONE
        assert server.asked[1:] == [f"{GET}1"] * 5
        pauses_s = [later - sooner for sooner, later in zip(server.times_s[1:], server.times_s[2:], strict=False)]
        assert pauses_s[0] >= 0.3
        assert pauses_s[1] >= 0.4


@EACH
@pytest.mark.parametrize("error", [StreamLost(), Unauthorized(), Conflict()])
async def test_what_does_not_pass_is_told_to_the_application(is_async: bool, error: APIError) -> None:
    """The server's own error, as the last event: no try follows."""
    async with scripted(is_async, (200, HEAD, ONE), refusal(error)) as (server, app):
        assert (await app.post(BODY)).text == ONE + event(error)
        assert len(server.asked) == 2
    async with scripted(is_async, (200, HEAD, ONE + event(StreamLost()))) as (server, app):
        assert (await app.post(BODY)).text == ONE + event(StreamLost()), "an error that is final is an end"
        assert len(server.asked) == 1


@EACH
async def test_a_completion_that_is_unknown_may_be_put_back(is_async: bool) -> None:
    """A Redis that lost its data knows it again once whoever held it has said so; who waits in vain is told."""
    unknown = refusal(CompletionNotFound())
    async with scripted(is_async, (200, HEAD, ONE), unknown, unknown, (200, HEAD, DONE)) as (server, app):
        assert (await app.post(BODY)).text == ONE + DONE
    async with scripted(is_async, (200, HEAD, ONE), unknown) as (server, app):
        assert (await app.post(BODY)).text == ONE + event(CompletionNotFound())
        assert server.asked[1:] == [f"{GET}1"] * (MAX_FORGOTTEN_ROUNDS - 1), "the cut was the first try"


@EACH
@pytest.mark.parametrize("error", [BadRequest(), Unauthorized(), Overloaded(), Unavailable(), APIError()])
async def test_a_plain_refusal_is_left_to_the_application(is_async: bool, error: APIError) -> None:
    async with scripted(is_async, refusal(error)) as (server, app):
        answer = await app.post(BODY)
        assert (answer.status_code, answer.json()) == (error.status, error.body())
        assert len(server.asked) == 1


@EACH
async def test_a_server_that_goes_sends_a_whole_answer_elsewhere(is_async: bool) -> None:
    """It had taken the request and says that it stops: the same is asked again, under the same key."""
    async with scripted(is_async, refusal(Draining()), (503, {}, "no pod"), (200, {}, '{"n":1}')) as (server, app):
        answer = await app.post(ask("m"), **{"idempotency-key": "mine"})
        assert answer.json() == {"n": 1}
        assert server.asked == [f"POST {CHAT}"] * 3
        assert all("idempotency-key: mine\r\n" in head for head in server.heads)


@EACH
async def test_patience_ends(is_async: bool) -> None:
    """And what the last try met is the application's."""
    async with scripted(is_async, (200, HEAD, ONE), (0, {}, ""), patience_s=0.5) as (server, app):
        with pytest.raises(httpx2.RemoteProtocolError):
            await app.post(BODY)
        assert 3 < len(server.asked) < 20
    async with scripted(is_async, (200, HEAD, ONE), refusal(Unavailable()), patience_s=0.5) as (_, app):
        assert (await app.post(BODY)).text == ONE + event(Unavailable())


@EACH
@pytest.mark.parametrize("body", ["", ONE[:9], event(Draining()), BEAT], ids=["nothing", "half", "draining", "a beat"])
async def test_a_server_that_sends_no_event_is_tried_no_faster_and_no_longer_than_one_that_refuses(
        is_async: bool, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRIES", 8)
    async with scripted(is_async, (200, HEAD, ONE), (200, HEAD, body), patience_s=2.0) as (server, app):
        answer = await asyncio.wait_for(app.post(BODY), WAIT_S)
        assert answer.text.replace(BEAT, "").startswith(ONE + 'data: {"error":{"message":"The stream was cut."')
        assert 2 < len(server.asked) <= 8
        assert server.asked[1:] == [f"{GET}1"] * (len(server.asked) - 1)


@EACH
async def test_patience_begins_with_a_failure_however_long_nothing_was_said(is_async: bool) -> None:
    """A stream may wait for long, with heartbeats; so may a whole answer, without them."""
    silence = BEAT * 15
    async with scripted(is_async, (200, HEAD, silence), refusal(Unavailable()), (200, HEAD, silence),
                        refusal(Unavailable()), (200, HEAD, ONE + DONE), patience_s=1.2) as (server, app):
        assert (await app.post(BODY)).text.replace(BEAT, "") == ONE + DONE
        assert len(server.asked) == 5
    head = {"content-type": "application/json", "content-length": "999"}
    async with scripted(is_async, (200, head, silence), refusal(Draining()), (200, {}, "{}"),
                        patience_s=1.2) as (server, app):
        assert (await app.post(ask("m"))).json() == {}
        assert len(server.asked) == 3


@EACH
async def test_what_a_gateway_says_in_place_of_a_server_passes(is_async: bool) -> None:
    """Before the answer has begun the request is sent again, under the same key."""
    said: list[Reply] = [(status, {}, "<html>") for status in (504, 500, 429, 408)]
    async with scripted(is_async, (504, {}, ""), (200, HEAD, ONE), *said, (200, HEAD, DONE)) as (server, app):
        assert (await app.post(BODY)).text == ONE + DONE
        assert server.asked == [f"POST {CHAT}"] * 2 + [f"{GET}1"] * 5
        keys = [re.search(r"idempotency-key: (\w+)", head) for head in server.heads[:2]]
        assert keys[0] and keys[1] and keys[0][1] == keys[1][1]
    for status in (500, 429):
        async with scripted(is_async, (status, {}, "<html>")) as (server, app):
            assert (await app.post(BODY)).status_code == status, "the SDK's own retries do"
            assert len(server.asked) == 1


@EACH
async def test_the_host_and_the_query_of_a_client_are_kept(is_async: bool) -> None:
    async with scripted(is_async, (200, HEAD, ONE), (200, HEAD, DONE)) as (server, app):
        app.client.params = {"api-version": "7"}
        assert (await app.post(BODY, host="api.internal")).text == ONE + DONE
        assert all("host: api.internal\r\n" in head for head in server.heads)
        assert server.asked[1] == f"GET {CHAT}/chatcmpl-1?api-version=7&stream=true&starting_after=1"


@BOTH
async def test_many_streams_run_at_once(library: Any) -> None:
    """As many as with a client of the SDK's: the transports of httpx would let a hundred."""
    number, all_here = 120, asyncio.Event()
    num_open = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_open
        await reader.readuntil(b"\r\n\r\n")
        num_open += 1
        if num_open == number:
            all_here.set()
        await all_here.wait()
        head = "".join(f"{name}: {value}\r\n" for name, value in HEAD.items())
        writer.write(f"HTTP/1.1 200 x\r\nconnection: close\r\n{head}\r\n{DONE}".encode())
        writer.close()

    async with (await asyncio.start_server(serve, "127.0.0.1", 0, backlog=number) as listening,
                application(library, True, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}") as app):
        answers = await asyncio.wait_for(asyncio.gather(*(app.post(BODY) for _ in range(number))), WAIT_S)
    assert {answer.text for answer in answers} == {DONE}


@EACH
async def test_other_requests_and_other_servers_pass_untouched(is_async: bool) -> None:
    """A stream that names no completion is another's: cut, it is an error, as without this transport."""
    cut = {"content-type": "text/event-stream", "content-length": "99"}
    async with scripted(is_async, (200, cut, ONE)) as (server, app):
        with pytest.raises(httpx2.RemoteProtocolError):
            await app.post(BODY)
        assert len(server.asked) == 1
    async with scripted(is_async, (0, {}, "")) as (server, app):
        get = app.client.get("/v1/models") if is_async else asyncio.to_thread(app.client.get, "/v1/models")
        with pytest.raises(httpx2.RemoteProtocolError):
            await get
        assert len(server.asked) == 1
        assert "idempotency-key" not in server.heads[0]


def test_it_is_one_file_that_needs_nothing(tmp_path: Path) -> None:
    """Copied elsewhere it is imported with the standard library alone."""
    shutil.copy(module.__file__, tmp_path / "resuming.py")
    program = "import sys, resuming; print(*sorted(set(sys.modules) - set(sys.stdlib_module_names)))"
    place = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; "
    said = subprocess.run([sys.executable, "-I", "-S", "-c", place + program], check=True, capture_output=True,
                          text=True).stdout
    assert not [name for name in said.split() if name.partition(".")[0] in ("httpx", "httpx2", "openai", "shared")]
    assert "resuming" in said
