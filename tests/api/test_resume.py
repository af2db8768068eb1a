"""Coming back to a stream: cut after any event, on any pod, the rest is the same to the byte, or it is said why not."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from api.resume import whole
from shared.errors import CompletionNotFound
from shared.job import Delta, Finish, Header, TokenLogprob, Usage
from shared.keys import Shard, new_completion_id
from shared.queue import Found, Queue
from shared.settings import Settings
from tests.api.conftest import KEYS
from tests.api.scripted import WAIT_S, Script, ScriptedWorker, ask, error_of, say, until_known
from tests.api.test_http import CHAT, DONE, HEARTBEAT, Body, streaming
from tests.system import System

TOOL_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OPTIONS: dict[str, Any] = {"n": 2, "logprobs": True, "top_logprobs": 1, "stream_options": {"include_usage": True}}


@pytest.fixture
def worker(pair_worker: ScriptedWorker) -> ScriptedWorker:
    return pair_worker


def drawn(char: str, index: int) -> Delta:
    """A character with its log probability."""
    (token_id,) = char.encode()
    return replace(say(char, index), logprobs=(TokenLogprob(token_id, -0.5, ((token_id, -0.5),)),))


async def say_all(script: Script) -> None:
    """Two choices, interleaved, that call a tool; they end one after the other."""
    for char in TOOL_CALL:
        await script.say(drawn(char, 0), drawn(char.upper(), 1))
    await script.say(say("", 0, end=True))
    await script.say(drawn("!", 1))
    await script.say(say("", 1, end=True))
    await script.end()


async def finished(pod: httpx.AsyncClient, worker: ScriptedWorker) -> tuple[str, str]:
    """The id of an answer, and its stream as it was sent."""
    async with streaming(pod, worker, is_numbered=True, **OPTIONS) as body:
        script = await worker.claim()
        await say_all(script)
        return script.job.id, await body.end()


def parts(raw: str) -> list[str]:
    """Events and [DONE]."""
    return re.findall(r".*?\n\n", raw, re.DOTALL)


async def rest(pod: httpx.AsyncClient, completion_id: str, **params: Any) -> str:
    response = await pod.get(f"{CHAT}/{completion_id}", params={"stream": "true"} | params)
    assert response.status_code == 200, response.text
    assert response.headers["x-baton-completion-id"] == completion_id
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return response.text.replace(HEARTBEAT, "")


# ── the rest of a stream ──


async def test_cut_after_any_event_the_rest_is_the_same_to_the_byte(pods: list[httpx.AsyncClient],
                                                                    worker: ScriptedWorker) -> None:
    """Tool text, two choices, log probabilities, usage; on the pod that began it and on the other one."""
    completion_id, raw = await finished(pods[0], worker)
    events = parts(raw)
    assert len(events) == 2 * len(TOOL_CALL) + 7
    assert events[-1] == DONE
    for pod in pods:
        for position in range(len(events)):
            assert await rest(pod, completion_id, starting_after=position) == "".join(events[position:])
    assert await rest(pods[1], completion_id, starting_after=len(events) - 1) == DONE


async def test_the_header_of_event_sources_names_a_position_too(pods: list[httpx.AsyncClient],
                                                                worker: ScriptedWorker) -> None:
    """Last-Event-ID, unless the parameter is there; without both the stream begins at its beginning."""
    completion_id, raw = await finished(pods[0], worker)
    pods[1].headers["last-event-id"] = "5"
    assert await rest(pods[1], completion_id) == "".join(parts(raw)[5:])
    assert await rest(pods[1], completion_id, starting_after=0) == raw
    assert await rest(pods[0], completion_id) == raw


async def test_a_running_stream_is_followed_from_any_event_by_several_readers(
        pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """On both pods, several on one: each gets its rest, as it is said, while the first reads on."""
    async with streaming(pods[0], worker, is_numbered=True, **OPTIONS) as body:
        script = await worker.claim()
        await script.say(drawn("a", 0), drawn("b", 1))
        await body.has("id: 4\n")
        readers = [asyncio.create_task(rest(pod, script.job.id, starting_after=position))
                   for pod in pods for position in range(5)]
        await say_all(script)
        events = parts(await body.end())
        for number, reader in enumerate(readers):
            assert await reader == "".join(events[number % 5:])


async def test_a_reader_hears_at_once_what_is_said_on_another_pod(pods: list[httpx.AsyncClient],
                                                                  worker: ScriptedWorker) -> None:
    """It is pushed to as the first one is: it does not wait for a sweep, which comes ever more rarely in silence."""
    async with streaming(pods[0], worker, is_numbered=True) as body:
        script = await worker.claim()
        async with pods[1].stream("GET", f"{CHAT}/{script.job.id}", params={"stream": "true"}) as response:
            assert len((await worker.queue.describe(script.job.id))["pods"].split()) == 2, "at once, not with a clock"
            other = Body(response)
            await other.has(HEARTBEAT, 8)               # 1.6 s: from here a sweep is more than a second away
            await script.say(say("H"))
            async with asyncio.timeout(0.5):
                await other.has('"H"')
            await script.say(say("i", end=True))
            await script.end()
            assert await other.end() == await body.end()


@pytest.mark.parametrize(("code", "status"), [("cancelled", 499), ("deadline_exceeded", 504), ("job_failed", 500)])
async def test_an_answer_that_ended_badly_ends_badly_again(pods: list[httpx.AsyncClient], worker: ScriptedWorker,
                                                           code: str, status: int) -> None:
    """The rest and its error event, which has a position; behind it nothing is left but the error."""
    async with streaming(pods[0], worker, is_numbered=True) as body:
        script = await worker.claim()
        await script.say(say("H"))
        await script.end(code)
        events = parts(await body.end())
    assert len(events) == 3
    assert events[2].startswith("id: 3\n")
    for position in range(3):
        assert await rest(pods[1], script.job.id, starting_after=position) == "".join(events[position:])
    path = f"{CHAT}/{script.job.id}"
    assert error_of(await pods[1].get(path, params={"stream": "true", "starting_after": 3}), status)["code"] == code
    assert error_of(await pods[1].get(path), status)["code"] == code


# ── the whole ──


async def test_a_finished_answer_is_read_whole(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """As it would have been answered, whether it was streamed or not; while it runs, it is said when to come back."""
    whole = asyncio.create_task(pods[0].post(CHAT, json=ask(worker.model, **OPTIONS | {"stream_options": None})))
    script = await worker.claim()
    response = await pods[1].get(f"{CHAT}/{script.job.id}")
    assert error_of(response, 409)["code"] == "completion_in_progress"
    assert response.headers["retry-after"] == "1"
    await say_all(script)
    assert (await pods[1].get(f"{CHAT}/{script.job.id}")).content == (await whole).content
    completion_id, _ = await finished(pods[0], worker)
    streamed = (await pods[1].get(f"{CHAT}/{completion_id}")).json()
    assert streamed["object"] == "chat.completion"
    assert streamed["choices"] == (await whole).json()["choices"]
    assert streamed["usage"] == (await whole).json()["usage"]


async def test_an_answer_is_kept_so_long_and_no_longer(pair: System, worker: ScriptedWorker) -> None:
    url = pair.start_pod(retain_s=1)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S, headers={"authorization": f"Bearer {KEYS[0]}"}) as pod:
        await until_known(pod, worker)
        completion_id, raw = await finished(pod, worker)
        assert await rest(pod, completion_id) == raw
        async with asyncio.timeout(WAIT_S):
            while (response := await pod.get(f"{CHAT}/{completion_id}")).status_code == 200:
                await asyncio.sleep(0.05)
        assert error_of(response, 404)["code"] == "completion_not_found"
    pair.pods.pop(url).end()


async def test_an_answer_that_expires_while_it_is_read_is_not_found(each_redis: Redis) -> None:
    """It was found, and its log is gone a moment later."""
    queue = Queue(each_redis, Shard.of("m"), Settings())
    header = Header(model="m", created_s=1, fingerprint="fp", seed=1, n=1, num_prompt_tokens=1)
    found = Found(new_completion_id(queue.shard), "t", header, Finish(Usage(1, 1)), None)
    nobody_is_asked: Any = None
    with pytest.raises(CompletionNotFound):
        await whole(nobody_is_asked, queue, found)


async def test_log_probabilities_need_their_tokenizer(pair: System, pods: list[httpx.AsyncClient],
                                                      worker: ScriptedWorker) -> None:
    """A pod that nobody has told of it says so; an answer without them is read all the same."""
    with_logprobs, _ = await finished(pods[0], worker)
    async with streaming(pods[0], worker, is_numbered=True) as body:
        script = await worker.claim()
        await script.answer("Hi")
        raw = await body.end()
    await worker.leave()
    url = pair.start_pod()
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S, headers=pods[0].headers) as pod:
        response = await pod.get(f"{CHAT}/{with_logprobs}", params={"stream": "true"})
        assert error_of(response, 503)["code"] == "no_worker"
        assert error_of(await pod.get(f"{CHAT}/{with_logprobs}"), 503)["code"] == "no_worker"
        assert await rest(pod, script.job.id) == raw
    pair.pods.pop(url).end()


# ── cancel ──


async def test_an_answer_is_cancelled_by_its_id(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """In line and running, from another pod than the one that relays it; again it is the same; ended, it says how."""
    for claimed in (False, True):
        async with streaming(pods[0], worker, is_numbered=True) as body:
            await body.has(HEARTBEAT)
            completion_id = body.response.headers["x-baton-completion-id"]
            if claimed:
                await (await worker.claim()).say(say("H"))
            for pod in pods:
                answer = (await pod.post(f"{CHAT}/{completion_id}/cancel")).json()
                assert answer == {"id": completion_id, "object": "chat.completion", "status": "cancelled"}
            assert (await body.events())[-1]["error"]["code"] == "cancelled"
    completion_id, _ = await finished(pods[0], worker)
    assert (await pods[1].post(f"{CHAT}/{completion_id}/cancel")).json()["status"] == "completed"
    async with streaming(pods[0], worker, is_numbered=True):
        script = await worker.claim()
        await script.end("job_failed")
        assert (await pods[1].post(f"{CHAT}/{script.job.id}/cancel")).json()["status"] == "failed"
    assert await worker.queue.num_live() == 0


# ── what cannot be ──


async def test_nobody_else_learns_of_an_answer(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """With another key, an invented id and what is no id, on every route, the answer is one and the same."""
    completion_id, _ = await finished(pods[0], worker)
    invented = completion_id[:-4] + "0000"
    elsewhere = f"chatcmpl-0123456789-7-{'0' * 32}"
    second = {"authorization": f"Bearer {KEYS[1]}"}
    refusals = set()
    for pod in pods:
        for name, headers in [(completion_id, second), *((name, {}) for name in (
                invented, elsewhere, "chatcmpl-1", "x", "chatcmpl-{a}-0-1", "%00", "%F0%9F%98%80", "é" * 300))]:
            path = f"{CHAT}/{name}"
            for response in (await pod.get(path, headers=headers),
                             await pod.get(path, headers=headers, params={"stream": "true", "starting_after": 1}),
                             await pod.post(f"{path}/cancel", headers=headers)):
                error_of(response, 404)
                refusals.add(response.text)
        for response in (await pod.get(f"{CHAT}/{completion_id}", headers={"authorization": "Bearer sk-none"}),
                         await pod.post(f"{CHAT}/{completion_id}/cancel", headers={"authorization": "Bearer x"})):
            error_of(response, 401)
    assert [json.loads(text)["error"]["code"] for text in refusals] == ["completion_not_found"]


NO_POSITIONS: list[dict[str, Any]] = [{"starting_after": text} for text in (
    "-1", "x", "", "1.5", "1e3", "٣", "9" * 400, " 1", "0x1")]


async def test_what_is_no_position_is_refused(pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    completion_id, raw = await finished(pods[0], worker)
    path, num_events = f"{CHAT}/{completion_id}", len(parts(raw)) - 1
    for params in NO_POSITIONS:
        error = error_of(await pods[1].get(path, params={"stream": "true"} | params), 400)
        assert (error["code"], error["param"]) == ("invalid_value", "starting_after")
    for text in ("-1", "x", "9" * 400):
        error = error_of(await pods[1].get(path, params={"stream": "true"}, headers={"last-event-id": text}), 400)
        assert error["param"] == "Last-Event-ID"
    error = error_of(await pods[1].get(path, params={"stream": "true", "starting_after": num_events + 1}), 400)
    assert (error["code"], error["param"]) == ("invalid_value", "starting_after")
    assert error_of(await pods[1].get(path, params={"stream": "maybe"}), 400)["param"] == "stream"
    assert error_of(await pods[1].get(path, params={"starting_after": 1}), 400)["param"] == "starting_after"


async def test_a_position_that_a_running_answer_has_not_reached_is_a_conflict(
        pods: list[httpx.AsyncClient], worker: ScriptedWorker) -> None:
    """Others may be about to put it back. It is said when to come back, and who is refused was no reader."""
    async with streaming(pods[0], worker, is_numbered=True) as body:
        script = await worker.claim()
        await script.say(say("H"))
        await body.has('"H"')
        path = f"{CHAT}/{script.job.id}"
        response = await pods[1].get(path, params={"stream": "true", "starting_after": 3})
        assert error_of(response, 409)["code"] == "position_not_reached"
        assert response.headers["retry-after"] == "1"
        assert len((await worker.queue.describe(script.job.id))["pods"].split()) == 1
        reader = asyncio.create_task(rest(pods[1], script.job.id, starting_after=2))
        await script.say(say("i", end=True))
        await script.end()
        assert await reader == "".join(parts(await body.end())[2:])


async def test_the_docs_list_what_can_be_returned_to(pods: list[httpx.AsyncClient]) -> None:
    paths = (await pods[0].get("/openapi.json")).json()["paths"]
    get = paths[f"{CHAT}/{{completion_id}}"]["get"]
    assert {p["name"] for p in get["parameters"]} == {"completion_id", "stream", "starting_after", "last-event-id"}
    assert set(get["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "post" in paths[f"{CHAT}/{{completion_id}}/cancel"]
    assert {p["name"] for p in paths[CHAT]["post"]["parameters"]} == {"idempotency-key", "last-event-id"}
