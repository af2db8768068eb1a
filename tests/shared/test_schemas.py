"""What llguidance would let pass is said otherwise or refused, and nothing that is right is lost."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize("pattern", [
    r"^[\x00-\x1f]$", r"^[\x00-!]+$", "^[\x01-z]*$", r"^\p{Cc}$", r"^\pC*$", "^[[:cntrl:]]$", r"^\P{P}+$",
    r"^[\P{P}]+$", r'^[\x00-\x1f"]$', r'^[\x00-\x7f&&[^"]]+$', r"^\x01a?$", r"^\u0001a?$", "^\x01$", r"^\x7f$",
    r"^\v$", r"[\a]", "^[a--b]$", "^[a-z~~m]$", "(?x)[ ^a]+", "(?i-u)(?sU)a", r"a\z", r"\x{41}"])
def test_a_pattern_that_would_be_read_otherwise_is_refused(pattern: str) -> None:
    schemas: list[Any] = [{"type": "string", "pattern": pattern}, {"patternProperties": {pattern: {}}}]
    for schema in schemas:
        with pytest.raises(InvalidGrammar, match=r"regular expression|control character"):
            enforceable(schema)


@pytest.mark.parametrize("pattern", [
    r"^\[[a-z]\]$", "^[]a]+$", "^[^]a]+$", r"^[\]a-]$", r"^[\n\t]a$", "(?i)x", "(?P<y>x)", "(?:x)", r"^\x41$",
    r"^[^\x00-\x1f\x7f]+$", r"^[^\v\"]*$", "^[^^]$", r"^[a\-\-b]$", "^[+-]?$", r"^\\p$", "^(&&|--)$",
    r"^[\w.+-]+@[\w-]+\.\w+$", "^[a[b]]$", "^[^[]+$", r'^[^<>()[\]\.,;:\s@"]+$', "^[-a]+$", "^[^-a]+$"])
def test_a_pattern_that_all_read_alike_is_kept(pattern: str) -> None:
    for text in ("[a]", "]", "a", "b", "-", "\\p", "\na", "\ta", "X", "x", "A", "+", "", "&&", "--", "^", "a@b.c", "@",
                 "a]", "[]"):
        is_right = bool(re.search(pattern, text))
        assert accepts({"type": "string", "pattern": pattern}, json.dumps(text)) == is_right, text


@pytest.mark.parametrize(("schema", "words"), [
    ({"$ref": "#/default", "default": {"type": "string"}}, "not to a schema"),
    ({"$ref": "#/examples/0", "examples": [{}]}, "not to a schema"),
    ({"$ref": "#/components/const", "components": {"const": {}}}, "not to a schema"),
    ({"$ref": "#foo", "$defs": {"a": {"$anchor": "foo"}}}, "nothing is fetched"),
    ({"$id": "http://x/y", "$ref": "http://x/y#/$defs/a", "$defs": {"a": {}}}, "nothing is fetched"),
    ({"properties": {"a": {"$id": "http://x/y"}}}, "an .id of its own"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "defined by itself"),
    ({"minProperties": 3, "allOf": [{"type": "object"}]}, "minProperties"),
    ({"minProperties": 2, "$ref": "#/$defs/a", "$defs": {"a": {"required": ["x"]}}}, "minProperties"),
    ({"allOf": [{"minProperties": 2}, {"required": ["a"]}]}, "minProperties"),
    ({"minProperties": 3, "required": ["a", "a", "a"]}, "minProperties")], ids=str)
def test_what_could_be_evaded_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(InvalidGrammar, match=words):
        enforceable(schema)


def test_a_property_may_be_called_as_a_keyword_is() -> None:
    schema = {"$ref": "#/properties/default", "properties": {"default": {"type": "null"}}}
    assert accepts(schema, "null") and not accepts(schema, "{}")


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
