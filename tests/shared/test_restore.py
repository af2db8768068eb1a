"""A Redis that lost its data, or went back: who holds an answer puts it back, above whatever was written meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from shared.job import Delta, Entry, Job, encode_deltas
from shared.queue import Behind, Claimed, Queue, Write
from tests.shared.test_queue import (
    HEADER,
    LIKE,
    SHARD,
    claim_one,
    delta,
    end,
    leftovers,
    lose_lease,
    make_job,
    make_queue,
    submit,
)


@pytest.fixture
def queue(each_redis: Redis) -> Queue:
    return make_queue(each_redis)


async def begin(queue: Queue, num_entries: int = 3, **changes: Any) -> tuple[Claimed, list[Entry]]:
    """A claimed job and what its worker has published of it."""
    await submit(queue, make_job(created_s=2**31, **changes))
    claimed = await claim_one(queue)
    writes = [delta(claimed, k) for k in range(1, num_entries + 1)]
    assert await queue.publish("w1", writes) == ["ok"] * num_entries
    return claimed, [write.entry for write in writes]


async def put_back(queue: Queue, claimed: Claimed, entries: list[Entry], worker: str = "") -> int | None:
    return await queue.restore(claimed.job, HEADER.encode(), entries, epoch=claimed.epoch, worker=worker,
                               numerics_id="n" if worker else "")


async def spoken(queue: Queue, job: Job) -> list[tuple[int, str]]:
    return [(entry.position, entry.data) for entry in await queue.read(job.id) if entry.kind != "header"]


async def test_a_worker_goes_on_where_it_was_when_all_is_lost(queue: Queue) -> None:
    claimed, entries = await begin(queue)
    await queue.redis.flushall()
    with pytest.raises(Behind):
        await queue.publish("w1", [delta(claimed, 4)], sequence=9)
    epoch = await put_back(queue, claimed, entries, "w1")
    assert epoch and epoch > claimed.epoch
    assert await put_back(queue, claimed, entries, "w1") == epoch, "and again, when the reply was lost"
    assert await queue.publish("w1", [delta(claimed, 4)]) == ["refused"], "what knows less is a zombie's"
    rest = [Write(claimed.job.id, epoch, 4, 4, "delta", delta(claimed, 4).data),
            Write(claimed.job.id, epoch, 5, 4, "end", end(claimed, 5).data)]
    assert await queue.publish("w1", rest) == ["ok", "ok"]
    assert await spoken(queue, claimed.job) == [
        *((entry.position, entry.data) for entry in entries), *((write.position, write.data) for write in rest)]
    assert not any((await leftovers(queue)).values())


async def test_a_worker_that_claims_again_what_others_continued_does_not_go_on_from_its_own_past(queue: Queue) -> None:
    claimed, entries = await begin(queue)
    await queue.release("w1")
    heir = await claim_one(queue, "w2")
    assert await queue.publish("w2", [delta(heir, 1)]) == ["ok"]
    await queue.release("w2")
    assert (await claim_one(queue, "w1", sequence=2)).position == 4
    assert await put_back(queue, claimed, entries, "w1") == 0
    assert (await claim_one(queue, "w1", sequence=2)).position == 4, "it holds the claim, and hears of it again"


async def test_what_a_worker_puts_back_was_begun_with_its_weights(queue: Queue) -> None:
    """Its job may name others, of the card on which it was made: a rolling change of weights."""
    claimed, entries = await begin(queue, weights_id="before")
    await queue.redis.flushall()
    assert await queue.restore(claimed.job, HEADER.encode(), entries, epoch=claimed.epoch, worker="w1", weights_id="w",
                               numerics_id="n")
    assert await queue.release("w1") == 1
    assert not (await queue.claim("w2", 1, 8, **LIKE | {"weights_id": "before"})).jobs
    assert (await claim_one(queue, "w3")).job.id == claimed.job.id


async def test_a_pod_puts_back_what_it_has_delivered_and_any_worker_goes_on(queue: Queue) -> None:
    claimed, entries = await begin(queue)
    await queue.redis.flushall()
    assert await put_back(queue, claimed, entries) == 0
    assert await put_back(queue, claimed, entries) == 0, "twice is once"
    assert await put_back(queue, claimed, entries, "w1") == 0, "its worker came too late: the job is in line"
    heir = await claim_one(queue, "w2")
    assert (heir.position, heir.num_tokens, heir.header) == (3, 3, HEADER.encode())
    assert not heir.is_like, "with which numerics it was begun is lost"
    assert heir.job == claimed.job
    assert await queue.publish("w2", [delta(heir, 1), end(heir, 2)]) == ["ok", "ok"]
    assert [position for position, _ in await spoken(queue, claimed.job)] == [1, 2, 3, 4, 5]
    assert not any((await leftovers(queue)).values())


async def test_what_its_worker_knows_beyond_the_pod_is_put_back_too(queue: Queue) -> None:
    """The pod was behind the worker by one entry: both put back what they hold, in this order."""
    claimed, entries = await begin(queue)
    await queue.redis.flushall()
    await put_back(queue, claimed, entries[:2])
    assert await put_back(queue, claimed, entries, "w1")
    assert [position for position, _ in await spoken(queue, claimed.job)] == [1, 2, 3]
    assert (await leftovers(queue))["ready"] == 0


async def test_nothing_is_put_back_where_nothing_was_lost(queue: Queue) -> None:
    claimed, entries = await begin(queue)
    log = SHARD.key(f"out:{claimed.job.id}")
    before: Any = await queue.redis.xrange(log)
    assert await put_back(queue, claimed, entries[:1]) == 0
    assert await put_back(queue, claimed, entries, "w1") == claimed.epoch
    assert await put_back(queue, claimed, entries, "w2") == 0
    await lose_lease(queue)
    await queue.reap()
    assert await put_back(queue, claimed, entries, "w1") == 0, "it lost its lease, and Redis lost nothing"
    after: Any = await queue.redis.xrange(log)
    assert after[:len(before)] == before
    heir = await claim_one(queue, "w2")
    await queue.publish("w2", [end(heir, 1)])
    assert await put_back(queue, claimed, entries, "w1") is None, "it has ended"


async def test_a_redis_that_went_back_gets_what_was_delivered(queue: Queue) -> None:
    """A replica without the last entries was promoted, and another worker went on from there with entries of its own:
    what the client has read stands, above both."""
    claimed, entries = await begin(queue, 2)
    older: dict[Any, Any] = {key: await queue.redis.dump(key) async for key in queue.redis.scan_iter("*")}
    more = [delta(claimed, k) for k in (3, 4, 5)]
    await queue.publish("w1", more)
    await queue.redis.flushall()
    for key, value in older.items():
        await queue.redis.restore(key, 0, value)
    await lose_lease(queue)
    await queue.reap()
    other = await claim_one(queue, "w2")
    one_gulp = Write(claimed.job.id, other.epoch, 3, 4, "delta", encode_deltas([Delta(0, (3, 4), "xx")]))
    assert await queue.publish("w2", [one_gulp]) == ["ok"]

    delivered = [*entries, *(write.entry for write in more)]
    assert await put_back(queue, claimed, delivered) == 0
    assert await queue.publish("w2", [delta(other, 2)]) == ["refused"]
    assert await spoken(queue, claimed.job) == [(entry.position, entry.data) for entry in delivered]
    heir = await claim_one(queue, "w3")
    assert (heir.position, heir.num_tokens) == (5, 5)
    assert (await leftovers(queue))["jobs"] == 1


async def test_what_was_delivered_stands_above_what_another_worker_wrote_in_its_place(queue: Queue) -> None:
    """The positions are the same: a worker that claimed the job after Redis went back drew something else."""
    claimed, entries = await begin(queue)
    other = Entry(claimed.epoch, 3, entries[2].num_tokens, "delta", encode_deltas([Delta(0, (999,), "other")]))
    for worker in ("", "w1"):
        await put_back(queue, claimed, [*entries[:2], other], worker)
        assert (await spoken(queue, claimed.job))[-1] == (3, other.data)
        await put_back(queue, claimed, entries, worker)
        assert await spoken(queue, claimed.job) == [(entry.position, entry.data) for entry in entries]


async def test_a_log_that_is_gone_is_said_so(queue: Queue) -> None:
    """Of one job alone: its worker learns it, puts it back, and goes on."""
    claimed, entries = await begin(queue)
    await queue.redis.delete(SHARD.key(f"out:{claimed.job.id}"))
    assert await queue.publish("w1", [delta(claimed, 4)]) == ["gone"]
    epoch = await put_back(queue, claimed, entries, "w1")
    assert epoch
    assert [position for position, _ in await spoken(queue, claimed.job)] == [1, 2, 3]
    assert (await leftovers(queue))["jobs"] == 1


async def test_publishes_are_counted(queue: Queue) -> None:
    """The next one, the same again, or the first: anything else was said to another Redis."""
    claimed, _ = await begin(queue, 1)
    assert await queue.publish("w1", [delta(claimed, 2)], 2) == ["ok"]
    assert await queue.publish("w1", [delta(claimed, 2)], 2) == ["ok"]
    with pytest.raises(Behind):
        await queue.publish("w1", [delta(claimed, 4)], 4)
    assert [entry.position for entry in await queue.read(claimed.job.id)] == [0, 1, 2]
    assert await queue.publish("w1", [], 3) == []


async def test_a_redis_that_stood_still_calls_nobody_dead(each_redis: Redis) -> None:
    """No reaper came for long, so no worker could renew either: leases begin anew before any is taken for expired."""
    queue = make_queue(each_redis, reap_s=0.2)
    await begin(queue)
    await queue.reap()
    await lose_lease(queue)
    await queue.redis.set(SHARD.key("looked"), 1)
    assert (await queue.reap()).num_requeued == 0
    await lose_lease(queue)
    assert (await queue.reap()).num_requeued == 1, "who is silent all the same is dead"
    assert (await queue.claim("w2", 1, 8, **LIKE)).jobs
