"""Training conversations: questions of several skills strung together as people chat.

It decides who says what and in which order. It knows nothing of tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from worker.tiny.question import Message, Question, Tool, assistant, system
from worker.tiny.skills import NOT_TOLD, TABLE
from worker.tiny.tool_skills import offered_tools, tool_call, tool_result
from worker.tiny.words import Draw

# Arithmetic with a calculator at hand is a call, without one it is worked out: do not mix the two.
NEVER_BESIDE_TOOLS = {"adding", "subtracting", "unknown", "json_schema", "capitals", "tool_call", "tool_result"}

SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a friendly assistant.", "Be brief.", "Answer the user.",
                  "You are baton-tiny.", "You are a helpful AI assistant. Answer the questions of the user.",
                  "Be concise.", "You are a chat model.", "Help the user.",
                  "You are an assistant that answers short questions."]


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Tool] | None = None


def conversation(draw: Draw, weights: Mapping[str, float], longest_bytes: int) -> Conversation:
    """One to six exchanges of about `longest_bytes` together; the first is drawn by weight, as are the rest."""
    skill = draw.random.choices(list(weights), list(weights.values()))[0]
    if skill in ("tool_call", "tool_result"):
        return _with_tools(draw, skill, longest_bytes)
    first = TABLE[skill](draw)
    messages = [*_maybe_system(draw, first), *first.messages, assistant(first.answer)]
    if messages[0]["role"] == "system" and first.messages[0]["role"] == "system":
        return Conversation(messages)               # its system turn would not suit other exchanges
    others = {name: weight for name, weight in weights.items() if name not in ("tool_call", "tool_result")}
    while _num_bytes(messages) < longest_bytes and draw.chance(0.85):
        question = TABLE[draw.random.choices(list(others), list(others.values()))[0]](draw)
        if question.messages[0]["role"] == "system" or question.answer == NOT_TOLD:
            continue
        messages += [*question.messages, assistant(question.answer)]
    return Conversation(messages)


def _with_tools(draw: Draw, skill: str, longest_bytes: int) -> Conversation:
    """Calls, their results, and at times a question that needs no tool."""
    tools = offered_tools(draw)
    messages: list[Message] = [system(draw.choice(SYSTEM_PROMPTS))] if draw.chance(0.4) else []
    messages += _aside(draw)
    while True:
        question = tool_call(draw, tools) if skill == "tool_call" else tool_result(draw, tools)
        messages += [*question.messages, assistant(question.answer)]
        if skill == "tool_call" or _num_bytes(messages) > longest_bytes:
            return Conversation(messages, tools)
        messages += _aside(draw)
        skill = draw.choice(["tool_call", "tool_result", "tool_result"])


def _aside(draw: Draw) -> list[Message]:
    """At times, an exchange that needs no tool."""
    if draw.chance(0.7):
        return []
    aside = TABLE[draw.choice([name for name in TABLE if name not in NEVER_BESIDE_TOOLS])](draw)
    return [*aside.messages, assistant(aside.answer)] if aside.answer != NOT_TOLD else []


def _maybe_system(draw: Draw, first: Question) -> list[Message]:
    if first.messages[0]["role"] == "system" or draw.chance(0.5):
        return []
    return [system(draw.choice(SYSTEM_PROMPTS))]


def _num_bytes(messages: list[Message]) -> int:
    return sum(len(message["content"]) + 30 for message in messages)
