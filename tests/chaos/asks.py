"""What the clients of these runs request: each request has one right answer, and is hard to continue in its own way.

In the ranges used here the built-in model counts without mistakes, so arithmetic is a second judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from api.wire.responses import WITH_LOGPROBS
from tests.chaos.languages import BACKGROUND, CHAT, MESSAGES, RESPONSES, Language


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `counts`: the text of every choice, if arithmetic knows it."""

    name: str
    content: str
    fields: dict[str, Any] = field(default_factory=dict)
    counts: str = ""
    language: Language = CHAT

    @property
    def num_choices(self) -> int:
        return int(self.fields.get("n", 1))

    def body(self, model: str) -> dict[str, Any]:
        """The body as it is sent."""
        return {"model": model} | self.language.body(self.content) | self.fields


def count(first: int, last: int, **fields: Any) -> Ask:
    name = f"count {first}-{last}" + " twice" * ("n" in fields)
    return Ask(name, f"Count from {first} to {last}.", {"temperature": 0} | fields, numbers(first, last))


def numbers(first: int, last: int) -> str:
    return ", ".join(map(str, range(first, last + 1)))


NUMBERS = numbers(1, 60)
RAMBLE = {"temperature": 1.3, "ignore_eos": True}       # unpredictable tokens: only equal noise reproduces them

ASKS = (
    count(1, 60),
    count(7, 66),
    count(35, 98),
    count(1, 60, n=2),
    Ask("sampled", "Count from 1 to 60.", RAMBLE | {"seed": 11}),
    Ask("another seed", "Count from 1 to 60.", RAMBLE | {"seed": 12}),
    Ask("sampled twice", "Count from 3 to 50.", RAMBLE | {"seed": 13, "n": 2, "max_tokens": 150}),
    Ask("stopped", "Count from 1 to 100.", {"temperature": 0, "stop": [", 61"]}, NUMBERS),
    Ask("a stop string that never comes", "Spell basket.", RAMBLE | {"seed": 14, "stop": ["1, 2, 3, 4, 5, 6"]}),
    Ask("log probabilities", "Count from 1 to 40.", {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
    Ask("sampled log probabilities", "Reverse window.", RAMBLE | {"seed": 15, "logprobs": True, "max_tokens": 200}),
    Ask("penalties", "Count from 1 to 100.", RAMBLE | {"seed": 16, "presence_penalty": 0.6, "frequency_penalty": 0.2,
                                                       "repetition_penalty": 1.1}),
    Ask("a form to keep", "Say something.", {"temperature": 1.3, "seed": 18, "regex": "([a-z]{2,8} [0-9]{1,3}; ){18}"}),
    Ask("a narrow draw", "Spell yellow.", {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "seed": 17,
                                           "ignore_eos": True, "logit_bias": {"65": 2}}),
    Ask("a response", "Count from 1 to 60.", {"temperature": 0}, NUMBERS, RESPONSES),
    Ask("a sampled response", "Count from 1 to 60.", RAMBLE | {"seed": 19, "include": [WITH_LOGPROBS]},
        language=RESPONSES),
    Ask("a response in the background", "Count from 1 to 60.", {"temperature": 0}, NUMBERS, BACKGROUND),
    Ask("sampled in the background", "Count from 1 to 60.", RAMBLE | {"seed": 20}, language=BACKGROUND),
    Ask("a message", "Count from 1 to 60.", {"temperature": 0}, NUMBERS, MESSAGES),
    Ask("a message that is stopped", "Count from 1 to 100.", {"temperature": 0, "stop_sequences": [", 61"]}, NUMBERS,
        MESSAGES),
)
