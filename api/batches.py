"""Batches: their state in Redis, which lines have a result, and which pod runs them. Each step may be repeated.

A batch, its results and its holder lie in its tenant's slot; shared by all tenants is only the index in which pods look
for work. Results are the pieces of the output file and of the error file, numbered by line: nothing is written twice,
and a line has one result however many pods ran it. It knows nothing of HTTP, of jobs or of models.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from redis.asyncio import Redis

from api.files import File, Files, pieces_key
from api.scripts import register
from api.wire.batches import Batch, BatchRequest, Status
from api.wire.lines import Raw, Result
from shared.connection import refusals
from shared.errors import NOT_LISTED, BatchNotFound, InvalidValue, TooManyBatches
from shared.keys import BATCHES, tenant_key
from shared.settings import Settings

MAX_BATCHES = 10_000                                    # per tenant, ended ones included
HOLD_S = 5.0                                            # without a renewal by the pod that runs it: others may
BEGINNING_S = 60.0                                      # from the batch's entry in the index to the batch, at most
LATE_S = 3600.0                                         # after its time is over, for a batch to be closed

SCRIPTS = ("enlist", "hold", "unreserve", "allot", "record", "advance")


class Batches:
    """The batches of all tenants."""

    def __init__(self, redis: Redis, files: Files, settings: Settings) -> None:
        self._redis = redis
        self._files = files
        self._settings = settings
        self._scripts = {name: register(redis, name) for name in SCRIPTS}
        self._lifetime_ms = round((settings.batch_s + settings.file_s) * 1000)

    # ── what clients do ──

    async def create(self, tenant: str, asked: BatchRequest) -> Batch:
        """Raises NoSuchFile or TooManyBatches."""
        now_ms = round(time.time() * 1000)
        batch = Batch(f"batch_{secrets.token_hex(16)}", tenant, asked.endpoint, asked.input_file_id, now_ms,
                      now_ms // 1000 + round(self._settings.batch_s), asked.metadata,
                      asked.output_expires_after.seconds if asked.output_expires_after else 0)
        # Its input file must outlive the batch.
        await self._files.prolong(tenant, asked.input_file_id, self._settings.batch_s + LATE_S)
        # Into the index first: a batch that no pod can find would stay `validating` for ever.
        await self._redis.zadd(BATCHES, {_member(tenant, batch.id): batch.created_ms})
        fields = [part for pair in batch.encode().items() for part in pair]
        if not await self._run("enlist", [_key(tenant, batch.id), tenant_key(tenant, "batches")], batch.id,
                               batch.created_ms, self._lifetime_ms, MAX_BATCHES, *fields):
            await self._redis.zrem(BATCHES, _member(tenant, batch.id))
            raise TooManyBatches
        return batch

    async def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises BatchNotFound."""
        fields: Any = await self._redis.hgetall(_key(tenant, batch_id))
        if not fields:
            raise BatchNotFound
        return Batch.decode(fields)

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Up to `limit` batches after `after`, the newest first, and whether there are more. Raises InvalidValue when
        `after` is not one of them."""
        index = tenant_key(tenant, "batches")
        rank: Any = -1 if after is None else await self._redis.zrevrank(index, after)
        if rank is None:
            raise InvalidValue(NOT_LISTED, param="after")
        begin = rank + 1
        ids: Any = await self._redis.zrange(index, begin, begin + limit, desc=True)
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch_id in ids[:limit]:
                pipe.hgetall(_key(tenant, batch_id.decode()))
            rows = await pipe.execute() if ids else []
        return [Batch.decode(fields) for fields in rows if fields], len(ids) > limit

    async def advance(self, batch: Batch, status: Status, **fields: str | int) -> bool:
        """Changes the status, and the fields that come with it; False when the batch has another status by now."""
        fields |= {"status": status, f"{status}_at": round(time.time())}
        return bool(await self._run("advance", [_key(batch.tenant, batch.id)], batch.status,
                                    *(part for pair in fields.items() for part in pair)))

    # ── what the pod does that runs it ──

    async def some_live(self, most: int) -> list[tuple[str, str]]:
        """Tenant and id of up to `most` unfinished batches, in no order."""
        members: Any = await self._redis.zrandmember(BATCHES, most)
        return [(tenant, batch_id) for tenant, _, batch_id in (member.decode().partition(" ") for member in members)]

    async def hold(self, tenant: str, batch_id: str, pod_id: str) -> Batch | None:
        """The batch, held by this pod for `HOLD_S` more. None when another pod holds it, or it does not exist."""
        flat = await self._run("hold", [tenant_key(tenant, f"pump:{batch_id}"), _key(tenant, batch_id)], pod_id,
                               round(HOLD_S * 1000))
        if flat:
            return Batch.decode(dict(zip(flat[::2], flat[1::2], strict=True)))
        if flat is not None and await self._is_late(tenant, batch_id):
            await self._redis.zrem(BATCHES, _member(tenant, batch_id))
        return None

    async def let_go(self, tenant: str, batch_id: str, pod_id: str) -> None:
        """Another pod may take the batch at once."""
        await self._run("unreserve", [tenant_key(tenant, f"pump:{batch_id}")], pod_id)

    async def leave(self, batch: Batch) -> None:
        """Takes a finished batch out of the index."""
        tenant = batch.tenant
        await self._redis.delete(tenant_key(tenant, f"allotted:{batch.id}"))
        await self._redis.zrem(BATCHES, _member(tenant, batch.id))

    async def unfinished(self, batch: Batch, lines: Sequence[Raw]) -> list[Raw]:
        """The given lines that have no result."""
        if not lines:
            return []
        keys = [pieces_key(batch.tenant, file_id) for file_id in (batch.output_file_id, batch.error_file_id)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for line in lines:
                for key in keys:
                    pipe.hexists(key, str(line.number))
            found = await pipe.execute()
        return [line for line, *has in zip(lines, found[::2], found[1::2], strict=True) if not any(has)]

    async def allot(self, batch: Batch, number: int, job_id: str) -> str | None:
        """Assigns this job to a line; returns the line's job, this or an earlier one. None: it needs none."""
        allotted = await self._run("allot", [_key(batch.tenant, batch.id), *_result_keys(batch)], number, job_id,
                                   self._lifetime_ms)
        return allotted.decode() if allotted else None

    async def allotted(self, batch: Batch) -> dict[int, str]:
        """The jobs of lines without a result, by line number."""
        rows: Any = await self._redis.hgetall(tenant_key(batch.tenant, f"allotted:{batch.id}"))
        return {int(number): job_id.decode() for number, job_id in rows.items()}

    async def record(self, batch: Batch, number: int, result: Result) -> bool:
        """Stores the result of a line; False when it has one already."""
        allotted, output, errors = _result_keys(batch)
        this, other, name, counter = ((errors, output, "error", "num_failed") if result.is_error else
                                      (output, errors, "output", "num_completed"))
        counts = {counter: 1, f"{name}_bytes": len(result.text)} | asdict(result.usage)
        flat = [part for pair in counts.items() for part in pair]
        return bool(await self._run("record", [_key(batch.tenant, batch.id), allotted, this, other], number,
                                    result.text, self._lifetime_ms, *flat))

    async def publish(self, batch: Batch) -> None:
        """Makes files of the lines' results."""
        now_ms, lifetime_s = round(time.time() * 1000), batch.output_s or self._settings.file_s
        for file_id, name, num_results, num_bytes in (
                (batch.output_file_id, "output", batch.num_completed, batch.output_bytes),
                (batch.error_file_id, "error", batch.num_failed, batch.error_bytes)):
            if num_results:
                file = File(file_id, f"{batch.id}_{name}.jsonl", "batch_output", now_ms, batch.num_lines + 1,
                            num_bytes=num_bytes)
                await self._files.publish(batch.tenant, file, lifetime_s)

    async def fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        await self.advance(batch, "failed", errors=json.dumps(errors))

    async def _is_late(self, tenant: str, batch_id: str) -> bool:
        created_ms: Any = await self._redis.zscore(BATCHES, _member(tenant, batch_id))
        return created_ms is not None and time.time() * 1000 - created_ms > BEGINNING_S * 1000

    async def _run(self, name: str, keys: list[str], *args: Any) -> Any:
        with refusals():
            return await self._scripts[name](keys=keys, args=args)


def _key(tenant: str, batch_id: str) -> str:
    return tenant_key(tenant, f"batch:{batch_id}")


def _member(tenant: str, batch_id: str) -> str:
    return f"{tenant} {batch_id}"


def _result_keys(batch: Batch) -> tuple[str, str, str]:
    """The keys of the lines' jobs, of the output and of the errors."""
    tenant = batch.tenant
    return (tenant_key(tenant, f"allotted:{batch.id}"), pieces_key(tenant, batch.output_file_id),
            pieces_key(tenant, batch.error_file_id))
