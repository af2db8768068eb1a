"""Death at every step of the protocol, at its first, second and third passage: the client ends with the same answer.

One pod and one worker stay; beside them, for each point, three processes start that will kill themselves there. The
processes are real, and so is their death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from deploy.redis import RedisServer
from shared import connection
from shared.queue import Queue
from shared.settings import Settings
from tests.chaos.asks import RAMBLE, Ask, count
from tests.chaos.checker import Answer, check
from tests.chaos.clients import Clients
from tests.chaos.crash_points import POINTS, Point
from tests.chaos.remains import leftovers, logs
from tests.chaos.run import answers
from tests.chaos.stage import SETTINGS
from tests.conftest import short_folder
from tests.nursery import Nursery
from tests.system import MODEL, Process, System, free_port

CLIENTS = 4
DEATH_S = 30.0                                          # for all three to come to their point
PATIENCE_S = 90.0                                       # of a client, for one answer
STIR_S = 0.05                                           # between two rounds of hand-overs, where a point needs them
MAX_STIRRED = 3                                         # hand-overs of one stream
QUICK: dict[str, Any] = {"announce_s": 0.3, "announce_ttl_s": 3.0, "reader_ttl_s": 3.0, "disconnect_grace_s": 2.0}
ASKS = (count(3, 14), count(1, 12, n=2),
        Ask("sampled", "Count from 1 to 60.", RAMBLE | {"seed": 11, "max_tokens": 50}),
        Ask("stopped", "Count from 1 to 100.", {"temperature": 0, "stop": [", 9"]}, "1, 2, 3, 4, 5, 6, 7, 8"))


@pytest.fixture(scope="module")
def cast(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A pod and a worker that nothing happens to."""
    server = RedisServer(short_folder(tmp_path_factory)).start()
    system = System(tmp_path_factory.mktemp("cast"), server.url, start=nursery.start, **SETTINGS | QUICK)
    system.start_all(1)
    yield system
    system.stop()
    server.stop()


@pytest.fixture(scope="module")
def uninterrupted(cast: System) -> dict[str, Answer]:
    return asyncio.run(answers([cast.url], ASKS))


@pytest.mark.parametrize("point", [p for p in POINTS.values() if p.room == "worker"], ids=lambda point: point.name)
async def test_a_worker_may_die_there(point: Point, cast: System, uninterrupted: dict[str, Answer]) -> None:
    doomed = [cast.start_worker(test_crash=f"{point.name}:{passage}") for passage in point.passages]
    for worker in doomed:
        cast.workers.remove(worker)
    async with provoked(point, cast, doomed), Clients([cast.url], MODEL, PATIENCE_S) as clients:
        await ask_until_dead(clients, doomed)
    await judge(clients, cast, doomed, uninterrupted)


@pytest.mark.parametrize("point", [p for p in POINTS.values() if p.room == "api"], ids=lambda point: point.name)
async def test_a_pod_may_die_there(point: Point, cast: System, uninterrupted: dict[str, Answer]) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in point.passages]
    doomed = [cast.begin_pod(url, test_crash=f"{point.name}:{passage}")
              for url, passage in zip(urls, point.passages, strict=True)]
    for url in urls:
        del cast.pods[url]
    everywhere = list(itertools.chain.from_iterable((url, cast.url) for url in urls))
    async with visited(point, urls), Clients(everywhere, MODEL, PATIENCE_S) as clients:
        await ask_until_dead(clients, doomed)
    await judge(clients, cast, doomed, uninterrupted)


async def ask_until_dead(clients: Clients, doomed: list[Process]) -> None:
    give_up_s = time.monotonic() + DEATH_S

    def some_live() -> bool:
        return any(process.popen.poll() is None for process in doomed) and time.monotonic() < give_up_s

    await clients.run(itertools.cycle(ASKS), CLIENTS, some_live)


async def judge(clients: Clients, cast: System, doomed: list[Process], uninterrupted: dict[str, Answer]) -> None:
    """The processes died at the point, and no client noticed."""
    codes = [process.popen.poll() for process in doomed]
    for process in doomed:
        process.popen.kill()
    assert codes == [-signal.SIGKILL] * len(doomed), [process.said for process in doomed]
    left = await leftovers(cast.redis, cast.shard, [worker.popen.pid for worker in cast.workers])
    found = check(clients.transcripts, logs(cast.redis, cast.shard), uninterrupted, left)
    cast.redis.delete(*(cast.shard.key(f"out:{transcript.id}") for transcript in clients.transcripts))
    assert found == []


# ── what brings a process to its point, where asking alone does not ──

@asynccontextmanager
async def provoked(point: Point, cast: System, doomed: list[Process]) -> AsyncIterator[None]:
    """Streams that change workers, for points of continuing; a SIGTERM, for points of leaving."""
    deeds = {"read of a log that goes on": stir(cast), "release": end_when_begun(doomed)}
    deed = next((deeds.pop(name) for name in list(deeds) if point.name.startswith(name)), None)
    for other in deeds.values():
        other.close()
    async with beside(deed):
        yield


@asynccontextmanager
async def visited(point: Point, urls: list[str]) -> AsyncIterator[None]:
    """Readers who leave or cancel, for the points where a process handles that."""
    name = point.name.partition(":")[0]
    async with beside(visit(urls, cancels=name == "cancel") if name in ("leave", "cancel") else None):
        yield


@asynccontextmanager
async def beside(deed: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(deed)] if deed else []
    yield
    await connection.end(tasks)
    assert all(task.cancelled() or not task.exception() for task in tasks), tasks


async def stir(cast: System) -> None:
    """Takes each stream from its worker, a few times, as when that leaves."""
    redis: Any = connection.connect(cast.redis_url)
    queue, times = Queue(redis, cast.shard, Settings()), Counter[str]()
    while True:
        await asyncio.sleep(STIR_S)
        for name in await redis.zrange(queue.shard.key("leases"), 0, -1):
            for job in await redis.smembers(queue.shard.key(f"held:{name.decode()}")):
                job_id = job.decode()
                begun = (await queue.read(job_id))[-1].position > 0
                if begun and times[job_id] < MAX_STIRRED:
                    times[job_id] += 1
                    await queue.release(name.decode(), [job_id])


async def end_when_begun(doomed: list[Process]) -> None:
    for process in doomed:
        while "serves" not in process.said:
            await asyncio.sleep(0.02)
        process.send(signal.SIGTERM)


async def visit(urls: list[str], *, cancels: bool) -> None:
    """Short visits, one after the other, to each pod that is still alive."""
    body = ASKS[2].body(MODEL)
    async with httpx.AsyncClient(timeout=5.0) as http:
        for url in itertools.cycle(urls):
            await asyncio.sleep(0.02)
            with contextlib.suppress(httpx.HTTPError):
                async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    if cancels and response.is_success:
                        completion_id = response.headers["x-baton-completion-id"]
                        await http.post(f"{url}/v1/chat/completions/{completion_id}/cancel")
