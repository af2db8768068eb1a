"""Idempotency-Key: the same key, body and API mean the same completion, on any pod, for as long as its answer is kept.

A key is reserved before the job is submitted, and released if that fails. It knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from redis.asyncio import Redis

from api.scripts import register
from shared.errors import IdempotencyKeyReused, InvalidValue
from shared.job import Language
from shared.keys import Shard, shard_of, tenant_key
from shared.settings import Settings

MAX_KEY_BYTES = 255
UNSUBMITTED_S = 60.0                                    # from a reservation to its job at most, retries included


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a key refers to."""

    redis_key: str
    value: str                                          # as it is stored: the body's digest, the completion's id
    is_ours: bool                                       # this request is the first with the key
    age_s: float

    @property
    def completion_id(self) -> str:
        return self.value.partition(" ")[2]

    @property
    def shard(self) -> Shard:
        shard = shard_of(self.completion_id)
        assert shard, "we reserve ids of completions alone"
        return shard


class Reservations:
    """The keys of all tenants."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._reserve = register(redis, "reserve")
        self._unreserve = register(redis, "unreserve")
        self._deadline_s = settings.request_deadline_s

    async def reserve(self, tenant: str, key: str, language: Language, body: bytes, retain_s: float, completion_id: str
                      ) -> Reservation:
        """Reserves the key for this completion, whose answer is kept for `retain_s`; returns that, or the earlier
        reservation. Raises IdempotencyKeyReused, InvalidValue."""
        raw = key.encode("latin-1")
        if not 0 < len(raw) <= MAX_KEY_BYTES:
            raise InvalidValue(f"An Idempotency-Key has 1 to {MAX_KEY_BYTES} bytes.", param="Idempotency-Key")
        redis_key = tenant_key(tenant, f"idempotency:{hashlib.sha256(raw).hexdigest()}")
        said = body if language == "chat" else f"{language}\n".encode() + body
        ours = f"{hashlib.sha256(said).hexdigest()} {completion_id}"
        lifetime_ms = round((self._deadline_s + retain_s) * 1000)
        stored, left_ms = await self._reserve(keys=[redis_key], args=[ours, lifetime_ms])
        value = stored.decode()
        if value.partition(" ")[0] != ours.partition(" ")[0]:
            raise IdempotencyKeyReused(param="Idempotency-Key")
        return Reservation(redis_key, value, value == ours, (lifetime_ms - left_ms) / 1000)

    async def give_back(self, reservation: Reservation) -> None:
        """Releases the key, unless it refers to something else by now."""
        await self._unreserve(keys=[reservation.redis_key], args=[reservation.value])
