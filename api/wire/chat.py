"""The fold: how the entries of an answer's log become chat chunks, or one chat completion.

Pure and versioned (`Header.fold_version`): the same log gives the same events on every pod, so the ordinal of an event
is a client's position. The hot path joins bytes: a head made once per request and choice, the escaped text, a tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from json.encoder import encode_basestring_ascii as quote  # escapes U+2028, U+2029 and U+0085 too
from typing import Any

from api.wire.dialects import DIALECTS, Dialect, Piece
from api.wire.reasoning import Mode, ThoughtReader
from shared.errors import job_error
from shared.job import Delta, Entry, FinishReason, Header, TokenLogprob, Usage

FOLD_VERSIONS = (1, 2, 3)                               # 2: with thoughts and calls of tools; 3: in more dialects
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n"                           # one newline: a blank line after an `id:` breaks clients
MIN_LOGPROB = -9999.0                                   # OpenAI's word for "very unlikely"; -inf is not JSON

TokenBytes = Callable[[int], bytes]


def fold_version(dialect: Dialect | None, reasoning: Mode) -> int:
    return max(dialect.fold_version if dialect else 1, 2 if reasoning else 1)


class ChunkFold:
    """Folds a log into the events of a stream, as bytes ready to send.

    A client that returns names the last event that it has, `after`: up to it events are counted and not said again.
    About 2 µs per delta of one token, after 5 to read it from a push: `python -m tests.bench.fold`.
    """

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes, after: int = 0) -> None:
        self.header = header
        self.after = after
        self.num_events = 0
        self.ended = False                              # the terminal was folded: nothing follows
        self._token_bytes = token_bytes
        self._role_sent = False
        self._num_cached_tokens = 0
        head = _head(completion_id, "chat.completion.chunk", header)
        self._head = head.encode()
        self._choice_heads = [f'{head}"choices":[{{"index":{index},"delta":'.encode() for index in range(header.n)]
        self._tail = b',"usage":null}' if header.include_usage else b"}"
        self._parts = [Parts(completion_id, header, index) for index in range(header.n)] if _has_parts(header) else []

    def feed(self, entry: Entry) -> bytes:
        """The events of the next entry: none, one or several."""
        if entry.kind == "delta":
            deltas = entry.deltas
            self._num_cached_tokens = max([self._num_cached_tokens, *(d.num_cached_tokens for d in deltas)])
            return self._opening(entry) + b"".join(
                self._event(body) for delta in deltas for body in self._delta(delta, entry))
        if entry.kind == "end":
            return self._end(entry)
        return b""

    def error(self, body: dict[str, Any]) -> bytes:
        """An error that stands in no log, as the last event. Without a position: the client may return to its own."""
        return b"data: %b\n\n" % _dump(body)

    def _event(self, body: bytes) -> bytes:
        self.num_events += 1
        if self.num_events <= self.after:
            return b""
        return b"id: %d\ndata: %b\n\n" % (self.num_events, body)

    def _opening(self, entry: Entry) -> bytes:
        """The role chunks, once, in the order of the choices."""
        if self._role_sent:
            return b""
        self._role_sent = True
        delta = b'{"role":"assistant","content":"","refusal":null}'
        chunks = (self._chunk(index, delta, b"null", b"null", entry) for index in range(self.header.n))
        return b"".join(map(self._event, chunks))

    def _delta(self, delta: Delta, entry: Entry) -> list[bytes]:
        chunks, bodies = [], [_content(delta.text)] if delta.text else []
        reason: str | None = delta.finish_reason
        if self._parts:
            parts = self._parts[delta.index]
            bodies, reason = list(parts.bodies(delta)), parts.reason(delta.finish_reason)
        if delta.logprobs and not bodies:
            bodies = [_content("")]
        for number, body in enumerate(bodies):
            has_logprobs = delta.logprobs and not number
            logprobs = _dump(_logprobs(delta.logprobs, self._token_bytes)) if has_logprobs else b"null"
            chunks.append(self._chunk(delta.index, body, logprobs, b"null", entry))
        if reason:
            chunks.append(self._chunk(delta.index, b"{}", b"null", quote(reason).encode(), entry))
        return chunks

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, reason: bytes, entry: Entry) -> bytes:
        tail = self._tail
        if self.header.continuous_usage:
            usage = Usage(self.header.num_prompt_tokens, entry.num_tokens, self._num_cached_tokens,
                          sum(parts.num_reasoning_tokens for parts in self._parts))
            tail = b',"usage":%b}' % _dump(usage_body(usage))
        return b'%b%b,"logprobs":%b,"finish_reason":%b}]%b' % (self._choice_heads[index], delta, logprobs, reason, tail)

    def _end(self, entry: Entry) -> bytes:
        finish, self.ended = entry.finish, True
        if finish.error:
            return self._event(_dump(job_error(finish.error).body()))    # nested, or clients take it for a chunk
        events = self._opening(entry)
        if self.header.include_usage:
            usage = _with_reasoning(finish.usage, self._parts)
            events += self._event(b'%b"choices":[],"usage":%b}' % (self._head, _dump(usage_body(usage))))
        return events + DONE


class Parts:
    """One choice's text: what was thought, what is said, and which tools are called."""

    def __init__(self, completion_id: str, header: Header, index: int) -> None:
        self.num_reasoning_tokens = 0
        self._name = f"{completion_id}/{index}"
        self._is_named, self._has_functions = header.has_named_tool, header.has_functions
        self._end_id = header.think_end_id
        self._thoughts = ThoughtReader(header.reasoning)
        self._calls = DIALECTS[header.tool_dialect].reader_of(header.typed_arguments) if header.tool_dialect else None
        self._num_calls = 0

    def read(self, delta: Delta) -> list[Piece]:
        """What the next delta turns out to say."""
        was_inside = self._is_inside
        thoughts = self._thoughts.feed(delta.text) + (self._thoughts.finish() if delta.finish_reason else [])
        pieces: list[Piece] = []
        for is_reasoning, text in thoughts:
            if is_reasoning or self._calls is None:
                pieces.append(Piece("reasoning" if is_reasoning else "text", text))
            else:
                pieces += self._calls.feed(text)
        if delta.finish_reason and self._calls is not None:
            pieces += self._calls.finish()
        if was_inside or any(piece.kind == "reasoning" for piece in pieces) or self._is_inside:
            self.num_reasoning_tokens += self._num_thought(delta.token_ids)
        return pieces

    @property
    def _is_inside(self) -> bool:
        """A thought."""
        return self._thoughts.is_inside or (self._calls is not None and self._calls.is_inside)

    def _num_thought(self, token_ids: Sequence[int]) -> int:
        """Up to the token that ends the thought."""
        if self._end_id is not None and self._end_id in token_ids:
            return token_ids.index(self._end_id) + 1
        return len(token_ids) if self._is_inside else 0

    def bodies(self, delta: Delta) -> Iterator[bytes]:
        """The deltas of its events."""
        for piece in self.read(delta):
            if piece.kind == "text":
                yield _content(piece.value)
            elif piece.kind == "reasoning":
                yield b'{"reasoning_content":%b,"reasoning":%b}' % ((quote(piece.value).encode(),) * 2)
            elif piece.kind == "call":
                call = self._new_call(piece.value)
                yield self._call_body({"index": self._num_calls - 1} | call)
            else:
                yield self._call_body({"index": self._num_calls - 1, "function": {"arguments": piece.value}})

    def _call_body(self, call: dict[str, Any]) -> bytes:
        return _dump({"function_call": call["function"]} if self._has_functions else {"tool_calls": [call]})

    def _new_call(self, name: str) -> dict[str, Any]:
        """With an id that is the same on every pod."""
        self._num_calls += 1
        digest = hashlib.sha256(f"{self._name}/{self._num_calls}".encode()).hexdigest()
        return {"id": f"call_{digest[:24]}", "type": "function", "function": {"name": name, "arguments": ""}}

    def reason(self, reason: FinishReason | None) -> str | None:
        if reason != "stop" or not self._num_calls or self._is_named:
            return reason
        return "function_call" if self._has_functions else "tool_calls"

    def message(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The whole."""
        texts, calls = {"text": "", "reasoning": ""}, list[dict[str, Any]]()
        for piece in (piece for delta in deltas for piece in self.read(delta)):
            if piece.kind == "call":
                calls.append(self._new_call(piece.value))
            elif piece.kind == "arguments":
                calls[-1]["function"]["arguments"] += piece.value
            else:
                texts[piece.kind] += piece.value
        message = _message(texts["text"])
        if calls:
            called = {"function_call": calls[0]["function"]} if self._has_functions else {"tool_calls": calls}
            message |= {"content": texts["text"] or None} | called
        if texts["reasoning"]:
            message |= {"reasoning_content": texts["reasoning"], "reasoning": texts["reasoning"]}
        return message


def _has_parts(header: Header) -> bool:
    return bool(header.reasoning or header.tool_dialect)


def _with_reasoning(usage: Usage, parts: Sequence[Parts]) -> Usage:
    return replace(usage, num_reasoning_tokens=sum(each.num_reasoning_tokens for each in parts)) if parts else usage


class CompletionFold:
    """Folds a log into one `chat.completion` object."""

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes) -> None:
        self.header = header
        self.ended = False
        self._id = completion_id
        self._token_bytes = token_bytes
        self._deltas: list[list[Delta]] = [[] for _ in range(header.n)]
        self._usage = Usage(header.num_prompt_tokens, 0)

    def feed(self, entry: Entry) -> None:
        """Takes the next entry. Raises the JobEnded of a terminal that is none of success."""
        if entry.kind == "delta":
            for delta in entry.deltas:
                self._deltas[delta.index].append(delta)
        elif entry.kind == "end":
            self.ended = True
            if entry.finish.error:
                raise job_error(entry.finish.error)
            self._usage = entry.finish.usage

    def body(self) -> bytes:
        parts = [Parts(self._id, self.header, index) for index in range(self.header.n)]
        choices = [self._choice(index, parts[index]) for index in range(self.header.n)]
        tail = {"choices": choices, "usage": usage_body(_with_reasoning(self._usage, parts))}
        return _head(self._id, "chat.completion", self.header).encode() + _dump(tail)[1:]

    def _choice(self, index: int, parts: Parts) -> dict[str, Any]:
        deltas = self._deltas[index]
        entries = [entry for delta in deltas for entry in delta.logprobs]
        logprobs = _logprobs(entries, self._token_bytes) if self.header.logprobs else None
        message, reason = parts.message(deltas), deltas[-1].finish_reason if deltas else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": parts.reason(reason)}


def _message(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "refusal": None}


def _content(text: str) -> bytes:
    return b'{"content":%b}' % quote(text).encode()


def _head(completion_id: str, kind: str, header: Header) -> str:
    """The beginning that all chunks of an answer share, up to the comma before `choices`."""
    head = {"id": completion_id, "object": kind, "created": header.created_s, "model": header.model,
            "service_tier": "default", "system_fingerprint": header.fingerprint}
    return _dump(head).decode()[:-1] + ","


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def usage_body(usage: Usage) -> dict[str, Any]:
    return {"prompt_tokens": usage.num_prompt_tokens, "completion_tokens": usage.num_completion_tokens,
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens}}


def _logprobs(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    content = [_logprob(entry.token_id, entry.logprob, token_bytes)
               | {"top_logprobs": [_logprob(*candidate, token_bytes) for candidate in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _logprob(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    raw = token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}
