"""Calls of tools in a model's text: what is read does not depend on the pieces, and what is no call is text."""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.jobs import Order, make_job
from api.wire.dialects import (
    CHOICES,
    DEEPSEEK,
    DIALECTS,
    HARMONY,
    HERMES,
    LLAMA,
    MAX_HEAD_CHARS,
    MISTRAL,
    PYTHONIC,
    QWEN_CODER,
    Dialect,
    choose_dialect,
    dialect_of,
)
from api.wire.dialects.json_value import Strings
from api.wire.request import parse
from shared.errors import InvalidGrammar
from shared.grammar import Grammars, of_schema
from shared.job import Header, Job
from shared.settings import Settings
from shared.tokenizer import Tokenizer as ChatTokenizer
from tests.api.pieces import EOS, TOOLS, drawn, read, reads_as
from tests.api.scripted import byte_card, byte_tokenizer

TOKENIZER = byte_tokenizer("<|end of text|>")
GRAMMARS = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), [EOS])

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}}\n</tool_call>'
ARGUMENTS = '{"a": "}\\"<tool_call>", "b": [1, {"c": "\\\\"}]}'


TEXTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "text": ("Hello, <b>you</b>.\n", [("text", "Hello, <b>you</b>.\n")]),
    "call": (CALL, [("call", "f"), ("arguments", ARGUMENTS)]),
    "text before": (f"I look.\n\n{CALL}", [("text", "I look."), ("call", "f"), ("arguments", ARGUMENTS)]),
    "two, and text behind": (f"\n{CALL}\n{CALL}\n done\n", [("call", "f"), ("arguments", ARGUMENTS), ("call", "f"),
                                                            ("arguments", ARGUMENTS), ("text", "done\n")]),
    "tight": ('<tool_call>{"name":"g","arguments":{}}</tool_call>', [("call", "g"), ("arguments", "{}")]),
    "parameters": ('<tool_call>{"name":"g","parameters":{"x":1}}</tool_call>', [("call", "g"),
                                                                               ("arguments", '{"x":1}')]),
    "cut off in the arguments": ('<tool_call>{"name":"g","arguments":{"x', [("call", "g"), ("arguments", '{"x')]),
    "cut off before": ('<tool_call>\n{"name":"g', [("text", '<tool_call>\n{"name":"g')]),
    "cut off in the marker": ("so <tool_", [("text", "so <tool_")]),
    "no call": ("<tool_call>\nnothing\n</tool_call>", [("text", "<tool_call>\nnothing\n</tool_call>")]),
    "no name": ('<tool_call>{"name": "", "arguments": {}}</tool_call>', [
        ("text", '<tool_call>{"name": "", "arguments": {}}</tool_call>')]),
    "many blanks": (" " * 100 + CALL + " " * 100 + "x", [("text", " " * 36), ("call", "f"), ("arguments", ARGUMENTS),
                                                         ("text", "x")]),
    "the name last": ('<tool_call>\n{"arguments": {"a": "}"}, "name": "f"}\n</tool_call>', [
        ("call", "f"), ("arguments", '{"a": "}"}')]),
    "no name at all": ('<tool_call>{"arguments": {"a": 1}}</tool_call>', [
        ("text", '<tool_call>{"arguments": {"a": 1}}</tool_call>')]),
    "an id and a type": (
        '<tool_call>{"id": "1", "type": "function", "name": "f", "arguments": {}, "id": "}"}</tool_call>', [
            ("call", "f"), ("arguments", "{}")]),
    "null": ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [("call", "f"), ("arguments", "{}")]),
    "JSON in a string": ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"}\\"}"}</tool_call>', [
        ("call", "f"), ("arguments", '{"a": "}"}')]),
    "no object": ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [
        ("text", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>')]),
    "cut off before the name": ('<tool_call>{"arguments": {"a": 1}, "na', [
        ("text", '<tool_call>{"arguments": {"a": 1}, "na')]),
    "never closed": ('<tool_call>{"name":"g","arguments":{}} and on', [("call", "g"), ("arguments", "{}"),
                                                                     ("text", "} and on")]),
}


LEADING: list[tuple[Dialect, str, list[tuple[str, str]]]] = [
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', [("call", "f"), ("arguments", '{"a": 1}')]),
    (LLAMA, '\n{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": "}"}}\n', [
        ("call", "f"), ("arguments", "{}"), ("call", "g"), ("arguments", '{"b": "}"}')]),
    (LLAMA, ' {"answer": 5}', [("text", ' {"answer": 5}')]), (LLAMA, "Yes {", [("text", "Yes {")]),
    (LLAMA, '{"name": "f"', [("text", '{"name": "f"')]),
    (LLAMA, '{"name": "f", "parameters": {}} so', [("call", "f"), ("arguments", "{}"), ("text", "so")]),
    (MISTRAL, '[{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]', [
        ("call", "f"), ("arguments", '{"a": [1]}'), ("call", "g"), ("arguments", "{}")]),
    (MISTRAL, '[{"name": "f", "arguments": {"a": 1}, "id": "VvvODy9mT"}, {"arguments": {}, "name": "g", "id": "x"}]', [
        ("call", "f"), ("arguments", '{"a": 1}'), ("call", "g"), ("arguments", "{}")]),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {}}', [("call", "f"), ("arguments", "{}")]),
    (MISTRAL, "[1, 2]", [("text", "[1, 2]")]), (MISTRAL, " [", [("text", " [")]),
    (MISTRAL, "Hi [{", [("text", "Hi [{")]),
]


