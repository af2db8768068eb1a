"""Connections to Redis: one for verbs, one of its own for each blocking read, and what Redis must be like.

Every verb is idempotent, so redis-py may send it again when a reply was lost. A subscription blocks, so it never shares
a pool with commands, has no read timeout, and its retry loop is ours: after each connect the caller must look at what
it may have missed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from shared.errors import BrokenEnvironment

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 5.0
MAX_RETRIES = 4                                         # of one verb, by redis-py: about a second in all
MAX_CONNECTIONS = 64                                    # per pool; further commands wait for one
RECONNECT_S = 0.2
SUBSCRIBE_S = 0.1                                       # until a new channel is noticed in silence
MIN_VERSION = (6, 2)

UNREACHABLE = (ConnectionError, TimeoutError, BusyLoadingError)
"""Redis does not answer now. The verb may have been executed."""


class NotNow(RedisError):
    """Redis answers, and executes nothing now."""


NOT_NOW = re.compile(r"\b(BUSY|MISCONF|OOM|READONLY|NOREPLICAS|MASTERDOWN|TRYAGAIN|LOADING)\b")
UNWRITABLE = (ReadOnlyError, OutOfMemoryError, NotNow)
"""Redis answers and refuses writes now. The verb was not executed, or not to its end."""


@contextmanager
def refusals() -> Iterator[None]:
    """Raises NotNow for what redis-py, or a script of Redis 6.2, takes for an error of ours."""
    try:
        yield
    except ResponseError as error:
        if NOT_NOW.search(str(error)):
            raise NotNow(str(error)) from None
        raise


def connect(url: str) -> Redis:
    """A client for verbs. Raises BrokenEnvironment when the URL is none."""
    try:
        pool = BlockingConnectionPool.from_url(
            url, socket_timeout=COMMAND_TIMEOUT_S, socket_connect_timeout=COMMAND_TIMEOUT_S, health_check_interval=15,
            max_connections=MAX_CONNECTIONS, timeout=COMMAND_TIMEOUT_S,
            retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), MAX_RETRIES),
            retry_on_error=[BusyLoadingError])
    except ValueError:
        raise BrokenEnvironment("BATON_REDIS_URL (--redis-url): give redis://HOST:PORT/0, or unix://PATH") from None
    pool.connection_class = _that_says_so(pool.connection_class)
    return Redis.from_pool(pool)


def _that_says_so(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """The same connection; a write to one that was reset fails as lost ones do, under uvloop too."""
    class Connection(kind):  # type: ignore[valid-type, misc]
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as error:               # uvloop's, when the transport has been closed
                raise ConnectionError("the connection was reset") from error

    return Connection


async def listen(url: str, channels: Collection[str]) -> AsyncIterator[tuple[str, bytes | None]]:
    """(channel, message) for ever; message None when a channel was (re)subscribed: something may have been missed.

    `channels` may grow: it is looked at again with every message, and every `SUBSCRIBE_S`.
    """
    while True:
        client = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=COMMAND_TIMEOUT_S,
                                health_check_interval=5, retry=Retry(ExponentialWithJitterBackoff(), 0))
        client.connection_pool.connection_class = _that_says_so(client.connection_pool.connection_class)
        try:
            async with client, client.pubsub() as pubsub:
                subscribed: set[str] = set()
                while True:
                    if new := set(channels) - subscribed:
                        await pubsub.subscribe(*new)
                        subscribed |= new
                    if not subscribed:
                        await asyncio.sleep(SUBSCRIBE_S)
                        continue
                    message = await pubsub.get_message(timeout=SUBSCRIBE_S)
                    if message and message["type"] in ("subscribe", "message"):
                        is_message = message["type"] == "message"
                        yield message["channel"].decode(), message["data"] if is_message else None
        except (*UNREACHABLE, OSError) as error:
            log.warning("subscription lost (%s), connecting again", type(error).__name__)
            await asyncio.sleep(RECONNECT_S)


async def check(redis: Redis, *, allow_no_aof: bool) -> None:
    """Asserts at start what the protocol relies on. Raises BrokenEnvironment with what to change."""
    try:
        info: dict[str, Any] = await redis.info()
    except (*UNREACHABLE, OSError) as error:
        # redis-py wraps a refused handshake in a plain ConnectionError.
        if isinstance(error, AuthenticationError) or isinstance(error.__context__, AuthenticationError):
            raise BrokenEnvironment("Redis wants a password: BATON_REDIS_URL=redis://:PASSWORD@HOST:PORT/0") from None
        raise BrokenEnvironment("no Redis answers at BATON_REDIS_URL (--redis-url): start one, or correct it") from None
    except RedisError as error:
        raise BrokenEnvironment(f"Redis does not let us look at it ({type(error).__name__}): allow INFO") from None
    for problem in problems(info, allow_no_aof=allow_no_aof):
        raise BrokenEnvironment(problem)


def problems(info: dict[str, Any], *, allow_no_aof: bool) -> list[str]:
    """What is wrong with a Redis of this INFO, each with the change that mends it."""
    found = []
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        found.append(f"Redis {version} is too old: install 6.2 or later")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(f"Redis evicts jobs in silence (it has {policy}): CONFIG SET maxmemory-policy noeviction")
    if not info.get("aof_enabled") and not allow_no_aof:
        found.append("Redis forgets accepted jobs when it restarts: CONFIG SET appendonly yes, "
                     "or set BATON_ALLOW_NO_AOF=true to accept that")
    if info.get("role") == "slave":
        found.append("this Redis is a replica and takes no writes: give the address of the primary")
    return found
