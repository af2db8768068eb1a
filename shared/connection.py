"""Connections to Redis: a pool for verbs, one connection per blocking read, and the checks of Redis at start.

Every verb is idempotent, so redis-py may send it again when a reply was lost. A subscription blocks, so it never shares
a pool with commands, has no read timeout, and its retry loop is ours: after each connect the caller must look at what
it may have missed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterPipeline
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from shared.errors import BrokenEnvironment

log = logging.getLogger(__name__)
T = TypeVar("T")

COMMAND_TIMEOUT_S = 5.0
MAX_RETRIES = 4                                         # per verb, by redis-py: about a second in all
MAX_CONNECTIONS = 64                                    # per pool; further commands wait for one
RECONNECT_S = 0.2
CANCEL_AGAIN_S = 0.1                                    # until a task that ignored its cancellation is cancelled again
SUBSCRIBE_S = 0.1                                       # until a new channel is subscribed when no message comes
MIN_VERSION = (6, 2)
MIN_CLUSTER_VERSION = (7,)                              # sharded pub/sub
HEALTH_CHECK_S = 15
SUBSCRIPTION_CHECK_S = 5
CLUSTER = "+cluster"                                    # ends the scheme of a cluster's URL
MAX_HEARD = 4096                                        # messages of all shards that wait for the relay

UNREACHABLE = (ConnectionError, TimeoutError, BusyLoadingError, ClusterError, RedisClusterException)
"""Redis does not answer now. The verb may have been executed."""


class NotNow(RedisError):
    """Redis answers, but executes nothing now."""


NOT_NOW = re.compile(r"\b(BUSY|MISCONF|OOM|READONLY|NOREPLICAS|MASTERDOWN|TRYAGAIN|LOADING)\b")
TROUBLE = (RedisError, RedisClusterException, OSError)
"""Raised when Redis, or the connection to it, is at fault."""
UNWRITABLE = (ReadOnlyError, OutOfMemoryError, NotNow)
"""Redis answers but refuses writes now. The verb was not executed, or only in part."""


@contextmanager
def refusals() -> Iterator[None]:
    """Raises NotNow for refusals that redis-py, or a script on Redis 6.2, reports as a plain ResponseError."""
    try:
        yield
    except ResponseError as error:
        if NOT_NOW.search(str(error)):
            raise NotNow(str(error)) from None
        raise


def connect(url: str) -> Redis:
    """A client for verbs; for `redis+cluster://…` of a whole cluster. Raises BrokenEnvironment for an invalid URL."""
    retry: dict[str, Any] = {"retry": Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), MAX_RETRIES),
                             "retry_on_error": [BusyLoadingError]}
    timeouts: dict[str, Any] = {"socket_timeout": COMMAND_TIMEOUT_S, "socket_connect_timeout": COMMAND_TIMEOUT_S,
                                "health_check_interval": HEALTH_CHECK_S, "max_connections": MAX_CONNECTIONS}
    try:
        if is_cluster(url):
            # It has the commands that we use: each script touches one slot, and pipelines are not transactions.
            timeouts["max_connections"] *= 2            # per node: of commands, and of pipelines
            return cast(Redis, _mended_cluster(_Cluster.from_url(_node_url(url), **timeouts, **retry)))
        pool = BlockingConnectionPool.from_url(url, timeout=COMMAND_TIMEOUT_S, **timeouts, **retry)
    except ValueError:
        raise BrokenEnvironment("BATON_REDIS_URL (--redis-url): give redis://HOST:PORT/0, unix://PATH, or "
                                "redis+cluster://HOST:PORT for any node of a cluster") from None
    pool.connection_class = _mended(pool.connection_class)
    return Redis.from_pool(pool)


def _mended(kind: type[Any]) -> type[Any]:
    """The same connection class, but writing to a transport that has been closed raises ConnectionError."""
    class Connection(kind):  # type: ignore[misc]
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            try:
                await super().send_packed_command(command, check_health)
            except (RuntimeError, AttributeError) as error:     # by uvloop, if closed; by redis-py, without a writer
                raise ConnectionError("the connection was reset") from error

    return Connection


class _Cluster(RedisCluster):
    """Commands wait for a connection, as they do without a cluster; redis-py would raise MaxConnectionsError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands, self.pipelines = asyncio.Semaphore(MAX_CONNECTIONS), asyncio.Semaphore(MAX_CONNECTIONS)

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        async with self.commands:
            return await super().execute_command(*args, **kwargs)

    def pipeline(self, transaction: Any = None, *_: Any) -> ClusterPipeline:
        return _Pipeline(self, transaction)  # type: ignore[abstract]