@pytest.mark.parametrize(("dialect", "text", "expected"), [
    *((HERMES, text, expected) for text, expected in TEXTS.values()), *LEADING], ids=str)
def test_every_split_reads_the_same(dialect: Dialect, text: str, expected: list[tuple[str, str]]) -> None:
    reads_as(dialect, text, expected)


JSON_DIALECTS = {dialect.name: dialect for dialect in (HERMES, MISTRAL, LLAMA)}
WORDS = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"arguments": ', ', "name": "g"', '"id": "1", ',
         "null", "{", "}", '"', "\\", "\n", " ", "<", "x", "[1]", "</tool"]


@given(st.lists(st.sampled_from(WORDS), max_size=25), st.integers(1, 7), st.sampled_from(list(JSON_DIALECTS.values())))
def test_nothing_breaks_it_and_pieces_do_not_matter(parts: list[str], size: int, dialect: Dialect) -> None:
    text = "".join(parts)
    whole = read([text], dialect)
    assert read((text[i:i + size] for i in range(0, len(text), size)), dialect) == whole
    calls = sum(piece.kind == "call" for piece in whole)
    assert calls == sum(piece.kind == "arguments" for piece in whole) or whole[-1].kind == "call"


@pytest.mark.parametrize("dialect", JSON_DIALECTS.values(), ids=JSON_DIALECTS)
def test_hostile_text_is_read_in_linear_time(dialect: Dialect) -> None:
    """What is held back is bounded, so that no character is looked at more than a bounded number of times."""
    for unit in ("<", " ", "<tool_call>", "<tool_call>{", '<tool_call>{"name":"f","arguments":{}}' + " ", "{", '"',
                 '<tool_call>{"name":"', "</tool_call>", '{"name":"f","parameters":{}};', "[",
                 '[{"name":"f","arguments":[', '<tool_call>{"name":"f","arguments":"', '{"arguments":{},',
                 '{"type":"a",'):
        reader: Any = dialect.reader()
        for character in unit * (3000 // len(unit)):
            reader.feed(character)
            assert len(reader._held) <= MAX_HEAD_CHARS + len(HERMES.end)


def test_a_dialect_is_known_by_the_template() -> None:
    assert dialect_of(["{{ messages }}", 'say <tool_call>{"name"}</tool_call>']) is HERMES
    assert dialect_of(["[AVAILABLE_TOOLS] {{ tools }} [TOOL_CALLS]"]) is MISTRAL
    assert dialect_of(['Environment: ipython {"name": function name, "parameters": …}']) is LLAMA
    assert dialect_of(["<|start|>assistant<|channel|>final<|message|>"]) is HARMONY
    assert dialect_of(["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"]) is DEEPSEEK
    for sign in ('ipython "parameters" in the format of [func_name1(params_name1=params_value1, …)]',
                 "List of tools: <|tool_list_start|>["):
        assert dialect_of([sign]) is PYTHONIC
    assert dialect_of(["<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"]) is QWEN_CODER
    assert dialect_of(["{{ messages }}"]) is None
    assert choose_dialect("llama", ["<tool_call></tool_call>"]) is LLAMA
    assert choose_dialect("none", ["<tool_call></tool_call>"]) is None


def test_thoughts_of_harmony_are_told_without_tools_as_well() -> None:
    template = "<|start|>assistant<|channel|>final<|message|>"
    for wanted, has_tools in (("auto", False), ("none", True), ("harmony", False)):
        found = choose_dialect(wanted, [template], has_tools=has_tools)
        assert found is HARMONY.without_tools and found and not found.can_call
    assert choose_dialect("auto", ["<tool_call></tool_call>"], has_tools=False) is None


def test_every_dialect_can_be_set_and_is_told_to_the_pods_of_other_releases() -> None:
    wanted: Any = Settings.model_fields["tool_dialect"].annotation
    assert sorted(wanted.__args__) == sorted(["auto", "none", *(dialect.name for dialect in CHOICES)])
    assert {name for name, dialect in DIALECTS.items() if dialect.fold_version == 2} == {"hermes", "mistral", "llama"}


MARKERS = {dialect.name: dialect.markers for dialect in CHOICES} | {"mistral": ("[TOOL_CALLS]",)}


@pytest.mark.parametrize("dialect", CHOICES, ids=[dialect.name for dialect in CHOICES])
@pytest.mark.parametrize("is_one", [True, False])
@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
def test_what_a_grammar_makes_its_reader_reads(dialect: Dialect, is_one: bool, has_tokens: bool) -> None:
    """Whatever is drawn: calls, perhaps behind a thought, and nothing else, until the grammar has an end."""
    added = MARKERS[dialect.name] if has_tokens else ()
    num_read, counts = 0, set()
    reader: Any = SimpleNamespace(reader=lambda: dialect.reader_of(dialect.typed_arguments(TOOLS)))
    for text in drawn(dialect, TOOLS, added, is_one=is_one, hidden=() if dialect is not MISTRAL else added):
        pieces = read([text], reader)
        if pieces[0].kind == "reasoning":
            del pieces[0]
        num_read += 1
        counts.add(len(pieces) // 2)
        assert [piece.kind for piece in pieces] == ["call", "arguments"] * (len(pieces) // 2) and pieces
        for name, arguments in zip(pieces[::2], pieces[1::2], strict=True):
            assert name.value in ("f", "g-2")
            assert isinstance(json.loads(arguments.value).get("a", 0), int) or name.value != "f"
    assert num_read > 3
    assert not is_one or counts == {1}


@pytest.mark.parametrize("dialect", JSON_DIALECTS.values(), ids=JSON_DIALECTS)
def test_json_says_any_name(dialect: Dialect) -> None:
    for text in drawn(dialect, [{"name": 'g "quoted"'}]):
        assert read([text], dialect)[0] == ("call", 'g "quoted"')


@pytest.mark.parametrize("dialect", JSON_DIALECTS.values(), ids=JSON_DIALECTS)
def test_of_whose_arguments_nothing_is_said_has_none(dialect: Dialect) -> None:
    for text in drawn(dialect, [{"name": "g"}]):
        assert all(json.loads(piece.value) == {} for piece in read([text], dialect) if piece.kind == "arguments")


ODD: list[Any] = [5, "x", None, [], [[1]], {}, {"a": 5}, {"a": []}, {"a": None}, [{"type": 5}], ["a", 5], [{}], True]


@pytest.mark.parametrize("dialect", CHOICES, ids=[dialect.name for dialect in CHOICES])
@pytest.mark.parametrize("key", ["properties", "required", "type", "enum", "anyOf", "$defs", "additionalProperties"])
def test_what_is_no_schema_breaks_nothing(dialect: Dialect, key: str) -> None:
    """Its grammar is made, for the compiler to refuse, or is refused in words."""
    for odd, is_strict in itertools.product(ODD, [True, False]):
        for schema in ({key: odd}, {"properties": {"a": {key: odd, "minLength": odd}}},
                       {"properties": {"a": odd}, "required": ["a"]}, {"properties": {"a": {"anyOf": [{key: odd}]}}}):
            tool = {"name": "f", "parameters": schema, "strict": is_strict}
            dialect.typed_arguments([tool])
            with contextlib.suppress(InvalidGrammar):
                dialect.grammar([tool], is_one=True, added_id=lambda _: None)


def test_references_of_references_are_followed_or_refused() -> None:
    """Of a strict tool, however many: none is nested, and all of it is looked at."""
    defs = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]} for i in range(3000)}
    tool = {"name": "f", "strict": True, "parameters": {"type": "object", "$defs": defs, "$ref": "#/$defs/a0"}}
    with pytest.raises(InvalidGrammar, match="too much work"):
        HERMES.grammar([tool], is_one=True, added_id=lambda _: None)


