"""The judge is tested: each broken promise, put into a correct answer, is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.job import Delta, Finish, Header, Usage, encode_deltas
from tests.chaos.asks import ASKS, count
from tests.chaos.checker import Rows, answer_of, check
from tests.chaos.clients import Connection, Event, EventParser, Transcript
from tests.chaos.languages import BACKGROUND, DONE, MESSAGES, RESPONSES, Language

ID = "chatcmpl-s-0-1"
ASK = count(1, 2)


def promise_of(parameter: object) -> str:
    return parameter if isinstance(parameter, str) else "spoilt"


def row(entry_id: str, position: int, num_tokens: int, kind: str, data: str) -> tuple[str, dict[str, str]]:
    return entry_id, {"position": str(position), "tokens": str(num_tokens), "kind": kind, "data": data}


def delta(entry_id: str, position: int, num_tokens: int, text: str) -> tuple[str, dict[str, str]]:
    return row(entry_id, position, num_tokens, "delta", encode_deltas([Delta(0, (7,), text)]))


HEADER = Header("m", 1, "fp", 1, 1, 3).encode()
END = Finish(Usage(3, 2)).encode()
LOG = [row("0-1", 0, 0, "header", HEADER), row("1-0", 0, 0, "fence", '"w1"'), delta("1-1", 1, 1, "1, "),
       row("2-0", 1, 1, "fence", '"queued"'), row("3-0", 1, 1, "fence", '"w2"'), delta("3-2", 2, 2, "2"),
       row("3-3", 3, 2, "end", END)]


def chunk(ordinal: int, text: str = "", reason: str | None = None, **head: object) -> Event:
    body = {"id": ID, "created": 1, "model": "m", "system_fingerprint": "fp", "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}],
            "usage": None}
    return Event(0.0, ordinal, json.dumps(body | head).encode())


USAGE = chunk(4, choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})
EVENTS = [chunk(1, "1, "), chunk(2, "2"), chunk(3, reason="stop"), USAGE, Event(0.0, None, DONE)]


def transcript(events: list[Event] = EVENTS) -> Transcript:
    return Transcript(ASK, id=ID, events=events, connections=[Connection("http://pod", 0.0)])


RIGHT = {ASK.name: answer_of(transcript())}


def test_an_answer_that_keeps_its_promises_is_not_accused() -> None:
    assert check([transcript()], {ID: LOG}, RIGHT, {"jobs": 0, "held": []}) == []


@pytest.mark.parametrize(("promise", "spoil"), [
    ("P1 no end", lambda events: events[:-1]),
    ("P2 texts of the uninterrupted answer", lambda events: [events[0], chunk(2, "3"), *events[2:]]),
    ("P2 choice 0 does not count right", lambda events: [events[0], chunk(2, "2, 3"), *events[2:]]),
    ("P2 reasons of the uninterrupted answer", lambda events: [*events[:2], chunk(3, reason="length"), *events[3:]]),
    ("P2 logprobs of the uninterrupted answer", lambda events: [chunk(1, choices=[{
        "index": 0, "delta": {"content": "1, "}, "logprobs": {"content": [{"token": "1"}]}, "finish_reason": None}]),
        *events[1:]]),
    ("P3 2 ends", lambda events: [*events, events[-1]]),
    ("P3 0 usage events", lambda events: [*events[:3], events[-1]]),
    ("P3 2 usage events", lambda events: [*events[:4], replace(USAGE, ordinal=5), events[-1]]),
    ("P3 choice 0 has the finish reasons ['stop', 'stop']",
     lambda events: [*events[:3], chunk(4, reason="stop"), replace(USAGE, ordinal=5), events[-1]]),
    ("P3 usage says 3 tokens", lambda events: [*events[:3], chunk(4, choices=[], usage={
        "prompt_tokens": 3, "completion_tokens": 3}), events[-1]]),
    ("P4 created changes", lambda events: [events[0], chunk(2, "2", created=2), *events[2:]]),
    ("P4 system_fingerprint changes", lambda events: [events[0], chunk(2, "2", system_fingerprint="x"), *events[2:]]),
    ("P4 the events are of another", lambda events: [replace(e, data=e.data.replace(ID.encode(), b"another"))
                                                     for e in events]),
    ("P4 event 3 follows 1", lambda events: [events[0], *events[2:]]),
    ("P4 event 2 follows 2", lambda events: [*events[:2], events[1], *events[2:]]),
], ids=promise_of)
def test_what_a_client_must_not_be_told_is_named(promise: str, spoil: Callable[[list[Event]], list[Event]]) -> None:
    assert any(promise in found for found in check([transcript(spoil(EVENTS))], {ID: LOG}, RIGHT, {}))


# ── in other languages ──

def event(number: int, kind: str, **fields: object) -> Event:
    return Event(0.0, number, json.dumps({"type": kind} | fields, separators=(",", ":")).encode())


def response(number: int, kind: str, text: str = "", **fields: object) -> Event:
    """An event that contains the whole response."""
    body = {"id": ID, "created_at": 1, "model": "m", "object": "response", "status": "in_progress", "usage": None,
            "output": [{"content": [{"text": text}]}]}
    return event(number, kind, sequence_number=number, response=body | fields)


def text_delta(number: int, text: str) -> Event:
    return event(number, "response.output_text.delta", sequence_number=number, delta=text, logprobs=[])


COMPLETED = response(3, "response.completed", "1, 2", status="completed", usage={"input_tokens": 3, "output_tokens": 2})
RESPONSE = [response(0, "response.created"), text_delta(1, "1, "), text_delta(2, "2"), COMPLETED]
BLOCKS = [event(2, "content_block_delta", delta={"text": "1, "}), event(3, "content_block_delta", delta={"text": "2"})]
MESSAGE = [event(1, "message_start", message={"id": ID, "model": "m", "role": "assistant"}), *BLOCKS,
           event(4, "message_delta", delta={"stop_reason": "end_turn"},
                 usage={"input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 2}),
           event(5, "message_stop")]


def found_in(events: list[Event], language: Language) -> list[str]:
    told = Transcript(replace(ASK, language=language), id=ID, events=events)
    return check([told], {ID: LOG}, {}, {})


@pytest.mark.parametrize(("language", "events"), [(RESPONSES, RESPONSE), (BACKGROUND, RESPONSE[1:]),
                                                  (MESSAGES, MESSAGE)], ids=["responses", "background", "messages"])
def test_in_other_languages_the_innocent_is_acquitted_too(language: Language, events: list[Event]) -> None:
    """And an answer with a missing, repeated or absent last event is not."""
    assert found_in(events, language) == []
    for place in range(len(events)):
        assert found_in(events[:place] + events[place + 1:], language), events[place]
        assert found_in(events[:place] + [events[place]] * 2 + events[place + 1:], language), events[place]


@pytest.mark.parametrize(("promise", "events"), [
    ("P2 choice 0 does not count right", [*RESPONSE[:2], text_delta(2, "3"), COMPLETED]),
    ("P2 said once more it is another text", [*RESPONSE[:3], replace(COMPLETED, data=COMPLETED.data.replace(
        b"1, 2", b"1, 3"))]),
    ("P4 model changes", [*RESPONSE[:3], replace(COMPLETED, data=COMPLETED.data.replace(b'"m"', b'"n"'))]),
    ("P4 event 2 says that it is 7", [*RESPONSE[:2], replace(text_delta(7, "2"), ordinal=2), COMPLETED]),
    ("P1 no end", [*RESPONSE[:3], response(3, "response.failed")]),
], ids=promise_of)
def test_what_a_response_must_not_say_is_named(promise: str, events: list[Event]) -> None:
    assert any(promise in found for found in found_in(events, RESPONSES))


@pytest.mark.parametrize(("promise", "spoil"), [
    ("P1 no terminal", lambda log: log[:-1]),
    ("P1 ended with job_failed", lambda log: [*log[:-1], row("4-3", 3, 2, "end", Finish(
        Usage(3, 2), "job_failed").encode())]),
    ("P3 4-4 end stands behind the terminal", lambda log: [*log, row("4-4", 4, 2, "end", END)]),
    ("P3 3-2 says 2 tokens, the log holds 1", lambda log: [*log[:5], row("3-2", 2, 2, "delta", "[]"), log[-1]]),
    ("P3 usage says 9 tokens", lambda log: [*log[:-1], row("3-3", 3, 2, "end", Finish(Usage(3, 9)).encode())]),
    ("P5 position 2 follows 0", lambda log: [*log[:2], *log[3:]]),
    ("P5 position 1 follows 1", lambda log: [*log[:3], delta("1-2", 1, 2, "1, "), *log[3:]]),
    ("P5 epoch goes back from 3 to 1", lambda log: [*log[:5], delta("1-2", 2, 2, "2"), log[-1]]),
    ("P5 delta 1-2 of an epoch that does not hold the job: the fence is 3",
     lambda log: [*log[:5], delta("1-2", 2, 2, "2"), log[-1]]),
    ("P5 delta 4-2 of an epoch that does not hold the job", lambda log: [*log[:5], delta("4-2", 2, 2, "2"), log[-1]]),
    ("P5 fence 3-0 says position 2", lambda log: [*log[:4], row("3-0", 2, 1, "fence", '"w2"'), *log[5:]]),
], ids=promise_of)
def test_what_a_log_must_not_hold_is_named(promise: str, spoil: Callable[[Rows], Rows]) -> None:
    assert any(promise in found for found in check([transcript()], {ID: spoil(LOG)}, RIGHT, {}))


def test_a_client_that_gave_up_and_what_is_left_behind_are_named() -> None:
    given_up = transcript(EVENTS[:2])
    given_up.failure = "no end within 60 s"
    found = check([given_up], {ID: LOG}, RIGHT, {"jobs": 1, "ready": 0, "held": ["w1"]})
    assert any("P1 no end: no end within 60 s" in violation for violation in found)
    assert found[-2:] == ["left behind: jobs: 1", "left behind: held: ['w1']"]


def test_an_answer_without_its_log_is_named() -> None:
    assert any("its log no terminal" in found for found in check([transcript()], {}, RIGHT, {}))


def test_asks_are_told_apart_by_their_names() -> None:
    assert len({ask.name for ask in ASKS}) == len(ASKS)


def test_events_are_read_whatever_the_pieces() -> None:
    """Heartbeats end with one newline, and an event may be cut anywhere."""
    raw = b'id: 1\ndata: {"a": 1}\n\n: keep-alive\nid: 2\ndata: {}\n\n: keep-alive\ndata: [DONE]\n\n'
    for size in range(1, len(raw) + 1):
        parse = EventParser()
        events = [event for i in range(0, len(raw), size) for event in parse.feed(raw[i:i + size])]
        assert events == [(1, b'{"a": 1}'), (2, b"{}"), (None, DONE)]
