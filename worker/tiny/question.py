"""A question, its reference answer and its check: what every skill makes.

It knows the OpenAI form of messages and tools. It knows nothing of the skills.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class Question:
    messages: list[Message]             # all that the model sees before it answers
    answer: str                         # the reference
    check: Callable[[str], bool]
    tools: list[Tool] | None = None

    @property
    def max_tokens(self) -> int:
        """Room for the reference (a byte is a token) and for a mistake to show."""
        return len(self.answer.encode()) + 32


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def ask(text: str, answer: str) -> Question:
    return exactly([user(text)], answer)


def exactly(messages: list[Message], answer: str) -> Question:
    return Question(messages, answer, lambda text: text.strip() == answer)


def as_json(messages: list[Message], value: dict[str, Any]) -> Question:
    """The check parses: spacing and the order of the fields are free."""
    return Question(messages, to_json(value), lambda text: parses_to(text, value))


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def parses_to(text: str, value: object) -> bool:
    try:
        return bool(json.loads(text) == value)
    except ValueError:
        return False