@pytest.mark.parametrize("dialect", CHOICES, ids=[dialect.name for dialect in CHOICES])
def test_a_strict_tool_whose_bounds_would_not_be_kept_is_refused(dialect: Dialect) -> None:
    share = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": share}}}
    assert dialect.grammar([tool], is_one=True, added_id=lambda _: None)
    with pytest.raises(InvalidGrammar, match="bounds less than 1 apart"):
        dialect.grammar([tool | {"strict": True}], is_one=True, added_id=lambda _: None)


def test_the_end_of_an_argument_in_its_own_string_is_no_end() -> None:
    """Of JSON; what begins as none is read up to the first end."""
    said = '<tool_call>\n<function=f>\n<parameter=a>\n%s\n</parameter>\n</function>\n</tool_call>'
    typed: Any = SimpleNamespace(reader=lambda: QWEN_CODER.reader_of(["f.a"]))
    for value in ('["</parameter>"]', ' \n ["x</parameter>\\n</function>", {"b": "\\"</parameter>"}]',
                  '"</parameter>"', "5"):
        text = said % value
        for pieces in ([text], list(text)):
            found = read(pieces, typed)
            assert [piece.kind for piece in found] == ["call", "arguments"]
            assert json.loads(found[1].value) == {"a": json.loads(value)}
    assert json.loads(read([said % "it's 5\" of"], typed)[1].value) == {"a": "it's 5\" of"}


