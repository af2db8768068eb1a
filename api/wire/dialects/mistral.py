"""Mistral's calls if [TOOL_CALLS] is a token: followed by a JSON array, or one marker per call, with its name.

    [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                                          up to v7
    [TOOL_CALLS]NAME[ARGS]{…}[TOOL_CALLS]NAME[CALL_ID]…[ARGS]{…}                            from v11

Text may come before; without the token, what looks like a call is text. Markers are never text; inside a string of a
call's arguments they are part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from api.wire.dialects.between_tokens import TokenReader
from api.wire.dialects.dialect import (
    MAX_HEAD_CHARS,
    MAX_NAME_CHARS,
    AddedId,
    Dialect,
    Piece,
    Tools,
    marker,
    object_of,
    quoted,
    require_names,
)
from api.wire.dialects.json_calls import JsonDialect, LeadingReader

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
MARKERS = (CALLS, CALL_ID, ARGS)
MARKER = re.compile("|".join(map(re.escape, MARKERS)))


@dataclass(frozen=True)
class Mistral(Dialect):
    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        """Allows both forms, where the tokenizer has the second: the model knows its own."""
        tools = list(tools)
        if added_id(ARGS) is None:
            return ARRAY.grammar(tools, is_one=is_one, added_id=added_id)
        require_names(tools, _is_name)
        calls, call_id, args = (marker(text, added_id) for text in MARKERS)
        an_id = f"({call_id} /[a-zA-Z0-9]{{9}}/)?" if added_id(CALL_ID) is not None else ""
        bodies = [f"{quoted(tool['name'])} {an_id} {args} {object_of(tool)}" for tool in tools]
        rules = [f"start: array | named{'' if is_one else '+'}", f"named: {calls} named_body",
                 "named_body: " + "\n | ".join(bodies)]
        array = ARRAY.grammar(tools, is_one=is_one, added_id=added_id)
        return "\n".join([*rules, array.replace("start:", "array:", 1)])

    def reader(self) -> MistralReader:
        return MistralReader()


class MistralReader(TokenReader):
    def __init__(self) -> None:
        super().__init__(MARKERS)
        self._array = LeadingReader(ARRAY)

    @property
    def _in_string(self) -> bool:
        return self._array.in_string if self._read == self._calls else super()._in_string

    def _left(self) -> list[Piece]:
        array, self._array = self._array, LeadingReader(ARRAY)
        if self._read == self._calls:
            return _without_markers(array.finish())
        text, self._name, self._held = self._name + self._held, "", ""
        return [Piece("text", text)] if text else []

    def _marker(self, marker: str, pieces: list[Piece]) -> None:
        if marker != CALLS and self._read == self._head:
            self._name, self._held = self._held, ""
            self._read = self._begin if marker == ARGS else self._id
        elif marker == ARGS and self._read == self._id:
            self._held, self._read = "", self._begin
        else:
            if self._read == self._text:
                self._held = ""             # whitespace
            pieces += self._left()
            self._read = self._head if marker == CALLS else self._between

    def _head(self, run: str, pieces: list[Piece]) -> None:
        """An array, or a name."""
        self._held = (self._held + run).lstrip()
        if self._held.startswith("["):
            self._read, run, self._held = self._calls, self._held, ""
            self._calls(run, pieces)
        elif (place := self._held.find("{", 0, MAX_HEAD_CHARS + 1)) >= 0:
            self._name, run = self._held[:place], self._held[place:]
            self._held, self._read = "", self._begin
            self._begin(run, pieces)
        elif len(self._held) > MAX_HEAD_CHARS:
            self._give_up(pieces)

    def _id(self, run: str, pieces: list[Piece]) -> None:
        """Dropped: each call has an id of ours."""
        self._held += run
        if len(self._held) > MAX_HEAD_CHARS:
            self._give_up(pieces)

    def _calls(self, run: str, pieces: list[Piece]) -> None:
        pieces += _without_markers(self._array.feed(run))

    def _begin(self, run: str, pieces: list[Piece]) -> None:
        """Begins the arguments."""
        rest, name = run.lstrip(), self._name.strip()
        if rest.startswith("{") and 0 < len(name) <= MAX_NAME_CHARS:
            self._begin_call(name, rest, pieces)
        elif rest:
            self._held = rest
            self._give_up(pieces)


def _without_markers(pieces: list[Piece]) -> list[Piece]:
    """Text of an array may have them in a string that was not, after all, a call's arguments."""
    return [Piece("text", MARKER.sub("", piece.value)) if piece.kind == "text" else piece for piece in pieces]


def _is_name(name: str) -> bool:
    return not set(name) & set("[{") and name == name.strip()


SIGNS = (("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), ("[TOOL_CALLS]", ARGS))
ARRAY = JsonDialect("mistral", SIGNS, begin="[", end="]", between=", ", is_leading=True, hidden=CALLS)
MISTRAL = replace(ARRAY, with_tokens=Mistral("mistral_tokens", SIGNS, MARKERS, opening=CALLS))
