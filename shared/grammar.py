"""Constraints on an answer: JSON of a schema, a match of a regular expression, one of some texts, or a grammar.

A constraint is compiled on trial before a job is queued (shared/trial.py), and by the worker, to know the allowed
tokens. llguidance limits its own work and memory, but not for everything that a grammar may contain; it refuses what it
does not enforce. Here a grammar is llguidance's own form of it, one string that travels with the job.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from tokenizers import Tokenizer

from shared.errors import InvalidGrammar
from shared.patterns import alike
from shared.schemas import ESCAPES, enforceable

MAX_GRAMMAR_CHARS = 256 << 10
TOO_LONG = f"A schema, regular expression or grammar has at most {MAX_GRAMMAR_CHARS} characters."
MAX_CHOICES = 1000
MAX_CACHED = 16             # compiled grammars per tokenizer: each may be as large as a trial allows
MAX_CACHED_CHARS = 4 << 20  # of all of them
TRIAL_STEPS = 8             # tokens drawn on trial before a job is queued
MAX_FORCED_BYTES = 64       # of forced text that is tokenized at once: more costs time at each token
UNFORCED = "// of a client" # marks a client's grammar: its forced text is not computed, since that may never end
NO_END = "<|baton: no end|>"    # a token added where a model has none that ends its answers
TOKEN = b"\xff"             # in forced text: precedes the [id] of a special token
# Limits of work. Compiling burns some 50,000 units of fuel in a millisecond, a step some 14,000.
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, step_max_items=20_000,
                        max_items_in_row=5_000, max_lexer_states=50_000, max_grammar_size=200_000,
                        verbose_errors=False)
# llguidance must not tokenize forced text itself: it would do so again at every token, and into special tokens.
FREE = '%llguidance {"no_forcing": true}\nstart: @whole'
# A model in doubt may write whitespace for ever: between the parts of JSON it is bounded.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}"} | ESCAPES
ANY_OBJECT = {"type": "object"}
UNENFORCED = ("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
              "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
              "$dynamicRef", "$recursiveRef")
SCHEMA_WITHIN = re.compile(r"%json\s*(?={)")             # in a Lark grammar
# How compiler messages begin, and our reason instead: the rest of a message may quote the input.
REASONS = tuple((re.compile(words, re.MULTILINE), reason) for words, reason in (
    (r"Unimplemented keys", "a keyword of the schema is none that is enforced"),
    (r"Unsatisfiable schema", "the schema contradicts itself"),
    (r"oneOf constraints", "several schemas of a oneOf may fit the same, which an anyOf allows"),
    (r"Unknown format", "the format is none that is enforced"),
    (r"Pointer '", "a reference leads to nothing in the schema"),
    (r"Invalid type", "a type of the schema is none of JSON's"),
    (r"min/maxProperties", "a number of properties is enforced where all that are listed are required"),
    (r"(invalid regex|regex parse error)(?s:.)*^error: look-around|(invalid regex .*: )?lookarounds",
     "a regular expression looks around itself"),
    (r"(invalid regex|regex parse error)(?s:.)*^error: backreferences", "a regular expression refers back"),
    (r"invalid regex|regex parse error", "a regular expression is not written right"),
    (r"lexer error: too many|[pP]arser [eE]rror: (Too many|Current row)|schema too large",
     "it is too large, or never ends"),
    (r"Failed to generate regex for", "a range of numbers is beyond what can be written"),
    (r"Unable to determine if", "it takes too much work"),
    (r"unknown special token|Token range", "it names a token that is none of this model's"),
    (r"unknown (name|grammar)|Unknown common regex", "it names something that it does not have"),
    (r"circular reference", "something in it is defined by itself"),
    (r"([$\w]+ must be|(\d+\(\d+\): )?Expected|invalid type|range end) ", "a part of it is not what must stand there")))
PLACE = re.compile(r"(at \d+\(\d+\): )?(failed to compile JSON schema: )?")


def of_schema(schema: dict[str, Any] | str) -> str:
    """The grammar of a JSON schema, which may be given as text."""
    try:
        text = _bounded(schema if isinstance(schema, str) else json.dumps(schema))
        text = json.dumps(enforceable(json.loads(text)), allow_nan=False)
        return _bounded(LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS))
    except (ValueError, RecursionError):
        raise InvalidGrammar("The schema is nested too deeply, or is no JSON object.") from None


def of_regex(regex: str) -> str:
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise InvalidGrammar("A regular expression ends behind what a backslash stands before.")
    regex = alike(regex)
    return _bounded(LLMatcher.grammar_from_regex(regex))


def of_choice(choice: Sequence[str]) -> str:
    if len(choice) > MAX_CHOICES:
        raise InvalidGrammar(f"At most {MAX_CHOICES} choices are allowed.")
    return _bounded(grammar_from("choice", json.dumps(list(choice), ensure_ascii=False)))


def of_grammar(text: str) -> str:
    """The grammar of a text in Lark, where a rule may be %json and a schema, or in GBNF."""
    try:
        return _bounded(f"{UNFORCED}\n{_with_schemas(grammar_from('grammar', _bounded(text)))}")
    except (ValueError, RecursionError):
        raise InvalidGrammar("The grammar is neither Lark's nor GBNF.") from None


def _with_schemas(lark: str) -> str:
    """Makes the schemas within it enforceable; what is not valid JSON is left to the compiler."""
    said, done = list[str](), 0
    for found in SCHEMA_WITHIN.finditer(lark):
        with contextlib.suppress(json.JSONDecodeError):
            if found.start() < done:
                continue                                # within a schema
            schema, end = json.JSONDecoder().raw_decode(lark, found.end())
            schema = enforceable(schema) | {"x-guidance": JSON_OPTIONS}
            said += lark[done:found.end()], json.dumps(schema, allow_nan=False)
            done = end
    return "".join([*said, lark[done:]])


def within(frame: str, **forms: str) -> str:
    """Several grammars as one: in `frame`, written in Lark, @NAME is the grammar given as argument NAME."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": frame}]
    for name, form in forms.items():
        first, *rest = _parts(form)
        grammars += [first | {"name": name}, *rest]
    return json.dumps({"grammars": grammars})


