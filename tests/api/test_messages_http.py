"""`/v1/messages` over HTTP: its answers and errors, and Anthropic's own SDK, which reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest

from shared import connection
from shared.job import Delta
from tests.api.conftest import HEARTBEAT_S, KEYS, MAX_BODY_BYTES
from tests.api.scripted import CHATML, WAIT_S, Script, ScriptedWorker, byte_card, say, until_known
from tests.api.test_messages import HI, WEATHER
from tests.system import System

ADDRESS = "/v1/messages"
MESSAGES: Any = [HI]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + "{# <tool_call> </tool_call> #}"


@pytest.fixture
async def caller(redis_url: str, http: httpx.AsyncClient) -> AsyncIterator[ScriptedWorker]:
    """A worker whose model is shown tools, and calls them as Hermes does."""
    redis = connection.connect(redis_url)
    worker = ScriptedWorker(redis, replace(byte_card("scripted/caller"), chat_templates={"default": TEMPLATE}))
    await worker.announce()
    await until_known(http, worker)
    yield worker
    await worker.leave()
    await redis.aclose()


def body_of(worker: ScriptedWorker, **fields: Any) -> dict[str, Any]:
    return {"model": worker.model, "max_tokens": 9, "messages": [HI]} | fields


async def begin(http: httpx.AsyncClient, worker: ScriptedWorker, headers: dict[str, str] | None = None, **fields: Any
                ) -> tuple[asyncio.Task[httpx.Response], Script]:
    asked = asyncio.create_task(http.post(ADDRESS, json=body_of(worker, **fields), headers=headers))
    return asked, await worker.claim()


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    """The error of an answer, which has Anthropic's shape and the id that stands in its headers."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert response.headers["request-id"] == response.headers["x-request-id"] == body["request_id"]
    assert set(body["error"]) == {"type", "message"}
    error: dict[str, str] = body["error"]
    return error


