"""`/v1/responses` over HTTP: pods, workers by script, and the official client."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseItemList

from shared import grammar
from tests.api.conftest import KEYS, client
from tests.api.scripted import WAIT_S, Script, ScriptedWorker, error_of, say, until_known
from tests.api.test_resume import drawn
from tests.system import MODEL, System

ADDRESS = "/v1/responses"
COUNT = ADDRESS + "/input_tokens"


def ask(worker: ScriptedWorker, **fields: Any) -> dict[str, Any]:
    return {"model": worker.model, "input": "Hi"} | fields


async def respond(pod: httpx.AsyncClient, worker: ScriptedWorker, text: str = "Yes", **fields: Any) -> dict[str, Any]:
    """A response that has ended."""
    asked = asyncio.create_task(pod.post(ADDRESS, json=ask(worker, **fields)))
    await (await worker.claim()).answer(text)
    response = await asked
    assert response.status_code == 200, response.text
    return dict(response.json())


def prompt_of(script: Script) -> str:
    return bytes(token for token in script.job.prompt_token_ids if token < 256).decode()


def events(body: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", body, re.MULTILINE)]


async def until_status(pod: httpx.AsyncClient, response_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_S):
        while (found := (await pod.get(f"{ADDRESS}/{response_id}")).json())["status"] not in statuses:
            await asyncio.sleep(0.02)
    return dict(found)


async def test_it_is_kept_and_found_on_any_pod(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    response = await respond(pods[0], pair_worker, metadata={"a": "b"}, instructions="Be short.")
    assert response["id"].startswith("resp_") and response["status"] == "completed"
    assert response["output"][0]["content"][0]["text"] == "Yes"
    assert (response["metadata"], response["instructions"]) == ({"a": "b"}, "Be short.")
    assert (await pods[1].get(f"{ADDRESS}/{response['id']}")).json() == response
    items = (await pods[1].get(f"{ADDRESS}/{response['id']}/input_items")).json()
    assert [(item["role"], item["content"][0]["text"]) for item in items["data"]] == [("user", "Hi")]


async def test_a_conversation_goes_on(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    """On any pod, without the instructions of the turn before, and with all that was said."""
    first = await respond(pods[0], pair_worker, "One", instructions="Count.")
    asked = asyncio.create_task(pods[1].post(ADDRESS, json=ask(
        pair_worker, input="Next", previous_response_id=first["id"])))
    script = await pair_worker.claim()
    assert prompt_of(script) == "user\nHi\nassistant\nOne\nuser\nNext\nassistant\n"
    await script.answer("Two")
    second = (await asked).json()
    assert second["previous_response_id"] == first["id"]
    items = (await pods[0].get(f"{ADDRESS}/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert [item["role"] for item in items] == ["user", "assistant", "user"]
    assert (await pods[0].delete(f"{ADDRESS}/{first['id']}")).json() == {
        "id": first["id"], "object": "response", "deleted": True}
    third = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker, previous_response_id=second["id"])))
    script = await pair_worker.claim()
    assert "One" in prompt_of(script), "a conversation does not need its beginning to be kept"
    await script.answer("Three")
    await third


async def test_items_of_stored_responses_can_be_referred_to(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                                            ) -> None:
    """As clients that keep the ids of what was said do; what they stand for is kept with the new response."""
    first = await respond(pods[0], pair_worker, "One")
    said = first["output"][0]["id"]
    [asked] = (await pods[0].get(f"{ADDRESS}/{first['id']}/input_items")).json()["data"]
    items = [{"type": "item_reference", "id": asked["id"]}, {"id": said}, {"role": "user", "content": "Next"}]
    running = asyncio.create_task(pods[1].post(ADDRESS, json=ask(pair_worker, input=items)))
    script = await pair_worker.claim()
    assert prompt_of(script) == "user\nHi\nassistant\nOne\nuser\nNext\nassistant\n"
    await script.answer("Two")
    second = (await running).json()
    assert (await pods[0].delete(f"{ADDRESS}/{first['id']}")).status_code == 200
    listed = (await pods[0].get(f"{ADDRESS}/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert [item["content"][0]["text"] for item in listed] == ["Hi", "One", "Next"] and listed[1]["id"] == said
    unstored = await respond(pods[0], pair_worker, store=False)
    for unknown in (said, unstored["output"][0]["id"], "msg_9_" + second["id"], "msg_x", ""):
        refused = await pods[0].post(ADDRESS, json=ask(pair_worker, input=[{"type": "item_reference", "id": unknown}]))
        assert error_of(refused, 404)["code"] == "item_not_found"
    counted = await pods[0].post(COUNT, json=ask(pair_worker, input=[{"id": second["output"][0]["id"]}]))
    assert counted.json()["input_tokens"] == len("<assistant\nTwo>\n<assistant\n")


async def test_a_conversation_needs_no_worker_of_its_past(pair: System, pods: list[httpx.AsyncClient],
                                                          pair_worker: ScriptedWorker) -> None:
    """It goes on with another model, though nobody can tell the log probabilities of its last answer any more."""
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(
        pair_worker, include=["message.output_text.logprobs"])))
    script, redis = await pair_worker.claim(), pair_worker.queue.redis
    await script.say(drawn("A", 0), say("", 0, end=True))
    await script.end()
    told = (await asked).json()
    assert told["output"][0]["content"][0]["logprobs"]
    await pair_worker.leave()
    other, url = ScriptedWorker(redis), pair.start_pod()
    await other.announce()
    async with client(url) as pod:
        await until_known(pod, other)
        assert (await pod.get(f"{ADDRESS}/{told['id']}")).json() == told
        [kept] = [key async for key in redis.scan_iter(pair_worker.queue.shard.key("tokenizer:*"))]
        await redis.delete(kept)
    pair.pods.pop(url).end()
    url = pair.start_pod()
    async with client(url) as pod:
        await until_known(pod, other)
        assert error_of(await pod.get(f"{ADDRESS}/{told['id']}"), 503)["code"] == "no_worker"
        asked = asyncio.create_task(pod.post(ADDRESS, json=ask(other, previous_response_id=told["id"])))
        script = await other.claim()
        assert prompt_of(script) == "user\nHi\nassistant\nA\nuser\nHi\nassistant\n"
        await script.answer("x")
        assert (await asked).json()["status"] == "completed"
    await other.leave()
    pair.pods.pop(url).end()


async def test_without_room_it_is_answered_unless_it_must_be_stored(pair: System, pods: list[httpx.AsyncClient],
                                                                    pair_worker: ScriptedWorker) -> None:
    """It says that it is not stored, also to a client that returns with its key when there is room again."""
    url, key = pair.start_pod(max_tenant_stored_bytes=1500), {"idempotency-key": secrets.token_hex(8)}
    async with client(url, KEYS[1]) as pod:
        await until_known(pod, pair_worker)
        long = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "x" * 100, "note": "x" * 1500}]
        for fields in ({"store": True}, {"background": True}, {"background": True, "stream": True}):
            refused = await pod.post(ADDRESS, json=ask(pair_worker, input=long, **fields))
            assert error_of(refused, 400)["code"] == "storage_limit_exceeded"
        told = await respond(pod, pair_worker, input=long)
        assert (told["store"], told["status"]) == (False, "completed")
        assert error_of(await pod.get(f"{ADDRESS}/{told['id']}"), 404)["code"] == "response_not_found"

        body = ask(pair_worker, input=long, stream=True)
        asked = asyncio.create_task(pod.post(ADDRESS, json=body, headers=key))
        await (await pair_worker.claim()).answer("Yes")
        first = (await asked).text
        assert {each["response"]["store"] for each in events(first) if "response" in each} == {False}
        for again in (pod, pods[0]):
            assert (await again.post(ADDRESS, json=body, headers=key | dict(pod.headers))).text == first
    pair.pods.pop(url).end()


async def test_what_cannot_be_gone_on_from(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    unstored = await respond(pods[0], pair_worker, store=False)
    for previous in (unstored["id"], "resp_none", "x"):
        error = error_of(await pods[0].post(ADDRESS, json=ask(pair_worker, previous_response_id=previous)), 400)
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
    assert error_of(await pods[0].get(f"{ADDRESS}/{unstored['id']}"), 404)["code"] == "response_not_found"
    background = (await pods[0].post(ADDRESS, json=ask(pair_worker, background=True))).json()
    refused = await pods[1].post(ADDRESS, json=ask(pair_worker, previous_response_id=background["id"]))
    assert error_of(refused, 409)["code"] == "completion_in_progress"
    await (await pair_worker.claim()).answer("x")


async def test_a_stream_resumes_on_another_pod(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker, stream=True)))
    script = await pair_worker.claim()
    await script.answer("Hello")
    raw = (await asked).text
    told = events(raw)
    assert told[-1]["type"] == "response.completed" and "[DONE]" not in raw
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    for after in (None, 0, 1, 5, len(told) - 2):
        params = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
        again = await pods[1].get(f"{ADDRESS}/{script.job.id}", params=params)
        assert events(again.text) == told[0 if after is None else after + 1:]
    behind = await pods[1].get(f"{ADDRESS}/{script.job.id}", params={"stream": "true"}, headers={"last-event-id": "3"})
    assert events(behind.text) == told[4:]
    beyond = {"stream": "true", "starting_after": str(len(told))}
    assert (await pods[1].get(f"{ADDRESS}/{script.job.id}", params=beyond)).status_code == 400


async def test_behind_the_last_event_there_is_nothing(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                                      ) -> None:
    """Of an answer that has ended well, and of one that was cancelled: that is an answer too."""
    response = await respond(pods[0], pair_worker)
    began = (await pods[0].post(ADDRESS, json=ask(pair_worker, background=True))).json()
    await pods[0].post(f"{ADDRESS}/{began['id']}/cancel")
    for response_id in (response["id"], began["id"]):
        told = await pods[1].get(f"{ADDRESS}/{response_id}", params={"stream": "true"})
        last = events(told.text)[-1]["sequence_number"]
        rest = await pods[1].get(f"{ADDRESS}/{response_id}", params={"stream": "true", "starting_after": last})
        assert (rest.status_code, rest.text) == (200, "")


async def test_items_are_listed_as_the_official_client_reads_them(pods: list[httpx.AsyncClient],
                                                                  pair_worker: ScriptedWorker) -> None:
    """Under ids of their own, whatever they came with, so that pages end."""
    given = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "id": "m"},
             {"type": "message", "role": "user", "content": "So?", "id": "m"},
             {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": 5},
             {"type": "function_call_output", "call_id": "c", "output": "1"},
             {"role": "assistant", "content": [{"type": "output_text", "text": "One."}]}]
    response = await respond(pods[0], pair_worker, input=given)
    path, found, after = f"{ADDRESS}/{response['id']}/input_items", list[dict[str, Any]](), dict[str, str]()
    while len(found) <= len(given):
        page = (await pods[1].get(path, params={"limit": "1", "order": "asc"} | after)).json()
        ResponseItemList.model_validate(page, strict=True)
        found, after = found + page["data"], {"after": page["last_id"]}
        if not page["has_more"]:
            break
    assert [item["type"] for item in found] == ["message", "message", "message", "function_call",
                                                "function_call_output", "message"]
    assert found[1]["content"] == [{"type": "output_text", "text": "Hello", "annotations": []}]
    assert found[-1]["content"] == [{"type": "output_text", "text": "One.", "annotations": []}]
    assert len({item["id"] for item in found}) == len(given) and {item["status"] for item in found} == {"completed"}


@pytest.mark.parametrize(("fields", "param"), [
    ({"input": [{"type": [], "role": "user", "content": "x"}]}, "input"), ({"input": []}, "input"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"reasoning": {"summary": "bogus"}}, "reasoning.summary")])
async def test_what_is_no_response_is_refused(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker,
                                              fields: dict[str, Any], param: str) -> None:
    error = error_of(await pods[0].post(ADDRESS, json=ask(pair_worker, **fields)), 400)
    assert error["param"] == param and not (error["message"] or "").startswith("messages")


async def test_in_the_background_it_needs_no_reader(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    response = (await pods[0].post(ADDRESS, json=ask(pair_worker, background=True))).json()
    assert (response["status"], response["output"], response["background"]) == ("queued", [], True)
    script = await pair_worker.claim()
    await script.say(say("Hel"))
    half = await until_status(pods[1], response["id"], "in_progress")
    assert half["output"][0]["content"][0]["text"] == "Hel"
    async with pods[1].stream("GET", f"{ADDRESS}/{response['id']}", params={"stream": "true"}) as stream:
        async for line in stream.aiter_lines():
            if "output_text.delta" in line:
                break                                   # and leaves: that ends nothing
    await asyncio.sleep(0.1)
    await script.say(say("lo", end=True))
    await script.end()
    done = await until_status(pods[0], response["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == "Hello"


async def test_the_stream_of_a_background_response(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    """Who leaves it does not end it, and finds the rest of it."""
    async with pods[0].stream("POST", ADDRESS, json=ask(pair_worker, background=True, stream=True)) as stream:
        lines = stream.aiter_lines()
        head = [await anext(lines) for _ in range(3)]
        assert head[:2] == ["event: response.created", "id: 0"]
        script = await pair_worker.claim()
        queue = pair_worker.queue
        assert await queue.redis.hget(queue.shard.key(f"job:{script.job.id}"), "pods"), "its log is pushed to the pod"
    await asyncio.sleep(0.1)
    await script.answer("Yes")
    rest = await pods[1].get(f"{ADDRESS}/{script.job.id}", params={"stream": "true", "starting_after": "0"})
    assert [event["type"] for event in events(rest.text)][:2] == ["response.queued", "response.in_progress"]


async def test_cancelling_and_deleting(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    response = (await pods[0].post(ADDRESS, json=ask(pair_worker, background=True))).json()
    script = await pair_worker.claim()
    await script.say(say("Hel"))
    cancelled = (await pods[1].post(f"{ADDRESS}/{response['id']}/cancel")).json()
    assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
    assert (await pods[0].post(f"{ADDRESS}/{response['id']}/cancel")).json() == cancelled
    assert await script.outcome() == "cancelled"
    assert (await pods[0].delete(f"{ADDRESS}/{response['id']}")).status_code == 200
    address = f"{ADDRESS}/{response['id']}"
    for answer in (await pods[1].get(address), await pods[1].delete(address),
                   await pods[1].get(f"{address}/input_items"), await pods[1].post(f"{address}/cancel")):
        assert error_of(answer, 404)["code"] == "response_not_found"


async def test_a_failed_response_is_an_object(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker)))
    script = await pair_worker.claim()
    await script.end("job_failed")
    response = (await asked).json()
    assert (response["status"], response["error"]["code"], response["usage"]) == ("failed", "server_error", None)


async def test_what_a_chat_would_refuse_is_refused_in_our_words(pods: list[httpx.AsyncClient],
                                                                pair_worker: ScriptedWorker) -> None:
    for fields, param, code in (
            ({"input": "x" * 600}, "input", "context_length_exceeded"),
            ({"max_output_tokens": 10**6}, "input", "context_length_exceeded"),
            ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}}, "text.format",
             "invalid_grammar")):
        error = error_of(await pods[0].post(ADDRESS, json=ask(pair_worker, **fields)), 400)
        assert (error["param"], error["code"]) == (param, code)


async def test_a_form_is_asked_for(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    asked = asyncio.create_task(pods[0].post(ADDRESS, json=ask(pair_worker, text={"format": {"type": "json_object"}})))
    script = await pair_worker.claim()
    assert script.job.sampling.grammar == grammar.of_schema(grammar.ANY_OBJECT)
    await script.answer("{}")
    assert (await asked).json()["text"]["format"] == {"type": "json_object"}


async def test_a_key_stands_for_one_response(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    for fields in ({}, {"background": True}, {"stream": True}):
        headers = {"idempotency-key": f"responses {fields}"}
        body = ask(pair_worker, **fields)
        asked = [asyncio.create_task(pod.post(ADDRESS, json=body, headers=headers)) for pod in pods]
        await (await pair_worker.claim()).answer("Yes")
        first, second = [await task for task in asked]
        if "stream" in fields:
            assert first.text == second.text
        else:
            assert first.json()["id"] == second.json()["id"]


async def test_what_cannot_be_counted(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    """As what cannot be answered, but for what is too long: that is what one counts for."""
    for fields, param in (({"input": []}, "input"), ({"previous_response_id": "resp_none"}, "previous_response_id"),
                          ({"tools": [{"type": "web_search"}]}, "tools"), ({"prompt": {"id": "x"}}, "prompt")):
        assert error_of(await pods[0].post(COUNT, json=ask(pair_worker, **fields)), 400)["param"] == param
    counted = (await pods[0].post(COUNT, json=ask(pair_worker, input="x" * 600, stream=True, background=True))).json()
    assert counted["input_tokens"] > pair_worker.card.max_model_len
    assert await pair_worker.queue.num_live() == 0
    async with httpx.AsyncClient(base_url=pods[0].base_url) as stranger:
        error_of(await stranger.post(COUNT, json=ask(pair_worker)), 401)


async def test_another_key_finds_nothing(pair: System, pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker
                                         ) -> None:
    response = await respond(pods[0], pair_worker)
    async with client(pair.url, KEYS[1]) as stranger:
        error_of(await stranger.get(f"{ADDRESS}/{response['id']}"), 404)
        error_of(await stranger.delete(f"{ADDRESS}/{response['id']}"), 404)
        refused = await stranger.post(ADDRESS, json=ask(pair_worker, previous_response_id=response["id"]))
        assert error_of(refused, 400)["code"] == "previous_response_not_found"


async def test_a_chat_is_no_response(pods: list[httpx.AsyncClient], pair_worker: ScriptedWorker) -> None:
    response = await respond(pods[0], pair_worker)
    error_of(await pods[0].get(f"/v1/chat/completions/{response['id']}"), 404)
    listed = await pods[0].get("/v1/chat/completions", params={"model": pair_worker.model})
    assert listed.json()["data"] == []


@pytest.fixture
async def sdk(pair: System) -> Any:
    async with openai.AsyncClient(base_url=f"{pair.url}/v1", api_key=KEYS[0], max_retries=0, timeout=WAIT_S) as sdk:
        yield sdk


async def test_the_official_client(sdk: openai.AsyncClient, pair_worker: ScriptedWorker) -> None:
    asked = asyncio.create_task(sdk.responses.create(model=pair_worker.model, input="Hi"))
    await (await pair_worker.claim()).answer("Yes")
    response = await asked
    assert response.output_text == "Yes" and response.usage
    assert (await sdk.responses.retrieve(response.id)).output_text == "Yes"
    assert [item.id async for item in sdk.responses.input_items.list(response.id)]
    stream = await sdk.responses.retrieve(response.id, stream=True, starting_after=3)
    rest = [event async for event in stream]
    assert rest[0].sequence_number == 4 and rest[-1].type == "response.completed"
    await sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(response.id)


async def test_the_official_clients_stream(sdk: openai.AsyncClient, pair_worker: ScriptedWorker) -> None:
    async with sdk.responses.stream(model=pair_worker.model, input="Hi") as stream:
        script = await pair_worker.claim()
        await script.answer("Hello")
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        assert text == (await stream.get_final_response()).output_text == "Hello"


async def test_tokens_are_counted_as_they_are_charged(system: System) -> None:
    """By a model that is shown tools, and with the conversation before."""
    tool: Any = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": None}
    asked: dict[str, Any] = {"model": MODEL, "instructions": "Be brief.", "tools": [tool]}
    async with openai.AsyncClient(base_url=f"{system.url}/v1", api_key="EMPTY", max_retries=0, timeout=60) as sdk:
        for said in ("Count from 1 to 9.", "And now?"):
            counted = await sdk.responses.input_tokens.count(**asked, input=said)
            response = await sdk.responses.create(**asked, input=said, max_output_tokens=9)
            assert response.usage and counted.object == "response.input_tokens"
            assert counted.input_tokens == response.usage.input_tokens
            asked["previous_response_id"] = response.id
