"""The answers of `/v1/chat/completions`: chunks of a stream, or one chat completion.

The hot path joins bytes: a head made once per request and choice, the escaped text, a tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring_ascii as quote  # escapes U+2028, U+2029 and U+0085 too
from typing import Any

from api.wire.fold import DONE, EventFold, TokenBytes, WholeFold, dump, head, usage_body
from api.wire.parts import Parts, has_parts, with_reasoning
from shared.job import Delta, Entry, FinishReason, Header, TokenLogprob, Usage

MIN_LOGPROB = -9999.0                                   # OpenAI's value for "very unlikely"; -inf is not JSON


class ChunkFold(EventFold):
    """About 2 µs per delta of one token, plus 5 µs to parse its push: `python -m tests.bench.fold`."""

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes, after: int = 0) -> None:
        super().__init__(header, after)
        self._token_bytes = token_bytes
        self._role_sent = False
        self._num_cached_tokens = 0
        beginning = _head(completion_id, "chat.completion.chunk", header)
        self._head = beginning.encode()
        self._choice_heads = [f'{beginning}"choices":[{{"index":{index},"delta":'.encode() for index in range(header.n)]
        self._tail = b',"usage":null}' if header.include_usage else b"}"
        self._parts = [Parts(completion_id, header, index) for index in range(header.n)] if has_parts(header) else []

    def feed(self, entry: Entry) -> bytes:
        if entry.kind == "delta":
            deltas = entry.deltas
            self._num_cached_tokens = max([self._num_cached_tokens, *(d.num_cached_tokens for d in deltas)])
            return self._opening(entry) + b"".join(
                self._event(body) for delta in deltas for body in self._delta(delta, entry))
        if entry.kind == "end":
            return self._end(entry)
        return b""

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
            bodies = list(self._bodies(parts, delta))
            reason = _reason(parts, delta.finish_reason, self.header)
        if delta.logprobs and not bodies:
            bodies = [_content("")]
        for number, body in enumerate(bodies):
            has_logprobs = delta.logprobs and not number
            logprobs = dump(_logprobs(delta.logprobs, self._token_bytes)) if has_logprobs else b"null"
            chunks.append(self._chunk(delta.index, body, logprobs, b"null", entry))
        if reason:
            chunks.append(self._chunk(delta.index, b"{}", b"null", quote(reason).encode(), entry))
        return chunks

    def _bodies(self, parts: Parts, delta: Delta) -> Iterator[bytes]:
        """The `delta` objects of its events."""
        for piece in parts.read(delta):
            if parts.num_calls > 1 and self.header.has_functions and piece.kind in ("call", "arguments"):
                yield b"{}"                             # only tool_calls have room for a second call
            elif piece.kind == "text":
                yield _content(piece.value)
            elif piece.kind == "reasoning":
                yield b'{"reasoning_content":%b,"reasoning":%b}' % ((quote(piece.value).encode(),) * 2)
            elif piece.kind == "call":
                call = {"id": parts.call_id, "type": "function", "function": {"name": piece.value, "arguments": ""}}
                yield self._call_body({"index": parts.num_calls - 1} | call)
            else:
                yield self._call_body({"index": parts.num_calls - 1, "function": {"arguments": piece.value}})

    def _call_body(self, call: dict[str, Any]) -> bytes:
        return dump({"function_call": call["function"]} if self.header.has_functions else {"tool_calls": [call]})

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, reason: bytes, entry: Entry) -> bytes:
        tail = self._tail
        if self.header.continuous_usage:
            usage = Usage(self.header.num_prompt_tokens, entry.num_tokens, self._num_cached_tokens,
                          sum(parts.num_reasoning_tokens for parts in self._parts))
            tail = b',"usage":%b}' % dump(usage_body(usage))
        return b'%b%b,"logprobs":%b,"finish_reason":%b}]%b' % (self._choice_heads[index], delta, logprobs, reason, tail)

    def _end(self, entry: Entry) -> bytes:
        finish = entry.finish
        if finish.error:
            return self._failure(finish.error)
        self.ended = True
        events = self._opening(entry)
        if self.header.include_usage:
            usage = with_reasoning(finish.usage, self._parts)
            events += self._event(b'%b"choices":[],"usage":%b}' % (self._head, dump(usage_body(usage))))
        return events + DONE


class CompletionFold(WholeFold):
    """Folds a log into one `chat.completion` object."""

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes) -> None:
        super().__init__(completion_id, header)
        self._token_bytes = token_bytes

    def body(self) -> bytes:
        parts = [Parts(self.id, self.header, index) for index in range(self.header.n)]
        choices = [self._choice(index, parts[index]) for index in range(self.header.n)]
        tail = {"choices": choices, "usage": usage_body(with_reasoning(self.usage, parts))}
        return _head(self.id, "chat.completion", self.header).encode() + dump(tail)[1:]

    def _choice(self, index: int, parts: Parts) -> dict[str, Any]:
        deltas = self.deltas[index]
        entries = [entry for delta in deltas for entry in delta.logprobs]
        logprobs = _logprobs(entries, self._token_bytes) if self.header.logprobs else None
        message, reason = self._message(parts, deltas), deltas[-1].finish_reason if deltas else None
        return {"index": index, "message": message, "logprobs": logprobs,
                "finish_reason": _reason(parts, reason, self.header)}

    def _message(self, parts: Parts, deltas: Sequence[Delta]) -> dict[str, Any]:
        said = parts.whole(deltas)
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.calls:
            calls = [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                     for call in said.calls]
            message["content"] = said.text or None
            message |= {"function_call": calls[0]["function"]} if self.header.has_functions else {"tool_calls": calls}
        if said.reasoning:
            message |= {"reasoning_content": said.reasoning, "reasoning": said.reasoning}
        return message


def _reason(parts: Parts, reason: FinishReason | None, header: Header) -> str | None:
    told = parts.reason(reason)
    return "function_call" if told == "tool_calls" and header.has_functions else told


def _content(text: str) -> bytes:
    return b'{"content":%b}' % quote(text).encode()


def _head(completion_id: str, kind: str, header: Header) -> str:
    return head(completion_id, kind, header, service_tier="default")


def _logprobs(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    return {"content": logprobs_body(entries, token_bytes), "refusal": None}


def logprobs_body(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[dict[str, Any]]:
    return [_logprob(entry.token_id, entry.logprob, token_bytes)
            | {"top_logprobs": [_logprob(*candidate, token_bytes) for candidate in entry.top]} for entry in entries]


def _logprob(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    raw = token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}
