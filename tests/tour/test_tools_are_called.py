"""Tools, with the official SDK: the model calls them by itself, or must, and reads what they say."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.system import MODEL, System

PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
         "additionalProperties": False}
SUM = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
       "additionalProperties": False}
TOOLS: Any = [{"type": "function", "function": {"name": name, "description": text, "parameters": schema,
                                                "strict": True}}
              for name, text, schema in (("get_weather", "The weather in a city", PLACE), ("add", "The sum", SUM))]
SCHEMAS = {"get_weather": PLACE, "add": SUM}
TOOL_CALL_ID = 259                                      # <tool_call>, of the built-in model
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WILD: dict[str, Any] = {"model": MODEL, "temperature": 2.0, "max_tokens": 400, "tools": TOOLS,
                        "messages": [{"role": "user", "content": "Say something."}]}


@pytest.fixture(scope="module")
def client(system: System) -> openai.Client:
    return openai.Client(base_url=f"{system.url}/v1", api_key="EMPTY", max_retries=0, timeout=60)


def judge(message: Any) -> list[str]:
    """The names of what is called, each with arguments of its schema."""
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in message.tool_calls]


def test_the_model_calls_a_tool_and_reads_what_it_says(client: openai.Client) -> None:
    tools = TOOLS[:1]
    first = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=tools, temperature=0)
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    told = [*QUESTION, choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
    second = client.chat.completions.create(model=MODEL, messages=told, tools=tools, temperature=0)
    assert second.choices[0].finish_reason == "stop"
    assert "sunny" in (second.choices[0].message.content or "") and "21" in (second.choices[0].message.content or "")


def test_a_stream_of_calls_adds_up(client: openai.Client) -> None:
    """By the SDK's own accumulator, with the ids of the whole answer that the same log gives."""
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "tools": TOOLS[:1], "temperature": 0}
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    stored: Any = client.get(f"/chat/completions/{final.id}", cast_to=object)
    assert [call.model_dump(include={"id"}) for call in final.choices[0].message.tool_calls or []] == [
        {"id": call["id"]} for call in stored["choices"][0]["message"]["tool_calls"]]


@pytest.mark.parametrize(("choice", "allowed", "reason"), [
    ("required", {"get_weather", "add"}, "tool_calls"),
    ({"type": "function", "function": {"name": "add"}}, {"add"}, "stop"),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        {"type": "function", "function": {"name": "get_weather"}}]}}, {"get_weather"}, "tool_calls"),
], ids=["required", "named", "allowed"])
def test_who_must_call_calls(choice: Any, allowed: set[str], reason: str, client: openai.Client) -> None:
    """Whatever the model would rather say: arguments of the schema, and no text."""
    names: set[str] = set()
    for seed in range(4):
        answer = client.chat.completions.create(**WILD, seed=seed, tool_choice=choice, parallel_tool_calls=False)
        (only,) = answer.choices
        assert only.message.content is None and only.finish_reason == reason
        (name,) = judge(only.message)
        names.add(name)
    assert names <= allowed


def test_strict_tools_are_called_by_their_schema_alone(client: openai.Client) -> None:
    """Also where nothing must be called: text is free, a call is not. Here the model is all but made to begin one."""
    bias = {str(TOOL_CALL_ID): 100}
    options = WILD | {"max_tokens": 160, "logit_bias": bias}
    answers = [client.chat.completions.create(**options, seed=seed, parallel_tool_calls=parallel)
               for seed in range(2) for parallel in (False, True)]
    counts = set()
    for choice in (answer.choices[0] for answer in answers):
        whole = choice.message.tool_calls or []
        if choice.finish_reason == "length":
            whole = whole[:-1]
        counts.add(len(whole))
        for call in whole:
            assert call.type == "function"
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert max(counts) > 0


def test_functions_are_what_tools_were_once(client: openai.Client) -> None:
    function = TOOLS[0]["function"]
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, functions=[function], temperature=0)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "function_call" and message.function_call
    assert json.loads(message.function_call.arguments) == {"city": "Paris"}
    told = [*QUESTION, message.model_dump(exclude_none=True),
            {"role": "function", "name": "get_weather", "content": "sunny, 21 degrees"}]
    again = client.chat.completions.create(model=MODEL, messages=told, functions=[function], temperature=0)
    assert "sunny" in (again.choices[0].message.content or "")


def test_several_calls_at_once(client: openai.Client) -> None:
    """As many as the model wants, each of its schema."""
    counts = set()
    for seed in range(6):
        answer = client.chat.completions.create(**WILD | {"temperature": 1.5}, seed=seed, tool_choice="required")
        if answer.choices[0].finish_reason == "tool_calls":
            counts.add(len(judge(answer.choices[0].message)))
    assert counts


def test_no_tool_is_called_where_none_may_be(client: openai.Client) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="none",
                                            temperature=0)
    assert not answer.choices[0].message.tool_calls and answer.choices[0].finish_reason == "stop"


def test_a_schema_that_cannot_be_enforced_is_refused_where_it_is_strict(client: openai.Client) -> None:
    function: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "properties": {
        "x": {"not": {"type": "string"}}}}}
    for strict in (True, False):
        tools: Any = [{"type": "function", "function": function | {"strict": strict}}]
        options: dict[str, Any] = WILD | {"tools": tools, "tool_choice": "required", "max_tokens": 60}
        if strict:
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(**options)
            assert (refused.value.code, refused.value.param) == ("invalid_grammar", "tools[0].function")
        else:
            assert client.chat.completions.create(**options).choices[0].message.tool_calls
