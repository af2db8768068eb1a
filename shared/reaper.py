"""The reaper: any process may requeue the jobs of expired leases, so pods and workers all do, on jittered clocks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import astuple

from shared import connection
from shared.queue import Queue
from shared.settings import Settings

log = logging.getLogger(__name__)


async def reap(queues: Callable[[], Iterable[Queue]], settings: Settings) -> None:
    """Reaps until cancelled."""
    clock = asyncio.get_running_loop().time
    quiet_until_s: dict[str, float] = {}                # shard → when it is reaped again
    pause_s = settings.lease_s
    while True:
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
        pause_s = settings.reap_s
        due = [queue for queue in queues() if quiet_until_s.get(queue.shard.id, 0.0) <= clock()]
        for queue, _ in await connection.for_each(due, _reap, settings.lease_s):
            # No worker could renew while Redis was away: live ones get time to do so before we reap.
            quiet_until_s[queue.shard.id] = clock() + 2 * settings.lease_s * random.uniform(0.5, 1.5)


async def _reap(queue: Queue) -> None:
    reaped = await queue.reap()
    if any(astuple(reaped)):
        log.warning("%r: %d jobs back in line, %d given up, %d past their deadline, %d unread", queue, *astuple(reaped))
