"""Rewrites JSON schemas so that llguidance (1.9) enforces all of them; where it would let pass what JSON Schema
excludes, and no rewriting helps, a schema is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shared.bounds import Bounds
from shared.errors import InvalidGrammar

# With escapes of any character, "\u0061" would be another name than "a", for properties and for their patterns.
ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}
BY_NAME = ("properties", "$defs", "definitions")
DATA = ("const", "enum", "default", "examples")         # their values are data, not schemas
UNTOLD = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
MAX_EXACT = 1 << 53         # integers: beyond, llguidance rounds them as doubles


def enforceable(schema: Any) -> Any:
    """An equivalent schema, which llguidance enforces. Raises InvalidGrammar when there is none."""
    return _said(schema, Bounds(schema))


def _said(schema: Any, bounds: Bounds) -> Any:
    if isinstance(schema, list):
        return [_said(part, bounds) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounds.require_exact(schema)
    least, required = schema.get("minProperties"), schema.get("required")
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0) and (
            schema.keys().isdisjoint({"allOf", "$ref"})):                       # which may require the rest
        raise InvalidGrammar("This cannot be enforced: minProperties, where fewer properties are required.")
    return {key: _said_of(key, value, bounds) for key, value in schema.items() if key != "x-guidance"}


def _said_of(key: str, value: Any, bounds: Bounds) -> Any:
    if key in DATA:
        if key in ("const", "enum") and not _is_told(value):
            raise InvalidGrammar("This cannot be enforced: a constant with a control character, or with a whole number "
                                 "that takes more than 53 bits.")
        return value
    if key == "pattern" and isinstance(value, str):
        return _quotes_apart(value)
    if key == "patternProperties" and isinstance(value, dict):
        return {_quotes_apart(pattern): _said(part, bounds) for pattern, part in value.items()}
    if key in BY_NAME and isinstance(value, dict):
        return {name: _said(part, bounds) for name, part in value.items()}
    return _said(value, bounds)


def _is_told(value: Any) -> bool:
    """Whether the compiler writes this constant exactly."""
    if isinstance(value, dict):
        return all(map(_is_told, (*value, *value.values())))
    if isinstance(value, list):
        return all(map(_is_told, value))
    if isinstance(value, str):
        return not UNTOLD.search(value)
    return not isinstance(value, int) or abs(value) <= MAX_EXACT


def _quotes_apart(pattern: str) -> str:
    """Excludes NUL from every negated class: one that holds all control characters would match quotes and backslashes
    too, even where it excludes them."""
    return "".join(_parts(pattern))


def _parts(pattern: str) -> Iterator[str]:
    place = 0
    while place < len(pattern):
        part = pattern[place:place + (2 if pattern[place] == "\\" else 1)]
        if pattern.startswith("[^", place):
            first = pattern[place + 2:place + 3]
            part = pattern[place:place + (3 if first in "]-" else 2)]           # which are themselves there
            yield r"[^\x00" + ("\\" + first if len(part) > 2 else "")
        else:
            yield part
        place += len(part)
