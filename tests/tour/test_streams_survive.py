"""What nobody else does: a worker dies in the middle of an answer, and the client reads on, to the byte."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.nursery import Nursery
from tests.system import MODEL, System, eventually

NUM_TOKENS = 900                                        # of each of two choices
LEASE_S = 1.0
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": NUM_TOKENS, "seed": 11, "temperature": 1.2, "n": 2,
                       "messages": [{"role": "user", "content": "Count from 1 to 100."}],
                       "extra_body": {"ignore_eos": True}, "presence_penalty": 0.5, "frequency_penalty": 0.1,
                       "stream_options": {"include_usage": True}, "stream": True}


@pytest.fixture(scope="module")
def pair(redis_url: str, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two workers, a short lease, a name of their own beside the other tests' model."""
    system = System(tmp_path_factory.mktemp("pair"), redis_url, lease_s=LEASE_S, idle_poll_s=0.2, allow_no_aof=True,
                    disconnect_grace_s=0.3,
                    served_model_name=f"pair,{MODEL}-pair", start=nursery.start)
    system.start_all(2)
    yield system
    system.stop()


class Reader:
    """Reads a stream chunk by chunk, so that something may happen in between."""

    def __init__(self, system: System, model: str = "pair", num_tokens: int = NUM_TOKENS, **fields: Any) -> None:
        client = openai.Client(base_url=f"{system.url}/v1", api_key="EMPTY", max_retries=0, timeout=60)
        self.texts = ["", ""]
        self.reasons: list[str | None] = [None, None]
        self.usage: Any = None
        self.ids: set[str] = set()
        self._stream = client.chat.completions.create(**ASK | {"model": model, "max_tokens": num_tokens} | fields)

    def read(self, num_characters: int | None = None) -> None:
        """Until so many characters have come, or to the end."""
        for chunk in self._stream:
            self.ids.add(chunk.id)
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self.texts[choice.index] += choice.delta.content or ""
                assert not (choice.finish_reason and self.reasons[choice.index])
                self.reasons[choice.index] = choice.finish_reason or self.reasons[choice.index]
            if num_characters and sum(map(len, self.texts)) >= num_characters:
                return

    @property
    def id(self) -> str:
        (only,) = self.ids
        return only

    @property
    def answer(self) -> tuple[Any, ...]:
        return self.texts, self.reasons, self.usage.completion_tokens, self.usage.prompt_tokens


@pytest.fixture(scope="module")
def uninterrupted(pair: System) -> tuple[Any, ...]:
    reader = Reader(pair)
    reader.read()
    assert reader.usage.completion_tokens == 2 * NUM_TOKENS
    return reader.answer


def begin(pair: System) -> Reader:
    """A stream in its middle."""
    reader = Reader(pair)
    reader.read(200)
    return reader


def test_a_killed_worker_is_not_noticed(pair: System, uninterrupted: tuple[Any, ...]) -> None:
    """SIGKILL in mid-stream: another worker replays what was published and goes on, token for token."""
    reader = begin(pair)
    worker = pair.worker_of(reader.id)
    worker.end(signal.SIGKILL)
    pair.workers.remove(worker)
    pair.start_worker()
    reader.read()
    assert reader.answer == uninterrupted
    assert any(fields["kind"] == "fence" and not i.startswith("1-") for i, fields in pair.log_entries(reader.id))
    pair.await_workers(2)


def test_a_killed_worker_is_not_noticed_by_who_must_keep_a_form(pair: System) -> None:
    """The grammar is where it was, for every choice."""
    regex = r"([a-z]{3,9} [0-9]{1,4}; ){25}"
    expected = Reader(pair, extra_body={"regex": regex})
    expected.read()
    reader = Reader(pair, extra_body={"regex": regex})
    reader.read(200)
    worker = pair.worker_of(reader.id)
    worker.end(signal.SIGKILL)
    pair.workers.remove(worker)
    pair.start_worker()
    reader.read()
    assert reader.answer == expected.answer
    assert all(re.fullmatch(regex, text) for text in reader.texts)
    assert reader.reasons == ["stop", "stop"]
    pair.await_workers(2)


def test_a_frozen_worker_that_wakes_is_not_heard(pair: System, uninterrupted: tuple[Any, ...]) -> None:
    """Stopped past its lease, then woken: what it says afterwards is refused, and it goes on working."""
    reader = begin(pair)
    worker = pair.worker_of(reader.id)
    worker.send(signal.SIGSTOP)
    heir = eventually("another worker has the job", lambda: other_worker(pair, reader.id, worker))
    worker.send(signal.SIGCONT)
    reader.read()
    assert reader.answer == uninterrupted
    assert heir is not worker
    epochs = [int(i.partition("-")[0]) for i, _ in pair.log_entries(reader.id)]
    assert epochs == sorted(epochs)
    assert max(epochs) >= 3
    eventually("the woken worker has learnt it", lambda: f"job {reader.id} is not ours any more" in worker.said)
    pair.await_workers(2)


def other_worker(system: System, completion_id: str, not_this: Any) -> Any:
    holder = system.worker_of(completion_id)
    return holder if holder is not not_this else None


def test_a_worker_that_leaves_hands_its_streams_over(pair: System, uninterrupted: tuple[Any, ...]) -> None:
    """SIGTERM, as when a spot machine goes: no lease has to run out."""
    reader = begin(pair)
    worker = pair.worker_of(reader.id)
    assert worker.end(signal.SIGTERM) == 0
    pair.workers.remove(worker)
    pair.start_worker()
    reader.read()
    assert reader.answer == uninterrupted
    assert "hands over 1 jobs" in worker.said
    pair.await_workers(2)


def test_a_client_that_leaves_frees_its_place(pair: System) -> None:
    """Its worker stands still meanwhile: it computes a whole answer in little more than the grace."""
    reader = begin(pair)
    worker = pair.worker_of(reader.id)
    worker.send(signal.SIGSTOP)
    reader._stream.close()
    eventually("no job lives", lambda: pair.num_live_jobs() == 0)
    worker.send(signal.SIGCONT)
    last = pair.log_entries(reader.id)[-1][1]
    assert last["kind"] == "end"
    assert '"error":"cancelled"' in last["data"]
    pair.await_workers(2)
