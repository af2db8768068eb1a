"""How models write calls of tools into their text, and how to read them out of it, whatever pieces it comes in.

A dialect is known by the words of the model's chat template. Its grammar makes a model call; its reader finds calls
that a model makes by itself. A reader reads every character once, or a bounded number of times; what does not become a
call is text, as it was written. It knows text, nothing of events or requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from api.wire.markers import num_begun, trimmed

MAX_HEAD_CHARS = 512        # between a call's marker and its arguments
MAX_NAME_CHARS = 256


class Piece(NamedTuple):
    """What a stretch of text turned out to be."""

    kind: Literal["text", "reasoning", "call", "arguments"]     # of a call: its name, then its arguments in pieces
    value: str


@dataclass(frozen=True)
class Dialect:
    """Calls between two markers: {"name": …, "arguments": {…}}."""

    name: str
    begin: str
    end: str

    def grammar(self, tools: Iterable[Mapping[str, Any]], *, is_one: bool, is_token: Callable[[str], bool]) -> str:
        """Of nothing but calls of these tools, in Lark's language; of one alone, or of one and more.

        Markers that are tokens of their own are no text to a grammar."""
        begin, end = (marker if is_token(marker) else _quoted(marker) for marker in (self.begin, self.end))
        bodies = [f'{_quoted(json.dumps(tool["name"]) + ", " + chr(34) + "arguments" + chr(34) + ": ")} '
                  f"%json {json.dumps(_schema(tool))}" for tool in tools]
        head, tail = _quoted('\n{"name": '), _quoted("}\n")
        more = "" if is_one else ' ("\\n" call)*'
        return f"start: call{more}\ncall: {begin} {head} body {tail} {end}\nbody: " + "\n | ".join(bodies) + "\n"


HERMES = Dialect("hermes", "<tool_call>", "</tool_call>")           # Qwen's too
DIALECTS = {dialect.name: dialect for dialect in (HERMES,)}


def choose_dialect(wanted: str, templates: Iterable[str]) -> Dialect | None:
    """The one that an operator names, or that a template shows."""
    return dialect_of(templates) if wanted == "auto" else DIALECTS.get(wanted)


def dialect_of(templates: Iterable[str]) -> Dialect | None:
    """The one in which a chat template shows its model calls."""
    return next((dialect for dialect in DIALECTS.values()
                 if any(dialect.begin in template and dialect.end in template for template in templates)), None)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tool's arguments. One that is not strict is kept as far as it can be enforced."""
    schema = dict(tool.get("parameters") or {"type": "object"})
    options = {"whitespace_pattern": "[ ]?"} | ({} if tool.get("strict") else {"lenient": True})
    return schema | {"x-guidance": options}


HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=[^\s])')
TAIL = re.compile(r"\s*\}\s*")


class CallReader:
    """Reads text in pieces. Blanks about a call belong to nobody."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._read: Callable[[list[Piece]], bool] = self._text
        self._held = ""                     # not yet known what it is
        self._marker = ""                   # of the call that began, as it was written
        self._depth = 0                     # of brackets in the arguments
        self._in_string = self._is_escaped = False
        self._is_behind = False             # a call: blanks that come now are nobody's

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._read(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back: text, or nothing of a call that was cut off."""
        held, self._held = self._marker + self._held, ""
        return [Piece("text", held)] if held and self._read in (self._text, self._head) else []

    def _text(self, pieces: list[Piece]) -> bool:
        """Up to a marker; what may begin one, and the blanks before it, are held back."""
        if self._is_behind:
            self._held = self._held.lstrip()
            self._is_behind = not self._held
        begin = self._dialect.begin
        place = self._held.find(begin)
        cut = trimmed(self._held, place if place >= 0 else len(self._held) - num_begun(self._held, begin))
        if cut:
            pieces.append(Piece("text", self._held[:cut]))
        if place < 0:
            self._held = self._held[cut:]
            return False
        self._held = self._held[place + len(begin):]
        self._marker, self._read = begin, self._head
        return True

    def _head(self, pieces: list[Piece]) -> bool:
        """Up to the arguments."""
        if match := HEAD.match(self._held):
            name = _name(match[1])
            if name is not None:
                pieces.append(Piece("call", name))
                self._held = self._held[match.end():]
                self._marker, self._depth = "", 0
                self._in_string = self._is_escaped = False
                self._read = self._arguments
                return True
        elif len(self._held) < MAX_HEAD_CHARS and self._dialect.end not in self._held:
            return False
        pieces.append(Piece("text", self._marker))      # no call: it reads on behind the marker
        self._marker, self._read = "", self._text
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        """One JSON value, as it is written, up to the bracket or the quote that closes it."""
        for place, character in enumerate(self._held, 1):
            self._step(character)
            if self._depth <= 0 and not self._in_string:
                pieces.append(Piece("arguments", self._held[:place]))
                self._held, self._read = self._held[place:], self._tail
                return True
        if self._held:
            pieces.append(Piece("arguments", self._held))
            self._held = ""
        return False

    def _step(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _tail(self, _: list[Piece]) -> bool:
        """What closes a call."""
        match = TAIL.match(self._held)
        rest = self._held[match.end():] if match else ""
        if match and rest.startswith(self._dialect.end):
            self._held, self._is_behind = rest[len(self._dialect.end):], True
        elif len(self._held) < MAX_HEAD_CHARS and (self._dialect.end.startswith(rest) if match else
                                                   not self._held.strip()):
            return False
        self._read = self._text
        return True


def _name(raw: str) -> str | None:
    try:
        name = json.loads(raw)
    except ValueError:
        return None
    return name if 0 < len(name) <= MAX_NAME_CHARS else None
