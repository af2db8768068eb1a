"""A client that returns misses nothing: to another pod, after any event, with the official SDK and our transport."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest

from api import client as resuming
from tests.nursery import Nursery
from tests.switch import switch
from tests.system import MODEL, System

CHAT = "/v1/chat/completions"
COUNT: Any = [{"role": "user", "content": "Count from 1 to 40."}]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def pods(redis_url: str, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two pods that drain quickly, and a worker that logs every token by itself."""
    system = System(tmp_path_factory.mktemp("pods"), redis_url, allow_no_aof=True, flush_s=0, drain_s=0.1,
                    reader_ttl_s=3, served_model_name=f"{MODEL}-returns", start=nursery.start)
    system.start_worker()
    system.start_pod()
    system.start_pod()
    system.await_workers(1)
    yield system
    system.stop()


def asks(system: System, **options: Any) -> dict[str, Any]:
    return {"model": system.model, "messages": COUNT, "seed": 7, "temperature": 1.0,
            "stream": True, "stream_options": {"include_usage": True}} | options


def test_a_stream_that_was_cut_goes_on_at_its_last_event(pods: System) -> None:
    """On the other pod, with curl's means: the id: lines say where one is, a header says which completion it was."""
    first, second = pods.pods
    with httpx.stream("POST", first + CHAT, json=asks(pods, max_tokens=300, ignore_eos=True),
                      headers={"idempotency-key": "a stream that is cut"}) as response:
        completion_id = response.headers["x-baton-completion-id"]
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(60)]         # 20 events of three lines each; then the client is gone
    position = [line for line in seen if line.startswith("id: ")][-1].removeprefix("id: ")
    rest = httpx.get(f"{second}{CHAT}/{completion_id}", params={"stream": "true", "starting_after": position},
                     timeout=WAIT_S).text
    whole = httpx.get(f"{first}{CHAT}/{completion_id}", params={"stream": "true"}).text
    assert position == "20"
    assert "\n".join(seen) + "\n" + rest == whole
    assert rest.endswith("data: [DONE]\n\n")


def test_the_same_key_is_the_same_answer(pods: System) -> None:
    """The official SDK, two pods, one Idempotency-Key: whoever asks again is told the same."""
    answers = []
    for url in pods.pods:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY")
        answers.append(client.chat.completions.create(model=pods.model, messages=COUNT, temperature=1.5, max_tokens=30,
                                                      extra_headers={"Idempotency-Key": "a key of mine"}))
    assert answers[0] == answers[1]


def test_a_pod_that_is_replaced_costs_one_reconnect(pods: System) -> None:
    """SIGTERM in mid-stream: the pod says that it goes, the client returns to another one, and the text is the same."""
    options: Any = asks(pods, max_tokens=400, extra_body={"ignore_eos": True})
    leaving, staying = pods.pods
    transport = resuming.ResumingTransport(origins=[staying])
    client = openai.OpenAI(base_url=f"{leaving}/v1", api_key="EMPTY", http_client=httpx2.Client(transport=transport))
    texts = []
    for chunk in client.chat.completions.create(**options):
        texts += [choice.delta.content or "" for choice in chunk.choices]
        if len(texts) == 20:
            pods.pods[leaving].send(signal.SIGTERM)
    assert pods.pods.pop(leaving).end() == 0
    pods.start_pod()
    uninterrupted = openai.OpenAI(base_url=f"{staying}/v1", api_key="EMPTY").chat.completions.create(**options)
    assert texts == [choice.delta.content or "" for chunk in uninterrupted for choice in chunk.choices]


# ── an application of which nothing is changed but its http_client ──


@pytest.fixture(scope="module", params=["the SDK of the environment", "openai 2"])
def python(request: pytest.FixtureRequest) -> str:
    """A Python that has this SDK."""
    if request.param != "openai 2":
        return sys.executable
    python: str = request.getfixturevalue("older_python")
    return python


class Application:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, options: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(options).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), WAIT_S)
        assert line, "the application has failed: its trace stands above"
        return json.loads(line)


@asynccontextmanager
async def application(python: str, url: str, folder: Path) -> AsyncIterator[Application]:
    for source, name in ((Path(__file__).parent / "application.py", "application.py"),
                         (resuming.__file__, "resuming.py")):
        shutil.copy(source, folder / name)
    process = await asyncio.create_subprocess_exec(python, str(folder / "application.py"), f"{url}/v1",
                                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
    try:
        yield Application(process)
    finally:
        assert process.stdin
        process.stdin.close()
        await process.wait()


@pytest.mark.timeout(300)
async def test_whichever_event_a_pod_dies_after_the_application_does_not_notice(
        pods: System, python: str, tmp_path: Path, report: list[str]) -> None:
    """SIGKILL after each event of a stream of two choices: texts, finish reasons and usage are as without."""
    options = asks(pods, n=2, max_tokens=3)
    num_events = 2 + 2 * 3 + 2 + 1                      # roles, tokens, ends, usage
    lost_s = []
    async with switch(pods.url) as door, application(python, door.url, tmp_path) as app:
        whole = await app.ask(options)
        for number in range(1, num_events + 1):
            victim, heir = pods.pods

            async def kill(victim: str = victim, heir: str = heir) -> None:
                await asyncio.to_thread(pods.pods.pop(victim).end, signal.SIGKILL)
                door.target = heir
                lost_s.append(-time.monotonic())

            door.target = victim
            door.cut_after(number, at_cut=kill)
            assert await app.ask(options) == whole, f"killed after event {number}"
            lost_s[-1] += time.monotonic()
            assert door.num_cuts == number
            await asyncio.to_thread(pods.start_pod)
    mean_ms, most_ms = 1000 * sum(lost_s) / len(lost_s), 1000 * max(lost_s)
    report.append(f"a pod killed after each of {num_events} events: from its death to the end of the answer "
                  f"{mean_ms:.0f} ms, at most {most_ms:.0f} ms")
