"""`/v1/messages`: which chat its body is, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.wire.messages import parse_count, parse_message
from api.wire.request import ChatRequest
from shared.errors import BadRequest

HI: dict[str, Any] = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: Any = {"name": "weather", "description": "Of a city", "input_schema": SCHEMA}


def read(**fields: Any) -> ChatRequest:
    return parse_message(json.dumps({"model": "m", "max_tokens": 9, "messages": [HI]} | fields).encode(), 10)


def chat(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The messages of the chat that it is."""
    return [message.model_dump(exclude_none=True) for message in read(messages=messages, **fields).messages]


def use(name: str = "weather", id_: str = "t1", **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id_, "name": name, "input": given}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said, "cache_control": {"type": "ephemeral"}}


# ── which chat it is ──

def test_text_is_a_string_or_blocks() -> None:
    assert chat(HI) == [HI]
    assert chat({"role": "user", "content": [text("a"), text("b")]}, system=[text("c"), text("d")]) == [
        {"role": "system", "content": "c\nd"}, {"role": "user", "content": "a\nb"}]
    assert chat(HI, {"role": "system", "content": "c"}, system="") == [
        {"role": "system", "content": ""}, HI, {"role": "system", "content": "c"}]


def test_turns_of_one_role_are_one() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "A"}
    assert chat(HI, HI, answer, answer, HI) == [
        HI | {"content": "Hi\nHi"}, answer | {"content": "A\nA"}, HI]


