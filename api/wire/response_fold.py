"""The answers of `/v1/responses`: typed events, or the response as it stands.

An event's `sequence_number` is its position, counted from 0; its `id:` is the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from api.wire.fold import EventFold, TokenBytes, WholeFold, dump
from api.wire.output import Event, Output
from api.wire.parts import with_reasoning
from shared.errors import APIError, job_error
from shared.job import Entry, Finish, Header, Usage


class ResponseFold(EventFold):
    """`asked` are the request fields that the response repeats."""
    tells_failures = True

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes, asked: Mapping[str, Any],
                 after: int = 0) -> None:
        super().__init__(header, after)
        self._response = Response(completion_id, header, token_bytes, asked)
        self._has_begun = False
        self._runs = False

    def begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        waits = ["response.queued"] if self._response.is_background else []
        events = b"".join(self._tell(kind, {"response": self._response.body()})
                          for kind in ("response.created", *waits))
        return events if waits else events + self._run()

    def _run(self) -> bytes:
        """Once: at the start, or in the background at the first delta."""
        if self._runs:
            return b""
        self._runs = self._response.runs = True
        return self._tell("response.in_progress", {"response": self._response.body()})

    def feed(self, entry: Entry) -> bytes:
        events = self.begin()
        if entry.kind == "delta":
            events += self._run()
            events += b"".join(self._tell(*event) for event in self._response.read(entry))
        elif entry.kind == "end":
            self.ended = True
            self._response.end(entry.finish)
            events += self._tell(self._response.last_event, {"response": self._response.body()})
        return events

    def error(self, error: APIError) -> bytes:
        """As OpenAI's schema has it, and nested too, which its Python client expects."""
        nested = error.body()
        flat = {name: nested["error"].get(name) for name in ("code", "message", "param")}
        return b"event: error\ndata: %b\n\n" % dump(
            {"type": "error", "sequence_number": self.num_events} | flat | nested)

    def _tell(self, kind: str, fields: dict[str, Any]) -> bytes:
        number = self.num_events
        self.num_events += 1
        if self.num_events <= self.after:
            return b""
        body = dump({"type": kind, "sequence_number": number} | fields)
        return b"event: %b\nid: %d\ndata: %b\n\n" % (kind.encode(), number, body)


class ResponseWhole(WholeFold):
    """Folds a log into the response as it stands: queued, in progress, or ended in any way."""

    tells_halves = True

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes, asked: Mapping[str, Any]) -> None:
        super().__init__(completion_id, header)
        self.response = Response(completion_id, header, token_bytes, asked)

    def feed(self, entry: Entry) -> None:
        if entry.kind == "delta":
            self.response.runs = True
            for _ in self.response.read(entry):
                pass
        elif entry.kind == "end":
            self.ended = True
            self.response.end(entry.finish)

    def body(self) -> bytes:
        return dump(self.response.body())


class Response:
    """The state of the response so far."""

    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes, asked: Mapping[str, Any]) -> None:
        self.output = Output(completion_id, header, token_bytes)
        self.runs = False                               # a token was drawn
        self._finish: Finish | None = None
        self._asked = asked
        self._head: dict[str, Any] = {"id": completion_id, "object": "response", "created_at": header.created_s,
                                      "model": header.model}

    @property
    def is_background(self) -> bool:
        return bool(self._asked.get("background"))

    def read(self, entry: Entry) -> Iterator[Event]:
        for delta in entry.deltas:
            yield from self.output.read(delta)

    def end(self, finish: Finish) -> None:
        self._finish = finish
        self.output.cut()

    @property
    def status(self) -> str:
        if self._finish is None:
            return "in_progress" if self.runs or not self.is_background else "queued"
        if self._finish.error:
            return "cancelled" if self._finish.error == "cancelled" else "failed"
        return "incomplete" if self._is_cut else "completed"

    @property
    def _is_cut(self) -> bool:
        return self.output.finish_reason == "length"

    @property
    def last_event(self) -> str:
        return {"completed": "response.completed", "incomplete": "response.incomplete"}.get(self.status,
                                                                                          "response.failed")

    def body(self) -> dict[str, Any]:
        finish, usage, error = self._finish, None, None
        if finish and finish.error:
            error = {"code": "server_error", "message": str(job_error(finish.error))}
        elif finish:
            usage = _usage(with_reasoning(finish.usage, [self.output.parts]))
        completed_s = finish.ended_s if finish and self.status == "completed" else 0
        cut = {"reason": "max_output_tokens"} if finish and self._is_cut else None
        return self._head | {"status": self.status, "completed_at": completed_s or None,
                             "error": error if self.status == "failed" else None, "incomplete_details": cut,
                             "output": self.output.settle(), "usage": usage, **self._asked}


def _usage(usage: Usage) -> dict[str, Any]:
    return {"input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens}
