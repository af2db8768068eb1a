"""The tools that a request offers, and which of them its answer must call. It knows only OpenAI's names for this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from shared.errors import InvalidValue

Tools = Sequence[Mapping[str, Any]]
Name = Annotated[str, Field(min_length=1, max_length=256, description="by which it is called")]
AS_WRITTEN = ConfigDict(strict=True, extra="allow")     # the model's template may use other fields of it


@with_config(AS_WRITTEN)
class ToolFunction(TypedDict):
    name: Name
    description: NotRequired[Annotated[str | None, Field(description="what the model is told of it")]]
    parameters: NotRequired[Annotated[dict[str, Any] | None, Field(
        description="a JSON schema of its arguments; else it takes none")]]
    strict: NotRequired[Annotated[bool | None, Field(
        description="true: it is called as parameters say, and not otherwise; else as far as can be enforced")]]


@with_config(AS_WRITTEN)
class ChatTool(TypedDict):
    type: Annotated[Literal["function"], Field(description="function, always")]
    function: Annotated[ToolFunction, Field(description="what may be called")]


class FunctionName(TypedDict):
    name: Annotated[str, Field(description="of one of the tools")]


class ChatToolName(TypedDict):
    type: Annotated[Literal["function"], Field(description="function, always")]
    function: Annotated[FunctionName, Field(description="which")]


class AllowedChatTools(TypedDict):
    mode: Annotated[Literal["auto", "required"], Field(description="whether it must call one of them")]
    tools: Annotated[list[ChatToolName], Field(min_length=1, description="which it may call")]


class AllowedChatChoice(TypedDict):
    type: Annotated[Literal["allowed_tools"], Field(description="allowed_tools, always")]
    allowed_tools: Annotated[AllowedChatTools, Field(description="some of the tools")]


Mode = Literal["none", "auto", "required"]
ChatChoice = Mode | ChatToolName | AllowedChatChoice | None         # errors in one are reported by `read_choice`
LegacyChoice = Literal["none", "auto"] | FunctionName | None


class ToolChoice(NamedTuple):
    mode: Mode
    names: frozenset[str] | None = None                 # only these; None: all
    is_named: bool = False                              # exactly this one, once

    def of(self, tools: Tools) -> list[Mapping[str, Any]]:
        """The functions that may be called."""
        functions = [tool["function"] for tool in tools]
        return [function for function in functions if self.names is None or function["name"] in self.names]


def read_choice(choice: Any, tools: Tools) -> ToolChoice:
    """Raises InvalidValue."""
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if choice == "none":
        return ToolChoice("none")
    if choice == "auto":
        return ToolChoice("auto")
    if not tools:
        raise InvalidValue("tool_choice is only allowed when tools are given.", param="tool_choice")
    if choice == "required":
        return ToolChoice("required")
    if isinstance(choice, dict) and choice.get("type") == "function":
        return ToolChoice("required", _names([choice], tools), is_named=True)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        allowed = allowed if isinstance(allowed, dict) else {}
        if allowed.get("mode") in ("auto", "required") and isinstance(allowed.get("tools"), list) and allowed["tools"]:
            return ToolChoice(allowed["mode"], _names(allowed["tools"], tools))
    raise InvalidValue("tool_choice is none, auto, required, a function or allowed_tools.", param="tool_choice")


def require_names(tools: Tools) -> None:
    """Raises ValueError when two have the same name."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")


def _names(chosen: list[Any], tools: Tools) -> frozenset[str]:
    offered = {tool["function"]["name"] for tool in tools}
    names = set()
    for each in chosen:
        function = each.get("function") if isinstance(each, dict) and each.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise InvalidValue("tool_choice: the name of a function is missing.", param="tool_choice")
        if name not in offered:
            raise InvalidValue("tool_choice names a function that is none of the tools.", param="tool_choice")
        names.add(name)
    return frozenset(names)
