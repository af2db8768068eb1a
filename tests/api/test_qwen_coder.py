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
from tests.api.pieces import drawn, read, reads_as

CALL = ("<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n<parameter=s>\nx <b>\n\"y\"\n</parameter>\n"
        "</function>\n</tool_call>")
FOUND = [("call", "f"), ("arguments", '{"a": 5, "s": "x <b>\\n\\"y\\""}')]
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["a", "s"], "additionalProperties": False, "properties": {
        "a": {"type": "integer"}, "s": {"type": "string", "maxLength": 5}, "unit": {"enum": ["c", "f"]},
        "on": {"type": ["boolean", "null"]}, "at": {"$ref": "#/$defs/point"}},
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


PARTS = [*MARKERS, "f>", "a>", "s>", "x", "\n", " ", ">", "5", "[", '"', "\\", "<", "</par", CALL]


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
        "f.a", "f.b", "f.c", "f.d")


def test_what_cannot_be_written_is_refused() -> None:
    pattern = {"properties": {"a": {"type": "string", "pattern": "x"}}}
    for tool in ({"name": "a>b"}, {"name": "f", "parameters": {"properties": {"a>b": {}}, "required": ["a>b"]}},
                 {"name": "f", "strict": True, "parameters": pattern}):
        with pytest.raises(InvalidGrammar):
            QWEN_CODER.grammar([tool], is_one=True, added_id=lambda _: None)
