"""Calls as JSON, {"name": …, "arguments": {…}}: the dialects of Hermes and Qwen and of Llama, and arrays of such calls.

Hermes' and Qwen's are between <tool_call> and </tool_call>, anywhere; Llama's (3.1 and later) are bare objects at the
beginning; arrays are there too (mistral.py). Arguments are passed on as written. What turns out not to be a call is
text, unchanged, markers included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from api.wire.dialects.dialect import (
    MAX_HEAD_CHARS,
    MAX_NAME_CHARS,
    AddedId,
    Dialect,
    Piece,
    Tools,
    marker,
    quoted,
    schema_of,
)
from api.wire.dialects.json_value import JsonValue
from api.wire.dialects.leading import BLANK, BLANKS, leading
from api.wire.markers import MAX_BLANKS, num_begun, trimmed


@dataclass(frozen=True)
class JsonDialect(Dialect):
    """Each call is between two markers; if the dialect is leading, all calls together are, and no text comes before."""

    fold_version: int = 2
    begin: str = ""
    end: str = ""
    key: str = "arguments"
    between: str = "\n"                                 # separates two calls
    blank: str = ""                                     # between a marker and the JSON
    hidden: str = ""                                    # a special token before them, not shown in text
    may_hide: str = ""                                  # a special token that may precede calls, and text

    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        heads, bodies = [BLANKS], []
        for number, tool in enumerate(tools):
            heads.append(f"HEAD_{number}: {self._head(tool['name'])}")
            bodies.append(f"HEAD_{number} %json {json.dumps(schema_of(tool))}")
        begin, end = marker(self.begin, added_id), marker(self.end, added_id)
        one = f"{quoted(self.blank)} body {quoted('}' + self.blank)}"
        start, call = (f"{begin} calls {end}", one) if self.is_leading else ("calls", f"{begin} {one} {end}")
        hidden = f'{marker(self.hidden, added_id)} " "?' if self.hidden and added_id(self.hidden) is not None else ""
        more = "" if is_one else f" ({quoted(self.between)} call)*"
        rules = [f"start: {hidden} {start}", f"calls: call{more}", f"call: {call}", "body: " + "\n | ".join(bodies)]
        return "\n".join(rules + heads) + "\n"

    def _head(self, name: str) -> str:
        """All before the arguments: one terminal, as `leading` needs it, with whitespace where models write some."""
        words = ("{", '"name":', f"{json.dumps(name)},", f"{json.dumps(self.key)}:", "")
        return " BLANKS ".join(map(quoted, words))

    def among_text(self, calls: str, *, is_one: bool, may_think: bool, added_id: AddedId) -> str:
        """For arrays: any text that begins as one is taken for one."""
        if not self.is_leading:
            return super().among_text(calls, is_one=is_one, may_think=may_think, added_id=added_id)
        return leading(calls, called=re.escape(self.begin) or CALLED, goes_on=f"{BLANK}*{self.between.strip()}",
                       is_one=is_one, may_think=may_think, added_id=added_id, may_hide=self.may_hide)

    def reader(self) -> CallReader:
        return LeadingReader(self) if self.is_leading else CallReader(self)


HERMES = JsonDialect("hermes", (("<tool_call>", "</tool_call>"),), ("<tool_call>", "</tool_call>"),
                     begin="<tool_call>", end="</tool_call>", blank="\n", opening="<tool_call>")
LLAMA = JsonDialect("llama", (("ipython", '"parameters"'),), key="parameters", between="; ", is_leading=True,
                    may_hide="<|python_tag|>")

STRING = r'"(?:[^"\\]|\\.)*"'
ASIDE = r'"(?:type|id)"\s*:\s*' + STRING                # what a call may hold besides: it has no meaning
OPENINGS = tuple(f'{{"{key}"' for key in ("name", "type", "id", "arguments", "parameters"))     # without whitespace
# All before the arguments; models of Hermes write them before the name.
HEAD = re.compile(rf'\s*\{{\s*(?:(?:{ASIDE}\s*,\s*)*"name"\s*:\s*({STRING})\s*,\s*(?:{ASIDE}\s*,\s*)*)?'
                  r'"(?:arguments|parameters)"\s*:\s*(?=\S)', re.DOTALL)
TAIL = re.compile(rf'((?:\s*,\s*{STRING}\s*:\s*(?:{STRING}|[\w.+-]+))*)\s*\}}\s*', re.DOTALL)
LATE_NAME = re.compile(rf',\s*"name"\s*:\s*({STRING})', re.DOTALL)
NULL = "null"                                           # in place of the arguments: none are given
# HEAD in a grammar, up to the colon: JSON with other keys is text, even if it begins with a name.
SAID = r'"([^"\\]|\\(?s:.))*"'
BESIDE = rf'("(type|id)"{BLANK}*:{BLANK}*{SAID}{BLANK}*,{BLANK}*)*'
CALLED = (rf'\{{{BLANK}*({BESIDE}"name"{BLANK}*:{BLANK}*{SAID}{BLANK}*,{BLANK}*{BESIDE})?'
          rf'"(arguments|parameters)"{BLANK}*:')


class CallReader:
    """Reads text in pieces, with calls between markers. Whitespace around a call is dropped."""

    is_inside = False                       # never inside reasoning

    def __init__(self, dialect: JsonDialect) -> None:
        self._dialect = dialect
        self._read: Callable[[list[Piece]], bool] = self._text
        self._held = ""                     # not yet classified
        self._raw = list[str]()             # of the current call, until it is one: its marker, and what was read of it
        self._name: str | None = None       # of the current call, if it is known
        self._value = JsonValue()           # the arguments;
        self._parts = list[str]()           # as they were written, if they are kept until they are complete,
        self._said = ""                     # and what they say
        self._is_behind = False             # a call has just ended: whitespace is dropped

    @property
    def in_string(self) -> bool:
        """Inside a string of a call's arguments."""
        return self._read in (self._arguments, self._whole) and self._value.in_string

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._read(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The held text; nothing for a call that was cut off."""
        held, self._held = "".join(self._raw) + self._held, ""
        return [Piece("text", held)] if held and self._read not in (self._arguments, self._tail) else []

    def _text(self, pieces: list[Piece]) -> bool:
        """Text up to a marker; the possible beginning of one, and whitespace before it, are held back."""
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
        self._raw, self._read = [begin], self._head
        return True

    def _head(self, pieces: list[Piece]) -> bool:
        """Everything up to the arguments."""
        match = HEAD.match(self._held[:MAX_HEAD_CHARS])
        if match is None and len(self._held) < MAX_HEAD_CHARS and _may_be_call(self._held):
            return False
        rest = self._held[match.end():] if match else ""
        if len(rest) < len(NULL) and rest and NULL.startswith(rest):
            return False
        self._name = _name(match[1]) if match and match[1] else None
        if match is None or (match[1] and self._name is None) or not rest.startswith(("{", '"', NULL)):
            return self._give_up(pieces)
        self._raw.append(self._held[:match.end()])
        self._held, self._value, self._parts, self._said = rest, JsonValue(), [], ""
        if rest.startswith(NULL):
            self._raw.append(NULL)
            self._held, self._said, self._read = rest[len(NULL):], "{}", self._late
        else:
            self._read = self._whole
        if self._name is not None and rest[0] != '"':
            self._begin(self._name, self._said, pieces)
            self._read = self._tail if self._said else self._arguments
        return True

    def _begin(self, name: str, arguments: str, pieces: list[Piece]) -> None:
        pieces.append(Piece("call", name))
        if arguments:
            pieces.append(Piece("arguments", arguments))
        self._raw = []

    def _give_up(self, pieces: list[Piece]) -> bool:
        """It is not a call: text, which goes on behind the marker."""
        if self._raw:
            pieces.append(Piece("text", "".join(self._raw)))
        self._raw, self._read = [], self._text
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        """One JSON value, as written."""
        size = self._value.feed(self._held)
        if size:
            pieces.append(Piece("arguments", self._held[:size]))
        self._held = self._held[size:]
        if self._value.is_closed:
            self._read = self._tail
        return self._value.is_closed

    def _whole(self, pieces: list[Piece]) -> bool:
        """Arguments that come before the name, or as JSON within a string: kept until they are complete."""
        size = self._value.feed(self._held)
        self._parts.append(self._held[:size])
        self._held = self._held[size:]
        if not self._value.is_closed:
            return False
        self._said = _object("".join(self._parts))
        self._raw += self._parts
        if not self._said:
            return self._give_up(pieces)
        if self._name is None:
            self._read = self._late
        else:
            self._begin(self._name, self._said, pieces)
            self._read = self._tail
        return True

    def _late(self, pieces: list[Piece]) -> bool:
        """The name, behind the arguments."""
        match = TAIL.match(self._held[:MAX_HEAD_CHARS])
        if match is None and self._may_end:
            return False
        named = LATE_NAME.search(match[1]) if match else None
        name = _name(named[1]) if named else None
        if name is None:
            return self._give_up(pieces)
        self._begin(name, self._said, pieces)
        self._read = self._tail
        return True

    @property
    def _may_end(self) -> bool:
        """Whether what is held behind the arguments may become the end of a call."""
        return len(self._held) < MAX_HEAD_CHARS and self._held.lstrip()[:1] in ("", ",")

    def _tail(self, _: list[Piece]) -> bool:
        """The end of a call."""
        match = TAIL.match(self._held[:MAX_HEAD_CHARS])
        rest = self._held[match.end():] if match else ""
        if match and rest.startswith(self._dialect.end):
            self._held, self._is_behind = rest[len(self._dialect.end):], True
        elif len(self._held) < MAX_HEAD_CHARS and self._dialect.end.startswith(rest) if match else self._may_end:
            return False
        self._read = self._text
        return True


class LeadingReader(CallReader):
    """Reads calls at the beginning of an answer, and nowhere else."""

    def __init__(self, dialect: JsonDialect) -> None:
        super().__init__(dialect)
        self._read = self._first

    def _first(self, _: list[Piece]) -> bool:
        """Whether the answer begins as calls do."""
        opening = self._held.lstrip()
        begin = self._dialect.begin or "{"
        if not opening.startswith(begin) and begin.startswith(opening) and len(self._held) < MAX_BLANKS:
            return False
        if not opening.startswith(begin):
            self._read = self._rest
            return True
        size = len(self._held) - len(opening) + len(self._dialect.begin)
        self._raw, self._held = [self._held[:size]], self._held[size:]
        self._read = self._head
        return True

    def _text(self, _: list[Piece]) -> bool:
        """The rest, which is not a call."""
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
        match = TAIL.match(self._held[:MAX_HEAD_CHARS])
        if match is None and self._may_end:
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
    return compact.startswith(OPENINGS) or any(opening.startswith(compact) for opening in OPENINGS)


def _name(raw: str) -> str | None:
    try:
        name = json.loads(raw)
    except ValueError:
        return None
    return name if 0 < len(name) <= MAX_NAME_CHARS else None


def _object(raw: str) -> str:
    """JSON of an object, which may be within a string; empty if it is none."""
    if raw.startswith('"'):
        try:
            raw = json.loads(raw, strict=False).strip()
        except ValueError:
            return ""
    return raw if raw.startswith("{") else ""
