"""Token ids to text, one at a time, equal to decoding them all at once; special tokens are omitted unless they are to
be shown.

A character whose bytes have not all arrived is held back. It knows tokenizers, nothing of stop strings or models.

Where it differs from `Tokenizer.decode` of all ids: in a run of byte tokens (`<0xE2>`) that turns out not to be UTF-8,
decode shows every byte of the whole run as U+FFFD; here characters that were complete before stay as they are. And a
decoder that rewrites earlier text when more arrives (WordPiece with clean-up) is not taken back.
"""

from __future__ import annotations

import codecs
from functools import lru_cache
from re import compile as pattern
from typing import Protocol

from tokenizers import Tokenizer

from shared import byte_level

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = pattern("<0x([0-9A-Fa-f]{2})>")
MAX_HELD_TOKENS = 8         # no character needs more: text that still looks incomplete then is shown as it is


class Decoder(Protocol):
    def feed(self, token_id: int) -> str:
        """The text this token completes."""

    def finish(self) -> str:
        """The rest, which is an incomplete character."""


class Vocabulary:
    """Shared by all streams of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token_id: token.content for token_id, token in added.items() if token.special}
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder else b""
        self.is_byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
        self.has_byte_tokens = b"ByteFallback" in state
        self._bytes: dict[int, bytes] = {}

    def decoder(self, shown: frozenset[int] = frozenset()) -> Decoder:
        """A decoder that shows these special tokens."""
        return ByteLevelDecoder(self, shown) if self.is_byte_level else WindowDecoder(self, shown)

    def decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a byte-level token, as the decoder of tokenizers reads it."""
        if token_id not in self._bytes:
            self._bytes[token_id] = byte_level.token_bytes(self.tokenizer.id_to_token(token_id) or "")
        return self._bytes[token_id]

    def byte_token(self, token_id: int) -> bytes | None:
        """The byte of a byte-fallback token."""
        match = BYTE_TOKEN.fullmatch(self.tokenizer.id_to_token(token_id) or "") if self.has_byte_tokens else None
        return bytes([int(match[1], 16)]) if match else None


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


class ByteLevelDecoder:
    """Tokens are bytes; the text is their UTF-8."""

    def __init__(self, vocabulary: Vocabulary, shown: frozenset[int]):
        self._vocabulary = vocabulary
        self._shown_ids = shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        if token_id in self._vocabulary.special:
            return self.finish() + self._vocabulary.special[token_id] if token_id in self._shown_ids else ""
        return self._utf8.decode(self._vocabulary.bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """Any other decoder: the last tokens decoded together, minus those decoded without the newest.

    Earlier tokens serve as context: the first token of a text may lose its leading space.
    """

    def __init__(self, vocabulary: Vocabulary, shown: frozenset[int]):
        self._vocabulary = vocabulary
        self._shown_ids = shown
        self._context: list[int] = []       # shown already
        self._shown = ""                    # the context decoded alone
        self._held: list[int] = []          # tokens of an incomplete character
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_broken = False             # this run of byte tokens is not UTF-8

    def feed(self, token_id: int) -> str:
        if token_id in self._shown_ids and token_id in self._vocabulary.special:
            return self.finish() + self._vocabulary.special[token_id]
        if token_id in self._vocabulary.special or self._vocabulary.tokenizer.id_to_token(token_id) is None:
            return ""
        byte = self._vocabulary.byte_token(token_id)
        if byte is not None:
            return self._feed_byte(token_id, byte)
        text = self._end_of_run() if self._vocabulary.has_byte_tokens else ""
        self._is_broken = False
        self._held.append(token_id)
        whole = self._whole()
        may_go_on = whole.endswith(REPLACEMENT) and not self._vocabulary.has_byte_tokens
        if may_go_on and len(self._held) < MAX_HELD_TOKENS:
            return text
        return text + self._show(whole)

    def _feed_byte(self, token_id: int, byte: bytes) -> str:
        self._held.append(token_id)
        try:
            if not self._is_broken and not self._utf8.decode(byte):
                return ""
        except UnicodeDecodeError:
            self._is_broken = True
        return self._end_of_run() if self._is_broken else self._show(self._whole())

    def _end_of_run(self) -> str:
        """Held bytes that cannot become a character, one U+FFFD for each."""
        self._utf8.reset()
        text = REPLACEMENT * len(self._held)
        if self._held:
            self._context, self._held = self._held[-1:], []
            self._shown = self._vocabulary.decode(self._context)
        return text

    def finish(self) -> str:
        self._is_broken = False
        if self._vocabulary.has_byte_tokens:
            return self._end_of_run()
        return self._show(self._whole()) if self._held else ""

    def _whole(self) -> str:
        return self._vocabulary.decode(self._context + self._held)

    def _show(self, whole: str) -> str:
        text = whole[len(self._shown):]
        self._context, self._held = self._held, []
        self._shown = self._vocabulary.decode(self._context)
        return text
