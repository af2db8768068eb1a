"""Qwen3-Coder's calls, as elements: every argument between markers, strings as they are, all else as JSON.

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

Text may come before. The tool's schema says which arguments are not strings: the log's header keeps their names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from api.wire.dialects.dialect import (
    MAX_NAME_CHARS,
    AddedId,
    Dialect,
    Tools,
    arguments_of,
    constants_of,
    definitions_of,
    kinds_of,
    listed,
    marker,
    quoted,
    require_names,
    with_options,
)
from api.wire.dialects.elements import (
    CALL,
    END_CALL,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    ElementReader,
    argument,
)
from shared.errors import InvalidGrammar

LENGTHS = ("minLength", "maxLength")
LIMITS = {"enum", "const", "pattern", "format", *LENGTHS}
TYPING = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}


@dataclass(frozen=True)
class QwenCoder(Dialect):
    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        """Arguments in the order of the schema."""
        tools = list(tools)
        require_names(tools, _is_name)
        call, end_call = marker(CALL, added_id), marker(END_CALL, added_id)
        more = "" if is_one else r' ("\n" call)*'
        names = " | ".join(f"tool_{number}" for number in range(len(tools)))
        rules = [f"start: call{more}", rf'call: {call} "\n" ({names}) "</function>\n" {end_call}']
        for number, tool in enumerate(tools):
            rules += _rules(f"tool_{number}", tool)
        return "\n".join(rules) + "\n"

    def reader(self) -> ElementReader:
        return self.reader_of(())

    def reader_of(self, typed_arguments: Collection[str]) -> ElementReader:
        return ElementReader(frozenset(typed_arguments))

    def typed_arguments(self, tools: Tools) -> tuple[str, ...]:
        return tuple(argument(tool["name"], name) for tool in tools for name, schema in arguments_of(tool)[0].items()
                     if not _is_string(schema))


def _rules(rule: str, tool: Mapping[str, Any]) -> Iterator[str]:
    properties, required = arguments_of(tool)
    names = [name for name in properties if _is_name(name)]
    if not set(required) <= set(names):
        raise InvalidGrammar("A required argument has no schema, or this model cannot write its name.")
    arguments = [f"{rule}_{number}" + ("" if name in required else "?") for number, name in enumerate(names)]
    head = quoted(FUNCTION + tool["name"] + ">\n")
    yield f"{rule}: {' '.join([head, *arguments])}"
    for number, name in enumerate(names):
        yield f"{rule}_{number}: {quoted(f'{PARAMETER}{name}>' + chr(10))} {rule}_{number}_value"
        yield from _value(f"{rule}_{number}_value", properties[name], definitions_of(tool), bool(tool.get("strict")))


def _value(rule: str, schema: dict[str, Any], definitions: dict[str, Any], is_strict: bool) -> Iterator[str]:
    """A value and its closing marker."""
    end = quoted(f"\n{END_PARAMETER}\n")
    if not _is_string(schema):
        yield f"{rule}: %json {json.dumps(with_options(schema | definitions, is_strict=is_strict))} {end}"
    elif constants := [each for each in constants_of(schema) if isinstance(each, str) and END_PARAMETER not in each]:
        yield f"{rule}: ({' | '.join(map(quoted, constants))}) {end}"
    else:
        if is_strict and schema.keys() & {"pattern", "format"}:
            raise InvalidGrammar("A strict tool's strings have neither pattern nor format, for this model.")
        least, most = (schema.get(key) for key in LENGTHS)
        times = f"{{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}}"
        yield rf"{rule}[suffix={end}]: /(.|\n){times}/"


def _is_string(schema: dict[str, Any]) -> bool:
    """Whether the text is the value itself: also if a string is one of several allowed types."""
    if not schema.keys() & TYPING:
        return True
    if kinds := kinds_of(schema):
        return "string" in kinds
    if options := listed(schema, "anyOf"):
        return any(kinds_of(each) == ["string"] and not each.keys() & LIMITS for each in options)
    values = constants_of(schema)
    return bool(values) and all(isinstance(value, str) for value in values)


def _is_name(name: str) -> bool:
    return not set(name) & set("<>\n") and name == name.strip() and len(name) <= MAX_NAME_CHARS


QWEN_CODER = QwenCoder("qwen3_coder", ((FUNCTION, PARAMETER),), (CALL, END_CALL), opening=CALL,
                       also_opens=FUNCTION)
