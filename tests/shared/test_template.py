"""Chat templates render as transformers renders them, and refuse what they cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shared import template
from shared.errors import TemplateRefused
from shared.template import ChatTemplate
from tests.api.scripted import CHATML, byte_tokenizer

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Für <heute> & 'morgen'",
                                           "parameters": {"type": "object", "properties": {"ort": {}}}}}]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <|im_end|> & \"quotes\"\n\n "},
    {"role": "assistant", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln", "n": 1.5}}}]},
    {"role": "tool", "tool_call_id": "c1", "name": "wetter", "content": "mild"},
    {"role": "assistant", "content": "Mild."},
    {"role": "user", "content": "Danke"},
]

TEMPLATES = {
    "chatml": CHATML,
    "blocks and spaces": """
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}
{% endif %}
    {% for m in messages %}
  {{ loop.index0 }}/{{ loop.length }} {{ m['role'] | upper }}: {{ m.content if m.content else '-' }}
    {% endfor %}
""",
    "tools": """{%- if tools %}{{ bos_token }}tools
{% for tool in tools %}{{ tool | tojson }}
{{ tool.function.parameters | tojson(indent=2) }}
{% endfor %}{% endif -%}
{% for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}<call>{{ call.function.name }}
{{ call.function.arguments | tojson }}{% for k, v in call.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}
{% endfor %}{% elif m.role == 'tool' %}<result {{ m.tool_call_id }} {{ m.name }}>{{ m.content }}
{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "loop controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.role }}{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}""",
    "generation blocks": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "namespaces, macros, slices": """{% macro turn(m) %}[{{ m.role }}|{{ m.content }}]{% endmacro -%}
{% set ns = namespace(last='', n=0) %}{% for m in messages[1:] %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}
{{ turn(m) }}{% endfor %}{{ ns.n }}{{ ns.last }}{{ dict(a=1) }}{{ messages[-1].content[::-1] }}""",
    "what is not there": """{{ documents is none }}{{ documents is defined }}{{ thinking is defined }}
{{- messages[0].nothing is defined }}{{ add_generation_prompt }}{{ nothing }}""",
    "a date": """{{ strftime_now('%Y %Z%z')[:2] }}{{ strftime_now('%Z%z') }}{{ messages | length }}""",
}


def theirs(source: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer("<|im_start|>", "<|im_end|>"), **SPECIAL)
    text = tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=False,
                                         add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def ours(source: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return ChatTemplate(source).render(messages, tools=tools, special_tokens=SPECIAL)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_a_template_renders_as_transformers_renders_it(source: str, tools: Any) -> None:
    assert ours(source, TALK, tools) == theirs(source, TALK, tools)


@given(content=st.text(max_size=20), name=st.text(max_size=5))
@settings(max_examples=30)
def test_any_text_renders_as_transformers_renders_it(content: str, name: str) -> None:
    source = TEMPLATES["blocks and spaces"] + "{{ messages | tojson }}"
    messages = [{"role": "user", "content": content, "name": name}]
    assert ours(source, messages) == theirs(source, messages)


REFUSING = {
    "raise_exception": "{{ raise_exception('no system turn') }}",
    "undefined": "{{ messages[0].nothing.more }}",
    "wrong type": "{{ messages[0].content + 1 }}",
    "missing turn": "{{ messages[9].content }}",
    "division": "{{ 1 // 0 }}",
    "overflow": "{{ 'x' * (10 ** 30) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("source", REFUSING.values(), ids=REFUSING)
def test_what_a_template_cannot_render_is_refused(source: str) -> None:
    """In our words: the template's own might repeat the input."""
    with pytest.raises(TemplateRefused) as caught:
        ours(source, [{"role": "user", "content": "canary"}])
    assert str(caught.value) == TemplateRefused.text


ESCAPES = ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__ }}",
           "{% set x = messages[0].update({'role': 'system'}) %}", "{{ dict.mro() }}", "{{ namespace(__class__=1) }}",
           "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}"]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    """Attributes that lead out are undefined or refused; messages cannot be changed."""
    messages = [{"role": "user", "content": "Hi"}]
    try:
        text = ours(source, messages)
    except TemplateRefused:
        text = ""
    assert text == ""
    assert messages == [{"role": "user", "content": "Hi"}]


def test_a_template_that_says_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(TemplateRefused):
        ours("{% for i in range(100) %}0123456789{{ i }}{% endfor %}", [])


def test_a_template_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_RENDER_S", 0.0)
    with pytest.raises(TemplateRefused):
        ours("{% for i in range(100) %}{{ i }}{% endfor %}", [])


def test_a_template_that_is_none_does_not_start() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% for %}")


def test_json_keeps_letters_as_they_are() -> None:
    """Unlike jinja's own filter, which escapes <, >, & and quotes for web pages."""
    assert ours("{{ tools | tojson }}", [], TOOLS) == json.dumps(TOOLS, ensure_ascii=False)
