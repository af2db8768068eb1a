"""Shared by the folds of all languages: an answer's log becomes numbered events, or the whole answer.

Pure and versioned (`Header.fold_version`): the same log gives the same events on every pod, so the ordinal of an event
is a client's position. It knows no language.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic

from typing_extensions import TypeVar  # with a default, before Python 3.13

from shared.errors import APIError, job_error
from shared.job import Delta, Entry, Header, Usage

FOLD_VERSIONS = (1, 2, 3)                               # 2: with thoughts and calls of tools; 3: in more dialects
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n"

TokenBytes = Callable[[int], bytes]
E = TypeVar("E", default=Entry)                         # what is folded


class EventFold(ABC, Generic[E]):
    """Folds a log into the events of a stream, as bytes ready to send.

    A client that returns names its last event, `after`: the events up to it are counted but not sent again.
    """

    tells_failures = False                              # True: failures are events like any other; False: an error

    def __init__(self, header: Header, after: int = 0) -> None:
        self.header = header
        self.after = after
        self.num_events = 0
        self.is_numbered = True                         # an event has its number with it
        self.ended = False                              # the terminal was folded: nothing follows

    def begin(self) -> bytes:
        """The events before the first token; empty when it is called again."""
        return b""

    @abstractmethod
    def feed(self, entry: E) -> bytes:
        """The events of the next entry: none, one or several."""

    @property
    def heartbeat(self) -> bytes:
        """A comment. With a blank line, since clients that split at those skip a block that begins with a comment; but
        not behind an `id:`, where other clients take a blank line for an event."""
        return HEARTBEAT if self.is_numbered else HEARTBEAT + b"\n"

    def error(self, error: APIError) -> bytes:
        """An error outside the log, as the last event. It has no position: the client may resume at its own."""
        return b"data: %b\n\n" % dump(error.body())

    def _failure(self, code: str) -> bytes:
        """The error with which a log ends. Nested under `error`, or clients take it for a chunk."""
        self.ended = True
        return self._event(dump(job_error(code).body()))

    def _event(self, body: bytes) -> bytes:
        self.num_events += 1
        if self.num_events <= self.after:
            return b""
        number = b"id: %d\n" % self.num_events if self.is_numbered else b""
        return b"%bdata: %b\n\n" % (number, body)


class Whole(ABC, Generic[E]):
    """One object made from one log, or several."""

    tells_halves = False                                # True: an unfinished or failed answer is an object too

    def __init__(self, completion_id: str) -> None:
        self.ended = False
        self.id = completion_id

    @abstractmethod
    def feed(self, entry: E) -> None:
        """Takes the next entry."""

    @abstractmethod
    def body(self) -> bytes:
        """The object, once all entries were fed."""


class WholeFold(Whole[Entry]):
    """Folds a log into one object."""

    def __init__(self, completion_id: str, header: Header) -> None:
        super().__init__(completion_id)
        self.header = header
        self.usage = Usage(header.num_prompt_tokens, 0)
        self.deltas: list[list[Delta]] = [[] for _ in range(header.n)]

    def feed(self, entry: Entry) -> None:
        """Adds the next entry. Raises JobEnded for a terminal that is not a success."""
        if entry.kind == "delta":
            for delta in entry.deltas:
                self.deltas[delta.index].append(delta)
        elif entry.kind == "end":
            self.ended = True
            if entry.finish.error:
                raise job_error(entry.finish.error)
            self.usage = entry.finish.usage


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def head(completion_id: str, kind: str, header: Header, **more: Any) -> str:
    """The start that all chunks of an answer share, up to the comma before `choices`."""
    return dump({"id": completion_id, "object": kind, "created": header.created_s, "model": header.model, **more,
                 "system_fingerprint": header.fingerprint}).decode()[:-1] + ","


def usage_body(usage: Usage) -> dict[str, Any]:
    return {"prompt_tokens": usage.num_prompt_tokens, "completion_tokens": usage.num_completion_tokens,
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens}}
