"""The fold: how the entries of an answer's log become chat chunks, or one chat completion.

Pure and versioned (`Header.fold_version`): the same log gives the same events on every pod, so the ordinal of an event
is a client's position. The hot path joins bytes: a head made once per request and choice, the escaped text, a tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring_ascii as quote  # escapes U+2028, U+2029 and U+0085 too
from typing import Any

from api.wire.dialects import DIALECTS, CallReader, Dialect, Piece
from shared.errors import job_error
from shared.job import Delta, Entry, FinishReason, Header, TokenLogprob, Usage

FOLD_VERSIONS = (1, 2)                                  # 2: with calls of tools
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n"                           # one newline: a blank line after an `id:` breaks clients
MIN_LOGPROB = -9999.0                                   # OpenAI's word for "very unlikely"; -inf is not JSON

TokenBytes = Callable[[int], bytes]


def fold_version(dialect: Dialect | None) -> int:
    return FOLD_VERSIONS[dialect is not None]


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
        self._calls = [Calls(completion_id, header, index) for index in range(header.n)] if header.tool_dialect else []

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
        chunks, bodies, reason = [], [_content(delta.text)] if delta.text else [], delta.finish_reason
        if self._calls:
            calls = self._calls[delta.index]
            bodies, reason = list(calls.bodies(delta.text, reason)), calls.reason(reason)
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
            usage = Usage(self.header.num_prompt_tokens, entry.num_tokens, self._num_cached_tokens)
            tail = b',"usage":%b}' % _dump(usage_body(usage))
        return b'%b%b,"logprobs":%b,"finish_reason":%b}]%b' % (self._choice_heads[index], delta, logprobs, reason, tail)

    def _end(self, entry: Entry) -> bytes:
        finish, self.ended = entry.finish, True
        if finish.error:
            return self._event(_dump(job_error(finish.error).body()))    # nested, or clients take it for a chunk
        events = self._opening(entry)
        if self.header.include_usage:
            events += self._event(b'%b"choices":[],"usage":%b}' % (self._head, _dump(usage_body(finish.usage))))
        return events + DONE


class Calls:
    """The calls of tools in one choice's text."""

    def __init__(self, completion_id: str, header: Header, index: int) -> None:
        self.reader = CallReader(DIALECTS[header.tool_dialect])
        self.num_calls = 0
        self._name = f"{completion_id}/{index}"
        self._is_named = header.has_named_tool

    def next_id(self) -> str:
        """The same on every pod."""
        self.num_calls += 1
        return f"call_{hashlib.sha256(f'{self._name}/{self.num_calls}'.encode()).hexdigest()[:24]}"

    def bodies(self, text: str, reason: FinishReason | None) -> Iterator[bytes]:
        """The deltas that a piece of text makes."""
        for piece in self.reader.feed(text) + (self.reader.finish() if reason else []):
            yield _content(piece.value) if piece.kind == "text" else self._call(piece)

    def _call(self, piece: Piece) -> bytes:
        if piece.kind == "call":
            call = {"id": self.next_id(), "type": "function", "function": {"name": piece.value, "arguments": ""}}
            return _dump({"tool_calls": [{"index": self.num_calls - 1} | call]})
        return _dump({"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": piece.value}}]})

    def reason(self, reason: FinishReason | None) -> FinishReason | None:
        return "tool_calls" if reason == "stop" and self.num_calls and not self._is_named else reason

    def message(self, text: str) -> dict[str, Any]:
        """The whole."""
        content, calls = "", list[dict[str, Any]]()
        for piece in self.reader.feed(text) + self.reader.finish():
            if piece.kind == "text":
                content += piece.value
            elif piece.kind == "call":
                function = {"name": piece.value, "arguments": ""}
                calls.append({"id": self.next_id(), "type": "function", "function": function})
            else:
                calls[-1]["function"]["arguments"] += piece.value
        return {"role": "assistant", "content": content or None, "refusal": None, "tool_calls": calls} if calls else (
            _message(content))


class CompletionFold:
    """Folds a log into one `chat.completion` object."""

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes) -> None:
        self.header = header
        self.ended = False
        self._id = completion_id
        self._token_bytes = token_bytes
        self._texts: list[list[str]] = [[] for _ in range(header.n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(header.n)]
        self._reasons: list[FinishReason | None] = [None] * header.n
        self._usage = Usage(header.num_prompt_tokens, 0)

    def feed(self, entry: Entry) -> None:
        """Takes the next entry. Raises the JobEnded of a terminal that is none of success."""
        if entry.kind == "delta":
            for delta in entry.deltas:
                self._texts[delta.index].append(delta.text)
                self._logprobs[delta.index].extend(delta.logprobs)
                self._reasons[delta.index] = delta.finish_reason or self._reasons[delta.index]
        elif entry.kind == "end":
            self.ended = True
            if entry.finish.error:
                raise job_error(entry.finish.error)
            self._usage = entry.finish.usage

    def body(self) -> bytes:
        choices = [self._choice(index) for index in range(self.header.n)]
        tail = {"choices": choices, "usage": usage_body(self._usage)}
        return _head(self._id, "chat.completion", self.header).encode() + _dump(tail)[1:]

    def _choice(self, index: int) -> dict[str, Any]:
        logprobs = _logprobs(self._logprobs[index], self._token_bytes) if self.header.logprobs else None
        text, reason = "".join(self._texts[index]), self._reasons[index]
        message = _message(text)
        if self.header.tool_dialect:
            calls = Calls(self._id, self.header, index)
            message, reason = calls.message(text), calls.reason(reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


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
