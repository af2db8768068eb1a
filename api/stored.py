"""Records of the requests whose answers are stored. The answers themselves are logs that are kept longer than others.

It knows records and where Redis has them, nothing of HTTP or of languages.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

from redis.asyncio import Redis

from api import deleted
from api.scripts import register
from shared.connection import refusals
from shared.errors import NOT_LISTED, InvalidValue, StorageFull
from shared.job import Language
from shared.keys import shard_of, tenant_key
from shared.settings import Settings

MAX_STORED = 10_000                                     # chat completions in a tenant's list; the oldest drop out
SCAN = 100                                              # of them, per round trip
MAX_FORGOTTEN = 500                                     # records per list: each takes four round trips
HEAD_BYTES = 2048                                       # of a record, for a list: up to its items, mostly
LONGEST_HEAD_BYTES = 128 << 10                          # with the longest metadata, every character escaped
ITEMS = b', "items": ['                                 # ends the head; within a string its quotes would be escaped
SUBMIT_S = 60.0                                         # from a record to its job, at most
FULL = "Your stored requests take too much room with this one. Delete some, do not store it, or wait until they expire."


@dataclass(frozen=True, slots=True)
class Record:
    """One request, as far as its answer does not contain it. What a list needs comes first: the head."""

    id: str                                             # of the completion
    language: Language
    model: str
    created_ms: int
    metadata: dict[str, str] = field(default_factory=dict)
    items: tuple[dict[str, Any], ...] = ()              # of the conversation before the answer
    asked: dict[str, Any] = field(default_factory=dict)     # request fields that the answer repeats

    @property
    def is_settled(self) -> bool:
        """Whether a missing job means an expired job, and not one that is still to be submitted."""
        return time.time() - self.created_ms / 1000 > SUBMIT_S


class Store:
    """The records of all tenants."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._lifetime_ms = round((settings.request_deadline_s + settings.store_s) * 1000)
        self._max_bytes = settings.max_tenant_stored_bytes
        self._shelve = register(redis, "shelve")

    async def put(self, tenant: str, record: Record) -> None:
        """Stores a record before its job is submitted: without a job it cannot be found. Raises StorageFull."""
        with refusals():
            if not await self._place(tenant, record.id, json.dumps(_encode(record))):
                raise StorageFull(FULL)
            if record.language == "chat":
                index = tenant_key(tenant, "completions")
                async with self._redis.pipeline(transaction=False) as pipe:
                    pipe.zadd(index, {record.id: record.created_ms})
                    pipe.zremrangebyscore(index, "-inf", record.created_ms - self._lifetime_ms)
                    pipe.zremrangebyrank(index, 0, -MAX_STORED - 1)
                    pipe.pexpire(index, self._lifetime_ms)
                    await pipe.execute()

    async def get(self, tenant: str, completion_id: str) -> Record | None:
        return _decode(await self._redis.get(_key(tenant, completion_id))) if shard_of(completion_id) else None

    async def has(self, tenant: str, completion_id: str) -> bool:
        return bool(await self._redis.exists(_key(tenant, completion_id)))

    async def update(self, tenant: str, record: Record, metadata: dict[str, str]) -> Record:
        """Replaces the metadata, which have a limit of their own: their growth is not counted."""
        changed = replace(record, metadata=metadata)
        with refusals():
            await self._redis.set(_key(tenant, record.id), json.dumps(_encode(changed)), xx=True, keepttl=True)
        return changed

    async def remove(self, tenant: str, completion_id: str) -> None:
        index = tenant_key(tenant, "completions")
        created_ms: Any = await self._redis.zscore(index, completion_id)
        if created_ms is not None:
            await deleted.remember(self._redis, tenant, "completions", completion_id, int(created_ms))
        await self._place(tenant, completion_id, "")
        await self._redis.zrem(index, completion_id)

    async def _place(self, tenant: str, completion_id: str, record: str) -> bool:
        keys = [_key(tenant, completion_id), tenant_key(tenant, "stored"), tenant_key(tenant, "stored_bytes")]
        return bool(await self._shelve(keys, [completion_id, record, self._lifetime_ms, self._max_bytes]))

    async def listed(self, tenant: str, *, after: str | None, newest_first: bool) -> AsyncIterator[Record]:
        """The heads of the chat completions after `after`: what was asked may take megabytes for each. Raises
        InvalidValue when that is not in the list."""
        index = tenant_key(tenant, "completions")
        begin = 0 if after is None else await self._num_until(tenant, after, newest_first=newest_first)
        for start in range(begin, MAX_STORED, SCAN):
            ids: Any = await self._redis.zrange(index, start, start + SCAN - 1, desc=newest_first)
            async for record in self._heads([_key(tenant, each.decode()) for each in ids]):
                yield record
            if len(ids) < SCAN:
                return

    async def _num_until(self, tenant: str, after: str, *, newest_first: bool) -> int:
        """How many of a list come before what comes after `after`, which may be deleted by now."""
        index = tenant_key(tenant, "completions")
        created_ms: Any = await self._redis.zscore(index, after)
        if created_ms is None:
            created_ms = await deleted.created_ms(self._redis, tenant, "completions", after)
        if created_ms is None:
            raise InvalidValue(NOT_LISTED, param="after")
        # Redis sorts what was made in the same millisecond by id.
        peers: Any = await self._redis.zrangebyscore(index, created_ms, created_ms)
        bounds = (f"({created_ms}", "+inf") if newest_first else ("-inf", f"({created_ms}")
        num_before: int = await self._redis.zcount(index, *bounds)
        here = after.encode()
        num_beside = sum(1 for each in peers if (each >= here if newest_first else each <= here))
        return num_before + num_beside

    async def _heads(self, keys: list[str]) -> AsyncIterator[Record]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.getrange(key, 0, HEAD_BYTES - 1)
            beginnings: list[Any] = await pipe.execute() if keys else []
        for key, raw in zip(keys, beginnings, strict=True):
            if len(raw) == HEAD_BYTES and ITEMS not in raw:
                raw = await self._redis.getrange(key, 0, LONGEST_HEAD_BYTES - 1)
            if record := _head(raw):
                yield record

    async def forget(self, tenant: str, records: Iterable[Record]) -> None:
        """Removes records whose answers cannot be shown any more; of many, some: the next list comes to the others."""
        for record in islice((each for each in records if each.is_settled), MAX_FORGOTTEN):
            await self.remove(tenant, record.id)


def _key(tenant: str, completion_id: str) -> str:
    return tenant_key(tenant, f"stored:{completion_id}")


def _encode(record: Record) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _head(raw: bytes) -> Record | None:
    head, is_whole, _ = raw.partition(ITEMS)
    return Record(**json.loads(head + b"}")) if is_whole else None


def _decode(raw: Any) -> Record | None:
    return None if raw is None else Record(**json.loads(raw))
