"""Finds numeric bounds that llguidance (1.9) gets wrong: it writes an excluded integer where the bounds are less than 1
apart, 0 for (0, 0.5] and -5 for [-5.5, -5). Wider intervals are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shared.errors import InvalidGrammar

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
EITHER = ("anyOf", "oneOf")
MAX_LOOKS = 100_000                                     # visits of schemas, repeated ones through $ref too
REFUSED = ("This cannot be enforced: bounds less than 1 apart, of which the one nearer to 0 is a whole number and is "
           "excluded.")

Pairs = list[tuple[str, float]]


@dataclass
class Bounds:
    """Checks the bounds of each part of a schema: alone, with its allOf and $ref, and with each option of an anyOf or
    oneOf. Not checked: bounds that only meet in two options, or in one property that several parts list."""

    schema: Any
    num_looks: int = 0

    def require_exact(self, part: dict[str, Any]) -> None:
        """Raises InvalidGrammar."""
        if _may_be_a_fraction(part) and self._excludes_a_whole_alone(part):
            raise InvalidGrammar(REFUSED)

    def _excludes_a_whole_alone(self, part: dict[str, Any]) -> bool:
        """Alone, and with each option of its anyOf and oneOf."""
        all_of = list(self._all_of(part))
        bounds = [bound for each in all_of for bound in _own(each)]
        either = [option for each in all_of for key in EITHER for option in _listed(each, key)]
        return _is_missed(bounds) or any(
            _is_missed(bounds + [bound for each in self._all_of(option) for bound in _own(each)])
            for option in either)

    def _all_of(self, part: Any) -> Iterator[dict[str, Any]]:
        """The part, and what it must satisfy too (allOf, $ref), each once."""
        waiting, seen = [part], set[int]()
        while waiting:
            part = waiting.pop()
            self.num_looks += 1
            if self.num_looks > MAX_LOOKS:
                raise InvalidGrammar("This cannot be enforced: it takes too much work.")
            if isinstance(part, dict) and id(part) not in seen:
                seen.add(id(part))
                yield part
                waiting += [*_listed(part, "allOf"), self._meant(part.get("$ref"))]

    def _meant(self, reference: Any) -> Any:
        """What a reference within the schema leads to; None: nothing, or out of it."""
        found = self.schema
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return found if reference == "#" else None
        for name in reference[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return found


def _own(schema: dict[str, Any]) -> Pairs:
    return [(key, schema[key]) for key in BOUNDS if isinstance(schema.get(key), int | float)]


def _listed(schema: dict[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _is_missed(bounds: Pairs) -> bool:
    low = max(((value, key != "minimum") for key, value in bounds if key.endswith("inimum")), default=None)
    high = max(((-value, key != "maximum") for key, value in bounds if key.endswith("aximum")), default=None)
    return low is not None and high is not None and any(
        is_excluded and 0 <= near == near // 1 and -other < near + 1
        for (near, is_excluded), (other, _) in ((low, high), (high, low)))


def _may_be_a_fraction(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type", "number")
    return kinds == "number" or (isinstance(kinds, list) and "number" in kinds)
