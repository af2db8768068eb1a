"""What an answer must be, as clients say it: many words for the same, and one wish at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.wire.request import parse
from shared.errors import BadRequest
from shared.grammar import ANY_OBJECT, MAKERS, of_choice, of_grammar, of_regex, of_schema

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LARK = 'start: "a"'
SAME: list[tuple[str, list[dict[str, Any]]]] = [
    (of_schema(SCHEMA), [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}}, {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}]),
    (of_schema(ANY_OBJECT), [{"response_format": {"type": "json_object"}},
                             {"structured_outputs": {"json_object": True}}]),
    (of_regex("a+"), [{"regex": "a+"}, {"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}},
                      {"response_format": {"type": "regex", "pattern": "a+"}}]),
    (of_choice(["a", "b"]), [{"choice": ["a", "b"]}, {"guided_choice": ["a", "b"]},
                             {"structured_outputs": {"choice": ["a", "b"]}}]),
    (of_grammar(LARK), [{"grammar": LARK}, {"ebnf": LARK}, {"guided_grammar": LARK},
                        {"structured_outputs": {"grammar": LARK}},
                        {"response_format": {"type": "grammar", "grammar": LARK}}]),
    ("", [{}, {"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": {}},
          {"structured_outputs": {"json_object": False}}]),
]


def compiled(**fields: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | fields
    request = parse(json.dumps(body).encode(), 4)
    made: list[str] = []

    def make(kind: str, value: Any) -> str:
        made.append(MAKERS[kind](value))
        return made[-1]

    grammar = request.compile_grammar(make)
    assert made == [grammar] * request.is_constrained
    return grammar


@pytest.mark.parametrize(("grammar", "ways"), SAME, ids=lambda x: None)
def test_everybodys_words_mean_the_same(grammar: str, ways: list[dict[str, Any]]) -> None:
    assert [compiled(**fields) for fields in ways] == [grammar] * len(ways)


@pytest.mark.parametrize(("fields", "code", "param"), [
    ({"regex": "a", "choice": ["a"]}, "invalid_value", "choice"),
    ({"response_format": {"type": "json_object"}, "guided_json": {}}, "invalid_value", "guided_json"),
    ({"structured_outputs": {"regex": "a", "grammar": LARK}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "unsupported_parameter", "structural_tag"),
    ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "regex"}}, "invalid_value", "response_format"),
    ({"guided_json": "{"}, "invalid_grammar", "guided_json"),
    ({"guided_json": "5"}, "invalid_grammar", "guided_json"),
    ({"grammar": "%%%"}, "invalid_grammar", "grammar"),
], ids=str)
def test_what_is_no_wish_is_refused(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        compiled(**fields)
    assert (refused.value.code, refused.value.param) == (code, param)
