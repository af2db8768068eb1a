"""Batches over HTTP: many requests in one file, each with one line in one of two others, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import openai
import pytest
from redis.asyncio import Redis

from api.batches import Batches
from api.files import Files, new_file, pieces_key
from api.pod import Pod
from api.pump import MAX_PUMPED, RENEW_S, TURN_S, Turn, next_to_take, pump, to_give_way
from api.wire.batches import Batch, BatchRequest
from api.wire.lines import Raw, Result
from deploy.redis import RedisServer
from shared import connection
from shared.errors import NoSuchFile, TooManyBatches
from shared.job import Usage
from shared.keys import BATCHES
from shared.settings import Settings
from tests.api.conftest import KEYS, client
from tests.api.scripted import MAX_MODEL_LEN, WAIT_S, Script, ScriptedWorker, ask, error_of, say, until_known
from tests.api.test_files import FORM, form
from tests.conftest import short_folder
from tests.system import System

ADDRESS, CHAT = "/v1/batches", "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")
NUM_LINES = 100                                         # more than are in flight at once


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two pods on a Redis of their own: every pod of a Redis runs its batches."""
    server = RedisServer(short_folder(tmp_path_factory)).start()
    system = System(tmp_path_factory.mktemp("batches"), server.url, api_key=",".join(KEYS), disconnect_grace_s=0.5)
    system.start_pod()
    system.start_pod()
    yield system
    system.stop()
    server.stop()


