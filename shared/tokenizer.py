"""From messages to token ids, and from a token id to its bytes: what both sides know of a model's text.

Built from a card alone. Special tokens that a user writes are plain text: they never become the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from shared import byte_level
from shared.card import Card
from shared.errors import BadRequest, TemplateRefused
from shared.template import ChatTemplate
from shared.trial import Trials

CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]    # noncharacters: not meant to occur in text

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """The tokenizer and the chat template of one card."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.fast = FastTokenizer.from_str(card.tokenizer_json)
        self.fast.no_truncation()                       # some files contain what a training script set
        self.fast.no_padding()
        self.templates = {name: ChatTemplate(source) for name, source in card.chat_templates.items()}
        added = self.fast.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        contents = sorted({token.content for token in added.values() if token.content.strip()}, key=len, reverse=True)
        # The lookahead also finds overlapping occurrences.
        self._written = re.compile("(?=" + "|".join(map(re.escape, contents)) + ")") if contents else None
        self._token_bytes = _token_bytes(card.tokenizer_json)
        self._trials = Trials(card.tokenizer_json, card.vocab_size, tuple(card.eos_token_ids))

    def added_id(self, text: str) -> int | None:
        """The id of the added token that this text is, if it is one."""
        token_id: int | None = self.fast.token_to_id(text)
        return token_id if token_id in self._added else None

    def make_grammar(self, kind: str, value: Any) -> str:
        """The grammar of a constraint (`shared.grammar.MAKERS`), tried. Raises InvalidGrammar, or Unavailable."""
        return self._trials.make(kind, value)

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate | None:
        return self.templates.get("tool_use" if tools else "default") or self.templates.get("default")

    def encode_chat(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None,
                    variables: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
        """Token ids of the rendered chat. Raises TemplateRefused, or BadRequest when there is no chat template."""
        try:
            pieces = self._render(messages, tools, variables)
            return [i for piece in pieces if piece for i in self.fast.encode(piece, add_special_tokens=False).ids]
        except RecursionError:
            raise TemplateRefused("The messages or the tools are nested too deeply.") from None
        except (UnicodeEncodeError, TypeError):         # a lone surrogate
            raise TemplateRefused("The messages hold text that is not valid Unicode.") from None

    def encode_prompt(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a whole prompt, in which special tokens written in the text are special. Raises BadRequest."""
        try:
            ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):         # a lone surrogate
            raise TemplateRefused("The text is not valid Unicode.") from None
        return ids

    def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; added tokens written in it are plain text too. Raises TemplateRefused."""
        try:
            cut = _unused_cut(text)
            pieces = _insert(text, self._written, cut).split(cut) if self._written else [text]
            ids = [i for piece in pieces if piece for i in self.fast.encode(piece, add_special_tokens=False).ids]
        except (UnicodeEncodeError, TypeError):         # a lone surrogate
            raise TemplateRefused("The text is not valid Unicode.") from None
        if not add_special_tokens:
            return ids
        bare, dressed = (self.fast.encode("a", add_special_tokens=special).ids for special in (False, True))
        place = next(i for i in range(len(dressed)) if dressed[i:i + len(bare)] == bare)
        return [*dressed[:place], *ids, *dressed[place + len(bare):]]

    def _render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]
                ) -> list[str]:
        """The text of the chat, cut wherever it would read as a token that only a template may write."""
        template = self.template_for(tools)
        if template is None:
            raise BadRequest("This model has no chat template, so it cannot chat.")
        written, cut = self._written, None
        if written and any(written.search(text) for text in _strings([messages, tools])):
            cut = _unused_cut([messages, tools])
            messages = [{name: value if name == "role" else _map_strings(value, written, cut)
                         for name, value in message.items()} for message in messages]
            tools = _map_strings(tools, written, cut)
        text = template.render(messages, tools=tools, special_tokens=self.card.special_tokens, **variables)
        return text.split(cut) if cut else [text]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones as they are written."""
        text: str = self.fast.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, even if they are not a whole character."""
        if token_id in self._added:
            return self._added[token_id]
        token = self.fast.id_to_token(token_id)
        return self._token_bytes(token) if token is not None else b""


def _insert(text: str, written: re.Pattern[str], cut: str) -> str:
    """Puts a cut after the first character of each added token in the text: split there, it encodes as plain text."""
    places = [match.start() + 1 for match in written.finditer(text)]
    return cut.join(text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a structure, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def _map_strings(value: Any, written: re.Pattern[str], cut: str) -> Any:
    if isinstance(value, str):
        return _insert(value, written, cut)
    if isinstance(value, Mapping):
        return {_insert(key, written, cut): _map_strings(inner, written, cut) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(inner, written, cut) for inner in value]
    return value


def _unused_cut(value: Any) -> str:
    for cut in CUTS:
        if not any(cut in text for text in _strings(value)):
            return cut
    raise TemplateRefused("The messages hold text that is not valid Unicode.")


def _token_bytes(tokenizer_json: str) -> Callable[[str], bytes]:
    """How the vocabulary of this tokenizer writes bytes: GPT-2's byte alphabet, or pieces with '▁' and <0xNN>."""
    if '"ByteLevel"' in tokenizer_json:
        return byte_level.token_bytes
    hex_byte = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def piece_bytes(token: str) -> bytes:
        if match := hex_byte.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace("▁", " ").encode()

    return piece_bytes
