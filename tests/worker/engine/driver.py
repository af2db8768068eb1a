"""Runs an engine to its end, with requests that join on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from shared.job import Sampling
from worker.engine.engine import Engine, Output, Request

MAX_STEPS = 5000


def greedy(num_tokens: int, **sampling: Any) -> Sampling:
    return Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **sampling)


def seeded(num_tokens: int, seed: int = 5, **sampling: Any) -> Sampling:
    return Sampling(max_tokens=num_tokens, seed=seed, ignore_eos=True, **sampling)


CYCLE = tuple(range(10, 20))
MIXED = (
    Request("greedy", CYCLE * 2, greedy(6, num_logprobs=2)),
    Request("choices", (*range(30, 50), 5), seeded(6, temperature=0.7, num_logprobs=1), n=2),
    Request("shares a beginning", (*range(30, 48), 9), seeded(5, top_k=5, top_p=0.9)),
    Request("penalized", tuple(range(80, 90)), greedy(5, frequency_penalty=0.4, logit_bias=((7, 2.0),))),
    Request("one word", tuple(range(90, 100)), greedy(9, logit_bias=((7, 99.0),))),
)


def run(engine: Engine, arrivals: Mapping[int, Sequence[Request]]) -> dict[tuple[str, int], list[Output]]:
    """Outputs by (request id, choice). `arrivals` says before which step a request is added."""
    outputs: dict[tuple[str, int], list[Output]] = defaultdict(list)
    for step in range(MAX_STEPS):
        for request in arrivals.get(step, ()):
            engine.add(request)
        if step > max(arrivals) and not engine.has_work:
            engine.check()
            return outputs
        for output in engine.step():
            outputs[output.request_id, output.index].append(output)
    raise AssertionError(f"{engine!r} does not end")


def token_ids(outputs: Sequence[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def alone(engine: Engine, request: Request) -> dict[int, list[int]]:
    """Every choice's tokens when nothing else runs."""
    return {index: token_ids(outputs) for (_, index), outputs in run(engine, {0: [request]}).items()}
