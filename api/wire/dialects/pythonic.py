"""Calls as a list of Python's: `[get_weather(city="Paris", days=3), f()]`, of Llama 4, ToolACE, LFM and others.

At the beginning of an answer, or after a marker. A call is reported when it is complete, so that what turns out not to
be one is text as written, without markers. A grammar produces Python where values are flat; deeper, true, false and
null are JSON's words, which the reader accepts too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.wire.dialects.dialect import (
    MAX_NAME_CHARS,
    NOTHING,
    AddedId,
    Dialect,
    Piece,
    Tools,
    arguments_of,
    constants_of,
    definitions_of,
    kinds_of,
    listed,
    quoted,
    require_names,
    require_plain,
    with_options,
)
from api.wire.dialects.leading import BLANK, BLANKS, leading
from api.wire.dialects.python_calls import NAME, NoCall, PythonCall
from api.wire.markers import MAX_BLANKS, Splitter
from shared.errors import InvalidGrammar

BEGINS = ("<|python_start|>", "<|tool_call_start|>")
ENDS = ("<|python_end|>", "<|tool_call_end|>")
QUOTES = ("'", '"')                                     # held back: a quote begins a string, whatever follows
KINDS: dict[type, set[str]] = {str: {"string"}, bool: {"boolean"}, type(None): {"null"}, float: {"number"},
                               int: {"integer", "number"}}
# What no text begins with, as a grammar says it: a marker, also behind other words; and a list up to what opens its
# first call. So numbers in a list, a link and a box to tick are text; `[see (1)]` cannot be said, though it is no call.
MARKED = rf"(?s:.)*({'|'.join(map(re.escape, BEGINS))})"
CALLED = rf"\[{BLANK}*([a-zA-Z_]|[^\x00-\x7F])([\w.\-]|[^\x00-\x7F])*{BLANK}*\("
WORDS = {True: '"True"', False: '"False"', None: '"None"'}


@dataclass(frozen=True)
class Pythonic(Dialect):
    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        tools = list(tools)
        require_names(tools, _is_name)
        more = "" if is_one else ' (", " call)*'
        numbers = range(len(tools))
        rules = [f'list: first{more} "]"', "first: " + " | ".join(f"FIRST_{i} tool_{i}" for i in numbers),
                 "call: " + " | ".join(f"NAME_{i} tool_{i}" for i in numbers), BLANKS]
        for number, tool in enumerate(tools):
            # The first call's name is one terminal with the bracket that opens the list, as `leading` needs it.
            rules += [f'FIRST_{number}: "[" BLANKS NAME_{number}', f"NAME_{number}: {quoted(tool['name'] + '(')}",
                      f'tool_{number}: tool_{number}_first_0 ")"', *_arguments(f"tool_{number}", tool)]
        pairs = [(added_id(begin), added_id(end)) for begin, end in zip(BEGINS, ENDS, strict=True)]
        marked = [f"<[{begin}]> list <[{end}]>" for begin, end in pairs if begin is not None and end is not None]
        return "\n".join(["start: " + " | ".join(["list", *marked]), *rules]) + "\n"

    def among_text(self, calls: str, *, is_one: bool, may_think: bool, added_id: AddedId) -> str:
        return leading(calls, called=f"{MARKED}|{CALLED}", goes_on=MARKED, is_one=is_one, may_think=may_think,
                       added_id=added_id)

    def reader(self) -> PythonicReader:
        return PythonicReader()


def _arguments(rule: str, tool: Mapping[str, Any]) -> list[str]:
    """Rules for the properties in their order: `first` before any was written, `rest` after one."""
    given, is_strict = tool.get("parameters"), bool(tool.get("strict"))
    schema = NOTHING if given is None else given
    require_plain(tool)
    properties, required = arguments_of(tool)
    if not properties and schema.get("additionalProperties") is not False:
        return [f'{rule}_first_0: ({rule}_any (", " {rule}_any)*)?', f'{rule}_any: /[a-z_][a-z0-9_]*/ "=" {rule}_value',
                f"{rule}_value: {_value(schema.get('additionalProperties'), definitions_of(tool), is_strict)}"]
    names = [name for name in properties if _is_name(name)]
    if not set(required) <= set(names):
        raise InvalidGrammar("A required argument has no schema, or this model cannot write its name.")
    definitions = definitions_of(tool)
    rules = [f'{rule}_first_{len(names)}: ""', f'{rule}_rest_{len(names)}: ""']
    for number, name in enumerate(names):
        item = f"{quoted(name + '=')} {rule}_value_{number} {rule}_rest_{number + 1}"
        skips = [""] * 2 if name in required else [f" | {rule}_{kind}_{number + 1}" for kind in ("first", "rest")]
        rules += [f"{rule}_first_{number}: {item}{skips[0]}", f'{rule}_rest_{number}: ", " {item}{skips[1]}',
                  f"{rule}_value_{number}: {_value(properties[name], definitions, is_strict)}"]
    return rules


def _value(schema: Any, definitions: dict[str, Any], is_strict: bool) -> str:
    """A literal: JSON's numbers, strings, lists and dicts are Python's too."""
    if not isinstance(schema, dict):
        schema = {}
    kinds = kinds_of(schema)
    if constants := _constants(schema, kinds):
        return " | ".join(constants)
    if len(kinds) > 1:
        return " | ".join(_value(schema | {"type": kind}, definitions, is_strict) for kind in kinds)
    if (options := listed(schema, "anyOf")) and not schema.keys() - {"anyOf", "title", "description", "default"}:
        return " | ".join(_value(each, definitions, is_strict) for each in options)
    if kinds == ["boolean"]:
        return '"True" | "False"'
    if kinds == ["null"]:
        return '"None"'
    return f"%json {json.dumps(with_options(schema | definitions, is_strict=is_strict))}"


def _constants(schema: dict[str, Any], kinds: list[str]) -> list[str]:
    """The constants of a schema that are of its types."""
    values = [value for value in constants_of(schema)
              if type(value) in KINDS and (not kinds or KINDS[type(value)] & set(kinds))]
    return [WORDS[value] if value is None or isinstance(value, bool) else quoted(json.dumps(value, ensure_ascii=False))
            for value in values]


def _is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and len(name) <= MAX_NAME_CHARS


class PythonicReader:
    is_inside = False                       # never inside reasoning

    def __init__(self) -> None:
        self._splitter = Splitter(BEGINS + ENDS)
        self._read = self._begin
        self._raw: list[str] = []           # becomes text if this is not a call
        self._held = ""                     # its end, which is incomplete
        self._call = PythonCall()

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for is_marker, run in self._splitter.feed(text):
            if is_marker and not self._call.in_string and self._held not in QUOTES:
                self._marker(run, pieces)
            else:
                self._take(run, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """The held text, also of a call that was cut off: half a call is not a call."""
        pieces: list[Piece] = []
        for _, run in self._splitter.finish():
            self._take(run, pieces)
        if self._read != self._next or self._held:
            self._give_up(pieces)
        return pieces

    def _take(self, run: str, pieces: list[Piece]) -> None:
        self._raw.append(run)
        self._held += run
        while self._held and self._read(pieces):
            pass

    def _marker(self, marker: str, pieces: list[Piece]) -> None:
        if self._read != self._behind:
            self._give_up(pieces)
        self._read = self._begin if marker in BEGINS else self._behind
        self._call = PythonCall()

    def _give_up(self, pieces: list[Piece]) -> None:
        text = "".join(run for run in self._raw if run not in BEGINS + ENDS)
        if text:
            pieces.append(Piece("text", text))
        self._drop()
        self._read = self._text

    def _drop(self) -> None:
        """Drops the held text: it has no meaning, or was reported."""
        self._raw.clear()
        self._held, self._call = "", PythonCall()

    def _begin(self, pieces: list[Piece]) -> bool:
        """Whether a list begins."""
        rest = self._held.lstrip()
        is_late = len(self._held) - len(rest) > MAX_BLANKS
        if not rest and not is_late:
            return False
        if is_late or rest[0] != "[":
            self._give_up(pieces)
            return False
        self._held, self._read = rest[1:], self._calls
        return True

    def _calls(self, pieces: list[Piece]) -> bool:
        """One call, as far as it goes."""
        try:
            size = self._call.feed(self._held)
        except NoCall:
            self._give_up(pieces)
            return False
        self._held = self._held[size:]
        if not self._call.is_closed:
            return False
        pieces += Piece("call", self._call.name), Piece("arguments", self._call.arguments)
        rest = self._held
        self._drop()
        self._raw, self._held, self._read = [rest], rest, self._next
        return True

    def _next(self, pieces: list[Piece]) -> bool:
        """Another call, or the end of the list."""
        rest = self._held = self._held.lstrip()
        if not rest:
            return False
        if rest[0] == ",":
            self._held, self._read = rest[1:], self._calls
        elif rest[0] == "]":
            self._drop()
            self._raw, self._held, self._read = [rest[1:]], rest[1:], self._behind
        else:
            self._give_up(pieces)
        return bool(self._held)

    def _behind(self, pieces: list[Piece]) -> bool:
        """Drops whitespace."""
        rest = self._held.lstrip()
        self._drop()
        if rest:
            pieces.append(Piece("text", rest))
            self._read = self._text
        return False

    def _text(self, pieces: list[Piece]) -> bool:
        pieces.append(Piece("text", self._held))
        self._drop()
        return False


PYTHONIC = Pythonic("pythonic", (("func_name1(",), (BEGINS[1],), ("<|tool_list_start|>",)), BEGINS + ENDS,
                    is_leading=True)
