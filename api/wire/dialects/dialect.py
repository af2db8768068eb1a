"""What every dialect has: signs in templates, markers, a grammar that makes calls, a reader that finds them.

It knows no dialect.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from api.wire.reasoning import BEGIN, END
from shared.errors import InvalidGrammar
from shared.grammar import within
from shared.schemas import ESCAPES, enforceable

MAX_HEAD_CHARS = 512        # between a call's marker and its arguments
MAX_NAME_CHARS = 256
TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# What may stand beside the properties of a strict tool's arguments where no JSON is written: else it is not enforced.
ENFORCED = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema",
                      "title", "description"})
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Tools = Iterable[Mapping[str, Any]]                     # functions, as OpenAI describes them
AddedId = Callable[[str], int | None]                   # the id of a text that is one added token of the tokenizer


class Piece(NamedTuple):
    """What a stretch of text turned out to be."""

    kind: Literal["text", "reasoning", "call", "arguments"]     # a call gives its name, then its arguments in pieces
    value: str


class Reader(Protocol):
    """Reads one choice's text in pieces; every character a bounded number of times."""

    @property
    def is_inside(self) -> bool:
        """Whether the current position is inside reasoning."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain by now."""

    def finish(self) -> list[Piece]:
        """The text held back, once no more arrives."""


@dataclass(frozen=True)
class Dialect(ABC):
    name: str                                           # in settings, and in the headers of logs
    signs: tuple[tuple[str, ...], ...]                  # of a chat template: it has all words of one of these
    markers: tuple[str, ...] = ()                       # of these, tokens are shown as text to the reader
    end_of_thought: str = ""                            # for dialects that also separate reasoning from the answer
    without_tools: Dialect | None = None                # reads answers that may not call a tool; None: as text
    with_tokens: Dialect | None = None                  # the variant where its first marker is a token
    can_call: bool = True
    is_leading: bool = False                            # calls begin the answer, where other answers may begin alike
    opening: str = ""                                   # the marker with which calls, and only calls, begin
    also_opens: str = ""                                # what its reader also accepts as opening
    fold_version: int = 3                               # the first fold that reads it (api/wire/fold.py)

    def of(self, added_id: AddedId) -> Dialect:
        """This dialect, or its variant for tokenizers in which its first marker is a token."""
        other = self.with_tokens
        return self if other is None or added_id(other.markers[0]) is None else other

    def is_shown_by(self, template: str) -> bool:
        return any(all(word in template for word in words) for words in self.signs)

    @abstractmethod
    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        """A Lark grammar of calls of these tools and nothing else: exactly one call, or one or more. Markers that are
        single tokens are not text in a grammar. Raises InvalidGrammar."""

    def among_text(self, calls: str, *, is_one: bool, may_think: bool, added_id: AddedId) -> str:
        """A grammar of text that may contain such calls, after reasoning if the model may reason. Here a token opens
        calls, no text spells it, and reasoning is text like any other; empty where there is no such token."""
        if not self.opening or added_id(self.opening) is None:
            return ""
        opens = "|".join(re.escape(text) for text in (self.opening, self.also_opens) if text)
        shown = sorted(token_id for token_id in (added_id(BEGIN), added_id(END)) if token_id is not None)
        more = f" (<[{','.join(map(str, shown))}]> TEXT?)*" if shown else ""
        return within(f"start: text (@calls text){'?' if is_one else '*'}\ntext: TEXT?{more}\n"
                      f"TEXT: {text_but(f'(?s:.)*({opens})')}\n", calls=calls)

    def framed(self, form: str, added_id: AddedId) -> str:
        """The grammar of a constrained answer, with the dialect's own parts around it."""
        return form

    def typed_arguments(self, tools: Tools) -> tuple[str, ...]:
        """The arguments that are not strings, if the dialect writes strings unquoted: kept in the header of the log."""
        return ()

    @abstractmethod
    def reader(self) -> Reader:
        """A reader for one answer."""

    def reader_of(self, typed_arguments: Collection[str]) -> Reader:
        """A reader for an answer whose header names these arguments."""
        return self.reader()


