"""What tests of dialects share: text read in pieces, and text that a grammar has drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from api.wire.dialects import Dialect, Piece, Reader
from shared.grammar import Grammars
from tests.api.scripted import byte_tokenizer

EOS = 256
MAX_DRAWN = 600

TOOLS: list[dict[str, Any]] = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}},
                                                           "required": ["a"], "additionalProperties": False},
                                "strict": True}, {"name": "g-2"}]


class Readable(Protocol):
    def reader(self) -> Reader: ...


def read(pieces: Iterable[str], dialect: Readable) -> list[Piece]:
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


def reads_as(dialect: Readable, text: str, expected: list[tuple[str, str]]) -> None:
    """Whole, by characters, and at every pair of cuts."""
    assert read([text], dialect) == expected
    assert read(text, dialect) == expected
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        assert read([text[:first], text[first:second], text[second:]], dialect) == expected


def drawn(dialect: Dialect, tools: list[dict[str, Any]], added: tuple[str, ...] = (), *, is_one: bool = False,
          num: int = 12, hidden: tuple[str, ...] = ()) -> Iterator[str]:
    """Texts at random that the dialect's grammar has brought to an end; `added` are tokens of their own."""
    tokenizer = byte_tokenizer("<|end of text|>", *added)
    vocab_size = tokenizer.get_vocab_size()
    grammars = Grammars(tokenizer.to_str(), vocab_size, [EOS])
    grammar = dialect.grammar(tools, is_one=is_one, added_id=lambda text: (
        tokenizer.token_to_id(text) if text in added else None))
    for seed in range(num):
        draw, matcher, ids = random.Random(seed), grammars.matcher(grammar), list[int]()
        while not matcher.is_stopped() and len(ids) < MAX_DRAWN:
            allowed = matcher.compute_bitmask()
            choices = [i for i in range(vocab_size) if allowed[i // 8] >> i % 8 & 1]
            short = [i for i in choices if i > EOS] if draw.random() < 0.2 else []
            ids.append(EOS if EOS in choices else draw.choice(short or [i for i in choices if not 126 < i < EOS]
                                                              or choices))
            assert matcher.consume_token(ids[-1])
        if ids[-1] == EOS or matcher.is_stopped():
            unseen = {EOS, *map(tokenizer.token_to_id, hidden)}
            yield tokenizer.decode([i for i in ids if i not in unseen], skip_special_tokens=False)
