"""DeepSeek's calls: in both forms, whatever pieces they come in, and no marker is ever text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects import DEEPSEEK
from api.wire.dialects.deepseek import CALL, CALLS, END_CALL, END_CALLS, MARKERS, SEP
from api.wire.dialects.dialect import MAX_HEAD_CHARS
from tests.api.pieces import read, reads_as

ARGUMENTS = '{"city": "Paris", "a": ["}", {"b": "\\""}]}'
V3 = f"{CALL}function{SEP}f\n```json\n{ARGUMENTS}\n```{END_CALL}"
V31 = f"{CALL}f{SEP}{ARGUMENTS}{END_CALL}"
FOUND = [("call", "f"), ("arguments", ARGUMENTS)]

TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "text": ("Hello, < you｜.\n", [("text", "Hello, < you｜.\n")]),
    "V3": (f"{CALLS}{V3}{END_CALLS}", FOUND),
    "V3, two": (f"{CALLS}{V3}\n{V3}{END_CALLS}", FOUND * 2),
    "V3.1": (f"{CALLS}{V31}{V31}{END_CALLS}", FOUND * 2),
    "text before and behind": (f"I look.\n\n{CALLS}{V31}{END_CALLS}\nDone. ", [("text", "I look."), *FOUND,
                                                                            ("text", "Done. ")]),
    "no frame": (f"{V31}", FOUND),
    "a tool called function": (f"{CALLS}{CALL}function{SEP} {{}}{END_CALL}", [("call", "function"),
                                                                             ("arguments", "{}")]),
    "a fence without a word": (f"{CALL}function{SEP}f\n```\n{{}}\n```", [("call", "f"), ("arguments", "{}")]),
    "a marker in a string": (f'{CALL}f{SEP}{{"a": "{END_CALL}{CALL}"}}{END_CALL}', [
        ("call", "f"), ("arguments", f'{{"a": "{END_CALL}{CALL}"}}')]),
    "the frame never closed": (f"{CALLS}{V31}", FOUND),
    "cut off in the arguments": (f'{CALLS}{CALL}f{SEP}{{"a', [("call", "f"), ("arguments", '{"a')]),
    "cut off in the name": (f"So.{CALLS}{CALL}functi", [("text", "So.")]),
    "cut off in a marker": ("so <｜tool▁", [("text", "so <｜tool▁")]),
    "no calls": (f"{CALLS}nothing{END_CALLS}", [("text", "nothing")]),
    "no arguments": (f"{CALLS}{CALL}f{SEP}nothing{END_CALL}{END_CALLS}", [("text", "fnothing")]),
    "no name": (f"{CALL}{SEP}{{}}{END_CALL}", [("text", "{}")]),
    "no separator": (f"{CALL}f{END_CALL} so", [("text", "fso")]),
    "text behind the arguments": (f"{CALL}f{SEP}{{}} and on{END_CALL}", [("call", "f"), ("arguments", "{}"),
                                                                     ("text", "and on")]),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_every_split_reads_the_same(text: str, expected: list[tuple[str, str]]) -> None:
    reads_as(DEEPSEEK, text, expected)


def test_names_and_heads_are_bounded() -> None:
    for text in (f"{CALL}{'x' * 300}{SEP}{{}}", f"{CALL}{'x' * 3000}{SEP}", f"{CALL}f{SEP}{' ' * 3000}{{}}",
                 f"{CALL}function{SEP}{'x' * 300}\n```json\n{{}}"):
        assert {piece.kind for piece in read([text], DEEPSEEK)} == {"text"}
        assert read(text, DEEPSEEK) == read([text], DEEPSEEK)


PARTS = [*MARKERS, "function", "f", "\n```json\n", "\n```", "{", "}", '{"a": 1}', '"', "\\", " ", "\n", "<", "<｜tool",
         "x"]


@given(st.lists(st.sampled_from(PARTS), max_size=25), st.integers(1, 9))
def test_pieces_do_not_matter_and_no_marker_is_text(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole = read([text], DEEPSEEK)
    assert read((text[i:i + size] for i in range(0, len(text), size)), DEEPSEEK) == whole
    assert not any(marker in piece.value for piece in whole if piece.kind == "text" for marker in MARKERS)
    calls = sum(piece.kind == "call" for piece in whole)
    assert calls == sum(piece.kind == "arguments" for piece in whole)


@pytest.mark.parametrize("unit", ["<", " ", CALLS, CALL, f"{CALL}x", f"{CALL}f{SEP}", f"{CALL}function{SEP}x\n```",
                                  V31 + " ", '"', "\n", f'{CALL}f{SEP}{{"'])
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    reader: Any = DEEPSEEK.reader()
    for character in unit * (3000 // len(unit)):
        reader.feed(character)
        assert len(reader._held) <= MAX_HEAD_CHARS


def test_arguments_come_as_they_are_written() -> None:
    reader = DEEPSEEK.reader()
    assert reader.feed(f'{CALLS}{CALL}f{SEP}{{"a": "b') == [("call", "f"), ("arguments", '{"a": "b')]
    assert reader.feed('c"') == [("arguments", 'c"')]
    assert json.loads("".join(piece.value for piece in read([V3], DEEPSEEK)[1:])) == json.loads(ARGUMENTS)