def test_calls_and_results_are_those_of_a_chat() -> None:
    """Results come before what the user says beside them, in order; one that failed says so."""
    said = [{"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            text("I look."), use(city="Paris"), use("time", "t2")]
    results = [text("And now?"), {"type": "tool_result", "tool_use_id": "t1", "content": [text("sunny"), text("21")]},
               {"type": "tool_result", "tool_use_id": "t2", "content": "no clock", "is_error": True}]
    calls = [{"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
             {"id": "t2", "type": "function", "function": {"name": "time", "arguments": "{}"}}]
    assert chat(HI, {"role": "assistant", "content": said}, {"role": "user", "content": results}) == [
        HI, {"role": "assistant", "content": "I look.", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "sunny\n21"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no clock"}, {"role": "user", "content": "And now?"}]
    assert chat(HI, {"role": "assistant", "content": [use()]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]})[1:] == [
        {"role": "assistant", "tool_calls": [calls[0] | {"function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "t1", "content": ""}]


def test_a_call_may_have_no_result() -> None:
    assert [message["role"] for message in chat(HI, {"role": "assistant", "content": [use()]}, HI)] == [
        "user", "assistant", "user"]


def test_tools_are_functions() -> None:
    function = {"name": "weather", "description": "Of a city", "parameters": SCHEMA}
    assert read(tools=[WEATHER]).tools == [{"type": "function", "function": function}]
    strict = read(tools=[WEATHER | {"type": "custom", "strict": True, "cache_control": None}]).tools
    assert strict == [{"type": "function", "function": function | {"strict": True}}]


@pytest.mark.parametrize(("choice", "mode", "is_named"), [
    ({"type": "auto"}, "auto", False), ({"type": "none"}, "none", False), ({"type": "any"}, "required", False),
    ({"type": "tool", "name": "weather"}, "required", True)])
def test_which_tool_is_called(choice: dict[str, Any], mode: str, is_named: bool) -> None:
    calls = read(tools=[WEATHER], tool_choice=choice).calls
    assert (calls.mode, calls.is_named) == (mode, is_named)
    assert read(tools=[WEATHER], tool_choice=choice).parallel_tool_calls is None
    assert read(tools=[WEATHER], tool_choice=choice | {"disable_parallel_tool_use": True}).parallel_tool_calls is False


def test_sampling_is_a_chats() -> None:
    asked = read(stop_sequences=["a", "b"], temperature=0.5, top_p=0.9, top_k=5, stream=True)
    assert (asked.stop, asked.temperature, asked.top_p, asked.top_k, asked.stream, asked.max_tokens) == (
        ["a", "b"], 0.5, 0.9, 5, True, 9)


@pytest.mark.parametrize(("fields", "variables"), [
    ({}, {}), ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True}),
    ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, {"reasoning_effort": "max"}),
    ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"})])
def test_thinking_is_what_the_template_makes_of_it(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    assert read(**fields).template_variables == variables


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_answer_keeps_a_form(field: str) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    asked = read(**{field: {"format": form} if field == "output_config" else form})
    assert asked.response_format and asked.response_format.json_schema
    assert asked.response_format.json_schema.schema_ == SCHEMA


def test_other_fields_have_no_effect() -> None:
    others = {"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}, "new": 1,
              "container": None, "mcp_servers": [], "system": None, "tools": None, "tool_choice": None, "top_k": None}
    assert read(**others) == read()


def test_what_is_counted_needs_no_limit() -> None:
    body: dict[str, Any] = {"model": "m", "messages": [HI, {"role": "assistant", "content": "Yes"}]}
    assert len(parse_count(json.dumps(body).encode(), 10).messages) == 2


# ── what is refused ──

RESULT = {"type": "tool_result", "tool_use_id": "t1"}


@pytest.mark.parametrize(("fields", "code", "param"), [
    ({"max_tokens": None}, "invalid_type", "max_tokens"), ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"model": 5}, "invalid_type", "model"), ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [HI] * 11}, "invalid_value", "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_required_parameter",
     "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "poem"}]}]}, "invalid_value", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "invalid_value", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "unsupported_content", "messages"),
    ({"messages": [{"role": "user", "content": [RESULT | {"content": [{"type": "document"}]}]}]},
     "unsupported_content", "messages"),
    ({"messages": [{"role": "user", "content": [RESULT | {"content": [{"type": "text"}]}]}]}, "invalid_value",
     "messages[0].content[0].content"),
    ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}, HI]}, "unsupported_content",
     "messages"),
    ({"messages": [{"role": "assistant", "content": [{"type": "web_search_tool_result"}]}, HI]},
     "unsupported_content", "messages"),
    ({"messages": [{"role": "user", "content": [use()]}]}, "invalid_value", "messages[0]"),
    ({"messages": [HI, {"role": "assistant", "content": [use(a=json.loads("[" * 70 + "]" * 70))]}, HI]},
     "invalid_value", "messages[1].content[0].input"),
    ({"messages": [HI, {"role": "user", "content": [RESULT]}]}, "invalid_value", "messages[1]"),
    ({"messages": [HI, {"role": "assistant", "content": "The best answer is ("}]}, "unsupported_parameter", "messages"),
    ({"system": [{"type": "image"}]}, "unsupported_content", "messages"),
    ({"system": [5]}, "invalid_value", "system"),
    ({"temperature": 2.5}, "invalid_value", "temperature"), ({"top_k": -1}, "invalid_value", "top_k"),
    ({"stop_sequences": "a"}, "invalid_type", "stop_sequences"),
    ({"stop_sequences": [""]}, "invalid_value", "stop_sequences[0]"),
    ({"tools": [{"name": "f"}]}, "missing_required_parameter", "tools[0].input_schema"),
    ({"tools": [WEATHER, WEATHER]}, "invalid_value", "tools"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "unsupported_parameter", "tools"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "unsupported_parameter", "tools"),
    ({"tool_choice": {"type": "any"}}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [WEATHER]}, "invalid_value", "tool_choice"),
    ({"thinking": {"type": "always"}}, "invalid_value", "thinking.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "missing_required_parameter",
     "output_config.format.schema"),
    ({"container": "c"}, "unsupported_parameter", "container"),
    ({"mcp_servers": [{}]}, "unsupported_parameter", "mcp_servers"),
    ({"compaction": {"type": "summary"}}, "unsupported_parameter", "compaction"),
    ({"thread": {"type": "create"}}, "thread_unsupported_request", "thread")])
def test_what_is_refused(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**fields)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert "poem" not in str(refused.value)
