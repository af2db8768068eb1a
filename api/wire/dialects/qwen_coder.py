"""Qwen3-Coder's calls, as elements: every argument between markers, strings as they are, all else as JSON.

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

Text may come before. The tool's schema says which arguments are not strings: the log's header keeps their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    require_plain,
    with_options,
)
from api.wire.dialects.elements import (
    CALL,
    END_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    ElementReader,
    argument,
    nullable,
)
from shared.errors import InvalidGrammar

LENGTHS = ("minLength", "maxLength")
LIMITS = {"enum", "const", "pattern", "format", *LENGTHS}
TYPING = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}
ENFORCED_OF_STRINGS = {"type", "enum", "const", *LENGTHS, *NOTES}       # of a strict tool's
# What a string of a grammar never contains: its reader could take it for the end of the value.
ENDS = (END_PARAMETER, END_FUNCTION, PARAMETER)


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
        arguments = [(tool["name"], name, schema) for tool in tools
                     for name, schema in arguments_of(tool)[0].items()]
        return (*(argument(tool, name) for tool, name, schema in arguments if not _is_string(schema)),
                *(nullable(tool, name) for tool, name, schema in arguments if _is_string(schema) and _has_null(schema)))


def _rules(rule: str, tool: Mapping[str, Any]) -> Iterator[str]:
    require_plain(tool)
    given, is_strict, definitions = tool.get("parameters"), bool(tool.get("strict")), definitions_of(tool)
    properties, required = arguments_of(tool)
    names = [name for name in properties if _is_name(name)]
    if not set(required) <= set(names):
        raise InvalidGrammar("A required argument has no schema, or this model cannot write its name.")
    head, others = quoted(FUNCTION + tool["name"] + ">\n"), (given or {}).get("additionalProperties", {})
    if given is not None and not properties and isinstance(others, dict) and _is_string(others):
        name = rf"{quoted(PARAMETER)} /[^<>\s]{{1,{MAX_NAME_CHARS}}}/ {quoted('>' + chr(10))}"
        yield f"{rule}: {head} ({name} {rule}_any)*"
        yield from _value(f"{rule}_any", others, definitions, is_strict)
        return
    arguments = [f"{rule}_{number}" + ("" if name in required else "?") for number, name in enumerate(names)]
    yield f"{rule}: {' '.join([head, *arguments])}"
    for number, name in enumerate(names):
        yield f"{rule}_{number}: {quoted(f'{PARAMETER}{name}>' + chr(10))} {rule}_{number}_value"
        yield from _value(f"{rule}_{number}_value", properties[name], definitions, is_strict)


def _value(rule: str, schema: dict[str, Any], definitions: dict[str, Any], is_strict: bool) -> Iterator[str]:
    """A value and its closing marker."""
    end = quoted(f"\n{END_PARAMETER}\n")
    if not _is_string(schema):
        yield f"{rule}: %json {json.dumps(with_options(schema | definitions, is_strict=is_strict))} {end}"
        return
    if is_strict:
        _require_enforced(schema)
    null = f' | "null" {end}' if _has_null(schema) else ""
    said = [each for each in constants_of(schema) if isinstance(each, str)]
    if constants := [each for each in said if not any(end in each for end in ENDS)]:
        yield f"{rule}: ({' | '.join(map(quoted, constants))}) {end}{null}"
        return
    if said and is_strict:
        raise InvalidGrammar("This model cannot write what a string of a strict tool must be.")
    least, most = (_length(schema, key) for key in LENGTHS)
    yield f"{rule}: {rule}_text{null}"
    yield rf"{rule}_text[suffix={end}]: {rule.upper()}"
    yield f"{rule.upper()}: /(?s:.){{{least or 0},{'' if most is None else most}}}/ & /{ANYTHING_ELSE}/"


def _require_enforced(schema: dict[str, Any]) -> None:
    """Raises InvalidGrammar when a strict tool's string is limited by what is not enforced here."""
    options = listed(schema, "anyOf")
    is_optional = bool(options) and all(each.keys() <= {"type", *NOTES} for each in options if isinstance(each, dict))
    has_no_length = any(key in schema and _length(schema, key) is None for key in LENGTHS)
    if has_no_length or schema.keys() - ENFORCED_OF_STRINGS - ({"anyOf"} if is_optional else set()):
        raise InvalidGrammar("A strict tool's strings are limited by constants or lengths alone, for this model.")


def _length(schema: dict[str, Any], key: str) -> int | None:
    found: Any = schema.get(key)
    is_whole = isinstance(found, int) or (isinstance(found, float) and found.is_integer())
    return int(found) if is_whole and found >= 0 else None


def _tail_but(words: Sequence[str]) -> str:
    """A regular expression in Lark: a tail without '<' that begins with none of these words. Its size is theirs. The
    complement of a search for them would be shorter, and beside a limit of length be too much work."""
    first = sorted({word[0] for word in words})
    others = "".join(map(_escaped, first))
    tails = [[word[1:] for word in words if word[0] == each] for each in first]
    ways = [f"{_escaped(each)}{_tail_but(rest)}" for each, rest in zip(first, tails, strict=True) if "" not in rest]
    return f"({'|'.join([f'[^<{others}][^<]*', *ways])})?"


def _escaped(character: str) -> str:
    return re.escape(character).replace("/", r"\/")


ANYTHING_ELSE = f"[^<]*(<{_tail_but([end[1:] for end in ENDS])})*"      # a text without ENDS, which begin with '<'


def _has_null(schema: dict[str, Any]) -> bool:
    """Whether what may be a string may be null too."""
    options = [schema, *listed(schema, "anyOf")]
    return any("null" in kinds_of(each) for each in options) and (
        not constants_of(schema) or None in constants_of(schema))


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
