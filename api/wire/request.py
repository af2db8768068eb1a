"""A chat request in OpenAI's language, read and checked. It knows nothing of Redis, HTTP or tokenizers.

What it accepts is OpenAI's schema and vLLM's extensions. Null is legal for every nullable field; fields on which the
service does not act are accepted; those that would change the answer, and do not yet, are refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from api.wire import sampled
from api.wire.body import Fields, names_of, read_object, refuse_wishes, shown_as, validate
from api.wire.format import JSONSchema, ResponseFormat, StructuredOutputs
from api.wire.metadata import Metadata
from api.wire.sampled import Count, Sampled, StreamOptions
from api.wire.tools import (
    ChatChoice,
    ChatTool,
    FunctionName,
    LegacyChoice,
    ToolChoice,
    ToolFunction,
    read_choice,
    require_names,
)
from shared.errors import InvalidValue, UnsupportedContent
from shared.job import MAX_TOP_LOGPROBS

log = logging.getLogger(__name__)

MAX_TOOLS = 1024                                        # OpenAI takes 128; those of many servers together are more
MAX_TEMPLATE_VARIABLES = 16
MAX_NESTING = 64                                        # of a tool's schema, or of a call's arguments

REFUSED = (*sampled.REFUSED, "audio", "continue_final_message", "echo", "modalities", "web_search_options")
TEMPLATE_NAMES = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt", "special_tokens"})

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")]         # spells no token that only templates may write
TemplateVariables = Annotated[dict[str, Word | int | float | bool | None], Field(max_length=MAX_TEMPLATE_VARIABLES)]


class Function(Fields):
    name: str = Field(min_length=1, max_length=256, description="of the function that was called")
    arguments: str | None = Field(None, description="JSON of an object; else none")


class ToolCall(Fields):
    id: str | None = Field(None, description="by which a tool message answers it")
    type: Literal["function"] = Field("function", description="function, always")
    function: Function = Field(description="what was called")


class TextPart(TypedDict):
    type: Annotated[Literal["text"], Field(description="text, always")]
    text: Annotated[str, Field(description="what is said")]


class Message(Fields):
    """One turn. Content comes as a string or as text parts, and is a string from here on."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(description="who speaks")
    content: str | None = Field(None, description="what is said; only an assistant that calls tools may say nothing")
    name: str | None = Field(None, description="of the speaker, if the chat template shows it")
    refusal: str | None = Field(None, description="of an assistant, where there is no content: what it said instead")
    tool_calls: list[ToolCall] | None = Field(None, description="what the assistant called")
    tool_call_id: str | None = Field(None, description="of a tool message: the call that it answers")
    function_call: Function | None = Field(None, description="the older name of one tool call")
    reasoning_content: str | None = Field(None, description="what the assistant thought")
    reasoning: str | None = Field(None, description="as reasoning_content")

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart] | None)
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        return "\n".join(_part_text(part) for part in content) if isinstance(content, list) else content

    @model_validator(mode="after")
    def _must_say_something(self) -> Message:
        if self.function_call and not self.tool_calls:
            self.tool_calls = [ToolCall(function=self.function_call)]
        if self.content is None and self.role in ("assistant", "function"):
            self.content = self.refusal if self.role == "assistant" else ""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is required")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id is required: the call that it answers")
        return self

    def for_template(self) -> dict[str, Any]:
        """For chat templates: the arguments of tool calls as an object, not as text. As transformers does, nothing is
        None, which templates would print, and a thought has gpt-oss' name for it too."""
        message: dict[str, Any] = {"role": "tool" if self.role == "function" else self.role}
        if self.content is not None:
            message["content"] = self.content
        if self.name is not None:
            message["name"] = self.name
        if thought := self.reasoning_content or self.reasoning:
            message["thinking"] = message["reasoning_content"] = thought
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": call.type,
                 "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)}}
                for call in self.tool_calls]
        return message


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "input_audio", "file", "video_url", "audio_url"):
        raise UnsupportedContent(param="messages")
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in ("text", "refusal") or not isinstance(text, str):
        raise ValueError("a part must be {'type': 'text', 'text': string}")
    return text


def _arguments(raw: str | None) -> Any:
    try:
        arguments = json.loads(raw or "{}")
    except (ValueError, RecursionError):
        return raw
    return raw if is_deep(arguments) else arguments


