"""What Baton does, through the official SDK: read this first."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.system import MODEL, System

COUNT: Any = [{"role": "user", "content": "Count from 1 to 40."}]


@pytest.fixture(scope="module")
def client(system: System) -> openai.Client:
    return openai.Client(base_url=f"{system.url}/v1", api_key="EMPTY", max_retries=0, timeout=60)


def test_an_answer_streams_with_its_usage(client: openai.Client, capsys: pytest.CaptureFixture[str]) -> None:
    """The program of the README, as it stands there."""
    stream = client.chat.completions.create(model="baton-tiny", messages=COUNT, stream=True,
                                            stream_options={"include_usage": True}, max_tokens=256)
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="")
        if chunk.usage:
            print(f"\nTokens: {chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens}")
    answer, tokens = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert answer == ", ".join(map(str, range(1, 41)))
    assert tokens.startswith("Tokens: ")


def test_without_stream_options_every_chunk_has_a_choice(client: openai.Client) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=COUNT, stream=True, max_tokens=256)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == ", ".join(map(str, range(1, 41)))


def test_streamed_or_not_the_answer_is_the_same(client: openai.Client) -> None:
    """Text, finish reason and usage, for a seeded draw as well."""
    options: dict[str, Any] = {"model": MODEL, "messages": COUNT, "max_tokens": 48, "seed": 7, "n": 3}
    whole = client.chat.completions.create(**options)
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**options))
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[0].delta.role == "assistant"
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1


def test_a_seed_repeats_and_choices_differ(client: openai.Client) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(model=MODEL, messages=COUNT, seed=seed, temperature=2.0, n=4,
                                                max_tokens=256, extra_body={"ignore_eos": True})
        return [choice.message.content for choice in answer.choices]

    first = ask(1)
    assert first == ask(1)
    assert len(set(first)) == 4
    assert first != ask(2)


def test_a_beginning_that_was_computed_before_is_not_computed_again(client: openai.Client) -> None:
    """A shared system prompt: the second answer is the same, and says how much of its prompt was found."""
    system = "You are helpful. " * 20
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": "Spell apple."}]
    first, second = (client.chat.completions.create(model=MODEL, messages=messages, temperature=0) for _ in range(2))
    assert first.choices[0].message == second.choices[0].message
    assert second.usage and second.usage.prompt_tokens_details
    assert 256 <= (second.usage.prompt_tokens_details.cached_tokens or 0) < second.usage.prompt_tokens


def test_a_stop_string_ends_the_answer_before_it(client: openai.Client) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=COUNT, stop=[", 17"], max_tokens=256)
    assert answer.choices[0].message.content == ", ".join(map(str, range(1, 17)))
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_their_bytes(client: openai.Client) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=COUNT, max_tokens=8, logprobs=True, top_logprobs=3,
                                            temperature=0)
    choice = answer.choices[0]
    assert choice.logprobs
    assert choice.logprobs.content
    assert b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content).decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_a_wrong_request_is_refused_as_openai_refuses_it(client: openai.Client) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-none", messages=COUNT)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model=MODEL, messages=COUNT, max_tokens=10**6)


def test_the_models_are_listed(client: openai.Client) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
