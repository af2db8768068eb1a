"""Turns of a conversation as Anthropic's API has them: blocks, translated into messages of a chat.

A turn's texts are joined, and its reasoning too; tool results come before the user's text beside them. It knows
nothing of what is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from api.wire.body import Fields
from api.wire.request import MAX_NESTING, is_deep
from shared.errors import InvalidValue, UnsupportedContent

NO_TEXT = ("image", "document", "search_result", "container_upload")


class TextBlock(Fields):
    type: Literal["text"] = Field(description="text, always")
    text: str = Field(description="what is said")


class ThinkingBlock(Fields):
    type: Literal["thinking"] = Field(description="thinking, always")
    thinking: str = Field(description="what the assistant thought")


class RedactedThinkingBlock(Fields):
    """Encrypted: it cannot be read here."""

    type: Literal["redacted_thinking"] = Field(description="redacted_thinking, always")


class ToolUseBlock(Fields):
    type: Literal["tool_use"] = Field(description="tool_use, always")
    id: str = Field(description="by which a tool_result answers it")
    name: str = Field(min_length=1, max_length=256, description="of the tool that was called")
    input: dict[str, Any] = Field(description=f"what it was given, nested at most {MAX_NESTING} levels deep")

    @field_validator("input")
    @classmethod
    def _not_too_deep(cls, value: dict[str, Any]) -> dict[str, Any]:
        if is_deep(value):
            raise ValueError(f"it is nested at most {MAX_NESTING} levels deep")
        return value


class TextPiece(TypedDict):
    type: Annotated[Literal["text"], Field(description="text, always")]
    text: Annotated[str, Field(description="what is said")]


def joined(content: Any) -> Any:
    """Text blocks joined into one text."""
    return "\n".join(map(_text_of, content)) if isinstance(content, list) else content


def _text_of(block: Any) -> str:
    text = block.get("text") if _kind(block) == "text block" else None
    if not isinstance(text, str):
        raise ValueError("a block must be {'type': 'text', 'text': string}")
    return text


def _kind(block: Any) -> str:
    """A block's tag in the union below, unlike any field name. Raises UnsupportedContent if no chat can express it."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in NO_TEXT:
        raise UnsupportedContent(param="messages")
    if isinstance(kind, str) and (kind == "server_tool_use" or kind.endswith("_tool_result")):
        raise UnsupportedContent("Tools that a server runs by itself are not supported, nor what they have said.",
                                 param="messages")
    return f"{kind} block"


class ToolResultBlock(Fields):
    type: Literal["tool_result"] = Field(description="tool_result, always")
    tool_use_id: str = Field(description="of a tool_use before it")
    content: str | None = Field(None, description="what the tool has said: a text, or blocks of text; else nothing")
    is_error: bool | None = Field(None, description="true: the tool has failed")

    _joined = field_validator("content", mode="before", json_schema_input_type=str | list[TextPiece] | None)(joined)


Block = Annotated[
    Annotated[TextBlock, Tag("text block")] | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking block")] | Annotated[ToolUseBlock, Tag("tool_use block")]
    | Annotated[ToolResultBlock, Tag("tool_result block")],
    Discriminator(_kind, custom_error_type="block",
                  custom_error_message="the type of a block is text, thinking, tool_use or tool_result")]

BLOCKS = (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock, ToolResultBlock)
SAYS: dict[str, tuple[type[Fields], ...]] = {
    "system": (TextBlock,), "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock)}


class Turn(Fields):
    role: Literal["user", "assistant", "system"] = Field(description="who speaks")
    content: list[Block] = Field(description="a text, or blocks; a user's are text and tool_result, a system's text")

    @field_validator("content", mode="before", json_schema_input_type=str | list[Block])
    @classmethod
    def _blocks_of_text(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def _says_what_its_role_may(self) -> Turn:
        if not all(isinstance(block, SAYS[self.role]) for block in self.content):
            raise ValueError("a user says text and tool_result, an assistant text, thinking and tool_use, others text")
        return self


def require_calls(turns: Sequence[Turn]) -> None:
    """Every tool_result needs a tool_use before it. Raises InvalidValue."""
    called: set[str] = set()
    for number, turn in enumerate(turns):
        for block in turn.content:
            if isinstance(block, ToolUseBlock):
                called.add(block.id)
            elif isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                raise InvalidValue(f"messages[{number}]: a tool_result has the id of a tool_use before it.",
                                   param=f"messages[{number}]")


def messages(turns: Iterable[Turn]) -> Iterator[dict[str, Any]]:
    """The messages of a chat. Consecutive turns of the same role become one."""
    for role, same in groupby(turns, key=lambda turn: turn.role):
        yield from _told(role, [block for turn in same for block in turn.content])


def _told(role: str, blocks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """One turn as messages of a chat: tool results, then the text of the turn."""
    text = "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
    has_text = any(isinstance(block, TextBlock) for block in blocks)
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    yield from map(_result, results)
    if role == "assistant":
        calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
        yield given({"role": role, "content": text if has_text or not calls else None, "tool_calls": calls or None,
                     "reasoning_content": _thought(blocks) or None})
    elif has_text or not results:
        yield {"role": role, "content": text}


def _thought(blocks: Iterable[Any]) -> str:
    return "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))


def _call(block: ToolUseBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}


def _result(block: ToolResultBlock) -> dict[str, Any]:
    failed = "Error: " if block.is_error else ""        # a chat has no field for it
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": failed + (block.content or "")}


def given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
