"""What a pod believes of the models that workers announce."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from api.directory import Directory
from shared.errors import Unavailable
from shared.keys import DIRECTORY, Shard
from shared.settings import Settings
from tests.api.scripted import WAIT_S, ScriptedWorker


async def hear(shard: Shard) -> None:
    """No relay listens here."""


async def test_a_word_that_redis_has_lost_is_believed_as_long_as_it_asked_for(each_redis: Redis) -> None:
    lasting, brief = workers = [ScriptedWorker(each_redis) for _ in range(2)]
    directory = Directory(each_redis, Settings(), hear)
    for worker in workers:
        await worker.announce()
    await directory.refresh()
    await brief.announce(ttl_s=0.5)
    await directory.refresh()
    for worker in workers:
        await each_redis.hdel(DIRECTORY, worker.queue.shard.id)
        await each_redis.delete(worker.queue.shard.key(f"card:{worker.card.pack()[0]}"))
    await directory.refresh()
    assert lasting.model in directory.names()
    async with asyncio.timeout(WAIT_S):
        while brief.model in directory.names():
            await asyncio.sleep(0.02)
            await directory.refresh()
    assert lasting.model in directory.names()


async def test_a_word_that_stands_there_counts_and_no_earlier_one(each_redis: Redis) -> None:
    worker, directory = ScriptedWorker(each_redis), Directory(each_redis, Settings(), hear)
    await worker.announce()
    await directory.refresh()
    await worker.announce(ttl_s=-1)
    await directory.refresh()
    assert worker.model not in directory.names()


async def test_a_shard_that_does_not_answer_leaves_the_others_served(each_redis: Redis) -> None:
    """It is itself served as before: whoever asks learns from its Redis."""
    mute, well = workers = [ScriptedWorker(each_redis) for _ in range(2)]
    is_mute = False

    async def hear_or_not(shard: Shard) -> None:
        if is_mute and shard == mute.queue.shard:
            raise Unavailable

    directory = Directory(each_redis, Settings(), hear_or_not)
    await mute.announce()
    await directory.refresh()
    is_mute = True
    for worker in workers:
        await worker.announce()
    await directory.refresh()
    assert {mute.model, well.model} <= directory.names().keys()
