"""A Redis that is full refuses what needs memory: then nothing goes on, nothing is lost, and what ends makes room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.redis import RedisServer, binaries
from shared import connection
from shared.queue import MAX_REAPED, STALLED_REAPS, Queue, Reaped
from tests.conftest import short_folder
from tests.shared.test_queue import LIKE, claim_one, delta, lose_lease, make_job, make_queue, submit


@pytest.fixture(params=[pytest.param(path, id=path.parent.name) for path in binaries()])
async def queue(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Queue]:
    binary: Path = request.param
    server = RedisServer(short_folder(tmp_path_factory), binary).start()
    redis = connection.connect(server.url)
    yield make_queue(redis, reap_s=0.1)
    await redis.aclose()
    server.stop()


async def fill(queue: Queue) -> None:
    redis: Any = queue.redis
    await redis.config_set("maxmemory", (await redis.info("memory"))["used_memory"] // 2)


async def empty(queue: Queue) -> None:
    redis: Any = queue.redis
    await redis.config_set("maxmemory", 0)


async def test_what_ends_a_job_goes_through(queue: Queue) -> None:
    asked, left, erased = [await submit(queue) for _ in range(3)]
    late = await submit(queue, make_job(deadline_s=0.2))
    await fill(queue)
    assert await queue.cancel(asked.id) and await queue.erase(erased.id)
    assert await queue.leave("pod1", left.id, grace_s=0.1) == "waits"
    await asyncio.sleep(0.3)
    assert await queue.reap() == Reaped(0, 0, 1, 1)
    assert await queue.num_live() == 0
    for job, code in ((asked, "cancelled"), (late, "deadline_exceeded"), (left, "cancelled")):
        assert (await queue.read(job.id))[-1].finish.error == code


async def test_clients_that_leave_are_found_among_many_that_stay(queue: Queue) -> None:
    """Their readers have expired like all others', which nobody could renew."""
    stay = [await submit(queue) for _ in range(MAX_REAPED + 1)]
    left = await submit(queue)
    for job in (*stay, left):
        await queue.redis.zadd(queue.shard.key("readers"), {job.id: 1})
    await fill(queue)
    assert await queue.leave("pod1", left.id, grace_s=0.05) == "waits"
    await asyncio.sleep(0.1)
    assert await queue.reap() == Reaped(0, 0, 0, 1)
    assert await queue.num_live() == len(stay)


async def test_the_rest_waits(queue: Queue) -> None:
    """Nobody can renew a lease, or a reader: so none is late, and no job has cost a worker."""
    running, waiting = await submit(queue), await submit(queue)
    await queue.attend("pod1", [running.id, waiting.id])
    claimed = await claim_one(queue, free=1)
    await queue.reap()
    await fill(queue)
    for call in (submit(queue), queue.claim("w2", 1, 1, **LIKE), queue.publish("w1", [delta(claimed, 1)]),
                 queue.attend("pod1", [running.id])):
        with pytest.raises(connection.UNWRITABLE):
            await call
    await lose_lease(queue)
    assert await queue.reap() == Reaped(0, 0, 0, 0)
    await asyncio.sleep(max(queue.settings.lease_s, STALLED_REAPS * queue.settings.reap_s))
    await empty(queue)
    assert await queue.reap() == Reaped(0, 0, 0, 0), "they have time to renew"
    assert await queue.publish("w1", [delta(claimed, 1)]) == ["ok"]
    assert (await claim_one(queue, "w2")).job == waiting
