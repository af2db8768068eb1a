"""DeepSeek's calls, between tokens of their own: V3's and R1's with JSON in a fence, V3.1's with bare JSON.

    …calls▁begin…call▁begin…function…sep…NAME\n```json\n{…}\n```…call▁end…calls▁end…        V3, R1
    …calls▁begin…call▁begin…NAME…sep…{…}…call▁end…calls▁end…                                V3.1

Text may come before. Markers, and whitespace around them, are never text, whatever is between them; inside a string of
a call's arguments they are part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"
MARKERS = (CALLS, END_CALLS, CALL, END_CALL, SEP)

HEAD = re.compile(r"\s*+(?:([^\n`{]++)\n\s*+```(?:json)?\s*+)?(?={)")      # after SEP; V3 has the name here
END_FENCE = "\n```"


@dataclass(frozen=True)
class DeepSeek(Dialect):
    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        """Allows both forms: the model knows its own."""
        tools = list(tools)
        require_names(tools, _is_name)
        calls, end_calls, call, end_call, sep = (marker(text, added_id) for text in (
            CALLS, END_CALLS, CALL, END_CALL, SEP))
        bodies = []
        for tool in tools:
            bodies.append(f"{quoted(tool['name'])} {sep} {object_of(tool)}")
            fence = quoted(tool["name"] + "\n```json\n")
            bodies.append(f'"function" {sep} {fence} {object_of(tool)} {quoted(END_FENCE)}')
        more = "" if is_one else r' ("\n"? call)*'
        return "\n".join([f"start: {calls} call{more} {end_calls}", f"call: {call} body {end_call}",
                          "body: " + "\n | ".join(bodies)]) + "\n"

    def reader(self) -> DeepSeekReader:
        return DeepSeekReader()


class DeepSeekReader(TokenReader):
    """Reasoning is between <think> and </think>."""

    def __init__(self) -> None:
        super().__init__(MARKERS)

    def _left(self) -> list[Piece]:
        return [Piece("text", self._held)] if self._held and self._read == self._text else []

    def _marker(self, marker: str, pieces: list[Piece]) -> None:
        if marker == SEP and self._read == self._call:
            self._name, self._held, self._read = self._held, "", self._head
            return
        if self._read in (self._call, self._head):
            self._give_up(pieces)
        self._held = self._name = ""
        self._read = self._call if marker == CALL else self._between

    def _call(self, run: str, pieces: list[Piece]) -> None:
        """The type of the tool, or its name."""
        self._held += run
        if len(self._held) > MAX_HEAD_CHARS:
            self._give_up(pieces)

    def _head(self, run: str, pieces: list[Piece]) -> None:
        """What precedes the arguments."""
        self._held += run
        match = HEAD.match(self._held[:MAX_HEAD_CHARS])
        name = (match[1] or self._name).strip() if match else ""
        if match and 0 < len(name) <= MAX_NAME_CHARS:
            rest, self._held = self._held[match.end():], ""
            self._begin_call(name, rest, pieces)
        elif match or len(self._held) >= MAX_HEAD_CHARS:
            self._give_up(pieces)

    def _behind(self, run: str, pieces: list[Piece]) -> None:
        """The end of a fence."""
        self._read = self._behind
        if rest := run.lstrip(END_FENCE + " \t\r"):
            self._read = self._text
            self._text(rest, pieces)


def _is_name(name: str) -> bool:
    return not set(name) & set("\n`{") and not any(text in name for text in MARKERS) and name == name.strip()


DEEPSEEK = DeepSeek("deepseek", ((CALLS,),), MARKERS, opening=CALLS, also_opens=CALL)
