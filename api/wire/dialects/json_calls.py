"""How models write calls of tools into their text, and how to read them out of it, whatever pieces it comes in.

Hermes' and Qwen's between <tool_call> and </tool_call>, anywhere; Mistral's as one array behind a token that is not
shown; Llama's (3.1 and on) as bare objects at the beginning. A dialect is known by the words of the model's chat
template. Its grammar makes a model call; its reader finds calls that a model makes by itself. A reader reads every
character once, or a bounded number of times; what does not become a call is text, as it was written. It knows text,
nothing of events or requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from api.wire.markers import MAX_BLANKS, num_begun, trimmed

MAX_HEAD_CHARS = 512        # between a call's marker and its arguments
MAX_NAME_CHARS = 256


class Piece(NamedTuple):
    """What a stretch of text turned out to be."""

    kind: Literal["text", "reasoning", "call", "arguments"]     # of a call: its name, then its arguments in pieces
    value: str


@dataclass(frozen=True)
class Dialect:
    """Calls as JSON, {"name": …, arguments: {…}}, each between two markers, or all of them at an answer's beginning."""

    name: str
    signs: tuple[str, ...]                              # of a chat template: all of them are in it
    begin: str
    end: str
    key: str = "arguments"
    between: str = "\n"                                 # two calls
    blank: str = ""                                     # between a marker and the JSON
    is_leading: bool = False                            # begin and end are about all calls, and no text comes before
    hidden: str = ""                                    # a token before them, which no text shows

    def grammar(self, tools: Iterable[Mapping[str, Any]], *, is_one: bool, added_id: Callable[[str], int | None]
                ) -> str:
        """Of nothing but calls of these tools, in Lark's language; of one alone, or of one and more.

        Markers that are tokens of their own are no text to a grammar: `added_id` knows them."""
        def marker(text: str) -> str:
            token_id = added_id(text) if text else None
            return _quoted(text) if token_id is None else f"<[{token_id}]>"

        bodies = []
        for tool in tools:
            head = f"{json.dumps(tool['name'])}, {json.dumps(self.key)}: "
            bodies.append(f"{_quoted(head)} %json {json.dumps(_schema(tool))}")
        begin, end = marker(self.begin), marker(self.end)
        one = f"{_quoted(self.blank + OPENING)} body {_quoted('}' + self.blank)}"
        start, call = (f"{begin} calls {end}", one) if self.is_leading else ("calls", f"{begin} {one} {end}")
        hidden = marker(self.hidden) if self.hidden and added_id(self.hidden) is not None else ""
        more = "" if is_one else f" ({_quoted(self.between)} call)*"
        rules = [f"start: {hidden} {start}", f"calls: call{more}", f"call: {call}", "body: " + "\n | ".join(bodies)]
        return "\n".join(rules) + "\n"

    def reader(self) -> CallReader:
        return LeadingReader(self) if self.is_leading else CallReader(self)


HERMES = Dialect("hermes", ("<tool_call>", "</tool_call>"), "<tool_call>", "</tool_call>", blank="\n")     # Qwen's too
MISTRAL = Dialect("mistral", ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), "[", "]", between=", ", is_leading=True,
                  hidden="[TOOL_CALLS]")
LLAMA = Dialect("llama", ("ipython", '"parameters"'), "", "", key="parameters", between="; ", is_leading=True)
DIALECTS = {dialect.name: dialect for dialect in (HERMES, MISTRAL, LLAMA)}


def choose_dialect(wanted: str, templates: Iterable[str]) -> Dialect | None:
    """The one that an operator names, or that a template shows."""
    return dialect_of(templates) if wanted == "auto" else DIALECTS.get(wanted)


def dialect_of(templates: Iterable[str]) -> Dialect | None:
    """The one in which a chat template shows its model calls."""
    texts = list(templates)
    return next((dialect for dialect in DIALECTS.values()
                 if any(all(sign in text for sign in dialect.signs) for text in texts)), None)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tool's arguments. One that is not strict is kept as far as it can be enforced."""
    schema = dict(tool.get("parameters") or {"type": "object"})
    options = {"whitespace_pattern": "[ ]?"} | ({} if tool.get("strict") else {"lenient": True})
    return schema | {"x-guidance": options}


OPENING = '{"name": '
COMPACT = OPENING.replace(" ", "").removesuffix(":")    # what any call begins with, but for blanks
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=[^\s])')
TAIL = re.compile(r"\s*\}\s*")


class CallReader:
    """Reads text in pieces, with calls between markers. Blanks about a call belong to nobody."""

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
        elif len(self._held) < MAX_HEAD_CHARS and _may_be_call(self._held):
            return False
        if self._marker:
            pieces.append(Piece("text", self._marker))  # no call: it reads on behind the marker
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


class LeadingReader(CallReader):
    """Calls at the beginning, and nothing else before them."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        self._read = self._first

    def finish(self) -> list[Piece]:
        held, self._held = self._marker + self._held, ""
        is_text = self._read in (self._first, self._head, self._rest)
        return [Piece("text", held)] if held and is_text else []

    def _first(self, _: list[Piece]) -> bool:
        """Whether it begins as calls do."""
        opening = self._held.lstrip()
        begin = self._dialect.begin or "{"
        if not opening.startswith(begin) and begin.startswith(opening) and len(self._held) < MAX_BLANKS:
            return False
        if not opening.startswith(begin):
            self._read = self._rest
            return True
        size = len(self._held) - len(opening) + len(self._dialect.begin)
        self._marker, self._held = self._held[:size], self._held[size:]
        self._read = self._head
        return True

    def _text(self, _: list[Piece]) -> bool:
        """What turned out to be no call."""
        self._read = self._rest
        return True

    def _rest(self, pieces: list[Piece]) -> bool:
        if self._is_behind:
            self._held = self._held.lstrip()
            self._is_behind = not self._held
        if self._held:
            pieces.append(Piece("text", self._held))
            self._held = ""
        return False

    def _tail(self, _: list[Piece]) -> bool:
        """Another call, or the end of them."""
        match = TAIL.match(self._held)
        if match is None and not self._held.strip() and len(self._held) < MAX_HEAD_CHARS:
            return False
        rest = self._held[match.end():] if match else self._held
        separator, end = self._dialect.between.strip(), self._dialect.end
        if match and not rest and len(self._held) < MAX_HEAD_CHARS:
            return False
        if match and rest.startswith(separator):
            self._held, self._read = rest[len(separator):], self._head
        else:
            self._held = rest[len(end):] if match and rest.startswith(end) else rest
            self._read, self._is_behind = self._rest, True
        return True


def _may_be_call(text: str) -> bool:
    compact = "".join(text.split())
    return compact.startswith(COMPACT) or COMPACT.startswith(compact)


def _name(raw: str) -> str | None:
    try:
        name = json.loads(raw)
    except ValueError:
        return None
    return name if 0 < len(name) <= MAX_NAME_CHARS else None
