"""Calls of tools in a model's text: what is read does not depend on the pieces, and what is no call is text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects import HERMES, MAX_HEAD_CHARS, CallReader, Piece, dialect_of

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}}\n</tool_call>'
ARGUMENTS = '{"a": "}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}'


def read(pieces: Iterable[str]) -> list[Piece]:
    """What neighbours of a kind say together."""
    reader = CallReader(HERMES)
    found = [piece for text in pieces for piece in reader.feed(text)] + reader.finish()
    joined: list[Piece] = []
    for piece in found:
        if joined and joined[-1].kind == piece.kind != "call":
            joined[-1] = Piece(piece.kind, joined[-1].value + piece.value)
        else:
            joined.append(piece)
    return joined


TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "text": ("Hello, <b>you</b>.\n", [("text", "Hello, <b>you</b>.\n")]),
    "call": (CALL, [("call", "f"), ("arguments", ARGUMENTS)]),
    "text before": (f"I look.\n\n{CALL}", [("text", "I look."), ("call", "f"), ("arguments", ARGUMENTS)]),
    "two, and text behind": (f"\n{CALL}\n{CALL}\n done\n", [("call", "f"), ("arguments", ARGUMENTS), ("call", "f"),
                                                            ("arguments", ARGUMENTS), ("text", "done\n")]),
    "tight": ('<tool_call>{"name":"g","arguments":{}}</tool_call>', [("call", "g"), ("arguments", "{}")]),
    "parameters": ('<tool_call>{"name":"g","parameters":{"x":1}}</tool_call>', [("call", "g"),
                                                                               ("arguments", '{"x":1}')]),
    "cut off in the arguments": ('<tool_call>{"name":"g","arguments":{"x', [("call", "g"), ("arguments", '{"x')]),
    "cut off before": ('<tool_call>\n{"name":"g', [("text", '<tool_call>\n{"name":"g')]),
    "cut off in the marker": ("so <tool_", [("text", "so <tool_")]),
    "no call": ("<tool_call>\nnothing\n</tool_call>", [("text", "<tool_call>\nnothing\n</tool_call>")]),
    "no name": ('<tool_call>{"name": "", "arguments": {}}</tool_call>', [
        ("text", '<tool_call>{"name": "", "arguments": {}}</tool_call>')]),
    "many blanks": (" " * 100 + CALL + " " * 100 + "x", [("text", " " * 36), ("call", "f"), ("arguments", ARGUMENTS),
                                                         ("text", "x")]),
    "never closed": ('<tool_call>{"name":"g","arguments":{}} and on', [("call", "g"), ("arguments", "{}"),
                                                                     ("text", "} and on")]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_split_reads_the_same(name: str) -> None:
    text, expected = TEXTS[name]
    assert read([text]) == expected
    assert read(text) == expected
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        assert read([text[:first], text[first:second], text[second:]]) == expected


WORDS = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', "{", "}", '"', "\\", "\n", " ", "<", "x", "[1]",
         "</tool"]


@given(st.lists(st.sampled_from(WORDS), max_size=25), st.integers(1, 7))
def test_nothing_breaks_it_and_pieces_do_not_matter(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole = read([text])
    assert read(text[i:i + size] for i in range(0, len(text), size)) == whole
    calls = sum(piece.kind == "call" for piece in whole)
    assert calls == sum(piece.kind == "arguments" for piece in whole) or whole[-1].kind == "call"


def test_hostile_text_is_read_in_linear_time() -> None:
    """What is held back is bounded, so that no character is looked at more than a bounded number of times."""
    for unit in ("<", " ", "<tool_call>", "<tool_call>{", '<tool_call>{"name":"f","arguments":{}}' + " ", "{", '"',
                 '<tool_call>{"name":"', "</tool_call>"):
        reader = CallReader(HERMES)
        for character in unit * (3000 // len(unit)):
            reader.feed(character)
            assert len(reader._held) <= MAX_HEAD_CHARS + len(HERMES.end)


def test_a_dialect_is_known_by_the_template() -> None:
    assert dialect_of(["{{ messages }}", 'say <tool_call>{"name"}</tool_call>']) is HERMES
    assert dialect_of(["{{ messages }}"]) is None


def test_arguments_are_what_the_model_wrote() -> None:
    assert json.loads(read([CALL])[1].value) == {"a": '}"<tool_call>', "b": [1, {"c": "\\"}]}
