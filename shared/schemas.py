"""Rewrites JSON schemas so that llguidance (1.9) enforces all of them; a schema of which it would accept what JSON
Schema excludes, and which no rewriting helps, is refused.
"""

from __future__ import annotations

import re
from typing import Any

from shared.bounds import MAX_EXACT, Bounds, moved_inwards, path_of
from shared.errors import InvalidGrammar
from shared.patterns import within_json

# If any character could be escaped, "\u0061" would be a name other than "a", for properties and for their patterns.
ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}
BY_NAME = ("properties", "$defs", "definitions")
DATA = ("const", "enum", "default", "examples")         # their values are data, not schemas
UNTOLD = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
OUTSIDE = "This cannot be enforced: the schema refers to what is not in it, and nothing is fetched."


def enforceable(schema: Any) -> Any:
    """An equivalent schema that llguidance enforces. Raises InvalidGrammar when there is none."""
    return _said(schema, Bounds(schema))


def _said(schema: Any, bounds: Bounds) -> Any:
    if isinstance(schema, list):
        return [_said(part, bounds) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounds.require_exact(schema)
    _require_plain_references(schema, bounds)
    _require_properties(schema, bounds)
    return {key: _said_of(key, value, bounds) for key, value in moved_inwards(schema).items() if key != "x-guidance"}


def _require_plain_references(schema: dict[str, Any], bounds: Bounds) -> None:
    """Requires references to be paths to schemas within this one, and not circular. Raises InvalidGrammar."""
    if "$id" in schema and schema is not bounds.schema:
        raise InvalidGrammar("This cannot be enforced: a part of the schema has an $id of its own.")
    if not isinstance(reference := schema.get("$ref"), str):
        return
    names = path_of(reference)
    if reference != "#" and not reference.startswith("#/"):
        raise InvalidGrammar(OUTSIDE)
    if any(name in DATA and before not in BY_NAME for before, name in zip(["", *names], names, strict=False)):
        raise InvalidGrammar("This cannot be enforced: a reference leads to a value, not to a schema.")
    seen, found = {id(schema)}, bounds.meant(reference)
    while isinstance(found, dict) and "$ref" in found:
        if id(found) in seen:
            raise InvalidGrammar("This cannot be enforced: something in it is defined by itself.")
        seen.add(id(found))
        bounds.look()
        found = bounds.meant(found["$ref"])


def _require_properties(schema: dict[str, Any], bounds: Bounds) -> None:
    """Refuses a minProperties above what is required: llguidance counts a property that is written twice as two."""
    if not isinstance(schema.get("minProperties"), int):
        return
    parts = list(bounds.all_of(schema))
    required = {name for part in parts for name in _names(part.get("required"))}
    least = max(part["minProperties"] for part in parts if isinstance(part.get("minProperties"), int))
    if least > max(1, len(required)):
        raise InvalidGrammar("This cannot be enforced: minProperties, where fewer properties are required.")


def _names(required: Any) -> list[str]:
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _said_of(key: str, value: Any, bounds: Bounds) -> Any:
    if key in DATA:
        if key in ("const", "enum") and not _is_told(value):
            raise InvalidGrammar("This cannot be enforced: a constant with a control character, or with a whole number "
                                 "that takes more than 53 bits.")
        return value
    if key == "pattern" and isinstance(value, str):
        return within_json(value)
    if key == "patternProperties" and isinstance(value, dict):
        return {within_json(pattern): _said(part, bounds) for pattern, part in value.items()}
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
