"""A prompt's beginning that was computed before is copied, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.prefix import FAR_TOKENS, MAX_NAMES, prefix_names, some
from tests.worker.engine.driver import greedy, run, seeded, token_ids
from tests.worker.families import VOCAB_SIZE, save
from worker.engine.engine import PIECE_TOKENS, Engine, Output, Request
from worker.engine.paged import KVPages
from worker.engine.prefix import PrefixCache
from worker.engine.request import NOT_A_NUMBER
from worker.model.attention import PAGE_LEN
from worker.model.loading import load

CHUNK = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("m"))


@pytest.fixture(params=[CHUNK, 2 * CHUNK])
def engine(folder: Path, request: pytest.FixtureRequest) -> Engine:
    """Which computes one chunk in a step, or two."""
    return Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=4, prefill_chunk=CHUNK,
                  prefill_budget=request.param)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(length))


def cached(outputs: list[Output]) -> int:
    """As it is counted, once."""
    assert not any(output.num_cached_tokens for output in outputs[1:])
    return outputs[0].num_cached_tokens


def test_a_hit_gives_the_same_tokens_as_a_miss(engine: Engine, folder: Path) -> None:
    """Alone without a cache, then with ever longer common beginnings: the same tokens, counted as they were found."""
    plain = Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=4, prefill_chunk=CHUNK,
                   enable_prefix_caching=False)
    system = prompt(3 * CHUNK)
    of_answer = CHUNK if engine.model.is_uniform else 0     # the last chunk of a prompt, which an answer follows
    for length, expected in ((CHUNK, 0), (2 * CHUNK + 5, of_answer), (3 * CHUNK, 2 * CHUNK), (3 * CHUNK, 2 * CHUNK)):
        request = Request("it", system[:length], seeded(20, num_logprobs=2))
        (outputs,) = run(engine, {0: [request]}).values()
        (reference,) = run(plain, {0: [request]}).values()
        assert [(o.token_ids, o.logprobs) for o in outputs] == [(o.token_ids, o.logprobs) for o in reference]
        assert cached(outputs) == expected
        assert cached(reference) == 0


def test_a_smaller_grid_forgets_what_was_kept_on_the_larger_one(engine: Engine) -> None:
    request = Request("it", prompt(5 * CHUNK), seeded(12, num_logprobs=2))
    expected = run(engine, {0: [request]})["it", 0]
    engine.limit_prefill(CHUNK // 2)
    for num_cached in (0, 9 * CHUNK // 2):
        found = run(engine, {0: [request]})["it", 0]
        assert [(o.token_ids, o.logprobs) for o in found] == [(o.token_ids, o.logprobs) for o in expected]
        assert cached(found) == num_cached


def test_those_who_arrive_together_compute_a_common_beginning_once(engine: Engine) -> None:
    shared = prompt(4 * CHUNK)
    requests = [Request(f"{i}", (*shared, 2 + i), greedy(5), n=2) for i in range(2)]
    outputs = run(engine, {0: requests})
    assert [cached(outputs["0", choice]) for choice in range(2)] == [0, 0]
    assert [cached(outputs["1", choice]) for choice in range(2)] == [4 * CHUNK] * 2


def test_another_salt_finds_nothing(engine: Engine) -> None:
    """A tenant does not learn from the time to first token what another one asked."""
    request = Request("it", prompt(3 * CHUNK), greedy(3), salt="one tenant")
    run(engine, {0: [request]})
    assert cached(run(engine, {0: [request]})["it", 0]) == 2 * CHUNK
    other = Request("it", prompt(3 * CHUNK), greedy(3), salt="another")
    assert cached(run(engine, {0: [other]})["it", 0]) == 0


def test_a_continued_answer_finds_its_prompt_too(engine: Engine) -> None:
    request = Request("it", prompt(3 * CHUNK + 1), seeded(30))
    whole = token_ids(run(engine, {0: [request]})["it", 0])
    continued = Request("it", request.prompt_token_ids, request.sampling, continued=(tuple(whole[:11]),))
    outputs = run(engine, {0: [continued]})["it", 0]
    assert token_ids(outputs) == whole[11:]
    assert not any(output.num_cached_tokens for output in outputs), "it was counted when the answer began"


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_an_answer_is_found_in_the_next_turn(is_cut_off: bool, folder: Path) -> None:
    """Also one that ended by a stop string, of which the engine is told; under the salt of its tenant alone."""
    cold, warm = (Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=3, enable_prefix_caching=keeps)
                  for keeps in (False, True))
    if not warm.model.is_uniform:
        pytest.skip("torch computes: rows have bits of their own")
    first = Request("first", prompt(50), seeded(150), n=2, salt="tenant")
    said, most = list[int](), 100 if is_cut_off else 150
    warm.add(first)
    while len(said) < most:
        said += [token_id for output in warm.step() if output.index == 1 for token_id in output.token_ids]
    warm.abort("first")
    for salt, num_found in (("other", 0), ("tenant", (50 + len(said) - 1) // PIECE_TOKENS * PIECE_TOKENS)):
        turn = Request("turn", (*first.prompt_token_ids, *said, *prompt(40, 3)), seeded(9, num_logprobs=1), salt=salt)
        found, expected = (run(engine, {0: [turn]})["turn", 0] for engine in (warm, cold))
        assert [(o.token_ids, o.logprobs) for o in found] == [(o.token_ids, o.logprobs) for o in expected]
        assert cached(found) == num_found


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_kept_and_found_and_evicted_the_answers_are_the_same(seed: int, folder: Path) -> None:
    """Conversations that branch, short of memory, some of them cancelled; with drafts, and choices of one prompt."""
    draw, model = random.Random(seed), load(str(folder), dtype="bfloat16")
    num_bytes = draw.choice([3, 5, 9]) * PAGE_LEN * model.kv_bytes_per_token
    cold, warm = (Engine(model, max_num_seqs=4, prefill_chunk=64, kv_cache_bytes=num_bytes, enable_prefix_caching=keeps)
                  for keeps in (False, True))
    histories, num_found = [prompt(draw.randint(1, 300), seed) for _ in range(2)], 0
    for turn in range(12):
        requests = []
        for number in range(draw.randint(1, 5)):
            history = draw.choice(histories)
            ids = (*history[:draw.randint(1, len(history))], *prompt(draw.randint(1, 90), draw.randint(0, 3)))[:400]
            sampling = seeded(draw.randint(1, 70), seed=number)
            requests.append(Request(f"{turn}/{number}", ids, sampling, n=draw.randint(1, 2)))
        warm.add(leaver := replace(requests[0], id="leaver"))
        for _ in range(draw.randint(0, 30)):
            warm.step()
        warm.abort(leaver.id)
        found = run(warm, {2 * number: [request] for number, request in enumerate(requests)})
        for request in requests:
            for key, outputs in run(cold, {0: [request]}).items():
                assert token_ids(found[key]) == token_ids(outputs)
                histories.append((*request.prompt_token_ids, *token_ids(outputs)))
        num_found += sum(cached(outputs) for outputs in found.values())
    assert num_found


def test_the_least_recently_used_piece_goes_first() -> None:
    cache = PrefixCache(range(8, 10))

    def place(first: int, *names: str, beside: int | None = None) -> tuple[int, list[int]]:
        slot, in_the_way = cache.choose(first, first + len(names), beside)
        for index in in_the_way:
            cache.evict((index, slot))
        cache.place(first, names, slot)
        return slot, in_the_way

    assert [place(0, "a"), place(0, "b"), place(1, "c", beside=8)] == [(8, []), (9, []), (8, [])]
    assert (cache.find(0, "a"), cache.find(0, "c"), cache.find(1, "c")) == (8, None, 8)
    cache.use(["a", "c"])
    assert place(0, "d", "e") == (9, [0]), "no slot is empty: where the oldest piece is"
    assert (cache.find(0, "b"), cache.find(0, "a"), cache.find(0, "d"), cache.find(1, "e")) == (None, 8, 9, 9)
    assert place(2, "f", beside=9) == (9, []) and place(1, "g", beside=9) == (8, [1]), "its place is taken"
    assert cache.forget(["d", "e", "x"]) == [(0, 9), (1, 9)]
    assert cache.forget(["d"]) == [] and cache.find(0, "d") is None
    assert place(0, "d", beside=9) == (9, []), "its place is free again"
    cache.use(["a", "g"])
    assert [cache.evict() for _ in range(4)] == [(2, 9), (0, 9), (1, 8), (0, 8)], "no piece before those behind it"
    assert cache.num_pieces == 0 and {place(0, "h")[0], place(0, "i")[0]} == {8, 9}


def test_what_is_used_is_not_evicted_for_a_tail_that_is_not() -> None:
    """The oldest piece of all is behind two that every other request needs."""
    cache = PrefixCache(range(2))
    cache.place(0, ["system", "prompt", "tail"], 0)
    cache.place(0, ["other"], 1)
    cache.use(["system", "prompt"])
    assert cache.choose(0, 2, None) == (1, [0])
    assert cache.choose(1, 2, None) == (1, []), "nothing is in the way there"
    cache.use(["other"])
    assert cache.choose(2, 3, None) == (0, [2])


def test_more_conversations_than_run_at_once_are_kept(folder: Path) -> None:
    """As many as memory has room for, whatever else they have in common."""
    engine = Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=2, prefill_chunk=CHUNK)
    if not isinstance(engine.kv, KVPages):
        pytest.skip("torch attends: there are as many slots for prefixes as for sequences")
    requests = [Request(str(i), prompt(2 * CHUNK + 9, i % 5) + prompt(CHUNK, i), greedy(2)) for i in range(20)]
    found = [cached(run(engine, {0: [request]})[request.id, 0]) for request in requests * 2]
    assert found == [0] * 5 + [2 * CHUNK] * 15 + [3 * CHUNK] * 20


@pytest.mark.parametrize("length", [100, 3 * PIECE_TOKENS, 500, 1000])
def test_a_common_beginning_is_found_nearly_to_its_end(length: int, folder: Path) -> None:
    """In pieces smaller than chunks, whole pages of them at once, where a token's bits do not depend on chunks."""
    cold, warm = (Engine(load(str(folder), dtype="bfloat16"), max_num_seqs=2, prefill_chunk=4 * PIECE_TOKENS,
                         enable_prefix_caching=keeps) for keeps in (False, True))
    if warm.chunks.piece_len != PIECE_TOKENS:
        pytest.skip("torch computes: chunks have bits of their own")
    for seed in range(4):
        request = Request("it", (prompt(length) + prompt(40, seed + 1))[:500], seeded(8, num_logprobs=1))
        found, expected = (run(engine, {0: [request]})["it", 0] for engine in (warm, cold))
        assert [(o.token_ids, o.logprobs) for o in found] == [(o.token_ids, o.logprobs) for o in expected]
        num_common = min(length, 499) if seed else 0
        assert 0 <= num_common - cached(found) < PIECE_TOKENS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_failure_leaves_nothing_behind(folder: Path, dtype: Any) -> None:
    """However often: chunks before what is no number are computed anew, and their memory is found again."""
    engine = Engine(load(str(folder), dtype=dtype), max_num_seqs=4, prefill_chunk=CHUNK)
    shared, poison = prompt(3 * CHUNK), VOCAB_SIZE - 1
    healthy = Request("healthy", (*shared, 2), greedy(5))
    sick = Request("sick", (*shared, poison), greedy(5))
    expected = token_ids(run(engine, {0: [healthy]})["healthy", 0])
    assert poison not in (*shared, *expected)
    with torch.no_grad():
        engine.model.module.model.embed_tokens.weight[poison] = float("nan")
    for _ in range(3):
        outputs = run(engine, {0: [sick], 2: [healthy]})
        assert token_ids(outputs["healthy", 0]) == expected
        assert [output.finish_reason for output in outputs["sick", 0]] == [NOT_A_NUMBER]
    engine.check()
    engine.chunks.drop_all()
    assert engine.kv.num_free_pages == engine.kv.num_pages


