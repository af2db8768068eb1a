"""The fast mode: one forward for all, and in float32, where rounding hardly shows, the tokens of the exact one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.engine.driver import greedy, run, seeded, token_ids
from tests.worker.engine.test_preemption import NUM_PAGES, long, prompt
from tests.worker.families import computing_by, save
from worker.engine.engine import Engine, Request
from worker.model.attention import PAGE_LEN
from worker.model.loading import load
from worker.model.model import Model


@pytest.fixture(scope="module", params=["llama", "mixtral", "gemma2"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
            ) -> Iterator[tuple[Engine, Engine]]:
    """On torch's kernels: ours are exact in either mode."""
    folder: Path = save(request.param, tmp_path_factory.mktemp("m"))
    with computing_by("torch"):
        fast, exact = (Engine(load(str(folder), dtype="float32"), max_num_seqs=40, prefill_chunk=32, numerics=numerics)
                       for numerics in ("fast", "exact"))
        yield fast, exact


def test_prompts_and_answers_share_a_forward(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty that arrive one after the other, of many lengths: the same tokens, and one forward a step."""
    fast, exact = engines
    arrivals = {step: [Request(f"{step}", prompt(5 + 3 * step, step), (greedy if step % 2 else seeded)(30))]
                for step in range(40)}
    expected = run(exact, arrivals)
    count: Counter[str] = Counter()
    for owner, name in ((Model, "forward"), (Engine, "step")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, plain=plain: (count.update([name]), plain(*args))[1])
    found = run(fast, arrivals)
    assert {key: token_ids(outputs) for key, outputs in found.items()} == {
        key: token_ids(outputs) for key, outputs in expected.items()}
    assert count["forward"] == count["step"]


def test_a_started_answer_goes_on_from_a_prefill(engines: tuple[Engine, Engine]) -> None:
    fast, exact = engines
    request = Request("it", prompt(45, 1), seeded(40))
    whole = token_ids(run(exact, {0: [request]})["it", 0])
    continued = Request("it", request.prompt_token_ids, request.sampling, continued=(tuple(whole[:17]),))
    assert not fast.replays_exactly(17)
    assert token_ids(run(fast, {0: [continued]})["it", 0]) == whole[17:]


def test_a_prefill_that_ends_with_one_token_drafts_nothing(engines: tuple[Engine, Engine]) -> None:
    """The last chunk of a continued answer may be as short as a decode row, and is none."""
    fast, exact = engines
    sampling = greedy(60, logit_bias=((7, 99.0),))      # always the same token: a draft would be right
    request = Request("it", prompt(45, 2), sampling, continued=((7,) * (65 - 45),))
    assert (len(request.prompt_token_ids) + len(request.continued[0])) % fast.prefill_chunk == 1
    assert token_ids(run(fast, {0: [request]})["it", 0]) == token_ids(run(exact, {0: [request]})["it", 0]) == [7] * 40


def test_who_has_to_wait_goes_on_from_a_prefill(engines: tuple[Engine, Engine]) -> None:
    fast, exact = engines
    tight = Engine(fast.model, max_num_seqs=8, prefill_chunk=64, numerics="fast",
                   kv_cache_bytes=NUM_PAGES * PAGE_LEN * fast.model.kv_bytes_per_token)
    requests = [long(f"{i}", i, greedy(80)) for i in range(5)]
    expected, found = run(exact, {0: requests}), run(tight, {0: requests})
    assert tight.num_preempted > 0
    assert {key: token_ids(outputs) for key, outputs in found.items()} == {
        key: token_ids(outputs) for key, outputs in expected.items()}


def test_its_answers_are_not_taken_for_exact_ones(engines: tuple[Engine, Engine]) -> None:
    fast, exact = engines
    assert fast.numerics_id != exact.numerics_id
