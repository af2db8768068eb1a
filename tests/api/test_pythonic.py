"""Python's calls as JSON: its literals as Python itself reads them, whatever pieces they come in, and nothing else."""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects import PYTHONIC
from api.wire.dialects.dialect import MAX_NAME_CHARS
from api.wire.dialects.python_calls import MAX_DEPTH, MAX_WORD_CHARS
from api.wire.dialects.pythonic import BEGINS, ENDS
from shared.errors import InvalidGrammar
from tests.api.pieces import drawn, read, reads_as

CALL = '[get_weather(city="Par\\"is", days=3), f(x=[1, {"a": None}], y=\'\')]'
FOUND = [("call", "get_weather"), ("arguments", '{"city": "Par\\"is", "days": 3}'),
         ("call", "f"), ("arguments", '{"x": [1, {"a": null}], "y": ""}')]

TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "calls": (CALL, FOUND),
    "blanks": ("\n [ f ( a = 1 , ) , g() ] \n", [("call", "f"), ("arguments", '{"a": 1}'), ("call", "g"),
                                                 ("arguments", "{}")]),
    "between markers": (f"<|python_start|>{CALL}<|python_end|>", FOUND),
    "text about markers": ("Wait. <|tool_call_start|>[f()]<|tool_call_end|>\nDone.", [
        ("text", "Wait. "), ("call", "f"), ("arguments", "{}"), ("text", "Done.")]),
    "text behind": ("[f()] so", [("call", "f"), ("arguments", "{}"), ("text", "so")]),
    "three quotes": ('[f(a="""x"y""", b=\'\'\'\n\'\'\')]', [("call", "f"),
                                                                ("arguments", '{"a": "x\\"y", "b": "\\n"}')]),
    "a marker in a string": ('[f(a="<|python_end|>")]', [("call", "f"), ("arguments", '{"a": "<|python_end|>"}')]),
    "JSON's words": ("[f(a=true, b=[null])]", [("call", "f"), ("arguments", '{"a": true, "b": [null]}')]),
    "a pair of halves": ('[f(a="\\ud83d\\ude42")]', [("call", "f"), ("arguments", '{"a": "\\ud83d\\ude42"}')]),
    "text": ("Hello [f()]", [("text", "Hello [f()]")]),
    "a list": (" [1, 2]", [("text", " [1, 2]")]),
    "a link": ("[f](http://x)", [("text", "[f](http://x)")]),
    "no keyword": ('[f("x")]', [("text", '[f("x")]')]),
    "arithmetic": ("[f(x=1 + 2)]", [("text", "[f(x=1 + 2)]")]),
    "a variable": ("[f(x=y)]", [("text", "[f(x=y)]")]),
    "an escape that is none": ('[f(x="\\xz")]', [("text", '[f(x="\\xz")]')]),
    "no list": ("[]", [("text", "[]")]),
    "the second is none": ("[f(), g(1)]", [("call", "f"), ("arguments", "{}"), ("text", ", g(1)]")]),
    "no call between markers": ("<|python_start|>print(1)<|python_end|>", [("text", "print(1)")]),
    "no call, and a marker in a string": ('[f(1, "<|python_end|>")]', [("text", '[f(1, "")]')]),
    "no call, and a marker in a value": ('[f("<|python_end|>")]', [("text", '[f("")]')]),
    "cut off in a string": ('[f(x="Par', [("text", '[f(x="Par')]),
    "cut off behind a call": ("[f() ", [("call", "f"), ("arguments", "{}")]),
    "cut off in a marker": ("[f()]<|python", [("call", "f"), ("arguments", "{}"), ("text", "<|python")]),
    "late": (" " * 70 + "[f()]", [("text", " " * 70 + "[f()]")]),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_every_split_reads_the_same(text: str, expected: list[tuple[str, str]]) -> None:
    reads_as(PYTHONIC, text, expected)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)


@given(values, st.integers(1, 9))
def test_what_python_writes_is_read_as_python_reads_it(value: Any, size: int) -> None:
    text = f"[f(x={value!r}, y={json.dumps(value, ensure_ascii=False)})]"
    pieces = read((text[i:i + size] for i in range(0, len(text), size)), PYTHONIC)
    assert [piece.kind for piece in pieces] == ["call", "arguments"]
    assert json.loads(pieces[1].value) == {"x": value, "y": value}


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(st.text(alphabet="\"'\\nxu0418N{}a\n", max_size=12), st.sampled_from(['"', "'", '"""', "'''"]))
def test_strings_are_pythons(inside: str, quote: str) -> None:
    """Where Python reads a string, the same; a line break in a plain one is taken too."""
    text = f"{quote}{inside}{quote}"
    try:
        expected = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return
    if isinstance(expected, str) and "\\N{" not in inside and _num_strings(text) == 1:
        [_, arguments] = read(f"[f(x={text})]", PYTHONIC)
        assert json.loads(arguments.value) == {"x": expected}


