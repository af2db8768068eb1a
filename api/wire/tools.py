"""Which tools a request offers, and which of them its answer must call. It knows OpenAI's words for it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from shared.errors import InvalidValue

Tools = Sequence[Mapping[str, Any]]


class ToolChoice(NamedTuple):
    mode: Literal["none", "auto", "required"]
    names: frozenset[str] | None = None                 # only these; None: all
    is_named: bool = False                              # one, and once

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
    """Raises ValueError when two have the same."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")


def _names(chosen: list[Any], tools: Tools) -> frozenset[str]:
    offered = {tool["function"]["name"] for tool in tools}
    names = set()
    for each in chosen:
        function = each.get("function") if isinstance(each, dict) and each.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in offered:
            raise InvalidValue("tool_choice names a function that is none of the tools.", param="tool_choice")
        names.add(name)
    return frozenset(names)
