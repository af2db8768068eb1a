"""The answers of `/v1/messages`: Anthropic's events of a stream, one message, or an error.

An answer is a list of blocks: reasoning, text, tool calls, in the order in which they were written. It knows one
choice, as Anthropic's API has no more, and nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from api.wire.body import read_object
from api.wire.dialects import Piece
from api.wire.fold import EventFold, WholeFold, dump
from api.wire.parts import Parts, with_reasoning
from shared.errors import APIError, BadRequest, ContextTooLong, UnsupportedThread, job_error
from shared.job import Delta, Entry, Finish, Header, Usage

SIGNATURE = "unsigned"                                  # of reasoning: clients require one, but do not check it

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
               429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


def error_body(error: APIError, request_id: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    said: dict[str, Any] = {"type": kind, "message": str(error)}
    if isinstance(error, ContextTooLong):
        said["message"] = error.as_anthropic
    if isinstance(error, UnsupportedThread):
        said |= {"details": {"error_code": error.code, "unsupported": []}}
    body: dict[str, Any] = {"type": "error", "error": said}
    return body | ({"request_id": request_id} if request_id else {})


class MessageEventFold(EventFold):
    """Folds a log into the events of one message."""

    def __init__(self, completion_id: str, header: Header, after: int = 0) -> None:
        super().__init__(header, after)
        self._reader = BlockReader(completion_id, header)
        self._has_begun = False

    def begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        usage = Usage(self.header.num_prompt_tokens, 0)
        return self._say("message_start", {"message": self._reader.message([], usage, None, None)})

    def feed(self, entry: Entry) -> bytes:
        said = self.begin()
        if entry.kind == "delta":
            return said + b"".join(self._piece(piece) for delta in entry.deltas for piece in self._reader.read(delta))
        return said + self._end(entry.finish) if entry.kind == "end" else said

    def error(self, error: APIError) -> bytes:
        return b"event: error\ndata: %b\n\n" % dump(error_body(error))

    def _failure(self, code: str) -> bytes:
        self.ended = True
        return self._say("error", error_body(job_error(code)))

    def _piece(self, piece: Piece) -> bytes:
        """The start of a block, after the end of the one before; or a part of the block; or both."""
        reader, said = self._reader, b""
        if reader.opens(piece):
            said = self._stop()
            block = reader.open(piece)
            said += self._say("content_block_start", {"index": reader.num_blocks - 1, "content_block": block.body()})
        return said if piece.kind == "call" else said + self._part(DELTAS[piece.kind], piece.value)

    def _part(self, delta: bytes, value: str) -> bytes:
        body = b'{"type":"content_block_delta","index":%d,"delta":%b}' % (self._reader.num_blocks - 1,
                                                                          delta % quote(value).encode())
        return self._named(b"content_block_delta", body)

    def _stop(self) -> bytes:
        """The end of the open block."""
        if not self._reader.kind:
            return b""
        signature = self._part(SIGNATURE_DELTA, SIGNATURE) if self._reader.kind == "reasoning" else b""
        return signature + self._say("content_block_stop", {"index": self._reader.num_blocks - 1})

    def _end(self, finish: Finish) -> bytes:
        if finish.error:
            return self._failure(finish.error)
        said, reader = self._stop(), self._reader
        said += self._say("message_delta", {
            "delta": {"stop_reason": reader.stop_reason, "stop_sequence": reader.stop_sequence},
            "usage": reader.usage_body(finish.usage)})
        self.ended = True
        return said + self._say("message_stop", {})

    def _say(self, name: str, fields: dict[str, Any]) -> bytes:
        return self._named(name.encode(), dump({"type": name} | fields))

    def _named(self, name: bytes, body: bytes) -> bytes:
        event = self._event(body)
        return b"event: %b\n%b" % (name, event) if event else b""


DELTAS = {"text": b'{"type":"text_delta","text":%b}', "reasoning": b'{"type":"thinking_delta","thinking":%b}',
          "arguments": b'{"type":"input_json_delta","partial_json":%b}'}
SIGNATURE_DELTA = b'{"type":"signature_delta","signature":%b}'


class MessageFold(WholeFold):
    """Folds a log into one message."""

    def body(self) -> bytes:
        reader, blocks = BlockReader(self.id, self.header), list[Block]()
        for piece in (piece for delta in self.deltas[0] for piece in reader.read(delta)):
            if reader.opens(piece):
                blocks.append(reader.open(piece))
            if piece.kind != "call":
                blocks[-1].pieces.append(piece.value)
        content = [block.body(SIGNATURE) for block in blocks]
        return dump(reader.message(content, self.usage, reader.stop_reason, reader.stop_sequence))


@dataclass(slots=True)
class Block:
    """One block: its text, or the JSON of a tool's input."""

    kind: str                                           # of the piece that opened it
    name: str = ""
    id: str = ""
    pieces: list[str] = field(default_factory=list)

    def body(self, signature: str = "") -> dict[str, Any]:
        if self.kind == "call":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": _object("".join(self.pieces))}
        if self.kind == "reasoning":
            return {"type": "thinking", "thinking": "".join(self.pieces), "signature": signature}
        return {"type": "text", "text": "".join(self.pieces)}


class BlockReader:
    """The pieces of a choice, and the block to which each belongs."""

    def __init__(self, completion_id: str, header: Header) -> None:
        self.kind = ""                                  # of the open block; empty before the first
        self.num_blocks = 0
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None
        self._id, self._model = completion_id, header.model
        self._parts = Parts(completion_id, header, 0)

    def read(self, delta: Delta) -> Iterator[Piece]:
        yield from self._parts.read(delta)
        if delta.finish_reason:
            self.stop_sequence = delta.stop or None
            self.stop_reason = ("max_tokens" if delta.finish_reason == "length" else
                                "stop_sequence" if delta.stop else
                                "tool_use" if self._parts.is_call_whole else "end_turn")

    def opens(self, piece: Piece) -> bool:
        """Whether it begins a new block."""
        return piece.kind == "call" or piece.kind not in (self.kind, "arguments")

    def open(self, piece: Piece) -> Block:
        self.kind = piece.kind
        self.num_blocks += 1
        if piece.kind == "call":
            return Block("call", piece.value, self._parts.call_id.replace("call_", "toolu_"))
        return Block(piece.kind)

    def message(self, content: list[dict[str, Any]], usage: Usage, stop_reason: str | None, stop_sequence: str | None
                ) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
                "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": self.usage_body(usage)}

    def usage_body(self, usage: Usage) -> dict[str, Any]:
        """input_tokens and the tokens read from the cache add up to the prompt."""
        usage = with_reasoning(usage, [self._parts])
        return {"input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.num_cached_tokens, "output_tokens": usage.num_completion_tokens,
                "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens}}


def _object(text: str) -> dict[str, Any]:
    """A tool's input; empty when the call was cut off or is not an object."""
    try:
        return read_object(text.encode(errors="surrogatepass"))  # finite numbers only
    except BadRequest:
        return {}
