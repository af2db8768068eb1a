"""The judge: compares what clients received with the logs, and reports every broken promise in one line.

Pure: it is given transcripts, log entries and what Redis still holds, and compares them with uninterrupted answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.job import Entry
from tests.chaos.clients import Transcript
from tests.chaos.languages import DONE, Said

Rows = Sequence[tuple[str, Mapping[str, str]]]          # of one log: (entry id, fields)


@dataclass(frozen=True, slots=True)
class Answer:
    """What must be the same, whatever faults occurred. Cached tokens depend on the worker."""

    texts: tuple[str, ...]
    reasons: tuple[str | None, ...]
    logprobs: tuple[str, ...]                           # JSON
    num_prompt_tokens: int
    num_completion_tokens: int


def answer_of(transcript: Transcript) -> Answer:
    n = transcript.ask.num_choices
    texts, logprobs = [""] * n, [[] for _ in range(n)]  # type: ignore[var-annotated]
    reasons: list[str | None] = [None] * n
    usage = (-1, -1)
    for said in _said(transcript):
        usage = said.usage or usage
        for part in said.parts:
            texts[part.index] += part.text
            reasons[part.index] = part.reason or reasons[part.index]
            logprobs[part.index] += part.logprobs
    return Answer(tuple(texts), tuple(reasons), tuple(map(json.dumps, logprobs)), *usage)


def _said(transcript: Transcript) -> list[Said]:
    return [transcript.language.read(json.loads(event.data)) for event in transcript.events if event.data != DONE]


def check(transcripts: Sequence[Transcript], logs: Mapping[str, Rows], uninterrupted: Mapping[str, Answer],
          leftovers: Mapping[str, object]) -> list[str]:
    """Every violation. `leftovers`: by name, what must be empty when no job lives."""
    found = [f"{transcript}: {violation}" for transcript in transcripts
             for violation in _transcript(transcript, logs.get(transcript.id, ()), uninterrupted)]
    found += [f"log of {completion_id}: {violation}" for completion_id, rows in logs.items()
              for violation in check_log(rows)]
    return found + [f"left behind: {name}: {value}" for name, value in leftovers.items() if value]


def _transcript(transcript: Transcript, rows: Rows, uninterrupted: Mapping[str, Answer]) -> Iterator[str]:
    if not transcript.done:
        yield f"P1 no end: {transcript.failure or 'it was left open'}"
        return
    answer, right = answer_of(transcript), uninterrupted.get(transcript.ask.name)
    yield from _once(transcript)
    yield from _constant(transcript)
    yield from _ordinals(transcript)
    if right:
        yield from (f"P2 {name} of the uninterrupted answer: {_difference(getattr(answer, name), getattr(right, name))}"
                    for name in Answer.__slots__ if getattr(answer, name) != getattr(right, name))
    if transcript.ask.counts:
        yield from (f"P2 choice {index} does not count right: {_difference(text, transcript.ask.counts)}"
                    for index, text in enumerate(answer.texts) if text != transcript.ask.counts)
    yield from (f"P2 said once more it is another text: {_difference(said.whole, answer.texts[0])}"
                for said in _said(transcript) if said.whole is not None and said.whole != answer.texts[0])
    ends = [json.loads(fields["data"]) for _, fields in rows if fields["kind"] == "end"]
    if not ends:
        yield "P1 it has an end, and its log no terminal"
    elif ends[0].get("error"):
        yield f"P1 it has an end, and its log ends with {ends[0]['error']}"
    elif ends[0]["usage"]["num_completion_tokens"] != answer.num_completion_tokens:
        yield f"P3 usage says {answer.num_completion_tokens} tokens, the terminal {ends[0]['usage']}"


def _once(transcript: Transcript) -> Iterator[str]:
    told = _said(transcript)
    if (num_ends := sum(event.data.startswith(transcript.language.ends) for event in transcript.events)) != 1:
        yield f"P3 {num_ends} ends"
    if (num_usage := sum(bool(said.usage) for said in told)) != 1:
        yield f"P3 {num_usage} usage events"
    for index in range(transcript.ask.num_choices):
        reasons = [part.reason for said in told for part in said.parts if part.index == index and part.reason]
        if len(reasons) != 1:
            yield f"P3 choice {index} has the finish reasons {reasons}"


def _constant(transcript: Transcript) -> Iterator[str]:
    heads = [said.head for said in _said(transcript) if said.head] or [{}]
    for name in heads[0]:
        values = {head[name] for head in heads}
        if len(values) != 1:
            yield f"P4 {name} changes: {sorted(map(str, values))}"
    if heads[0].get("id") != transcript.id:
        yield f"P4 the events are of {heads[0].get('id')}"


def _ordinals(transcript: Transcript) -> Iterator[str]:
    last = transcript.language.first - 1
    for event in transcript.events:
        if event.data == DONE:
            continue
        if event.ordinal != last + 1:
            yield f"P4 event {event.ordinal} follows {last}"
        if (number := json.loads(event.data).get("sequence_number", event.ordinal)) != event.ordinal:
            yield f"P4 event {event.ordinal} says that it is {number}"
        last = last if event.ordinal is None else event.ordinal


def check_log(rows: Rows) -> Iterator[str]:
    """P1: one terminal, the last. P3: tokens add up. P5: positions are dense, no epoch writes after its successor."""
    position, num_tokens, epoch, fenced = -1, 0, -1, 0
    ended = False
    for entry_id, fields in rows:
        entry = _entry(entry_id, fields)
        if ended:
            yield f"P3 {entry_id} {entry.kind} stands behind the terminal"
        if entry.epoch < epoch:
            yield f"P5 epoch goes back from {epoch} to {entry.epoch} at {entry_id}"
        epoch = max(epoch, entry.epoch)
        if entry.kind == "fence":
            fenced = max(fenced, entry.epoch)
            if (entry.position, entry.num_tokens) != (position, num_tokens):
                yield f"P5 fence {entry_id} says position {entry.position}, the log has {position}"
            continue
        if entry.position != position + 1:
            yield f"P5 position {entry.position} follows {position} at {entry_id}"
        position = entry.position
        if entry.kind == "delta":
            if entry.epoch != fenced:
                yield f"P5 delta {entry_id} of an epoch that does not hold the job: the fence is {fenced}"
            num_tokens += sum(len(delta.token_ids) for delta in entry.deltas)
        if entry.num_tokens != num_tokens:
            yield f"P3 {entry_id} says {entry.num_tokens} tokens, the log holds {num_tokens}"
        if entry.kind == "end":
            ended = True
            if entry.finish.usage.num_completion_tokens != num_tokens:
                yield f"P3 usage says {entry.finish.usage.num_completion_tokens} tokens, the log holds {num_tokens}"
            if entry.finish.error and entry.finish.error != "cancelled":
                yield f"P1 ended with {entry.finish.error}"
    if not ended:
        yield f"P1 no terminal; the last entry is {rows[-1][0] if rows else 'none'}"


def _entry(entry_id: str, fields: Mapping[str, str]) -> Entry:
    kind: Any = fields["kind"]
    return Entry(int(entry_id.partition("-")[0]), int(fields["position"]), int(fields["tokens"]), kind, fields["data"])


def _difference(got: object, right: object) -> str:
    """Where two values differ, in a few words."""
    got, right = str(got), str(right)
    at = next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), min(len(got), len(right)))
    return f"{got[max(at - 12, 0):at + 12]!r} and not {right[max(at - 12, 0):at + 12]!r} at character {at}"
