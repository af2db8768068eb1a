"""What an answer must be, it is: with the official SDK, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.system import MODEL, System

WILD: dict[str, Any] = {"model": MODEL, "temperature": 2.0, "max_tokens": 400,
                        "messages": [{"role": "user", "content": "Say something."}]}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    rank: int
    tags: list[Literal["old", "big"]]


@pytest.fixture(scope="module")
def client(system: System) -> openai.Client:
    return openai.Client(base_url=f"{system.url}/v1", api_key="EMPTY", max_retries=0, timeout=60)


def test_a_model_of_pydantic_is_parsed(client: openai.Client) -> None:
    """And streamed: the same, piece by piece."""
    for seed in range(3):
        answer = client.chat.completions.parse(**WILD, seed=seed, response_format=City)
        assert isinstance(answer.choices[0].message.parsed, City)
        with client.chat.completions.stream(**WILD, seed=seed, response_format=City) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.parsed == answer.choices[0].message.parsed
        assert final.choices[0].finish_reason == "stop"


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "object": ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    "schema": ({"guided_json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}},
               lambda text: all(isinstance(item, bool) for item in json.loads(text))),
    "regex": ({"regex": r"[A-Z]{3}-[0-9]{2,4}"}, lambda text: re.fullmatch(r"[A-Z]{3}-[0-9]{2,4}", text)),
    "choice": ({"choice": ["left", "right"]}, lambda text: text in ("left", "right")),
    "grammar": ({"grammar": 'root ::= "<" [a-c]+ ">"'}, lambda text: re.fullmatch("<[a-c]+>", text)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_kept(form: str, client: openai.Client) -> None:
    """By three choices of every one; what is cut off at max_tokens says so."""
    fields, judge = FORMS[form]
    answer = client.chat.completions.create(**WILD, n=3, seed=5, extra_body=fields)
    ended = [choice.message.content or "" for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended or form == "object"
    assert all(judge(text) for text in ended)


def test_a_schema_that_is_known_to_validators(client: openai.Client) -> None:
    schema: dict[str, Any] = {
        "type": "object", "additionalProperties": False, "required": ["id", "when", "parts"], "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, "when": {"type": "string", "format": "date"},
            "parts": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"anyOf": [
                {"type": "integer", "minimum": 10, "maximum": 20}, {"$ref": "#/$defs/pair"}]}}},
        "$defs": {"pair": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
                           "additionalProperties": False}}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "order", "strict": True, "schema": schema}}
    for seed in range(4):
        answer = client.chat.completions.create(**WILD, seed=seed, response_format=wanted)
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_a_form_leaves_room_for_calls(client: openai.Client) -> None:
    """Whatever the model would rather say, it is the one or the other; where no call may be, it is the form."""
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {
        "type": "object", "properties": {"where": {"enum": ["left", "right"]}}, "required": ["where"],
        "additionalProperties": False}}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "yes", "schema": {"enum": ["yes", "no"]}}}
    kinds = set()
    for choice in client.chat.completions.create(**WILD, seed=3, n=16, tools=[tool], response_format=wanted).choices:
        if choice.finish_reason == "length":
            continue
        kinds.add(choice.finish_reason)
        for call in choice.message.tool_calls or ():
            assert call.type == "function" and json.loads(call.function.arguments)["where"] in ("left", "right")
        assert choice.message.tool_calls or json.loads(choice.message.content or "") in ("yes", "no")
    assert kinds == {"stop", "tool_calls"}
    none = client.chat.completions.create(**WILD, seed=3, tools=[tool], tool_choice="none", response_format=wanted)
    assert none.choices[0].message.content in ('"yes"', '"no"')


@pytest.mark.parametrize("schema", [
    {"type": "integer", "minimum": 5, "maximum": 3}, {"$ref": "https://example.org/x.json"},
    {"enum": [f"value number {i}" for i in range(20_000)]}, {"not": {"type": "string"}},
    {"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"type": "object", "required": ["x"], "properties": {
        "x": {"$ref": f"#/$defs/a{(i + 1) % 2000}"}}} for i in range(2000)}},
    {"type": "integer", "multipleOf": 9_999_991}],
    ids=["contradictory", "elsewhere", "huge", "unsupported", "a chain that would end the pod", "endless work"])
def test_what_cannot_be_enforced_is_refused_and_harms_nobody(schema: dict[str, Any], client: openai.Client) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**WILD, stream=True, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert (refused.value.code, refused.value.param) == ("invalid_grammar", "response_format")
    assert client.chat.completions.create(**WILD, extra_body={"choice": ["yes"]}).choices[0].message.content == "yes"


def test_a_form_that_turns_out_to_be_too_complex_ends_the_answer(client: openai.Client) -> None:
    """No other worker would come further, and the client's form is what it is."""
    grammar = "start: /[a-c]{90}/ " + " ".join(f'"w{i}"?' for i in range(4000))
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**WILD, extra_body={"grammar": grammar})
    assert refused.value.code == "form_too_complex"
    stream = client.chat.completions.create(**WILD, stream=True, extra_body={"grammar": grammar})
    with pytest.raises(openai.APIError, match="takes too much work"):
        list(stream)
