"""The objects of Anthropic's messages, as /docs describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from api.wire.objects import ID, KIND, Asked, Assistant


class SaidText(TypedDict):
    type: Annotated[Literal["text"], KIND]
    text: Annotated[str, Field(description="what is said")]


class SaidThinking(TypedDict):
    type: Annotated[Literal["thinking"], KIND]
    thinking: Annotated[str, Field(description="what was thought")]
    signature: Annotated[str, Field(description="of the thought: a word that means nothing")]


class SaidToolUse(TypedDict):
    type: Annotated[Literal["tool_use"], KIND]
    id: Annotated[str, Field(description="by which a tool_result answers it")]
    name: Annotated[str, Field(description="of the tool that is called")]
    input: Annotated[dict[str, Any], Field(description="what it is given; nothing, where the answer was cut")]


class ThinkingTokens(TypedDict):
    thinking_tokens: Annotated[int, Field(description="of thoughts")]


class MessageUsage(TypedDict):
    input_tokens: Annotated[int, Field(description="of the prompt, but for those that were found computed")]
    cache_creation_input_tokens: Annotated[int, Field(description="0, always")]
    cache_read_input_tokens: Annotated[int, Field(description="of the prompt, found computed")]
    output_tokens: Annotated[int, Field(description="of all blocks, what ended them included")]
    output_tokens_details: Annotated[ThinkingTokens, Field(description="some of output_tokens")]


class MessageObject(TypedDict):
    id: ID
    type: Annotated[Literal["message"], KIND]
    role: Assistant
    model: Asked
    content: Annotated[list[SaidText | SaidThinking | SaidToolUse], Field(description="blocks, in their order")]
    stop_reason: Annotated[Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None,
                           Field(description="why it ended; null: it has only begun")]
    stop_sequence: Annotated[str | None, Field(description="of stop_sequences, the one that ended it")]
    usage: Annotated[MessageUsage, Field(description="how many tokens there were")]


class InputTokens(TypedDict):
    input_tokens: Annotated[int, Field(description="of the whole prompt")]


MESSAGE_OBJECTS: tuple[Any, ...] = (MessageObject, InputTokens)
