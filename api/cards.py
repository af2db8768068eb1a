"""Cards that outlive their workers: a log has the ids of tokens, and whoever reads it again may need their bytes.

It knows where cards are kept in Redis, nothing of answers.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis

from api.directory import Served
from shared.card import Card
from shared.keys import Shard
from shared.settings import Settings
from shared.tokenizer import Tokenizer

MAX_LOADED = 2                                          # tokenizers per pod; a large one takes some 100 MB


class Cards:
    """The cards that stored answers need, one of each tokenizer and shard."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._lifetime_ms = round((settings.request_deadline_s + settings.store_s) * 1000)
        self._loaded: dict[str, Tokenizer] = {}         # by tokenizer id, the one used last at the end
        self._lock = asyncio.Lock()                     # many readers load a tokenizer once

    async def keep(self, served: Served) -> None:
        """Keeps the card for as long as an answer that is submitted now may be stored."""
        shard, kept = served.queue.shard, _key(served.queue.shard, served.card.tokenizer_id)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.copy(shard.key(f"card:{served.announcement.card_hash}"), kept)     # unless there is one
            pipe.pexpire(kept, self._lifetime_ms)
            await pipe.execute()

    async def tokenizer(self, shard: Shard, tokenizer_id: str) -> Tokenizer | None:
        async with self._lock:
            tokenizer = self._loaded.pop(tokenizer_id, None) or await self._load(shard, tokenizer_id)
            if tokenizer:
                self._loaded[tokenizer_id] = tokenizer
                for unused in [*self._loaded][:-MAX_LOADED]:
                    del self._loaded[unused]
            return tokenizer

    async def _load(self, shard: Shard, tokenizer_id: str) -> Tokenizer | None:
        packed: Any = await self._redis.get(_key(shard, tokenizer_id))
        if packed is None:
            return None
        # Tens of milliseconds for a large vocabulary: keeps the loop free for relaying.
        return await asyncio.to_thread(lambda: Tokenizer(Card.unpack(None, packed)))


def _key(shard: Shard, tokenizer_id: str) -> str:
    return shard.key(f"tokenizer:{tokenizer_id}")
