"""nginx with the project's own configuration, in front of pods that say when they speak."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.wire.message_fold import error_body
from shared.errors import BodyTooLarge, Unavailable
from tests.tools import require_tool

CONF = Path(__file__).parents[2] / "deploy" / "proxy" / "nginx.conf"
PATIENCE_S = 20.0                                       # for a condition; no test waits for time to pass
CHAT = "/v1/chat/completions"
FIRST, SECOND = 'id: 1\ndata: {"n":1}\n\n', 'id: 2\ndata: {"n":2}\n\n'

Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]


@dataclass
class Pod:
    """An API pod by script: it sends the first event, and the second when the gate opens."""

    asks_not_to_buffer: bool = True
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)   # the client was seen to leave
    seen: list[Message] = field(default_factory=list)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        while (await receive()).get("more_body"):
            pass
        head = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache, no-transform"),
                (b"x-request-id", b"req-1")]
        head += [(b"x-accel-buffering", b"no")] * self.asks_not_to_buffer
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": FIRST.encode(), "more_body": True})
        leaving = asyncio.create_task(receive())        # answers when the client is gone, not before
        opening = asyncio.create_task(self.gate.wait())
        await asyncio.wait((leaving, opening), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            opening.cancel()
            self.left.set()
            return
        leaving.cancel()
        await send({"type": "http.response.body", "body": SECOND.encode(), "more_body": False})


@dataclass
class DyingPod:
    """Reads a whole request and dies without a word."""

    requests: list[bytes] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        self.requests.append(head + await reader.readexactly(int(length[1]) if length else 0))
        writer.transport.abort()


# ── what runs ──

@asynccontextmanager
async def serving(pod: Pod) -> AsyncIterator[int]:
    """The port of a pod."""
    server = uvicorn.Server(uvicorn.Config(pod, port=0, lifespan="off", proxy_headers=False, log_level="error"))
    socket = server.config.bind_socket()
    task = asyncio.create_task(server.serve(sockets=[socket]))
    try:
        yield socket.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


@asynccontextmanager
async def dying(pod: DyingPod) -> AsyncIterator[int]:
    server = await asyncio.start_server(pod, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for a socket's path; pytest's own are long."""
    path = Path(tempfile.mkdtemp(prefix="proxy"))
    yield path
    shutil.rmtree(path)


def render(folder: Path, *ports: int) -> Path:
    """The project's configuration with these pods for upstreams and a socket in `folder` for a door."""
    text = CONF.read_text()
    pods = "\n".join(f"server 127.0.0.1:{port} max_fails=3 fail_timeout=2s;" for port in ports)
    for old, new in ((r"/tmp/", f"{folder}/"), (r"/dev/std(err|out)", f"{folder}/log"),
                     (r"server api:30000 [^;]*;", pods), (r"listen 30000;", f"listen unix:{folder}/door;")):
        text, count = re.subn(old, new, text)
        assert count, f"nginx.conf no longer has {old}: mend this test"
    rendered = folder / "nginx.conf"
    rendered.write_text(text)
    return rendered


def nginx_command(conf: Path) -> list[str]:
    # Started by root, the processes behind the door would become `nobody`, whom a test's folder keeps out.
    user = "user root; " if os.geteuid() == 0 else ""
    return [require_tool("nginx"), "-e", str(conf.parent / "log"), "-p", str(conf.parent), "-c", str(conf),
            "-g", user + "daemon off;"]


