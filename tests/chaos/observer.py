"""Listens to all pushes and records their times, from which recovery times are computed. It judges nothing."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.keys import Shard
from shared.queue import parse_push
from tests.chaos.remains import escaped

RECONNECT_S = 0.02


class Observer:
    """As an async context it listens; after Redis was killed, it listens again when Redis is back."""

    def __init__(self, url: str, shard: Shard) -> None:
        self._url = url
        self._pattern = escaped(shard.key("push:")) + "*"
        self._seen: dict[str, list[tuple[float, int]]] = defaultdict(list)   # completion → (when, epoch) of each entry

    async def __aenter__(self) -> Observer:
        self._task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    def next_s(self, completion_id: str, after_s: float, *, by_another: bool) -> float | None:
        """Seconds until the next entry after that moment, of a later epoch if it has to come from another worker."""
        seen = self._seen.get(completion_id, ())
        before = max((epoch for at_s, epoch in seen if at_s <= after_s), default=0)
        return next((at_s - after_s for at_s, epoch in seen
                     if at_s > after_s and (epoch > before or not by_another)), None)

    async def _listen(self) -> None:
        while True:
            try:
                async with Redis.from_url(self._url, retry=None, socket_timeout=None) as redis, \
                        redis.pubsub() as pubsub:
                    await pubsub.psubscribe(self._pattern)
                    async for message in pubsub.listen():
                        if message["type"] == "pmessage":
                            now_s = time.monotonic()
                            for completion_id, entry in parse_push(message["data"]):
                                self._seen[completion_id].append((now_s, entry.epoch))
            except (RedisError, OSError):
                await asyncio.sleep(RECONNECT_S)
