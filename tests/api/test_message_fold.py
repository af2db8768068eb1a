"""How a log becomes Anthropic's events, or one message: the blocks, why it ended, what it cost."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.message_fold import MessageEventFold, MessageFold, error_body
from shared.errors import (
    BodyTooLarge,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InvalidValue,
    JobFailed,
    MethodNotAllowed,
    ModelNotFound,
    Overloaded,
    Unauthorized,
)
from shared.job import Delta, Entry, FinishReason, Header
from tests.api.test_fold import make_log

HEADER = Header(model="m", created_s=1700000000, fingerprint="fp_1", seed=1, n=1, num_prompt_tokens=9, stream=True,
                language="messages")
CALLING = ["I look", ". ", "<tool", '_call>\n{"name": "f", "arguments": {"a"', ': 1}}\n</tool_call>\n<tool_call>',
           '{"name": "g", "arguments": {}}', "</tool_call>"]
Events = list[tuple[str, dict[str, Any]]]


def log_of(*texts: str, reason: FinishReason = "stop", stop: str = "", error: str | None = None) -> list[Entry]:
    """A token for each text, and a last one that shows none."""
    steps = [[Delta(0, (number,), text)] for number, text in enumerate(texts)]
    return make_log(*steps, *([] if error else [[Delta(0, (99,), "", reason, stop=stop)]]), error=error)


def stream(log: list[Entry], after: int = 0, **header: Any) -> bytes:
    fold = MessageEventFold("msg_1", replace(HEADER, **header), after)
    return b"".join(map(fold.feed, log))


def whole(log: list[Entry], **header: Any) -> dict[str, Any]:
    fold = MessageFold("msg_1", replace(HEADER, **header))
    for entry in log:
        fold.feed(entry)
    assert fold.ended
    message: dict[str, Any] = json.loads(fold.body())
    return message


def events(raw: bytes, first: int = 1) -> Events:
    """Names and data. Asserts the form of each event, that ids count, and that each is named as its data says."""
    found: Events = []
    for number, block in enumerate(raw.decode().split("\n\n")[:-1], first):
        match = re.fullmatch(r"event: (\w+)\nid: (\d+)\ndata: (\{.*\})", block)
        assert match and int(match[2]) == number, block
        found.append((match[1], json.loads(match[3])))
        assert found[-1][1]["type"] == match[1]
    return found


def joined(told: Events) -> dict[str, Any]:
    """The message that they add up to, as Anthropic says that they do. Asserts their order."""
    (_, start), *middle, (_, delta), (last, _) = told
    message: dict[str, Any] = start["message"]
    content, is_open = message["content"], False
    for name, data in middle:
        if name == "content_block_start":
            assert not is_open and data["index"] == len(content)
            is_open = True
            content.append(data["content_block"])
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = ""
        elif name == "content_block_delta":
            assert is_open and data["index"] == len(content) - 1
            for field, value in data["delta"].items():
                if field != "type":
                    name_of_field = "input" if field == "partial_json" else field
                    content[-1][name_of_field] += value
        else:
            assert name == "content_block_stop" and is_open and data["index"] == len(content) - 1
            is_open = False
    assert not is_open and last == "message_stop"
    for block in content:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    message |= delta["delta"]
    message["usage"] |= delta["usage"]
    return message


def test_a_stream_reads_event_by_event_as_anthropics() -> None:
    usage = {"cache_creation_input_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}
    assert events(stream(log_of("H", "i\u2028"))) == [
        ("message_start", {"type": "message_start", "message": {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
            "stop_sequence": None,
            "usage": usage | {"input_tokens": 9, "cache_read_input_tokens": 0, "output_tokens": 0}}}),
        ("content_block_start", {"type": "content_block_start", "index": 0, "content_block": {
            "type": "text", "text": ""}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": {
            "type": "text_delta", "text": "H"}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": {
            "type": "text_delta", "text": "i\u2028"}}),
        ("content_block_stop", {"type": "content_block_stop", "index": 0}),
        ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                           "usage": usage | {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 3}}),
        ("message_stop", {"type": "message_stop"})]
    assert stream(log_of("H", "i\u2028")).isascii()


def test_the_whole_answer_is_one_message() -> None:
    """Its input is what was computed, and beside it what was found: together the prompt."""
    assert whole(log_of("H", "i")) == {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
        "content": [{"type": "text", "text": "Hi"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 5, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0, "output_tokens": 3,
                  "output_tokens_details": {"thinking_tokens": 0}}}


@pytest.mark.parametrize(("reason", "stop", "expected"), [
    ("stop", "", ("end_turn", None)), ("length", "", ("max_tokens", None)), ("stop", "END", ("stop_sequence", "END"))])
def test_why_it_ended(reason: FinishReason, stop: str, expected: tuple[str, str | None]) -> None:
    message = whole(log_of("a", reason=reason, stop=stop))
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    assert joined(events(stream(log_of("a", reason=reason, stop=stop)))) == message


@pytest.mark.parametrize("is_named", [False, True])
def test_calls_are_blocks_behind_the_text(is_named: bool) -> None:
    """Two of them, with ids of their own; also one that was asked for by name is a reason to end."""
    header: dict[str, Any] = {"tool_dialect": "hermes", "has_named_tool": is_named}
    message = whole(log_of(*CALLING), **header)
    assert joined(events(stream(log_of(*CALLING), **header))) == message
    text, *calls = message["content"]
    assert text == {"type": "text", "text": "I look."} and message["stop_reason"] == "tool_use"
    assert [(call["type"], call["name"], call["input"]) for call in calls] == [
        ("tool_use", "f", {"a": 1}), ("tool_use", "g", {})]
    assert len({call["id"] for call in calls}) == 2 and all(call["id"].startswith("toolu_") for call in calls)


@pytest.mark.parametrize("arguments", ['{"a": ', '{"a": NaN}', '{"a": 1e999}'])
def test_a_call_that_was_cut_off_or_has_no_object_is_given_nothing(arguments: str) -> None:
    log = log_of('<tool_call>{"name": "f", "arguments": ' + arguments, reason="length")
    message = whole(log, tool_dialect="hermes")
    assert message["content"][0]["input"] == {} and message["stop_reason"] == "max_tokens"


def test_a_call_that_the_model_does_not_end_is_no_reason_to_run_it() -> None:
    log = log_of('<tool_call>{"name": "f", "arguments": {"a": "b')
    assert whole(log, tool_dialect="hermes")["stop_reason"] == "end_turn"


def test_a_line_break_in_an_argument_is_escaped() -> None:
    log = log_of('<tool_call>{"name": "f", "arguments": {\n"a": "b', '\nc"}}</tool_call>')
    message = whole(log, tool_dialect="hermes")
    assert message["content"][0]["input"] == {"a": "b\nc"} and message["stop_reason"] == "tool_use"
    assert joined(events(stream(log, tool_dialect="hermes"))) == message


def test_a_thought_is_a_block_with_a_signature() -> None:
    log = log_of("<think>\nI wonder", ".\n</think>", "\n\nYes")
    message = whole(log, reasoning="maybe")
    assert joined(events(stream(log, reasoning="maybe"))) == message
    assert message["content"] == [{"type": "thinking", "thinking": "I wonder.", "signature": "unsigned"},
                                  {"type": "text", "text": "Yes"}]
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] == 1
    deltas = [data["delta"]["type"] for name, data in events(stream(log, reasoning="maybe"))
              if name == "content_block_delta"]
    assert deltas == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta"]


def test_an_answer_may_say_nothing() -> None:
    assert [name for name, _ in events(stream(log_of()))] == ["message_start", "message_delta", "message_stop"]
    assert whole(log_of())["content"] == []


def test_the_start_is_said_once_and_at_once() -> None:
    fold = MessageEventFold("msg_1", HEADER)
    start = fold.begin()
    assert events(start)[0][0] == "message_start"
    assert fold.begin() == b""
    assert start + b"".join(map(fold.feed, log_of("Hi"))) == stream(log_of("Hi"))


def test_an_answer_that_fails_ends_with_an_error() -> None:
    raw = stream(log_of("H", error="job_failed"))
    assert events(raw)[-1] == ("error", {"type": "error", "error": {"type": "api_error", "message": str(JobFailed())}})
    with pytest.raises(DeadlineExceeded):
        whole(log_of(error="deadline_exceeded"))


def test_an_error_that_stands_in_no_log_has_no_position() -> None:
    assert MessageEventFold("msg_1", HEADER).error(Draining()) == b"event: error\ndata: %b\n\n" % json.dumps(
        error_body(Draining()), separators=(",", ":")).encode()


@pytest.mark.parametrize(("error", "kind"), [
    (InvalidValue, "invalid_request_error"), (Unauthorized, "authentication_error"), (ModelNotFound, "not_found_error"),
    (MethodNotAllowed, "invalid_request_error"), (BodyTooLarge, "request_too_large"), (Overloaded, "rate_limit_error"),
    (Draining, "overloaded_error"), (JobFailed, "api_error"), (DeadlineExceeded, "timeout_error"),
    (Cancelled, "invalid_request_error")])
def test_errors_are_told_in_anthropics_words(error: Any, kind: str) -> None:
    assert error_body(error(), "req_1") == {
        "type": "error", "error": {"type": kind, "message": str(error())}, "request_id": "req_1"}


LOGS: dict[str, tuple[list[Entry], dict[str, Any]]] = {
    "text": (log_of("a", "", "b"), {}), "calls": (log_of(*CALLING), {"tool_dialect": "hermes"}),
    "thought": (log_of("<think>a", "b</think>c", "d"), {"reasoning": "maybe"}), "failed": (log_of("a", error="x"), {})}


@pytest.mark.parametrize("name", LOGS)
def test_behind_every_event_the_rest_is_the_same(name: str) -> None:
    log, header = LOGS[name]
    raw = stream(log, **header)
    blocks = [block + b"\n\n" for block in raw.split(b"\n\n")[:-1]]
    for after in range(len(blocks) + 1):
        assert stream(log, after, **header) == b"".join(blocks[after:])


@given(texts=st.lists(st.sampled_from([*CALLING, "a", " ", "<think>", "</think>", "é\n", ""]), max_size=8),
       reason=st.sampled_from(("stop", "length")), reasoning=st.sampled_from(("", "open", "maybe")))
def test_streamed_and_joined_it_is_the_whole_message(texts: list[str], reason: FinishReason, reasoning: Any) -> None:
    """Whatever the model says; a call that was cut off is the JSON so far in a stream, and nothing in the whole."""
    log, header = log_of(*texts, reason=reason), {"tool_dialect": "hermes", "reasoning": reasoning}
    message, told = whole(log, **header), events(stream(log, **header))
    try:
        assert joined(told) == message
    except ValueError:
        assert {} in [block.get("input") for block in message["content"]]
