"""What llguidance would let pass is said otherwise or refused, and nothing that is right is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from shared.errors import InvalidGrammar
from shared.grammar import Grammars, of_grammar, of_schema
from shared.schemas import enforceable
from worker import tiny

TOKENIZER = Tokenizer.from_file(str(Path(tiny.MODEL_FOLDER) / "tokenizer.json"))
GRAMMARS = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), ())


def accepts(schema: Any, text: str) -> bool:
    matcher = GRAMMARS.compile(of_schema(schema))
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("pattern", ['^[^"]*$', r"^[^\\]*$", r'^[^<>:"/\\|?*]+$', r'^[^\n"]+$', '^[^]"]+$', '^[^-"]+$',
                                     r'^\[?[^"]+$', '^([^"]|x)+$', r'^[^\]"]+$'])
@pytest.mark.parametrize("where", ["value", "key"])
def test_what_a_class_excludes_is_excluded(pattern: str, where: str) -> None:
    """Quotes and backslashes too, whose escapes are of several characters."""
    schema: Any = ({"type": "string", "pattern": pattern} if where == "value" else
                   {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False})
    told = 0
    for text in ("ab", "a", 'a"b', '"', "a\\b", "]", "-", "a-b", "a]b", "x", '["', "[^^^", "b", "a\tb", "a/b", "é"):
        said = text if where == "value" else {text: 1}
        try:
            jsonschema.validate(said, schema)
            is_right = True
        except jsonschema.ValidationError:
            is_right = False
        accepted = accepts(schema, json.dumps(said, ensure_ascii=False))
        assert accepted == is_right or (where == "key" and not accepted), text
        told += accepted
    assert told > 1


def test_a_name_has_one_spelling() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "patternProperties": {"^b": {"type": "null"}}}
    assert accepts(schema, r'{"a":1,"c\n\"":"x"}') and accepts(schema, '{"é":"é"}')
    assert not accepts(schema, r'{"a":1,"\u0061":"x"}') and not accepts(schema, r'{"\u0062":5}')


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "object", "minProperties": 2, "properties": {"a": {}, "b": {}}, "required": ["a"]}, "minProperties"),
    ({"const": 18446744073709551617}, "53 bits"), ({"properties": {"a": {"enum": [1, 2**53 + 1]}}}, "53 bits"),
    ({"const": 10**400}, "53 bits"), ({"enum": [[{"a": [2**60 + 1]}]]}, "53 bits"),
    ({"enum": ["a", "a\x1fb"]}, "control character"), ({"const": {"\x7f": 1}}, "control character")])
def test_what_cannot_be_said_otherwise_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(InvalidGrammar, match=words):
        of_schema(schema)


@pytest.mark.parametrize("schema", [
    {"type": "object", "minProperties": 1}, {"minProperties": 2, "required": ["a", "b"]}, {"const": 2**53},
    {"minProperties": 2, "allOf": [{"required": ["a", "b"]}]}, {"enum": ["\n\t\\\"\x80é", True, None, 1.5, -2**53]},
    {"properties": {"minProperties": {"type": "integer"}, "pattern": {"type": "string"}, "x-guidance": {}}},
    {"enum": ['[^"]', {"pattern": '[^"]'}]}, {"pattern": "a^b[a^]"}, {"pattern": 5}, 5, [], None], ids=str)
def test_what_is_kept_stays_as_it_is(schema: Any) -> None:
    assert enforceable(schema) == schema


def test_a_schema_within_a_grammar_is_kept_as_any_other() -> None:
    schema = {"anyOf": [{"const": "%json {}"}, {"type": "string", "pattern": '^[^"]$'}]}
    matcher = GRAMMARS.compile(of_grammar(f'start: "<" %json{json.dumps(schema)} ">" // %json {{"a": {{"b":\n'))
    for text, is_right in (('<"%json {}">', True), ('<"a">', True), (r'<"\"">', False)):
        copy, ids = matcher.deep_copy(), TOKENIZER.encode(text, add_special_tokens=False).ids
        assert (copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()) == is_right, text
    with pytest.raises(InvalidGrammar, match="minProperties"):
        of_grammar('start: "a" | b\nb: %json {"minProperties": 3}')


def test_a_client_does_not_say_how_strictly_it_is_kept() -> None:
    assert enforceable({"x-guidance": {"lenient": True}, "items": {"x-guidance": 5}}) == {"items": {}}
    with pytest.raises(InvalidGrammar, match="uniqueItems"):
        GRAMMARS.compile(of_schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}))
