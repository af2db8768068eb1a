"""What an answer must be: what compiles, what is refused with which words, and that nothing takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from shared import grammar
from shared.errors import InvalidGrammar
from shared.grammar import Grammars, of_choice, of_grammar, of_regex, of_schema
from tests.bench.models import make_tokenizer
from worker import tiny

TOKENIZER = Tokenizer.from_file(str(Path(tiny.MODEL_FOLDER) / "tokenizer.json"))
EOS = TOKENIZER.token_to_id("<|end|>") or 256
NESTED: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), [EOS])


def accepts(grammars: Grammars, compiled: str, text: str) -> bool:
    """Whether this may be all of an answer."""
    matcher = grammars.matcher(compiled)
    token_ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}, "b": {"enum": ["x", None]}},
          "required": ["a"], "additionalProperties": False}
KINDS: dict[str, tuple[str, list[str], list[str]]] = {
    "schema": (of_schema(SCHEMA), ['{"a": 3}', '{"a":40,"b":"x"}', '{ "a" : 3, "b" : null }'],
               ['{"a": 2}', "{}", '{"a": 3, "c": 1}', '{"a": 3', '{"a": 3}\n' + " " * 20]),
    "object": (of_schema(grammar.ANY_OBJECT), ["{}", '{"x": [1, {"y": "é\\n"}]}'], ["[]", "x", '{"x": }']),
    "recursive": (of_schema(NESTED), ["{}", '{"next": {"next": {}}}'], ['{"next": 1}']),
    "regex": (of_regex(r"\d{3}-[a-z]+"), ["123-abc"], ["12-abc", "123-", "123-abc "]),
    "choice": (of_choice(["yes", "no", 'a "quote"\n']), ["yes", "no", 'a "quote"\n'], ["ye", "yesno", "maybe"]),
    "lark": (of_grammar('start: "a" b\nb: "b" b | "c"'), ["abbc"], ["abb", "bc"]),
    "gbnf": (of_grammar('root ::= "a" b\nb ::= "b" b | "c"'), ["abbc"], ["abb", "bc"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_they_must_be(kind: str, grammars: Grammars) -> None:
    compiled, right, wrong = KINDS[kind]
    assert all(accepts(grammars, compiled, text) for text in right)
    assert not any(accepts(grammars, compiled, text) for text in wrong)


def nest(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"in": schema}}
    return schema


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "contradictory": (lambda: of_schema({"type": "integer", "minimum": 5, "maximum": 3}), "contradicts itself"),
    "unknown type": (lambda: of_schema({"type": "date"}), "none of JSON's"),
    "not": (lambda: of_schema({"not": {"type": "string"}}), r"none that is enforced \(not\)"),
    "unique": (lambda: of_schema({"type": "array", "uniqueItems": True}), r"none that is enforced \(uniqueItems\)"),
    "two keywords": (lambda: of_schema({"if": {}, "then": {}}), r"\(if, then\)"),
    "unknown format": (lambda: of_schema({"type": "string", "format": "phone"}), "format"),
    "elsewhere": (lambda: of_schema({"$ref": "https://example.org/schema.json"}), "nothing is fetched"),
    "reference to nothing": (lambda: of_schema({"$ref": "#/$defs/x"}), "leads to nothing"),
    "either": (lambda: of_schema({"oneOf": [{"type": "object"}, {"type": "object"}]}), "oneOf"),
    "no value for a keyword": (lambda: of_schema({"required": "secret"}), "what must stand there"),
    "so many properties": (lambda: of_schema({"type": "object", "properties": {f"p{i}": {} for i in range(9)},
                                              "maxProperties": 3}), "number of properties"),
    "long and of a form": (lambda: of_schema({"type": "string", "pattern": "a*", "minLength": 100_000}), "much work"),
    "no text": (lambda: of_schema('{"a": '), "no JSON object"),
    "nothing but itself": (lambda: of_grammar('start: start "a"'), "enforced"),
    "no regex": (lambda: of_regex("(("), "not written right"),
    "pattern that is none": (lambda: of_schema({"type": "string", "pattern": "secret(("}), "not written right"),
    "look behind": (lambda: of_regex("(?<=a)b"), "looks around"),
    "border of a word": (lambda: of_regex(r"\bsecret"), "looks around"),
    "back": (lambda: of_regex(r"(a)\1"), "refers back"),
    "half an escape": (lambda: of_regex("a\\"), "backslash"),
    "over lines": (lambda: of_regex("(?ix)a # secret\n b"), "different ways"),
    "one long choice": (lambda: of_choice(["ab" * 100_000]), "too large"),
    "long choices": (lambda: of_choice(["a" * 3000 + str(i) for i in range(50)]), "too large"),
    "so long a text": (lambda: of_schema({"const": "z" * 150_000}), "too large"),
    "without an end": (lambda: of_grammar('start: "a" start'), "never ends"),
    "far numbers": (lambda: of_schema({"type": "integer", "minimum": 2**62}), "range of numbers"),
    "no grammar": (lambda: of_grammar("%%%"), "neither Lark's nor GBNF"),
    "undefined rule": (lambda: of_grammar("start: secret"), "does not have"),
    "words of another reason": (lambda: of_grammar("start: lookaround_too_many_fuel"), "does not have"),
    "and in a regex": (lambda: of_regex("error: look-around ((secret"), "not written right"),
    "and in a schema": (lambda: of_schema({"type": "string", "minLength": "look"}), "what must stand there"),
    "many ways at once": (lambda: of_grammar("start: " + " | ".join(f'"w{i}"' for i in range(20_000))), "too large"),
    "undefined token": (lambda: of_grammar("start: <secret>"), "none of this model's"),
    "no end of a text": (lambda: of_grammar('start: "secret'), "not understood"),
    "in a circle": (lambda: of_grammar("start: A\nA: B\nB: A"), "by itself"),
    "too many choices": (lambda: of_choice(["x"] * (grammar.MAX_CHOICES + 1)), "At most 1000 choices"),
    "too long": (lambda: of_schema({"enum": [f"a value of some length {i}" for i in range(20_000)]}), "at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_in_words_of_ours(name: str, grammars: Grammars) -> None:
    """None of them was said by the client, for who logs errors logs no secrets."""
    make, words = REFUSED[name]
    with pytest.raises(InvalidGrammar, match=words) as refused:
        grammars.compile(make(), grammar.TRIAL_STEPS)
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value) and len(str(refused.value)) < 200


def test_every_reason_is_given_for_something(grammars: Grammars) -> None:
    """What the compiler says may change with its version."""
    told = []
    for make, _ in REFUSED.values():
        with pytest.raises(InvalidGrammar) as refused:
            grammars.compile(make(), grammar.TRIAL_STEPS)
        told.append(str(refused.value))
    never = {reason for _, reason in grammar.REASONS if not any(reason in text for text in told)}
    assert never == set()


HOSTILE: dict[str, Callable[[], str]] = {
    "10,000 values": lambda: of_schema({"enum": [f"value {i}" for i in range(10_000)]}),
    "2,000 properties": lambda: of_schema({"type": "object", "properties": {f"p{i}": {"type": "string"}
                                                                             for i in range(2000)}}),
    "explosive": lambda: of_regex("(a|aa)*" * 20 + "(.*a){30}.{0,500}"),
    "huge": lambda: of_regex("((a{1000}){1000}){1000}"),
    "wide": lambda: of_regex("(.*a.{50}){20}"),
    "deep": lambda: of_schema(nest(60)),
    "very deep": lambda: of_schema(nest(400)),
    "ambiguous": lambda: of_grammar("start: e\ne: e e | \"a\" | e \"b\" e | \"\""),
    "alternatives of alternatives": lambda: of_schema({"anyOf": [{"anyOf": [{"type": "object", "properties": {
        f"{i}{j}": {"anyOf": [{"const": k} for k in range(20)]} for j in range(10)}}]} for i in range(20)]}),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_made_to_be_slow_is_compiled_or_refused(name: str, grammars: Grammars) -> None:
    """And what may follow is found out too, step by step, or the matcher gives up; how long it took, the bench says."""
    try:
        matcher = grammars.matcher(HOSTILE[name]())
    except InvalidGrammar:
        return
    for _ in range(20):
        allowed = matcher.compute_bitmask()
        token_ids = [i for i in range(TOKENIZER.get_vocab_size()) if allowed[i // 8] >> i % 8 & 1]
        if matcher.is_stopped() or not token_ids or not matcher.consume_token(token_ids[len(token_ids) // 2]):
            return


def test_a_tokenizer_that_is_not_known_is_refused_when_it_is_needed() -> None:
    """And not before: its model serves all who ask for no form."""
    words = Grammars(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str(), 2, [])
    with pytest.raises(InvalidGrammar, match="tokenizer"):
        words.compile(of_choice(["a"]))


def test_a_copy_goes_its_own_way_and_the_cache_is_bounded(grammars: Grammars) -> None:
    first, second = (grammars.matcher(of_choice(["ab", "cd"])) for _ in range(2))
    assert first.consume_token(TOKENIZER.encode("a").ids[0])
    assert second.consume_token(TOKENIZER.encode("c").ids[0])
    for number in range(grammar.MAX_CACHED + 10):
        grammars.matcher(of_regex(f"x{number}"))
    assert len(grammars._compiled) == grammar.MAX_CACHED


def test_a_grammar_that_ran_into_a_limit_is_compiled_anew(grammars: Grammars) -> None:
    """All its matchers share what was computed, and fail from then on."""
    long, marker = 'start: T\nT: /(?s:.){3,99}/ & ~/(?s:.)*<end-of-it>(?s:.)*/', "<end-of-it>"
    assert accepts(grammars, long, "xyz") and not accepts(grammars, long, f"x{marker}")
    assert not accepts(grammars, long, "xyz"), "else there is nothing to forget"
    grammars.forget(long)
    assert accepts(grammars, long, "xyz")


def test_without_an_end_every_token_that_is_allowed_is_taken() -> None:
    """Token 0 is one of them: llguidance takes it for the end of an answer if nobody names another."""
    tokenizer = make_tokenizer(600)
    endless = Grammars(tokenizer.to_str(), tokenizer.get_vocab_size(), [])
    matcher = endless.matcher(of_regex(r"(?s:.)*Z{9}"))
    allowed = [token_id for token_id in range(endless.vocab_size)
               if matcher.compute_bitmask()[token_id // 8] >> token_id % 8 & 1]
    assert 0 in allowed
    assert all(matcher.deep_copy().try_consume_tokens([token_id]) for token_id in allowed)
