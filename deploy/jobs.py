"""`baton jobs`: which jobs are queued and which run where, read from Redis, and what an operator may do about them.

It knows the queue and tables. It shows no prompt and no answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from shared import connection
from shared.card import Announcement
from shared.errors import BrokenEnvironment
from shared.job import Header, Job
from shared.keys import DIRECTORY, Shard, new_completion_id, shard_of
from shared.queue import Queue
from shared.settings import Settings

MAX_LISTED = 1000                                       # jobs of one shard
COLUMNS = ("id", "state", "worker", "tokens", "attempts", "claims", "tenant", "age")
DEAD_COLUMNS = ("id", "when", "worker", "attempts", "claims", "position")
HIDDEN = {"entry", "prefix"}

Action = Callable[[Console, Redis, Settings, str], Awaitable[None]]


async def run(settings: Settings, action: str, job_id: str) -> None:
    """Raises BrokenEnvironment with one line when Redis does not answer, or there is no such job."""
    redis = connection.connect(settings.redis_url)
    try:
        await ACTIONS[action](Console(highlight=False), redis, settings, job_id)
    except (*connection.UNREACHABLE, OSError):
        raise BrokenEnvironment("no Redis answers at BATON_REDIS_URL (--redis-url)") from None
    finally:
        await redis.aclose()


async def _list(console: Console, redis: Redis, settings: Settings, _: str) -> None:
    async for model, queue in _queues(redis, settings):
        counters = await queue.counters()
        title = f"{model}: {counters['queued']} queued, {counters['live'] - counters['queued']} running"
        table = Table(*COLUMNS, title=title, title_justify="left")
        for job in await queue.live(MAX_LISTED):
            age_s = time.time() - int(job.get("submitted_ms", 0)) / 1000
            table.add_row(*(job.get(name, "") for name in COLUMNS[:-1]), f"{age_s:.0f} s")
        console.print(table)


async def _dead(console: Console, redis: Redis, settings: Settings, _: str) -> None:
    async for model, queue in _queues(redis, settings):
        table = Table(*DEAD_COLUMNS, title=f"{model}: dead letters, newest first", title_justify="left")
        for letter in await queue.dead(MAX_LISTED):
            when = datetime.fromtimestamp(int(letter["at_ms"]) / 1000, UTC).isoformat(" ", "seconds")
            table.add_row(letter["job"], when, *(letter[name] for name in DEAD_COLUMNS[2:]))
        console.print(table)


async def _show(console: Console, redis: Redis, settings: Settings, job_id: str) -> None:
    _, job = await _find(redis, settings, job_id)
    table = Table("field", "value", title=job_id, title_justify="left")
    for name in sorted(job.keys() - HIDDEN):
        table.add_row(name, job[name])
    console.print(table)


async def _cancel(console: Console, redis: Redis, settings: Settings, job_id: str) -> None:
    queue, job = await _find(redis, settings, job_id)
    ended = await queue.cancel(job_id)
    console.print(f"{job_id} is cancelled" if ended else f"{job_id} had ended: {job['state']}")


async def _requeue(console: Console, redis: Redis, settings: Settings, job_id: str) -> None:
    """Returns a running job to the head of the queue; submits a dead letter again, under a new id."""
    queue = _queue_of(redis, settings, job_id)
    for letter in await queue.dead(MAX_LISTED):
        if letter["job"] == job_id:
            job = replace(Job.decode(letter["request"]), id=new_completion_id(queue.shard), pod="",
                          created_s=int(time.time()))
            await queue.submit(job, Header.decode(letter["header"]))
            console.print(f"{job_id} is submitted again as {job.id}")
            return
    _, job_fields = await _find(redis, settings, job_id)
    worker = job_fields.get("worker", "")
    if job_fields["state"] != "running" or not await queue.release(worker, [job_id]):
        raise BrokenEnvironment(f"{job_id} does not run: it is {job_fields['state']}")
    console.print(f"{job_id} is back in line; {worker} learns it within a step")


ACTIONS: dict[str, Action] = {"list": _list, "show": _show, "cancel": _cancel, "requeue": _requeue, "dead": _dead}


async def _queues(redis: Redis, settings: Settings) -> AsyncIterator[tuple[str, Queue]]:
    """Every shard announced lately, with the canonical name of its model."""
    fields: Any = await redis.hgetall(DIRECTORY)
    for raw in fields.values():
        announcement = Announcement.decode(raw)
        yield announcement.names[0], Queue(redis, Shard(announcement.shard), settings)


def _queue_of(redis: Redis, settings: Settings, job_id: str) -> Queue:
    if shard := shard_of(job_id):
        return Queue(redis, shard, settings)
    raise BrokenEnvironment(f"{job_id} is no completion id: `baton jobs` lists them")


async def _find(redis: Redis, settings: Settings, job_id: str) -> tuple[Queue, dict[str, str]]:
    queue = _queue_of(redis, settings, job_id)
    if job := await queue.describe(job_id):
        return queue, job
    raise BrokenEnvironment(f"there is no job {job_id}: it never was, or its log has expired")
