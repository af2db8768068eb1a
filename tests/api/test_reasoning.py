"""Thoughts in a model's text: told from the answer, whatever pieces they come in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.wire.reasoning import Mode, ThoughtReader, mode_of


def read(mode: Mode, pieces: Iterable[str]) -> tuple[str, str]:
    reader = ThoughtReader(mode)
    thoughts = [thought for text in pieces for thought in reader.feed(text)] + reader.finish()
    kinds = [kind for kind, _ in itertools.groupby(thought.is_reasoning for thought in thoughts)]
    assert kinds in ([], [True], [False], [True, False])
    reasoning, answer = ("".join(thought.text for thought in thoughts if thought.is_reasoning is kind)
                         for kind in (True, False))
    return reasoning, answer


TEXTS: list[tuple[Mode, str, tuple[str, str]]] = [
    ("maybe", "<think>\nhm, so\n</think>\n\nYes.\n", ("hm, so", "Yes.\n")), ("maybe", "Yes.", ("", "Yes.")),
    ("maybe", "\n <think>a</think>b", ("a", "b")), ("maybe", " <thin> no", ("", " <thin> no")),
    ("maybe", "I <think> so</think>", ("", "I <think> so</think>")), ("maybe", "<think>cut", ("cut", "")),
    ("maybe", "<thi", ("", "<thi")), ("maybe", "<think></think>x", ("", "x")),
    ("open", "\nhm\n</think>\n\nYes </think>", ("hm", "Yes </think>")),
    ("open", "cut off </thi", ("cut off </thi", "")),
    ("open", "a < b" + " " * 100 + "</think>" + " " * 100 + "c", ("a < b" + " " * 36, "c")),
    ("", "<think>a</think>b", ("", "<think>a</think>b")),
]


@pytest.mark.parametrize(("mode", "text", "expected"), TEXTS, ids=range(len(TEXTS)))
def test_every_split_reads_the_same(mode: Mode, text: str, expected: tuple[str, str]) -> None:
    assert read(mode, [text]) == expected
    assert read(mode, text) == expected
    for place in range(len(text) + 1):
        assert read(mode, [text[:place], text[place:]]) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "x"]), max_size=15),
       st.integers(1, 7), st.sampled_from(["", "open", "maybe"]))
def test_pieces_do_not_matter(parts: list[str], size: int, mode: Mode) -> None:
    text = "".join(parts)
    assert read(mode, (text[i:i + size] for i in range(0, len(text), size))) == read(mode, [text])


def test_the_prompt_says_how_it_begins() -> None:
    template = "{{ x }}<think></think>"
    assert mode_of([1, 7, 2], 7, 8, [template]) == "open"
    assert mode_of([7, 1, 8, 2], 7, 8, [template]) == "maybe"
    assert mode_of([1, 2], 7, 8, ["{{ x }}"]) == ""
    assert mode_of([1, 2], None, None, [template]) == "maybe"
