"""What a body may say, and how a wrong one is refused: pure, no server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire import request, sampled
from api.wire.request import ChatRequest, Message, parse
from shared.errors import BadRequest
from shared.grammar import MAX_GRAMMAR_CHARS

USER = {"role": "user", "content": "Hi"}
ASK: dict[str, Any] = {"model": "m", "messages": [USER]}
MAX_MESSAGES = 4
NULLABLE = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
TOOL = {"type": "function", "function": {"name": "f"}}


def read(**fields: Any) -> ChatRequest:
    return parse(json.dumps(ASK | fields).encode(), MAX_MESSAGES)


def refused(body: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(body, MAX_MESSAGES)
    return caught.value


ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 0, "n": 3},
    {"top_p": 0},
    {"top_k": -1},
    {"min_p": 1, "repetition_penalty": 1.5},
    {"max_tokens": 5, "max_completion_tokens": 7},
    {"stop": "x"},
    {"stop": ["x", "y"]},
    {"seed": -(2**63)},
    {"seed": 2**64 - 1},
    {"logit_bias": {"5": -100, "6": 0.5}},
    {"logprobs": True, "top_logprobs": 20},
    {"stream": True, "stream_options": {}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [0, 1]},
    {"tools": [TOOL], "tool_choice": "auto"},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}}},
    {"tool_choice": "none"},
    {"functions": [TOOL["function"]], "function_call": {"name": "f"}, "modalities": ["text"]},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {}}}},
    {"structured_outputs": {"json": {"type": "object"}}, "guided_json": None},
    {"user": "u", "metadata": {"a": "b"}, "store": False, "prompt_cache_key": "k", "safety_identifier": "s",
     "verbosity": "low", "prediction": None, "service_tier": "auto", "moderation": {}, "include_obfuscation": False},
    {"no_such_field": [1, 2]},
    {"messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                  {"role": "function", "name": "f", "content": None}]},
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda fields: ",".join(fields)[:40])
def test_what_openai_and_vllm_accept_is_accepted(fields: dict[str, Any]) -> None:
    read(**fields)


@pytest.mark.parametrize("name", NULLABLE)
def test_null_is_as_good_as_nothing(name: str) -> None:
    assert read(**{name: None}) == read()


def test_the_newer_name_of_the_limit_wins() -> None:
    assert read(max_tokens=5, max_completion_tokens=7).answer_limit == 7
    assert read(max_tokens=5).answer_limit == 5


def test_content_comes_as_text_or_as_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": role, "content": parts} for role in ("system", "developer", "user", "function")]
    assert [message.content for message in read(messages=messages).messages] == ["a\nb"] * 4


def test_a_refusal_is_what_an_assistant_said() -> None:
    """As it comes back from a client that keeps whole messages; in nobody else's mouth."""
    said = {"role": "assistant", "content": None, "refusal": "No."}
    assert read(messages=[USER, said]).messages[1].content == "No."
    assert refused(json.dumps(ASK | {"messages": [said | {"role": "user"}]}).encode()).param == "messages[0]"