async def test_a_message_is_answered(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asked, script = await begin(http, worker, system="Be brief.", stop_sequences=["END"])
    assert script.job.sampling.stop == ("END",) and script.job.sampling.max_tokens == 9
    assert script.job.id.startswith("msg_")
    assert bytes(script.job.prompt_token_ids[1:17]) == b"system\nBe brief."
    await script.say(Delta(0, tuple(b"HiEND"), "Hi", "stop", stop="END"))
    await script.end()
    response = await asked
    message = response.json()
    assert response.headers["request-id"] and message["id"] == script.job.id
    assert message["content"] == [{"type": "text", "text": "Hi"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert message["usage"]["input_tokens"] == len(script.job.prompt_token_ids) - 3


async def test_a_stream_begins_before_anything_is_drawn(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async with http.stream("POST", ADDRESS, json=body_of(worker, stream=True)) as response:
        lines = response.aiter_lines()
        assert [await anext(lines), await anext(lines)] == ["event: message_start", "id: 1"]
        await (await worker.claim()).answer("Hi")
        rest = [line async for line in lines]
    assert [line[7:] for line in rest if line.startswith("event: ")] == [
        "content_block_start", *["content_block_delta"] * 2, "content_block_stop", "message_delta", "message_stop"]
    assert "data: [DONE]" not in rest


async def test_a_key_stands_for_one_message(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """Who returns with it is told the rest behind any event; and it is no chat."""
    headers = {"idempotency-key": "messages"}
    asked, script = await begin(http, worker, headers, stream=True)
    await script.answer("Hi")
    whole = (await asked).text
    blocks = whole.split("\n\n")
    for after in range(len(blocks) - 1):
        again = await http.post(ADDRESS, json=body_of(worker, stream=True),
                                headers=headers | {"last-event-id": str(after)})
        assert again.text == "\n\n".join(blocks[after:])
    error_of(await http.post(ADDRESS, json=body_of(worker), headers=headers), 409)
    assert (await http.get(f"/v1/chat/completions/{script.job.id}")).status_code == 404


async def test_errors_have_anthropics_shape(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """Those of the framework too; elsewhere they have OpenAI's."""
    assert error_of(await http.post(ADDRESS, json={}), 400)["type"] == "invalid_request_error"
    assert error_of(await http.post(ADDRESS, content=b"{"), 400)["type"] == "invalid_request_error"
    assert error_of(await http.get(ADDRESS), 405)["type"] == "invalid_request_error"
    assert error_of(await http.post(f"{ADDRESS}/batches", json={}), 404)["type"] == "not_found_error"
    unknown = await http.post(ADDRESS, json=body_of(worker) | {"model": "none"})
    assert error_of(unknown, 404)["type"] == "not_found_error"
    large = await http.post(ADDRESS, content=b" " * (MAX_BODY_BYTES + 1))
    assert error_of(large, 413)["type"] == "request_too_large"
    asked, script = await begin(http, worker)
    await script.end("job_failed")
    assert error_of(await asked, 500)["type"] == "api_error"
    elsewhere = await http.get("/v1/messages_of_others")
    assert set(elsewhere.json()["error"]) == {"message", "type", "param", "code"}
    assert "request-id" not in elsewhere.headers


async def test_a_key_may_come_in_anthropics_header(pods: list[httpx.AsyncClient]) -> None:
    """Beside OpenAI's, at every address."""
    async with httpx.AsyncClient(base_url=pods[0].base_url, timeout=WAIT_S) as http:
        assert (await http.get("/v1/models", headers={"x-api-key": KEYS[1]})).status_code == 200
        for headers in ({}, {"x-api-key": "sk-wrong"}, {"x-api-key": ""}):
            refused = await http.post(ADDRESS, json={}, headers=headers)
            assert error_of(refused, 401)["type"] == "authentication_error"


async def test_tokens_are_counted_as_they_are_charged(http: httpx.AsyncClient, caller: ScriptedWorker) -> None:
    """With tools and whatever else the model reads; nothing is submitted."""
    fields: dict[str, Any] = {"system": "Be brief.", "tools": [WEATHER]}
    asked, script = await begin(http, caller, **fields)
    await script.answer("Hi")
    body = {"model": caller.model, "messages": [HI]} | fields
    counted = await http.post(f"{ADDRESS}/count_tokens", json=body, headers={"anthropic-version": "2023-06-01"})
    assert counted.json() == {"input_tokens": len(script.job.prompt_token_ids)}
    usage = (await asked).json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted.json()["input_tokens"]
    assert await caller.queue.num_live() == 0
    error_of(await http.post(f"{ADDRESS}/count_tokens", json={"model": caller.model}), 400)


async def test_the_routes_are_described(http: httpx.AsyncClient) -> None:
    api = (await http.get("/openapi.json")).json()
    route = api["paths"][ADDRESS]["post"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/MessageRequest")
    assert route["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/MessageError")
    assert {"MessageRequest", "CountRequest", "MessageError", "Turn"} <= api["components"]["schemas"].keys()


# ── to the official SDK ──

@pytest.fixture
async def claude(pod: System) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=pod.url, api_key="EMPTY", max_retries=0, timeout=WAIT_S) as client:
        yield client


async def test_the_official_client_creates(claude: anthropic.AsyncAnthropic, worker: ScriptedWorker) -> None:
    asked = asyncio.create_task(claude.messages.create(model=worker.model, max_tokens=5, messages=MESSAGES))
    script = await worker.claim()
    await script.say(Delta(0, (65,), "A", "length"))
    await script.end()
    message = await asked
    assert message.content == [anthropic.types.TextBlock(type="text", text="A")]
    assert message.stop_reason == "max_tokens" and message._request_id
    count = await claude.messages.count_tokens(model=worker.model, messages=MESSAGES)
    assert count.input_tokens == len(script.job.prompt_token_ids)


async def test_the_official_client_streams_what_was_thought_and_said(
        claude: anthropic.AsyncAnthropic, redis_url: str, http: httpx.AsyncClient) -> None:
    redis = connection.connect(redis_url)
    thinker = ScriptedWorker(redis, replace(byte_card("scripted/claude"), chat_templates={
        "default": CHATML + "{# <think> </think> #}"}))
    await thinker.announce()
    await until_known(http, thinker)
    async with claude.messages.stream(model=thinker.model, max_tokens=99, messages=MESSAGES) as stream:
        script = await thinker.claim()
        await asyncio.sleep(2 * HEARTBEAT_S)            # its comments are read over
        await script.answer("<think>Hm</think>Hello")
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    await thinker.leave()
    await redis.aclose()
    assert {"thinking", "signature", "text", "content_block_stop", "message_stop"} <= set(kinds)
    thought, said = message.content
    assert thought.type == "thinking" and (thought.thinking, thought.signature) == ("Hm", "unsigned")
    assert said.type == "text" and said.text == "Hello"
    assert message.stop_reason == "end_turn" and message.usage.cache_read_input_tokens == 3
    assert message.usage.output_tokens == len("<think>Hm</think>Hello")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_the_official_client_calls_a_tool_and_tells_its_result(
        is_stream: bool, claude: anthropic.AsyncAnthropic, caller: ScriptedWorker) -> None:
    """An answer goes back as it came, and the model reads its own call again."""
    asked: dict[str, Any] = {"model": caller.model, "max_tokens": 99, "tools": [WEATHER]}
    if is_stream:
        async with claude.messages.stream(**asked, messages=MESSAGES) as stream:
            await (await caller.claim()).answer("I look." + CALL)
            message: anthropic.types.Message = await stream.get_final_message()
    else:
        task = asyncio.create_task(claude.messages.create(**asked, messages=MESSAGES))
        await (await caller.claim()).answer("I look." + CALL)
        message = await task
    said, call = message.content
    assert said.type == "text" and said.text == "I look."
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    told: Any = [HI, message.to_param(), {"role": "user", "content": [result]}]
    second = asyncio.create_task(claude.messages.create(**asked, messages=told))
    script = await caller.claim()
    prompt = bytes(token_id for token_id in script.job.prompt_token_ids if token_id < 256).decode()
    assert "assistant\nI look." in prompt and "tool\nsunny" in prompt
    await script.answer("Sunny.")
    assert (await second).stop_reason == "end_turn"


async def test_the_official_client_knows_our_errors(claude: anthropic.AsyncAnthropic, worker: ScriptedWorker) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await claude.messages.create(model="none", max_tokens=5, messages=MESSAGES)
    assert unknown.value.type == "not_found_error" and unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match=r"`max_tokens` exceed context limit: \d+ \+ 10000 > \d+"):
        await claude.messages.create(model=worker.model, max_tokens=10**4, messages=MESSAGES)
    long: Any = [{"role": "user", "content": "long " * 10**4}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        await claude.messages.create(model=worker.model, max_tokens=1, messages=long)
    async with claude.messages.stream(model=worker.model, max_tokens=5, messages=MESSAGES) as stream:
        script = await worker.claim()
        await script.say(say("x"))
        await script.end("job_failed")
        with pytest.raises(anthropic.APIStatusError) as failed:
            await stream.until_done()
    assert failed.value.type == "api_error"


async def test_the_official_client_sends_either_key(pair: System, pair_worker: ScriptedWorker) -> None:
    """As its own header, or as a bearer's."""
    keys: list[dict[str, Any]] = [{"api_key": KEYS[0]}, {"auth_token": KEYS[1]}]
    for key in keys:
        async with anthropic.AsyncAnthropic(base_url=pair.url, max_retries=0, timeout=WAIT_S, **key) as client:
            assert (await client.messages.count_tokens(model=pair_worker.model, messages=MESSAGES)).input_tokens
    async with anthropic.AsyncAnthropic(base_url=pair.url, max_retries=0, timeout=WAIT_S, api_key="sk-no") as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.count_tokens(model=pair_worker.model, messages=MESSAGES)
