"""The objects of answers, as /docs describes them; those of responses and of messages have files of their own.

The folds make them, and know nothing of this page.
"""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic wants this one before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

from api.wire.batches import Status

KIND = Field(description="what kind of object this is")
Fingerprint = Annotated[str, Field(description="of the model's weights")]
ID = Annotated[str, Field(description="of this object")]
Asked = Annotated[str, Field(description="as the request names it")]
Seconds = Annotated[int, Field(description="seconds since 1970")]
Expiry = Annotated[int, Field(description="when it expires, in seconds since 1970")]
ReachedAt = Annotated[int | None, Field(description="when it came to this, in seconds since 1970; null: it has not")]
FirstID = Annotated[str | None, Field(description="of the first in data; null: there is none")]
LastID = Annotated[str | None, Field(description="of the last in data, after which the next page begins; null: none")]
HasMore = Annotated[bool, Field(description="whether more follow")]
List = Annotated[Literal["list"], KIND]
LISTED = Field(description="what is listed, in order")
Assistant = Annotated[Literal["assistant"], Field(description="assistant, always")]
MaxModelLen = Annotated[int, Field(description="longest context, in tokens")]
ENDED = Field(description="why it ended; length: at the limit of tokens")
Reason = Annotated[Literal["stop", "length", "tool_calls", "function_call"] | None, ENDED]


class PromptTokensDetails(TypedDict):
    cached_tokens: Annotated[int, Field(description="found computed")]


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: Annotated[int, Field(description="of thoughts")]


class Usage(TypedDict):
    prompt_tokens: Annotated[int, Field(description="of the prompt, once however many choices there are")]
    completion_tokens: Annotated[int, Field(description="of all choices, what ended them included")]
    total_tokens: Annotated[int, Field(description="the sum of both")]
    prompt_tokens_details: Annotated[PromptTokensDetails, Field(description="some of prompt_tokens")]
    completion_tokens_details: Annotated[CompletionTokensDetails, Field(description="some of completion_tokens")]


Used = Annotated[Usage, Field(description="how many tokens there were")]


class CalledFunction(TypedDict):
    name: Annotated[str, Field(description="of the function that is called")]
    arguments: Annotated[str, Field(description="JSON, unless the answer was cut")]


class CalledTool(TypedDict):
    id: Annotated[str, Field(description="by which a tool message answers it")]
    type: Annotated[Literal["function"], Field(description="function, always")]
    function: Annotated[CalledFunction, Field(description="what is called")]


class AnswerMessage(TypedDict):
    role: Assistant
    content: Annotated[str | None, Field(description="what is said; null: it calls, and says nothing")]
    refusal: Annotated[None, Field(description="null, always")]
    tool_calls: Annotated[NotRequired[list[CalledTool]], Field(description="what it calls")]
    function_call: Annotated[NotRequired[CalledFunction], Field(description="what it calls, if asked with functions")]
    reasoning_content: Annotated[NotRequired[str], Field(description="what was thought")]
    reasoning: Annotated[NotRequired[str], Field(description="as reasoning_content")]


class TopLogprob(TypedDict):
    token: Annotated[str, Field(description="its text; what is no character shows as U+FFFD")]
    logprob: Annotated[float, Field(description="of its probability; -9999: none to speak of")]
    bytes: Annotated[list[int], Field(description="its text in UTF-8, or the part of a character that it is")]


class TokenLogprob(TopLogprob):
    top_logprobs: Annotated[list[TopLogprob], Field(description="of the likeliest, as many as were asked for")]


class ChatLogprobs(TypedDict):
    content: Annotated[list[TokenLogprob], Field(description="of each token")]
    refusal: Annotated[None, Field(description="null, always")]


class ChatChoice(TypedDict):
    index: Annotated[int, Field(description="of this choice, from 0")]
    message: Annotated[AnswerMessage, Field(description="what is answered")]
    logprobs: Annotated[ChatLogprobs | None, Field(description="null: not asked for")]
    finish_reason: Reason


class ChatCompletion(TypedDict):
    id: ID
    object: Annotated[Literal["chat.completion"], KIND]
    created: Seconds
    model: Asked
    service_tier: Annotated[Literal["default"], Field(description="default, always")]
    system_fingerprint: Fingerprint
    choices: Annotated[list[ChatChoice], Field(description="n of them")]
    usage: Used
    metadata: Annotated[NotRequired[dict[str, str]], Field(description="where it is stored")]


class TextChoice(TypedDict):
    index: Annotated[int, Field(description="of this choice, from 0, counted on from prompt to prompt")]
    text: Annotated[str, Field(description="what follows the prompt")]
    logprobs: Annotated[None, Field(description="null, always")]
    finish_reason: Annotated[Literal["stop", "length"] | None, ENDED]