@pytest.mark.parametrize(("tool", "right", "wrong"), [
    ({"name": "f", "strict": True}, "[f()]", "[f(x=1)]"),
    ({"name": "f", "strict": True, "parameters": {"type": "object", "additionalProperties": {"type": "integer"}}},
     "[f(x=1)]", '[f(x="no")]'),
    ({"name": "f", "parameters": {}}, '[f(x="any")]', "[g()]")], ids=["nothing", "whole numbers", "anything"])
def test_of_python_too_a_tool_takes_what_it_says(tool: dict[str, Any], right: str, wrong: str) -> None:
    matcher = GRAMMARS.matcher(PYTHONIC.grammar([tool], is_one=True, added_id=lambda _: None))
    for text, is_right in ((right, True), (wrong, False)):
        ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        copy = matcher.deep_copy()
        assert (copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()) == is_right


@given(texts=st.lists(st.sampled_from(['"', "\\", "\n", "\t", "a", "{", "\\n", '\\"', "\x01"]), max_size=12),
       cuts=st.sets(st.integers(0, 20), max_size=4))
def test_control_characters_are_escaped_in_strings_alone(texts: list[str], cuts: set[int]) -> None:
    """Wherever the text is cut; what is JSON but for them becomes JSON with the same value."""
    text = '["' + "".join(texts) + '",\n""]'
    said, places = Strings(), [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    told = "".join(said.escaped(text[begin:end]) for begin, end in itertools.pairwise(places))
    assert told == Strings().escaped(text)
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return
    assert json.loads(told) == value


def test_arguments_are_what_the_model_wrote() -> None:
    assert json.loads(read([CALL], HERMES)[1].value) == {"a": '}"<tool_call>', "b": [1, {"c": "\\"}]}


async def job_of(template: str, **fields: Any) -> tuple[Job, Header]:
    """What a model of this template is asked, with a tool that it may call."""
    card = replace(byte_card("model"), chat_templates={"default": template})
    served: Any = SimpleNamespace(card=card, tokenizer=ChatTokenizer(card))
    asked = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9,
             "tools": [{"type": "function", "function": {"name": "f"}}]}
    order = Order(parse(json.dumps(asked | fields).encode(), 9), "tenant", 99)
    return await make_job(order, served, "id", pod_id="pod", settings=Settings(), retain_s=9)


