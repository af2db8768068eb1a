"""A step that finds no memory: fewer run from then on, and every answer is what it would have been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.job import Sampling
from tests.worker.engine.driver import alone, greedy, run, seeded, token_ids
from tests.worker.families import VOCAB_SIZE, save
from worker.engine.engine import Engine, Request
from worker.engine.request import OUT_OF_MEMORY
from worker.model.loading import load
from worker.model.slots import DecodeRows, PrefillChunk, Together

NUM_SEQS, ROOM = 8, 3
TOO_MANY_BYTES = 1 << 55


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("m"))


def build(folder: Path, numerics: Any = "exact") -> Engine:
    return Engine(load(str(folder), dtype="float32"), max_num_seqs=NUM_SEQS, prefill_chunk=64, numerics=numerics)


def request(name: str, seed: int, sampling: Sampling, n: int = 1) -> Request:
    draw = random.Random(seed)
    return Request(name, tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(70 + seed)), sampling, n)


ARRIVALS = {0: [request("greedy", 0, greedy(60)), request("seeded", 1, seeded(50, num_logprobs=1))],
            9: [request("penalized", 2, seeded(40, repetition_penalty=1.3)), request("choices", 3, seeded(30), 3)]}


def starve(engine: Engine, kind: Any, room: int) -> Any:
    """A real allocation fails in every such forward, while more than `room` sequences run."""
    def allocate(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs["context"], kind) and engine.num_running > room:
            torch.empty(TOO_MANY_BYTES)

    return engine.model.module.register_forward_pre_hook(allocate, with_kwargs=True)


@pytest.mark.parametrize(("kind", "numerics"), [
    (DecodeRows, "exact"), (PrefillChunk | Together, "exact"), (Together, "fast")], ids=str)
def test_fewer_run_and_say_what_they_would_have_said(
        folder: Path, caplog: pytest.LogCaptureFixture, kind: Any, numerics: str) -> None:
    """Also where the decode of a step had drawn tokens before its prefill failed. Fast answers round otherwise."""
    expected, engine = run(build(folder, numerics), ARRIVALS), build(folder, numerics)
    starve(engine, kind, ROOM)
    found = run(engine, ARRIVALS)
    assert engine.num_preempted > ROOM and engine.batch.limit.num_seqs <= ROOM
    assert "no memory for a step of" in caplog.text
    assert engine.num_free_seqs == NUM_SEQS, "an idle engine takes what is larger than its limit, or nobody does"
    assert {key: len(token_ids(outputs)) for key, outputs in found.items()} == {
        key: len(token_ids(outputs)) for key, outputs in expected.items()}
    if numerics == "exact":
        for key, outputs in expected.items():
            assert token_ids(found[key]) == token_ids(outputs)
            assert list(_logprobs(found[key])) == list(_logprobs(outputs))


def _logprobs(outputs: Any) -> Iterator[Any]:
    return (logprobs for output in outputs for logprobs in output.logprobs)


def test_who_finds_no_memory_alone_fails_alone(folder: Path) -> None:
    engine = build(folder)
    healthy = request("healthy", 4, greedy(9))
    expected = alone(engine, healthy)
    hook = starve(engine, DecodeRows, 0)
    outputs = run(engine, {0: [request("large", 0, greedy(9))]})["large", 0]
    assert outputs[-1].finish_reason == OUT_OF_MEMORY
    hook.remove()
    assert alone(engine, healthy) == expected
