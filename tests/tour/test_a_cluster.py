"""On a Redis Cluster of three primaries: the same promises, and a primary that is killed and comes back."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from deploy.redis import RedisServer, binaries, major
from shared.connection import MIN_CLUSTER_VERSION
from tests.cluster import cluster
from tests.conftest import short_folder
from tests.nursery import Nursery
from tests.system import MODEL, System, eventually
from tests.tools import require_tool
from tests.tour.test_streams_survive import Reader

NAME, NUM_TOKENS = "clustered", 400


@dataclass
class Stage:
    primaries: list[RedisServer]
    system: System

    @property
    def owner(self) -> RedisServer:
        """The primary that holds the model's shard."""
        node = self.system.redis.get_node_from_key(self.system.shard.key("jobs"))
        return next(server for server in self.primaries if server.port == node.port)


@pytest.fixture(scope="module")
def stage(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    require_tool("redis-server")
    binary = next(path for path in binaries() if major(path) >= MIN_CLUSTER_VERSION[0])
    with cluster(short_folder(tmp_path_factory), binary) as primaries:
        url = primaries[0].url.replace("redis://", "redis+cluster://")
        system = System(tmp_path_factory.mktemp("cluster"), url, lease_s=1.0, idle_poll_s=0.2,
                        served_model_name=f"{NAME},{MODEL}-{NAME}", start=nursery.start)
        system.start_all(2)
        yield Stage(primaries, system)
        system.stop()


@pytest.fixture(scope="module")
def uninterrupted(stage: Stage) -> tuple[Any, ...]:
    reader = Reader(stage.system, NAME, NUM_TOKENS)
    reader.read()
    return reader.answer


def test_a_killed_worker_is_not_noticed(stage: Stage, uninterrupted: tuple[Any, ...]) -> None:
    reader = Reader(stage.system, NAME, NUM_TOKENS)
    reader.read(100)
    worker = stage.system.worker_of(reader.id)
    worker.end(signal.SIGKILL)
    stage.system.workers.remove(worker)
    stage.system.start_worker()
    reader.read()
    assert reader.answer == uninterrupted
    stage.system.await_workers(2)


def test_a_batch_is_run(stage: Stage) -> None:
    """Its tenant's keys, its jobs and the index of batches lie on nodes of their own."""
    client = openai.Client(base_url=f"{stage.system.url}/v1", api_key="EMPTY", max_retries=0, timeout=30)
    body = {"model": NAME, "messages": [{"role": "user", "content": "Count from 1 to 9."}]}
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(20)]
    file = client.files.create(file=("x.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    eventually("it is over", lambda: client.batches.retrieve(batch.id).status == "completed", 60.0)
    output = client.files.content(client.batches.retrieve(batch.id).output_file_id or "").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == [str(i) for i in range(20)]


def test_a_primary_that_is_killed_and_comes_back_costs_no_token(stage: Stage, uninterrupted: tuple[Any, ...]) -> None:
    reader = Reader(stage.system, NAME, NUM_TOKENS)
    reader.read(100)
    stage.owner.kill()
    stage.owner.start()
    reader.read()
    assert reader.answer == uninterrupted
