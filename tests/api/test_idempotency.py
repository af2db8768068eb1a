"""Idempotency-Key: under one key, one body is one completion, on any pod; whatever goes wrong, none is made twice."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from redis.asyncio import Redis

from api import submit
from api.directory import Served
from api.idempotency import MAX_KEY_BYTES, UNSUBMITTED_S, Reservation, Reservations
from shared.errors import IdempotencyKeyReused, Overloaded
from shared.job import Language
from shared.keys import new_completion_id
from shared.settings import Settings
from tests.api.conftest import KEYS, client
from tests.api.scripted import MAX_MODEL_LEN, ScriptedWorker, ask, error_of, say
from tests.api.test_http import CHAT, DONE, HEARTBEAT
from tests.api.test_resume import parts
from tests.system import System


@pytest.fixture
def worker(pair_worker: ScriptedWorker) -> ScriptedWorker:
    return pair_worker


@pytest.fixture
def key() -> dict[str, str]:
    return {"idempotency-key": secrets.token_hex(8)}


def without_heartbeats(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.text.replace(HEARTBEAT, "")


async def num_submitted(worker: ScriptedWorker) -> int:
    return (await worker.queue.counters()).get("submitted", 0)


# ── one key, one completion ──


@pytest.mark.parametrize("stream", [True, False])
async def test_fifty_at_once_over_two_pods_are_one_generation(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                             key: dict[str, str], stream: bool) -> None:
    """Each gets every byte of it, those that come while it runs and those that come when it has ended."""
    body = ask(worker.model, stream=stream, temperature=1.0)
    asked = [asyncio.create_task(pods[i % 2].post(CHAT, json=body, headers=key)) for i in range(50)]
    script = await worker.claim()
    await script.answer("Hello")
    answers = [without_heartbeats(await task) for task in asked]
    answers += [without_heartbeats(await pod.post(CHAT, json=body, headers=key)) for pod in pods]
    assert len(answers) == 52
    assert len(set(answers)) == 1
    assert script.job.id in answers[0]
    assert await num_submitted(worker) == 1


async def test_a_repeated_stream_begins_behind_the_last_event(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                              key: dict[str, str]) -> None:
    body = ask(worker.model, stream=True)
    asked = asyncio.create_task(pods[0].post(CHAT, json=body, headers=key))
    await (await worker.claim()).answer("Hello")
    events = parts(without_heartbeats(await asked))
    assert events[-1] == DONE
    for position in range(len(events)):
        again = await pods[1].post(CHAT, json=body, headers=key | {"last-event-id": str(position)})
        assert without_heartbeats(again) == "".join(events[position:])
    for text in ("x", str(len(events))):
        error_of(await pods[1].post(CHAT, json=body, headers=key | {"last-event-id": text}), 400)
    assert await num_submitted(worker) == 1


async def test_another_body_is_a_conflict(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                          key: dict[str, str]) -> None:
    """Streamed and not are different bodies, as bytes are. The first one's answer is not touched."""
    asked = asyncio.create_task(pods[0].post(CHAT, json=ask(worker.model), headers=key))
    script = await worker.claim()
    for body in (ask(worker.model, stream=True), ask(worker.model, "Ho"), ask(worker.model, seed=1)):
        for pod in pods:
            error = error_of(await pod.post(CHAT, json=body, headers=key), 409)
            assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    await script.answer("Hi")
    assert (await asked).json()["choices"][0]["message"]["content"] == "Hi"
    assert await num_submitted(worker) == 1


async def test_another_language_is_a_conflict(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                               key: dict[str, str]) -> None:
    """The same bytes ask for something else there."""
    asked = asyncio.create_task(pods[0].post(CHAT, json=ask(worker.model, max_tokens=9), headers=key))
    script = await worker.claim()
    refused = await pods[1].post("/v1/messages", json=ask(worker.model, max_tokens=9), headers=key)
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, IdempotencyKeyReused.text)
    await script.answer("Hi")
    assert (await asked).status_code == 200
    assert await num_submitted(worker) == 1


async def test_what_was_deleted_does_not_come_back(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                   key: dict[str, str]) -> None:
    """The same request under the same key is another completion then, with a record of its own."""
    ids = []
    for pod in pods:
        asked = asyncio.create_task(pod.post(CHAT, json=ask(worker.model, store=True), headers=key))
        script = await worker.claim()
        await script.answer("Hi")
        ids.append((await asked).json()["id"])
        for other in pods:
            assert (await other.post(CHAT, json=ask(worker.model, store=True), headers=key)).json()["id"] == ids[-1]
        if pod is pods[0]:
            assert (await pods[1].delete(f"{CHAT}/{ids[0]}")).json()["deleted"]
    assert ids[0] != ids[1]
    stored = [name async for name in worker.queue.redis.scan_iter("{t.*}:stored:*")]
    assert not any(ids[0].encode() in name for name in stored) and any(ids[1].encode() in name for name in stored)


