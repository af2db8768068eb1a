"""`POST /v1/responses`: a conversation in items, validated and translated into a chat.

The meaning of items is api/wire/items.py's. It knows nothing of Redis, HTTP or tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from api.wire.body import Fields, names_of, read_object, refuse_wishes, shown_as, validate
from api.wire.format import JSONSchema
from api.wire.items import Item, chat_messages
from api.wire.metadata import Metadata
from api.wire.request import MAX_NESTING, MAX_TOOLS, NAMES, ChatRequest, Effort, is_deep, require_few_messages
from api.wire.sampled import Count, Drawn, require_stream
from api.wire.tools import AS_WRITTEN, FunctionName, Mode, ToolFunction
from shared.errors import BadRequest, InvalidValue, MissingField, UnsupportedParameter
from shared.job import MAX_TOP_LOGPROBS

WITH_LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "message.output_text.logprobs", "reasoning.encrypted_content",
    "web_search_call.action.sources", "web_search_call.results"]
REFUSED = ("conversation", "prompt", "context_management")          # they would change the answer
# Names in a chat, and the names here.
RENAMED = {"messages": "input", "response_format": "text.format", "reasoning_effort": "reasoning.effort",
           "max_completion_tokens": "max_output_tokens", "tools": "tools"}


class Reasoning(Fields):
    effort: Effort | None = Field(
        None, description="what the chat template makes of it; none: enable_thinking is false")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="without effect: thoughts are told whole")


class TextFormat(JSONSchema):
    type: Literal["text", "json_object", "json_schema"] = Field(description="text: anything")
    name: str = Field("schema", pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="without effect")


@with_config(AS_WRITTEN)
class ResponseTool(ToolFunction):
    """The fields of a function are one level higher than in a chat."""

    type: Annotated[Literal["function"], Field(description="function, always")]


class ResponseToolName(FunctionName):
    type: Annotated[Literal["function"], Field(description="function, always")]


class AllowedResponseTools(TypedDict):
    type: Annotated[Literal["allowed_tools"], Field(description="allowed_tools, always")]
    mode: Annotated[Literal["auto", "required"], Field(description="whether it must call one of them")]
    tools: Annotated[list[ResponseToolName], Field(min_length=1, description="which it may call")]


ResponseChoice = Mode | ResponseToolName | AllowedResponseTools | None


class TextOptions(Fields):
    format: TextFormat | None = Field(None, description="else text")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="repeated, without effect")


class ResponseRequest(Drawn):
    """`POST /v1/responses`."""

    model: str = Field(min_length=1, description="a name of GET /v1/models")
    input: str | list[Item] = Field(
        [], description="a text, or items of a conversation, `max_messages` at most; else the previous one's alone")
    instructions: str | None = Field(None, description="said before the conversation, and not kept for the next one")
    previous_response_id: str | None = Field(None, description="of a stored response, whose conversation goes on")
    stream: bool | None = Field(None, description="answer with server-sent events")
    stream_options: dict[str, Any] | None = Field(None, description="with a stream alone; without effect")
    background: bool | None = Field(None, description="answer at once with its id; it goes on with nobody reading")
    store: bool | None = Field(None, description="else true, while there is room: it is kept for `store_s`")
    metadata: Metadata | None = Field(None, description="kept beside it")
    max_output_tokens: Count | None = Field(
        None, ge=1, description="most tokens of the response, thoughts included; else what the context leaves")
    tools: list[ResponseTool] | None = Field(
        None, max_length=MAX_TOOLS, description=f"functions that it may call, of different names; each nested at most "
                                                f"{MAX_NESTING} levels deep")
    tool_choice: Annotated[str | dict[str, Any] | None, shown_as(ResponseChoice)] = Field(
        None, description="none, auto, required, a function, or some of them; else auto")
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most, where a call is required")
    text: TextOptions | None = Field(None, description="the form that the answer must keep")
    reasoning: Reasoning | None = Field(None, description="how much it thinks")
    include: list[Includable] | None = Field(
        None, description=f"{WITH_LOGPROBS}: log probabilities; else without effect")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="of so many likeliest tokens beside each; else 0")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="nothing is ever left out")
    max_tool_calls: Count | None = Field(None, ge=1, description="of tools that a server runs; repeated")
    prompt_cache_key: str | None = Field(None, description="repeated, without effect")
    safety_identifier: str | None = Field(None, description="repeated, without effect")
    conversation: str | dict[str, Any] | None = Field(None, description="refused")
    prompt: dict[str, Any] | None = Field(None, description="refused")
    context_management: list[Any] | None = Field(None, description="refused")

    @field_validator("tools", mode="before", json_schema_input_type=list[ResponseTool] | None)
    @classmethod
    def _functions_alone(cls, tools: Any) -> Any:
        kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
        if any(isinstance(kind, str) and kind != "function" for kind in kinds):
            raise UnsupportedParameter("This server offers functions alone, no tools of its own.", param="tools")
        return tools

    @model_validator(mode="after")
    def _together(self) -> ResponseRequest:
        refuse_wishes(self, REFUSED)
        require_stream(self.stream, self.stream_options)
        if is_deep(self.tool_choice):
            raise InvalidValue(f"tool_choice is nested at most {MAX_NESTING} levels deep.", param="tool_choice")
        if self.background and self.store is False:
            raise InvalidValue("A response in the background is stored.", param="store")
        if "input" not in self.model_fields_set and not (self.previous_response_id or self.instructions):
            raise MissingField("input: Field required", param="input")
        return self

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def must_be_stored(self) -> bool:
        """Whether the client needs it stored; otherwise it is where there is room."""
        return bool(self.store or self.background)

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input as items; a text becomes one item."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": self.input}]}]
        return [dict(item) for item in self.input]

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that the response repeats."""
        text, reasoning = self.text or TextOptions(), self.reasoning or Reasoning()
        form = text.format.model_dump(by_alias=True, exclude_none=True) if text.format else {"type": "text"}
        if form["type"] != "json_schema":
            form = {"type": form["type"]}
        return {"instructions": self.instructions, "max_output_tokens": self.max_output_tokens,
                "metadata": self.metadata or {}, "parallel_tool_calls": self.parallel_tool_calls is not False,
                "previous_response_id": self.previous_response_id, "background": bool(self.background),
                "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary}, "store": self.is_stored,
                "temperature": 1.0 if self.temperature is None else self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "text": {"format": form, "verbosity": text.verbosity or "medium"},
                "tool_choice": self.tool_choice or "auto", "tools": self.tools or [],
                "top_logprobs": self.top_logprobs or 0, "truncation": self.truncation or "disabled",
                "max_tool_calls": self.max_tool_calls, "prompt_cache_key": self.prompt_cache_key,
                "safety_identifier": self.safety_identifier, "user": self.user, "service_tier": "default"}

    def chat(self, items: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """The same request as a chat of these items. Raises BadRequest, with the names of responses."""
        raw: dict[str, Any] = {name: getattr(self, name) for name in Drawn.model_fields}
        has_logprobs = WITH_LOGPROBS in (self.include or ()) or self.top_logprobs is not None
        raw |= {"model": self.model, "messages": chat_messages(items, self.instructions), "stream": self.stream,
                "max_completion_tokens": self.max_output_tokens, "tools": _chat_tools(self.tools),
                "tool_choice": _chat_choice(self.tool_choice), "parallel_tool_calls": self.parallel_tool_calls,
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
                "response_format": _chat_format(self.text), "logprobs": has_logprobs,
                "top_logprobs": (self.top_logprobs or 0) if has_logprobs else None}
        with in_our_words():
            return validate(ChatRequest, raw, NAMES)


@contextmanager
def in_our_words() -> Iterator[None]:
    """Errors of the chat, with the names that their fields have in a response."""
    try:
        yield
    except BadRequest as error:
        for chat, ours in RENAMED.items():
            if error.param and error.param.startswith(chat):
                error.param, error.args = ours, (re.sub(rf"^{chat}[\w.\[\]]*:", f"{ours}:", str(error)),)
        raise


def parse_response(body: bytes, max_items: int) -> ResponseRequest:
    """Raises BadRequest, with what is wrong."""
    raw = read_object(body)
    with in_our_words():
        require_few_messages({"messages": raw.get("input")}, max_items)
    names = names_of(ResponseRequest, Reasoning, TextOptions, TextFormat, ResponseTool)
    return validate(ResponseRequest, raw, names)


def _chat_tools(tools: list[ResponseTool] | None) -> list[dict[str, Any]] | None:
    return None if tools is None else [
        {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
        for tool in tools]


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = {"mode": choice.get("mode"), "tools": [_chat_choice(each) for each in choice["tools"]]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}


def _chat_format(text: TextOptions | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    form = text.format
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema_ is None:
        raise InvalidValue("text.format.schema is required with type json_schema.", param="text.format")
    return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_, "strict": form.strict}}