def test_a_tool_call_reaches_the_template_with_its_arguments_as_an_object() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = read(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert message.for_template()["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_a_tool_answers_what_was_called() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls, answer = {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "7"}
    assert read(messages=[USER, calls, answer]).messages[2].tool_call_id == "c1"
    nameless = {"role": "assistant", "tool_calls": [{"function": call["function"]}]}
    read(messages=[USER, nameless, answer])
    for messages, param in (([USER, answer], "messages[1].tool_call_id"), ([answer, calls], "messages[0].tool_call_id"),
                            ([calls, answer | {"tool_call_id": "c2"}], "messages[1].tool_call_id"),
                            ([calls, {"role": "tool", "content": "7"}], "messages[1]")):
        with pytest.raises(BadRequest) as refused:
            read(messages=messages)
        assert refused.value.param == param


@pytest.mark.parametrize("arguments", ["not JSON", "[" * 100 + "]" * 100, "[" * 100_000, "9" * 5000])
def test_arguments_that_are_none_reach_the_template_as_they_are(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = read(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert message.for_template()["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert read(messages=[{"role": "user", "content": "😀"}]).messages[0].content == "😀"


HUGE = 10**399
REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": None}, "invalid_type", "messages"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": "Hi"}, "invalid_type", "messages"),
    ({"messages": ["Hi"]}, "invalid_type", "messages[0]"),
    ({"messages": [USER] * (MAX_MESSAGES + 1)}, "invalid_value", "messages"),
    ({"messages": [{"content": "Hi"}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [USER, {"role": "user"}]}, "invalid_value", "messages[1]"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "unsupported_content", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "unsupported_content", "messages"),
    ({"model": None}, "invalid_type", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"stream": 1}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": sampled.MAX_CHOICES + 1}, "invalid_value", "n"),
    ({"n": "2"}, "invalid_type", "n"),
    ({"n": True}, "invalid_type", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": HUGE}, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
    ({"min_tokens": HUGE}, "invalid_value", "min_tokens"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": HUGE}, "invalid_type", "temperature"),
    ({"top_p": 1.5}, "invalid_value", "top_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": HUGE}, "invalid_value", "top_k"),
    ({"min_p": -0.1}, "invalid_value", "min_p"),
    ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"seed": 2**64}, "invalid_value", "seed"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": HUGE}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": True}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(sampled.MAX_BIASES + 1)}}, "invalid_value", "logit_bias"),
    ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": ["x" * 257]}, "invalid_value", "stop"),
    ({"stop": ["x"] * (sampled.MAX_STOPS + 1)}, "invalid_value", "stop"),
    ({"stop": [1]}, "invalid_type", "stop[0]"),
    ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
    ({"stop_token_ids": [HUGE]}, "invalid_value", "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * (sampled.MAX_STOP_TOKEN_IDS + 1)}, "invalid_value", "stop_token_ids"),
    ({"tools": [TOOL] * (request.MAX_TOOLS + 1)}, "invalid_value", "tools"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "missing_required_parameter", "tools[0].function.name"),
    ({"tools": [TOOL, {"type": "function", "function": {"name": ""}}]}, "invalid_value", "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]}, "invalid_type",
     "tools[0].function.description"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "invalid_type",
     "tools[0].function.strict"),
    ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    ({"tools": [TOOL | {"x": json.loads("[" * 100 + "]" * 100)}]}, "invalid_value", "tools"),
    ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "invalid_type",
     "tools[0].function.parameters"),
    ({"tools": [TOOL, {"type": "function", "function": {"name": "g", "parameters": {"type": "array"}}}]},
     "invalid_value", "tools[1].function.parameters"),
    ({"bad_words": ["no"]}, "unsupported_parameter", "bad_words"),
    ({"allowed_token_ids": [5]}, "unsupported_parameter", "allowed_token_ids"),
    ({"include_stop_str_in_output": True}, "unsupported_parameter", "include_stop_str_in_output"),
    ({"prompt_logprobs": 1}, "unsupported_parameter", "prompt_logprobs"),
    ({"return_token_ids": True}, "unsupported_parameter", "return_token_ids"),
    ({"continue_final_message": True}, "unsupported_parameter", "continue_final_message"),
    ({"echo": True}, "unsupported_parameter", "echo"),
    ({"functions": [{}]}, "missing_required_parameter", "functions[0].name"),
    ({"functions": [TOOL["function"]] * 2}, "invalid_value", "functions"),
    ({"functions": [TOOL["function"]], "function_call": "required"}, "invalid_value", "function_call"),
    ({"functions": [TOOL["function"]], "tools": [TOOL]}, "invalid_value", "functions"),
    ({"functions": [TOOL["function"]], "function_call": {"name": "g"}}, "invalid_value", "function_call"),
    ({"function_call": "banana"}, "invalid_value", "function_call"),
    ({"function_call": {"name": "f"}, "tools": [TOOL]}, "invalid_value", "function_call"),
    ({"audio": {"voice": "x", "format": "wav"}}, "unsupported_parameter", "audio"),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tool_choice": "always", "tools": [TOOL]}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tools": [TOOL]},
     "invalid_value", "tool_choice"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "missing_required_parameter",
     "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "invalid_value",
     "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}}, "invalid_type",
     "response_format.json_schema.schema"),
    ({"choice": []}, "invalid_value", "choice"),
    ({"choice": [1]}, "invalid_type", "choice[0]"),
    ({"regex": ""}, "invalid_value", "regex"),
    ({"grammar": "x" * (MAX_GRAMMAR_CHARS + 1)}, "invalid_value", "grammar"),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED, ids=[f"{i}-{next(iter(row[0]))}"
                                                                     for i, row in enumerate(REFUSED)])
def test_a_wrong_field_is_named(fields: dict[str, Any], code: str, param: str | None) -> None:
    error = refused(json.dumps(ASK | fields).encode())
    assert (error.code, error.param, error.status) == (code, param, 400)


def test_a_missing_field_is_named() -> None:
    error = refused(b'{"model": "m"}')
    assert (error.code, error.param) == ("missing_required_parameter", "messages")


def with_extra(extra: bytes) -> bytes:
    return json.dumps(ASK).encode()[:-1] + b", " + extra + b"}"


NOT_JSON = {
    "empty": b"", "blank": b" ", "form": b"model=m&messages=Hi", "half": b'{"model": "m"', "array": b"[]",
    "string": b'"Hi"', "number": b"5", "null": b"null", "deep": b"[" * 100_000, "deep object": b'{"a":' * 100_000,
    "NaN": with_extra(b'"temperature": NaN'), "Infinity": with_extra(b'"x": -Infinity'),
    "too large a number": with_extra(b'"x": {"y": [-1e400]}'),
    "too many digits": with_extra(b'"n": ' + b"9" * 5000), "lone surrogate": with_extra(b'"user": "\\ud800"'),
    "lone low surrogate": with_extra(b'"user": "\\uDC00"'), "surrogate key": with_extra(b'"\\udfff": 1'),
    "surrogate bytes": with_extra(b'"user": "\xed\xa0\x80"'), "not UTF-8": with_extra(b'"user": "\xff"'),
    "UTF-16": json.dumps(ASK).encode("utf-16"), "NUL": b"\0", "raw control": with_extra(b'"user": "\n"'),
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    error = refused(body)
    assert (error.code, error.param, error.status) == ("invalid_json", None, 400)


CANARY = "canary-7c1f"
names = st.text(max_size=5) | st.just(CANARY)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(CANARY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8)
messages = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(Message.model_fields, json_values)), max_size=2)
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(ChatRequest.model_fields, json_values) | {
    "messages": messages | json_values, CANARY: json_values})


@given(fields=fields)
def test_no_fields_break_the_parser_or_echo_in_its_refusal(fields: dict[str, Any]) -> None:
    """Whatever stands in the fields: a request, or a BadRequest that does not repeat a word of it."""
    for body in (fields, ASK | fields):
        assert CANARY not in refusal(json.dumps(body).encode())


@given(body=st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_break_the_parser(body: bytes) -> None:
    assert CANARY not in refusal(body)


def refusal(body: bytes) -> str:
    """The answer to a body, '' when it is a request."""
    try:
        parse(body, MAX_MESSAGES)
    except BadRequest as error:
        return json.dumps(error.body())
    return ""
