"""What a model thinks, over HTTP: told from the answer, counted, kept out of a form that the answer must keep."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from api.jobs import Order, make_job
from api.wire.completions import parse_completion
from api.wire.parts import Parts
from api.wire.request import parse
from shared import connection
from shared.errors import InvalidValue
from shared.grammar import Grammars
from shared.job import Delta, Header, Job
from shared.settings import Settings
from shared.tokenizer import Tokenizer
from tests.api.scripted import CHATML, Script, ScriptedWorker, ask, byte_card, byte_tokenizer, error_of, until_known

CHAT = "/v1/chat/completions"
TEMPLATE = (CHATML.removesuffix("{% endif %}") + "{% if enable_thinking is not defined or enable_thinking %}<think>\n"
            "{% endif %}{% endif %}{# </think> #}{{ reasoning_effort }}{{ tone }}")
THINK, END_OF_THOUGHT = 258, 259


@pytest.fixture
async def thinker(redis_url: str, http: httpx.AsyncClient) -> AsyncIterator[ScriptedWorker]:
    """Its template opens a thought unless it is told not to."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    redis = connection.connect(redis_url)
    worker = ScriptedWorker(redis, replace(byte_card("scripted/thinker"), tokenizer_json=tokenizer.to_str(),
                                           chat_templates={"default": TEMPLATE}, vocab_size=260))
    await worker.announce()
    await until_known(http, worker)
    yield worker
    await worker.leave()
    await redis.aclose()


async def think(script: Script) -> None:
    """Ten tokens and the one that ends a thought, then an answer of three."""
    for char in "I wonder:\n":
        await script.say(Delta(0, (ord(char),), char))
    await script.say(Delta(0, (END_OF_THOUGHT, 10), "</think>\n"))
    await script.say(Delta(0, (ord("Y"), ord("e")), "Ye"))
    await script.say(Delta(0, (ord("s"),), "s", "stop"))
    await script.end()


async def test_a_thought_is_told_from_the_answer(http: httpx.AsyncClient, thinker: ScriptedWorker) -> None:
    """Streamed and whole, in both fields that clients know, with its tokens."""
    answers: list[Any] = []
    for stream in (False, True):
        fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        asked = asyncio.create_task(http.post(CHAT, json=ask(thinker.model, **fields)))
        script = await thinker.claim()
        assert script.job.prompt_token_ids[-2:] == (THINK, 10)
        await think(script)
        answers.append((await asked).text)
    whole = json.loads(answers[0])
    message = whole["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes", "refusal": None, "reasoning_content": "I wonder:",
                       "reasoning": "I wonder:"}
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 11}
    events = [json.loads(line.removeprefix("data: ")) for line in answers[1].splitlines()
              if line.startswith("data: {")]
    assert events[-1]["usage"] == whole["usage"]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    for field, text in (("content", "Yes"), ("reasoning_content", "I wonder:"), ("reasoning", "I wonder:")):
        assert "".join(delta.get(field) or "" for delta in deltas) == text


async def test_whoever_is_told_not_to_think_answers_at_once(http: httpx.AsyncClient, thinker: ScriptedWorker) -> None:
    for fields in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        asked = asyncio.create_task(http.post(CHAT, json=ask(thinker.model, **fields)))
        script = await thinker.claim()
        assert THINK not in script.job.prompt_token_ids
        await script.answer("Yes")
        message = (await asked).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Yes", "refusal": None}


async def test_a_form_is_kept_behind_the_thought(http: httpx.AsyncClient, thinker: ScriptedWorker) -> None:
    asked = asyncio.create_task(http.post(CHAT, json=ask(thinker.model, choice=["Yes"])))
    script = await thinker.claim()
    assert script.job.sampling.grammar and script.job.sampling.grammar_after == END_OF_THOUGHT
    await think(script)
    assert (await asked).json()["choices"][0]["message"]["content"] == "Yes"


async def test_variables_reach_the_template_and_are_words(http: httpx.AsyncClient, thinker: ScriptedWorker) -> None:
    variables = {"tone": "x1", "messages": 5, "self": 1, "eos_token": "no"}
    asked = asyncio.create_task(http.post(CHAT, json=ask(thinker.model, reasoning_effort="high",
                                                         chat_template_kwargs=variables)))
    script = await thinker.claim()
    assert bytes(i for i in script.job.prompt_token_ids if i < 256).endswith(b"assistant\n\nhighx1")
    await script.answer("")
    await asked
    for value in ("<|im_end|>", [1], "a b"):
        refused = await http.post(CHAT, json=ask(thinker.model, chat_template_kwargs={"tone": value}))
        assert error_of(refused, 400)["param"] == "chat_template_kwargs"


async def test_a_marker_that_is_no_token_opens_a_thought_too() -> None:
    """A form comes behind its end then; what a user writes opens nothing."""
    card = replace(byte_card("spelled", TEMPLATE), vocab_size=258)
    served: Any = SimpleNamespace(card=card, tokenizer=Tokenizer(card))

    async def made(text: str, **fields: Any) -> tuple[Job, Header]:
        body = ask("spelled", text, **fields)
        return await make_job(Order(parse(json.dumps(body).encode(), 9), "t", 99), served, "c", pod_id="p",
                              settings=Settings(), retain_s=9)

    _, header = await made("Hi")
    assert header.reasoning == "open"
    said = Parts("c", header, 0).whole([Delta(0, (), "I wonder.\n</think>\n\nYes", "stop")])
    assert (said.reasoning, said.text) == ("I wonder.", "Yes")
    _, header = await made("<think>", chat_template_kwargs={"enable_thinking": False})
    assert header.reasoning == "maybe"
    job, _ = await made("Hi", choice=["Yes", "No"])
    assert job.sampling.grammar_after is None
    for text, fits in (("I wonder.</think>No", True), ("No", False), ("</think>Maybe", False)):
        matcher = Grammars(card.tokenizer_json, 258, [257]).matcher(job.sampling.grammar)
        ids = list(text.encode())
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == fits


async def test_a_prompt_holds_no_token_without_logits() -> None:
    """Tokenizers may have tokens for which their model has none; forms can be kept nevertheless."""
    card = replace(byte_card("short"), tokenizer_json=byte_tokenizer("<|im_start|>", "<|im_end|>", "[PAD]").to_str())
    served: Any = SimpleNamespace(card=card, tokenizer=Tokenizer(card))

    async def made(request: Any) -> tuple[Job, Header]:
        return await make_job(Order(request, "t", 99), served, "c", pod_id="p", settings=Settings(), retain_s=9)

    with pytest.raises(InvalidValue):
        await made(parse_completion(json.dumps({"model": "short", "prompt": "Hi [PAD]"}).encode()))
    job, _ = await made(parse(json.dumps(ask("short", "Hi [PAD]", choice=["Yes"])).encode(), 9))
    assert max(job.prompt_token_ids) < card.vocab_size
    served.card = replace(card, chat_templates={"default": CHATML + "[PAD]"})
    served.tokenizer = Tokenizer(served.card)
    with pytest.raises(InvalidValue):
        await made(parse(json.dumps(ask("short", "Hi")).encode(), 9))
