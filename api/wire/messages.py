"""A request of Anthropic's Messages API, translated into a chat.

The same conversation in other words: every rule of a chat applies. It knows the OpenAI names of the same things,
nothing of how an answer is written (api/wire/message_fold.py).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from api.wire.body import Fields, names_of, read_object, refuse_wishes, validate
from api.wire.request import MAX_TOOLS, NAMES, ChatRequest, require_few_messages
from api.wire.sampled import MAX_STOPS, Count, StopText
from api.wire.turns import BLOCKS, TextPiece, Turn, given, joined, messages, require_calls
from shared.errors import UnsupportedParameter, UnsupportedThread

REFUSED = ("compaction", "container", "mcp_servers", "thread")      # they would change the answer


class Tool(Fields):
    type: Literal["custom"] | None = Field(None, description="custom, always")
    name: str = Field(min_length=1, max_length=256, description="by which it is called")
    description: str | None = Field(None, description="what the model is told of it")
    input_schema: dict[str, Any] = Field(description="a JSON schema")
    strict: bool | None = Field(None, description="true: it is called as input_schema says, and not otherwise")

    def function(self) -> dict[str, Any]:
        named = {"name": self.name, "description": self.description, "parameters": self.input_schema,
                 "strict": self.strict}
        return {"type": "function", "function": given(named)}


class Choice(Fields):
    type: Literal["auto", "any", "tool", "none"] = Field(
        description="auto: it may call; any: it must; tool: it must, this one; none: it must not")
    name: str | None = Field(None, description="of the tool, required with type tool")
    disable_parallel_tool_use: bool | None = Field(
        None, description="true: one call at most, where a call is required")

    @model_validator(mode="after")
    def _a_tool_has_a_name(self) -> Choice:
        if self.type == "tool" and self.name is None:
            raise ValueError("name is required with type tool")
        return self

    def for_chat(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = Field(
        description="enabled, disabled: whether it thinks; else as the chat template has it")


class Format(Fields):
    type: Literal["json_schema"] = Field(description="json_schema, always")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema")

    def for_chat(self) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": self.schema_}}


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="what the chat template makes of it")
    format: Format | None = Field(None, description="the answer is JSON of this schema")


class CountRequest(Fields):
    """`POST /v1/messages/count_tokens`."""

    model: str = Field(min_length=1, description="a name of GET /v1/models")
    messages: list[Turn] = Field(min_length=1, description="the conversation so far, of `max_messages` at most")
    system: str | None = Field(None, description="a text, or blocks of text")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="what it may call")
    tool_choice: Choice | None = Field(None, description="whether it must call something; else auto")
    thinking: Thinking | None = Field(None, description="enable_thinking of the chat template; a budget has no effect")
    output_config: OutputConfig | None = Field(None, description="the form of the answer, and how much it thinks")
    output_format: Format | None = Field(None, description="the older name of output_config.format")
    compaction: Any = Field(None, description="refused")
    container: Any = Field(None, description="refused")
    mcp_servers: list[Any] | None = Field(None, description="refused")
    thread: Any = Field(None, description="refused: the conversation is sent whole")

    _joined = field_validator("system", mode="before", json_schema_input_type=str | list[TextPiece] | None)(joined)

    @field_validator("tools", mode="before")
    @classmethod
    def _tools_of_the_client(cls, tools: Any) -> Any:
        kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
        if any(isinstance(kind, str) and kind != "custom" for kind in kinds):
            raise UnsupportedParameter("This server runs no tools, and knows none by name: a tool is a name, a "
                                       "description and an input_schema.", param="tools")
        return tools

    @model_validator(mode="after")
    def _nothing_that_is_not_done(self) -> CountRequest:
        if self.thread is not None:
            raise UnsupportedThread(param="thread")
        refuse_wishes(self, REFUSED)
        return self

    @model_validator(mode="after")
    def _results_have_calls(self) -> CountRequest:
        require_calls(self.messages)
        return self

    def chat(self) -> ChatRequest:
        """The equivalent chat request. Raises BadRequest."""
        return validate(ChatRequest, given(self._fields()), NAMES)

    def _fields(self) -> dict[str, Any]:
        output = self.output_config or OutputConfig()
        wanted, effort = output.format or self.output_format, output.effort
        thinks = {"enabled": True, "disabled": False}.get(self.thinking.type) if self.thinking else None
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        choice = self.tool_choice
        return {"model": self.model, "messages": [*system, *messages(self.messages)],
                "tools": [tool.function() for tool in self.tools] if self.tools else None,
                "tool_choice": choice and choice.for_chat(),
                "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
                "chat_template_kwargs": None if thinks is None else {"enable_thinking": thinks},
                "reasoning_effort": effort,
                "response_format": wanted and wanted.for_chat()}


class MessageRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: Count = Field(ge=1, description="most tokens of an answer")
    stream: bool | None = Field(None, description="answer with server-sent events")
    stop_sequences: list[StopText] | None = Field(
        None, max_length=MAX_STOPS, description="texts that end it; left out")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: the likeliest token, always; else the model's own, or 1")
    top_p: float | None = Field(
        None, ge=0, le=1, description="the likeliest tokens of this probability in all; else the model's own, or 1")
    top_k: Count | None = Field(
        None, ge=0, description="so many of the likeliest tokens; 0: all; else the model's own, or all")

    @model_validator(mode="after")
    def _the_user_is_last(self) -> MessageRequest:
        if self.messages[-1].role == "assistant":
            raise UnsupportedParameter("The last message is not the assistant's: this server does not go on with an "
                                       "answer that was begun elsewhere.", param="messages")
        return self

    def _fields(self) -> dict[str, Any]:
        return super()._fields() | {
            "max_tokens": self.max_tokens, "stream": self.stream, "stop": self.stop_sequences,
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


MESSAGE_NAMES = names_of(MessageRequest, Turn, *BLOCKS, Tool, Choice, Thinking, OutputConfig, Format)


def parse_message(body: bytes, max_messages: int) -> ChatRequest:
    """The chat request for `/v1/messages`. Raises BadRequest, with what is wrong."""
    return _parse(MessageRequest, body, max_messages)


def parse_count(body: bytes, max_messages: int) -> ChatRequest:
    """As parse_message, for a request that is only counted."""
    return _parse(CountRequest, body, max_messages)


def _parse(model: type[CountRequest], body: bytes, max_messages: int) -> ChatRequest:
    raw = read_object(body)
    require_few_messages(raw, max_messages)
    return validate(model, raw, MESSAGE_NAMES).chat()
