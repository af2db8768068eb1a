"""Qwen3-Coder's calls as JSON: strings as they are, other values by the schema, whatever pieces they come in."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects.elements import MARKERS, MAX_DEPTH, ElementReader
from api.wire.dialects.qwen_coder import QWEN_CODER
from shared.errors import InvalidGrammar
from shared.grammar import Grammars
from tests.api.pieces import EOS, drawn, read, reads_as
from tests.api.scripted import byte_tokenizer

TOKENIZER = byte_tokenizer("<|end of text|>")
GRAMMARS = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), [EOS])

CALL = ("<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n<parameter=s>\nx <b>\n\"y\"\n</parameter>\n"
        "</function>\n</tool_call>")
FOUND = [("call", "f"), ("arguments", '{"a": 5, "s": "x <b>\\n\\"y\\""}')]
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["a", "s"], "additionalProperties": False, "properties": {
        "a": {"type": "integer"}, "s": {"type": "string", "maxLength": 5}, "unit": {"enum": ["c", "f"]},
        "on": {"type": ["boolean", "null"]}, "o": {"type": ["string", "null"], "maxLength": 2},
        "at": {"$ref": "#/$defs/point"}},
    "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}}
TOOL = {"name": "f", "strict": True, "parameters": SCHEMA}
TYPED = QWEN_CODER.typed_arguments([TOOL])


def one(value: str, name: str = "a") -> str:
    return f"<tool_call>\n<function=f>\n<parameter={name}>\n{value}\n</parameter>\n</function>\n</tool_call>"


TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "text": ("Hello, <b>you</b>.\n", [("text", "Hello, <b>you</b>.\n")]),
    "call": (CALL, FOUND),
    "text about it, and two": (f"I look.\n\n{CALL}\n{CALL}\n so\n", [("text", "I look."), *FOUND, *FOUND,
                                                                  ("text", "so\n")]),
    "no frame": (CALL[12:-13], FOUND),
    "no arguments": ("<tool_call><function=f></function></tool_call>", [("call", "f"), ("arguments", "{}")]),
    "markers in a value": (one("<tool_call></function>", "s"), [
        ("call", "f"), ("arguments", '{"s": "<tool_call></function>"}')]),
    "an empty string": (one("", "s"), [("call", "f"), ("arguments", '{"s": ""}')]),
    "a string that is a number": (one("5", "s"), [("call", "f"), ("arguments", '{"s": "5"}')]),
    "Python's word": (one("True"), [("call", "f"), ("arguments", '{"a": true}')]),
    "no JSON": (one("five"), [("call", "f"), ("arguments", '{"a": "five"}')]),
    "no number": (one("NaN"), [("call", "f"), ("arguments", '{"a": "NaN"}')]),
    "Python's list": (one("[{'k': 'v', \"b\": True}, (1)]"), [
        ("call", "f"), ("arguments", '{"a": "[{\'k\': \'v\', \\"b\\": True}, (1)]"}')]),
    "Python's dict": (one("{'k': 'v', \"b\": True}"), [("call", "f"), ("arguments", '{"a": {"k": "v", "b": true}}')]),
    "two of Python's": (one("{'k': 1}, b={}"), [("call", "f"), ("arguments", '{"a": "{\'k\': 1}, b={}"}')]),
    "null": (one("null", "o"), [("call", "f"), ("arguments", '{"o": null}')]),
    "a text like null": (one("nullify\n", "o"), [("call", "f"), ("arguments", '{"o": "nullify\\n"}')]),
    "the beginning of null": (one("nu", "o"), [("call", "f"), ("arguments", '{"o": "nu"}')]),
    "null where it must be a string": (one("null", "s"), [("call", "f"), ("arguments", '{"s": "null"}')]),
    "no end of a value before the next": (
        "<tool_call>\n<function=f>\n<parameter=s>\nx\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>so",
        [("call", "f"), ("arguments", '{"s": "x", "a": 5}'), ("text", "so")]),
    "no end of the last value": ("<function=f>\n<parameter=s>\nx\n</function>\n</tool_call>\nso", [
        ("call", "f"), ("arguments", '{"s": "x"}'), ("text", "so")]),
    "no end of a number": ("<function=f>\n<parameter=a>\n5\n</function>", [("call", "f"), ("arguments", '{"a": 5}')]),
    "the end of a function in a value": (one("x\n</function>\n</b> y\n</function>\n\nz\n</function>", "s"), [
        ("call", "f"), ("arguments", '{"s": "x\\n</function>\\n</b> y\\n</function>\\n\\nz\\n</function>"}')]),
    "another function in a value": (one("x\n</function>\n<function=g>", "s"), [
        ("call", "f"), ("arguments", '{"s": "x\\n</function>\\n<function=g>"}')]),
    "no end": ("<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n", [("call", "f"),
                                                                            ("arguments", '{"a": 5}')]),
    "cut off in a string": ("<tool_call>\n<function=f>\n<parameter=s>\nx", [("call", "f"), ("arguments", '{"s": "x')]),
    "cut off before": ("<tool_call>\n<functi", [("text", "<tool_call>\n<functi")]),
    "no call": ("<tool_call>\nnothing\n</tool_call>", [("text", "<tool_call>\nnothing\n</tool_call>")]),
    "text in a call": ("<function=f>so</function>", [("call", "f"), ("arguments", "{}"), ("text", "so</function>")]),
}


class WithTypes:
    """The dialect, of an answer whose header names the typed arguments."""

    @staticmethod
    def reader() -> ElementReader:
        return QWEN_CODER.reader_of(TYPED)


QWEN = WithTypes()


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_every_split_reads_the_same(text: str, expected: list[tuple[str, str]]) -> None:
    reads_as(QWEN, text, expected)


PARTS = [*MARKERS, "f>", "a>", "s>", "o>", "null", "x", "\n", " ", ">", "5", "[", '"', "\\", "<", "</par", CALL]


@given(st.lists(st.sampled_from(PARTS), max_size=25), st.integers(1, 9))
def test_pieces_do_not_matter_and_arguments_are_json(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole = read([text], QWEN)
    assert read((text[i:i + size] for i in range(0, len(text), size)), QWEN) == whole
    arguments = [piece.value for piece in whole if piece.kind == "arguments"]
    assert len(arguments) == sum(piece.kind == "call" for piece in whole)
    for each in arguments[:-1]:                         # the last may be cut off
        assert isinstance(json.loads(each), dict)


def test_names_and_depth_are_bounded() -> None:
    text = f"<tool_call><function={'x' * 3000}></function>"
    assert read([text], QWEN) == read(text, QWEN) == [("text", text)]
    deep = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert json.loads(read([one(deep)], QWEN)[1].value) == {"a": deep}


@pytest.mark.parametrize("unit", ["<", " ", "\n", "<tool_call>", "<function=", "<function=f>", "<function=f>x",
                                  "<function=f><parameter=",
                                  "<function=f><parameter=a>", "<function=f><parameter=s>\n", CALL])
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    reader = QWEN.reader()
    for character in unit * (3000 // len(unit)):
        reader.feed(character)
        assert len(reader._held) + len(reader._marker) < 400


@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>")], ids=["text", "tokens"])
def test_a_grammar_keeps_the_schema(added: tuple[str, ...]) -> None:
    names, texts = set(), list(drawn(QWEN_CODER, [TOOL], added, num=30))
    for text in texts:
        pieces = read([text], QWEN)
        assert {piece.kind for piece in pieces} == {"call", "arguments"}
        for piece in pieces[1::2]:
            jsonschema.validate(json.loads(piece.value), SCHEMA)
            names |= json.loads(piece.value).keys()
    assert len(texts) > 10 and names == SCHEMA["properties"].keys()


def test_what_may_be_a_string_is_one() -> None:
    properties = {"s": {"type": ["string", "null"]}, "t": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "u": {},
                  "v": {"enum": ["x"]}, "a": {"enum": [1]}, "b": {"$ref": "#/$defs/x"}, "c": {"type": "array"},
                  "d": {"anyOf": [{"type": "string", "enum": ["x"]}]}}
    assert QWEN_CODER.typed_arguments([{"name": "f", "parameters": {"properties": properties}}]) == (
        "f.a", "f.b", "f.c", "f.d", "f.s\n", "f.t\n")


def test_what_cannot_be_written_is_refused() -> None:
    pattern = {"properties": {"a": {"type": "string", "pattern": "x"}}}
    for tool in ({"name": "a>b"}, {"name": "f", "parameters": {"properties": {"a>b": {}}, "required": ["a>b"]}},
                 {"name": "f", "strict": True, "parameters": pattern}):
        with pytest.raises(InvalidGrammar):
            QWEN_CODER.grammar([tool], is_one=True, added_id=lambda _: None)


STRING: dict[str, Any] = {"type": "string"}
REFUSED: dict[str, dict[str, Any]] = {
    "a choice of what is required": {"anyOf": [{"required": ["s"]}]}, "a number of arguments": {"minProperties": 1},
    "what must not be": {"not": {"required": ["s"]}}, "a reference": {"$ref": "#/$defs/x"},
    **{f"a string with {next(iter(more))}": {"properties": {"s": STRING | more}} for more in (
        {"allOf": [{"pattern": "^a$"}]}, {"not": {"const": "x"}}, {"anyOf": [{"maxLength": 2}]}, {"$ref": "#/$defs/x"},
        {"maxLength": 2.5}, {"minLength": float("inf")}, {"enum": ["</parameter>", "\n<parameter=a>"]})}}


@pytest.mark.parametrize("parameters", REFUSED.values(), ids=REFUSED)
def test_what_a_strict_tool_would_not_keep_is_refused(parameters: dict[str, Any]) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"s": STRING}} | parameters}
    QWEN_CODER.grammar([tool], is_one=True, added_id=lambda _: None)
    with pytest.raises(InvalidGrammar):
        QWEN_CODER.grammar([tool | {"strict": True}], is_one=True, added_id=lambda _: None)


@pytest.mark.parametrize("value", ["a</parameter>b", "<parameter=b>", "a\n<parameter=b>", "\n</function></tool_call>"])
def test_what_would_end_a_string_is_never_in_it(value: str) -> None:
    """So what is read is what the grammar meant."""
    text = {"type": "string", "minLength": 3, "maxLength": 99.0}
    tool = {"name": "f", "strict": True, "parameters": {"properties": {"s": text}, "required": ["s"]}}
    assert not accepts(tool, one(value, "s"))
    for fine in ("<parameter", "x </functions> <</parameters>", "\n</tool_call>\nx", "x" * 99, "xyz\n"):
        call = one(fine, "s")
        assert accepts(tool, call) and json.loads(read([call], QWEN)[1].value) == {"s": fine}
    assert not accepts(tool, one("xy", "s")) and not accepts(tool, one("x" * 100, "s"))


def test_arguments_of_any_name_are_strings() -> None:
    tool: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
    two = CALL.replace("=a>", "=b>")
    assert accepts(tool, two) and accepts(tool, "<tool_call>\n<function=f>\n</function>\n</tool_call>")
    assert [piece.value for piece in read([two], QWEN_CODER)][1] == '{"b": "5", "s": "x <b>\\n\\"y\\""}'
    for closed in ({"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}):
        assert not accepts({"name": "f", "parameters": {"type": "object"} | closed}, two)
    assert not accepts({"name": "f"}, two)
    nothing: dict[str, Any] = {"name": "f", "parameters": {"additionalProperties": {"maxLength": 2, "type": "string"}}}
    assert not accepts(nothing, one("xyz", "s")) and accepts(nothing, one("xy", "s"))


def accepts(tool: dict[str, Any], text: str) -> bool:
    matcher = GRAMMARS.matcher(QWEN_CODER.grammar([tool], is_one=True, added_id=lambda _: None))
    ids = TOKENIZER.encode(text).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
