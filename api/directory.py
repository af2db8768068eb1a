"""The models that are served: read from the directory in which workers announce them; cards are cached by hash."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from shared import connection
from shared.card import Announcement, Card
from shared.errors import ModelNotFound, NoWorker, Unavailable
from shared.keys import DIRECTORY, Shard
from shared.queue import Queue
from shared.settings import Settings
from shared.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_SILENCE_S = 5.0                                     # of a shard, while the directory is refreshed
MIN_REFRESH_S = 0.2                                     # an unknown name triggers a refresh, at most this often


@dataclass(frozen=True, slots=True)
class Served:
    """A shard that is served, and what is needed to queue a job there."""

    queue: Queue
    tokenizer: Tokenizer
    announcement: Announcement

    @property
    def card(self) -> Card:
        return self.tokenizer.card


class Directory:
    """The models that this pod knows of: at most `announce_s` old, or as of the last unknown name. An announcement is
    valid until it expires, even if Redis has lost it."""

    def __init__(self, redis: Redis, settings: Settings, hear: Callable[[Shard], Awaitable[None]]) -> None:
        self._redis = redis
        self._hear = hear                               # of the relay: subscribes to a shard
        self._settings = settings
        self._names: dict[str, list[Served]] = {}
        self._heard: list[Announcement] = []            # the latest announcement of each shard
        self._known: set[str] = set()                   # models not served at the moment included
        self._tokenizers: dict[str, Tokenizer] = {}     # by card hash
        self._queues: dict[str, Queue] = {}             # by shard id
        self._refreshed_s = 0.0
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Directory {sorted(self._names)}>"

    def names(self) -> dict[str, Card]:
        """Every name that is served, and its card."""
        return {name: served[0].card for name, served in sorted(self._names.items())}

    def queues(self) -> list[Queue]:
        return list(self._queues.values())

    def queue(self, shard: Shard) -> Queue:
        if shard.id not in self._queues:
            self._queues[shard.id] = Queue(self._redis, shard, self._settings)
        return self._queues[shard.id]

    async def find(self, name: str) -> Served:
        """A shard of the model, any of those that are served. Raises ModelNotFound or NoWorker."""
        if name not in self._names:
            await self.refresh(MIN_REFRESH_S)
        if served := self._names.get(name):
            return random.choice(served)
        if name in self._known:
            raise NoWorker(retry_after_s=self._settings.announce_ttl_s)
        raise ModelNotFound(param="model")

    async def tokenizer(self, model: str, tokenizer_id: str) -> Tokenizer:
        """The tokenizer of an answer of this model. Raises NoWorker when no worker announces it."""
        for max_age_s in (math.inf, MIN_REFRESH_S):
            await self.refresh(max_age_s)
            for served in self._names.get(model, ()):
                if served.card.tokenizer_id == tokenizer_id:
                    return served.tokenizer
        raise NoWorker(retry_after_s=self._settings.announce_ttl_s)

    async def run(self) -> None:
        """Refreshes until cancelled."""
        while True:
            try:
                await self.refresh()
            except connection.TROUBLE as error:         # Redis is away: keep what we have
                log.warning("the directory could not be read: %s", type(error).__name__)
            await asyncio.sleep(self._settings.announce_s)

    async def refresh(self, max_age_s: float = 0.0) -> None:
        async with self._lock:
            loop = asyncio.get_running_loop()
            if self._refreshed_s and loop.time() - self._refreshed_s < max_age_s:
                return
            seconds, micros = await self._redis.time()
            fields: Any = await self._redis.hgetall(DIRECTORY)
            await self._adopt(list(_decode(fields.values())), seconds * 1000 + micros // 1000)
            self._refreshed_s = loop.time()

    async def _adopt(self, announcements: list[Announcement], now_ms: int) -> None:
        names: dict[str, list[Served]] = {}
        there = {word.shard for word in announcements}
        words = [*announcements, *(word for word in self._heard if word.shard not in there)]
        self._heard = [word for word in words if word.expires_ms > now_ms]
        for served in await asyncio.gather(*map(self._served, self._heard)):
            if served:
                for name in served.announcement.names:
                    names.setdefault(name, []).append(served)
        self._names = names
        self._known |= {name for announcement in announcements for name in announcement.names}
        in_use = {word.card_hash for word in words}
        self._tokenizers = {card: tokenizer for card, tokenizer in self._tokenizers.items() if card in in_use}

    async def _served(self, announcement: Announcement) -> Served | None:
        """The shard as served now; as before where it does not respond, so that it holds up no other."""
        shard = Shard(announcement.shard)
        try:
            async with asyncio.timeout(MAX_SILENCE_S):
                tokenizer = await self._tokenizer(announcement)
                await self._hear(shard)
        except (*connection.TROUBLE, Unavailable) as error:
            log.warning("shard %s does not respond: %s", shard.id, type(error).__name__)
            known = (served for each in self._names.values() for served in each)
            return next((served for served in known if served.queue.shard == shard), None)
        return Served(self.queue(shard), tokenizer, announcement) if tokenizer else None

    async def _tokenizer(self, announcement: Announcement) -> Tokenizer | None:
        card_hash = announcement.card_hash
        if card_hash not in self._tokenizers:
            packed: Any = await self._redis.get(Shard(announcement.shard).key(f"card:{card_hash}"))
            if packed is None:
                return None
            try:
                # Tens of milliseconds for a large vocabulary: keeps the loop free for relaying.
                tokenizer = await asyncio.to_thread(lambda: Tokenizer(Card.unpack(card_hash, packed)))
            except Exception as error:                  # tokenizers raises plain Exceptions
                log.warning("a card of shard %s cannot be used: %s", announcement.shard, type(error).__name__)
                return None
            self._tokenizers[card_hash] = tokenizer
        return self._tokenizers[card_hash]


def _decode(rows: Iterable[bytes]) -> Iterator[Announcement]:
    for raw in rows:
        try:
            yield Announcement.decode(raw)
        except ValueError:                              # of another version, whose workers have their own pods
            log.warning("an announcement cannot be read")
