"""A step is launched before the outcome of the one before it is read, and nobody can tell from the answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.worker.engine.driver import CYCLE, MIXED, greedy, run, seeded, token_ids
from tests.worker.families import save
from worker.engine.engine import Engine, Output, Request
from worker.engine.sampler import Draws, Sampler
from worker.model.attention import PAGE_LEN
from worker.model.loading import load
from worker.model.model import Model

MORE = (Request("of one token", (1, 2, 3), greedy(1)),
        Request("began elsewhere", (4, 5, 6), seeded(12), continued=((7, 8, 9, 10, 11),)))
ARRIVALS = {0: MIXED[:2], 7: (*MIXED[2:], *MORE[:1]), 11: MORE[1:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("m"))


@pytest.fixture
def model(folder: Path) -> Model:
    return load(str(folder), dtype="float32")


def make_engine(model: Model, *, runs_ahead: bool, **options: Any) -> Engine:
    return Engine(model, max_num_seqs=8, prefill_chunk=16, runs_ahead=runs_ahead, **options)


def answers(outputs: dict[tuple[str, int], list[Output]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {key: (token_ids(some), [o.logprobs for o in some if o.logprobs], some[-1].finish_reason,
                  some[0].num_cached_tokens) for key, some in outputs.items()}


@pytest.mark.parametrize("num_speculative_tokens", [0, 8], ids=["plain", "drafts"])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_answers_are_the_same(model: Model, numerics: str, num_speculative_tokens: int) -> None:
    """Drafts, choices, found beginnings, penalties that count what is pending, a single token, a replay."""
    options: dict[str, Any] = {"numerics": numerics, "num_speculative_tokens": num_speculative_tokens}
    waiting, ahead = (make_engine(model, runs_ahead=runs_ahead, **options) for runs_ahead in (False, True))
    got = {key: some[:3] for key, some in answers(run(ahead, ARRIVALS)).items()}
    expected = {key: some[:3] for key, some in answers(run(waiting, ARRIVALS)).items()}
    if numerics == "fast":                              # other rows share its forwards, so the last bits may differ
        got, expected = ({key: (some[0], some[2]) for key, some in of.items()} for of in (got, expected))
    assert got == expected
    assert bool(ahead.num_accepted_tokens) == bool(num_speculative_tokens)


def test_an_end_that_nobody_foresaw_costs_a_row_and_no_token(model: Model) -> None:
    """A stop token is known when the next step is on its way already; the slot then serves another."""
    engine = make_engine(model, runs_ahead=True, num_speculative_tokens=0)
    free = token_ids(run(engine, {0: [Request("free", CYCLE, greedy(20))]})["free", 0])
    place = next(i for i, token_id in enumerate(free) if i > 2 and token_id not in free[:i])
    stopped = Request("stopped", CYCLE, greedy(20, stop_token_ids=(free[place],)))
    others = [Request(f"{i}", CYCLE, greedy(20)) for i in range(12)]
    found = run(engine, {0: [stopped], place + 1: others})
    assert token_ids(found["stopped", 0]) == free[:place + 1]
    assert found["stopped", 0][-1].finish_reason == "stop"
    assert all(token_ids(found[f"{i}", 0]) == free for i in range(12))


def test_who_leaves_in_flight_is_not_heard_again(model: Model) -> None:
    """Cancelled between launch and landing; the same id may come again at once, into the same slot."""
    engine = make_engine(model, runs_ahead=True, num_speculative_tokens=0)
    expected = token_ids(run(engine, {0: [Request("it", CYCLE, greedy(8))]})["it", 0])
    engine.add(Request("it", tuple(range(50, 60)), greedy(30)))
    for _ in range(4):
        engine.step()
    engine.abort("it")
    assert token_ids(run(engine, {0: [Request("it", CYCLE, greedy(8))]})["it", 0]) == expected


def test_memory_that_runs_out_makes_someone_give_way_who_knows_all_that_he_drew(model: Model) -> None:
    requests = [Request(f"{i}", tuple(range(10, 40)), seeded(PAGE_LEN, seed=i)) for i in range(3)]
    num_bytes = 4 * PAGE_LEN * model.kv_bytes_per_token             # each wants two pages
    engines = [make_engine(model, runs_ahead=runs_ahead, kv_cache_bytes=num_bytes, num_speculative_tokens=0,
                           max_model_len=2 * PAGE_LEN) for runs_ahead in (False, True)]
    waiting, ahead = (answers(run(engine, {0: requests})) for engine in engines)
    assert ahead == waiting
    assert all(engine.num_preempted for engine in engines)


def test_a_step_that_fails_loses_nothing_of_the_one_in_flight(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model, runs_ahead=True, num_speculative_tokens=0)
    requests = [Request(f"{i}", (*CYCLE, i), seeded(12, seed=i)) for i in range(4)]
    expected = answers(run(engine, {0: requests}))
    decode, num_calls = model.decode, 0

    def fail_once(*args: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise MemoryError
        return decode(*args)

    monkeypatch.setattr(Model, "decode", lambda _, *args: fail_once(*args))
    assert answers(run(engine, {0: requests})) == expected
    assert num_calls > 5


def test_it_is_ahead(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward but the first is launched while one outcome is unread, and an engine that waits never does so."""
    log: list[str] = []
    monkeypatch.setattr(Model, "forward_tensors", noted(log, "forward", Model.forward_tensors))
    monkeypatch.setattr(Draws, "read", noted(log, "read", Draws.read))
    request = Request("it", CYCLE, greedy(4, speculative=False))
    for runs_ahead, expected in ((True, ["forward"] + ["forward", "read"] * 3 + ["read"]),
                                 (False, ["forward", "read"] * 4)):
        engine = make_engine(model, runs_ahead=runs_ahead)
        log.clear()
        run(engine, {0: [request]})
        assert log == expected


def test_it_is_ahead_of_text_that_gives_no_drafts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only now and then it waits, for all sequences at once, to see what was drawn."""
    log: list[str] = []
    monkeypatch.setattr(Sampler, "sample", noted(log, "launch", Sampler.sample))
    monkeypatch.setattr(Draws, "read", noted(log, "read", Draws.read))
    engine = make_engine(model, runs_ahead=True)
    run(engine, {0: [Request(f"{seed}", CYCLE, seeded(80, seed=seed, temperature=50.0)) for seed in range(3)]})
    num_unread = accumulate(1 if what == "launch" else -1 for what in log)
    assert not engine.num_draft_tokens
    assert 0.8 < sum(num > 1 for num in num_unread) / log.count("launch") < 1


def noted(log: list[str], what: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        log.append(what)
        return method(*args, **kwargs)

    return call
