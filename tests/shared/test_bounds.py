"""What a schema excludes does not pass; tried against the compiler itself, whose next version may be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.bounds import MAX_LOOKS
from shared.errors import InvalidGrammar
from shared.grammar import Grammars, of_schema
from shared.schemas import enforceable
from worker import tiny

TOKENIZER = Tokenizer.from_file(str(Path(tiny.MODEL_FOLDER) / "tokenizer.json"))
GRAMMARS = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), ())
NUMBERS = ["0", "-0", "1", "-1", "5", "-5", "0.1", "-0.1", "0.5", "1.5", "-1.5", "5.5", "6", "-6", "5.0", "-5.2", "0.0"]

Schema = dict[str, Any]
WAYS: dict[str, Callable[[Schema, Schema], Schema]] = {
    "beside": lambda one, other: one | other,
    "both": lambda one, other: {"allOf": [one, other]},
    "within": lambda one, other: {"allOf": [{"allOf": [{"allOf": [one]}]}]} | other,
    "one of": lambda one, other: one | {"anyOf": [{"type": "string"}, other]},
    "either": lambda one, other: one | {"oneOf": [other]},
    "elsewhere": lambda one, other: {"$ref": "#/$defs/a~1b", "$defs": {"a/b": one}} | other,
    "both elsewhere": lambda one, other: {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
                                          "$defs": {"a": one, "b": other}},
}


def accepts(schema: Schema, text: str) -> bool:
    matcher = GRAMMARS.compile(of_schema(schema))
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (5, 5.5), (1, 1.001), (-0.5, 0), (-5.5, -5)])
def test_bounds_that_would_let_pass_what_they_exclude_are_refused(low: float, high: float, way: str) -> None:
    keys = ("exclusiveMinimum", "maximum") if low >= 0 else ("minimum", "exclusiveMaximum")
    schema = WAYS[way]({"type": "number", keys[0]: low}, {keys[1]: high})
    for place in (schema, {"properties": {"default": schema}, "$defs": schema.get("$defs", {})}):
        with pytest.raises(InvalidGrammar, match="bounds less than 1 apart"):
            of_schema(place)


bounds = st.dictionaries(st.sampled_from(["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"]),
                         st.sampled_from([-5.5, -5, -1, -0.5, 0, 0.5, 1, 1.5, 5, 5.5]), max_size=2)


@given(one=bounds, other=bounds, way=st.sampled_from(sorted(WAYS)))
def test_what_is_not_refused_is_enforced(one: Schema, other: Schema, way: str) -> None:
    schema = WAYS[way]({"type": "number"} | one, other)
    try:
        passed = [text for text in NUMBERS if accepts(schema, text)]
    except InvalidGrammar:
        return
    for text in passed:
        jsonschema.validate(float(text), schema)


@pytest.mark.parametrize("schema", [
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5}, {"exclusiveMinimum": 0, "maximum": 1},
    {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 0.5},
    {"type": "string", "exclusiveMinimum": 0, "maximum": 0.5},
    {"const": {"exclusiveMinimum": 0, "maximum": 0.5}}, {"default": {"exclusiveMinimum": 0, "maximum": 0.5}},
    {"enum": [{"exclusiveMinimum": 0, "maximum": 0.5}]}, {"exclusiveMinimum": {"maximum": 0.5}},
    {"anyOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}, {"allOf": {"exclusiveMinimum": 0}, "maximum": 0.5},
    {"properties": {"a": {"exclusiveMinimum": 0}, "b": {"maximum": 0.5}}}, {"$ref": "#/a", "maximum": 0.5},
    {"allOf": [{"$ref": "#"}], "exclusiveMinimum": 0}, {"$ref": "#/a/b/c"}, {"$ref": 5}, 5, None], ids=str)
def test_nothing_else_is_refused(schema: Any) -> None:
    assert enforceable(schema) == schema


def test_what_refers_to_itself_over_and_over_is_looked_at_so_often() -> None:
    many: Schema = {"$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]}
                              for i in range(2000)}}
    with pytest.raises(InvalidGrammar, match="too much work"):
        enforceable(many)
    assert MAX_LOOKS <= 100_000


@pytest.mark.parametrize("reference", ["#/anyOf/0", "#/$defs/a%62", "#/$defs/a~1b"])
def test_bounds_meet_wherever_a_reference_leads(reference: str) -> None:
    target = {"type": "number", "exclusiveMinimum": 5}
    schema = {"$defs": {"ab": target, "a/b": target}, "anyOf": [target, {"$ref": reference, "maximum": 5.5}]}
    with pytest.raises(InvalidGrammar, match="less than 1 apart"):
        enforceable(schema)


LARGEST, EXACT = 2**63 - 1024, 2**53


@pytest.mark.parametrize(("bounds", "right", "wrong"), [
    ({"minimum": EXACT + 1}, [EXACT + 2, LARGEST], [EXACT, EXACT + 1 - 2]),
    ({"exclusiveMinimum": EXACT}, [EXACT + 2], [EXACT]), ({"exclusiveMaximum": -EXACT}, [-EXACT - 2], [-EXACT]),
    ({"maximum": -EXACT - 1}, [-EXACT - 2, -LARGEST], [-EXACT, 0]),
    ({"minimum": -2**63, "maximum": 2**63 - 1}, [0, 5, -5, EXACT + 1, LARGEST, -LARGEST], [2**63, -2**63 - 1]),
    ({"minimum": 0, "maximum": 2**64 - 1}, [0, LARGEST], [-1, 2**64]),
    ({"minimum": -10**400, "maximum": 10**400}, [0, LARGEST, -LARGEST], []),
    ({"minimum": 0, "exclusiveMinimum": EXACT}, [EXACT + 2], [0, EXACT]),
    ({"exclusiveMinimum": 2.0**59, "minimum": 2**59}, [2**59 + 128], [2**59])])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_large_bounds_are_kept(bounds: dict[str, Any], right: list[int], wrong: list[int], kind: str) -> None:
    schema = {"type": kind} | bounds
    assert [number for number in right if not accepts(schema, str(number))] == []
    assert [number for number in wrong if accepts(schema, str(number))] == []


@pytest.mark.parametrize("bounds", [{"minimum": 2**63}, {"minimum": 10**400}, {"exclusiveMaximum": -2.0**63},
                                    {"minimum": 1e300}, {"multipleOf": EXACT + 1}], ids=lambda bounds: str(bounds)[:30])
def test_what_no_number_of_64_bits_keeps_is_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(InvalidGrammar, match="64 bits"):
        enforceable({"type": "integer"} | bounds)