class _Pipeline(ClusterPipeline):
    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        async with cast(_Cluster, self.cluster_client).pipelines:       # which may need a place among commands then
            return await super().execute(*args, **kwargs)


def _mended_cluster(cluster: RedisCluster) -> RedisCluster:
    cluster.connection_kwargs["connection_class"] = kind = _mended(cluster.connection_kwargs["connection_class"])
    for node in cluster.nodes_manager.startup_nodes.values():
        node.connection_class = kind
    return cluster


def is_cluster(url: str) -> bool:
    return url.partition("://")[0].endswith(CLUSTER)


def _node_url(url: str) -> str:
    return url.replace(CLUSTER, "", 1)


async def listen(url: str, channels: Collection[str]) -> AsyncGenerator[tuple[str, bytes | None], None]:
    """Yields (channel, message) for ever; None as message: the channel was (re)subscribed, messages may be missing.

    `channels` may grow: it is checked after every message, and every `SUBSCRIBE_S`.
    """
    if not is_cluster(url):
        while True:
            async for heard in _hear(parse_url(url), channels):
                yield heard
    # A sharded channel is published on the node that owns its slot, so each has a connection of its own.
    heard_of: asyncio.Queue[tuple[str, bytes | None]] = asyncio.Queue(maxsize=MAX_HEARD)
    ears: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            for channel in set(channels) - ears.keys():
                ears[channel] = asyncio.create_task(_hear_sharded(url, channel, heard_of))
            for ear in ears.values():
                if ear.done():
                    ear.result()                        # only a bug of ours ends one
            if heard_of.empty():
                await asyncio.wait([next_one := asyncio.create_task(heard_of.get())], timeout=SUBSCRIBE_S)
                if not next_one.cancel():
                    yield next_one.result()
            else:
                yield heard_of.get_nowait()
    finally:
        await end(ears.values())


async def _hear_sharded(url: str, channel: str, heard_of: asyncio.Queue[tuple[str, bytes | None]]) -> None:
    """Messages of one channel, from whichever node owns it, for ever."""
    while True:
        try:
            async with cast(RedisCluster, connect(url)) as cluster:
                node = cluster.get_node_from_key(channel)
                assert node, "a connected cluster covers every slot"
        except TROUBLE as error:
            log.warning("the cluster could not be queried (%s)", type(error).__name__)
            await asyncio.sleep(RECONNECT_S)
            continue
        async for heard in _hear(parse_url(_node_url(url)) | {"host": node.host, "port": node.port}, (channel,),
                                 is_sharded=True):
            await heard_of.put(heard)


