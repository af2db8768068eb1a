"""The objects of answers, as /docs describes them. The folds make them, and know nothing of this page."""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic wants this one before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

Fingerprint = Annotated[str, Field(description="of the model's weights")]
Reason = Literal["stop", "length", "tool_calls", "function_call"]


class PromptTokensDetails(TypedDict):
    cached_tokens: Annotated[int, Field(description="found computed")]


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: Annotated[int, Field(description="of thoughts")]


class Usage(TypedDict):
    prompt_tokens: Annotated[int, Field(description="of the prompt, once however many choices there are")]
    completion_tokens: Annotated[int, Field(description="of all choices, what ended them included")]
    total_tokens: Annotated[int, Field(description="the sum of both")]
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CalledFunction(TypedDict):
    name: str
    arguments: Annotated[str, Field(description="JSON, unless the answer was cut")]


class CalledTool(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CalledTool]]
    function_call: NotRequired[CalledFunction]
    reasoning_content: Annotated[NotRequired[str], Field(description="what was thought")]
    reasoning: NotRequired[str]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Reason | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: Annotated[int, Field(description="seconds since 1970")]
    model: str
    service_tier: Literal["default"]
    system_fingerprint: Fingerprint
    choices: list[ChatChoice]
    usage: Usage
    metadata: Annotated[NotRequired[dict[str, str]], Field(description="where it is stored")]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[TextChoice]
    usage: Usage


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    output: Annotated[list[dict[str, Any]], Field(description="items: reasoning, messages, function calls")]
    usage: Annotated[dict[str, Any] | None, Field(description="once it has ended")]


class ResponseInputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: Annotated[int, Field(description="of the whole prompt, the conversation before included")]


class MessageObject(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: Annotated[list[dict[str, Any]], Field(description="blocks: thinking, text, tool_use")]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: dict[str, Any]


class InputTokens(TypedDict):
    input_tokens: int


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class BatchObject(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: dict[str, int]
    metadata: dict[str, str] | None


class ChatCompletionPage(TypedDict):
    object: Literal["list"]
    data: list[ChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Page(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(TypedDict):
    id: str
    object: str
    deleted: Literal[True]


class Ended(TypedDict):
    id: str
    object: Literal["chat.completion"]
    status: Literal["completed", "cancelled", "failed"]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: Annotated[str, Field(description="its canonical name")]
    max_model_len: Annotated[int, Field(description="longest context, in tokens")]


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    prompt: str


OBJECTS: tuple[Any, ...] = (
    ChatCompletion, TextCompletion, ResponseObject, ResponseInputTokens, MessageObject, InputTokens, FileObject,
    BatchObject, ChatCompletionPage, Page, Deleted, Ended, Model, Models, Tokens, Text)
