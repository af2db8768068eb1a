"""A pod: what an API process holds. Nothing in it outlives the process, and no answer depends on it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from api.batches import Batches
from api.cards import Cards
from api.directory import Directory
from api.files import Files
from api.idempotency import Reservations
from api.limits import Limits
from api.metrics import Metrics
from api.relay import Relay, Stream
from api.stored import Store
from shared import connection
from shared.reaper import reap
from shared.settings import Settings

log = logging.getLogger(__name__)

READY_WITHIN_S = 2.0                                    # since Redis last answered
MAX_LEAVE_TRIES = 5                                     # per job without readers here, while Redis is away


class Pod:
    def __init__(self, settings: Settings) -> None:
        self.id = secrets.token_hex(6)
        self.settings = settings
        self.redis = connection.connect(settings.redis_url)
        self.relay = Relay(self.id, settings)
        self.directory = Directory(self.redis, settings, self.relay.hear)
        self.limits = Limits(self.redis, self.directory, settings)
        self.reservations = Reservations(self.redis, settings)
        self.store = Store(self.redis, settings)
        self.cards = Cards(self.redis, settings)
        self.files = Files(self.redis, settings)
        self.batches = Batches(self.redis, self.files, settings)
        self.metrics = Metrics()
        self.draining = False
        self._goodbyes: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Pod {self.id} {self.relay!r} {self.directory!r}>"

    @property
    def ready(self) -> bool:
        silent_s = asyncio.get_running_loop().time() - self.limits.answered_s
        return not self.draining and silent_s < READY_WITHIN_S

    @asynccontextmanager
    async def running(self, *others: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Runs the pod's chores and others while it serves. A chore that fails ends the pod."""
        async with asyncio.TaskGroup() as group:
            chores = [group.create_task(chore) for chore in (
                *self.relay.chores(), self.directory.run(), self.limits.run(),
                reap(self.directory.queues, self.settings), *others)]
            try:
                yield
            finally:
                await connection.end(chores)            # the group itself would cancel them once, and wait for ever
        await asyncio.gather(*self._goodbyes)
        await self.redis.aclose()

    def part(self, stream: Stream) -> None:
        """A request has ended. An unfinished answer waits a while for a reader, on this pod or another."""
        self.relay.close(stream)
        if not stream.has_ended and not self.relay.relays(stream.job_id):
            task = asyncio.create_task(self._leave(stream))
            self._goodbyes.add(task)
            task.add_done_callback(self._goodbyes.discard)

    async def _leave(self, stream: Stream) -> None:
        for _ in range(MAX_LEAVE_TRIES):
            try:
                await stream.queue.leave(self.id, stream.job_id, self.settings.disconnect_grace_s)
                return
            except connection.TROUBLE:
                await asyncio.sleep(connection.RECONNECT_S)
                if self.relay.relays(stream.job_id):
                    return                              # the client has returned meanwhile
        log.warning("job %s could not be left: Redis is away; it ends when reader_ttl_s is over", stream.job_id)
