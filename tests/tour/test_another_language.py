"""Anthropic's SDK, unmodified, over the same jobs: it streams, calls tools, and hears what ended an answer."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.system import MODEL, System

GREEDY = {"temperature": 0}
COUNT: Any = [{"role": "user", "content": "Count from 1 to 40."}]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS: Any = [{"name": "get_weather", "description": "The weather in a city", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}}]


@pytest.fixture(scope="module")
def client(system: System) -> anthropic.Client:
    return anthropic.Client(base_url=system.url, api_key="EMPTY", max_retries=0, timeout=60)


def test_it_streams(client: anthropic.Client) -> None:
    """And counts before what it is charged after."""
    with client.messages.stream(model=MODEL, max_tokens=256, messages=COUNT, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == ", ".join(map(str, range(1, 41)))
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model=MODEL, messages=COUNT).input_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == counted


def test_it_is_told_which_words_ended_an_answer(client: anthropic.Client) -> None:
    message = client.messages.create(model=MODEL, max_tokens=256, messages=COUNT, stop_sequences=[", 9", ", 6"],
                                     extra_body=GREEDY)
    assert message.content[0].type == "text" and message.content[0].text == "1, 2, 3, 4, 5"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", 6")


def test_it_calls_a_tool_and_tells_its_result(client: anthropic.Client) -> None:
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": TOOLS, "extra_body": GREEDY}
    message = client.messages.create(**options, messages=QUESTION)
    (call,) = message.content
    assert message.stop_reason == "tool_use" and call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 21 degrees"}
    told = [*QUESTION, message.to_param(), {"role": "user", "content": [result]}]
    (said,) = client.messages.create(**options, messages=told).content
    assert said.type == "text" and "sunny" in said.text and "21" in said.text


def test_it_runs_a_tool(client: anthropic.Client) -> None:
    """The runner begins with a thread, and sends the whole conversation once it is told that there are none."""
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: its name
        """
        return f"sunny, {len(city)} degrees"

    runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=200, tools=[get_weather], messages=QUESTION,
                                              extra_body=GREEDY)
    *_, last = list(runner)
    (said,) = last.content
    assert said.type == "text" and "sunny" in said.text and "5" in said.text
