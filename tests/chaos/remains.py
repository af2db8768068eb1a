"""What Redis holds after a run: the logs of answers, and nothing of live jobs. It judges nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

from redis import Redis

from shared.keys import Shard

EMPTY_S = 15.0                                          # for what clients left behind to end by itself


async def leftovers(redis: Redis, shard: Shard, worker_pids: Collection[int]) -> dict[str, object]:
    """What is still live when it should have ended by now; by name."""
    deadline_s = time.monotonic() + EMPTY_S
    while any((left := _left(redis, shard, worker_pids)).values()) and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)
    return left


def _left(redis: Any, shard: Shard, worker_pids: Collection[int]) -> dict[str, object]:
    key = shard.key
    alive = [f"-{pid}-" for pid in worker_pids]
    leases = [name.decode() for name in redis.zrange(key("leases"), 0, -1)]
    return {"jobs": redis.xlen(key("jobs")), "ready": redis.zcard(key("ready")),
            "deadlines": redis.zcard(key("deadlines")), "readers": redis.zcard(key("readers")),
            "tenants": redis.hgetall(key("tenants")),
            "held": [name.decode() for name in redis.scan_iter(escaped(key("held:")) + "*")],
            "pending": redis.xpending(key("jobs"), "workers")["pending"],
            "leases of the dead": [name for name in leases if not any(pid in name for pid in alive)]}


def logs(redis: Any, shard: Shard) -> dict[str, Any]:
    """Every log that is still kept."""
    prefix = shard.key("out:")
    return {name.decode().removeprefix(prefix): [
        (entry_id.decode(), {field.decode(): value.decode() for field, value in fields.items()})
        for entry_id, fields in redis.xrange(name)] for name in redis.scan_iter(escaped(prefix) + "*", count=1000)}


def escaped(name: str) -> str:
    """A pattern that matches exactly this key: shard tags contain braces."""
    return name.replace("{", "\\{").replace("}", "\\}")
