"""A batch is nobody's: whichever pod runs it may be killed, and the next one goes on, with every line exactly once."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.redis import RedisServer
from tests.conftest import short_folder
from tests.nursery import Nursery
from tests.system import MODEL, System, answers, eventually

NUM_LINES = 240
MAX_TOKENS = 24
OVER_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis where nobody else's pods look for batches."""
    server = RedisServer(short_folder(tmp_path_factory)).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def own(server: RedisServer, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One pod and one worker."""
    system = System(tmp_path_factory.mktemp("batches"), server.url, start=nursery.start)
    system.start_all(1)
    yield system
    system.stop()


def sdk(url: str) -> openai.Client:
    return openai.Client(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0, timeout=30)


def body(number: int) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0,
            "messages": [{"role": "user", "content": f"Count from {number} to {number + 30}."}]}


def write_lines(path: Path) -> Path:
    lines = [{"custom_id": f"line {number}", "method": "POST", "url": "/v1/chat/completions", "body": body(number)}
             for number in range(NUM_LINES)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def has_done(url: str, batch_id: str, number: int) -> bool:
    counts = sdk(url).batches.retrieve(batch_id).request_counts
    assert counts
    return counts.completed >= number


def test_pods_are_killed_in_the_middle_and_every_line_is_answered_once(own: System, tmp_path: Path) -> None:
    """Twice, and each time another pod takes over. The shard counts the jobs: as many as lines, none made twice."""
    first = sdk(own.url)
    file = first.files.create(file=write_lines(tmp_path / "lines.jsonl"), purpose="batch")
    batch = first.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    for share in (4, 2):
        doomed, part = own.url, NUM_LINES // share
        eventually("a part is done", partial(has_done, doomed, batch.id, part), OVER_S)
        assert own.redis.exists(f"{{t.anonymous}}:pump:{batch.id}"), "the only pod runs it"
        own.pods.pop(doomed).popen.kill()               # at once: a fast machine would finish while another starts
        own.start_pod()
        assert not has_done(own.url, batch.id, NUM_LINES)

    last = sdk(own.url)
    eventually("the batch is over", lambda: last.batches.retrieve(batch.id).status == "completed", OVER_S)
    batch = last.batches.retrieve(batch.id)
    assert batch.request_counts
    assert batch.request_counts.to_dict() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert batch.error_file_id is None and batch.output_file_id
    found = [json.loads(line) for line in last.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in found] == [f"line {number}" for number in range(NUM_LINES)]
    counters = {name.decode(): int(value) for name, value in own.redis.hgetall(own.shard.key("counters")).items()}
    assert (counters["submitted"], counters["finished"]) == (NUM_LINES, NUM_LINES)
    assert own.num_live_jobs() == 0
    for number in range(0, NUM_LINES, 80):
        alone = last.chat.completions.create(**body(number))
        assert found[number]["response"]["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content


def test_a_pod_that_was_frozen_while_another_took_over_doubles_nothing(own: System, tmp_path: Path) -> None:
    """When it wakes it is in the middle of lines that have a result by now."""
    client, doomed = sdk(own.url), own.url
    before = int(own.redis.hget(own.shard.key("counters"), "submitted"))
    file = client.files.create(file=write_lines(tmp_path / "lines.jsonl"), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    pump = f"{{t.anonymous}}:pump:{batch.id}"
    holder = eventually("the only pod runs it", lambda: own.redis.get(pump))
    eventually("some lines are done", partial(has_done, doomed, batch.id, 50), OVER_S)
    second = own.start_pod()
    other = sdk(second)
    own.pods[doomed].send(signal.SIGSTOP)
    eventually("another pod runs it", lambda: own.redis.get(pump) not in (None, holder))
    eventually("it goes on", partial(has_done, second, batch.id, 200), OVER_S)
    own.pods[doomed].send(signal.SIGCONT)
    eventually("the batch is over", lambda: other.batches.retrieve(batch.id).status == "completed", OVER_S)
    batch = other.batches.retrieve(batch.id)
    assert batch.request_counts and batch.request_counts.completed == NUM_LINES and batch.output_file_id
    found = [json.loads(line)["custom_id"] for line in other.files.content(batch.output_file_id).text.splitlines()]
    assert found == [f"line {number}" for number in range(NUM_LINES)]
    assert int(own.redis.hget(own.shard.key("counters"), "submitted")) - before == NUM_LINES
    assert own.num_live_jobs() == 0


def test_a_redis_that_is_killed_fails_no_line(own: System, server: RedisServer, tmp_path: Path) -> None:
    """Nor does it double one: what was accepted stands in its append-only file."""
    client = sdk(own.url)
    before = int(own.redis.hget(own.shard.key("counters"), "submitted"))
    file = client.files.create(file=write_lines(tmp_path / "lines.jsonl"), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    for number in (50, 200):
        eventually("some lines are done", partial(has_done, own.url, batch.id, number), OVER_S)
        server.kill()
        time.sleep(1.0)                                 # some verbs fail meanwhile, for good
        server.start()
        eventually("the pod is ready", partial(answers, f"{own.url}/ready"))
    eventually("the batch is over", lambda: client.batches.retrieve(batch.id).status == "completed", OVER_S)
    batch = client.batches.retrieve(batch.id)
    assert batch.request_counts
    assert batch.request_counts.to_dict() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert int(own.redis.hget(own.shard.key("counters"), "submitted")) - before == NUM_LINES
