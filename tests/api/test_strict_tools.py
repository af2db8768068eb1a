"""Strict tools where nothing must be called: from the door to what a client reads.

The model here is set on what it must not say: calls of other tools, or with other arguments, behind blanks, thoughts
and markers, which it also spells. What may not come next gives way to something else at random.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer as FastTokenizer

from api.jobs import Order, make_job
from api.wire.dialects import (
    DEEPSEEK,
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    PYTHONIC,
    QWEN_CODER,
    Dialect,
    deepseek,
    harmony,
    mistral,
    pythonic,
)
from api.wire.parts import Parts, Said
from api.wire.request import ChatRequest
from shared.grammar import Grammars
from shared.job import Delta, Header, Job
from shared.settings import Settings
from shared.tokenizer import Tokenizer
from tests.api.pieces import TOOLS
from tests.api.scripted import byte_card, byte_tokenizer
from worker.output.text import TextStream

EOS = 257
MAX_DRAWN = 150
ANYTHING = f"start: <[^{EOS}]>*"
THINK, THOUGHT = ("<think>", "</think>"), "<think>Hm</think>\n"
TAG = "<|python_tag|>"
START, HEAD, FINAL = "<|start|>assistant", "<|channel|>commentary to=functions.", "<|channel|>final<|message|>"
ANALYSIS, PREAMBLE = "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"
JSON = "<|constrain|>json<|message|>"
SCHEMAS = {"f": TOOLS[0]["parameters"], "g_2": {}}

BLANKS = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
WORDS = ["Hi", "é", " ", "\n", "\x1f", "\N{NO-BREAK SPACE}", "{", "[", "]", '"', ";", "\\", *THINK]
OBJECTS = ['{"name": "f", "parameters": {"a": 1}}', '{"name": "g_2", "parameters": {}}; ', '{"name": "Bob", "age": 3}',
           '{\n "name": "f",\n "parameters": {"b": 2}}', '\x1f{"name":"no\\"","arguments":{}}', TAG,
           '; {"name": "no", "parameters": {}}', '{"name": "\\u0066", "parameters": {}}',
           '{"type": "function", "name": "f", "parameters": {"b": 2}}', '{"parameters": {"b": 2}, "name": "f"}']
ARRAYS = ['[{"name": "f", "arguments": {"a": 1}}]', '[{"name": "no", "arguments": {}}',
          ', {"name": "no", "arguments": {}}]', '[ {"name":"f","arguments":{"b": 2}}]',
          '[{"id": "x", "name": "f", "arguments": {"b": 2}}]', '[{"arguments": {"b": 2}, "name": "f"}]']
LISTS = ["[f(a=1)]", "[f(a=1), no()]", "[no(x=1)]", "[ f (b=2)]", "[\x1fno\n(", "[é()]", "[1, 2]", "[x](y)",
         "[f(a='x')]", "[g_2()]", *pythonic.BEGINS, *pythonic.ENDS]
MESSAGES = [f'{HEAD}f {JSON}{{"a": 1}}', f'{HEAD}no {JSON}{{"a": 1}}', f'{HEAD}f<|message|>{{"b": 2}}', ANALYSIS, FINAL,
            PREAMBLE, f"<|end|>{START} to=functions.no{PREAMBLE}{{}}", *harmony.MARKERS, f"<|end|>{START}"]
TAGS = ("<tool_call>", "</tool_call>")
TAGGED = [f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
          for name, arguments in (("f", '{"a": 1}'), ("no", '{"a": 1}'), ("f", '{"b": 2}'))]
ELEMENTS = [f"<tool_call>\n<function={name}>\n<parameter={key}>\n1\n</parameter>\n</function>\n</tool_call>"
            for name, key in (("f", "a"), ("no", "a"), ("f", "b"))]
ELEMENTS.append(ELEMENTS[1].removeprefix("<tool_call>\n"))
SEPARATED = [f'{deepseek.CALLS}{deepseek.CALL}{name}{deepseek.SEP}{arguments}{deepseek.END_CALL}{deepseek.END_CALLS}'
             for name, arguments in (("f", '{"a": 1}'), ("no", '{"a": 1}'), ("f", '{"b": 2}'))]
SEPARATED.append(SEPARATED[1].removeprefix(deepseek.CALLS))
NAMED = [f'{mistral.CALLS}{name}{mistral.ARGS}{arguments}'
         for name, arguments in (("f", '{"a": 1}'), ("no", '{"a": 1}'), ("f", '{"b": 2}'))]


@dataclass(frozen=True)
class Case:
    dialect: Dialect
    lures: list[str]
    added: tuple[str, ...] = ()             # tokens of their own
    thinks: bool = False

    @cached_property
    def fast(self) -> FastTokenizer:
        return byte_tokenizer("<|im_start|>", "<|im_end|>", "<|secret|>", *self.added)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.fast.to_str(), self.fast.get_vocab_size(), [EOS])

    def asked(self, **fields: Any) -> tuple[Job, Header]:
        tools = [{"type": "function", "function": TOOLS[0]}, {"type": "function", "function": {"name": "g_2"}}]
        template = "{{ messages[0].content }}" + ("{# </think> #}" if self.thinks else "")
        card = replace(byte_card("m", template), tokenizer_json=self.fast.to_str(),
                       vocab_size=self.fast.get_vocab_size())
        request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}],
                                              "tools": tools, "seed": 1} | fields)
        served: Any = SimpleNamespace(card=card, tokenizer=Tokenizer(card))
        return asyncio.run(make_job(Order(request, "tenant", 100), served, "c", pod_id="pod", retain_s=1,
                                    settings=Settings(tool_dialect=self.dialect.name)))

    def drawn(self, grammar: str, num: int) -> Iterator[tuple[list[int], bool]]:
        """Answers, and whether each has come to its end."""
        texts = [*self.lures, *WORDS, *[THOUGHT] * 9 * self.thinks]
        wanted = [[EOS], [EOS + 1], *(self.fast.encode(text).ids for text in texts),
                  *(list(text.encode()) for text in self.lures)]
        for seed in range(num):
            draw, matcher, ids, plan = random.Random(seed), self.grammars.matcher(grammar), list[int](), list[int]()
            while not matcher.is_stopped() and len(ids) < MAX_DRAWN:
                plan = plan or list(draw.choice(wanted))
                bits = matcher.compute_bitmask()
                if not bits[plan[0] // 8] >> plan[0] % 8 & 1:
                    allowed = [i for i in range(self.fast.get_vocab_size()) if bits[i // 8] >> i % 8 & 1]
                    plan = [draw.choice([i for i in allowed if not 126 < i < 256] or allowed)]
                ids.append(plan.pop(0))
                assert matcher.consume_token(ids[-1])
            yield ids, matcher.is_stopped()

    def read(self, ids: Sequence[int], job: Job, header: Header) -> Said:
        stream = TextStream(self.fast, shown=job.sampling.shown_token_ids)
        deltas = [Delta(0, (token_id,), stream.feed([token_id])) for token_id in ids]
        return Parts("c", header, 0).whole([*deltas, Delta(0, (), stream.finish(), "stop")])


CASES = {
    "llama": Case(LLAMA, OBJECTS), "llama with its tag": Case(LLAMA, OBJECTS, (TAG,)),
    "llama that thinks": Case(LLAMA, OBJECTS, THINK, thinks=True),
    "llama that spells its thoughts": Case(LLAMA, OBJECTS, thinks=True),
    "array": Case(MISTRAL, ARRAYS), "pythonic": Case(PYTHONIC, LISTS),
    "pythonic between markers": Case(PYTHONIC, LISTS, pythonic.BEGINS + pythonic.ENDS),
    "pythonic that thinks": Case(PYTHONIC, LISTS, (pythonic.BEGINS[1], pythonic.ENDS[1], *THINK), thinks=True),
    "hermes": Case(HERMES, TAGGED, TAGS), "hermes that thinks": Case(HERMES, TAGGED, (*TAGS, *THINK), thinks=True),
    "elements": Case(QWEN_CODER, ELEMENTS, TAGS), "deepseek": Case(DEEPSEEK, SEPARATED, deepseek.MARKERS),
    "mistral's tokens": Case(MISTRAL, NAMED, mistral.MARKERS),
    "harmony": Case(HARMONY, MESSAGES, harmony.MARKERS), "harmony that is spelled": Case(HARMONY, MESSAGES)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def is_right(said: Said, *, is_whole: bool) -> bool:
    """Every call is one of the tools', with arguments of its schema; those that were cut off may lack their end."""
    whole = said.calls if is_whole else said.calls[:-1]
    return all(call.name in SCHEMAS for call in said.calls) and all(
        jsonschema.Draft202012Validator(SCHEMAS[call.name]).is_valid(json.loads(call.arguments)) for call in whole)


