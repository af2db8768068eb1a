"""What a power cut takes: the append-only file behind its last fsync, and what stood in it is lost with everysec alone.

A killed Redis loses nothing, for its file outlives it. A power cut is made of a kill and of cutting the file back to
what was on disk for certain: with `always` its size at the last acknowledgement, with `everysec` its size
`MAX_UNSYNCED_S` before the cut.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.redis import RedisServer, binaries
from shared import connection
from shared.job import Job
from shared.queue import Claimed, Queue, Write
from tests.conftest import short_folder
from tests.shared.test_queue import HEADER, claim_one, delta, make_job, make_queue

MAX_UNSYNCED_S = 2.0                                    # Redis' own word for everysec: a second, two at the worst
NUM_ENTRIES = 60


@pytest.fixture(params=[pytest.param((path, policy), id=f"{path.parent.name}-{policy}")
                        for path in binaries() for policy in ("always", "everysec")])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    binary, policy = request.param
    server = RedisServer(short_folder(tmp_path_factory), binary, options=("--appendfsync", policy)).start()
    yield server
    server.stop()


def log_file(server: RedisServer) -> Path:
    """What grows: since Redis 7 the last of several files."""
    return max(server.folder.glob("appendonlydir/*.incr.aof"), default=server.folder / "appendonly.aof")


async def publish_all(server: RedisServer, queue: Queue, pause_s: float
                      ) -> tuple[Claimed, list[Write], list[tuple[float, int]]]:
    """The job, its entries, and how long the file was when each had been acknowledged."""
    job: Job = make_job(created_s=int(time.time()))
    await queue.submit(job, HEADER)
    claimed = await claim_one(queue)
    writes, sizes = [], []
    for k in range(1, NUM_ENTRIES + 1):
        writes.append(delta(claimed, k))
        assert await queue.publish("w1", writes[-1:]) == ["ok"]
        sizes.append((time.monotonic(), log_file(server).stat().st_size))
        await asyncio.sleep(pause_s)
    return claimed, writes, sizes


async def test_what_is_lost_is_what_the_policy_says_and_is_put_back(server: RedisServer) -> None:
    """With `always` nothing that was acknowledged is lost; with `everysec` nothing older than two seconds, and what is
    younger comes back from whoever holds it."""
    syncs_always = "always" in server.options
    redis = connection.connect(server.url)
    queue = make_queue(redis, lease_s=30.0, allow_no_aof=True)
    claimed, writes, sizes = await publish_all(server, queue, 0.0 if syncs_always else 0.05)
    server.kill()
    cut_s = time.monotonic() - (0.0 if syncs_always else MAX_UNSYNCED_S)
    num_safe = sum(at_s <= cut_s for at_s, _ in sizes)
    os.truncate(log_file(server), sizes[num_safe - 1][1])
    server.start()

    survived = [entry.position for entry in await queue.read(claimed.job.id)]
    assert survived == list(range(num_safe + 1))
    assert (num_safe == NUM_ENTRIES) == syncs_always, "else nothing was cut"
    epoch = await queue.restore(claimed.job, HEADER.encode(), [write.entry for write in writes], epoch=claimed.epoch,
                                worker="w1", numerics_id="n")
    assert epoch == claimed.epoch if syncs_always else epoch and epoch > claimed.epoch
    entries = await queue.read(claimed.job.id)
    assert [entry.data for entry in entries[1:]] == [write.data for write in writes]
    await redis.aclose()