def marker(text: str, added_id: AddedId) -> str:
    """A marker in a grammar: its token where it is one, else its text."""
    token_id = added_id(text) if text else None
    return quoted(text) if token_id is None else f"<[{token_id}]>"


def text_but(begun: str) -> str:
    """A Lark terminal: any text that does not begin with a match of this regular expression."""
    begun = begun.replace("/", r"\/")
    return f"/(?s:.)+/ & ~/({begun})(?s:.)*/"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def schema_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments; without parameters, an empty object. If the tool is not strict, only what can
    be enforced is kept."""
    schema = NOTHING if tool.get("parameters") is None else tool["parameters"]
    return with_options({**schema, "type": "object"}, is_strict=bool(tool.get("strict")))


def with_options(schema: dict[str, Any], *, is_strict: bool) -> dict[str, Any]:
    """The schema with llguidance's options. Raises InvalidGrammar where it cannot be enforced."""
    if is_strict:
        schema = enforceable(schema)
    options = {"whitespace_pattern": "[ ]?"} | ESCAPES | ({} if is_strict else {"lenient": True})
    return schema | {"x-guidance": options}


def eased_schemas(tool: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Weaker versions of a tool whose schema cannot be enforced: its shape only, then its arguments' names only."""
    properties, _ = arguments_of(tool)
    names: dict[str, Any] = {"properties": {name: {} for name in properties}}
    for parameters in (_shape(tool.get("parameters")), names):
        yield {**tool, "parameters": parameters}


def _shape(schema: Any) -> dict[str, Any]:
    """Types, properties and items of a schema, as far as they are valid."""
    if not isinstance(schema, dict):
        return {}
    properties, required = arguments_of({"parameters": schema})
    shape: dict[str, Any] = {"type": kinds} if (kinds := [kind for kind in kinds_of(schema) if kind in TYPES]) else {}
    if properties:
        shape["properties"] = {name: _shape(each) for name, each in properties.items()}
        shape["required"] = [name for name in required if name in properties]
    if isinstance(schema.get("items"), dict):
        shape["items"] = _shape(schema["items"])
    return shape


def object_of(tool: Mapping[str, Any]) -> str:
    """A tool's arguments as JSON, in a grammar."""
    return f"%json {json.dumps(schema_of(tool))}"


def arguments_of(tool: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The schemas of a tool's arguments, and which are required; an invalid schema allows anything."""
    schema = tool.get("parameters") or {}
    found = schema.get("properties")
    properties = found.items() if isinstance(found, dict) else ()
    required = [name for name in listed(schema, "required") if isinstance(name, str)]
    return {name: each if isinstance(each, dict) else {} for name, each in properties}, required


def definitions_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions to which its parts may refer."""
    schema = tool.get("parameters") or {}
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def require_plain(tool: Mapping[str, Any]) -> None:
    """Raises InvalidGrammar when the arguments of a strict tool are more than an object with properties."""
    if tool.get("strict") and not (tool.get("parameters") or {}).keys() <= ENFORCED:
        raise InvalidGrammar("The arguments of a strict tool are an object with properties, for this model.")


def listed(schema: Any, key: str) -> list[Any]:
    """The list under a key of a schema, if there is one."""
    found = schema.get(key) if isinstance(schema, dict) else None
    return found if isinstance(found, list) else []


def kinds_of(schema: Any) -> list[str]:
    """The types that a schema names."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    return [kind] if isinstance(kind, str) else [each for each in listed(schema, "type") if isinstance(each, str)]


def constants_of(schema: Any) -> list[Any]:
    if isinstance(schema, dict) and "const" in schema:
        return [schema["const"]]
    return listed(schema, "enum")


def require_names(tools: Tools, is_name: Callable[[str], bool]) -> None:
    """Raises InvalidGrammar when a name cannot be written in the dialect."""
    if not all(is_name(tool["name"]) for tool in tools):
        raise InvalidGrammar("This model cannot call a tool of such a name: letters, digits, '_' and '-' are safe.")
