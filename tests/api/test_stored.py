"""Chat completions that are stored: kept, listed, described, and forgotten, on any pod."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from api.cards import MAX_LOADED, Cards
from api.deleted import REMEMBERED_S
from api.stored import Record, Store
from deploy.redis import RedisServer, binaries
from shared import connection
from shared.errors import InvalidValue, StorageFull
from shared.keys import Shard, tenant_key
from shared.settings import Settings
from tests.api.conftest import KEYS, client
from tests.api.scripted import WAIT_S, ScriptedWorker, ask, byte_card, byte_tokenizer, error_of, say
from tests.api.test_resume import drawn
from tests.conftest import short_folder
from tests.system import System

ADDRESS = "/v1/chat/completions"


async def store(pod: httpx.AsyncClient, worker: ScriptedWorker, content: str = "Hi", **fields: Any) -> str:
    """Asks, has it answered with 'Yes', and stores it; its id."""
    asked = asyncio.create_task(pod.post(ADDRESS, json=ask(worker.model, content, store=True, **fields)))
    await (await worker.claim()).answer("Yes")
    return str((await asked).json()["id"])


async def listed(pod: httpx.AsyncClient, **params: str) -> dict[str, Any]:
    response = await pod.get(ADDRESS, params=params)
    assert response.status_code == 200, response.text
    return dict(response.json())


def record(number: int, num_bytes: int) -> Record:
    return Record(f"chatcmpl-0123456789-0-{number}", "chat", "m", number, asked={"content": "x" * num_bytes})


async def test_what_a_key_stores_is_bounded(each_redis: Redis) -> None:
    """All together, whoever else stores; what is asked again counts once, and what is forgotten does not."""
    stored = Store(each_redis, Settings(max_tenant_stored_bytes=2300))
    for number, num_bytes in ((1, 700), (2, 700), (2, 600)):
        await stored.put("a", record(number, num_bytes))
    with pytest.raises(StorageFull, match="stored requests"):
        await stored.put("a", record(3, 700))
    assert await stored.get("a", record(3, 0).id) is None
    await stored.put("b", record(3, 700))
    found = await stored.get("b", record(3, 0).id)
    assert found and found.asked == record(3, 700).asked
    for _ in range(2):
        await stored.remove("a", record(2, 0).id)
    await stored.put("a", record(3, 700))
    assert await sizes(each_redis) == {record(1, 0).id, record(3, 0).id}
    for number in (1, 3):
        await stored.remove("a", record(number, 0).id)
    assert await sizes(each_redis) == set()


async def test_what_is_over_takes_no_room(each_redis: Redis) -> None:
    await Store(each_redis, Settings()).put("a", record(3, 10))     # which outlives the others, and what counts them
    brief = Store(each_redis, Settings(request_deadline_s=0.1, store_s=0.1, max_tenant_stored_bytes=2500))
    await brief.put("a", record(1, 2000))
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(StorageFull):
                await brief.put("a", record(2, 2000))
                break
            await asyncio.sleep(0.01)
    assert record(1, 0).id not in await sizes(each_redis)


async def sizes(redis: Redis) -> set[str]:
    """The answers of tenant a whose bytes are counted, in the sum too."""
    found: Any = await redis.hgetall(tenant_key("a", "stored_bytes"))
    assert int(found.pop(b"")) == sum(map(int, found.values()))
    assert {*found} == {*await redis.zrange(tenant_key("a", "stored"), 0, -1)}
    return {each.decode() for each in found}


async def test_what_is_stored_is_found_on_any_pod(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    stored = await store(pods[0], pair_worker, metadata={"run": "7"})
    found = (await pods[1].get(f"{ADDRESS}/{stored}")).json()
    assert found["choices"][0]["message"]["content"] == "Yes"
    assert found["metadata"] == {"run": "7"}
    messages = (await pods[1].get(f"{ADDRESS}/{stored}/messages")).json()
    assert [(message["role"], message["content"]) for message in messages["data"]] == [("user", "Hi")]
    assert await pair_worker.queue.redis.pttl(pair_worker.queue.shard.key(f"out:{stored}")) > 60_000 * 60


async def test_what_is_not_stored_is_not_listed(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker.model, metadata={"a": "b"})))
    await (await pair_worker.claim()).answer("Yes")
    completion_id = (await asked).json()["id"]
    assert (await listed(pods[0], model=pair_worker.model))["data"] == []
    found = await pods[0].get(f"{ADDRESS}/{completion_id}")
    assert "metadata" not in found.json(), "it is kept for a moment, so that clients may return"
    for response in (await pods[0].get(f"{ADDRESS}/{completion_id}/messages"),
                     await pods[0].post(f"{ADDRESS}/{completion_id}", json={"metadata": {}}),
                     await pods[0].delete(f"{ADDRESS}/{completion_id}")):
        assert error_of(response, 404)["code"] == "completion_not_found"


async def test_a_list_has_pages_and_filters(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    stored = [await store(pods[0], pair_worker, str(i), metadata={"parity": str(i % 2)}) for i in range(5)]
    model = pair_worker.model
    page = await listed(pods[1], model=model, limit="2")
    assert [each["id"] for each in page["data"]] == stored[:2]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (stored[0], stored[1], True)
    page = await listed(pods[1], model=model, limit="3", after=stored[1])
    assert [each["id"] for each in page["data"]] == stored[2:] and not page["has_more"]
    page = await listed(pods[0], model=model, order="desc", limit="1")
    assert [each["id"] for each in page["data"]] == stored[4:]
    page = await listed(pods[0], **{"model": model, "metadata[parity]": "1"})
    assert [each["id"] for each in page["data"]] == [stored[1], stored[3]]
    assert page["data"][0]["metadata"] == {"parity": "1"}


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_who_lists_and_deletes_in_turn_deletes_all(order: Any, pair: System, pods: list[httpx.AsyncClient],
                                                         pair_worker: ScriptedWorker) -> None:
    stored = [await store(pods[0], pair_worker, str(i)) for i in range(5)]
    model, seen = pair_worker.model, []
    async with openai.AsyncClient(base_url=f"{pair.url}/v1", api_key=KEYS[0], max_retries=0, timeout=WAIT_S) as sdk:
        async for each in sdk.chat.completions.list(model=model, order=order, limit=2):
            await sdk.chat.completions.delete(each.id)
            seen.append(each.id)
    assert seen == (stored if order == "asc" else stored[::-1])
    assert (await listed(pods[1], model=model))["data"] == []


async def test_a_list_goes_on_after_what_is_deleted(each_redis: Redis) -> None:
    """From where it stood, for a while; also among those that were made in the same millisecond."""
    stored, now_ms = Store(each_redis, Settings()), round(time.time() * 1000)
    records = [replace(record(number, 0), created_ms=now_ms + number // 3) for number in range(9)]
    for each in records:
        await stored.put("a", each)
    for number in (4, 5, 7):
        await stored.remove("a", records[number].id)
    rest = [number for number in range(9) if number not in (4, 5, 7)]

    async def found(after: int, *, newest_first: bool) -> list[str]:
        return [each.id async for each in stored.listed("a", after=records[after].id, newest_first=newest_first)]

    for after in range(9):
        assert await found(after, newest_first=False) == [records[number].id for number in rest if number > after]
        assert await found(after, newest_first=True) == [records[number].id for number in rest[::-1] if number < after]
    assert 0 < await each_redis.ttl(tenant_key("a", f"deleted:completions:{records[4].id}")) <= REMEMBERED_S
    await stored.put("b", records[0])
    with pytest.raises(InvalidValue):
        _ = [each async for each in stored.listed("b", after=records[4].id, newest_first=False)]


async def test_a_page_is_filled_with_what_can_be_told(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                                     ) -> None:
    """However much of what is listed is kept no longer; where nothing is left, there is no more."""
    stored = [await store(pods[0], pair_worker, str(i), metadata={"i": str(i), "a\nb": "c"}) for i in range(5)]
    for each in stored[:3]:
        await pair_worker.queue.erase(each)
    page = await listed(pods[1], model=pair_worker.model, limit="1")
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (stored[3:4], True)
    page = await listed(pods[1], model=pair_worker.model, limit="1", after=stored[3])
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (stored[4:], False)
    for response in (await pods[0].get(f"{ADDRESS}/{stored[0]}/messages"),
                     await pods[0].post(f"{ADDRESS}/{stored[0]}", json={"metadata": {}})):
        assert error_of(response, 404)["code"] == "completion_not_found"
    assert error_of(await pods[0].get(ADDRESS, params={"after": "nope"}), 400)["param"] == "after"
    for name, num_found in (("a\nb", 2), ("", 0)):
        page = await listed(pods[0], **{"model": pair_worker.model, f"metadata[{name}]": "c"})
        assert len(page["data"]) == num_found


async def test_a_list_reads_little_of_what_was_asked(each_redis: Redis) -> None:
    """Whatever the metadata: neither long ones nor words of ours within them hide anything."""
    stored, now_ms = Store(each_redis, Settings()), round(time.time() * 1000)
    metadata = [{"items": ', "items": ['}, {str(i): "\N{PILE OF POO}" * 512 for i in range(16)}, {}]
    records = [Record(f"chatcmpl-0123456789-0-{number}", "chat", "m", now_ms + number, each,
                      ({"role": "user", "content": "x" * (1 << 20)},)) for number, each in enumerate(metadata * 4)]
    for each in records:
        await stored.put("a", each)
    tracemalloc.start()
    try:
        found = [each async for each in stored.listed("a", after=None, newest_first=False)]
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 2 << 20
    assert found == [replace(each, items=()) for each in records]
    whole = await stored.get("a", records[0].id)
    assert whole and (*whole.items,) == records[0].items and whole.metadata == metadata[0]


async def test_what_will_never_be_told_is_forgotten(each_redis: Redis) -> None:
    """Not what was begun a moment ago: its job may come."""
    stored = Store(each_redis, Settings(max_tenant_stored_bytes=2300))
    old, new = record(1, 700), replace(record(2, 700), created_ms=round(time.time() * 1000))
    for each in (old, new):
        await stored.put("a", replace(each, created_ms=new.created_ms))
    await stored.forget("a", [old, new])
    assert [each.id async for each in stored.listed("a", after=None, newest_first=False)] == [new.id]
    await stored.put("a", record(3, 700))               # there is room again


@pytest.mark.parametrize("binary", [pytest.param(path, id=path.parent.name) for path in binaries()])
async def test_from_a_full_redis_it_can_be_removed(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    server = RedisServer(short_folder(tmp_path_factory), binary).start()
    redis: Any = connection.connect(server.url)
    try:
        stored, new = Store(redis, Settings()), replace(record(1, 700), created_ms=round(time.time() * 1000))
        await stored.put("a", new)
        await redis.config_set("maxmemory", (await redis.info("memory"))["used_memory"] // 2)
        with pytest.raises(OutOfMemoryError):
            await redis.set("more", "x")
        await stored.remove("a", new.id)
        assert not await stored.has("a", new.id)
        assert [each async for each in stored.listed("a", after=None, newest_first=False)] == []
    finally:
        await redis.aclose()
        server.stop()


async def test_a_list_shows_what_has_ended_well(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    async def begin() -> tuple[Any, asyncio.Task[httpx.Response]]:
        asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker.model, store=True)))
        return await pair_worker.claim(), asked

    (failed, first), (running, second) = await begin(), await begin()
    await failed.end("job_failed")
    assert (await first).status_code == 500
    assert (await listed(pods[0], model=pair_worker.model))["data"] == []
    await running.answer("Yes")
    await second
    assert len((await listed(pods[0], model=pair_worker.model))["data"]) == 1


async def test_what_is_stored_needs_no_worker(pair: System, pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                              ) -> None:
    """A pod that has never heard of the model tells its answers with their log probabilities."""
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker.model, store=True, logprobs=True)))
    script = await pair_worker.claim()
    await script.say(drawn("A", 0), say("", 0, end=True))
    await script.end()
    told = (await asked).json()
    plain, redis = await store(pods[0], pair_worker), pair_worker.queue.redis
    [kept] = [key async for key in redis.scan_iter(pair_worker.queue.shard.key("tokenizer:*"))]
    assert 3600 < await redis.ttl(kept) <= 3600 + 86_400
    await pair_worker.leave()
    await redis.delete(pair_worker.queue.shard.key(f"card:{pair_worker.card.pack()[0]}"))
    url, address = pair.start_pod(), f"{ADDRESS}/{script.job.id}"
    async with client(url) as pod:
        assert (await pod.get(address)).json() == told | {"metadata": {}}
        page = await listed(pod, model=pair_worker.model)
        assert [each["id"] for each in page["data"]] == [told["id"], plain]
        assert page["data"][0]["choices"] == told["choices"]
        assert told["choices"][0]["logprobs"]["content"][0]["bytes"] == [*b"A"]
    pair.pods.pop(url).end()
    await redis.delete(kept)
    url = pair.start_pod()
    async with client(url) as pod:
        assert error_of(await pod.get(address), 503)["code"] == "no_worker"
        page = await listed(pod, model=pair_worker.model)
        assert [each["id"] for each in page["data"]] == [told["id"], plain], "one takes no other with it"
        assert page["data"][0]["choices"] == [told["choices"][0] | {"logprobs": None}]
    pair.pods.pop(url).end()


async def test_few_tokenizers_of_others_are_held(each_redis: Redis) -> None:
    """Each is loaded once, however many ask for it at once, and the one used last stays."""
    cards, shard, ids = Cards(each_redis, Settings()), Shard("0123456789-0"), []
    for number in range(MAX_LOADED + 1):
        card = replace(byte_card("m"), tokenizer_json=byte_tokenizer(f"<|{number}|>").to_str())
        await each_redis.set(shard.key(f"tokenizer:{card.tokenizer_id}"), card.pack()[1])
        ids.append(card.tokenizer_id)
    first, *same = await asyncio.gather(*(cards.tokenizer(shard, ids[0]) for _ in range(3)))
    assert first and all(each is first for each in same) and first.token_bytes(256) == b"<|0|>"
    for each in (ids[1], ids[0], ids[2]):
        assert await cards.tokenizer(shard, each)
    assert await cards.tokenizer(shard, ids[0]) is first and len(cards._loaded) == MAX_LOADED
    assert await cards.tokenizer(shard, "none") is None


async def test_metadata_is_changed_and_answers_are_deleted(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                                           ) -> None:
    stored = await store(pods[0], pair_worker, metadata={"a": "1"})
    changed = (await pods[1].post(f"{ADDRESS}/{stored}", json={"metadata": {"b": "2"}})).json()
    assert changed["metadata"] == {"b": "2"}
    assert (await pods[0].get(f"{ADDRESS}/{stored}")).json()["metadata"] == {"b": "2"}
    assert error_of(await pods[0].post(f"{ADDRESS}/{stored}", json={"metadata": {"c": 3}}), 400)["param"] == "metadata"
    assert (await pods[1].delete(f"{ADDRESS}/{stored}")).json() == {
        "object": "chat.completion.deleted", "id": stored, "deleted": True}
    for response in (await pods[0].get(f"{ADDRESS}/{stored}"), await pods[0].delete(f"{ADDRESS}/{stored}"),
                     await pods[0].get(f"{ADDRESS}/{stored}", params={"stream": "true"})):
        error_of(response, 404)
    assert (await listed(pods[0], model=pair_worker.model))["data"] == []


async def test_deleting_ends_what_runs(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    """Its reader is told, its worker is refused, and nobody takes it for something that Redis has lost."""
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker.model, store=True)))
    script = await pair_worker.claim()
    assert (await pods[1].delete(f"{ADDRESS}/{script.job.id}")).json()["deleted"]
    assert error_of(await asked, 499)["code"] == "cancelled"
    with pytest.raises(AssertionError, match="refused"):
        await script.answer("Yes")
    assert await pair_worker.queue.find(script.job.id) is None


async def test_another_key_finds_nothing(pair: System, pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                         ) -> None:
    stored = await store(pods[0], pair_worker)
    async with client(pair.url, KEYS[1]) as stranger:
        assert (await listed(stranger, model=pair_worker.model))["data"] == []
        for response in (await stranger.get(f"{ADDRESS}/{stored}/messages"),
                         await stranger.delete(f"{ADDRESS}/{stored}"),
                         await stranger.post(f"{ADDRESS}/{stored}", json={"metadata": {}})):
            error_of(response, 404)


@pytest.mark.parametrize(("params", "param"), [
    ({"limit": "0"}, "limit"), ({"limit": "101"}, "limit"), ({"limit": "x"}, "limit"), ({"order": "up"}, "order")])
async def test_what_is_no_page_is_refused(pods: list[httpx.AsyncClient], params: dict[str, str], param: str) -> None:
    assert error_of(await pods[0].get(ADDRESS, params=params), 400)["param"] == param


async def test_the_official_client(pair: System, pair_worker: ScriptedWorker, pods: list[httpx.AsyncClient]) -> None:
    stored = await store(pods[0], pair_worker, metadata={"a": "b"})
    async with openai.AsyncClient(base_url=f"{pair.url}/v1", api_key=KEYS[0], max_retries=0, timeout=WAIT_S) as sdk:
        chats = sdk.chat.completions
        assert (await chats.retrieve(stored)).choices[0].message.content == "Yes"
        assert [each.id async for each in chats.list(model=pair_worker.model, metadata={"a": "b"}, limit=1)] == [stored]
        assert [message.content async for message in chats.messages.list(stored)] == ["Hi"]
        assert (await chats.update(stored, metadata={"c": "d"})).id == stored
        assert (await chats.delete(stored)).deleted
