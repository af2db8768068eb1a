"""The items of a conversation in the language of responses, and the messages of a chat that they stand for.

An assistant's turn is one message of a chat, and several items here: its reasoning, its text and its calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from api.wire.request import MAX_NESTING, is_deep
from shared.errors import InvalidValue, UnsupportedContent

TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
FOREIGN = ("input_image", "input_file", "input_audio", "computer_screenshot")
ITEM_ID = re.compile(r"(?:msg|rs|fc|item)_[0-9]{1,6}_(resp_.+)")
ROLES = ("user", "system", "developer", "assistant")


def item_id(prefix: str, number: int, response_id: str) -> str:
    """It says where the item is: a client may refer to it."""
    return f"{prefix}_{number}_{response_id}"


def response_of(item_id: str) -> str | None:
    """The response that the id of an item names."""
    match = ITEM_ID.fullmatch(item_id)
    return match[1] if match else None


def is_reference(item: Mapping[str, Any]) -> bool:
    """Whether it stands for an item of a stored response; its type may be left out."""
    return item.get("type") == "item_reference" or (item.get("type") is None and item.keys() - {"type"} == {"id"})


def _known(item: dict[str, Any]) -> dict[str, Any]:
    if is_reference(item):
        if not isinstance(item.get("id"), str):
            raise InvalidValue("An item_reference has the id of an item.", param="input")
        return item
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in READERS:
        raise UnsupportedContent("Items are messages, reasoning, function calls and their outputs.", param="input")
    if is_deep(item):
        raise InvalidValue(f"An item is nested at most {MAX_NESTING} levels deep.", param="input")
    READERS[kind](item)
    return item


Item = Annotated[dict[str, Any], AfterValidator(_known)]


def chat_messages(items: Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """Raises InvalidValue when an item lacks a field of its type."""
    messages: list[dict[str, Any]] = [{"role": "developer", "content": instructions}] if instructions else []
    for item in items:
        said = READERS[item.get("type", "message")](item)
        if said["role"] == "assistant" and messages and _goes_on(messages[-1], said):
            calls = messages[-1].get("tool_calls", []) + said.get("tool_calls", [])
            messages[-1] |= said | ({"tool_calls": calls} if calls else {})
        else:
            messages.append(said)
    return [{"content": None if "tool_calls" in message else ""} | message for message in messages]


def listed(items: Sequence[Mapping[str, Any]], response_id: str) -> list[dict[str, Any]]:
    """As a list shows them: each with an id of its own and a status, and a message's text in parts."""
    shown, ids = list[dict[str, Any]](), set[str]()
    for number, item in enumerate(items):
        own = item.get("id")
        if not isinstance(own, str) or not own or own in ids:
            own = item_id("item", number, response_id)
        ids.add(own)
        kind = item.get("type", "message")
        more: dict[str, Any] = {} if kind == "reasoning" else {"status": item.get("status") or "completed"}
        if kind == "message":
            said = "output_text" if item["role"] == "assistant" else "input_text"
            parts = [{"type": said, "text": item["content"]}] if isinstance(item["content"], str) else item["content"]
            more["content"] = [({"annotations": []} if part["type"] == "output_text" else {}) | part for part in parts]
        shown.append({"type": kind} | dict(item) | more | {"id": own})
    return shown


def _goes_on(turn: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether both belong to one turn of the assistant: reasoning before text, text before calls."""
    if turn["role"] != "assistant":
        return False
    order = ("reasoning_content", "content", "tool_calls")
    last, [first] = max(order.index(name) for name in order if name in turn), [n for n in order if n in said]
    return order.index(first) > last or first == "tool_calls"


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    if item.get("role") not in ROLES:
        raise InvalidValue("A message's role is user, system, developer or assistant.", param="input")
    return {"role": item["role"], "content": _text(item.get("content"))}


def _reasoning(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": _text(item.get("content") or item.get("summary") or "")}


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: item.get(name) for name in ("call_id", "name", "arguments")}
    if not all(isinstance(value, str) for value in names.values()):
        raise InvalidValue("A function_call has a call_id, a name and arguments.", param="input")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}


def _output(item: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(item.get("call_id"), str):
        raise InvalidValue("A function_call_output has the call_id of its function_call.", param="input")
    return {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item.get("output"))}


READERS = {"message": _message, "reasoning": _reasoning, "function_call": _call, "function_call_output": _output}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidValue("Content is a text, or a list of parts.", param="input")
    return "\n".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in FOREIGN:
        raise UnsupportedContent(param="input")
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in TEXTS or not isinstance(text, str):
        raise InvalidValue("A part is {'type': 'input_text', 'text': string}.", param="input")
    return text