class TextCompletion(TypedDict):
    id: ID
    object: Annotated[Literal["text_completion"], KIND]
    created: Seconds
    model: Asked
    system_fingerprint: Fingerprint
    choices: Annotated[list[TextChoice], Field(description="n of each prompt")]
    usage: Used


class FileObject(TypedDict):
    id: ID
    object: Annotated[Literal["file"], KIND]
    bytes: Annotated[int, Field(description="how many it has")]
    created_at: Seconds
    expires_at: Expiry
    filename: Annotated[str, Field(description="its name")]
    purpose: Annotated[str, Field(description="what it is for")]
    status: Annotated[Literal["processed"], Field(description="processed, always")]
    status_details: Annotated[None, Field(description="null, always")]


class BatchError(TypedDict):
    code: Annotated[str | None, Field(description="for programs")]
    message: Annotated[str, Field(description="for people")]
    param: Annotated[str | None, Field(description="the field that it is about")]
    line: Annotated[int | None, Field(description="of the input file, from 1")]


class BatchErrors(TypedDict):
    object: List
    data: Annotated[list[BatchError], Field(description="the first of them")]


class RequestCounts(TypedDict):
    total: Annotated[int, Field(description="in the input file")]
    completed: Annotated[int, Field(description="have a line in the output file")]
    failed: Annotated[int, Field(description="have a line in the error file")]


class BatchUsage(TypedDict):
    input_tokens: Annotated[int, Field(description="of all prompts")]
    input_tokens_details: Annotated[PromptTokensDetails, Field(description="some of input_tokens")]
    output_tokens: Annotated[int, Field(description="of all answers")]
    output_tokens_details: Annotated[CompletionTokensDetails, Field(description="some of output_tokens")]
    total_tokens: Annotated[int, Field(description="the sum of both")]


class BatchObject(TypedDict):
    id: ID
    object: Annotated[Literal["batch"], KIND]
    endpoint: Annotated[str, Field(description="what every line asks")]
    errors: Annotated[BatchErrors | None, Field(description="why it has failed")]
    input_file_id: Annotated[str, Field(description="of its lines")]
    completion_window: Annotated[Literal["24h"], Field(description="24h, always")]
    status: Annotated[Status, Field(description="how far it has come")]
    output_file_id: Annotated[str | None, Field(description="of what was answered, once it is over")]
    error_file_id: Annotated[str | None, Field(description="of what has failed, once it is over")]
    created_at: Seconds
    expires_at: Expiry
    in_progress_at: ReachedAt
    finalizing_at: ReachedAt
    completed_at: ReachedAt
    failed_at: ReachedAt
    expired_at: ReachedAt
    cancelling_at: ReachedAt
    cancelled_at: ReachedAt
    request_counts: Annotated[RequestCounts, Field(description="of its lines")]
    usage: Annotated[BatchUsage, Field(description="of all lines that were answered so far")]
    metadata: Annotated[dict[str, str] | None, Field(description="kept beside it")]


class ChatCompletionPage(TypedDict):
    object: List
    data: Annotated[list[ChatCompletion], LISTED]
    first_id: FirstID
    last_id: LastID
    has_more: HasMore


class Page(TypedDict):
    object: List
    data: Annotated[list[dict[str, Any]], LISTED]
    first_id: FirstID
    last_id: LastID
    has_more: HasMore


class Deleted(TypedDict):
    id: Annotated[str, Field(description="of what was deleted")]
    object: Annotated[str, Field(description="what kind of object was deleted")]
    deleted: Annotated[Literal[True], Field(description="true, always")]


class Ended(TypedDict):
    id: Annotated[str, Field(description="of what has ended")]
    object: Annotated[Literal["chat.completion"], KIND]
    status: Annotated[Literal["completed", "cancelled", "failed"], Field(description="how it ended, now or before")]


class Model(TypedDict):
    id: Annotated[str, Field(description="a name by which requests ask for it")]
    object: Annotated[Literal["model"], KIND]
    created: Annotated[int, Field(description="of the weights, in seconds since 1970")]
    owned_by: Annotated[str, Field(description="baton, always")]
    root: Annotated[str, Field(description="its canonical name")]
    max_model_len: MaxModelLen


class Models(TypedDict):
    object: List
    data: Annotated[list[Model], Field(description="what is served at the moment")]


class Tokens(TypedDict):
    count: Annotated[int, Field(description="how many tokens there are")]
    max_model_len: MaxModelLen
    tokens: Annotated[list[int], Field(description="token ids")]
    token_strs: Annotated[list[str] | None, Field(description="as the vocabulary writes them; null: not asked for")]


class Text(TypedDict):
    prompt: Annotated[str, Field(description="the text of the tokens")]


OBJECTS: tuple[Any, ...] = (ChatCompletion, TextCompletion, FileObject, BatchObject, ChatCompletionPage, Page, Deleted,
                            Ended, Model, Models, Tokens, Text)
