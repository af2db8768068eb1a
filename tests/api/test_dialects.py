"""Calls of tools in a model's text: what is read does not depend on the pieces, and what is no call is text."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects import (
    DIALECTS,
    HERMES,
    LLAMA,
    MAX_HEAD_CHARS,
    MISTRAL,
    Dialect,
    Piece,
    choose_dialect,
    dialect_of,
)
from shared.grammar import Grammars
from tests.api.scripted import byte_tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}}\n</tool_call>'
ARGUMENTS = '{"a": "}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}'


def read(pieces: Iterable[str], dialect: Dialect = HERMES) -> list[Piece]:
    """What neighbours of a kind say together."""
    reader = dialect.reader()
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


LEADING: list[tuple[Dialect, str, list[tuple[str, str]]]] = [
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', [("call", "f"), ("arguments", '{"a": 1}')]),
    (LLAMA, '\n{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": "}"}}\n', [
        ("call", "f"), ("arguments", "{}"), ("call", "g"), ("arguments", '{"b": "}"}')]),
    (LLAMA, ' {"answer": 5}', [("text", ' {"answer": 5}')]), (LLAMA, "Yes {", [("text", "Yes {")]),
    (LLAMA, '{"name": "f"', [("text", '{"name": "f"')]),
    (LLAMA, '{"name": "f", "parameters": {}} so', [("call", "f"), ("arguments", "{}"), ("text", "so")]),
    (MISTRAL, '[{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]', [
        ("call", "f"), ("arguments", '{"a": [1]}'), ("call", "g"), ("arguments", "{}")]),
    (MISTRAL, "[1, 2]", [("text", "[1, 2]")]), (MISTRAL, " [", [("text", " [")]),
    (MISTRAL, "Hi [{", [("text", "Hi [{")]),
]


@pytest.mark.parametrize(("dialect", "text", "expected"), [
    *((HERMES, text, expected) for text, expected in TEXTS.values()), *LEADING], ids=str)
def test_every_split_reads_the_same(dialect: Dialect, text: str, expected: list[tuple[str, str]]) -> None:
    assert read([text], dialect) == expected
    assert read(text, dialect) == expected
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        assert read([text[:first], text[first:second], text[second:]], dialect) == expected


WORDS = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', "{", "}", '"', "\\", "\n", " ", "<", "x", "[1]",
         "</tool"]


@given(st.lists(st.sampled_from(WORDS), max_size=25), st.integers(1, 7), st.sampled_from(list(DIALECTS.values())))
def test_nothing_breaks_it_and_pieces_do_not_matter(parts: list[str], size: int, dialect: Dialect) -> None:
    text = "".join(parts)
    whole = read([text], dialect)
    assert read((text[i:i + size] for i in range(0, len(text), size)), dialect) == whole
    calls = sum(piece.kind == "call" for piece in whole)
    assert calls == sum(piece.kind == "arguments" for piece in whole) or whole[-1].kind == "call"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_hostile_text_is_read_in_linear_time(dialect: Dialect) -> None:
    """What is held back is bounded, so that no character is looked at more than a bounded number of times."""
    for unit in ("<", " ", "<tool_call>", "<tool_call>{", '<tool_call>{"name":"f","arguments":{}}' + " ", "{", '"',
                 '<tool_call>{"name":"', "</tool_call>", '{"name":"f","parameters":{}};', "[",
                 '[{"name":"f","arguments":['):
        reader = dialect.reader()
        for character in unit * (3000 // len(unit)):
            reader.feed(character)
            assert len(reader._held) <= MAX_HEAD_CHARS + len(HERMES.end)


def test_a_dialect_is_known_by_the_template() -> None:
    assert dialect_of(["{{ messages }}", 'say <tool_call>{"name"}</tool_call>']) is HERMES
    assert dialect_of(["[AVAILABLE_TOOLS] {{ tools }} [TOOL_CALLS]"]) is MISTRAL
    assert dialect_of(['Environment: ipython {"name": function name, "parameters": …}']) is LLAMA
    assert dialect_of(["{{ messages }}"]) is None
    assert choose_dialect("llama", ["<tool_call></tool_call>"]) is LLAMA
    assert choose_dialect("none", ["<tool_call></tool_call>"]) is None


TOOLS: list[dict[str, Any]] = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}},
                                                           "required": ["a"], "additionalProperties": False},
                                "strict": True}, {"name": 'g "quoted"'}]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("is_one", [True, False])
@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")], ids=["text", "tokens"])
def test_what_a_grammar_makes_its_reader_reads(dialect: Dialect, is_one: bool, added: tuple[str, ...]) -> None:
    """Whatever is drawn: calls, and nothing but calls, until the grammar has an end."""
    tokenizer = byte_tokenizer("<|end|>", *added)
    grammars = Grammars(tokenizer.to_str(), tokenizer.get_vocab_size(), [256])
    grammar = dialect.grammar(TOOLS, is_one=is_one, added_id=lambda text: (
        tokenizer.token_to_id(text) if text in added else None))
    for seed in range(12):
        draw, matcher, ids = random.Random(seed), grammars.matcher(grammar), list[int]()
        while not matcher.is_stopped() and len(ids) < 600:
            allowed = matcher.compute_bitmask()
            choices = [i for i in range(tokenizer.get_vocab_size()) if allowed[i // 8] >> i % 8 & 1]
            ids.append(256 if 256 in choices else draw.choice([i for i in choices if i < 127 or i > 255] or choices))
            assert matcher.consume_token(ids[-1])
        hidden = {tokenizer.token_to_id(dialect.hidden)} if dialect.hidden in added else set()
        text = tokenizer.decode([i for i in ids if i != 256 and i not in hidden], skip_special_tokens=False)
        pieces = read([text], dialect)
        if ids[-1] != 256 and not matcher.is_stopped():
            continue
        assert [piece.kind for piece in pieces] == ["call", "arguments"] * (len(pieces) // 2) and pieces
        for name, arguments in zip(pieces[::2], pieces[1::2], strict=True):
            assert name.value in ("f", 'g "quoted"')
            assert isinstance(json.loads(arguments.value).get("a", 0), int) or name.value != "f"


def test_arguments_are_what_the_model_wrote() -> None:
    assert json.loads(read([CALL])[1].value) == {"a": '}"<tool_call>', "b": [1, {"c": "\\"}]}
