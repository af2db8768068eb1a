"""Harmony: thoughts, answers and calls told apart by their channels, whatever pieces they come in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects import HARMONY, Dialect
from api.wire.dialects.dialect import MAX_HEAD_CHARS
from api.wire.dialects.harmony import MARKERS
from tests.api.pieces import TOOLS, drawn, read, reads_as

ANALYSIS = "<|channel|>analysis<|message|>Hm, so.<|end|>"
NEXT = "<|start|>assistant"
ARGUMENTS = '{"a": "}\\"", "b": [1]}'
CALLED = [("call", "f"), ("arguments", ARGUMENTS)]

TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "answer": ("<|channel|>final<|message|>Yes,\n<b>.<|return|>", [("text", "Yes,\n<b>.")]),
    "answer without an end": ("<|channel|>final<|message|>Yes <|", [("text", "Yes <|")]),
    "thought and answer": (f"{ANALYSIS}{NEXT}<|channel|>final<|message|>Yes.<|return|>", [
        ("reasoning", "Hm, so."), ("text", "Yes.")]),
    "two thoughts": (f"{ANALYSIS}{NEXT}{ANALYSIS}", [("reasoning", "Hm, so.\nHm, so.")]),
    "call": (f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{ARGUMENTS}<|call|>", CALLED),
    "call without an end": (f"<|channel|>commentary to=functions.f<|message|>{ARGUMENTS}", CALLED),
    "recipient first": (f" to=functions.f<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>", CALLED),
    "recipient first, behind a thought": (
        f"{ANALYSIS}{NEXT} to=functions.f<|channel|>commentary <|constrain|>json<|message|> {ARGUMENTS}\n<|call|>",
        [("reasoning", "Hm, so."), *CALLED]),
    "a call in the wrong channel": (f"<|channel|>analysis to=functions.f code<|message|>{ARGUMENTS}", CALLED),
    "preamble, and two calls": (
        f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}<|channel|>commentary to=functions.f<|message|>"
        f"{ARGUMENTS}<|end|>{NEXT}<|channel|>commentary to=functions.g-2 <|constrain|>json<|message|>{{}}<|call|>",
        [("text", "I look."), *CALLED, ("call", "g-2"), ("arguments", "{}")]),
    "preamble and answer": (f"<|channel|>commentary<|message|>First.<|end|>{NEXT}<|channel|>final<|message|>Then.", [
        ("text", "First.\nThen.")]),
    "a message without a start": (f"{ANALYSIS}<|channel|>final<|message|>Yes.", [("reasoning", "Hm, so."),
                                                                             ("text", "Yes.")]),
    "another recipient": ("<|channel|>analysis to=python code<|message|>1 + 1<|call|>", [("reasoning", "1 + 1")]),
    "no head": ('{"answer": 5}', [("text", '{"answer": 5}')]),
    "what begins like a head": ("to be<|end|>", [("text", "to be")]),
    "half of what may be a head": (" t", [("text", " t")]),
    "the whole turn": (f"{NEXT}{ANALYSIS}", [("reasoning", "Hm, so.")]),
    "a marker in a string": ('<|channel|>commentary to=functions.f<|message|>{"a": "<|call|>"}<|call|>', [
        ("call", "f"), ("arguments", '{"a": "<|call|>"}')]),
    "no arguments": ("<|channel|>commentary to=functions.f<|message|> <|call|>", [("call", "f"), ("arguments", "{}")]),
    "arguments that are none": ("<|channel|>commentary to=functions.f<|message|>Hello<|call|>", [("text", "Hello")]),
    "cut off in the arguments": ('<|channel|>commentary to=functions.f<|message|>{"a', [("call", "f"),
                                                                                   ("arguments", '{"a')]),
    "cut off in a head": (f"{ANALYSIS}{NEXT}<|channel|>comm", [("reasoning", "Hm, so.")]),
    "cut off in a thought": ("<|channel|>analysis<|message|>Hm", [("reasoning", "Hm")]),
    "text between": (f"{ANALYSIS}\n so<|end|>", [("reasoning", "Hm, so."), ("text", "so")]),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_every_split_reads_the_same(text: str, expected: list[tuple[str, str]]) -> None:
    reads_as(HARMONY, text, expected)


def test_where_nothing_may_be_called_a_call_is_text() -> None:
    assert HARMONY.without_tools
    text = f"{ANALYSIS}{NEXT} to=functions.f<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
    reads_as(HARMONY.without_tools, text, [("reasoning", "Hm, so."), ("text", ARGUMENTS)])


def test_heads_and_names_are_bounded() -> None:
    for text in ("to=" + "x" * 3000 + "<|message|>y", f"<|channel|>{'x' * 3000}<|message|>y",
                 f"<|channel|>commentary to=functions.{'x' * 300}<|message|>{{}}"):
        assert {piece.kind for piece in read([text], HARMONY)} == {"text"}
        assert read(text, HARMONY) == read([text], HARMONY)


PARTS = [*MARKERS, "analysis", "final", "commentary", " to=functions.f", "assistant", "{", "}", '{"a": 1}', '"', "\\",
         " ", "\n", "<|", "t", "x"]


@given(st.lists(st.sampled_from(PARTS), max_size=25), st.integers(1, 9),
       st.sampled_from([HARMONY, HARMONY.without_tools]))
def test_pieces_do_not_matter_and_no_marker_is_text(parts: list[str], size: int, dialect: Dialect) -> None:
    text = "".join(parts)
    whole = read([text], dialect)
    assert read((text[i:i + size] for i in range(0, len(text), size)), dialect) == whole
    assert not any(marker in piece.value for piece in whole if piece.kind != "arguments" for marker in MARKERS)
    calls = sum(piece.kind == "call" for piece in whole)
    assert calls == sum(piece.kind == "arguments" for piece in whole) and (dialect.can_call or not calls)


@pytest.mark.parametrize("unit", ["<", "<|start|>", "<|channel|>", "<|start|>x", "to=", " ", "<|message|>x", ANALYSIS,
                                  '<|channel|>commentary to=functions.f<|message|>{"'])
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    reader: Any = HARMONY.reader()
    for character in unit * (3000 // len(unit)):
        reader.feed(character)
        assert len(reader._head) <= MAX_HEAD_CHARS


def test_a_thought_may_come_before_a_call_that_must_come() -> None:
    """Where its end is a token: nothing else would tell it."""
    kinds = [tuple(piece.kind for piece in read([text], HARMONY)) for text in drawn(HARMONY, TOOLS, MARKERS, num=40)]
    assert set(kinds) == {("call", "arguments"), ("reasoning", "call", "arguments")}
    assert all(text.startswith("<|channel|>commentary to=") for text in drawn(HARMONY, TOOLS))