async def test_tenants_do_not_meet_in_a_key(pair: System, pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                            key: dict[str, str]) -> None:
    """Two keys of the door, one Idempotency-Key, one body: two answers."""
    async with client(next(iter(pair.pods)), KEYS[1]) as other:
        ids = set()
        for pod in (pods[0], other):
            asked = asyncio.create_task(pod.post(CHAT, json=ask(worker.model), headers=key))
            script = await worker.claim()
            ids.add(script.job.id)
            await script.answer("Hi")
            assert (await asked).json()["id"] == script.job.id
    assert len(ids) == 2


@pytest.mark.parametrize("text", ["", "k" * (MAX_KEY_BYTES + 1)])
async def test_what_is_no_key_is_refused(pods: list[httpx.AsyncClient], worker: ScriptedWorker, text: str) -> None:
    error = error_of(await pods[0].post(CHAT, json=ask(worker.model), headers={"idempotency-key": text}), 400)
    assert (error["code"], error["param"]) == ("invalid_value", "Idempotency-Key")
    assert await num_submitted(worker) == 0


async def test_a_key_of_any_bytes_is_taken(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """It is stored as a hash: what a client calls its requests stands nowhere in Redis."""
    name = secrets.token_hex(4).encode() + b"\xe4{}:*" + b"k" * 200
    asked = [asyncio.create_task(pod.post(CHAT, json=ask(worker.model), headers=[(b"idempotency-key", name)]))
             for pod in pods]
    await (await worker.claim()).answer("Hi")
    assert (await asked[0]).content == (await asked[1]).content
    keys = [stored async for stored in worker.queue.redis.scan_iter("{t.*}:idempotency:*")]
    assert any(hashlib.sha256(name).hexdigest().encode() in stored for stored in keys)


# ── what goes wrong ──


async def test_a_refused_request_gives_its_key_back(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                    key: dict[str, str]) -> None:
    """A request that was wrong has used no key: corrected, it is sent under the same."""
    wrong = ask(worker.model, max_tokens=MAX_MODEL_LEN)
    error_of(await pods[0].post(CHAT, json=wrong, headers=key), 400)
    asked = asyncio.create_task(pods[1].post(CHAT, json=ask(worker.model), headers=key))
    await (await worker.claim()).answer("Hi")
    assert (await asked).status_code == 200


async def test_a_pod_that_died_between_reservation_and_submit_loses_nothing(
        pair: System, pods: list[httpx.AsyncClient], worker: ScriptedWorker, key: dict[str, str]) -> None:
    """Its reservation stands and no job: who asks next submits what it had reserved, under the id that it gave."""
    body = pods[0].build_request("POST", CHAT, json=ask(worker.model), headers=key)
    reserved = await reserve(worker.queue.redis, worker, key["idempotency-key"], body.content)
    asked = asyncio.create_task(pods[1].send(body))
    script = await worker.claim()
    assert script.job.id == reserved.completion_id
    await script.answer("Hi")
    assert (await asked).json()["id"] == reserved.completion_id


async def reserve(redis: Redis, worker: ScriptedWorker, key: str, body: bytes) -> Reservation:
    """As a pod of the first key's tenant does."""
    tenant = hashlib.sha256(KEYS[0].encode()).hexdigest()[:16]
    reservations = Reservations(redis, Settings(retain_s=60))
    return await reservations.reserve(tenant, key, "chat", body, 60, new_completion_id(worker.queue.shard))


async def test_an_answer_that_is_not_kept_any_more_leaves_its_key(pods: list[httpx.AsyncClient],
                                                                  worker: ScriptedWorker, key: dict[str, str]) -> None:
    """A key outlives a short answer's log. Then it stands for a new completion, of another id: none is told twice."""
    redis, ids = worker.queue.redis, []
    for _ in range(2):
        asked = asyncio.create_task(pods[0].post(CHAT, json=ask(worker.model), headers=key))
        script = await worker.claim()
        await script.answer("Hi")
        ids.append((await asked).json()["id"])
        body = pods[0].build_request("POST", CHAT, json=ask(worker.model)).content
        reserved = await reserve(redis, worker, key["idempotency-key"], body)
        assert reserved.completion_id == ids[-1]
        await redis.pexpire(reserved.redis_key, await redis.pttl(reserved.redis_key) - round(1000 * UNSUBMITTED_S) - 1)
        await redis.delete(*(worker.queue.shard.key(f"{name}:{ids[-1]}") for name in ("job", "out")))
    assert ids[0] != ids[1]
    assert await num_submitted(worker) == 2


async def test_a_client_that_was_away_for_too_long_asks_anew(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                              key: dict[str, str]) -> None:
    """Cancelled because nobody read it, an answer leaves its key; who goes on behind what it has of it is told."""
    body, ids = ask(worker.model, stream=True), []
    for _ in range(2):
        async with pods[0].stream("POST", CHAT, json=body, headers=key) as response:
            script = await worker.claim()
            await script.say(say("Hi"))
            await anext(response.aiter_text())
            ids.append(response.headers["x-baton-completion-id"])
        async with asyncio.timeout(10):
            while (await worker.queue.describe(ids[-1]))["state"] == "running":
                await asyncio.sleep(0.02)
        behind = await pods[1].post(CHAT, json=body, headers=key | {"last-event-id": "1"})
        assert "cancelled" in behind.text and behind.headers["x-baton-completion-id"] == ids[-1]
    assert ids[0] != ids[1]


async def test_a_refusal_takes_no_key_from_who_was_let_in(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                          key: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod that reserved it is full when another one has submitted under it."""
    body = pods[0].build_request("POST", CHAT, json=ask(worker.model), headers=key)
    reserved = await reserve(worker.queue.redis, worker, key["idempotency-key"], body.content)
    asked = asyncio.create_task(pods[1].send(body))
    script = await worker.claim()

    async def full(*_: Any) -> None:
        raise Overloaded

    monkeypatch.setattr(submit, "submit", full)
    queue, given_back = worker.queue, list[Reservation]()
    reservations = SimpleNamespace(give_back=given_back.append)
    pod: Any = SimpleNamespace(directory=SimpleNamespace(queue=lambda _: queue), reservations=reservations)
    with pytest.raises(Overloaded):
        await submit._submit_reserved(pod, Served(queue, *2 * [cast(Any, None)]), cast(Any, None),
                                      replace(reserved, is_ours=True))
    assert not given_back
    await script.answer("Hi")
    assert (await asked).json()["id"] == reserved.completion_id


async def test_a_pod_that_is_killed_leaves_its_answer_to_who_asks_again(
        pair: System, pods: list[httpx.AsyncClient], worker: ScriptedWorker, key: dict[str, str]) -> None:
    """SIGKILL while a client waits for the whole answer: asked again of the other pod, the same job goes on."""
    url = pair.start_pod()
    async with client(url) as doomed:
        asked = asyncio.create_task(doomed.post(CHAT, json=ask(worker.model), headers=key))
        script = await worker.claim()
        pair.pods.pop(url).popen.kill()
        with pytest.raises(httpx.TransportError):
            await asked
    again = asyncio.create_task(pods[1].post(CHAT, json=ask(worker.model), headers=key))
    async with asyncio.timeout(10):
        while len((await worker.queue.describe(script.job.id))["pods"].split()) < 2:
            await asyncio.sleep(0.01)
    await script.answer("Hi")
    assert (await again).json()["id"] == script.job.id
    assert await num_submitted(worker) == 1


# ── the atomic step, on each Redis ──


async def test_a_reservation_is_one_step_and_may_be_repeated(each_redis: Redis) -> None:
    """One of many wins, whoever lost its reply is told the same, and no one gives back what is another's."""
    reservations = Reservations(each_redis, Settings(request_deadline_s=10))
    many = await asyncio.gather(*(reservations.reserve("t", "k", "chat", b"body", 5, f"chatcmpl-a-0-{i}")
                                  for i in range(20)))
    assert len({reservation.completion_id for reservation in many}) == 1
    (ours,) = [reservation for reservation in many if reservation.is_ours]
    again = await reservations.reserve("t", "k", "chat", b"body", 5, ours.completion_id)
    assert (again.is_ours, again.value) == (True, ours.value)
    assert re.fullmatch(r"\{t\.t\}:idempotency:[0-9a-f]{64}", ours.redis_key)
    assert 14_000 < await each_redis.pttl(ours.redis_key) <= 15_000
    asked: list[tuple[Language, bytes]] = [("chat", b"other"), ("messages", b"body")]
    for language, body in asked:
        with pytest.raises(IdempotencyKeyReused):
            await reservations.reserve("t", "k", language, body, 5, "chatcmpl-a-0-x")
    others: Any = Reservation(ours.redis_key, "another value", False, 0.0)
    await reservations.give_back(others)
    assert await each_redis.exists(ours.redis_key)
    await reservations.give_back(ours)
    assert not await each_redis.exists(ours.redis_key)