async def _hear(address: Mapping[str, Any], channels: Collection[str], *, is_sharded: bool = False
                ) -> AsyncGenerator[tuple[str, bytes | None], None]:
    """Yields the messages of one connection until it is lost."""
    pool = ConnectionPool(**{"socket_timeout": None, "socket_connect_timeout": COMMAND_TIMEOUT_S,
                             "health_check_interval": SUBSCRIPTION_CHECK_S,
                             "retry": Retry(ExponentialWithJitterBackoff(), 0), **address})
    pool.connection_class = _mended(pool.connection_class)
    try:
        async with Redis.from_pool(pool) as client, client.pubsub() as pubsub:
            subscribed: set[str] = set()
            while True:
                if new := set(channels) - subscribed:
                    await (pubsub.ssubscribe(*new) if is_sharded else pubsub.subscribe(*new))
                    subscribed |= new
                if not subscribed:
                    await asyncio.sleep(SUBSCRIBE_S)
                    continue
                message = await pubsub.get_message(timeout=SUBSCRIBE_S)
                if message and message["type"] in ("subscribe", "message", "ssubscribe", "smessage"):
                    is_message = message["type"].endswith("message")
                    yield message["channel"].decode(), message["data"] if is_message else None
    except TROUBLE as error:                            # a busy Redis, and one that cannot save, refuse even a PING
        log.warning("subscription lost (%s), connecting again", type(error).__name__)
        await asyncio.sleep(RECONNECT_S)


async def for_each(things: Iterable[T], act: Callable[[T], Awaitable[object]], timeout_s: float
                   ) -> list[tuple[T, Exception]]:
    """Acts on all shards at once, so that one without its Redis delays no other. Returns the failed ones, and why."""
    failed = list[tuple[T, Exception]]()

    async def act_on(thing: T) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await act(thing)
        except TROUBLE as error:
            failed.append((thing, error))

    await asyncio.gather(*map(act_on, things))
    return failed


async def end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancels tasks that use Redis until they are done; only then is a cancellation of the caller raised.

    Once may not be enough: before Python 3.12 wait_for, in redis-py, loses a cancellation that arrives with a reply.
    """
    cancelled: asyncio.CancelledError | None = None
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        try:
            await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        raise cancelled


async def primaries(redis: Redis) -> list[Any]:
    """The nodes of a cluster that hold data; [None] for a single Redis."""
    if not isinstance(redis, RedisCluster):
        return [None]
    await redis.initialize()
    return list(redis.get_primaries())


async def info(redis: Redis, primary: Any, *sections: str) -> dict[str, Any]:
    """INFO of one of the `primaries`."""
    found: dict[str, Any] = await redis.info(*sections, **({"target_nodes": primary} if primary else {}))
    return found


async def check(redis: Redis, *, allow_no_aof: bool) -> None:
    """Checks at start what the protocol relies on. Raises BrokenEnvironment, which says what to change."""
    try:
        found = [await info(redis, primary) for primary in await primaries(redis)]
    except (*UNREACHABLE, OSError) as error:
        # redis-py wraps a refused handshake in a plain ConnectionError.
        if isinstance(error, AuthenticationError) or isinstance(error.__context__, AuthenticationError):
            raise BrokenEnvironment("Redis wants a password: BATON_REDIS_URL=redis://:PASSWORD@HOST:PORT/0") from None
        raise BrokenEnvironment("no Redis answers at BATON_REDIS_URL (--redis-url): start one, or correct it") from None
    except RedisError as error:
        raise BrokenEnvironment(f"Redis does not let us look at it ({type(error).__name__}): allow INFO") from None
    for facts in found:
        for problem in problems(facts, is_cluster=isinstance(redis, RedisCluster), allow_no_aof=allow_no_aof):
            raise BrokenEnvironment(problem)


def problems(info: dict[str, Any], *, allow_no_aof: bool, is_cluster: bool = False) -> list[str]:
    """What is wrong with a Redis that reports this INFO, each with the change that corrects it."""
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
    if info.get("cluster_enabled") and not is_cluster:
        found.append("this Redis is one node of a cluster: give redis+cluster://HOST:PORT")
    if is_cluster and tuple(int(part) for part in version.split(".")[:1]) < MIN_CLUSTER_VERSION:
        found.append(f"Redis {version} has no sharded channels: a cluster needs 7.0 or later")
    if info.get("role") == "slave":
        found.append("this Redis is a replica and takes no writes: give the address of the primary")
    return found
