"""Splits what one choice says into reasoning, text and calls of tools.

The answers of every language are made of it. It knows deltas and their text, nothing of events.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from api.wire.dialects import DIALECTS, Dialect, Piece
from api.wire.dialects.json_value import Strings
from api.wire.reasoning import Mode, ThoughtReader
from shared.job import Delta, FinishReason, Header, Usage


class Call(NamedTuple):
    id: str
    name: str
    arguments: str


class Said(NamedTuple):
    """All parts of a choice."""

    text: str
    reasoning: str
    calls: list[Call]


class Parts:
    """Splits one choice, delta by delta."""

    def __init__(self, completion_id: str, header: Header, index: int) -> None:
        self.num_reasoning_tokens = 0
        self.num_calls = 0
        self._arguments: list[str] = []                 # of the newest call, so far,
        self._strings = Strings()                       # and the strings in them
        self._name = f"{completion_id}/{index}"
        self._is_named = header.has_named_tool
        self._end_id = header.think_end_id
        self._thoughts = ThoughtReader(header.reasoning)
        self._calls = DIALECTS[header.tool_dialect].reader_of(header.typed_arguments) if header.tool_dialect else None

    def read(self, delta: Delta) -> Iterator[Piece]:
        """The pieces of the next delta. The call in progress is the newest of `num_calls`."""
        for piece in self._pieces(delta):
            if piece.kind == "call":
                self.num_calls += 1
                self._arguments, self._strings = [], Strings()
            elif piece.kind == "arguments":
                piece = piece._replace(value=self._strings.escaped(piece.value))
                self._arguments.append(piece.value)
            yield piece

    def _pieces(self, delta: Delta) -> list[Piece]:
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
        """Whether the text is inside reasoning."""
        return self._thoughts.is_inside or (self._calls is not None and self._calls.is_inside)

    def _num_thought(self, token_ids: Sequence[int]) -> int:
        """The number of tokens up to the one that ends reasoning."""
        if self._end_id is not None and self._end_id in token_ids:
            return token_ids.index(self._end_id) + 1
        return len(token_ids) if self._is_inside else 0

    @property
    def call_id(self) -> str:
        """The id of the newest call, the same on every pod."""
        digest = hashlib.sha256(f"{self._name}/{self.num_calls}".encode()).hexdigest()
        return f"call_{digest[:24]}"

    @property
    def is_call_whole(self) -> bool:
        """Whether the newest call is complete: a stop string may have cut it off."""
        try:
            json.loads("".join(self._arguments) or "{}")
        except (ValueError, RecursionError):
            return False
        return self.num_calls > 0

    def reason(self, reason: FinishReason | None) -> FinishReason | None:
        """The finish reason: tool calls, unless tool_choice named the function, or the last call was cut off."""
        return "tool_calls" if reason == "stop" and self.is_call_whole and not self._is_named else reason

    def whole(self, deltas: Iterable[Delta]) -> Said:
        parts: dict[str, list[str]] = {"text": [], "reasoning": []}
        calls: list[tuple[str, str, list[str]]] = []
        for piece in (piece for delta in deltas for piece in self.read(delta)):
            if piece.kind == "call":
                calls.append((self.call_id, piece.value, []))
            else:
                (calls[-1][2] if piece.kind == "arguments" else parts[piece.kind]).append(piece.value)
        return Said("".join(parts["text"]), "".join(parts["reasoning"]),
                    [Call(call_id, name, "".join(arguments)) for call_id, name, arguments in calls])


def fold_version(dialect: Dialect | None, reasoning: Mode) -> int:
    return max(dialect.fold_version if dialect else 1, 2 if reasoning else 1)


def has_parts(header: Header) -> bool:
    """Whether the answer may contain anything but text."""
    return bool(header.reasoning or header.tool_dialect)


def with_reasoning(usage: Usage, parts: Sequence[Parts]) -> Usage:
    return replace(usage, num_reasoning_tokens=sum(each.num_reasoning_tokens for each in parts)) if parts else usage
