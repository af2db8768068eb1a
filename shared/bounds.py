"""Numeric bounds, where llguidance (1.9) gets them wrong.

It generates an excluded integer where two bounds are less than 1 apart: 0 for (0, 0.5], -5 for [-5.5, -5). Such schemas
are found here and refused. Its bounds are doubles and 64-bit integers: bounds beyond 53 bits are moved inwards, to a
number that both represent exactly.
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
MAX_LOOKS = 100_000                                     # visits of schemas, repeated visits through $ref included
MAX_EXACT = 1 << 53                                     # integers up to here are exact as doubles
MOST = math.nextafter(2.0**63, 0.0)                     # the largest double below 2**63
REFUSED = ("This cannot be enforced: bounds less than 1 apart, of which the one nearer to 0 is a whole number and is "
           "excluded.")
TOO_LARGE = "This cannot be enforced: a bound or a multipleOf beyond 64 bits."

End = tuple[float, bool]                                # of an interval: the larger the tighter; True: excluded
Interval = tuple[End | None, End | None]                # its lower end, and its upper end negated; None: unbounded


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
        """Whether its bounds miss an excluded integer, alone or with one option of its anyOf or oneOf."""
        common = list(self.all_of(part))
        interval = _interval(common)
        options = (option for each in common for key in EITHER for option in _listed(each, key))
        return _is_missed(interval) or any(
            _is_missed(_within(interval, _interval(self.all_of(option)))) for option in options)

    def all_of(self, part: Any) -> Iterator[dict[str, Any]]:
        """Yields the part and every schema that applies with it (allOf, $ref), each once."""
        waiting, seen = [part], set[int]()
        while waiting:
            part = waiting.pop()
            self.look()
            if isinstance(part, dict) and id(part) not in seen:
                seen.add(id(part))
                yield part
                waiting += [*_listed(part, "allOf"), self.meant(part.get("$ref"))]

    def look(self) -> None:
        """Counts a visit. Raises InvalidGrammar above `MAX_LOOKS`."""
        self.num_looks += 1
        if self.num_looks > MAX_LOOKS:
            raise InvalidGrammar("This cannot be enforced: it takes too much work.")

    def meant(self, reference: Any) -> Any:
        """The part of the schema that a reference points to; None: there is none, or it is outside the schema."""
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
    """A copy with bounds that are enforced exactly: those beyond 53 bits are moved inwards to the next double. Raises
    InvalidGrammar when no value is left, and for a multipleOf beyond 53 bits."""
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
    number = float(value) if abs(value) < MOST else MOST if value > 0 else -MOST
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
    """The intersection of the intervals of all these schemas."""
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