@every_case
def test_calls_are_of_the_schema_alone(case: Case) -> None:
    """Text and calls, and both come to an end. The same model calls otherwise where it may say anything."""
    job, header = case.asked()
    answers = case.drawn(job.sampling.grammar or ANYTHING, 60)
    said = [(case.read(ids, job, header), has_ended) for ids, has_ended in answers]
    assert all(is_right(each, is_whole=has_ended) for each, has_ended in said)
    ended = [each for each, has_ended in said if has_ended]
    assert {bool(each.calls) for each in ended} == {True, False}
    assert any(each.text for each in ended)
    assert any(each.reasoning for each in ended) or not case.thinks
    free = case.drawn(ANYTHING, 20)
    assert not all(is_right(case.read(ids, job, header), is_whole=has_ended) for ids, has_ended in free)


def test_a_thought_of_harmony_calls_nothing_where_a_call_must_come() -> None:
    case = CASES["harmony"]
    job, header = case.asked(tool_choice="required")
    answers = case.drawn(job.sampling.grammar, 40)
    said = [(case.read(ids, job, header), has_ended) for ids, has_ended in answers]
    assert all(len(each.calls) <= 1 and is_right(each, is_whole=has_ended) for each, has_ended in said)
    assert any(each.calls and each.reasoning for each, _ in said)


