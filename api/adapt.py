"""Messages as a model's chat template expects them.

Templates accept different things of earlier calls, and of the order of messages. What one accepts is found once, by
rendering conversations. It knows templates and messages, nothing of dialects.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby, product
from typing import Any, Literal, NamedTuple

from api.wire.request import Message
from shared.errors import TemplateRefused
from shared.template import ChatTemplate

MAX_FORMS = 64                                          # templates whose form is known
SHORT_ID = re.compile("[a-zA-Z0-9]{9}")                 # the only ids of calls that Mistral's templates accept
SPECIAL_TOKENS = {f"{name}_token": "" for name in ("bos", "eos", "unk", "pad")}
OFFERED = {"type": "function", "function": {"name": "offered", "description": "", "parameters": {
    "type": "object", "properties": {"given": {"type": "integer", "description": ""}}}}}
ASKED, AGAIN = ({"role": "user", "content": words} for words in ("asked", "wondered"))
SAID = {"role": "assistant", "content": "said"}
INSTRUCTIONS = ("system", "developer")
NAMES = ("called_first", "called_second")
SILENT: tuple[dict[str, str | None], ...] = ({}, {"content": None}, {"content": ""})

Messages = list[dict[str, Any]]


class TurnOrder(NamedTuple):
    """Where a template accepts instructions, and whether it accepts two turns of a user in a row."""

    instructions: Literal["anywhere", "first", "of the user"] = "anywhere"
    joins_users: bool = False

    def apply(self, messages: Messages) -> Messages:
        told = [message for message in messages if message["role"] in INSTRUCTIONS]
        if told and self.instructions != "anywhere":
            first = told[0] | {"content": _text(told)} | ({"role": "user"} if self.instructions != "first" else {})
            messages = [first, *(message for message in messages if message["role"] not in INSTRUCTIONS)]
        return list(_without_pairs(messages)) if self.joins_users else messages


class Form(NamedTuple):
    """What a template accepts of an assistant's turn with calls."""

    is_one_by_one: bool = False                         # one call per turn: each comes with its result then
    has_short_ids: bool = False
    has_text_arguments: bool = False                    # JSON as text, which the template does not encode itself
    silent: int = 0                                     # index in SILENT: what stands for content where there is none
    joins_thoughts: bool = False                        # a thought and text cannot stand beside each other

    def apply(self, messages: Messages) -> Messages:
        return [self._changed(message) for message in (_one_by_one(messages) if self.is_one_by_one else messages)]

    def _changed(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.has_short_ids and message["role"] == "tool":
            message = message | {"tool_call_id": _short(message.get("tool_call_id"))}
        if "tool_calls" not in message:
            return message
        if self.joins_thoughts and "content" in message and "thinking" in message:
            text = f"{message['thinking']}\n\n{message['content']}"
            message = {name: value for name, value in message.items() if name != "content"} | {
                "thinking": text, "reasoning_content": text}
        return SILENT[self.silent] | message | {"tool_calls": [self._call(call) for call in message["tool_calls"]]}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function, call_id = call["function"], call["id"]
        arguments = function["arguments"]
        if self.has_text_arguments and not isinstance(arguments, str):
            function = function | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        return call | {"id": _short(call_id) if self.has_short_ids else call_id, "function": function}


def adapted(said: Sequence[Message], template: ChatTemplate | None) -> Messages:
    """Most templates have no developer role: its messages become system ones, as OpenAI does it too."""
    messages = [message.for_template() for message in said]
    if template is None:
        return messages
    if "developer" not in template.source:
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    messages = turn_order_of(template).apply(messages)
    return form_of(template).apply(messages) if any("tool_calls" in message for message in messages) else messages


@lru_cache(MAX_FORMS)
def turn_order_of(template: ChatTemplate) -> TurnOrder:
    """The first order in which the template shows all that is said; the usual one if there is none."""
    early, next_, late = ({"role": "system", "content": f"told_{when}"} for when in ("early", "next", "late"))

    def shows(*messages: dict[str, Any]) -> bool:
        text = _rendered(template, list(messages), tools=None)
        return text is not None and all(message["content"] in text for message in messages)

    if not shows(ASKED):
        return TurnOrder()
    joins_users = not shows(ASKED, AGAIN)
    if shows(early, next_, ASKED, SAID, AGAIN, late):
        return TurnOrder("anywhere", joins_users)
    return TurnOrder("first" if shows(early, ASKED) else "of the user", joins_users)


@lru_cache(MAX_FORMS)
def form_of(template: ChatTemplate) -> Form:
    """The first form in which the template shows all of a conversation with calls; that of transformers' own
    documentation if there is none."""
    num_nones = (_rendered(template, [ASKED]) or "").count("None")

    def shows(form: Form) -> bool:
        text = _rendered(template, form.apply(_trial()))
        return (text is not None and all(name in text for name in (*NAMES, "argument_1", "result_2"))
                and not re.search(r"""['\\]["']?argument_1""", text) and text.count("None") <= num_nones)

    no_yes = (False, True)
    forms = (Form(*choice) for choice in product(no_yes, no_yes, no_yes, range(len(SILENT))))
    form = next(filter(shows, forms), Form())
    [_, turn, *results] = _trial()
    beside = [ASKED, turn | {"content": "said", "thinking": "thought", "reasoning_content": "thought"}, *results]
    return form._replace(joins_thoughts=_rendered(template, form.apply(beside)) is None)


def _trial() -> Messages:
    calls = [{"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": {"argument_1": 7}}}
             for name in NAMES]
    return [ASKED, {"role": "assistant", "tool_calls": calls},
            *({"role": "tool", "tool_call_id": f"call_{name}", "content": f"result_{number}"}
              for number, name in enumerate(NAMES, 1))]


def _rendered(template: ChatTemplate, messages: Messages, tools: Sequence[dict[str, Any]] | None = (OFFERED,)
              ) -> str | None:
    try:
        return template.render(messages, tools=tools, special_tokens=SPECIAL_TOKENS)
    except TemplateRefused:
        return None


def _without_pairs(messages: Messages) -> Iterator[dict[str, Any]]:
    """What a user says in several turns in a row as one."""
    for is_user, same in groupby(messages, lambda message: message["role"] == "user"):
        first, *more = same
        yield from [first | {"content": _text([first, *more])}] if is_user and more else [first, *more]


def _text(messages: Messages) -> str:
    return "\n\n".join(filter(None, (message.get("content") for message in messages)))


def _one_by_one(messages: Messages) -> Iterator[dict[str, Any]]:
    """Each call in a turn of its own, followed by its results."""
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        results = list[dict[str, Any]]()
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        for turn in ({"role": "assistant", "tool_calls": [call]} for call in calls):
            yield message | turn
            message = {}                                # what is said beside the calls comes once
            call_id = turn["tool_calls"][0]["id"]
            yield from (result for result in results if result.get("tool_call_id") == call_id)
        known = {call["id"] for call in calls}
        yield from (result for result in results if result.get("tool_call_id") not in known)


def _short(call_id: str | None) -> str:
    if call_id is not None and SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256((call_id or "").encode("utf-8", "surrogatepass")).hexdigest()[:9]
