"""A sequence's tokens do not depend on its neighbours, and another worker continues them exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.job import Sampling
from tests.worker.engine.driver import alone, greedy, run, seeded, token_ids
from tests.worker.families import VOCAB_SIZE, computing_by, save
from worker.engine.engine import Engine, Output, Request
from worker.engine.request import NOT_A_NUMBER
from worker.model import check
from worker.model.loading import load

CHUNK = 32


@pytest.fixture(scope="module", params=[
    ("llama", "float32", "ours"), ("llama", "bfloat16", "ours"), ("llama", "bfloat16", "torch"),
    ("mixtral", "float32", "ours"), ("mixtral", "bfloat16", "ours"), ("mixtral", "bfloat16", "torch"),
    ("gpt_oss", "bfloat16", "ours"), ("gemma2", "bfloat16", "ours")], ids="-".join)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    """Two workers of one `numerics_id`; on kernels of ours, where the processor has them, or on torch's."""
    family, dtype, kernels = request.param
    with computing_by(kernels):
        yield make_engines(family, dtype, tmp_path_factory)


def make_engines(family: str, dtype: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Engine]:
    folder: Path = save(family, tmp_path_factory.mktemp("m"), torch.float32 if dtype == "float32" else torch.bfloat16)
    pair = [Engine(load(str(folder), dtype=dtype), max_num_seqs=12, prefill_chunk=CHUNK) for _ in "ab"]
    assert pair[0].numerics_id == pair[1].numerics_id
    return pair


def test_bits_are_promised_to_be_equal_where_the_grid_does_not_matter(engines: list[Engine]) -> None:
    """Which a start on a busy machine makes finer."""
    model = engines[0].model
    finer = Engine(model, max_num_seqs=12, prefill_chunk=CHUNK // 2)
    fast = Engine(model, max_num_seqs=12, prefill_chunk=CHUNK, numerics="fast")
    assert (finer.numerics_id == engines[0].numerics_id) == model.is_uniform
    assert fast.numerics_id != engines[0].numerics_id


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(f"{seed}/{length}")
    return tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(length))


def test_where_only_one_number_of_rows_is_exact_all_forwards_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
    """As some processors have it, and not for that a GPU."""
    folder = save("mixtral", tmp_path, torch.float32)
    with computing_by("torch"):
        monkeypatch.setattr(check, "probe_row_limit", lambda model, num_seqs: (8, 8))
        engine = Engine(load(str(folder), dtype="float32"), max_num_seqs=12, prefill_chunk=CHUNK)
    assert (engine.model.min_rows, engine.model.max_rows) == (8, 8)
    requests = [Request(str(number), prompt(5 + number), greedy(4)) for number in range(9)]
    together = run(engine, {0: requests})
    for request in requests:
        outputs = run(engine, {0: [request]})[request.id, 0]
        assert token_ids(outputs) == token_ids(together[request.id, 0])


PENALTIES: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
EACH: dict[str, Sampling] = {
    "greedy": greedy(60),
    "seeded": seeded(60, seed=2**64 - 1, temperature=1.3),
    "truncated": seeded(60, top_p=0.8, top_k=40, min_p=0.02),
    "penalized": seeded(60, **PENALTIES),
    "biased": greedy(60, logit_bias=((5, 3.0), (9, -100.0)), num_logprobs=4),
}


@pytest.mark.parametrize("kind", EACH)
def test_neighbours_change_nothing(engines: list[Engine], kind: str) -> None:
    """Alone, and among others that join and leave: the same tokens and the same log probabilities, to the bit."""
    engine = engines[0]
    request = Request("it", prompt(45), EACH[kind])
    by_itself = run(engine, {0: [request]})["it", 0]
    crowd = {0: [Request(f"a{i}", prompt(10 * i + 5, i), seeded(20 + 7 * i, seed=i)) for i in range(4)],
             2: [request], 9: [Request(f"b{i}", prompt(33 + i, i), greedy(30)) for i in range(5)]}
    among_others = run(engine, crowd)["it", 0]
    assert flat(among_others) == flat(by_itself)


@pytest.mark.parametrize("kernels", ["ours", "torch"])
def test_layers_as_wide_as_real_ones_are_exact_too(tmp_path: Path, kernels: Any) -> None:
    """A wide product of one row takes another kernel than one of several, and rounds otherwise, in few places."""
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=1024, intermediate_size=4864, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=1, max_position_embeddings=512)
    module: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in (parameter for parameter in module.parameters() if parameter.dim() > 1):
            weight.normal_(0, 0.08)
    module.to(torch.bfloat16).save_pretrained(tmp_path)
    with computing_by(kernels):
        engine = Engine(load(str(tmp_path), dtype="bfloat16"), max_num_seqs=16)
        requests = [Request(f"{i}", prompt(20 + 30 * i, i), seeded(60, seed=i, num_logprobs=2)) for i in range(10)]
        together = run(engine, {0: requests})
        for request in requests:
            assert flat(run(engine, {0: [request]})[request.id, 0]) == flat(together[request.id, 0])


