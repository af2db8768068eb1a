"""What Redis must be like, and what is said when it is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ConnectionError, RedisError

from deploy.redis import RedisServer
from shared import connection
from shared.errors import BrokenEnvironment
from tests.chaos.proxy import Proxy

GOOD: dict[str, Any] = {"redis_version": "6.2.14", "maxmemory_policy": "noeviction", "aof_enabled": 1, "role": "master"}


@pytest.mark.parametrize(("wrong", "advice"), [
    ({"redis_version": "6.0.16"}, "install 6.2 or later"),
    ({"redis_version": "5.0"}, "install 6.2 or later"),
    ({"maxmemory_policy": "allkeys-lru"}, "CONFIG SET maxmemory-policy noeviction"),
    ({"aof_enabled": 0}, "CONFIG SET appendonly yes"),
    ({"role": "slave"}, "address of the primary"),
])
def test_a_wrong_redis_is_refused_with_the_remedy(wrong: dict[str, Any], advice: str) -> None:
    (problem,) = connection.problems(GOOD | wrong, allow_no_aof=False)
    assert advice in problem


def test_a_right_redis_is_accepted() -> None:
    assert connection.problems(GOOD, allow_no_aof=False) == []
    assert connection.problems(GOOD | {"aof_enabled": 0}, allow_no_aof=True) == []


async def test_a_real_redis_that_evicts_is_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "r", options=("--maxmemory-policy", "allkeys-lru")).start()
    redis = connection.connect(server.url)
    try:
        with pytest.raises(BrokenEnvironment, match="noeviction"):
            await connection.check(redis, allow_no_aof=False)
    finally:
        await redis.aclose()
        server.stop()


async def test_no_redis_and_a_wrong_password_are_one_line_each(tmp_path: Path) -> None:
    nobody = connection.connect(f"unix://{tmp_path}/none.sock")
    with pytest.raises(BrokenEnvironment, match="start one"):
        await connection.check(nobody, allow_no_aof=False)
    server = RedisServer(tmp_path / "r").start()
    redis = connection.connect(server.url)
    try:
        await redis.config_set("requirepass", "secret")
        await redis.connection_pool.disconnect()
        with pytest.raises(BrokenEnvironment, match="password"):
            await connection.check(redis, allow_no_aof=False)
    finally:
        await redis.aclose()
        server.stop()


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(BrokenEnvironment, match="redis://"):
        connection.connect("localhost:6379")


async def test_a_subscription_that_is_cut_says_so_and_goes_on(each_redis: Redis, each_redis_url: str) -> None:
    heard: list[bytes | None] = []

    async def listen() -> None:
        async for _, message in connection.listen(each_redis_url, ["channel"]):
            heard.append(message)

    async def until(number: int) -> None:
        async with asyncio.timeout(10):
            while len(heard) < number:
                await asyncio.sleep(0.01)

    task = asyncio.create_task(listen())
    await until(1)
    publish: Any = each_redis.publish
    everywhere: dict[str, Any] = {}
    if isinstance(each_redis, RedisCluster):
        publish, everywhere = each_redis.spublish, {"target_nodes": RedisCluster.PRIMARIES}
    await publish("channel", "one")
    await until(2)
    redis: Any = each_redis
    await redis.execute_command("CLIENT KILL", "TYPE", "pubsub", **everywhere)
    await until(3)
    await publish("channel", "two")
    await until(4)
    assert heard == [None, b"one", None, b"two"]
    task.cancel()


async def test_a_subscription_outlives_a_busy_redis(tmp_path: Path) -> None:
    """Which refuses even the PING of an idle connection, while a script of anybody runs."""
    server = RedisServer(tmp_path / "r", options=("--lua-time-limit", "50")).start()
    heard: list[bytes | None] = []

    async def listen() -> None:
        async for _, message in connection.listen(server.url, ["channel"]):
            heard.append(message)

    redis: Any = connection.connect(server.url)
    task = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(30):
            while not heard:
                await asyncio.sleep(0.01)
            script = asyncio.create_task(redis.eval("while true do end", 0))
            await asyncio.sleep(connection.SUBSCRIPTION_CHECK_S + 1.5)
            assert not task.done()
            await redis.script_kill()
            await asyncio.wait([script])
            assert isinstance(script.exception(), RedisError)
            while len(heard) < 2:
                await asyncio.sleep(0.01)
            await redis.publish("channel", "one")
            while heard[-1] != b"one":
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await redis.aclose()
        server.stop()


def test_a_connection_that_was_reset_is_replaced_in_silence(redis_url: str) -> None:
    """Under uvloop, which has words of its own for a closed transport; a pod runs on it."""
    async def reset_between_commands() -> None:
        async with Proxy(redis_url) as wire:
            redis = connection.connect(wire.url)
            for _ in range(20):
                await asyncio.gather(*(redis.ping() for _ in range(4)))
                wire.cut()
                await asyncio.sleep(0)
            await redis.aclose()
            assert wire.num_cut >= 20

    uvloop.run(reset_between_commands())


async def test_a_connection_that_is_closed_while_it_opens_is_a_lost_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another task, as a cluster client does with every node when one of them is gone."""
    server = RedisServer(tmp_path / "r").start()
    redis = connection.connect(server.url)
    pool: Any = redis.connection_pool
    opening = pool.make_connection()
    try:
        await opening.connect()

        async def close(**_: object) -> None:
            await opening.disconnect()

        monkeypatch.setattr(opening, "connect_check_health", close)
        await opening.disconnect()
        with pytest.raises(ConnectionError, match="reset"):
            await opening.send_command("PING")
    finally:
        await redis.aclose()
        server.stop()


async def test_a_redis_that_is_silent_holds_up_no_other(tmp_path: Path) -> None:
    """One answers, one takes connections and says nothing, one is gone."""
    server = RedisServer(tmp_path / "r").start()
    async with Proxy(server.url) as silent:
        redises = [connection.connect(url) for url in (server.url, silent.url, f"unix://{tmp_path}/gone.sock")]
        silent.freeze()
        answered = list[Redis]()

        async def ask(redis: Redis) -> None:
            await redis.ping()
            answered.append(redis)

        failed = await connection.for_each(redises, ask, 0.5)
        assert answered == redises[:1]
        assert {id(redis) for redis, _ in failed} == set(map(id, redises[1:]))
        for redis in redises:
            await redis.aclose()
    server.stop()


async def test_more_commands_than_connections_wait(each_redis_url: str) -> None:
    """On one Redis and on a cluster, pipelines too."""
    redis, key, number = connection.connect(each_redis_url), "{many}:added", 4 * connection.MAX_CONNECTIONS

    async def add(member: int) -> None:
        async with redis.pipeline(transaction=False) as pipe:
            pipe.sadd(key, member)
            pipe.sadd(key, -member)
            await pipe.execute()

    await redis.delete(key)                             # knows the cluster by now
    await asyncio.gather(*(redis.sadd(key, number + each) for each in range(number)),
                         *(add(each) for each in range(1, number)))
    assert int(await redis.scard(key)) == 3 * number - 2
    await redis.delete(key)
    await redis.aclose()
