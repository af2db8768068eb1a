"""What an answer must be: JSON of a schema, a match of a regular expression, one of some texts, or words of a grammar.

A pod compiles it to check it before a job is queued, a worker to know which tokens may follow. Both do so by llguidance
within limits of work and memory of its own, whatever is in a grammar; what it does not enforce, it refuses. Here a
grammar is llguidance's own form of it, one string that travels with the job.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from shared.errors import InvalidGrammar

MAX_GRAMMAR_CHARS = 256 << 10
MAX_CHOICES = 1000
MAX_CACHED = 64             # compiled grammars of one tokenizer
MAX_CACHED_CHARS = 4 << 20  # of all of them
MAX_ERROR_CHARS = 300
TERSE = "<non-verbose/>"    # at the end of what the compiler says, without what it was doing
MAX_FORCED_BYTES = 64       # of what must follow, as tokens: more of it costs time at each of them
TOKEN = b"\xff"             # in it, before the [id] of a token that is no text
# A limit of work each, at some 50,000 units of fuel in a millisecond when compiled and 14,000 in a step.
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, step_max_items=50_000,
                        max_items_in_row=20_000, max_lexer_states=50_000, max_grammar_size=200_000,
                        verbose_errors=False)
# Of what must follow, llguidance would make tokens by itself: of all of it, at every token, and special ones too.
FREE = '%llguidance {"no_forcing": true}\nstart: @whole'
# A model in doubt may write blanks for ever: what separates JSON's parts is short.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}"}
ANY_OBJECT = {"type": "object"}


def of_schema(schema: dict[str, Any] | str) -> str:
    """A JSON schema, or its text."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        return _bounded(LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS))
    except (ValueError, RecursionError):
        raise InvalidGrammar("The schema is nested too deeply, or is no JSON object.") from None


def of_regex(regex: str) -> str:
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise InvalidGrammar("A regular expression ends behind what a backslash stands before.")
    return _bounded(LLMatcher.grammar_from_regex(regex))


def of_choice(choice: Sequence[str]) -> str:
    if len(choice) > MAX_CHOICES:
        raise InvalidGrammar(f"At most {MAX_CHOICES} choices are allowed.")
    return _bounded(grammar_from("choice", json.dumps(list(choice), ensure_ascii=False)))


def of_grammar(text: str) -> str:
    """Of Lark's language or of GBNF."""
    try:
        return _bounded(grammar_from("grammar", text))
    except ValueError:
        raise InvalidGrammar("The grammar is neither Lark's nor GBNF.") from None


def within(frame: str, **forms: str) -> str:
    """A frame in Lark's language around forms that it names: @form is the one that is given as `form`."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": frame}]
    for name, form in forms.items():
        first, *rest = _parts(form)
        grammars += [first | {"name": name}, *rest]
    return json.dumps({"grammars": grammars})


def _parts(grammar: str) -> list[dict[str, Any]]:
    """The first is the grammar, the rest is what it names."""
    try:
        parts: list[dict[str, Any]] = json.loads(grammar)["grammars"]
    except ValueError:                                  # Lark's own
        return [{"lark_grammar": grammar}]
    return parts


def _bounded(grammar: str) -> str:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidGrammar(f"A schema, regular expression or grammar has at most {MAX_GRAMMAR_CHARS} characters.")
    return grammar


class Grammars:
    """Those of one tokenizer: compiled once while they are in use, and copied for each answer. Safe among threads."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]):
        self.vocab_size, self.eos_token_ids = vocab_size, tuple(eos_token_ids)
        self._tokenizer_json = tokenizer_json
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    @cached_property                                    # not everybody needs it, and it takes some 20 MiB
    def _tokenizer(self) -> LLTokenizer:
        eos = list(self.eos_token_ids) or None
        try:
            return LLTokenizer(self._tokenizer_json, n_vocab=self.vocab_size, eos_token=eos)
        except ValueError:                              # a kind of tokenizer that llguidance does not know
            raise InvalidGrammar("Nothing can be enforced with this model's tokenizer.") from None

    def check(self, grammar: str) -> None:
        """Raises InvalidGrammar, with the compiler's own words."""
        self.matcher(grammar)

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of an answer. Raises InvalidGrammar."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.deep_copy()
        matcher = LLMatcher(self._tokenizer, within(FREE, whole=grammar), log_level=0, limits=LIMITS)
        trial = matcher.deep_copy()
        if not trial.compute_ff_bytes().startswith(TOKEN):      # behind a token that must follow there is no mask
            trial.compute_bitmask()                     # some only show then what they are
        if trial.is_error():
            raise InvalidGrammar(_cause(trial.get_error()))
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_CACHED or sum(map(len, self._compiled)) > MAX_CACHED_CHARS:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def token_ids(self, text: bytes, last: list[int]) -> list[int]:
        """In which the tokenizer would write it behind the last token, as far as that is certain of its beginning."""
        begun = text[:MAX_FORCED_BYTES]
        before, mark, token = begun.rpartition(TOKEN)
        if mark and b"]" not in token:
            begun = before                              # not half a token
        return self._tokenizer.tokenize_partial(begun, recent_tokens=last)[0]


def _cause(error: str) -> str:
    """What the compiler says, as one line."""
    return f"This cannot be enforced: {' '.join(error.removesuffix(TERSE).split())[:MAX_ERROR_CHARS]}"
