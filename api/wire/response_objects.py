"""The objects of responses, as /docs describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from api.wire.objects import ID, KIND, Asked, Assistant, Seconds, TokenLogprob

Progress = Annotated[Literal["in_progress", "completed", "incomplete"], Field(description="how it stands")]


class OutputText(TypedDict):
    type: Annotated[Literal["output_text"], KIND]
    text: Annotated[str, Field(description="what is said")]
    annotations: Annotated[list[Any], Field(description="none, always")]
    logprobs: Annotated[list[TokenLogprob], Field(description="of each token; none: not asked for")]


class MessageItem(TypedDict):
    id: ID
    type: Annotated[Literal["message"], KIND]
    status: Progress
    role: Assistant
    content: Annotated[list[OutputText], Field(description="one")]


class ReasoningText(TypedDict):
    type: Annotated[Literal["reasoning_text"], KIND]
    text: Annotated[str, Field(description="what was thought")]


class ReasoningItem(TypedDict):
    id: ID
    type: Annotated[Literal["reasoning"], KIND]
    status: Progress
    summary: Annotated[list[Any], Field(description="none, always")]
    content: Annotated[list[ReasoningText], Field(description="one")]


class FunctionCallItem(TypedDict):
    id: ID
    type: Annotated[Literal["function_call"], KIND]
    status: Progress
    call_id: Annotated[str, Field(description="by which a function_call_output answers it")]
    name: Annotated[str, Field(description="of the function that is called")]
    arguments: Annotated[str, Field(description="JSON, unless the answer was cut")]


class InputTokensDetails(TypedDict):
    cached_tokens: Annotated[int, Field(description="found computed")]
    cache_write_tokens: Annotated[int, Field(description="0, always")]


class OutputTokensDetails(TypedDict):
    reasoning_tokens: Annotated[int, Field(description="of thoughts")]


class ResponseUsage(TypedDict):
    input_tokens: Annotated[int, Field(description="of the whole prompt, the conversation before included")]
    input_tokens_details: Annotated[InputTokensDetails, Field(description="some of input_tokens")]
    output_tokens: Annotated[int, Field(description="of all items, what ended them included")]
    output_tokens_details: Annotated[OutputTokensDetails, Field(description="some of output_tokens")]
    total_tokens: Annotated[int, Field(description="the sum of both")]


class ResponseError(TypedDict):
    code: Annotated[str, Field(description="for programs")]
    message: Annotated[str, Field(description="for people")]


class IncompleteDetails(TypedDict):
    reason: Annotated[Literal["max_output_tokens"], Field(description="what it is incomplete for")]


class AskedReasoning(TypedDict):
    effort: Annotated[str | None, Field(description="as it was asked for")]
    summary: Annotated[str | None, Field(description="as it was asked for")]


class AskedText(TypedDict):
    format: Annotated[dict[str, Any], Field(description="as it was asked for; else of type text")]
    verbosity: Annotated[Literal["low", "medium", "high"], Field(description="as it was asked for; else medium")]


class ResponseObject(TypedDict):
    id: ID
    object: Annotated[Literal["response"], KIND]
    created_at: Seconds
    model: Asked
    status: Annotated[Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"],
                      Field(description="how it stands")]
    completed_at: Annotated[int | None, Field(description="in Unix seconds, where it is completed")]
    error: Annotated[ResponseError | None, Field(description="where it has failed")]
    incomplete_details: Annotated[IncompleteDetails | None, Field(description="where it is incomplete")]
    output: Annotated[list[MessageItem | ReasoningItem | FunctionCallItem], Field(description="in their order")]
    usage: Annotated[ResponseUsage | None, Field(description="once it has ended")]
    instructions: Annotated[str | None, Field(description="as asked")]
    max_output_tokens: Annotated[int | None, Field(description="as asked")]
    metadata: Annotated[dict[str, str], Field(description="as asked; else none")]
    parallel_tool_calls: Annotated[bool, Field(description="as asked; else true")]
    previous_response_id: Annotated[str | None, Field(description="as asked")]
    background: Annotated[bool, Field(description="as asked; else false")]
    reasoning: Annotated[AskedReasoning, Field(description="as asked")]
    store: Annotated[bool, Field(description="as asked; else true")]
    temperature: Annotated[float, Field(description="as asked; else 1, also where the model has one of its own")]
    top_p: Annotated[float, Field(description="as asked; else 1, also where the model has one of its own")]
    text: Annotated[AskedText, Field(description="as asked")]
    tool_choice: Annotated[str | dict[str, Any], Field(description="as asked; else auto")]
    tools: Annotated[list[dict[str, Any]], Field(description="as asked; else none")]
    top_logprobs: Annotated[int, Field(description="as asked; else 0")]
    truncation: Annotated[Literal["auto", "disabled"], Field(description="as asked; nothing is ever left out")]
    max_tool_calls: Annotated[int | None, Field(description="as asked")]
    prompt_cache_key: Annotated[str | None, Field(description="as asked")]
    safety_identifier: Annotated[str | None, Field(description="as asked")]
    user: Annotated[str | None, Field(description="as asked")]
    service_tier: Annotated[Literal["default"], Field(description="default, always")]


class ResponseInputTokens(TypedDict):
    object: Annotated[Literal["response.input_tokens"], KIND]
    input_tokens: Annotated[int, Field(description="of the whole prompt, the conversation before included")]


RESPONSE_OBJECTS: tuple[Any, ...] = (ResponseObject, ResponseInputTokens)