def test_who_shares_a_forward_says_what_he_says_apart(engines: list[Engine]) -> None:
    """Where the processor's products allow it: prompts of all lengths and answers at once, to the bit."""
    model = engines[0].model
    apart = Engine(replace(model, max_shared_rows=0), max_num_seqs=12, prefill_chunk=CHUNK)
    shared, larger = (Engine(model, max_num_seqs=12, prefill_chunk=CHUNK, prefill_budget=budget)
                      for budget in (CHUNK, 3 * CHUNK))
    assert apart.prefill_budget == CHUNK and larger.prefill_budget == (3 * CHUNK if model.is_uniform else CHUNK)
    arrivals = {step: [Request(f"{step}", prompt(1 + 7 * step, step), EACH[kind])]
                for step, kind in enumerate(list(EACH) * 3)}
    expected, *found = ({key: flat(outputs) for key, outputs in run(engine, arrivals).items()}
                        for engine in (apart, shared, larger))
    assert found == [expected, expected]


def flat(outputs: list[Output]) -> list[tuple[Any, ...]]:
    """Token by token, however many came at once."""
    return [pair for output in outputs for pair in zip_longest(output.token_ids, output.logprobs)]


@pytest.mark.parametrize("kind", EACH)
def test_another_worker_continues_exactly(engines: list[Engine], kind: str) -> None:
    """Cut after several numbers of tokens: what was published is replayed, and what follows is the same."""
    first, second = engines
    request = Request("it", prompt(45), EACH[kind])
    whole = run(first, {0: [request]})["it", 0]
    for cut in (1, 2, 7, 31, 33, 59):
        published = tuple(token_ids(whole)[:cut])
        continued = Request("it", request.prompt_token_ids, request.sampling, continued=(published,))
        noise = Request("other", prompt(20, cut), seeded(25))
        rest = run(second, {0: [noise, continued]})["it", 0]
        assert flat(rest) == flat(whole)[cut:], f"cut after {cut}"
        assert flat(run(second, {0: [continued]})["it", 0]) == flat(rest), f"alone, cut after {cut}"


def test_what_is_too_long_to_replay_is_prefilled(engines: list[Engine]) -> None:
    """Beyond `exact_replay_max_tokens` a choice goes on from a prefill of all that is known: in float32, and where
    chunks have the bits of rows, with the same tokens, else with valid ones; its short sibling is replayed exactly."""
    first, second = engines
    request = Request("it", prompt(45), greedy(60), n=2)
    whole = alone(first, request)
    continued = (tuple(whole[0][:40]), tuple(whole[1][:7]))
    second.exact_replay_max_tokens = 39
    try:
        assert second.replays_exactly(40) == second.model.is_uniform
        rest = alone(second, Request("it", prompt(45), request.sampling, n=2, continued=continued))
    finally:
        second.exact_replay_max_tokens = first.exact_replay_max_tokens
    assert rest[1] == whole[1][7:]
    assert len(rest[0]) == 20
    if second.model.dtype == torch.float32 or second.model.is_uniform:
        assert rest[0] == whole[0][40:]


def test_choices_share_a_prompt_and_nothing_else(engines: list[Engine]) -> None:
    """n choices differ, repeat with the seed, and each is what it would be if the others had ended before."""
    sampling = seeded(40, temperature=1.5)
    together = alone(engines[0], Request("it", prompt(50), sampling, n=4))
    assert len({tuple(ids) for ids in together.values()}) == 4
    cut = {index: ids[:10 + index] for index, ids in together.items()}
    rest = alone(engines[1], Request("it", prompt(50), sampling, n=4, finished=frozenset({1}),
                                     continued=tuple(tuple(cut[index]) for index in range(4))))
    assert {index: cut[index] + rest[index] for index in (0, 2, 3)} == {i: together[i] for i in (0, 2, 3)}
    assert 1 not in rest


def test_a_token_that_ended_an_answer_ends_a_continued_one(engines: list[Engine]) -> None:
    """The worker died after the last token was published, before the end was: the heir only says that it ended."""
    outputs = run(engines[0], {0: [Request("it", prompt(4), greedy(3), continued=((5, 6, 7),))]})["it", 0]
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [((), "length")]


