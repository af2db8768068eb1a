"""The language of responses, pure: items as messages, what is refused, and how a log becomes events."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from openai.types.responses import ResponseErrorEvent

from api.wire.items import chat_messages, is_reference
from api.wire.response_fold import ResponseFold, ResponseWhole
from api.wire.responses import ResponseRequest, parse_response
from shared.errors import BadRequest, Draining, MissingField
from shared.job import Delta, Entry, Finish, FinishReason, Header, TokenLogprob, Usage, encode_deltas

HEADER = Header(model="m", created_s=7, fingerprint="fp", seed=1, n=1, num_prompt_tokens=5, language="responses",
                stream=True)
ID = "resp_0123456789-0-00112233445566778899aabbccddeeff"
MAX_ITEMS = 8
ENDED_S = 9


def read(**fields: Any) -> ResponseRequest:
    return parse_response(json.dumps({"model": "m", "input": "Hi"} | fields).encode(), MAX_ITEMS)


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "output_text" if role == "assistant" else "input_text", "text": text}]}


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
CHAT_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "7"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


# ── the request ──


@pytest.mark.parametrize(("items", "messages"), [
    ([said("user", "Hi")], [{"role": "user", "content": "Hi"}]),
    ([{"type": "message", "role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi"}]),
    ([said("user", "a"), said("user", "b")], [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
    ([THOUGHT, said("assistant", "Yes"), CALL, CALL | {"call_id": "d"}, OUTPUT],
     [{"role": "assistant", "reasoning_content": "Hm.", "content": "Yes",
       "tool_calls": [CHAT_CALL, CHAT_CALL | {"id": "d"}]},
      {"role": "tool", "tool_call_id": "c", "content": "7"}]),
    ([CALL, said("assistant", "Done")],
     [{"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]}, {"role": "assistant", "content": "Done"}]),
    ([said("assistant", "a"), said("assistant", "b")],
     [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ([THOUGHT, said("user", "x")],
     [{"role": "assistant", "reasoning_content": "Hm.", "content": ""}, {"role": "user", "content": "x"}]),
])
def test_items_are_messages(items: list[Any], messages: list[Any]) -> None:
    assert chat_messages(items, None) == messages
    assert chat_messages(items, "Be short.") == [{"role": "developer", "content": "Be short."}, *messages]


def test_what_has_no_type_but_an_id_alone_is_a_reference() -> None:
    assert [is_reference(item) for item in (
        {"type": "item_reference", "id": "x"}, {"id": "x"}, {"type": None, "id": "x"},
        {"type": "reasoning", "id": "x"}, {"id": "x", "role": "user", "content": "Hi"})] == [True] * 3 + [False] * 2
    thought = {"type": "reasoning", "id": "rs_1"}
    assert read(input=[thought, said("user", "Hi")]).items[0] == thought


def test_a_request_is_a_chat() -> None:
    request = read(
        instructions="Be short.", temperature=0.5, top_p=0.9, max_output_tokens=9, stream=True, top_logprobs=2,
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False, reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}, seed=3, user="u")
    chat = request.chat(request.items)
    assert [message.role for message in chat.messages] == ["developer", "user"]
    assert (chat.temperature, chat.top_p, chat.answer_limit, chat.seed) == (0.5, 0.9, 9, 3)
    assert chat.calls.is_named and chat.offered_tools == [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object"}, "strict": True}}]
    assert chat.reasoning_effort == "low" and chat.num_logprobs == 2 and chat.is_constrained
    assert request.asked["text"]["format"]["schema"] == {"type": "object"}
    assert read().chat(read().items).num_logprobs is None
    assert read(reasoning={"effort": "max"}).chat(read().items).reasoning_effort == "max"


def test_what_has_no_effect_is_repeated() -> None:
    given = {"max_tool_calls": 3, "prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "truncation": "auto"}
    assert read(**given, text={"verbosity": "low"}).asked.items() >= (given | {
        "text": {"format": {"type": "text"}, "verbosity": "low"}}).items()


def test_some_of_the_tools() -> None:
    tools = [{"type": "function", "name": name} for name in "fgh"]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    request = read(tools=tools, tool_choice=choice)
    assert request.chat(request.items).calls == ("required", frozenset("g"), False)


@pytest.mark.parametrize(("fields", "code", "param"), [
    ({"input": None}, "invalid_type", "input"),
    ({"include": ["everything"]}, "invalid_value", "include[0]"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": [], "instructions": ""}, "invalid_value", "input"),
    ({"input": [said("user", "x")] * (MAX_ITEMS + 1)}, "invalid_value", "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input"),
    ({"input": [{"role": "user", "content": 5}]}, "invalid_value", "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_content", "input"),
    ({"input": [{"role": "user", "content": "Hi", "x": json.loads("[" * 70 + "]" * 70)}]}, "invalid_value", "input"),
    ({"input": [{"type": "item_reference", "id": 1}]}, "invalid_value", "input"),
    ({"input": [{"id": None}]}, "invalid_value", "input"),
    ({"input": [{"type": "web_search_call"}]}, "unsupported_content", "input"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "invalid_value", "input"),
    ({"input": [{"type": "function_call_output", "output": "7"}]}, "invalid_value", "input"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "invalid_type", "tools[0].parameters"),
    ({"tools": [{"type": "function", "name": "f"}] * 2}, "invalid_value", "tools"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f", "x": json.loads("[" * 70 + "]" * 70)},
      "tools": [{"type": "function", "name": "f"}]}, "invalid_value", "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "invalid_value", "text.format"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"background": True, "store": False}, "invalid_value", "store"),
    ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    ({"prompt": {"id": "x"}}, "unsupported_parameter", "prompt"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
    ({"metadata": {"a": "b" * 513}}, "invalid_value", "metadata"),
])
def test_what_is_refused(fields: dict[str, Any], code: str, param: str) -> None:
    def say() -> None:
        request = read(**fields)
        request.chat(request.items)

    with pytest.raises(BadRequest) as refused:
        say()
    assert (refused.value.code, refused.value.param) == (code, param)


def test_without_input_it_has_something_to_go_on_from() -> None:
    with pytest.raises(MissingField) as refused:
        parse_response(b'{"model": "m"}', MAX_ITEMS)
    assert (str(refused.value), refused.value.param) == ("input: Field required", "input")
    for fields in ({"instructions": "Say hi."}, {"previous_response_id": ID}):
        assert parse_response(json.dumps({"model": "m"} | fields).encode(), MAX_ITEMS).items == []


# ── the answer ──


def log(header: Header, *deltas: Delta, error: str | None = None, is_whole: bool = True) -> list[Entry]:
    """A header, an entry for each delta, and an end."""
    entries, num_tokens = [Entry(0, 0, 0, "header", header.encode())], 0
    for position, delta in enumerate(deltas, 1):
        num_tokens += len(delta.token_ids)
        entries.append(Entry(1, position, num_tokens, "delta", encode_deltas([delta])))
    finish = Finish(Usage(5, num_tokens, 2), error, ENDED_S)
    return entries + [Entry(1, len(entries), num_tokens, "end", finish.encode())] * is_whole


def told(entries: list[Entry], asked: dict[str, Any] | None = None, after: int = 0) -> list[dict[str, Any]]:
    fold = ResponseFold(ID, entries[0].header, lambda _: b"a", asked or {}, after)
    raw = fold.begin() + b"".join(map(fold.feed, entries))
    events = []
    for kind, number, data in re.findall(r"event: (\S+)\nid: (\d+)\ndata: (.*)\n\n", raw.decode()):
        event = json.loads(data)
        assert (event["type"], event["sequence_number"]) == (kind, int(number))
        events.append(event)
    return events


def whole(entries: list[Entry], asked: dict[str, Any] | None = None) -> dict[str, Any]:
    fold = ResponseWhole(ID, entries[0].header, lambda _: b"a", asked or {})
    for entry in entries:
        fold.feed(entry)
    return dict(json.loads(fold.body()))


TEXT = log(HEADER, Delta(0, (1,), "He"), Delta(0, (2,), "y"), Delta(0, (3,), "", "stop"))
WITH_TOOLS = Header(**{name: getattr(HEADER, name) for name in HEADER.__slots__} | {
    "tool_dialect": "hermes", "reasoning": "open", "think_end_id": 2, "fold_version": 2})
CALLS = log(WITH_TOOLS, Delta(0, (1, 2), "Hm.</think>\n"), Delta(0, (3,), "Look: "),
            Delta(0, (4,), '<tool_call>\n{"name": "f", "arguments": {"a"'), Delta(0, (5,), ": 1}}\n</tool_call>\n"),
            Delta(0, (6,), '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "stop"))


def test_a_call_that_a_stop_string_cut_is_incomplete() -> None:
    cut = log(WITH_TOOLS, Delta(0, (1, 2), "Hm.</think>\n"),
              Delta(0, (3,), '<tool_call>\n{"name": "f", "arguments": {"a": "b', "stop"))
    for items in (whole(cut)["output"], [event["item"] for event in told(cut) if "item" in event][1::2]):
        assert [item["status"] for item in items] == ["completed", "incomplete"]


def test_a_text_as_events() -> None:
    events = told(TEXT)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == [] and events[2]["item"]["status"] == "in_progress"
    assert "".join(event["delta"] for event in events if event["type"].endswith(".delta")) == events[6]["text"] == "Hey"
    last = events[-1]["response"]
    assert last["usage"] == {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
                             "output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 8}
    assert last["output"] == [events[-2]["item"]] and last == whole(TEXT)
    assert (events[0]["response"]["completed_at"], last["completed_at"]) == (None, ENDED_S)


def test_thoughts_text_and_calls_are_items() -> None:
    events = told(CALLS)
    response = events[-1]["response"]
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("reasoning", "completed"), ("message", "completed"), ("function_call", "completed"),
        ("function_call", "completed")]
    reasoning, message, first, second = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Look:"
    assert [(call["name"], json.loads(call["arguments"])) for call in (first, second)] == [("f", {"a": 1}), ("g", {})]
    assert len({item["id"] for item in response["output"]}) == 4 and first["call_id"] != second["call_id"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    pieces = [event["delta"] for event in events if event.get("item_id") == first["id"] and "delta" in event]
    assert "".join(pieces) == first["arguments"] and len(pieces) > 1
    assert response == whole(CALLS)
    added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [0, 1, 2, 3]


@pytest.mark.parametrize("entries", [TEXT, CALLS], ids=["text", "calls"])
def test_behind_every_event_the_rest_is_the_same(entries: list[Entry]) -> None:
    events = told(entries)
    for after in range(len(events) + 1):
        assert told(entries, after=after) == events[after:]


def test_an_answer_that_was_cut_is_incomplete() -> None:
    entries = log(HEADER, Delta(0, (1,), "He", "length"))
    last = told(entries)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["completed_at"] is None


@pytest.mark.parametrize(("error", "status"), [("job_failed", "failed"), ("cancelled", "cancelled")])
def test_an_answer_that_failed_says_so(error: str, status: str) -> None:
    entries = log(HEADER, Delta(0, (1,), "He"), error=error)
    last = told(entries)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == status
    assert (last["response"]["error"] or {}).get("code") == ("server_error" if status == "failed" else None)
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["completed_at"] is None
    assert whole(entries) == last["response"]


def test_in_the_background_it_is_queued_first() -> None:
    asked = {"background": True}
    events = told(TEXT, asked)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert whole(TEXT[:1], asked)["status"] == "queued"
    half = whole(TEXT[:2], asked)
    assert (half["status"], half["output"][0]["content"][0]["text"], half["usage"]) == ("in_progress", "He", None)
    assert whole(TEXT[:1])["status"] == "in_progress"


def test_log_probabilities_come_once() -> None:
    entry = TokenLogprob(97, -0.5, ((97, -0.5),))
    header = replace(HEADER, logprobs=True)
    entries = log(header, Delta(0, (97,), "a", logprobs=(entry,)), Delta(0, (97,), "a", "stop", logprobs=(entry,)))
    events = told(entries)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in deltas] == [1, 1]
    part = events[-1]["response"]["output"][0]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["a", "a"] and part["logprobs"][0]["bytes"] == [97]


def test_log_probabilities_are_whole_however_tokens_were_gathered() -> None:
    """Those of half a character come with the rest of it, that of the token that ends an answer behind its text."""
    drawn: list[tuple[str, FinishReason | None]] = [("", None), ("é", None), ("b", None), ("", "stop")]
    entries = [TokenLogprob(number, -0.5, ()) for number in range(len(drawn))]
    alone = [Delta(0, (number,), text, reason, logprobs=(entries[number],))
             for number, (text, reason) in enumerate(drawn)]
    together = [Delta(0, (0, 1, 2, 3), "éb", "stop", logprobs=tuple(entries))]
    for deltas, counts in ((alone, [2, 1, 1]), (together, [4])):
        events = told(log(replace(HEADER, logprobs=True), *deltas))
        told_logprobs = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
        assert [len(logprobs) for logprobs in told_logprobs] == counts
        (part,) = events[-1]["response"]["output"][0]["content"]
        assert part["text"] == "éb"
        assert part["logprobs"] == [each for logprobs in told_logprobs for each in logprobs]


def test_an_error_is_an_event_of_the_schema() -> None:
    """Its Python client reads it nested, others as the schema has it; it has no position."""
    fold = ResponseFold(ID, HEADER, lambda _: b"a", {})
    fold.begin()
    kind, data = fold.error(Draining()).decode().strip().split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert kind == "event: error" and told["error"]["code"] == "draining"
    event = ResponseErrorEvent.model_validate(told, strict=True)
    assert (event.code, event.sequence_number) == ("draining", fold.num_events)