@asynccontextmanager
async def proxy(folder: Path, *ports: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose every request goes through nginx to the pods at these ports."""
    conf = render(folder, *ports)
    process = subprocess.Popen(nginx_command(conf))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (folder / "door").exists():
                assert process.poll() is None, (folder / "log").read_text()
                await asyncio.sleep(0.01)
        transport = httpx.AsyncHTTPTransport(uds=str(folder / "door"))
        async with httpx.AsyncClient(transport=transport, base_url="http://baton", timeout=PATIENCE_S) as client:
            yield client
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


# ── the promises ──

def test_nginx_accepts_the_configuration(folder: Path) -> None:
    checked = subprocess.run([*nginx_command(render(folder, 1, 2)), "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr + (folder / "log").read_text()


@pytest.mark.parametrize("asks", [True, False], ids=["pod-asks", "pod-does-not-ask"])
async def test_an_event_arrives_while_the_next_is_held_back(folder: Path, asks: bool) -> None:
    """The pod waits at its gate, which opens only after the client has read the first event."""
    pod = Pod(asks_not_to_buffer=asks)
    async with serving(pod) as port, proxy(folder, port) as client:
        async with client.stream("POST", CHAT, json={}, headers={"accept-encoding": "gzip"}) as answer:
            pieces = answer.aiter_text()
            assert await anext(pieces) == FIRST
            pod.gate.set()
            assert await anext(pieces) == SECOND
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers.get("x-accel-buffering") == ("no" if asks else None), "a second proxy reads it too"
        assert answer.headers["x-request-id"] == "req-1"
        assert "content-encoding" not in answer.headers


async def test_a_client_that_leaves_is_seen_to_leave(folder: Path) -> None:
    pod = Pod()
    async with serving(pod) as port, proxy(folder, port) as client:
        async with client.stream("POST", CHAT, json={}) as answer:
            assert await anext(answer.aiter_text()) == FIRST
        async with asyncio.timeout(PATIENCE_S):
            await pod.left.wait()


async def test_a_post_that_was_sent_is_never_sent_again(folder: Path) -> None:
    """Two pods that die with the request in hand: one of them sees it, the other nothing."""
    one, two = DyingPod(), DyingPod()
    async with dying(one) as first, dying(two) as second, proxy(folder, first, second) as client:
        answer = await client.post(CHAT, json={"seed": 1})
    assert len(one.requests) + len(two.requests) == 1
    assert (answer.status_code, answer.json()) == (503, Unavailable().body())
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-request-id"]


async def test_a_post_that_nobody_took_goes_to_the_pod_that_lives(folder: Path) -> None:
    """A pod whose port is closed saw nothing, so asking another is safe. Tried often: either may be first in turn."""
    pod = Pod()
    pod.gate.set()
    async with dying(DyingPod()) as closed:
        pass
    async with serving(pod) as port, proxy(folder, closed, port) as client:
        answers = [await client.post(CHAT, json={}) for _ in range(4)]
    assert [answer.text for answer in answers] == [FIRST + SECOND] * 4
    assert len(pod.seen) == 4


async def test_a_read_may_be_asked_of_another_pod(folder: Path) -> None:
    """Resuming a stream is a GET: it costs nothing to ask twice."""
    pod, dead = Pod(), DyingPod()
    pod.gate.set()
    async with serving(pod) as port, dying(dead) as deadly, proxy(folder, deadly, port) as client:
        answers = [await client.get(f"{CHAT}/chatcmpl-1?stream=true") for _ in range(2)]
    assert [answer.text for answer in answers] == [FIRST + SECOND] * 2
    assert dead.requests, "the dying pod was never asked: the test shows nothing"


async def test_what_a_client_says_of_its_position_and_its_key_reaches_the_pod(folder: Path) -> None:
    pod = Pod()
    pod.gate.set()
    async with serving(pod) as port, proxy(folder, port) as client:
        await client.get(f"{CHAT}/chatcmpl-1?stream=true&starting_after=3", headers={"last-event-id": "7"})
        await client.post(CHAT, json={}, headers={"idempotency-key": "k"})
    get, post = pod.seen
    assert get["query_string"] == b"stream=true&starting_after=3"
    assert dict(get["headers"])[b"last-event-id"] == b"7"
    assert dict(post["headers"])[b"idempotency-key"] == b"k"


async def test_pods_see_http_1_1_and_the_client_s_address(folder: Path) -> None:
    pod = Pod()
    pod.gate.set()
    async with serving(pod) as port, proxy(folder, port) as client:
        for _ in range(3):
            await client.post(CHAT, json={}, headers={"x-forwarded-for": "10.9.8.7", "authorization": "Bearer k"})
    assert {scope["http_version"] for scope in pod.seen} == {"1.1"}
    assert len({scope["client"] for scope in pod.seen}) == 1, "the connection to the pod was not kept"
    heads = dict(pod.seen[0]["headers"])
    assert heads[b"host"] == b"baton"
    assert heads[b"authorization"] == b"Bearer k"
    assert b"10.9.8.7" not in heads[b"x-forwarded-for"]


async def test_a_body_beyond_the_limit_is_refused_in_openai_s_words(folder: Path) -> None:
    pod = Pod()
    async with serving(pod) as port, proxy(folder, port) as client:
        answer = await client.post(CHAT, content=b"x" * (10 << 20))
        assert (answer.status_code, answer.json()) == (413, BodyTooLarge().body())
        answer = await client.post("/v1/messages?beta=true", content=b"x" * (10 << 20))
        assert (answer.status_code, answer.json()) == (413, error_body(BodyTooLarge(), answer.headers["x-request-id"]))
        assert not pod.seen
        pod.gate.set()
        assert (await client.post("/v1/files", content=b"x" * (10 << 20))).status_code == 200, "a file may be larger"


async def test_without_any_pod_the_refusal_is_openai_s(folder: Path) -> None:
    async with dying(DyingPod()) as closed:
        pass
    async with proxy(folder, closed) as client:
        answer = await client.get("/v1/models")
        of_anthropic = await client.post("/v1/messages", json={})
    assert (answer.status_code, answer.json()) == (503, Unavailable().body())
    request_id = of_anthropic.headers["x-request-id"]
    assert (of_anthropic.status_code, of_anthropic.json()) == (503, error_body(Unavailable(), request_id))
    for each in (answer, of_anthropic):
        assert each.headers["content-type"] == "application/json"
        assert each.headers["retry-after"] == "1"
