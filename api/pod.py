"""A pod: what an API process holds. Nothing in it outlives the process, and no answer depends on it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.exceptions import RedisError

from api.directory import Directory
from api.limits import Limits
from api.metrics import Metrics
from api.relay import Relay, Stream
from shared import connection
from shared.reaper import reap
from shared.settings import Settings

log = logging.getLogger(__name__)

READY_WITHIN_S = 2.0                                    # of Redis' last answer
MAX_CANCEL_TRIES = 5                                    # of a client's job, when Redis is away


class Pod:
    def __init__(self, settings: Settings) -> None:
        self.id = secrets.token_hex(6)
        self.settings = settings
        self.redis = connection.connect(settings.redis_url)
        self.relay = Relay(self.id, settings)
        self.directory = Directory(self.redis, settings, self.relay.hear)
        self.limits = Limits(self.redis, self.directory, settings)
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
    async def running(self) -> AsyncIterator[None]:
        """The pod's chores, for as long as it serves. A chore that fails ends the pod."""
        async with asyncio.TaskGroup() as group:
            chores = [group.create_task(chore) for chore in (
                self.relay.run(), self.directory.run(), self.limits.run(),
                reap(self.directory.queues, self.settings))]
            yield
            for chore in chores:
                chore.cancel()
        await asyncio.gather(*self._goodbyes)
        await self.redis.aclose()

    def part(self, stream: Stream, complete: bool) -> None:
        """A request is over. An answer that is not complete has nobody to read it: its job is cancelled."""
        self.relay.close(stream)
        if not complete:
            task = asyncio.create_task(self._cancel(stream))
            self._goodbyes.add(task)
            task.add_done_callback(self._goodbyes.discard)

    async def _cancel(self, stream: Stream) -> None:
        await asyncio.sleep(0 if self.draining else self.settings.disconnect_grace_s)
        for _ in range(MAX_CANCEL_TRIES):
            try:
                await stream.queue.cancel(stream.job_id)
                return
            except (RedisError, OSError):
                await asyncio.sleep(connection.RECONNECT_S)
        log.warning("job %s was not cancelled: Redis is away; its deadline ends it", stream.job_id)
