"""Reads Qwen3-Coder's calls, elements of elements, as JSON (qwen_coder.py shows one).

Inside a value only its end is a marker, and inside a JSON string not even that. Models leave the end out at times: on a
line of its own, another argument, or the end of the call, ends a value too. A string is the text as written, without
the line breaks around it; any other value is JSON, or else a string. What turns out not to be a call is text,
unchanged.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import NoReturn

from api.wire.dialects.dialect import MAX_NAME_CHARS, Piece, quoted
from api.wire.dialects.json_value import JsonValue
from api.wire.dialects.python_calls import NoCall, PythonCall
from api.wire.markers import MAX_BLANKS, Splitter, trimmed

CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MARKERS = (CALL, END_CALL, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)

NULL = "null"
WORDS = {"True": "true", "False": "false", "None": "null"}          # Python's, for JSON's
BRACKET = re.compile(r"[\[{}\]]")
MAX_DEPTH = 100             # of a value: deeper ones are strings, on every pod


def argument(function: str, name: str) -> str:
    """The key of a typed argument."""
    return f"{function}.{name}"


def nullable(function: str, name: str) -> str:
    """The key of an argument that is a string or null: no name contains a line break."""
    return argument(function, name) + "\n"


class ElementReader:
    is_inside = False                       # never inside reasoning

    def __init__(self, typed_arguments: frozenset[str]) -> None:
        self._typed_arguments = typed_arguments
        self._splitter = Splitter(MARKERS)
        self._read = self._text
        self._held = ""                     # not yet classified: within text, whitespace only
        self._marker = ""                   # of the current call, as written
        self._name = self._key = ""
        self._num_arguments = 0
        self._typed: list[str] | None = None            # a value that is not a string, so far
        self._json: JsonValue | None = None             # the same, if it is JSON that may contain strings
        self._null: str | None = None                   # a value as long as it may become null
        self._is_fresh = self._is_blank = False         # nothing of the value was read yet, or only whitespace
        self._is_line = False                           # the value has just begun a line
        self._end = ""                                  # of a call without the end of its value, as far as it goes

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for is_marker, run in self._splitter.feed(text):
            if is_marker and self._read == self._closing:
                self._close(run, pieces)
            elif is_marker and (self._read != self._value or self._ends_value(run)):
                self._take(run, pieces)
            else:
                self._read(run, pieces)
        return pieces

    @property
    def _in_string(self) -> bool:
        """Inside a JSON string of a value: an end marker there is part of the string."""
        return self._json is not None and self._json.in_string

    def _ends_value(self, marker: str) -> bool:
        is_end = marker == END_PARAMETER or (self._is_line and marker in (PARAMETER, END_FUNCTION))
        return is_end and not self._in_string

    def finish(self) -> list[Piece]:
        """The held text, or the end of a call that lacks nothing else."""
        pieces: list[Piece] = []
        for _, run in self._splitter.finish():
            self._read(run, pieces)
        if self._read == self._closing:
            self._close_value(pieces)
        if self._read == self._function:
            pieces.append(Piece("arguments", "}"))
        elif self._read in (self._text, self._call, self._named):
            self._give_up(pieces)
            pieces += [Piece("text", self._held)] if self._held else []
        return pieces

    def _take(self, marker: str, pieces: list[Piece]) -> None:
        """Handles a marker in the current state; if it has no meaning there, it is text."""
        if self._read == self._value and marker == END_FUNCTION:
            self._end, self._read = marker, self._closing
            return
        if self._read == self._value:
            self._close_value(pieces)
        if marker == END_PARAMETER and self._read == self._function:
            pass
        elif marker == PARAMETER and self._read == self._function:
            self._held, self._read = "", self._keyed
        elif marker in (END_FUNCTION, END_CALL) and self._read == self._function:
            pieces.append(Piece("arguments", "}"))
            self._read = self._between
        elif marker == END_CALL and self._read == self._between:
            pass
        elif marker == CALL or (marker == FUNCTION and self._read != self._keyed):
            self._begin(marker, pieces)
        elif self._read == self._keyed:
            self._read = self._function     # an argument without a name
        elif self._read != self._function:
            self._give_up(pieces)
            self._text(marker, pieces)

    def _close(self, marker: str, pieces: list[Piece]) -> None:
        """Whether a call ends at what may end it without the end of its value."""
        if marker == END_CALL:
            self._close_value(pieces)
            self._take(marker, pieces)
            return
        self._read = self._value
        self._value(self._end, pieces)
        if self._ends_value(marker):
            self._take(marker, pieces)
        else:
            self._value(marker, pieces)

    def _closing(self, run: str, pieces: list[Piece]) -> None:
        """Behind what may be the end of a call: whitespace; anything else belongs to the value."""
        self._end += run
        if self._end.removeprefix(END_FUNCTION).strip() or len(self._end) > MAX_BLANKS:
            self._read = self._value
            self._value(self._end, pieces)

    def _begin(self, marker: str, pieces: list[Piece]) -> None:
        """Begins a call, or its name."""
        if self._read in (self._function, self._keyed):
            pieces.append(Piece("arguments", "}"))
        elif self._read == self._named or (self._read == self._call and marker == CALL):
            self._give_up(pieces)
        if self._read != self._call:
            self._marker = ""               # whitespace before a marker is dropped
            self._held = ""
        self._marker += self._held + marker
        self._held, self._read = "", self._call if marker == CALL else self._named

    def _give_up(self, pieces: list[Piece]) -> None:
        """Turns a call that was not completed into text."""
        if self._read in (self._call, self._named):
            text, self._marker, self._held = self._marker + self._held, "", ""
            self._read = self._text
            self._text(text, pieces)

    def _text(self, run: str, pieces: list[Piece]) -> None:
        """Text; whitespace at its end is held, as a marker may follow."""
        self._read = self._text
        self._held += run
        cut = trimmed(self._held, len(self._held))
        if cut:
            pieces.append(Piece("text", self._held[:cut]))
            self._held = self._held[cut:]

    def _between(self, run: str, pieces: list[Piece]) -> None:
        if rest := run.lstrip():
            self._held = ""
            self._text(rest, pieces)

    def _call(self, run: str, pieces: list[Piece]) -> None:
        """Whitespace only."""
        self._held += run
        if self._held.strip() or len(self._held) > MAX_BLANKS:
            self._give_up(pieces)

    def _named(self, run: str, pieces: list[Piece]) -> None:
        self._held += run
        name = _before(self._held)
        if name:
            rest = self._held[self._held.index(">") + 1:]
            pieces += Piece("call", name), Piece("arguments", "{")
            self._name, self._num_arguments, self._marker, self._held = name, 0, "", ""
            self._read = self._function
            self._function(rest, pieces)
        elif name is not None:
            self._give_up(pieces)

    def _function(self, run: str, pieces: list[Piece]) -> None:
        """Whitespace; anything else ends the call."""
        if run.strip():
            pieces.append(Piece("arguments", "}"))
            self._between(run, pieces)

    def _keyed(self, run: str, pieces: list[Piece]) -> None:
        self._held += run
        key = _before(self._held)
        if key:
            rest = self._held[self._held.index(">") + 1:]
            comma = ", " if self._num_arguments else ""
            is_typed = argument(self._name, key) in self._typed_arguments
            self._null = "" if nullable(self._name, key) in self._typed_arguments else None
            quote = "" if is_typed or self._null is not None else '"'
            pieces.append(Piece("arguments", f"{comma}{quoted(key)}: {quote}"))
            self._num_arguments += 1
            self._typed, self._json, self._held = [] if is_typed else None, None, ""
            self._is_fresh = self._is_blank = True
            self._read = self._value
            self._value(rest, pieces)
        elif key is not None:
            self._read = self._function

    def _value(self, run: str, pieces: list[Piece]) -> None:
        """The value as written, without the line breaks around it."""
        self._held += run
        self._is_line = run.endswith("\n")
        if self._is_fresh and self._held:
            self._is_fresh, self._held = False, self._held.removeprefix("\n")
        value, self._held = self._held.removesuffix("\n"), "\n" if self._held.endswith("\n") else ""
        if self._typed is not None:
            self._typed.append(value)
            if self._is_blank and (begun := value.lstrip()):
                self._is_blank, value = False, begun
                self._json = JsonValue() if begun[0] in '[{"' else None
            if self._json is not None:
                self._json.feed(value)
        elif self._null is not None:
            self._null += value
            if not NULL.startswith(self._null):
                pieces.append(Piece("arguments", quoted(self._null)[:-1]))
                self._null = None
        elif value:
            pieces.append(Piece("arguments", quoted(value)[1:-1]))

    def _close_value(self, pieces: list[Piece]) -> None:
        if self._typed is not None:
            end = _literal("".join(self._typed).strip())
        elif self._null is not None:
            end = NULL if self._null == NULL else quoted(self._null)
        else:
            end = '"'
        pieces.append(Piece("arguments", end))
        self._held, self._read = "", self._function


def _before(text: str) -> str | None:
    """The text before '>'. None: incomplete; empty: not a name."""
    place = text.find(">", 0, MAX_NAME_CHARS + 1)
    if place < 0:
        return None if len(text) <= MAX_NAME_CHARS else ""
    return text[:place].strip()


def _literal(text: str) -> str:
    """A JSON or Python literal; anything else becomes a string."""
    depth = deepest = 0
    for bracket in BRACKET.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    try:
        if deepest <= MAX_DEPTH:
            json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse)
            return text
    except ValueError:
        pass
    return WORDS.get(text) or (_of_python(text) if text.startswith(("[", "{")) else None) or quoted(text)


def _of_python(text: str) -> str | None:
    """JSON of a list or dict as Python writes it, in which models confuse the two languages."""
    call = PythonCall()
    with contextlib.suppress(NoCall):
        whole = f"f(a={text})"
        is_whole = call.feed(whole) == len(whole) and call.is_closed
        if is_whole and json.loads(call.arguments, parse_int=str).keys() == {"a"}:
            return call.arguments.removeprefix('{"a": ').removesuffix("}")
    return None


def _refuse(_: str) -> NoReturn:
    """NaN and infinity are not JSON."""
    raise ValueError
