"""Dialects whose markers are special tokens, over HTTP: the job says which are shown, and none of them is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from api.wire.dialects import deepseek, harmony
from shared import connection
from shared.grammar import Grammars
from shared.job import Delta
from tests.api.scripted import Script, ScriptedWorker, ask, byte_card, byte_tokenizer, error_of, until_known
from worker.output.text import TextStream

EOS = 257
CHAT = "/v1/chat/completions"
BODY = "{% for message in messages %}{{ message.content }}{% endfor %}"
GPT_OSS = BODY + "{{ reasoning_effort }}<|start|>assistant{# <|channel|>final<|message|> #}"
DEEPSEEK = BODY + "<｜Assistant｜><think>\n{# </think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜> #}"
THINK, END_OF_THOUGHT = "<think>", "</think>"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@asynccontextmanager
async def served(redis_url: str, http: httpx.AsyncClient, model: str, template: str, special: Sequence[str]
                 ) -> AsyncIterator[ScriptedWorker]:
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", *special)
    redis = connection.connect(redis_url)
    card = replace(byte_card(model), tokenizer_json=tokenizer.to_str(), chat_templates={"default": template},
                   vocab_size=tokenizer.get_vocab_size())
    worker = ScriptedWorker(redis, card)
    await worker.announce()
    await until_known(http, worker)
    yield worker
    await worker.leave()
    await redis.aclose()


@pytest.fixture
async def gpt_oss(redis_url: str, http: httpx.AsyncClient) -> AsyncIterator[ScriptedWorker]:
    async with served(redis_url, http, "scripted/gpt-oss", GPT_OSS, harmony.MARKERS) as worker:
        yield worker


@pytest.fixture
async def deep(redis_url: str, http: httpx.AsyncClient) -> AsyncIterator[ScriptedWorker]:
    special = (*deepseek.MARKERS, THINK, END_OF_THOUGHT)
    async with served(redis_url, http, "scripted/deepseek", DEEPSEEK, special) as worker:
        yield worker


async def say(script: Script, worker: ScriptedWorker, text: str) -> None:
    """As a worker does: token by token, special ones hidden but for those that the job names. Ends on a hidden one."""
    tokenizer = Tokenizer.from_str(worker.card.tokenizer_json)
    stream = TextStream(tokenizer, shown=script.job.sampling.shown_token_ids)
    for token_id in tokenizer.encode(text).ids:
        await script.say(Delta(0, (token_id,), stream.feed([token_id])))
    await script.say(Delta(0, (EOS,), stream.feed([EOS]) + stream.finish(), "stop"))
    await script.end()


async def answers(http: httpx.AsyncClient, worker: ScriptedWorker, text: str, **fields: Any
                  ) -> tuple[dict[str, Any], Any, Script]:
    """The choice of the whole answer and its usage; the same streamed."""
    found = []
    for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        asked = asyncio.create_task(http.post(CHAT, json=ask(worker.model) | more | fields))
        script = await worker.claim()
        await say(script, worker, text)
        found.append((await asked).text)
    whole = json.loads(found[0])
    events = [json.loads(line.removeprefix("data: ")) for line in found[1].splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"] == whole["usage"]
    (choice,) = whole["choices"]
    deltas = [each["delta"] for event in events for each in event["choices"]]
    for name in ("content", "reasoning"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (choice["message"].get(name) or "")
    called = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(call["arguments"] for call in called) == "".join(
        call["function"]["arguments"] for call in choice["message"].get("tool_calls", ()))
    return choice, whole["usage"], script


THOUGHT = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'


async def test_harmony_is_read_with_tools_and_without(http: httpx.AsyncClient, gpt_oss: ScriptedWorker) -> None:
    choice, usage, script = await answers(http, gpt_oss, f"{THOUGHT}<|channel|>final<|message|>Yes<|return|>")
    assert len(script.job.sampling.shown_token_ids) == len(harmony.MARKERS)
    assert choice["message"] == {"role": "assistant", "content": "Yes", "refusal": None, "reasoning_content": "Hm",
                                 "reasoning": "Hm"}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}            # the body, and its two markers
    choice, _, script = await answers(http, gpt_oss, THOUGHT + CALL, tools=TOOLS, reasoning_effort="high")
    assert bytes(i for i in script.job.prompt_token_ids if i < 256).endswith(b"highassistant")
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None and choice["message"]["reasoning"] == "Hm"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    choice, _, _ = await answers(http, gpt_oss, THOUGHT + CALL, tools=TOOLS, tool_choice="none")
    assert "tool_calls" not in choice["message"] and choice["message"]["content"] == '{"a": 1}'


async def test_harmony_can_be_made_to_call(http: httpx.AsyncClient, gpt_oss: ScriptedWorker) -> None:
    choice, _, script = await answers(http, gpt_oss, THOUGHT + CALL, tools=TOOLS, tool_choice="required")
    assert "commentary to=functions." in script.job.sampling.grammar and choice["finish_reason"] == "tool_calls"
    tools = [{"type": "function", "function": {"name": "a b"}}]
    refused = await http.post(CHAT, json=ask(gpt_oss.model, tools=tools, tool_choice="required"))
    assert error_of(refused, 400)["param"] == "tools[0].function"


async def test_an_answer_of_harmony_that_keeps_a_form_may_think_first(http: httpx.AsyncClient,
                                                                       gpt_oss: ScriptedWorker) -> None:
    """Every kind of form, in its channel: the frame is part of what the worker enforces, and not of the answer."""
    tokenizer = Tokenizer.from_str(gpt_oss.card.tokenizer_json)
    grammars = Grammars(gpt_oss.card.tokenizer_json, gpt_oss.card.vocab_size, gpt_oss.card.eos_token_ids)
    for fields in ({"choice": ["Yes"]}, {"regex": "Y.s"}, {"grammar": 'start: "Yes"'},
                   {"guided_json": {"const": "Yes"}}):
        said = json.dumps("Yes") if "guided_json" in fields else "Yes"
        for thought in (THOUGHT, ""):
            text = f"{thought}<|channel|>final<|message|>{said}"
            choice, _, script = await answers(http, gpt_oss, text, **fields)
            assert choice["message"]["content"] == said
            matcher = grammars.matcher(script.job.sampling.grammar)
            assert all(matcher.consume_token(token_id) for token_id in tokenizer.encode(text).ids)
            assert matcher.is_accepting()
            assert not grammars.matcher(script.job.sampling.grammar).consume_token(ord("Y"))


async def test_deepseeks_calls_come_behind_its_thoughts(http: httpx.AsyncClient, deep: ScriptedWorker) -> None:
    call = f"{deepseek.CALLS}{deepseek.CALL}f{deepseek.SEP}{{}}{deepseek.END_CALL}{deepseek.END_CALLS}"
    choice, usage, script = await answers(http, deep, f"Hm{END_OF_THOUGHT}I look.\n{call}", tools=TOOLS)
    assert len(script.job.sampling.shown_token_ids) == len(deepseek.MARKERS) + 2
    assert choice["message"]["reasoning"] == "Hm" and choice["message"]["content"] == "I look."
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "f", "arguments": "{}"}]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}
    choice, _, script = await answers(http, deep, f"Hm{END_OF_THOUGHT}Yes")
    assert len(script.job.sampling.shown_token_ids) == 2 and choice["message"]["content"] == "Yes"


async def test_the_header_names_what_qwen_coder_has_to_know(redis_url: str, http: httpx.AsyncClient) -> None:
    """A number by the tool's schema, and a string that looks like one."""
    properties = {"a": {"type": "integer"}, "s": {"type": "string"}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    said = "".join(f"<parameter={name}>\n5\n</parameter>\n" for name in properties)
    template = BODY + "{# <tool_call></tool_call><function=f><parameter=a> #}"
    async with served(redis_url, http, "scripted/coder", template, ["<tool_call>", "</tool_call>"]) as coder:
        text = f"<tool_call>\n<function=f>\n{said}</function>\n</tool_call>"
        choice, _, _ = await answers(http, coder, text, tools=tools)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 5, "s": "5"}'}