@pytest.fixture
async def pods(own: System) -> AsyncIterator[list[httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(client(url)) for url in own.pods]


@pytest.fixture
async def worker(own: System, pods: list[httpx.AsyncClient]) -> AsyncIterator[ScriptedWorker]:
    redis = connection.connect(own.redis_url)
    worker = ScriptedWorker(redis)
    await worker.announce()
    for pod in pods:
        await until_known(pod, worker)
    yield worker
    await worker.leave()
    await redis.aclose()


def line(custom_id: str, model: str, url: str = CHAT, **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": ask(model, custom_id, **fields)}


def lines_of(worker: ScriptedWorker, number: int = NUM_LINES) -> list[dict[str, Any]]:
    return [line(f"n{i}", worker.model, max_tokens=9) for i in range(number)]


async def upload(pod: httpx.AsyncClient, lines: list[dict[str, Any]] | bytes) -> str:
    content = lines if isinstance(lines, bytes) else b"\n".join(json.dumps(each).encode() for each in lines)
    response = await pod.post("/v1/files", content=form(content, purpose="batch"), headers=FORM)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def create(pod: httpx.AsyncClient, lines: list[dict[str, Any]] | bytes, endpoint: str = CHAT, **fields: Any
                 ) -> dict[str, Any]:
    body = {"input_file_id": await upload(pod, lines), "endpoint": endpoint, "completion_window": "24h"} | fields
    response = await pod.post(ADDRESS, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def until(pod: httpx.AsyncClient, batch: dict[str, Any], *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(2 * WAIT_S):
        while True:
            found = dict((await pod.get(f"{ADDRESS}/{batch['id']}")).json())
            if found["status"] in statuses:
                return found
            assert found["status"] not in OVER, found
            await asyncio.sleep(0.05)


async def results(pod: httpx.AsyncClient, file_id: str | None) -> dict[str, dict[str, Any]]:
    """By custom_id: none comes twice, and the file is as long as it says."""
    if file_id is None:
        return {}
    content = (await pod.get(f"/v1/files/{file_id}/content")).content
    file = (await pod.get(f"/v1/files/{file_id}")).json()
    assert (file["bytes"], file["purpose"]) == (len(content), "batch_output")
    found = [json.loads(each) for each in content.splitlines()]
    assert len({each["custom_id"] for each in found}) == len({each["id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


@asynccontextmanager
async def answering(worker: ScriptedWorker) -> AsyncIterator[list[str]]:
    """Every job is answered with 'Yes'; their ids."""
    ids: list[str] = []

    async def answer() -> None:
        while True:
            with suppress(TimeoutError):
                script = await worker.claim()
                ids.append(script.job.id)
                await script.answer("Yes")

    task = asyncio.create_task(answer())
    try:
        yield ids
    finally:
        await connection.end([task])                    # once may not be enough
        if not task.cancelled():
            task.result()


async def claim(worker: ScriptedWorker, number: int) -> list[Script]:
    return [await worker.claim() for _ in range(number)]


async def num_submitted(worker: ScriptedWorker) -> int:
    return (await worker.queue.counters()).get("submitted", 0)


# ── what clients see ──


async def test_every_line_is_answered_once(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    async with answering(worker) as ids:
        begun = await create(pods[0], lines_of(worker), metadata={"run": "7"})
        assert (begun["status"], begun["object"], begun["errors"]) == ("validating", "batch", None)
        assert begun["expires_at"] - begun["created_at"] == 86_400
        batch = await until(pods[1], begun, "completed")
    assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert batch["metadata"] == {"run": "7"}
    assert batch["error_file_id"] is None
    times = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
    assert times == sorted(times)
    found = await results(pods[1], batch["output_file_id"])
    assert list(found) == [f"n{i}" for i in range(NUM_LINES)], "in the order of the input"
    response = found["n7"]["response"]
    assert (response["status_code"], found["n7"]["error"]) == (200, None)
    assert response["body"]["choices"][0]["message"]["content"] == "Yes"
    assert response["body"]["object"] == "chat.completion"
    assert len(ids) == len(set(ids)) == await num_submitted(worker) == NUM_LINES
    used = [each["response"]["body"]["usage"] for each in found.values()]
    sums = [sum(each[f"{name}_tokens"] for each in used) for name in ("prompt", "completion", "total")]
    assert [batch["usage"][f"{name}_tokens"] for name in ("input", "output", "total")] == sums and all(sums)


async def test_its_output_expires_when_it_is_told_to(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    async with answering(worker):
        begun = await create(pods[0], lines_of(worker)[:1],
                             output_expires_after={"anchor": "created_at", "seconds": 4000})
        batch = await until(pods[1], begun, "completed")
    file = (await pods[0].get(f"/v1/files/{batch['output_file_id']}")).json()
    assert abs(file["expires_at"] - file["created_at"] - 4000) <= 1


async def test_responses_are_asked_in_lines_too(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """Each as a whole: one that goes on with another, or is answered later, is none."""
    address, asked = "/v1/responses", {"model": worker.model, "input": "Hi", "instructions": "Be short."}
    bodies = {"right": asked, "later": asked | {"background": True},
              "behind": asked | {"previous_response_id": "resp_1"}, "of others": asked | {"input": [{"id": "msg_1"}]}}
    lines = [{"custom_id": name, "method": "POST", "url": address, "body": body} for name, body in bodies.items()]
    async with answering(worker):
        batch = await until(pods[1], await create(pods[0], lines, address), "completed")
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    body = (await results(pods[0], batch["output_file_id"]))["right"]["response"]["body"]
    assert (body["status"], body["output"][0]["content"][0]["text"]) == ("completed", "Yes")
    assert (body["instructions"], body["store"]) == ("Be short.", False)
    del body["usage"]["input_tokens_details"]["cache_write_tokens"]
    assert batch["usage"] == body["usage"]
    errors = await results(pods[0], batch["error_file_id"])
    assert {name: each["response"]["body"]["error"]["param"] for name, each in errors.items()} == {
        "later": "background", "behind": "previous_response_id", "of others": "input"}
    assert (await pods[0].get(f"{address}/{body['id']}")).status_code == 404, "it is kept in the file alone"


async def test_what_is_asked_waits_behind_who_waits(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """A chat that comes later is claimed before the lines that are in line."""
    batch = await create(pods[0], lines_of(worker, 20))
    async with asyncio.timeout(WAIT_S):
        while await worker.queue.num_live() < 20:
            await asyncio.sleep(0.01)
    asked = asyncio.create_task(pods[0].post(CHAT, json=ask(worker.model)))
    async with asyncio.timeout(WAIT_S):
        while await worker.queue.num_live() < 21:
            await asyncio.sleep(0.01)
    first = await worker.claim()
    assert (first.job.priority, first.job.pod != "") == (0, True)
    await first.answer("Hi")
    assert (await asked).status_code == 200
    assert (await worker.claim()).job.priority == 1
    await pods[0].post(f"{ADDRESS}/{batch['id']}/cancel")
    await until(pods[0], batch, "cancelled")


async def test_lines_in_flight_are_bounded(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    batch = await create(pods[0], lines_of(worker))
    async with asyncio.timeout(WAIT_S):
        while await worker.queue.num_live() < 64:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert await worker.queue.num_live() == 64
    await pods[0].post(f"{ADDRESS}/{batch['id']}/cancel")
    await until(pods[0], batch, "cancelled")


async def test_texts_go_on_in_a_batch_too(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    url = "/v1/completions"
    lines = [{"custom_id": name, "method": "POST", "url": url, "body": {"model": worker.model, "prompt": prompt}}
             for name, prompt in (("one", "Hi"), ("two", ["Hi", "Ho"]))]
    async with answering(worker):
        batch = await until(pods[0], await create(pods[0], lines, url), "completed")
    found = await results(pods[0], batch["output_file_id"])
    assert found["one"]["response"]["body"]["choices"][0]["text"] == "Yes"
    failed = await results(pods[0], batch["error_file_id"])
    assert failed["two"]["response"]["body"]["error"]["param"] == "prompt"


async def test_what_is_wrong_with_a_line_is_told_in_its_line(pods: list[httpx.AsyncClient], worker: ScriptedWorker
                                                             ) -> None:
    lines = [line("good", worker.model), line("model", "nobody/has-this"), line("hot", worker.model, temperature="hot"),
             line("long", worker.model, max_tokens=MAX_MODEL_LEN), line("grammar", worker.model, regex="(")]
    async with answering(worker) as ids:
        batch = await until(pods[0], await create(pods[0], lines), "completed")
    assert batch["request_counts"] == {"total": 5, "completed": 1, "failed": 4}
    assert list(await results(pods[0], batch["output_file_id"])) == ["good"]
    failed = await results(pods[0], batch["error_file_id"])
    said = {name: (each["response"]["status_code"], each["response"]["body"]["error"]["code"])
            for name, each in failed.items()}
    assert said == {"model": (404, "model_not_found"), "hot": (400, "invalid_type"),
                    "long": (400, "context_length_exceeded"), "grammar": (400, "invalid_grammar")}
    assert len(ids) == 1


async def test_a_job_that_is_given_up_is_an_error_line(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    batch = await create(pods[0], lines_of(worker, 2))
    poison, other = await claim(worker, 2)
    await poison.end("job_failed")
    await other.answer("Yes")
    batch = await until(pods[0], batch, "completed")
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    [failed] = (await results(pods[0], batch["error_file_id"])).values()
    assert failed["response"]["status_code"] == 500
    assert failed["response"]["body"]["error"]["code"] == "job_failed"


async def test_a_file_that_is_no_batch_fails_it(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """Nothing of it is asked, and the wrong lines are named."""
    lines = [*lines_of(worker, 2), line("n0", worker.model), line("s", worker.model, stream=True)]
    batch = await until(pods[0], await create(pods[0], lines), "failed")
    assert [(error["line"], error["code"]) for error in batch["errors"]["data"]] == [
        (3, "duplicate_custom_id"), (4, "unsupported_parameter")]
    assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)
    assert batch["request_counts"]["total"] == await num_submitted(worker) == 0
    empty = await until(pods[0], await create(pods[0], b"\n"), "failed")
    assert empty["errors"]["data"][0]["code"] == "empty_file"
    error = error_of(await pods[0].post(f"{ADDRESS}/{batch['id']}/cancel"), 409)
    assert error["code"] == "batch_over"


async def test_what_is_no_request_is_refused(own: System, pods: list[httpx.AsyncClient], worker: ScriptedWorker
                                             ) -> None:
    whole = {"input_file_id": await upload(pods[0], lines_of(worker, 1)), "endpoint": CHAT, "completion_window": "24h"}
    for wrong, status, param in (({"completion_window": "1h"}, 400, "completion_window"),
                                 ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
                                 ({"input_file_id": "file-none"}, 404, "input_file_id")):
        assert error_of(await pods[0].post(ADDRESS, json=whole | wrong), status)["param"] == param
    async with client(own.url, KEYS[1]) as stranger:
        assert error_of(await stranger.post(ADDRESS, json=whole), 404)["code"] == "file_not_found"
    data = await pods[0].post("/v1/files", content=form(b"{}", purpose="user_data"), headers=FORM)
    error = error_of(await pods[0].post(ADDRESS, json=whole | {"input_file_id": data.json()["id"]}), 400)
    assert error["param"] == "input_file_id"


async def test_another_key_finds_nothing(own: System, pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    async with answering(worker), client(own.url, KEYS[1]) as stranger:
        batch = await until(pods[0], await create(pods[0], lines_of(worker, 1)), "completed")
        for response in (await stranger.get(f"{ADDRESS}/{batch['id']}"),
                         await stranger.post(f"{ADDRESS}/{batch['id']}/cancel")):
            assert error_of(response, 404)["code"] == "batch_not_found"
        error_of(await stranger.get(f"/v1/files/{batch['output_file_id']}/content"), 404)
        assert batch["id"] not in (await stranger.get(ADDRESS)).text
        others = await until(stranger, await create(stranger, lines_of(worker, 1)), "completed")
    assert [each["id"] for each in (await stranger_list(own))] == [others["id"]]


async def stranger_list(own: System) -> list[dict[str, Any]]:
    async with client(own.url, KEYS[1]) as stranger:
        return list((await stranger.get(ADDRESS)).json()["data"])


async def test_the_official_client(own: System, worker: ScriptedWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{own.url}/v1", api_key=KEYS[0], max_retries=0, timeout=WAIT_S) as sdk:
        content = b"\n".join(json.dumps(each).encode() for each in lines_of(worker, 3))
        file = await sdk.files.create(file=("x.jsonl", content), purpose="batch")
        ids = [(await sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                         completion_window="24h", metadata={"a": "b"})).id for _ in range(2)]
        assert [each.id async for each in sdk.batches.list(limit=1)][:2] == ids[::-1]
        assert (await sdk.batches.cancel(ids[1])).status in ("cancelling", "cancelled")
        async with answering(worker), asyncio.timeout(2 * WAIT_S):
            while (batch := await sdk.batches.retrieve(ids[0])).status != "completed":
                await asyncio.sleep(0.05)
        assert batch.request_counts and batch.request_counts.completed == 3 and batch.output_file_id
        assert len((await sdk.files.content(batch.output_file_id)).text.splitlines()) == 3


# ── what goes wrong ──


async def test_a_batch_that_is_cancelled_keeps_what_it_has(pods: list[httpx.AsyncClient], worker: ScriptedWorker
                                                           ) -> None:
    """Its jobs end, also those that are in line; every other line says that it was cancelled."""
    batch = await create(pods[0], lines_of(worker))
    answered, *running = await claim(worker, 4)
    await answered.answer("Yes")
    async with asyncio.timeout(WAIT_S):
        while not (await pods[0].get(f"{ADDRESS}/{batch['id']}")).json()["request_counts"]["completed"]:
            await asyncio.sleep(0.05)
    told = (await pods[1].post(f"{ADDRESS}/{batch['id']}/cancel")).json()
    assert (told["status"], told["cancelling_at"] is not None) == ("cancelling", True)
    batch = await until(pods[0], batch, "cancelled")
    assert batch["request_counts"] == {"total": NUM_LINES, "completed": 1, "failed": NUM_LINES - 1}
    assert len(await results(pods[0], batch["output_file_id"])) == 1
    failed = await results(pods[0], batch["error_file_id"])
    assert {(each["response"], each["error"]["code"]) for each in failed.values()} == {(None, "batch_cancelled")}
    assert {await script.outcome() for script in running} == {"cancelled"}
    assert await worker.queue.num_live() == 0
    assert (await pods[0].post(f"{ADDRESS}/{batch['id']}/cancel")).json()["status"] == "cancelled"


async def test_what_a_batch_does_not_come_to_in_time_is_given_up(own: System, pods: list[httpx.AsyncClient],
                                                                 worker: ScriptedWorker) -> None:
    url = own.start_pod(batch_s=4.0)
    async with client(url) as hurried:
        await until_known(hurried, worker)
        batch = await create(hurried, lines_of(worker))
        await (await worker.claim()).answer("Yes")
        batch = await until(hurried, batch, "expired")
        assert batch["request_counts"] == {"total": NUM_LINES, "completed": 1, "failed": NUM_LINES - 1}
        failed = await results(hurried, batch["error_file_id"])
        assert {each["error"]["code"] for each in failed.values()} == {"batch_expired"}
        assert batch["expired_at"] >= batch["expires_at"]
        assert len(await results(hurried, batch["output_file_id"])) == 1
    assert await worker.queue.num_live() == 0
    assert own.pods.pop(url).end() == 0


async def test_a_line_is_full_and_no_line_fails(own: System, worker: ScriptedWorker) -> None:
    """A pod whose bounds are small waits its turn, and a model whose workers are gone is waited for."""
    for name in list(own.pods):
        own.pods.pop(name).end()
    url = own.start_pod(max_queued=3)
    async with client(url) as pod:
        await until_known(pod, worker)
        batch = await create(pod, lines_of(worker, 12))
        await until(pod, batch, "in_progress")
        async with asyncio.timeout(WAIT_S):
            while (await worker.queue.counters()).get("refused", 0) < 9:
                await asyncio.sleep(0.01)
        [held] = own.redis.scan_iter(f"*:pump:{batch['id']}")
        dead = own.redis.get(held)
        await worker.leave()
        own.pods.pop(url).popen.kill()                  # the next pod has never heard of the model
        url = own.start_pod()
        async with asyncio.timeout(WAIT_S):
            while own.redis.get(held) in (dead, None):
                await asyncio.sleep(0.05)
        await asyncio.sleep(RENEW_S)                    # in which it asks for every line, and none may fail
        async with client(url) as other:
            assert (await other.get(f"{ADDRESS}/{batch['id']}")).json()["request_counts"]["failed"] == 0
        assert own.redis.zcard(BATCHES) == 1
        await worker.announce()
        async with client(url) as other, answering(worker):
            batch = await until(other, batch, "completed")
    assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    assert await num_submitted(worker) == 12
    own.start_pod()


async def test_what_redis_has_lost_of_a_line_is_asked_again(own: System, worker: ScriptedWorker) -> None:
    async with client(own.url) as pod:
        await until_known(pod, worker)
        batch = await create(pod, lines_of(worker, 2))
        lost, other = await claim(worker, 2)
        await lost.say(say("No"))
        await worker.queue.redis.delete(*(worker.queue.shard.key(f"{name}:{lost.job.id}") for name in ("job", "out")))
        await other.answer("Yes")
        again = await worker.claim()
        assert again.job.id == lost.job.id
        await again.answer("Yes")
        batch = await until(pod, batch, "completed")
        found = await results(pod, batch["output_file_id"])
    assert {each["response"]["body"]["choices"][0]["message"]["content"] for each in found.values()} == {"Yes"}
    assert len(found) == 2


async def test_a_batch_of_another_release_ends_no_pod(own: System, worker: ScriptedWorker) -> None:
    async with client(own.url) as pod, answering(worker):
        await until_known(pod, worker)
        tenant = "somebody"
        what = {"what": '{"unheard_of": 1}', "status": "in_progress"}
        own.redis.hset(f"{{t.{tenant}}}:batch:batch_new", mapping=what)
        own.redis.zadd(BATCHES, {f"{tenant} batch_new": 0})
        batch = await until(pod, await create(pod, lines_of(worker, 2)), "completed")
        async with asyncio.timeout(WAIT_S):             # the pod has come to the other batch too
            while not own.redis.exists(f"{{t.{tenant}}}:pump:batch_new"):
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        assert (await pod.get("/health")).status_code == 200
    own.redis.zrem(BATCHES, f"{tenant} batch_new")
    own.redis.delete(*(f"{{t.{tenant}}}:{name}:batch_new" for name in ("batch", "pump")))
    assert batch["request_counts"]["completed"] == 2


async def test_a_pod_that_drains_hands_its_batches_over(own: System, worker: ScriptedWorker) -> None:
    """It does not wait for their lines, and no job is made twice."""
    urls = list(own.pods)
    async with client(urls[0]) as pod:
        await until_known(pod, worker)
        batch = await create(pod, lines_of(worker, 10))
        scripts = await claim(worker, 8)
        holder = own.redis.get(f"{{t.{scripts[0].job.tenant}}}:pump:{batch['id']}")
        for url in urls:
            fresh = own.start_pod()
            assert own.pods.pop(url).end(timeout_s=10.0) == 0
    async with client(fresh) as pod:
        assert own.redis.get(f"{{t.{scripts[0].job.tenant}}}:pump:{batch['id']}") != holder
        for script in scripts:
            await script.answer("Yes")
        async with answering(worker):
            batch = await until(pod, batch, "completed")
    assert batch["request_counts"]["completed"] == 10
    assert await num_submitted(worker) == 10


async def test_nothing_stays_but_files_and_the_batch(own: System, worker: ScriptedWorker) -> None:
    async with client(own.url) as pod, answering(worker):
        await until_known(pod, worker)
        batch = await until(pod, await create(pod, lines_of(worker, 5)), "completed")
        async with asyncio.timeout(WAIT_S):
            while own.redis.zcard(BATCHES):
                await asyncio.sleep(0.05)
        keys = [key.decode() for key in own.redis.scan_iter(f"*{batch['id']}*")]
        assert [key.partition(":")[2] for key in keys if ":pump:" not in key] == [f"batch:{batch['id']}"]
        assert all(own.redis.ttl(key) > 0 for key in own.redis.scan_iter("{t.*}:*"))
        logs = list(own.redis.scan_iter(worker.queue.shard.key("out:*")))
        assert all(own.redis.ttl(key) <= 60 for key in logs), "an answer is kept once, in its file"


async def test_a_batch_whose_input_is_deleted_fails(own: System, worker: ScriptedWorker) -> None:
    """As soon as it needs more of it; what is answered by then stays."""
    long = [line(f"n{i}", worker.model, user="x" * 10_000) for i in range(NUM_LINES)]
    async with client(own.url) as pod:
        await until_known(pod, worker)
        batch = await create(pod, long)
        scripts = await claim(worker, 8)
        await pod.delete(f"/v1/files/{batch['input_file_id']}")
        for script in scripts:
            await script.answer("Yes")
        while (await pod.get(f"{ADDRESS}/{batch['id']}")).json()["status"] == "in_progress":
            with suppress(TimeoutError, AssertionError):        # what still runs when it fails is cancelled
                async with asyncio.timeout(1):
                    await (await worker.claim()).answer("Yes")
        batch = await until(pod, batch, "failed")
        assert [error["code"] for error in batch["errors"]["data"]] == ["file_not_found"]
        assert 8 <= len(await results(pod, batch["output_file_id"])) == batch["request_counts"]["completed"] < NUM_LINES
        async with asyncio.timeout(WAIT_S):
            while await worker.queue.num_live():
                await asyncio.sleep(0.05)


async def test_a_batch_without_its_input_can_be_cancelled(own: System, worker: ScriptedWorker) -> None:
    async with client(own.url) as pod:
        await until_known(pod, worker)
        batch = await create(pod, lines_of(worker, 5))
        scripts = await claim(worker, 5)
        await pod.delete(f"/v1/files/{batch['input_file_id']}")
        await pod.post(f"{ADDRESS}/{batch['id']}/cancel")
        await until(pod, batch, "cancelled")
        assert {await script.outcome() for script in scripts} == {"cancelled"}


# ── the steps, on each Redis ──


@pytest.fixture
def batches(each_redis: Redis) -> Batches:
    settings = Settings()
    return Batches(each_redis, Files(each_redis, settings), settings)


async def begin(batches: Batches) -> Batch:
    file = await batches._files.finish("t", await batches._files.append("t", new_file(), b"x"), 60)
    asked = BatchRequest(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = await batches.create("t", asked)
    assert await batches.advance(batch, "in_progress", num_lines=3, num_requests=3)
    return await batches.get("t", batch.id)


async def test_a_line_has_one_result_and_one_job(batches: Batches) -> None:
    """However many pods ask for it, and whichever shard each of them would have taken."""
    batch = await begin(batches)
    assert await batches.allot(batch, 1, "chatcmpl-a-0-1") == "chatcmpl-a-0-1"
    assert await batches.allot(batch, 1, "chatcmpl-b-1-1") == "chatcmpl-a-0-1"
    assert await batches.allotted(batch) == {1: "chatcmpl-a-0-1"}
    usage = Usage(4, 3, 2, 1)
    assert await batches.record(batch, 1, Result(b"right\n", is_error=False, usage=usage))
    assert not await batches.record(batch, 1, Result(b"again\n", is_error=False, usage=usage))
    assert not await batches.record(batch, 1, Result(b"wrong\n", is_error=True))
    assert await batches.record(batch, 3, Result(b"failed\n", is_error=True))
    assert await batches.allot(batch, 1, "chatcmpl-b-1-1") is None
    assert await batches.allotted(batch) == {}
    assert [raw.number for raw in await batches.unfinished(batch, [Raw(n, b"") for n in (1, 2, 3)])] == [2]
    batch = await batches.get("t", batch.id)
    assert (batch.num_completed, batch.num_failed, batch.output_bytes, batch.error_bytes) == (1, 1, 6, 7)
    assert batch.usage == usage
    await batches.publish(batch)
    files = {file.id: file for file in await batches._files.list("t")}
    for file_id, content in ((batch.output_file_id, b"right\n"), (batch.error_file_id, b"failed\n")):
        assert b"".join([piece async for piece in batches._files.read("t", files[file_id])]) == content
    assert await batches.advance(batch, "completed")
    assert not await batches.record(batch, 2, Result(b"late\n", is_error=False)), "its files are as they are"
    assert await batches.allot(batch, 2, "chatcmpl-a-0-2") is None


async def test_a_batch_is_run_by_one_pod(batches: Batches, each_redis: Redis) -> None:
    batch = await begin(batches)
    assert await batches.some_live(9) == [("t", batch.id)]
    assert await batches.hold("t", batch.id, "first") == batch
    assert await batches.hold("t", batch.id, "second") is None
    assert await batches.hold("t", batch.id, "first") == batch
    await batches.let_go("t", batch.id, "second")
    assert await batches.hold("t", batch.id, "second") is None
    await batches.let_go("t", batch.id, "first")
    assert await batches.hold("t", batch.id, "second") == batch
    assert 0 < await each_redis.pttl("{t.t}:pump:" + batch.id) <= 5000
    await batches.leave(batch)
    assert await batches.some_live(9) == []


async def test_a_file_that_is_deleted_as_a_batch_begins_stays_deleted(batches: Batches, each_redis: Redis) -> None:
    file = await batches._files.finish("t", await batches._files.append("t", new_file(), b"x"), 60)
    await batches._files.remove("t", file.id)
    asked = BatchRequest(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(NoSuchFile):
        await batches.create("t", asked)
    assert not await batches._files.list("t") and not await batches.some_live(9)
    assert not await each_redis.exists("{t.t}:files", pieces_key("t", file.id))


async def test_a_batch_takes_the_step_that_was_meant(batches: Batches) -> None:
    batch = await begin(batches)
    assert await batches.advance(batch, "cancelling")
    assert not await batches.advance(batch, "finalizing"), "somebody has cancelled it meanwhile"
    assert (await batches.get("t", batch.id)).status == "cancelling"


@pytest.fixture
async def one_place(each_redis_url: str, each_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pod]:
    """A pod that runs one batch at a time, with short turns; a few lines, so that a test finds a connection too."""
    monkeypatch.setattr("api.pump.MAX_PUMPED", 1)
    monkeypatch.setattr("api.pump.MAX_IN_FLIGHT", 8)
    monkeypatch.setattr("api.pump.TURN_S", 1.5)
    pod = Pod(Settings(redis_url=each_redis_url, allow_no_aof=True))
    async with pod.running(pump(pod)):
        yield pod


async def begin_on(pod: Pod, tenant: str, worker: ScriptedWorker, number: int) -> Batch:
    lines = "\n".join(json.dumps(each) for each in lines_of(worker, number)).encode()
    file = await pod.files.finish(tenant, await pod.files.append(tenant, new_file(), lines), 60)
    asked = BatchRequest(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    return await pod.batches.create(tenant, asked)


async def end_on(pod: Pod, batch: Batch) -> Batch:
    async with asyncio.timeout(2 * WAIT_S):
        while not (found := await pod.batches.get(batch.tenant, batch.id)).is_over:
            await asyncio.sleep(0.05)
    return found


async def test_a_batch_that_waits_leaves_its_place(one_place: Pod, each_redis: Redis) -> None:
    """A model that nobody computes holds up no batch of another one, and is asked no line twice."""
    asleep, awake = ScriptedWorker(each_redis), ScriptedWorker(each_redis)
    for worker in (asleep, awake):
        await worker.announce()
    waits = await begin_on(one_place, "t", asleep, 3)
    async with asyncio.timeout(WAIT_S):
        while await asleep.queue.num_live() < 3:
            await asyncio.sleep(0.05)
    passes = await begin_on(one_place, "t", awake, 3)
    async with answering(awake):
        assert (await end_on(one_place, passes)).num_completed == 3
    assert not (await one_place.batches.get("t", waits.id)).is_over
    async with answering(asleep):
        assert (await end_on(one_place, waits)).num_completed == 3
    assert await num_submitted(asleep) == 3


async def test_a_batch_that_gets_on_gives_way_too(one_place: Pod, each_redis: Redis) -> None:
    """A long batch of one key, whose lines end all the time, holds up no short one of another key."""
    worker = ScriptedWorker(each_redis)
    await worker.announce()

    async def answer_slowly() -> None:
        while True:
            with suppress(TimeoutError):
                await (await worker.claim()).answer("")
            await asyncio.sleep(0.05)

    task = asyncio.create_task(answer_slowly())
    try:
        long = await begin_on(one_place, "many", worker, 150)
        async with asyncio.timeout(WAIT_S):
            while not (await one_place.batches.get("many", long.id)).num_completed:
                await asyncio.sleep(0.05)
        short = await begin_on(one_place, "one", worker, 1)
        assert (await end_on(one_place, short)).num_completed == 1
        assert not (await one_place.batches.get("many", long.id)).is_over
        assert (await end_on(one_place, long)).num_completed == 150
    finally:
        await connection.end([task])
    assert await num_submitted(worker) == 151


def turns_of(**ages_s: list[float]) -> list[Turn]:
    """By tenant, how long its turns have lasted by second 1000."""
    return [Turn(f"{tenant}{number}", tenant, 1000 - age_s)
            for tenant, each in ages_s.items() for number, age_s in enumerate(each)]


def test_places_go_to_those_who_have_fewest() -> None:
    long = TURN_S + 1
    assert next_to_take(["a", "b", "c"], turns_of(a=[1, 1], c=[1])) == 1
    full = turns_of(a=[long, long + 1, 1, 1, 1], b=[long + 2] * 3)
    assert len(full) == MAX_PUMPED
    for tenant, leaves in (("c", full[1]), ("b", full[1]), ("a", full[1])):
        assert to_give_way(tenant, full, 1000) is leaves
    assert to_give_way("c", full[1:], 1000) is None, "there is a place"
    assert to_give_way("c", turns_of(a=[TURN_S - 1] * MAX_PUMPED), 1000) is None, "no turn is over"
    fair = turns_of(a=[1] * 4, b=[long] * 4)
    assert to_give_way("a", fair, 1000) is None, "the others have no more than it"
    assert to_give_way("b", fair, 1000) is fair[4], "its own take turns"
    full[1].gives_way = True
    assert to_give_way("c", [*full, Turn("c0", "c", 1000)], 1000) is None, "one at a time"


async def test_what_was_begun_and_never_made_is_forgotten(batches: Batches, each_redis: Redis) -> None:
    """A pod died between a batch's place in the index and the batch: it is looked for no longer than a minute."""
    await each_redis.zadd(BATCHES, {"t batch_none": 0})
    assert await batches.hold("t", "batch_none", "pod") is None
    assert await batches.some_live(9) == []


async def test_a_tenant_has_so_many_batches(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.batches.MAX_BATCHES", 2)
    made = [await begin(batches) for _ in range(2)]
    with pytest.raises(TooManyBatches):
        await begin(batches)
    page, has_more = await batches.page("t", after=None, limit=1)
    assert [each.id for each in page] == [made[1].id] and has_more
    page, has_more = await batches.page("t", after=made[1].id, limit=1)
    assert [each.id for each in page] == [made[0].id] and not has_more
    assert len(await batches.some_live(9)) == 2
