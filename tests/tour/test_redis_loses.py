"""Redis itself dies, forgets, or is replaced by a copy that lags: pods and workers put back what clients have read."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from redis import Redis

from deploy.redis import RedisServer
from tests.nursery import Nursery
from tests.switch import pass_on
from tests.system import MODEL, System, eventually, free_port
from tests.tour.test_streams_survive import Reader

NAME = "forgetful"
STILL_S = 10.0
NUM_TOKENS = 400                                        # of each of two choices


class Address:
    """One address, at which one Redis answers or another. It serves from a thread: tests wait for processes."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.port = free_port()
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()

    def move_to(self, server: RedisServer) -> None:
        """From now on; connections to the other are cut."""
        def move() -> None:
            self.server = server
            for writer in self._open:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(move)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._accept, "127.0.0.1", self.port):
            await self._stop.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError):
            from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self.server.port)
            await asyncio.gather(pass_on(reader, to_redis), pass_on(from_redis, writer))
        writer.close()
        self._open.discard(writer)


@dataclass
class Stage:
    """A Redis without an append-only file behind an address, a copy of it, and two workers and a pod that know the
    address alone."""

    primary: RedisServer
    copy: RedisServer
    address: Address
    system: System

    def move_to(self, server: RedisServer) -> None:
        self.address.move_to(server)
        self.system.redis = Redis.from_url(server.url)


@pytest.fixture(scope="module")
def stage(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    servers = [RedisServer(tmp_path_factory.mktemp("r"), port=free_port(), options=("--appendonly", "no")).start()
               for _ in range(2)]
    address = Address(servers[0])
    system = System(tmp_path_factory.mktemp("lossy"), f"redis://127.0.0.1:{address.port}/0", lease_s=1.0,
                    idle_poll_s=0.2, allow_no_aof=True, served_model_name=f"{NAME},{MODEL}-{NAME}",
                    start=nursery.start)
    system.start_all(2)
    yield Stage(servers[0], servers[1], address, system)
    system.stop()
    address.close()
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def uninterrupted(stage: Stage) -> tuple[Any, ...]:
    reader = Reader(stage.system, NAME, NUM_TOKENS)
    reader.read()
    return reader.answer


def forgets(stage: Stage) -> None:
    """Killed, and there again with nothing."""
    stage.primary.kill()
    stage.primary.start()


def is_flushed(stage: Stage) -> None:
    with Redis.from_url(stage.primary.url) as redis:
        redis.flushall()


def stands_still(stage: Stage) -> None:
    """For longer than any command waits, and any lease lasts."""
    assert stage.primary.process
    stage.primary.process.send_signal(signal.SIGSTOP)
    time.sleep(STILL_S)
    stage.primary.process.send_signal(signal.SIGCONT)


def is_replaced_by_an_empty_one(stage: Stage) -> None:
    with Redis.from_url(stage.copy.url) as redis:
        redis.flushall()
    stage.move_to(stage.copy)


@pytest.mark.parametrize("happens", [forgets, is_flushed, is_replaced_by_an_empty_one, stands_still])
def test_what_happens_to_redis_costs_a_connected_client_nothing(
        stage: Stage, uninterrupted: tuple[Any, ...], happens: Callable[[Stage], None]) -> None:
    """Exact continuation, where its data is lost from what the pods and the workers hold."""
    reader = Reader(stage.system, NAME, NUM_TOKENS)
    reader.read(200)
    happens(stage)
    reader.read()
    stage.move_to(stage.primary)
    assert reader.answer == uninterrupted
    stage.system.await_workers(2)


def test_a_promoted_copy_that_lags_is_recognised_and_repaired(stage: Stage, uninterrupted: tuple[Any, ...]) -> None:
    """It stopped following while the client read on, and then took the primary's place, under load."""
    with Redis.from_url(stage.copy.url) as copy:
        copy.flushall()
        copy.replicaof("127.0.0.1", str(stage.primary.port))
        eventually("the copy follows", lambda: copy.info("replication")["master_link_status"] == "up")
        readers = [Reader(stage.system, NAME, NUM_TOKENS) for _ in range(2)]
        for reader in readers:
            reader.read(100)
        copy.replicaof("NO", "ONE")
        for reader in readers:
            reader.read(300)
        stage.move_to(stage.copy)
        for reader in readers:
            reader.read()
            assert reader.answer == uninterrupted
            assert stage.system.log_entries(reader.id)[-1][1]["kind"] == "end"
    stage.move_to(stage.primary)
    stage.system.await_workers(2)
