"""A job goes on while somebody reads it, and a moment longer: whoever leaves, and however, nothing runs for nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.api.conftest import READER_TTL_S, client
from tests.api.scripted import WAIT_S, Script, ScriptedWorker, ask, say
from tests.api.test_http import CHAT, Body
from tests.api.test_resume import parts, rest
from tests.system import System

GRACE_S = 2.0                                           # the default of disconnect_grace_s
REAP_S = 0.75                                           # reap_s with its jitter: a time that is over is noticed by then


@pytest.fixture
def worker(pair_worker: ScriptedWorker) -> ScriptedWorker:
    return pair_worker


async def nothing_left(worker: ScriptedWorker) -> None:
    """Waits until no job lives, and looks at what jobs hold."""
    async with asyncio.timeout(WAIT_S):
        while await worker.queue.num_live():
            await asyncio.sleep(0.01)
    redis, key = worker.queue.redis, worker.queue.shard.key
    for name in ("ready", "deadlines", "readers"):
        assert not await redis.zcard(key(name)), name
    assert not await redis.hlen(key("tenants"))
    assert not await redis.exists(key("held:scripted-1"))
    assert not (await redis.xpending(key("jobs"), "workers"))["pending"]


@asynccontextmanager
async def begun(pod: httpx.AsyncClient, worker: ScriptedWorker) -> AsyncIterator[tuple[Script, Body]]:
    """A stream that has said one letter; at the end its client leaves."""
    async with pod.stream("POST", CHAT, json=ask(worker.model, stream=True)) as response:
        body = Body(response)
        script = await worker.claim()
        await script.say(say("H"))
        await body.has('"H"')
        yield script, body
        body.task.cancel()


async def test_a_pod_that_is_killed_leaves_its_jobs_time_for_a_reader_and_no_more(pair: System,
                                                                               worker: ScriptedWorker) -> None:
    """Nobody returns: the job is cancelled when its reader's time is over, without a word of the dead pod."""
    url = pair.start_pod()
    async with client(url) as doomed, begun(doomed, worker) as (script, body):
        pair.pods.pop(url).popen.kill()
        began_s = time.monotonic()
        with pytest.raises(httpx.TransportError):
            await body.task
    assert await script.outcome() == "cancelled"
    assert READER_TTL_S - 1.1 < time.monotonic() - began_s < READER_TTL_S + REAP_S + 1
    await nothing_left(worker)


async def test_a_stream_that_is_read_goes_on_past_every_time(pods: list[httpx.AsyncClient],
                                                             worker: ScriptedWorker) -> None:
    """Silent for longer than a reader's time: its pod has said that it is read."""
    async with begun(pods[0], worker) as (script, body):
        await asyncio.sleep(1.5 * READER_TTL_S)
        await script.say(say("i", end=True))
        await script.end()
        assert await body.text() == "Hi"


async def test_a_client_that_leaves_has_the_grace_to_return(pods: list[httpx.AsyncClient],
                                                            worker: ScriptedWorker) -> None:
    """To the other pod, at its last event; and when it leaves there too, the grace begins anew, and ends the job."""
    async with begun(pods[0], worker) as (script, _):
        pass
    async with pods[1].stream("GET", f"{CHAT}/{script.job.id}",
                              params={"stream": "true", "starting_after": 2}) as response:
        other = Body(response)
        await script.say(say("i"))
        await other.has('"i"')
        assert other.raw.count('"H"') == 0
        await asyncio.sleep(GRACE_S + REAP_S)
        await script.say(say("!"))
        await other.has('"!"')
        other.task.cancel()
    left_s = time.monotonic()
    assert await script.outcome() == "cancelled"
    assert GRACE_S - 0.1 < time.monotonic() - left_s < GRACE_S + REAP_S + 1
    await nothing_left(worker)


async def test_one_of_several_readers_that_leaves_takes_nothing_from_the_others(pods: list[httpx.AsyncClient],
                                                                               worker: ScriptedWorker) -> None:
    """Two on one pod and one on another, two of them leave: what is left is one reader, and it is enough."""
    async with begun(pods[0], worker) as (script, _):
        last = asyncio.create_task(rest(pods[1], script.job.id))
        async with pods[0].stream("GET", f"{CHAT}/{script.job.id}", params={"stream": "true"}) as response:
            second = Body(response)
            await second.has('"H"')
            second.task.cancel()
    await asyncio.sleep(GRACE_S + REAP_S)
    await script.say(say("i", end=True))
    await script.end()
    assert len(parts(await last)) == 1 + 2 + 1 + 1
    assert await script.outcome() == "finished"


async def test_without_grace_a_job_ends_with_its_client(pair: System, worker: ScriptedWorker) -> None:
    url = pair.start_pod(disconnect_grace_s=0)
    async with client(url) as pod:
        async with begun(pod, worker) as (script, body):
            async with pod.stream("GET", f"{CHAT}/{script.job.id}", params={"stream": "true"}) as response:
                second = Body(response)
                await second.has('"H"')
                second.task.cancel()
            await asyncio.sleep(0.2)
            await script.say(say("i"))
            await body.has('"i"')                       # the first still reads
        left_s = time.monotonic()
        assert await script.outcome() == "cancelled"
        assert time.monotonic() - left_s < 1
    pair.pods.pop(url).end()
    await nothing_left(worker)


State = Callable[[httpx.AsyncClient, ScriptedWorker], Coroutine[Any, Any, None]]


async def in_line(pod: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with pod.stream("POST", CHAT, json=ask(worker.model, stream=True)) as response:
        await cancel(pod, response.headers["x-baton-completion-id"])


async def claimed(pod: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with pod.stream("POST", CHAT, json=ask(worker.model, stream=True)):
        await cancel(pod, (await worker.claim()).job.id)


async def running(pod: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with begun(pod, worker) as (script, _):
        await cancel(pod, script.job.id)


async def left(pod: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with begun(pod, worker) as (script, _):
        pass
    await cancel(pod, script.job.id)


async def back_in_line(pod: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with begun(pod, worker) as (script, _):
        await worker.queue.release("scripted-1", [script.job.id])
        await cancel(pod, script.job.id)


async def finished(pod: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with begun(pod, worker) as (script, body):
        await script.say(say("", end=True))
        await script.end()
        await body.end()
        await cancel(pod, script.job.id, "completed")


async def cancel(pod: httpx.AsyncClient, completion_id: str, status: str = "cancelled") -> None:
    assert (await pod.post(f"{CHAT}/{completion_id}/cancel")).json()["status"] == status


async def test_two_hundred_cancels_in_every_state_leave_nothing(pods: list[httpx.AsyncClient],
                                                                worker: ScriptedWorker) -> None:
    """In line, claimed, running, left by its client, back in line, finished: no key, no share, no reader stays."""
    states: list[State] = [in_line, claimed, running, left, back_in_line, finished]
    for number in range(200):
        await states[number % len(states)](pods[number % 2], worker)
    await nothing_left(worker)
    counters = await worker.queue.counters()
    assert counters["submitted"] == 200
    assert counters["cancelled"] + counters["finished"] == 200
    assert counters["finished"] == 200 // len(states)