BAD: list[Any] = [{"pattern": r"\bx"}, {"pattern": "^(?!x)"}, {"pattern": "(a)\\1"}, {"$ref": "https://x/y"},
                  {"$ref": "#/none"}, {"type": "any"}, {"type": "object", "required": "a"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
async def test_what_cannot_be_enforced_of_a_tool_is_left_out(bad: dict[str, Any]) -> None:
    """Its shape and the other tools are kept as they are; of a strict one the request is refused, and it is named."""
    good = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"],
            "additionalProperties": False}
    parameters = {"type": "object", "properties": {"e": bad, "s": {"type": "boolean"}}, "required": ["s"]}
    functions: list[dict[str, Any]] = [{"name": "good", "parameters": good}, {"name": "bad", "parameters": parameters}]
    template = "{{ messages[0].content }}{# <tool_call></tool_call> #}"
    tools = [{"type": "function", "function": each} for each in functions]
    grammar = (await job_of(template, tools=tools, tool_choice="required"))[0].sampling.grammar
    grammars = Grammars(byte_card("m").tokenizer_json, 258, [257])
    for text, is_right in (('good", "arguments": {"n": 5}', True), ('good", "arguments": {"n": 50}', False),
                           ('bad", "arguments": {"s": true}', True), ('bad", "arguments": {"s": 5}', False)):
        ids = list(f'<tool_call>\n{{"name": "{text}}}\n</tool_call>'.encode())
        assert (grammars.matcher(grammar).try_consume_tokens(ids) == len(ids)) == is_right, text
    functions[1]["strict"] = True
    with pytest.raises(InvalidGrammar) as refused:
        await job_of(template, tools=tools, tool_choice="required")
    assert refused.value.param == "tools[1].function"


FORM: dict[str, Any] = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(("dialect", "template"), [
    (LLAMA, '{{ messages[0].content }}{# ipython "parameters" #}'),
    (PYTHONIC, "{{ messages[0].content }}{# func_name1( #}"),
    (MISTRAL, "{{ messages[0].content }}{# [AVAILABLE_TOOLS][TOOL_CALLS] #}")], ids=["llama", "pythonic", "mistral"])
async def test_where_only_its_beginning_tells_a_call_a_form_is_the_form(dialect: Dialect, template: str) -> None:
    """And nothing in it is read as a call; one that must come is one all the same."""
    free, formed = await job_of(template), await job_of(template, **FORM)
    assert free[1].tool_dialect == dialect.name and not free[0].sampling.grammar
    assert formed[1].tool_dialect == "" and formed[0].sampling.grammar == of_schema({"type": "object"})
    required = await job_of(template, **FORM, tool_choice="required")
    assert required[1].tool_dialect == dialect.name
    assert required[0].sampling.grammar == dialect.grammar([{"name": "f"}], is_one=False, added_id=lambda _: None)


async def test_where_a_marker_tells_a_call_an_answer_is_the_form_or_calls() -> None:
    job, header = await job_of("{{ messages[0].content }}{# <tool_call></tool_call> #}", **FORM)
    assert header.tool_dialect == "hermes"
    for text, is_right in (('{"a":1}', True), ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', True),
                           ("so", False)):
        matcher = GRAMMARS.matcher(job.sampling.grammar)
        ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == is_right
