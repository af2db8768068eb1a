"""A pod whose workers are scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import httpx
import pytest

from shared import connection
from tests.api.scripted import WAIT_S, ScriptedWorker, until_known
from tests.system import System

HEARTBEAT_S = 0.2
MAX_BODY_BYTES = 100_000
MAX_QUEUED = 3
ORIGIN = "https://page.example"
KEYS = ("sk-first", "sk-second")                        # of the pair
READER_TTL_S = 3.0


@pytest.fixture(scope="package")
def pod(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One pod with small bounds, and no worker of its own."""
    system = System(tmp_path_factory.mktemp("pod"), redis_url, allow_no_aof=True, heartbeat_s=HEARTBEAT_S,
                    max_body_bytes=MAX_BODY_BYTES, max_queued=MAX_QUEUED, max_pending_entries=4, cors_origins=ORIGIN)
    system.start_pod()
    yield system
    system.stop()


@pytest.fixture
async def worker(redis_url: str, http: httpx.AsyncClient) -> AsyncIterator[ScriptedWorker]:
    """A worker by script, on a model of its own that the pod knows."""
    redis = connection.connect(redis_url)
    worker = ScriptedWorker(redis)
    await worker.announce()
    await until_known(http, worker)
    yield worker
    await worker.leave()
    await redis.aclose()


@pytest.fixture
async def http(pod: System) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="package")
def pair(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two pods with two keys, which forget a reader soon."""
    system = System(tmp_path_factory.mktemp("pair"), redis_url, allow_no_aof=True, api_key=",".join(KEYS),
                    heartbeat_s=HEARTBEAT_S, reader_ttl_s=READER_TTL_S, retain_s=60)
    system.start_pod()
    system.start_pod()
    yield system
    system.stop()


@pytest.fixture
async def pods(pair: System) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client of each pod of the pair, with the first key."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(client(url)) for url in pair.pods]


def client(url: str, key: str = KEYS[0]) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=WAIT_S, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
async def pair_worker(pods: list[httpx.AsyncClient], redis_url: str) -> AsyncIterator[ScriptedWorker]:
    """A worker by script that both pods of the pair know."""
    redis = connection.connect(redis_url)
    worker = ScriptedWorker(redis)
    await worker.announce()
    for pod in pods:
        await until_known(pod, worker)
    yield worker
    await worker.leave()
    await redis.aclose()