@every_case
def test_one_call_is_all_where_one_is_asked_for(case: Case) -> None:
    job, header = case.asked(parallel_tool_calls=False)
    answers = case.drawn(job.sampling.grammar or ANYTHING, 15)
    counts = {len(case.read(ids, job, header).calls) for ids, _ in answers}
    assert counts <= {0, 1}


F, G = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g_2", "parameters": {}}'
FREE = [
    ("hermes", f"Hm, <tool_call or <tool_calls>. {TAGGED[0]} Done.", 1),
    ("hermes that thinks", f"{THOUGHT}{TAGGED[0]}", 1),
    ("elements", "<functions> of </tool_call", 0), ("deepseek", f"{SEPARATED[0]}Done.", 1),
    ("llama", '{"name": "Bob", "age": 3}', 0), ("llama", "{", 0), ("llama", f"So: {F}", 0), ("llama", "", 0),
    ("llama", f" {F}; {G}\nDone; bye.", 2), ("llama", '{\n\t"name":"f",\n\t"parameters":{"a":1}}', 1),
    ("llama with its tag", TAG + F, 1), ("llama with its tag", f"{TAG}print(1)", 0), ("llama with its tag", F, 1),
    ("llama that thinks", f"{THOUGHT}\n{F}", 1), ("llama that thinks", "\n<think></think>Yes", 0),
    ("llama that spells its thoughts", f"{THOUGHT}{F}", 1), ("llama that spells its thoughts", f"So {THOUGHT}{F}", 0),
    ("array", '[{"name": "f", "arguments": {"a": 1}}]\nDone.', 1), ("array", '{"name": "f"}', 0),
    ("pythonic", "[1, 2]", 0), ("pythonic", "[x](y)", 0), ("pythonic", "[ ] [no(x=1)]", 0),
    ("pythonic", "[\n f(a=1), g_2()] Done [no()].", 2), ("pythonic", "f(a=1) [g_2()]", 0),
    ("pythonic between markers", "I look.<|tool_call_start|>[f(a=1)]<|tool_call_end|>[no()]", 1),
    ("pythonic that thinks", f"{THOUGHT}[f(a=1)]", 1),
    ("harmony", f"{ANALYSIS}Hm<|end|>{START}{PREAMBLE}I look.<|end|>{START}{HEAD}f {JSON}{{\"a\": 1}}", 1),
    ("harmony", f"{ANALYSIS}<|end|>{START}{FINAL}So: <|start|", 0), ("harmony that is spelled", f"{FINAL}Yes", 0)]


@pytest.mark.parametrize(("name", "text", "num_calls"), FREE, ids=str)
def test_nothing_else_is_forbidden(name: str, text: str, num_calls: int) -> None:
    """JSON, lists and links, thoughts and words about a call."""
    case = CASES[name]
    job, header = case.asked()
    matcher, ids = case.grammars.matcher(job.sampling.grammar or ANYTHING), case.fast.encode(text).ids
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
    assert len(case.read(ids, job, header).calls) == num_calls


@pytest.mark.parametrize(("name", "text"), [("llama", '{_"name"_:_"no"_,_"parameters"_:'), ("pythonic", "[_no_("),
                                            ("llama", F.replace("}}", "}}_;")), ("array", "_[")])
def test_a_blank_is_what_python_takes_for_one(name: str, text: str) -> None:
    """No other one hides a call."""
    case = CASES[name]
    grammar = case.asked()[0].sampling.grammar or ANYTHING
    for blank in BLANKS:
        ids = list(text.replace("_", blank).encode())
        assert case.grammars.matcher(grammar).try_consume_tokens(ids) == len(ids) - (name != "array"), repr(blank)