def _parts(grammar: str) -> list[dict[str, Any]]:
    """Its parts: first the grammar itself, then those that it refers to."""
    try:
        parts: list[dict[str, Any]] = json.loads(grammar)["grammars"]
    except ValueError:                                  # a Lark grammar
        return [{"lark_grammar": grammar}]
    return parts


def _bounded(grammar: str) -> str:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidGrammar(TOO_LONG)
    return grammar


# By the kind of constraint; the last takes a finished grammar. Their time is not limited here: see shared/trial.py.
MAKERS: dict[str, Callable[[Any], str]] = {
    "schema": of_schema, "regex": of_regex, "choice": of_choice, "grammar": of_grammar, "made": _bounded}


class Grammars:
    """Compiled grammars of one tokenizer: cached, and copied for each answer. Thread-safe."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]):
        self.vocab_size, self.eos_token_ids = vocab_size, tuple(eos_token_ids)
        self._tokenizer_json = tokenizer_json
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    @cached_property                                    # not always needed, and takes some 20 MiB
    def _tokenizer(self) -> LLTokenizer:
        source, eos = self._tokenizer_json, list(self.eos_token_ids)
        if not eos:                                     # llguidance would take token 0 for it, and refuse that as text
            ended = Tokenizer.from_str(source)
            ended.add_special_tokens([NO_END])
            source, eos = ended.to_str(), [ended.token_to_id(NO_END) or 0]
        for num_tokens in (self.vocab_size, None):      # some have tokens for which their model has no logits
            with contextlib.suppress(ValueError):
                return LLTokenizer(source, n_vocab=num_tokens, eos_token=eos)
        raise InvalidGrammar("Nothing can be enforced with this model's tokenizer.")       # llguidance knows no such

    @property
    def num_words(self) -> int:
        """Of a mask as llguidance writes it: 32 tokens per word, those without logits too."""
        return -(-max(self._tokenizer.vocab_size, self.vocab_size) // 32)

    def prepare(self) -> None:
        """Loads the tokenizer, if llguidance supports it."""
        with contextlib.suppress(InvalidGrammar):
            _ = self._tokenizer

    def compile(self, grammar: str, num_steps: int = 0) -> LLMatcher:
        """Compiles it and draws `num_steps` tokens on trial, since some fail only then. Raises InvalidGrammar."""
        matcher = LLMatcher(self._tokenizer, within(FREE, whole=_bounded(grammar)), log_level=0, limits=LIMITS)
        trial, may_force = matcher.deep_copy(), UNFORCED not in grammar or num_steps > 0      # trials are bounded
        for step in range(num_steps + 1):
            if trial.is_stopped() or (may_force and trial.compute_ff_bytes().startswith(TOKEN)):
                break                                   # where a special token is forced, there is no mask
            allowed = trial.compute_bitmask()
            if step < num_steps:
                trial.consume_token(_some(allowed, step))
        if trial.is_error():
            raise InvalidGrammar(_reason(trial.get_error()))
        return matcher

    def __contains__(self, grammar: str) -> bool:
        """Whether it is compiled, so that a matcher takes some microseconds."""
        with self._lock:
            return grammar in self._compiled

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of an answer. Raises InvalidGrammar."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.deep_copy()
        matcher = self.compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_CACHED or sum(map(len, self._compiled)) > MAX_CACHED_CHARS:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def forget(self, grammar: str) -> None:
        """Compiles it anew when it is needed: once it has run into a limit all its matchers fail, however they go."""
        with self._lock:
            self._compiled.pop(grammar, None)

    def token_ids(self, text: bytes, last: list[int]) -> list[int]:
        """Tokenizes a text that follows the tokens `last`, as far as the tokens do not depend on what comes next."""
        begun = text[:MAX_FORCED_BYTES]
        before, mark, token = begun.rpartition(TOKEN)
        if mark and b"]" not in token:
            begun = before                              # no partial token
        return self._tokenizer.tokenize_partial(begun, recent_tokens=last)[0]


def _some(allowed: bytes, step: int) -> int:
    """One allowed token of a mask; each step starts its search in another quarter of it."""
    begin = len(allowed) * (step % 4) // 4
    place = begin + len(allowed[begin:]) - len(allowed[begin:].lstrip(b"\0"))
    if place == len(allowed):
        place = len(allowed) - len(allowed.lstrip(b"\0"))
    byte = allowed[place] if place < len(allowed) else 1            # none is allowed: the matcher reports it
    return 8 * place + (byte & -byte).bit_length() - 1


def _reason(error: str) -> str:
    """A compiler error in our own words: it quotes nothing of the input but the keywords listed above."""
    said = PLACE.sub("", error, count=1)
    found = next((reason for words, reason in REASONS if words.match(said)), "it has a part that is not understood")
    named = [key for key in UNENFORCED if f'"{key}"' in said] if found == REASONS[0][1] else []
    return f"This cannot be enforced: {found}" + (f" ({', '.join(named)})" if named else "") + "."
