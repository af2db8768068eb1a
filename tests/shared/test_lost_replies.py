"""A thousand times the worst moment: replies lost after Redis has executed, workers that wake too late, poison.

At the level of the verbs, on a real Redis, with redis-py's own retries; what processes do with it is tests/chaos.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared import connection
from shared.job import Delta, Finish, Header, Job, Sampling, Usage, encode_deltas
from shared.keys import Shard, new_completion_id
from shared.queue import Claimed, Queue, Write
from shared.settings import Settings
from tests.chaos.checker import check_log
from tests.chaos.proxy import Proxy

LANES, ROUNDS = 20, 17                                  # 1,020 lost replies: of a submit, a claim, a publish each round
NUM_ZOMBIES = 500
LEASE_S = 0.4
FROZEN_LEASES = (1.2, 3.2)
NUM_JOBS = 200                                          # one of them is poison
NUM_WORKERS, NUM_SLOTS = 4, 8
VERB = b"EVALSHA"

HEADER = Header(model="m", created_s=1, fingerprint="fp", seed=1, n=1, num_prompt_tokens=3)
LIKE: dict[str, Any] = {"tokenizer_id": "tok", "weights_id": "w", "numerics_id": "n"}


def make_queue(redis: Any, **settings: Any) -> Queue:
    """A shard of its own, of which nobody else knows."""
    return Queue(redis, Shard.of(secrets.token_hex(8)), Settings(**settings))


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[Queue]:
    redis = connection.connect(redis_url)
    yield make_queue(redis, lease_s=LEASE_S, idle_poll_s=LEASE_S / 2)
    await redis.aclose()


async def submit(queue: Queue) -> Job:
    job = Job(id=new_completion_id(queue.shard), tenant="t", pod="", prompt_token_ids=(1, 2, 3), tokenizer_id="tok",
              weights_id="w", retain_s=60, sampling=Sampling(max_tokens=8))
    await queue.submit(job, HEADER)
    return job


def delta(claimed: Claimed, text: str, k: int = 1) -> Write:
    data = encode_deltas([Delta(0, (7,), text)])
    return Write(claimed.job.id, claimed.epoch, claimed.position + k, claimed.num_tokens + k, "delta", data)


def end(claimed: Claimed, k: int = 2) -> Write:
    num_tokens = claimed.num_tokens + k - 1
    data = Finish(Usage(3, num_tokens)).encode()
    return Write(claimed.job.id, claimed.epoch, claimed.position + k, num_tokens, "end", data)


async def log(queue: Queue, job_id: str) -> list[tuple[str, dict[str, str]]]:
    rows: Any = await queue.redis.xrange(queue.shard.key(f"out:{job_id}"))
    return [(i.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for i, fields in rows]


async def test_a_thousand_lost_replies_make_one_job_and_one_delta_each(redis_url: str) -> None:
    """Redis executes, the reply is dropped and the connection reset; redis-py says the verb again."""
    assert sum(await asyncio.gather(*(lose_replies(redis_url) for _ in range(LANES)))) >= 1000


async def lose_replies(redis_url: str) -> int:
    """One client on a wire of its own; how many replies it lost."""
    async with Proxy(redis_url) as wire:
        redis = connection.connect(wire.url)
        queue = make_queue(redis)
        await answer(queue, wire, 1, lost=False)        # the scripts are loaded
        for sequence in range(2, ROUNDS + 2):
            await answer(queue, wire, sequence, lost=True)
        counters = await queue.counters()
        assert (counters["submitted"], counters["finished"], counters["live"]) == (ROUNDS + 1, ROUNDS + 1, 0)
        await redis.aclose()
    return wire.num_swallowed


async def answer(queue: Queue, wire: Proxy, sequence: int, *, lost: bool) -> None:
    wire.swallow(int(lost), of=VERB)
    job = await submit(queue)
    wire.swallow(int(lost), of=VERB)
    (claimed,) = (await queue.claim("w", sequence, 1, **LIKE)).jobs
    assert claimed.job == job
    wire.swallow(int(lost), of=VERB)
    assert await queue.publish("w", [delta(claimed, "x"), end(claimed)], sequence) == ["ok", "ok"]
    assert [fields["kind"] for _, fields in await log(queue, job.id)] == ["header", "fence", "delta", "end"]


async def test_workers_that_wake_too_late_say_nothing(queue: Queue) -> None:
    """Five hundred, frozen for 1.2 to 3.2 leases: whatever they say when they wake, not one entry of it is taken."""
    jobs = [await submit(queue) for _ in range(NUM_ZOMBIES)]
    zombies = {f"zombie-{i}": (await queue.claim(f"zombie-{i}", 1, 1, **LIKE)).jobs[0] for i in range(NUM_ZOMBIES)}
    for name, claimed in zombies.items():
        assert await queue.publish(name, [delta(claimed, "in time")]) == ["ok"]
    heir = asyncio.create_task(take_over(queue, NUM_ZOMBIES))
    outcomes = await asyncio.gather(*(wake(queue, name, claimed) for name, claimed in zombies.items()))
    await heir
    assert outcomes == [["refused", "refused"]] * NUM_ZOMBIES
    for job in jobs:
        rows = await log(queue, job.id)
        assert list(check_log(rows)) == []
        assert not any("too late" in fields["data"] for _, fields in rows)
    assert (await queue.counters())["finished"] == NUM_ZOMBIES


async def wake(queue: Queue, name: str, claimed: Claimed) -> list[Any]:
    """Frozen, then what it had in mind; not before others have been told that it is dead."""
    await asyncio.sleep(LEASE_S * random.uniform(*FROZEN_LEASES))
    while (await queue.describe(claimed.job.id)).get("worker") == name:
        await asyncio.sleep(0.01)
    return list(await queue.publish(name, [delta(claimed, "too late", 2), end(claimed, 3)]))


async def take_over(queue: Queue, num_jobs: int) -> None:
    """Reaps, claims, and ends what it has claimed, until that is all."""
    for sequence in itertools.count(1):
        await queue.reap()
        claims = await queue.claim("heir", sequence, 32, **LIKE)
        await queue.publish("heir", [write for c in claims.jobs for write in (delta(c, "heir"), end(c))])
        num_jobs -= len(claims.jobs)
        if not num_jobs:
            return


async def test_one_poison_in_two_hundred_fails_alone(redis_url: str) -> None:
    """It takes three workers down, from the second on by itself; nobody else's request fails."""
    redis = connection.connect(redis_url)
    queue = make_queue(redis, lease_s=600.0)
    jobs = [await submit(queue) for _ in range(NUM_JOBS)]
    poison = jobs[NUM_JOBS // 2].id
    await queue.reap()
    names = [f"w{i}" for i in range(NUM_WORKERS)]
    beside: list[int] = []                              # who was on a worker when it died
    for sequence in itertools.count(1):
        for place, name in enumerate(names):
            claims = (await queue.claim(name, sequence, NUM_SLOTS, **LIKE)).jobs
            if poison in {claimed.job.id for claimed in claims}:
                beside.append(len(claims) - 1)
                await redis.zadd(queue.shard.key("leases"), {name: 0})
                await queue.reap()
                names[place] = f"{name}'"
            else:
                await queue.publish(name, [write for c in claims for write in (delta(c, "x"), end(c))])
        if not await queue.num_live():
            break
    assert beside[0] > 0 and beside[1:] == [0, 0]
    counters = await queue.counters()
    assert (counters["finished"], counters["dead"]) == (NUM_JOBS - 1, 1)
    (letter,) = await queue.dead(10)
    assert (letter["job"], letter["attempts"]) == (poison, "3")
    await redis.aclose()
