"""Numeric bounds, where llguidance (1.9) gets them wrong.

It writes an excluded integer where the bounds are less than 1 apart, 0 for (0, 0.5] and -5 for [-5.5, -5): those are
found here, and refused. Its bounds are doubles, and integers of 64 bits: beyond 53 bits they are moved inwards, to
numbers that are both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from shared.errors import InvalidGrammar

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
EITHER = ("anyOf", "oneOf")
MAX_LOOKS = 100_000                                     # visits of schemas, repeated ones through $ref too
MAX_EXACT = 1 << 53                                     # integers: beyond, doubles leave some out
MOST = math.nextafter(2.0**63, 0.0)                     # of 64 bits, as a double
REFUSED = ("This cannot be enforced: bounds less than 1 apart, of which the one nearer to 0 is a whole number and is "
           "excluded.")
TOO_LARGE = "This cannot be enforced: a bound or a multipleOf beyond 64 bits."

End = tuple[float, bool]                                # of an interval: how far inwards it is, and if it is excluded
Interval = tuple[End | None, End | None]                # its lower end, and its upper one, negated


@dataclass
class Bounds:
    """Checks the bounds of each part of a schema: alone, with its allOf and $ref, and with each option of an anyOf or
    oneOf. Not checked: bounds that only meet in two options, or in one property that several parts list."""

    schema: Any
    num_looks: int = 0
    _found: dict[str, Any] = field(default_factory=dict)            # by reference

    def require_exact(self, part: dict[str, Any]) -> None:
        """Raises InvalidGrammar."""
        if _may_be_a_fraction(part) and self._excludes_a_whole_alone(part):
            raise InvalidGrammar(REFUSED)

    def _excludes_a_whole_alone(self, part: dict[str, Any]) -> bool:
        """Alone, and with each option of its anyOf and oneOf."""
        common = list(self.all_of(part))
        interval = _interval(common)
        options = (option for each in common for key in EITHER for option in _listed(each, key))
        return _is_missed(interval) or any(
            _is_missed(_within(interval, _interval(self.all_of(option)))) for option in options)

    def all_of(self, part: Any) -> Iterator[dict[str, Any]]:
        """The part, and what it must satisfy too (allOf, $ref), each once."""
        waiting, seen = [part], set[int]()
        while waiting:
            part = waiting.pop()
            self.look()
            if isinstance(part, dict) and id(part) not in seen:
                seen.add(id(part))
                yield part
                waiting += [*_listed(part, "allOf"), self.meant(part.get("$ref"))]

    def look(self) -> None:
        """Raises InvalidGrammar when it was too often."""
        self.num_looks += 1
        if self.num_looks > MAX_LOOKS:
            raise InvalidGrammar("This cannot be enforced: it takes too much work.")

    def meant(self, reference: Any) -> Any:
        """What a reference within the schema leads to; None: nothing, or out of it."""
        if not isinstance(reference, str):
            return None
        if reference not in self._found:
            self._found[reference] = self._follow(reference)
        return self._found[reference]

    def _follow(self, reference: str) -> Any:
        found = self.schema if reference == "#" or reference.startswith("#/") else None
        for name in path_of(reference):
            if isinstance(found, list) and name.isascii() and name.isdigit() and len(name) < 9:
                found = dict(enumerate(found)).get(int(name))
            else:
                found = found.get(name) if isinstance(found, dict) else None
            if found is None:
                break
        return found


def path_of(reference: str) -> list[str]:
    """The names in a reference like #/$defs/a."""
    return [unquote(name).replace("~1", "/").replace("~0", "~") for name in reference.split("/")[1:]]


def moved_inwards(schema: dict[str, Any]) -> dict[str, Any]:
    """With bounds that are kept exactly: those beyond 53 bits are moved to the next such number, what is beyond 64 bits
    is excluded. Raises InvalidGrammar where nothing is left."""
    said = dict(schema)
    for key, value in _own(schema):
        if abs(value) >= MAX_EXACT:
            del said[key]
            new, combine = ("minimum", max) if key.endswith("inimum") else ("maximum", min)
            number = _next_double(value, is_low=new == "minimum", is_excluded=new != key)
            said[new] = combine(number, said.get(new, number))
    if isinstance(step := schema.get("multipleOf"), int | float) and abs(step) > MAX_EXACT:
        raise InvalidGrammar(TOO_LARGE)
    return said


def _next_double(value: float, *, is_low: bool, is_excluded: bool) -> int:
    sign = 1 if is_low else -1
    number = float(value) if abs(value) < MOST else math.copysign(MOST, value)
    while sign * number < sign * value or (is_excluded and number == value):
        if sign * number >= MOST:
            raise InvalidGrammar(TOO_LARGE)
        number = math.nextafter(number, sign * math.inf)
    return int(number)


def _own(schema: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, schema[key]) for key in BOUNDS if isinstance(schema.get(key), int | float)]


def _listed(schema: dict[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _interval(schemas: Iterable[dict[str, Any]]) -> Interval:
    """Where the bounds of all of them meet."""
    bounds = [bound for schema in schemas for bound in _own(schema)]
    return (max(((value, key != "minimum") for key, value in bounds if key.endswith("inimum")), default=None),
            max(((-value, key != "maximum") for key, value in bounds if key.endswith("aximum")), default=None))


def _within(one: Interval, other: Interval) -> Interval:
    low, high = (max((end for end in ends if end), default=None) for ends in zip(one, other, strict=True))
    return low, high


def _is_missed(interval: Interval) -> bool:
    low, high = interval
    return low is not None and high is not None and any(
        is_excluded and 0 <= near == near // 1 and -other < near + 1
        for (near, is_excluded), (other, _) in ((low, high), (high, low)))


def _may_be_a_fraction(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type", "number")
    return kinds == "number" or (isinstance(kinds, list) and "number" in kinds)
