"""A pod's life: when it is ready, how it stops, and what it does while its Redis is away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.pod import Pod
from deploy.redis import RedisServer
from shared import connection
from shared.keys import Shard
from shared.settings import Settings
from tests.api.conftest import HEARTBEAT_S
from tests.api.scripted import WAIT_S, ScriptedWorker, ask, error_of, say, until_known
from tests.api.test_http import CHAT, DONE, HEARTBEAT, streaming
from tests.system import Process, System

KEY = "sk-canary-5d0c"

Breaker = Callable[[RedisServer], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that may be broken. It syncs at every write: a script, unlike a worker, puts nothing back, and on a busy
    disk a kill loses even what was answered."""
    server = RedisServer(tmp_path_factory.mktemp("r"), options=("--appendfsync", "always")).start()
    yield server
    os.kill(pid(server), signal.SIGCONT)
    server.stop()


@pytest.fixture(scope="module")
def own(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One pod on it, for all that leave it alive."""
    system = System(tmp_path_factory.mktemp("own"), server.url, heartbeat_s=HEARTBEAT_S)
    system.start_pod()
    yield system
    system.stop()


@pytest.fixture
async def own_worker(server: RedisServer) -> AsyncIterator[ScriptedWorker]:
    redis = connection.connect(server.url)
    worker = ScriptedWorker(redis)
    await worker.announce()
    yield worker
    await worker.leave()
    await redis.aclose()


def pid(server: RedisServer) -> int:
    assert server.process
    return server.process.pid


async def becomes(http: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    """The answer of an address, once it has this status."""
    async with asyncio.timeout(WAIT_S):
        while (response := await http.get(path)).status_code != status:
            await asyncio.sleep(0.02)
    return response


async def freeze(server: RedisServer) -> None:
    os.kill(pid(server), signal.SIGSTOP)


async def thaw(server: RedisServer) -> None:
    os.kill(pid(server), signal.SIGCONT)


async def kill(server: RedisServer) -> None:
    server.kill()


async def restart(server: RedisServer) -> None:
    await asyncio.to_thread(server.start)


AWAY = [pytest.param(freeze, thaw, id="frozen"), pytest.param(kill, restart, id="killed")]


@pytest.mark.parametrize(("go", "come_back"), AWAY)
async def test_a_stream_outlives_a_redis_that_goes_away(own: System, server: RedisServer, own_worker: ScriptedWorker,
                                                        go: Breaker, come_back: Breaker) -> None:
    """Ready is false, health stays true, the stream beats on, and in the end nothing is missing."""
    async with httpx.AsyncClient(base_url=own.url, timeout=WAIT_S) as http:
        await until_known(http, own_worker)
        async with streaming(http, own_worker) as body:
            script = await own_worker.claim()
            await script.say(say("Hel"))
            await body.has("Hel")
            await go(server)
            error_of(await becomes(http, "/ready", 503), 503)
            assert (await http.get("/health")).json() == {"status": "ok"}
            assert (await http.get("/metrics")).status_code == 200
            before = body.raw.count(HEARTBEAT)
            await body.has(HEARTBEAT, before + 2)
            await come_back(server)
            await becomes(http, "/ready", 200)
            await script.say(say("lo", end=True))
            await script.end()
            assert await body.text() == "Hello"
        asked = asyncio.create_task(http.post(CHAT, json=ask(own_worker.model)))
        await (await own_worker.claim()).answer("Hi")
        assert (await asked).json()["choices"][0]["message"]["content"] == "Hi"


async def test_a_pod_that_stops_lets_its_streams_end(own: System, own_worker: ScriptedWorker) -> None:
    """SIGTERM: not ready, nothing new is taken, the running stream ends as if nothing were, and then the process."""
    url = own.start_pod(drain_s=60)
    process = own.pods.pop(url)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as http:
        await until_known(http, own_worker)
        async with streaming(http, own_worker) as body:
            script = await own_worker.claim()
            process.send(signal.SIGTERM)
            refused = await becomes(http, "/ready", 503)
            assert refused.headers["connection"] == "close"
            response = await http.post(CHAT, json=ask(own_worker.model))
            assert error_of(response, 503)["code"] == "draining"
            assert int(response.headers["retry-after-ms"]) > 0
            assert (await http.get("/health")).status_code == 200
            await script.answer("Hello")
            assert await body.text() == "Hello"
            assert body.raw.endswith(DONE)
    assert await asyncio.to_thread(process.end) == 0


async def test_a_stream_that_goes_on_too_long_is_told(own: System, own_worker: ScriptedWorker) -> None:
    """At the bound: an error event without a position, a clean end, and no [DONE]. A client that waits gets a 503.

    Their jobs go on for the grace, in which they might return elsewhere, and end when they do not.
    """
    url = own.start_pod(drain_s=0.1)
    process = own.pods.pop(url)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as http:
        await until_known(http, own_worker)
        async with streaming(http, own_worker) as body:
            script = await own_worker.claim()
            await script.say(say("Hel"))
            await body.has("Hel")
            waiting = asyncio.create_task(http.post(CHAT, json=ask(own_worker.model)))
            other = await own_worker.claim()
            process.send(signal.SIGTERM)
            last = (await body.events())[-1]
            assert last["error"]["code"] == "draining"
            assert DONE not in body.raw
            assert "\n\ndata: " in await body.end(), "the error has no id"
            error_of(await waiting, 503)
    assert await script.outcome() == await other.outcome() == "cancelled"
    assert await asyncio.to_thread(process.end) == 0


async def test_a_pod_ends_when_it_is_told_to(server: RedisServer) -> None:
    """Whatever its chores do at that moment: many pods, busy ones, are told at many moments."""

    async def live(lifetime_s: float) -> None:
        pod = Pod(Settings(redis_url=server.url, reap_s=0.05, announce_s=0.05, announce_ttl_s=1))
        async with pod.running():
            await pod.relay.hear(Shard.of("m"))
            await asyncio.sleep(lifetime_s)

    for _ in range(3):
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as pods:
            for number in range(20):
                pods.create_task(live(0.005 * number))


async def deaf() -> None:
    """A chore that loses its first cancellation, as what waits for Redis may."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    await asyncio.Event().wait()


async def broken() -> None:
    raise RuntimeError("a chore has failed")


@pytest.mark.parametrize(("other", "ends_with"), [(broken, ExceptionGroup), (deaf, asyncio.CancelledError)])
async def test_a_pod_ends_with_its_chores(server: RedisServer, monkeypatch: pytest.MonkeyPatch,
                                          other: Callable[[], Awaitable[None]], ends_with: type[Exception]) -> None:
    """When one fails, and when whoever runs it is cancelled, twice: none goes on, whatever it has lost."""
    pod = Pod(Settings(redis_url=server.url))
    monkeypatch.setattr(pod.directory, "run", deaf)
    monkeypatch.setattr(pod.limits, "run", other)

    begun = asyncio.Event()

    async def live() -> None:
        async with pod.running():
            begun.set()
            await asyncio.Event().wait()

    before = asyncio.all_tasks()
    living = asyncio.create_task(live())
    await begun.wait()
    for _ in range(2 if other is deaf else 0):
        living.cancel()
        for _ in range(3):                              # turns, in which it begins to end
            await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(ends_with):
            await living
    assert asyncio.all_tasks() == before


async def test_keys_open_what_is_under_v1_and_stand_in_no_log(own: System, own_worker: ScriptedWorker) -> None:
    url = own.start_pod(api_key=f"{KEY},sk-schlüssel", log_level="debug")
    process = own.pods.pop(url)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as http:
        for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"}):
            for response in (await http.post(CHAT, content=b"not JSON", headers=headers),
                             await http.get("/v1/models", headers=headers),
                             await http.get(f"/v1/models/{own_worker.model}", headers=headers)):
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert KEY not in response.text
        for path in ("/health", "/ready", "/metrics", "/docs"):
            assert (await http.get(path)).status_code == 200
        tenants = set()
        for key in (KEY, "sk-schlüssel"):
            http.headers = httpx.Headers([(b"authorization", f"Bearer {key}".encode())])
            await until_known(http, own_worker)
            asked = asyncio.create_task(http.post(CHAT, json=ask(own_worker.model, "canary-prompt")))
            script = await own_worker.claim()
            tenants.add(script.job.tenant)
            await script.answer("canary-answer")
            assert (await asked).status_code == 200
        assert len(tenants) == 2
        assert not any(KEY in tenant for tenant in tenants)
    assert process.end() == 0
    assert "canary" not in process.said
    assert "schlüssel" not in process.said


def test_a_port_that_is_taken_is_said_in_one_line(own: System, tmp_path: Path) -> None:
    taken = own.url.rpartition(":")[2]
    second = Process(["api", "--port", taken], own.environment, tmp_path / "log")
    assert second.popen.wait(WAIT_S) != 0
    assert "Traceback" not in second.said
    assert taken in second.said
