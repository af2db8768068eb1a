"""`/v1/completions`: what its body may say, its answers over HTTP, and several prompts as one answer."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest

from api.wire.completions import CompletionRequest, parse_completion
from shared.errors import BadRequest
from shared.job import Delta
from tests.api.conftest import KEYS, MAX_QUEUED, client
from tests.api.scripted import MAX_MODEL_LEN, WAIT_S, Script, ScriptedWorker, error_of, say, until_known
from tests.system import System

ADDRESS = "/v1/completions"


def read(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m"} | fields).encode())


@pytest.mark.parametrize(("prompt", "prompts"), [
    ("Hi", ["Hi"]), (["Hi"], ["Hi"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
    ("", [""])])
def test_a_prompt_is_one_of_four(prompt: Any, prompts: list[Any]) -> None:
    request = read(prompt=prompt)
    assert request.prompts == prompts
    assert [one.prompts for one in request.each()] == [[one] for one in prompts]


@pytest.mark.parametrize(("fields", "code", "param"), [
    ({}, "missing_required_parameter", "prompt"),
    ({"prompt": None}, "invalid_value", "prompt"),
    ({"prompt": 5}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt"),
    ({"prompt": [-1]}, "invalid_value", "prompt"),
    ({"prompt": [1, "a"]}, "invalid_value", "prompt"),
    ({"prompt": [True]}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 2, "n": 65}, "invalid_value", "prompt"),
    ({"prompt": "a", "best_of": 2}, "unsupported_parameter", "best_of"),
    ({"prompt": "a", "echo": True}, "unsupported_parameter", "echo"),
    ({"prompt": "a", "logprobs": 0}, "unsupported_parameter", "logprobs"),
    ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
    ({"prompt": "a", "stream_options": {}}, "invalid_value", "stream_options"),
    ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
])
def test_what_is_refused(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**fields)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_what_asks_for_nothing_is_accepted() -> None:
    read(prompt="a", n=2, best_of=2, echo=False, suffix="", logprobs=None)


async def begin(http: httpx.AsyncClient, worker: ScriptedWorker, num_prompts: int = 1, **fields: Any
                ) -> tuple[asyncio.Task[httpx.Response], list[Script]]:
    """A request, and what is claimed of it, in the order of its prompts."""
    asked = asyncio.create_task(http.post(ADDRESS, json={"model": worker.model} | fields))
    scripts = [await worker.claim() for _ in range(num_prompts)]
    return asked, sorted(scripts, key=lambda script: script.job.prompt_token_ids)


def events(body: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", body, re.MULTILINE)]


async def test_a_text_goes_on(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asked, [script] = await begin(http, worker, prompt="Once", n=2)
    assert bytes(script.job.prompt_token_ids) == b"Once"
    assert script.job.sampling.max_tokens == 16
    assert script.job.id.startswith("cmpl-")
    await script.answer(" upon")
    answer = (await asked).json()
    assert answer["object"] == "text_completion" and answer["id"] == script.job.id
    choice = {"text": " upon", "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [{"index": 0} | choice, {"index": 1} | choice]
    assert answer["usage"]["completion_tokens"] == 10


async def test_special_tokens_are_meant_in_a_prompt(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asked, [script] = await begin(http, worker, prompt="<|im_start|>a", max_tokens=5)
    assert script.job.prompt_token_ids == (256, 97)
    await script.answer("b")
    await asked


async def test_token_ids_are_taken_as_they_are(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asked, [script] = await begin(http, worker, prompt=[256, 72, 105])
    assert script.job.prompt_token_ids == (256, 72, 105)
    await script.answer("!")
    await asked
    error = error_of(await http.post(ADDRESS, json={"model": worker.model, "prompt": [258]}), 400)
    assert error["param"] == "prompt"
    for prompt in ("", "a" * (MAX_MODEL_LEN + 1)):
        refused = await http.post(ADDRESS, json={"model": worker.model, "prompt": prompt})
        assert error_of(refused, 400)["param"] == "prompt"


async def test_a_stream_has_the_text_of_the_whole(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asked, [script] = await begin(http, worker, prompt="a", stream=True, stream_options={"include_usage": True})
    await script.answer("Hi")
    body = (await asked).text
    told = events(body)
    assert body.endswith("data: [DONE]\n\n")
    assert [choice["text"] for event in told for choice in event["choices"]] == ["H", "i", ""]
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] == 2
    assert told[-2]["choices"][0]["finish_reason"] == "stop" and told[-2]["usage"] is None
    assert "id: " not in body


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_one_answer(http: httpx.AsyncClient, worker: ScriptedWorker, stream: bool) -> None:
    """Whichever comes first: the choices of the second follow those of the first, and the usage is of all."""
    options = {"stream_options": {"include_usage": True}} if stream else {}
    asked, scripts = await begin(http, worker, 2, prompt=["a", "bc"], n=2, stream=stream, **options)
    await scripts[1].answer("second")
    await scripts[0].answer("first")
    response = await asked
    told = events(response.text) if stream else [response.json()]
    texts = dict.fromkeys(range(4), "")
    for choice in (choice for event in told for choice in event["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "first", 1: "first", 2: "second", 3: "second"}
    assert len({event["id"] for event in told}) == 1
    assert told[-1]["usage"] | {"prompt_tokens_details": 0, "completion_tokens_details": 0} == {
        "prompt_tokens": 3, "completion_tokens": 22, "total_tokens": 25, "prompt_tokens_details": 0,
        "completion_tokens_details": 0}
    if stream:
        assert "id: " not in response.text and response.text.endswith("data: [DONE]\n\n")


async def test_one_of_several_fails_and_all_have(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asked, scripts = await begin(http, worker, 2, prompt=["a", "b"])
    await scripts[0].answer("fine")
    await scripts[1].end("job_failed")
    assert error_of(await asked, 500)["code"] == "job_failed"
    asked, scripts = await begin(http, worker, 2, prompt=["a", "b"], stream=True)
    await scripts[0].say(say("x"))
    await scripts[1].end("job_failed")
    body = (await asked).text
    assert "[DONE]" not in body and events(body)[-1]["error"]["code"] == "job_failed"
    assert await scripts[0].outcome() == "cancelled", "nobody reads it any more"


async def test_of_several_all_are_accepted_or_none(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    prompts = ["a"] * (MAX_QUEUED + 1)
    error = error_of(await http.post(ADDRESS, json={"model": worker.model, "prompt": prompts}), 429)
    assert error["code"] == "rate_limit_exceeded"
    assert await worker.queue.num_live() == 0


async def test_more_choices_than_a_key_ever_has_are_refused(pair: System, pair_worker: ScriptedWorker) -> None:
    """Nothing is to be retried."""
    url = pair.start_pod(max_tenant_choices=3)
    async with client(url, KEYS[1]) as pod:
        await until_known(pod, pair_worker)
        for fields, param in (({"prompt": ["a", "b"], "n": 2}, "prompt"), ({"prompt": ["a"] * 4}, "prompt"),
                              ({"prompt": "a", "n": 4}, "n")):
            refused = await pod.post(ADDRESS, json={"model": pair_worker.model} | fields)
            assert error_of(refused, 400)["param"] == param
            assert "retry-after" not in refused.headers
    pair.pods.pop(url).end()


async def test_a_key_stands_for_one_prompt(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body = {"model": worker.model, "prompt": "a"}
    first = asyncio.create_task(http.post(ADDRESS, json=body, headers={"idempotency-key": "k"}))
    await (await worker.claim()).answer("b")
    again = await http.post(ADDRESS, json=body, headers={"idempotency-key": "k"})
    assert again.json() == (await first).json()
    several = await http.post(ADDRESS, json=body | {"prompt": ["a", "b"]}, headers={"idempotency-key": "l"})
    assert error_of(several, 400)["param"] == "Idempotency-Key"
    assert (await http.get(f"/v1/chat/completions/{again.json()['id']}")).status_code == 404, "it is no chat"


async def test_the_official_client(pod: System, worker: ScriptedWorker) -> None:
    async with openai.AsyncClient(base_url=f"{pod.url}/v1", api_key="EMPTY", max_retries=0, timeout=WAIT_S) as client:
        asked = asyncio.create_task(client.completions.create(model=worker.model, prompt="Hi"))
        script = await worker.claim()
        await script.say(Delta(0, (65,), "A", "length"))
        await script.end()
        answer = await asked
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("A", "length")
