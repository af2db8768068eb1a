"""How a log becomes events, or one object: pure, byte for byte as clients expect it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.chat import ChunkFold, CompletionFold
from api.wire.dialects import DIALECTS
from api.wire.fold import DONE, FOLD_VERSIONS
from api.wire.parts import fold_version
from api.wire.reasoning import Mode
from shared.errors import DeadlineExceeded, JobFailed
from shared.job import Delta, Entry, Finish, FinishReason, Header, TokenLogprob, Usage, encode_deltas

HEADER = Header(model="m", created_s=1700000000, fingerprint="fp_1", seed=1, n=1, num_prompt_tokens=9, stream=True)
HEAD = ('"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m",'
        '"service_tier":"default","system_fingerprint":"fp_1",')
ROLE = '{"role":"assistant","content":"","refusal":null}'
USAGE = ('{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":4},'
         '"completion_tokens_details":{"reasoning_tokens":0}}')


def token_bytes(token_id: int) -> bytes:
    return bytes([token_id % 256])


def make_log(*steps: list[Delta], error: str | None = None, num_prompt_tokens: int = 9) -> list[Entry]:
    """Header, an entry per step, terminal."""
    entries, num_tokens = [Entry(0, 0, 0, "header", "{}")], 0
    for position, deltas in enumerate(steps, 1):
        num_tokens += sum(len(delta.token_ids) for delta in deltas)
        entries.append(Entry(1, position, num_tokens, "delta", encode_deltas(deltas)))
    finish = Finish(Usage(num_prompt_tokens, num_tokens, num_cached_tokens=4), error)
    return [*entries, Entry(1, len(steps) + 1, num_tokens, "end", finish.encode())]


HI = make_log([Delta(0, (72,), "H")], [Delta(0, (105,), "i")], [Delta(0, (2,), "", "stop")])


def stream(log: list[Entry], **header: Any) -> bytes:
    fold = ChunkFold("chatcmpl-1", replace(HEADER, **header), token_bytes)
    return b"".join(map(fold.feed, log))


def events(raw: bytes) -> list[dict[str, Any]]:
    """The events of a stream, without [DONE]. Asserts that ids count from one."""
    blocks = raw.removesuffix(DONE).decode().split("\n\n")[:-1]
    ids, data = zip(*(block.split("\n") for block in blocks), strict=True) if blocks else ((), ())
    assert list(ids) == [f"id: {i}" for i in range(1, len(ids) + 1)]
    return [json.loads(line.removeprefix("data: ")) for line in data]


def collect(log: list[Entry], **header: Any) -> dict[str, Any]:
    fold = CompletionFold("chatcmpl-1", replace(HEADER, **header), token_bytes)
    for entry in log:
        fold.feed(entry)
    assert fold.ended
    whole: dict[str, Any] = json.loads(fold.body())
    return whole


def chunk(number: int, delta: str, reason: str = "null", tail: str = "") -> str:
    return (f'id: {number}\ndata: {{{HEAD}"choices":[{{"index":0,"delta":{delta},"logprobs":null,'
            f'"finish_reason":{reason}}}]{tail}}}\n\n')


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_reads_event_by_event_as_openais(include_usage: bool) -> None:
    """Role, text, finish, usage, [DONE]: every byte. Without include_usage no chunk says the word."""
    tail = ',"usage":null' if include_usage else ""
    expected = (chunk(1, ROLE, tail=tail) + chunk(2, '{"content":"H"}', tail=tail)
                + chunk(3, '{"content":"i"}', tail=tail) + chunk(4, "{}", '"stop"', tail=tail))
    if include_usage:
        expected += f'id: 5\ndata: {{{HEAD}"choices":[],"usage":{USAGE}}}\n\n'
    assert stream(HI, include_usage=include_usage).decode() == expected + "data: [DONE]\n\n"


def test_the_whole_answer_is_one_object() -> None:
    assert collect(HI) == {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": "m",
        "service_tier": "default", "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi", "refusal": None}, "logprobs": None,
                     "finish_reason": "stop"}],
        "usage": json.loads(USAGE)}


def test_choices_begin_in_order_and_end_when_they_end() -> None:
    """Choice 1 speaks first and ends first: choice 0's role chunk still leads, choice 1's finish does not wait."""
    log = make_log([Delta(1, (65,), "A", "stop")], [Delta(0, (66,), "B")], [Delta(0, (67,), "C", "length")])
    rows = [(c["index"], c["delta"].get("role"), c["delta"].get("content"), c["finish_reason"])
            for event in events(stream(log, n=2)) for c in event["choices"]]
    assert rows == [(0, "assistant", "", None), (1, "assistant", "", None), (1, None, "A", None),
                    (1, None, None, "stop"), (0, None, "B", None), (0, None, "C", None), (0, None, None, "length")]


def test_continuous_usage_grows_on_every_chunk() -> None:
    totals = [event["usage"]["completion_tokens"] for event in events(stream(HI, continuous_usage=True))]
    assert totals == [1, 1, 2, 3]
    with_final = events(stream(HI, continuous_usage=True, include_usage=True))
    assert [event["usage"]["completion_tokens"] for event in with_final] == [*totals, 3]
    assert all(event["usage"]["prompt_tokens"] == 9 for event in with_final)


def test_text_that_is_held_back_makes_no_event() -> None:
    log = make_log([Delta(0, (240, 159), "")], [Delta(0, (152, 128), "😀", "stop")])
    texts = [event["choices"][0]["delta"].get("content") for event in events(stream(log))]
    assert texts == ["", "😀", None]


def test_line_separators_are_escaped() -> None:
    """U+2028, U+2029 and U+0085 end a line for some readers."""
    log = make_log([Delta(0, (1,), "a\u2028b\u2029c\u0085d\r\ne", "stop")])
    raw = stream(log)
    assert raw.isascii()
    assert [len(block.splitlines()) for block in raw.decode().split("\n\n")] == [2, 2, 2, 1, 0]
    assert events(raw)[1]["choices"][0]["delta"]["content"] == "a\u2028b\u2029c\u0085d\r\ne"


def logprob(token_id: int, value: float) -> TokenLogprob:
    return TokenLogprob(token_id, value, ((token_id, value), (66, -2.0)))


def test_log_probabilities_have_the_tokens_own_bytes() -> None:
    """Also of half characters, and of a token whose text is held back; what is impossible is -9999."""
    log = make_log([Delta(0, (240,), "", None, (logprob(240, -0.5),))],
                   [Delta(0, (65,), "A", "stop", (logprob(65, float("-inf")),))])
    first, second = [event["choices"][0] for event in events(stream(log, logprobs=True))[1:3]]
    assert first["delta"] == {"content": ""}
    assert first["logprobs"] == {"content": [{
        "token": "\ufffd", "logprob": -0.5, "bytes": [240], "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.5, "bytes": [240]}, {"token": "B", "logprob": -2.0, "bytes": [66]}]}],
        "refusal": None}
    assert second["logprobs"]["content"][0]["logprob"] == -9999.0
    whole = collect(log, logprobs=True)["choices"][0]["logprobs"]
    assert whole["content"] == first["logprobs"]["content"] + second["logprobs"]["content"]


def test_an_answer_that_fails_ends_with_a_nested_error_and_without_done() -> None:
    raw = stream(make_log([Delta(0, (72,), "H")], error="job_failed"))
    assert events(raw)[-1] == JobFailed().body()
    assert DONE not in raw
    with pytest.raises(DeadlineExceeded):
        collect(make_log(error="deadline_exceeded"))


def test_an_unknown_error_code_is_an_error_all_the_same() -> None:
    assert events(stream(make_log(error="of a newer version")))[-1] == JobFailed().body()


@st.composite
def logs(draw: st.DrawFn) -> tuple[int, list[Entry]]:
    """n, and a log in which each choice says some pieces in any interleaving, and ends once."""
    n = draw(st.integers(1, 3))
    pieces = [draw(st.lists(st.text(max_size=4), max_size=4)) for _ in range(n)]
    order = draw(st.permutations([index for index in range(n) for _ in range(len(pieces[index]) + 1)]))
    steps: list[list[Delta]] = []
    for index in order:
        left = pieces[index]
        text = left.pop(0) if left else None
        reason: FinishReason | None = draw(st.sampled_from(("stop", "length"))) if text is None else None
        delta = Delta(index, (65,), text or "", reason)
        if steps and all(other.index != index for other in steps[-1]) and draw(st.booleans()):
            steps[-1].append(delta)
        else:
            steps.append([delta])
    return n, make_log(*steps)


@given(answer=logs())
def test_streamed_and_joined_it_is_the_whole_answer(answer: tuple[int, list[Entry]]) -> None:
    """Text, finish reasons and usage; the events end with [DONE], once."""
    n, log = answer
    raw, whole = stream(log, n=n, include_usage=True), collect(log, n=n)
    assert raw.count(b"[DONE]") == 1
    *chunks, last = events(raw)
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c for event in chunks for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content") or "" for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        assert [c["delta"].get("role") for c in mine].count("assistant") == 1


@given(answer=logs(), data=st.data())
def test_two_pods_number_the_events_alike(answer: tuple[int, list[Entry]], data: st.DataObject) -> None:
    """A pod that reads the log again from its start says, from any entry on, what the first would have said."""
    n, log = answer
    fold = ChunkFold("chatcmpl-1", replace(HEADER, n=n), token_bytes)
    cut = data.draw(st.integers(0, len(log)))
    before = b"".join(map(fold.feed, log[:cut]))
    num_events = fold.num_events
    again = ChunkFold("chatcmpl-1", replace(HEADER, n=n), token_bytes)
    assert b"".join(map(again.feed, log[:cut])) == before
    assert again.num_events == num_events == len(events(before))
    assert before + b"".join(map(again.feed, log[cut:])) == stream(log, n=n)


CALLING = ["I look", ". ", "<tool", '_call>\n{"name": "f", "arguments": {"a"', ': 1}}\n</tool_call>\n<tool_call>',
           '{"name": "g", "arguments": {}}', "</tool_call>"]


def calling(reason: FinishReason) -> list[Entry]:
    deltas = [Delta(0, (i,), text) for i, text in enumerate(CALLING)]
    return make_log(*([delta] for delta in deltas), [Delta(0, (9,), "", reason)])


@pytest.mark.parametrize(("reason", "is_named", "expected"), [
    ("stop", False, "tool_calls"), ("stop", True, "stop"), ("length", False, "length")])
def test_calls_are_told_from_text(reason: FinishReason, is_named: bool, expected: str) -> None:
    """Streamed and whole are the same; an index, an id and a name come first, then pieces of arguments."""
    header: dict[str, Any] = {"tool_dialect": "hermes", "has_named_tool": is_named}
    said = [event["choices"][0] for event in events(stream(calling(reason), **header))]
    assert "".join(choice["delta"].get("content") or "" for choice in said) == "I look."
    assert [choice["finish_reason"] for choice in said if choice["finish_reason"]] == [expected]
    calls: dict[int, dict[str, Any]] = {}
    for call in (call for choice in said for call in choice["delta"].get("tool_calls", [])):
        if call["index"] in calls:
            assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        else:
            assert call["index"] == len(calls) and call["function"]["arguments"] == ""
            calls[call["index"]] = {key: value for key, value in call.items() if key != "index"}
    message = collect(calling(reason), **header)["choices"][0]
    assert message["message"] == {"role": "assistant", "content": "I look.", "refusal": None,
                                  "tool_calls": list(calls.values())}
    assert message["finish_reason"] == expected
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls.values()] == [
        ("f", '{"a": 1}'), ("g", "{}")]
    assert len({call["id"] for call in calls.values()}) == 2


def test_a_call_that_a_stop_string_cut_is_no_reason_to_end() -> None:
    for text, expected in (('{"a": 1}}</tool_call>', "tool_calls"), ('{"a": 1}', "tool_calls"), ('{"a": "', "stop"),
                           ('{"a": "b\\nc"}}', "tool_calls"), ('{"a": "b\tc"}}', "tool_calls")):
        log = make_log([Delta(0, (1,), f'<tool_call>{{"name": "f", "arguments": {text}')], [Delta(0, (2,), "", "stop")])
        [choice] = collect(log, tool_dialect="hermes")["choices"]
        assert choice["finish_reason"] == expected
        if expected == "tool_calls":
            assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
        assert events(stream(log, tool_dialect="hermes"))[-1]["choices"][0]["finish_reason"] == expected


def test_who_asked_with_functions_is_answered_with_one() -> None:
    header: dict[str, Any] = {"tool_dialect": "hermes", "has_functions": True}
    log = make_log([Delta(0, (1,), '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')],
                   [Delta(0, (2,), "", "stop")])
    (choice,) = collect(log, **header)["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None,
                                 "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    deltas = [event["choices"][0]["delta"] for event in events(stream(log, **header))]
    assert [delta["function_call"] for delta in deltas if "function_call" in delta] == [
        {"name": "f", "arguments": ""}, {"arguments": '{"a": 1}'}]


def test_who_asked_with_functions_is_told_of_the_first_call_only() -> None:
    header: dict[str, Any] = {"tool_dialect": "hermes", "has_functions": True}
    log = calling("stop")
    (choice,) = collect(log, **header)["choices"]
    calls = [event["choices"][0]["delta"].get("function_call", {}) for event in events(stream(log, **header))]
    assert {key: "".join(call.get(key, "") for call in calls) for key in ("name", "arguments")} == (
        choice["message"]["function_call"]) == {"name": "f", "arguments": '{"a": 1}'}


def test_text_without_calls_is_as_it_was_without_tools() -> None:
    assert stream(HI, tool_dialect="hermes") == stream(HI)
    assert collect(HI, tool_dialect="hermes") == collect(HI)
    spaced = make_log([Delta(0, (1,), " a <b> \n"), Delta(0, (2,), "", "stop")])
    assert collect(spaced, tool_dialect="hermes") == collect(spaced)


HARMONY = ["<|channel|>", "analysis", "<|message|>", "Hm", ".", "<|end|>", "<|start|>", "assistant", "<|channel|>",
           "commentary to=functions.f", " <|constrain|>json<|message|>", '{"a":', "1}"]


def test_harmonys_messages_are_told_apart_and_thoughts_counted() -> None:
    """Up to the token that ends them. Streamed and whole are the same."""
    log = make_log(*([Delta(0, (i,), text)] for i, text in enumerate(HARMONY)), [Delta(0, (99,), "", "stop")])
    header: dict[str, Any] = {"tool_dialect": "harmony", "think_end_id": 5, "fold_version": 3}
    whole = collect(log, **header)
    (choice,) = whole["choices"]
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}    # <|message|>, two, <|end|>
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == "Hm."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a":1}'}
    *chunks, last = events(stream(log, include_usage=True, **header))
    assert last["usage"] == whole["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == "Hm."
    called = [each["function"] for delta in deltas for each in delta.get("tool_calls", ())]
    assert "".join(each["arguments"] for each in called) == '{"a":1}'
    assert not any(delta.get("content") for delta in deltas)


def test_pods_of_other_releases_are_told_what_they_cannot_count() -> None:
    assert FOLD_VERSIONS == (1, 2, 3)
    cases: list[tuple[str, Mode, int]] = [("", "", 1), ("", "maybe", 2), ("hermes", "", 2), ("mistral", "open", 2),
                                          ("harmony", "", 3), ("deepseek", "maybe", 3)]
    for name, reasoning, version in cases:
        assert fold_version(DIALECTS.get(name), reasoning) == version