def is_deep(value: Any, room: int = MAX_NESTING) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return room == 0 or any(is_deep(element, room - 1) for element in inner)


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, description="the conversation so far, of `max_messages` at most")
    max_completion_tokens: Count | None = Field(None, ge=1, description="the newer name of max_tokens; it wins")
    logprobs: bool | None = Field(None, description="true: with the log probability of each token; else none")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="with logprobs: also of so many likeliest tokens; else 0")
    tools: list[ChatTool] | None = Field(
        None, max_length=MAX_TOOLS, description=f"functions that it may call, of different names; each nested at most "
                                                f"{MAX_NESTING} levels deep")
    tool_choice: Annotated[str | dict[str, Any] | None, shown_as(ChatChoice)] = Field(
        None, description="none, auto, required, a function, or some of them; else auto")
    functions: list[ToolFunction] | None = Field(None, max_length=MAX_TOOLS, description="the older name of tools")
    function_call: Annotated[str | dict[str, Any] | None, shown_as(LegacyChoice)] = Field(
        None, description="the older name of tool_choice")
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most, where a call is required")
    reasoning_effort: Effort | None = Field(
        None, description="what the chat template makes of it; none: enable_thinking is false")
    chat_template_kwargs: TemplateVariables | None = Field(
        None, description="variables of the chat template: words and numbers")
    store: bool | None = Field(None, description="the answer is kept for `store_s`, and can be listed")
    metadata: Metadata | None = Field(None, description="kept beside an answer that is stored")
    audio: dict[str, Any] | None = Field(None, description="refused")
    continue_final_message: bool | None = Field(None, description="refused, if true")
    echo: bool | None = Field(None, description="refused, if true")
    modalities: list[str] | None = Field(None, description="refused, but for text alone")
    web_search_options: dict[str, Any] | None = Field(None, description="refused")

    @field_validator("tools")
    @classmethod
    def _tools_are_apart(cls, tools: list[ChatTool] | None) -> list[ChatTool] | None:
        if any(is_deep(tool) for tool in tools or ()):
            raise ValueError(f"a tool is nested at most {MAX_NESTING} levels deep")
        require_names(tools or ())
        for number, tool in enumerate(tools or ()):
            kinds = (tool["function"].get("parameters") or {}).get("type", "object")
            if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
                param = f"tools[{number}].function.parameters"
                raise InvalidValue(f"{param}: the schema of a tool's arguments has the type object.", param=param)
        return tools

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidValue("top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
        refuse_wishes(self, REFUSED, but=[["text"]])
        require_calls(self.messages)
        if self.is_legacy:
            self._modernize()
        elif self.function_call not in (None, "none", "auto"):
            raise InvalidValue("function_call is only allowed when functions are given.", param="function_call")
        read_choice(self.tool_choice, self.tools or ())
        return self

    @property
    def is_legacy(self) -> bool:
        """Whether the request uses `functions`, and is answered with function_call."""
        return self.functions is not None

    def _modernize(self) -> None:
        if self.tools is not None or self.tool_choice is not None:
            raise InvalidValue("functions and tools cannot both be given.", param="functions")
        if self.function_call not in (None, "none", "auto") and not isinstance(self.function_call, dict):
            raise InvalidValue("function_call is none, auto, or the name of a function.", param="function_call")
        try:
            self.tools = self._tools_are_apart(
                [{"type": "function", "function": each} for each in self.functions or ()])
        except ValueError as error:
            raise InvalidValue(f"functions: {str(error).replace('tool', 'function')}", param="functions") from None
        named = self.function_call if isinstance(self.function_call, dict) else None
        if named is not None and named.get("name") not in [each["name"] for each in self.functions or ()]:
            raise InvalidValue("function_call names a function that is none of the functions.", param="function_call")
        self.tool_choice = self.function_call if named is None else {"type": "function", "function": named}
        self.parallel_tool_calls = False

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_variables(self) -> dict[str, Any]:
        return template_variables(self.reasoning_effort, self.chat_template_kwargs)

    @property
    def calls(self) -> ToolChoice:
        """Which tools may be called, and whether one must be."""
        return read_choice(self.tool_choice, self.tools or ())

    @property
    def must_call(self) -> bool:
        return self.calls.mode == "required"

    @property
    def has_strict_tools(self) -> bool:
        """Whether a tool that may be called is strict."""
        return any(tool["function"].get("strict") is True for tool in self.offered_tools or ())

    @property
    def offered_tools(self) -> list[ChatTool] | None:
        """The tools shown to the model."""
        choice = self.calls
        if choice.mode == "none" or not self.tools:
            return None
        return [tool for tool in self.tools if choice.names is None or tool["function"]["name"] in choice.names]


def template_variables(effort: Effort | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables in addition to those given to every template, which a request cannot change."""
    variables: dict[str, Any] = {"reasoning_effort": effort} if effort else {}
    if effort == "none":
        variables["enable_thinking"] = False
    return variables | {name: value for name, value in (given or {}).items()
                        if name not in TEMPLATE_NAMES and not name.endswith("_token")}


def require_calls(messages: Sequence[Message]) -> None:
    """Raises InvalidValue when a tool message answers a call that no earlier message made."""
    called = set[str | None]()
    for number, message in enumerate(messages):
        called |= {call.id for call in message.tool_calls or ()}
        if message.role == "tool" and not called & {message.tool_call_id, None}:    # None: the client names no calls
            raise InvalidValue(f"messages[{number}]: a tool message answers a call of an earlier message.",
                               param=f"messages[{number}].tool_call_id")


NAMES = names_of(ChatRequest, Message, ToolCall, Function, StreamOptions, ResponseFormat, JSONSchema, StructuredOutputs,
                 ChatTool, ToolFunction, FunctionName)


def parse(body: bytes, max_messages: int) -> ChatRequest:
    """Parses a request. Raises BadRequest, with what is wrong."""
    raw = read_object(body)
    if unknown := raw.keys() - ChatRequest.model_fields.keys():
        log.debug("fields without effect: %d", len(unknown))
    require_few_messages(raw, max_messages)
    return validate(ChatRequest, raw, NAMES)


def require_few_messages(raw: dict[str, Any], max_messages: int) -> None:
    if isinstance(raw.get("messages"), list) and len(raw["messages"]) > max_messages:
        raise InvalidValue(f"At most {max_messages} messages are allowed.", param="messages")