def test_stop_tokens_end_an_answer_but_not_before_min_tokens(engines: list[Engine]) -> None:
    """The stop token is part of the answer; below min_tokens it is never drawn."""
    engine = engines[0]
    free = alone(engine, Request("it", prompt(9), greedy(30)))[0]
    stop = free[4]
    sampling = Sampling(max_tokens=30, temperature=0.0, stop_token_ids=(stop,), ignore_eos=True)
    (*_, last) = run(engine, {0: [Request("it", prompt(9), sampling)]})["it", 0]
    assert last.finish_reason == "stop"
    assert last.token_ids == (stop,)
    late = Sampling(max_tokens=30, temperature=0.0, stop_token_ids=(stop,), ignore_eos=True, min_tokens=20)
    assert stop not in alone(engine, Request("it", prompt(9), late))[0][:20]


def test_every_way_out_frees_its_slot(engines: list[Engine]) -> None:
    """Aborted while waiting, in prefill, in decode, one choice of several, and twice."""
    engine = engines[0]
    for steps in range(6):
        for i in range(5):
            engine.add(Request(f"r{i}", prompt(90, i), seeded(40), n=4))
        for _ in range(steps):
            engine.step()
        engine.abort("r0", 2)
        engine.abort("r0", 0)
        for i in range(5):
            engine.abort(f"r{i}")
            engine.abort(f"r{i}")
        assert not engine.has_work
        engine.check()


def test_a_half_computed_prompt_outlives_the_choice_that_computed_it(engines: list[Engine]) -> None:
    """The first choice is aborted between two chunks: the others say what they would have said."""
    engine, other = engines
    for steps in range(1, 4):
        request = Request("it", prompt(3 * CHUNK + 5, seed=steps), seeded(12), n=3)
        expected = alone(other, request)
        engine.add(request)
        for _ in range(steps):
            engine.step()
        engine.abort("it", 0)
        engine.check()
        assert engine.num_running == 2
        rest = {index: token_ids(outputs) for (_, index), outputs in run(engine, {0: []}).items()}
        assert rest == {index: expected[index] for index in (1, 2)}


def test_requests_wait_for_slots_in_order_of_arrival(engines: list[Engine]) -> None:
    """A request of many choices is not overtaken by small ones; one that waits can be aborted choice by choice."""
    engine = engines[0]
    engine.add(Request("first", prompt(8), seeded(30), n=8))
    engine.step()
    engine.add(Request("many", prompt(9), seeded(4), n=6))
    engine.add(Request("small", prompt(10), seeded(4)))
    engine.step()
    assert (engine.num_running, engine.num_waiting, engine.num_free_seqs) == (8, 7, 0)
    engine.abort("many", 0)
    engine.abort("many", 5)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (12, 1)
    assert set(run(engine, {0: []})) == {*(("first", i) for i in range(8)), *(("many", i) for i in range(1, 5)),
                                         ("small", 0)}


@pytest.mark.parametrize("wrong", [
    {"prompt_token_ids": ()}, {"prompt_token_ids": (VOCAB_SIZE,)}, {"prompt_token_ids": (-1,)},
    {"prompt_token_ids": (2,) * 600}, {"n": 0}, {"n": 99}, {"continued": ((1,), (2,))}, {"finished": frozenset({0})},
    {"sampling": greedy(0)}, {"sampling": greedy(4, logit_bias=((VOCAB_SIZE, 1.0),))},
    {"sampling": greedy(4, logit_bias=((1, float("nan")),))}, {"sampling": greedy(4, stop_token_ids=(-1,))},
    {"sampling": seeded(4, seed=-1)}, {"sampling": Sampling(max_tokens=4, temperature=float("nan"))},
    {"sampling": greedy(4, num_logprobs=10**6)}, {"continued": ((VOCAB_SIZE,),)},
], ids=str)
def test_what_could_harm_a_batch_is_refused(engines: list[Engine], wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"id": "it", "prompt_token_ids": (2, 3), "sampling": greedy(4)} | wrong
    with pytest.raises(ValueError, match=r"\w"):
        engines[0].add(Request(**fields))
    assert not engines[0].has_work


def test_numbers_that_are_none_end_their_request_alone(tmp_path: Path) -> None:
    """One token's embedding is NaN: who uses it ends with an error, the neighbour in the same batch goes on."""
    model = load(str(save("llama", tmp_path)), dtype="float32")
    engine = Engine(model, max_num_seqs=4, prefill_chunk=CHUNK)
    healthy = Request("healthy", prompt(12), greedy(30))
    expected = alone(engine, healthy)[0]
    poison = next(i for i in range(2, VOCAB_SIZE) if i not in (*expected, *healthy.prompt_token_ids))
    with torch.no_grad():
        model.module.model.embed_tokens.weight[poison] = float("nan")
    outputs = run(engine, {0: [healthy], 3: [Request("sick", (3, poison, 4), greedy(30))]})
    assert [output.finish_reason for output in outputs["sick", 0]] == [NOT_A_NUMBER]
    assert token_ids(outputs["healthy", 0]) == expected
