"""The load of the service: when to refuse, and when to retry. Measured on a clock, read by submit."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

from redis.asyncio import Redis

from api.directory import Directory
from shared import connection
from shared.errors import Overloaded
from shared.queue import Queue
from shared.settings import Settings

log = logging.getLogger(__name__)

WATCH_S = 1.0
LOOK_S = 0.9                                            # with WATCH_S less than READY_WITHIN_S (api/pod.py)
SMOOTHING = 0.3                                         # weight of the newest second in the measured rate
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
PRESSED_FRACTION = 0.75                                 # of max_redis_fraction: from here finished logs go sooner


def retry_after_s(num_queued: int, jobs_per_s: float) -> float:
    """Backlog over measured rate: when the queue will have moved on. Without a measured rate: soon."""
    return min(max(num_queued / jobs_per_s if jobs_per_s > 0 else MIN_RETRY_S, MIN_RETRY_S), MAX_RETRY_S)


def measured_rate(before: float, num_ended: int, num_live: int) -> float:
    """Jobs that end per second, smoothed, after one more second: `num_ended` ended in it, `num_live` are still live.

    A second without any ended job shows demand, not capacity: after a quiet hour the queue moves as before.
    """
    if not num_ended and not num_live:
        return before
    return (1 - SMOOTHING) * before + SMOOTHING * num_ended / WATCH_S


def retain_under_pressure_s(retain_s: float, fraction: float, max_fraction: float) -> float:
    """How long a finished log is kept: less and less from `PRESSED_FRACTION` of the limit on, a tenth at the limit."""
    pressure = (fraction / max_fraction - PRESSED_FRACTION) / (1 - PRESSED_FRACTION)
    return retain_s * min(max(1 - 0.9 * pressure, 0.1), 1.0)


class Limits:
    """What this pod has measured of Redis and of the line."""

    def __init__(self, redis: Redis, directory: Directory, settings: Settings) -> None:
        self._redis = redis
        self._directory = directory
        self._settings = settings
        self._ended: dict[str, int] = {}
        self._jobs_per_s: dict[str, float] = {}
        self.redis_fraction = 0.0
        self.answered_s = -math.inf                     # when Redis last answered, in the loop's time

    def check_memory(self) -> None:
        """Raises Overloaded when Redis has no room for another job."""
        if self.redis_fraction > self._settings.max_redis_fraction:
            raise Overloaded(retry_after_s=MAX_RETRY_S / 4)

    def retain_s(self, wanted_s: float) -> float:
        """How long the log of an answer is kept after its end."""
        return retain_under_pressure_s(wanted_s, self.redis_fraction, self._settings.max_redis_fraction)

    async def retry_after_s(self, shard_id: str) -> float:
        queue = next(queue for queue in self._directory.queues() if queue.shard.id == shard_id)
        return retry_after_s((await queue.counters())["queued"], self._jobs_per_s.get(shard_id, 0.0))

    async def run(self) -> None:
        """Measures until cancelled."""
        while True:
            try:
                await asyncio.gather(self._measure_memory(), self._measure_queues())
            except connection.TROUBLE as error:         # Redis is away: readiness says so
                log.warning("Redis could not be measured: %s", type(error).__name__)
            await asyncio.sleep(WATCH_S)

    async def _measure_memory(self) -> None:
        fractions = list[float]()

        async def measure(primary: Any) -> None:
            memory = await connection.info(self._redis, primary, "memory")
            fractions.append(memory["used_memory"] / memory["maxmemory"] if memory.get("maxmemory") else 0.0)

        for _, error in await connection.for_each(await connection.primaries(self._redis), measure, LOOK_S):
            log.warning("Redis could not be measured: %s", type(error).__name__)
        if fractions:
            self.redis_fraction, self.answered_s = max(fractions), asyncio.get_running_loop().time()

    async def _measure_queues(self) -> None:
        for queue, error in await connection.for_each(self._directory.queues(), self._measure, LOOK_S):
            log.warning("%r could not be measured: %s", queue, type(error).__name__)

    async def _measure(self, queue: Queue) -> None:
        counters, shard = await queue.counters(), queue.shard.id
        ended = sum(counters.get(outcome, 0) for outcome in ("finished", "cancelled", "dead", "expired"))
        num_ended = ended - self._ended.get(shard, ended)
        self._jobs_per_s[shard] = measured_rate(self._jobs_per_s.get(shard, 0.0), num_ended, counters["live"])
        self._ended[shard] = ended
