"""Mistral's calls behind a token of their own: an array or name by name, whatever pieces they come in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.dialects import MISTRAL, Dialect
from api.wire.dialects.dialect import MAX_HEAD_CHARS
from api.wire.dialects.mistral import MARKERS
from api.wire.reading import Reading
from tests.api.pieces import TOOLS, drawn, read, reads_as

assert MISTRAL.with_tokens
TOKENS: Dialect = MISTRAL.with_tokens
FOUND = [("call", "f"), ("arguments", '{"a": [1]}')]
ARRAY = '[{"name": "f", "arguments": {"a": [1]}}, {"name": "f", "arguments": {"a": [1]}}]'

TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "text": ("Hello [you].\n", [("text", "Hello [you].\n")]),
    "an array": (f"[TOOL_CALLS] {ARRAY}", FOUND * 2),
    "an array without the token": (ARRAY, [("text", ARRAY)]),
    "text before": (f"I look.\n[TOOL_CALLS]{ARRAY}", [("text", "I look."), *FOUND, *FOUND]),
    "names": ('[TOOL_CALLS]f[ARGS]{"a": [1]}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS] {"a": [1]}', FOUND * 2),
    "a name without its token": ('[TOOL_CALLS] f {"a": [1]} so', [*FOUND, ("text", "so")]),
    "a marker in a string": ('[TOOL_CALLS]f[ARGS]{"a": "[ARGS]"}', [("call", "f"), ("arguments", '{"a": "[ARGS]"}')]),
    "a marker in an array's string": ('[TOOL_CALLS][{"name": "f", "arguments": {"a": "[TOOL_CALLS]"}}]', [
        ("call", "f"), ("arguments", '{"a": "[TOOL_CALLS]"}')]),
    "a marker in a string that is no arguments": ('[TOOL_CALLS][{"name": "f", "arguments": "[TOOL_CALLS]so"}]', [
        ("text", '[{"name": "f", "arguments": "so"}]')]),
    "another array": ("[TOOL_CALLS][1, 2]", [("text", "[1, 2]")]),
    "no call": ("[TOOL_CALLS]nothing [ARGS]5", [("text", "nothing 5")]),
    "no name": ("[TOOL_CALLS][ARGS]{}", [("text", "{}")]),
    "cut off in the arguments": ('[TOOL_CALLS]f[ARGS]{"a', [("call", "f"), ("arguments", '{"a')]),
    "cut off in a marker": ("so [TOOL", [("text", "so [TOOL")]),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_every_split_reads_the_same(text: str, expected: list[tuple[str, str]]) -> None:
    reads_as(TOKENS, text, expected)


PARTS = [*MARKERS, ARRAY, '[{"name": "f", "arguments": ', "[", "]", "f", "{", "}", '"', "\\", " ", "\n", "[TOOL", "x"]


@given(st.lists(st.sampled_from(PARTS), max_size=20), st.integers(1, 9))
def test_pieces_do_not_matter_and_no_marker_is_text(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole = read([text], TOKENS)
    assert read((text[i:i + size] for i in range(0, len(text), size)), TOKENS) == whole
    assert not any(marker in piece.value for piece in whole if piece.kind == "text" for marker in MARKERS)


@pytest.mark.parametrize("unit", ["[", " ", "[TOOL_CALLS]", "[TOOL_CALLS]x", "[TOOL_CALLS]x[CALL_ID]x", ARRAY,
                                  "[TOOL_CALLS]f[ARGS]{", '[TOOL_CALLS][{"name":"'])
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    reader: Any = TOKENS.reader()
    for character in unit * (3000 // len(unit)):
        reader.feed(character)
        assert len(reader._held) + len(reader._array._held) <= MAX_HEAD_CHARS + 1


def test_names_are_bounded() -> None:
    for text in (f"[TOOL_CALLS]{'x' * 300}[ARGS]{{}}", f"[TOOL_CALLS]{'x' * 3000}{{}}",
                 f"[TOOL_CALLS]{'x' * 3000}[ARGS]{{}}", f"[TOOL_CALLS]f[CALL_ID]{'x' * 3000}[ARGS]{{}}"):
        assert {piece.kind for piece in read([text], TOKENS)} == {"text"}
        assert read(text, TOKENS) == read([text], TOKENS)


def test_a_model_writes_calls_in_either_form() -> None:
    """Where its tokenizer knows the second."""
    texts = list(drawn(TOKENS, TOOLS, MARKERS, num=40))
    assert {text.startswith("[TOOL_CALLS][") for text in texts} == {True, False}
    for text in texts:
        assert {piece.kind for piece in read([text], TOKENS)} == {"call", "arguments"}
    assert all(text.replace("] [", "][", 1).startswith("[TOOL_CALLS][") for text in drawn(TOKENS, TOOLS, MARKERS[:1]))


def test_the_tokenizer_says_how_it_is_read() -> None:
    """Where the marker is no token, nothing would show it."""
    for added, name, shown in (({}, "mistral", ()), ({"[TOOL_CALLS]": 9}, "mistral_tokens", (9,))):
        reading = Reading.of([1], ["[AVAILABLE_TOOLS][TOOL_CALLS]"], added.get, wanted="auto",
                             tools=[{"function": {"name": "f"}}])
        assert reading.dialect and reading.dialect.name == name and reading.shown_token_ids == shown
