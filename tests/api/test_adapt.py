"""Conversations with calls reach templates that accept them in one form only, as those of many models do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.adapt import Form, TurnOrder, adapted, form_of, turn_order_of
from api.wire.request import Message
from shared.errors import TemplateRefused
from shared.template import ChatTemplate

ID = "call_0123456789abcdef01234567"
CHATML = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or () %}
{{- {"name": call.function.name, "arguments": call.function.arguments} | tojson }}{% endfor %}{% endfor %}"""
# Lines as DeepSeek's (V3.1; V3), Mistral's (v3), Llama's (3.1) and gpt-oss' templates have them.
TEXT = """{% for m in messages %}{% if m['role'] == 'assistant' and m['tool_calls'] is defined %}
{%- for tool in m['tool_calls'] %}{% if m['content'] is none %}
{{- '<call>' + tool['function']['name'] + '<sep>' + tool['function']['arguments'] }}{% else %}
{{- m['content'] + '<call>' + tool['function']['name'] + '<sep>' + tool['function']['arguments'] }}{% endif %}
{%- endfor %}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"""
NONE = """{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}
{%- for tool in m['tool_calls'] %}
{{- '<call>' + tool['function']['name'] + '<sep>' + tool['function']['arguments'] }}{% endfor %}
{%- else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"""
SHORT = """{% for m in messages %}{% if m['tool_calls'] is defined %}{% for call in m['tool_calls'] %}
{%- if call['id'] | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}{{ call | tojson }}{% endfor %}{% elif m['role'] == 'tool' %}
{%- if m['tool_call_id'] is not defined or m['tool_call_id'] | length != 9 %}{{ raise_exception('length 9!') }}
{%- endif %}{{ m['content'] }}<{{ m['tool_call_id'] }}>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"""
ONE = """{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}<call>
{{- m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}
{%- else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
THOUGHT = """{% for m in messages %}{% if 'tool_calls' in m %}{% set call = m.tool_calls[0].function %}
{%- if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{{- '<analysis>' + (m.content or m.thinking or '') + '<call>' + call.name + (call.arguments | tojson) }}
{%- else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
FORMS = {
    CHATML: Form(), TEXT: Form(has_text_arguments=True, silent=1), NONE: Form(has_text_arguments=True, silent=1),
    SHORT: Form(has_short_ids=True), ONE: Form(is_one_by_one=True),
    THOUGHT: Form(is_one_by_one=True, joins_thoughts=True)}


def talk(*calls: str, **assistant: Any) -> list[Message]:
    """Asks, calls, and tells the results, the last one first."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, **assistant, "tool_calls": [
            {"id": ID + name, "type": "function", "function": {"name": name, "arguments": json.dumps({"for": name})}}
            for name in calls]},
        *({"role": "tool", "tool_call_id": ID + name, "content": f"of {name}"} for name in reversed(calls))]
    return [Message.model_validate(message) for message in messages]


def rendered(source: str, said: list[Message]) -> str:
    template = ChatTemplate(source)
    return template.render(adapted(said, template), tools=None, special_tokens={})


@pytest.mark.parametrize("source", FORMS, ids=["chatml", "text", "none", "short", "one", "thought"])
def test_every_call_and_result_reaches_the_prompt(source: str) -> None:
    assert form_of(ChatTemplate(source)) == FORMS[source]
    text = rendered(source, talk("f", "g"))
    assert "None" not in text and "'for'" not in text
    assert all(text.count(each) == 1 for each in ('{"for": "f"}', '{"for": "g"}', "of f", "of g"))


def test_a_template_that_needs_text_gets_json() -> None:
    assert rendered(TEXT, talk("f")) == '<user>Hi<call>f<sep>{"for": "f"}<tool>of f'
    assert rendered(TEXT, talk("f", content="Well.")).startswith('<user>HiWell.<call>f<sep>{"for": "f"}')


def test_a_result_keeps_the_id_of_its_call() -> None:
    text = rendered(SHORT, talk("f", "g"))
    short = {name: text.split(f"of {name}<")[1].split(">")[0] for name in "fg"}
    assert len(set(short.values())) == 2
    assert all(json.dumps(short[name]) in text for name in "fg")
    theirs = [Message.model_validate(json.loads(each.model_dump_json().replace(f"{ID}f", "abcDEF123")))
              for each in talk("f")]
    assert rendered(SHORT, theirs).count("abcDEF123") == 2, "an id that the template accepts is kept"


def test_calls_that_must_come_alone_come_with_their_results() -> None:
    assert rendered(ONE, talk("f", "g")) == (
        '<user>Hi<call>f{"for": "f"}<tool>of f<call>g{"for": "g"}<tool>of g')
    assert rendered(THOUGHT, talk("f", "g", reasoning_content="Why?")) == (
        '<user>Hi<analysis>Why?<call>f{"for": "f"}<tool>of f<analysis><call>g{"for": "g"}<tool>of g')
    stray = Message.model_validate({"role": "tool", "tool_call_id": ID + "f", "content": "again"})
    assert rendered(ONE, [*talk("f", "g"), stray]).endswith("<tool>of f<tool>again<call>g" + '{"for": "g"}<tool>of g')


def test_a_thought_and_text_are_joined_where_only_one_may_be() -> None:
    assert rendered(THOUGHT, talk("f", content="Let me see.", reasoning="Why?")).startswith(
        "<user>Hi<analysis>Why?\n\nLet me see.<call>f")


def test_a_legacy_function_needs_no_id() -> None:
    said = [Message.model_validate(each) for each in (
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "42"})]
    assert rendered(SHORT, said).count("42<") == 1


def test_a_template_that_shows_no_calls_gets_the_usual_form() -> None:
    assert form_of(ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")) == Form()
    with pytest.raises(TemplateRefused):
        rendered("{{ raise_exception('never') }}", talk("f"))


# ── the order of messages ──

# Lines as Qwen's (2.5; 3.5), gpt-oss', Gemma's (3; 2) and Mistral's (v0.2) templates have them.
LINE = "{{ '<' + m['role'] + '>' + m['content'] }}"
ANYWHERE = "{% for m in messages %}" + LINE + "{% endfor %}"
FIRST = """{% for m in messages %}{% if m.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}{% endif %}""" + LINE + "{% endfor %}"
DROPPED = """{% if messages[0].role in ('system', 'developer') %}<instructions>{{ messages[0].content }}
{%- set messages = messages[1:] %}{% endif %}{% for m in messages if m.role in ('user', 'assistant') %}""" + (
    LINE + "{% endfor %}")
IN_TURNS = """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<' + m['role'] + '>' + m['content'] }}{% endfor %}"""
PREFIXED = """{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}
{%- set messages = messages[1:] %}{% endif %}""" + IN_TURNS
UNTOLD = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}""" + IN_TURNS
ORDERS = {
    ANYWHERE: TurnOrder(), FIRST: TurnOrder("first"), DROPPED: TurnOrder("first"), PREFIXED: TurnOrder("first", True),
    UNTOLD: TurnOrder("of the user", True)}


def spoken(*turns: tuple[str, str]) -> list[Message]:
    return [Message.model_validate({"role": role, "content": content}) for role, content in turns]


@pytest.mark.parametrize(("source", "expected"), [
    (ANYWHERE, "<system>a<system>b<user>c<user>d<assistant>e<user>f<system>g"),
    (FIRST, "<system>a\n\nb\n\ng<user>c<user>d<assistant>e<user>f"),
    (DROPPED, "<instructions>a\n\nb\n\ng<user>c<user>d<assistant>e<user>f"),
    (PREFIXED, "<system>a\n\nb\n\ng<user>c\n\nd<assistant>e<user>f"),
    (UNTOLD, "<user>a\n\nb\n\ng\n\nc\n\nd<assistant>e<user>f")],
    ids=["anywhere", "first", "dropped", "prefixed", "untold"])
def test_all_that_is_said_reaches_the_prompt(source: str, expected: str) -> None:
    """Instructions that come late too, as coding agents send them."""
    assert turn_order_of(ChatTemplate(source)) == ORDERS[source]
    assert rendered(source, spoken(("system", "a"), ("developer", "b"), ("user", "c"), ("user", "d"),
                                   ("assistant", "e"), ("user", "f"), ("system", "g"))) == expected


def test_what_a_template_accepts_is_left_as_it_is() -> None:
    said = spoken(("user", "a"), ("assistant", "b"), ("user", "c"))
    for source in (FIRST, PREFIXED, UNTOLD):
        assert rendered(source, said) == "<user>a<assistant>b<user>c"
    assert turn_order_of(ChatTemplate("{{ raise_exception('never') }}")) == TurnOrder()
    with pytest.raises(TemplateRefused):
        rendered(IN_TURNS, spoken(("assistant", "a"), ("user", "b")))
