"""A request that kills every worker that begins it: three die, the third with this job alone; no other job fails."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.redis import RedisServer
from tests.chaos.asks import Ask, count
from tests.chaos.checker import check
from tests.chaos.clients import Clients
from tests.chaos.remains import logs
from tests.chaos.stage import SETTINGS
from tests.conftest import short_folder
from tests.nursery import Nursery
from tests.system import MODEL, System

SEED = 666
POISON = Ask("poison", "Count from 1 to 9.", {"seed": SEED})
HEALTHY = (count(1, 20), count(5, 24), count(1, 20, n=2), count(11, 30))
NUM_HEALTHY = 16


@pytest.fixture
def system(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    server = RedisServer(short_folder(tmp_path_factory)).start()
    settings = SETTINGS | {"max_attempts": 3, "test_poison": SEED}
    system = System(tmp_path_factory.mktemp("system"), server.url, start=nursery.start, **settings)
    system.start_all(2)
    yield system
    system.stop()
    server.stop()


async def test_a_poison_request_fails_alone(system: System) -> None:
    deaths: list[set[str]] = []                         # the jobs of each dead worker
    supervisor = asyncio.create_task(supervise(system, deaths))
    async with Clients([system.url], MODEL) as clients:
        healthy = itertools.islice(itertools.cycle(HEALTHY), NUM_HEALTHY)
        poisoned, _ = await asyncio.gather(clients.read(POISON), clients.run(healthy, 6))
    supervisor.cancel()
    assert '"code":"job_failed"' in poisoned.failure
    assert [poisoned.id in held for held in deaths] == [True] * 3
    assert deaths[2] == {poisoned.id}                   # the second may have had jobs beside it that had begun
    (letter,) = system.redis.xrange(system.shard.key("dead"))
    assert (letter[1][b"job"].decode(), letter[1][b"attempts"]) == (poisoned.id, b"3")
    others = [transcript for transcript in clients.transcripts if transcript is not poisoned]
    kept = {completion_id: rows for completion_id, rows in logs(system.redis, system.shard).items()
            if completion_id != poisoned.id}
    assert check(others, kept, {}, {}) == []


async def supervise(system: System, deaths: list[set[str]]) -> None:
    """As a supervisor does: records and replaces each dead worker."""
    redis: Any = system.redis
    while True:
        await asyncio.sleep(0.01)
        for worker in [worker for worker in system.workers if worker.popen.poll() is not None]:
            system.workers.remove(worker)
            names = [name.decode() for name in redis.zrange(system.shard.key("leases"), 0, -1)]
            (name,) = [name for name in names if f"-{worker.popen.pid}-" in name]
            deaths.append({job.decode() for job in redis.smembers(system.shard.key(f"held:{name}"))})
            system.start_worker()