def _num_strings(text: str) -> int:
    """Python joins those that stand side by side."""
    return sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))


@pytest.mark.parametrize(("written", "number"), [
    ("1_000", 1000), ("-5", -5), ("+5", 5), (".5", 0.5), ("1.", 1.0), ("-0.25e-3", -0.00025), ("1E5", 1e5), ("0", 0)])
def test_numbers_are_jsons(written: str, number: float) -> None:
    [_, arguments] = read(f"[f(x={written})]", PYTHONIC)
    assert math.isclose(json.loads(arguments.value)["x"], number)


def test_names_numbers_and_depth_are_bounded() -> None:
    deep = MAX_DEPTH * 3
    for text in (f"[{'f' * (MAX_NAME_CHARS + 1)}()]", f"[f(x={'1' * (MAX_WORD_CHARS + 1)})]", f"[f(x={'1' * 9999}",
                 f"[f(x={'[' * deep}{']' * deep})]", "[f(x=0x1)]", "[f(x=01)]", "[f(x=1e)]", "[f(x=(1,))]",
                 "[f(x={1})]", "[f(x={1: 2})]", "[f(x=[1 2])]", "[f(,)]", "[f(x=[,])]", "[f(x==1)]", "[f(x='a' 'b')]",
                 "[f(x)]", "[f(x=1]", "[f(x=[1)]"):
        assert read([text], PYTHONIC) == read(text, PYTHONIC) == [("text", text)]


PARTS = [*BEGINS, *ENDS, "[", "]", "f", "(", ")", "x=", "1", "'", '"', "\\", ", ", "{", "}", ":", "None", " ",
         "<|python", "[f("]


@given(st.lists(st.sampled_from(PARTS), max_size=25), st.integers(1, 7))
def test_pieces_do_not_matter(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole = read([text], PYTHONIC)
    assert read((text[i:i + size] for i in range(0, len(text), size)), PYTHONIC) == whole
    for piece in whole:
        assert piece.kind != "arguments" or isinstance(json.loads(piece.value), dict)
    calls = sum(piece.kind == "call" for piece in whole)
    assert calls == sum(piece.kind == "arguments" for piece in whole)


@pytest.mark.parametrize("unit", ["[", " ", "[f(x='", '[f(x="""', '"', "'", "\\", "[f(), ", "[f(x=[", "1", BEGINS[0],
                                  "<", "[f()" + " " * 50])
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    """What is looked at again is bounded, also where a long string is held back until its call is complete."""
    for text in (unit * (3000 // len(unit)), "[f(x='" + unit * (3000 // len(unit))):
        reader: Any = PYTHONIC.reader()
        for character in text:
            reader.feed(character)
            assert len(reader._held) <= MAX_WORD_CHARS


SCHEMA: dict[str, Any] = {"type": "object", "required": ["city", "on"], "additionalProperties": False, "properties": {
    "city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 2, "maximum": 40},
    "on": {"type": "boolean"}, "unit": {"enum": ["c", "f", None, True, 2]}, "note": {"type": ["string", "null"],
                                                                                  "maxLength": 3},
    "either": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]}, "tags": {
        "type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
                        "additionalProperties": False}}}


@pytest.mark.parametrize("added", [(), BEGINS[:1] + ENDS[:1], BEGINS + ENDS], ids=["text", "one pair", "two pairs"])
def test_a_grammar_keeps_the_schema(added: tuple[str, ...]) -> None:
    """Every property by its own, in Python's words where they are not JSON's."""
    tool = {"name": "get_weather", "parameters": SCHEMA, "strict": True}
    names, texts = set(), list(drawn(PYTHONIC, [tool], added, num=60))
    for text in texts:
        for name, arguments in zip(*[iter(read([text], PYTHONIC))] * 2, strict=True):
            assert (name.kind, name.value, arguments.kind) == ("call", "get_weather", "arguments")
            jsonschema.validate(json.loads(arguments.value), SCHEMA)
            names |= json.loads(arguments.value).keys()
    assert len(texts) > 20 and names == SCHEMA["properties"].keys()
    assert any("on=True" in text for text in texts) and not any("on=true" in text for text in texts)
    assert any(text.startswith(BEGINS) for text in texts) == bool(added)


def test_what_cannot_be_written_is_refused() -> None:
    for tool in ({"name": "a b"}, {"name": "f", "strict": True, "parameters": {"oneOf": []}},
                 {"name": "f", "parameters": {"properties": {"a b": {}}, "required": ["a b"]}}):
        with pytest.raises(InvalidGrammar):
            PYTHONIC.grammar([tool], is_one=True, added_id=lambda _: None)
    (text, *_) = drawn(PYTHONIC, [{"name": "f", "parameters": {"properties": {"a b": {}}}}], is_one=True)
    assert text == "[f()]"
