"""More sequences than memory: the youngest gives way and goes on later, and every answer is what it would have been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shared.job import Sampling
from shared.prefix import prefix_names
from tests.worker.engine.driver import greedy, run, seeded, token_ids
from tests.worker.families import VOCAB_SIZE, computing_by, save
from worker.engine.engine import Engine, Request
from worker.engine.kv import KVSlots
from worker.model.attention import PAGE_LEN
from worker.model.loading import load

NUM_PAGES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Engine:
    return Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=8, prefill_chunk=64)


@pytest.fixture
def tight(folder: Path, roomy: Engine) -> Engine:
    """Memory for five pages: two sequences of the longest kind and a half."""
    num_bytes = NUM_PAGES * PAGE_LEN * roomy.model.kv_bytes_per_token
    return Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=8, prefill_chunk=64, kv_cache_bytes=num_bytes)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(length))


def long(name: str, seed: int, sampling: Sampling, n: int = 1) -> Request:
    """Crosses the border between two pages on its way."""
    return Request(name, prompt(PAGE_LEN - 40 + seed, seed), sampling, n)


REQUESTS = [long("greedy", 0, greedy(90)), long("seeded", 1, seeded(100, num_logprobs=1)),
            long("penalized", 2, seeded(80, repetition_penalty=1.3)), long("choices", 3, seeded(70), n=3)]


def test_who_has_to_wait_says_what_it_would_have_said(roomy: Engine, tight: Engine) -> None:
    expected = run(roomy, {0: REQUESTS})
    found = run(tight, {0: REQUESTS})
    assert tight.num_preempted > 0 == roomy.num_preempted
    assert {key: token_ids(outputs) for key, outputs in found.items()} == {
        key: token_ids(outputs) for key, outputs in expected.items()}
    assert [o.logprobs for o in found["seeded", 0] if o.logprobs] == [
        o.logprobs for o in expected["seeded", 0] if o.logprobs]


def test_the_oldest_never_waits_and_nobody_waits_for_ever(tight: Engine) -> None:
    """The first of six is never preempted, and they end in the order in which they came."""
    requests = [long(str(i), i, greedy(60 + 10 * i, speculative=False)) for i in range(6)]
    for request in requests:
        tight.add(request)
    ended: list[str] = []
    seen: dict[str, list[bool]] = {request.id: [] for request in requests}
    while tight.has_work:
        outputs = tight.step()
        assert tight.num_free_seqs == 0 or not tight.num_waiting
        drawn = {output.request_id for output in outputs if output.token_ids}
        for request in requests:
            seen[request.id].append(request.id in drawn)
        ended += [output.request_id for output in outputs if output.finish_reason]
        tight.check()
    assert tight.num_preempted > 0
    assert ended == [request.id for request in requests]
    first = seen["0"][seen["0"].index(True):][:60]
    assert all(first), "a token in each step from its first to its last"


def test_choices_that_do_not_fit_side_by_side_follow_each_other(roomy: Engine, tight: Engine) -> None:
    request = Request("many", prompt(PAGE_LEN + 30, 9), seeded(20), n=7)
    expected, found = run(roomy, {0: [request]}), run(tight, {0: [request]})
    assert {key: token_ids(outputs) for key, outputs in found.items()} == {
        key: token_ids(outputs) for key, outputs in expected.items()}


def test_what_is_kept_for_others_goes_before_anyone_has_to_wait(tight: Engine) -> None:
    kept = Request("kept", prompt(4 * 64 + 1, 20), greedy(2))
    names = prefix_names("", kept.prompt_token_ids, tight.chunks.piece_len)
    run(tight, {0: [kept]})
    assert {tight.chunks.cache.find(index, name) is None for index, name in enumerate(names)} == {False}
    run(tight, {0: [long(str(i), i, greedy(8)) for i in range(5)]})
    assert tight.num_preempted == 0
    assert {tight.chunks.cache.find(index, name) is None for index, name in enumerate(names)} == {True}


@pytest.mark.parametrize("num_steps", [1, 6, 30, 60, 75, 90])
def test_whoever_leaves_frees_what_it_held(tight: Engine, num_steps: int) -> None:
    """Aborted one choice after the other, some of them preempted."""
    for request in REQUESTS:
        tight.add(request)
    for _ in range(num_steps):
        tight.step()
        tight.check()
    tight.abort("choices", 1)
    tight.check()
    for request in REQUESTS:
        tight.abort(request.id)
        tight.check()
    assert not tight.has_work


def test_less_memory_than_one_sequence_needs_is_refused(folder: Path, roomy: Engine) -> None:
    num_bytes = PAGE_LEN * roomy.model.kv_bytes_per_token
    with pytest.raises(ValueError, match="lower max_model_len"):
        Engine(load(str(folder), dtype="bfloat16"), kv_cache_bytes=num_bytes)


def test_a_chunk_over_two_pages_is_kept_only_where_both_have_room(folder: Path, roomy: Engine) -> None:
    """Chunks of another length than pages or their parts: the third of this prompt lies on two. In slots, which share
    no pages."""
    num_bytes = 3 * PAGE_LEN * roomy.model.kv_bytes_per_token       # two that the sequence owns, and one
    with computing_by("torch"):
        engine = Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=2, prefill_chunk=96, kv_cache_bytes=num_bytes)
        outputs = run(engine, {0: [Request("long", prompt(300, 1), greedy(3))]})
    assert isinstance(engine.kv, KVSlots) and len(token_ids(outputs["long", 0])) == 3
    assert engine.chunks.cache.num_pieces == 1