def test_names_are_equal_exactly_when_all_before_is() -> None:
    ids = prompt(100)
    names = prefix_names("t", ids, 32)
    assert len(names) == 3
    assert prefix_names("t", ids[:97], 32) == names
    assert prefix_names("t", ids[:96], 32) == names[:2], "the chunk with the last token is computed always"
    changed = prefix_names("t", (*ids[:40], 0, *ids[41:]), 32)
    assert changed[0] == names[0]
    assert not set(changed[1:]) & set(names), "a change reaches every name behind it"
    assert not set(names) & {*prefix_names("u", ids, 32), *prefix_names("t", ids, 16), *prefix_names("t", ids[1:], 32)}


@pytest.mark.parametrize("piece_tokens", [32, 256, 512])
def test_of_a_long_prompt_the_first_names_and_the_last_count(piece_tokens: int) -> None:
    """Prompts with a common beginning have common names, wherever one of them goes on; short ones have none."""
    def far(length: int) -> tuple[str, ...]:
        return some(prefix_names("t", tuple(range(length)), piece_tokens), piece_tokens)

    assert not far(FAR_TOKENS) and far(2 * max(FAR_TOKENS, piece_tokens))
    first, later = far(20_000), far(20_000 + 5 * FAR_TOKENS)
    assert len(first) == len(later) == MAX_NAMES and first[:MAX_NAMES // 2] == later[:MAX_NAMES // 2]
    assert len(set(first[MAX_NAMES // 2:]) & set(later)) >= 2
