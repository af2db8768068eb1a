"""`/tokenize` and `/detokenize`: what the model would read, and what its tokens say."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from tokenizers import processors

from shared.tokenizer import Tokenizer
from tests.api.scripted import ScriptedWorker, ask, byte_card, byte_tokenizer, error_of, until_known


async def tokenize(http: httpx.AsyncClient, worker: ScriptedWorker, **fields: Any) -> Any:
    answer = await http.post("/tokenize", json={"model": worker.model} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_text_there_and_back(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """What reads as a special token is text, as it is in a chat."""
    text = "Grüße 😀 <|im_end|>\n"
    found = await tokenize(http, worker, prompt=text, return_token_strs=True)
    assert found["tokens"] == list(text.encode()) and found["count"] == len(text.encode())
    assert found["max_model_len"] == worker.card.max_model_len and found["token_strs"][0] == "G"
    back = await http.post("/detokenize", json={"model": worker.model, "tokens": found["tokens"]})
    assert back.json() == {"prompt": text}
    special = await http.post("/detokenize", json={"model": worker.model, "tokens": [256, 65, 257]})
    assert special.json() == {"prompt": "<|im_start|>A<|im_end|>"}
    assert (await tokenize(http, worker, prompt=""))["tokens"] == []


async def test_a_chat_is_what_a_job_begins_with(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    found = await tokenize(http, worker, messages=messages)
    asked = asyncio.create_task(http.post("/v1/chat/completions", json=ask(worker.model) | {"messages": messages}))
    script = await worker.claim()
    assert found["tokens"] == list(script.job.prompt_token_ids)
    await script.answer("")
    await asked


async def test_a_chat_as_its_template_makes_it(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """Without the words that begin an answer."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
    whole, halted = [(await tokenize(http, worker, **chat, add_generation_prompt=begins))["tokens"]
                     for begins in (None, False)]
    assert whole[:len(halted)] == halted and bytes(whole[len(halted) + 1:]) == b"assistant\n"
    wrong: list[Any] = [{}, {"type": "function", "function": None}]
    for tool in wrong:
        refused = await http.post("/tokenize", json={"model": worker.model, "tools": [tool]} | chat)
        assert str(error_of(refused, 400)["param"]).startswith("tools[0]")


async def test_one_of_several_models_is_named(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    other = ScriptedWorker(worker.queue.redis)
    await other.announce()
    await until_known(http, other)
    assert error_of(await http.post("/tokenize", json={"prompt": "a"}), 400)["param"] == "model"


def test_what_a_tokenizer_puts_around_a_text_is_asked_for() -> None:
    fast = byte_tokenizer("<s>", "</s>")
    fast.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    card = byte_card("m")
    tokenizer = Tokenizer(type(card)(**vars(card) | {"tokenizer_json": fast.to_str()}))
    assert tokenizer.encode_text("a<s>", add_special_tokens=True) == [256, *b"a<s>", 257]
    assert tokenizer.encode_text("", add_special_tokens=True) == [256, 257]
    assert tokenizer.encode_text("a", add_special_tokens=False) == [97]


@pytest.mark.parametrize(("path", "fields", "code", "param"), [
    ("/tokenize", {}, "invalid_value", "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_value", "prompt"),
    ("/tokenize", {"messages": []}, "invalid_value", "messages"),
    ("/tokenize", {"prompt": 5}, "invalid_type", "prompt"),
    ("/detokenize", {}, "missing_required_parameter", "tokens"),
    ("/detokenize", {"tokens": [258]}, "invalid_value", "tokens"),
    ("/detokenize", {"tokens": [-1]}, "invalid_value", "tokens[0]"),
    ("/detokenize", {"tokens": ["a"]}, "invalid_type", "tokens[0]"),
], ids=str)
async def test_what_is_wrong_is_named(path: str, fields: dict[str, Any], code: str, param: str,
                                      http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    error = error_of(await http.post(path, json={"model": worker.model} | fields), 400)
    assert (error["code"], error["param"]) == (code, param)


async def test_an_unknown_model_is_a_404(http: httpx.AsyncClient) -> None:
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert error_of(await http.post(path, json={"model": "none"} | fields), 404)["param"] == "model"
