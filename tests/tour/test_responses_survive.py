"""The language of responses on real processes: in the background it needs neither its client nor its pod."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.client import ResumingTransport
from tests.nursery import Nursery
from tests.system import MODEL, System, eventually

COUNT = "Count from 1 to 40."
ANSWER = ", ".join(map(str, range(1, 41)))


@pytest.fixture
def system(redis_url: str, nursery: Nursery, tmp_path: Path) -> Iterator[System]:
    """Two pods and two workers that log every token by itself."""
    system = System(tmp_path, redis_url, allow_no_aof=True, flush_s=0, lease_s=1, idle_poll_s=0.2, reader_ttl_s=3,
                    served_model_name=f"{MODEL}-responses", start=nursery.start)
    system.start_all(2)
    system.start_pod()
    system.await_workers(2)
    yield system
    system.stop()


def sdk(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0, timeout=60, **options)


def test_in_the_background_a_response_outlives_its_pod_and_its_worker(system: System) -> None:
    first, second = system.pods
    response = sdk(first).responses.create(model=system.model, input=COUNT, background=True, temperature=0)
    assert response.status == "queued"
    worker = system.worker_of(response.id)
    system.pods[first].end(signal.SIGKILL)
    worker.end(signal.SIGKILL)
    client = sdk(second)
    done = eventually("the response is complete", lambda: (
        found if (found := client.responses.retrieve(response.id)).status == "completed" else None), 60)
    assert done.output_text == ANSWER
    following = client.responses.create(model=system.model, input="Spell apple.", previous_response_id=response.id)
    assert following.status == "completed" and following.previous_response_id == response.id


def test_a_client_with_our_transport_reads_on_when_its_pod_dies(system: System) -> None:
    first, second = system.pods
    http = httpx.Client(transport=ResumingTransport(origins=[second]), timeout=60)
    with sdk(first, http_client=http).responses.stream(model=system.model, input=COUNT, temperature=0) as stream:
        numbers, text = [], ""
        for event in stream:
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                text += event.delta
                if len(text) > 20 and system.pods[first].popen.poll() is None:
                    system.pods[first].end(signal.SIGKILL)
        assert text == ANSWER == stream.get_final_response().output_text
    assert numbers == list(range(len(numbers))), "each event once"
