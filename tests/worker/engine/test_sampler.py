"""Each stage against a reference that may sort and loop, and the noise against what it should look like."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.job import Sampling
from worker.engine import rng
from worker.engine.params import Params
from worker.engine.sampler import Row, Sampler

VOCAB_SIZE = 500
PINNED_KEY = 8764810008325594656
PINNED_BITS = [57590591, 112567244, 1269302096, 172160985]


def sampler_of(sampling: list[Sampling], prompts: list[list[int]] | None = None,
               generated: list[list[int]] | None = None) -> Sampler:
    sampler = Sampler(len(sampling), VOCAB_SIZE)
    for slot, each in enumerate(sampling):
        sampler.join(slot, Params.of(each, 0, frozenset(each.stop_token_ids)), prompts[slot] if prompts else [2],
                     generated[slot] if generated else [])
    return sampler


def draw(sampler: Sampler, logits: Tensor, position: int = 0) -> list[int]:
    return [d.token_id for d in sampler.sample(logits, [Row(slot, position) for slot in range(len(logits))]).read()]


def reference(logits: Tensor, s: Sampling, prompt: list[int], generated: list[int], position: int) -> Tensor:
    """Probabilities of one row, stage by stage, with a sort."""
    x = logits.double().clone()
    for token_id, bias in s.logit_bias:
        x[token_id] += bias
    for token_id in {*prompt, *generated}:
        x[token_id] = x[token_id] / s.repetition_penalty if x[token_id] > 0 else x[token_id] * s.repetition_penalty
    for token_id, count in Counter(generated).items():
        x[token_id] -= count * s.frequency_penalty + s.presence_penalty
    if position < s.min_tokens:
        x[list(s.stop_token_ids)] = -math.inf
    x = x / s.temperature
    order = sorted(range(VOCAB_SIZE), key=lambda i: (-float(x[i]), i))
    kept = order[:s.top_k or VOCAB_SIZE]
    mass, total = torch.softmax(x[kept], 0).tolist(), 0.0
    nucleus: list[int] = []
    for token_id, p in zip(kept, mass, strict=True):
        if nucleus and total >= s.top_p and s.top_p < 1:
            break
        nucleus.append(token_id)
        total += p
    nucleus = [i for i in nucleus if float(x[i]) >= float(x[order[0]]) + (math.log(s.min_p) if s.min_p else -math.inf)]
    out = torch.zeros(VOCAB_SIZE, dtype=torch.double)
    out[nucleus] = torch.softmax(x[nucleus], 0)
    return out


def test_a_flat_row_is_truncated_as_exactly_as_a_steep_one() -> None:
    """Nuclei of most of the vocabulary, ties everywhere: never outside, the lower id first, and quickly enough."""
    steep, flat = torch.arange(VOCAB_SIZE) * -1e-3, torch.zeros(VOCAB_SIZE)
    number = 3000
    for logits, top_p, num_allowed in ((flat, 0.5, 250), (flat, 0.0, 1), (flat, 0.9, 450), (steep, 0.9, None)):
        each = [Sampling(max_tokens=9, seed=seed, top_p=top_p) for seed in range(number)]
        allowed = reference(logits, each[0], [2], [], 0)
        drawn = Counter(draw(sampler_of(each), logits.expand(number, -1)))
        assert all(allowed[token_id] > 0 for token_id in drawn)
        assert num_allowed is None or max(drawn) < num_allowed
        assert len(drawn) > 0.9 * int((allowed > 0).sum())
        assert max(drawn.values()) < 40 or num_allowed == 1


PARAMETERS: list[dict[str, Any]] = [
    {}, {"temperature": 0.5}, {"temperature": 1.9}, {"top_k": 1}, {"top_k": 7}, {"top_k": 300}, {"top_p": 0.0},
    {"top_p": 0.5}, {"top_p": 0.99}, {"min_p": 0.1}, {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.05, "temperature": 1.4}, {"top_k": 100, "top_p": 0.95, "temperature": 3.0},
    {"presence_penalty": 2.0}, {"frequency_penalty": -1.5}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6},
    {"logit_bias": ((3, 100.0),)}, {"logit_bias": ((3, -100.0), (4, 5.0))},
    {"min_tokens": 5, "stop_token_ids": (2, 3, 4)},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_what_is_drawn_is_what_the_reference_allows_as_often_as_it_says(parameters: dict[str, Any]) -> None:
    """4,000 draws of one row in one batch; the noise argmax must follow the reference's probabilities."""
    torch.manual_seed(1)
    logits = torch.randn(VOCAB_SIZE) * 3
    prompt, generated, number = [2, 3, 9], [9, 9, 40], 4000
    each = [Sampling(max_tokens=9, seed=seed, **parameters) for seed in range(number)]
    sampler = sampler_of(each, [prompt] * number, [generated] * number)
    drawn = Counter(draw(sampler, logits.expand(number, -1)))
    expected = reference(logits, each[0], prompt, generated, 0)
    assert all(expected[token_id] > 0 for token_id in drawn)
    distance = sum(abs(drawn[i] / number - float(expected[i])) for i in range(VOCAB_SIZE)) / 2
    assert distance < 1.2 * math.sqrt(int((expected > 1e-4).sum()) / number) / 2 + 0.01


def test_greedy_is_the_likeliest_after_penalties_and_bias() -> None:
    torch.manual_seed(2)
    logits = torch.randn(len(PARAMETERS), VOCAB_SIZE) * 3
    each = [Sampling(max_tokens=9, **(p | {"temperature": 0.0})) for p in PARAMETERS]
    got = draw(sampler_of(each, [[2, 3, 9]] * len(each), [[9, 9, 40]] * len(each)), logits)
    for row, (sampling, token_id) in enumerate(zip(each, got, strict=True)):
        whole: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        warm = Sampling(max_tokens=9, **(PARAMETERS[row] | whole))
        assert token_id == int(reference(logits[row], warm, [2, 3, 9], [9, 9, 40], 0).argmax()), sampling


def test_rows_of_every_kind_share_a_batch_and_change_nothing_for_each_other() -> None:
    torch.manual_seed(3)
    logits = torch.randn(len(PARAMETERS), VOCAB_SIZE) * 3
    each = [Sampling(max_tokens=9, seed=i, **p) for i, p in enumerate(PARAMETERS)]
    together = draw(sampler_of(each), logits, position=3)
    by_themselves = [draw(sampler_of([sampling]), logits[i:i + 1], position=3)[0] for i, sampling in enumerate(each)]
    assert together == by_themselves


@pytest.mark.parametrize(("top_k", "scale"), [(40, 3.0), (0, 3.0), (0, 0.5)], ids=["top_k", "steep", "flat"])
def test_no_neighbour_moves_the_border_of_a_nucleus_by_a_bit(top_k: int, scale: float) -> None:
    """Between two neighbouring values of top_p the token changes, with any neighbours at the same place."""
    torch.manual_seed(5)
    neighbours = [Sampling(max_tokens=9, seed=9, top_p=0.9, top_k=k) for k in (300, 90, 0)]
    num_borders = 0
    for seed in range(12):
        logits = torch.randn(1, VOCAB_SIZE) * scale

        def drawn(top_p: float, others: list[Sampling], logits: Tensor = logits, seed: int = seed) -> int:
            mine = Sampling(max_tokens=9, seed=seed, top_k=top_k, top_p=top_p)
            return draw(sampler_of([mine, *others]), logits.expand(1 + len(others), -1))[0]

        low, high = 0.3, 0.999
        if drawn(low, []) == drawn(high, []):
            continue
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if drawn(middle, []) == drawn(low, []) else (low, middle)
        num_borders += 1
        for others in (neighbours, neighbours[:1], neighbours[2:]):
            assert [drawn(top_p, others) for top_p in (low, high)] == [drawn(top_p, []) for top_p in (low, high)]
    assert num_borders > 2


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, VOCAB_SIZE)
    each = [Sampling(max_tokens=9, num_logprobs=k, temperature=0.3, top_k=5, presence_penalty=1.0) for k in (0, 1, 20)]
    draws = sampler_of(each).sample(logits, [Row(slot, 0) for slot in range(3)]).read()
    expected = torch.log_softmax(logits, dim=-1)
    for row, (sampling, drawn) in enumerate(zip(each, draws, strict=True)):
        assert drawn.logprobs
        token_id, logprob, top = drawn.logprobs
        assert token_id == drawn.token_id
        assert logprob == pytest.approx(float(expected[row, token_id]), abs=1e-5)
        likeliest = expected[row].topk(sampling.num_logprobs or 0)
        assert [i for i, _ in top] == likeliest.indices.tolist()
        assert [p for _, p in top] == pytest.approx(likeliest.values.tolist(), abs=1e-5)


@given(seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 127), position=st.integers(0, 2**20))
@settings(max_examples=50)
def test_noise_is_a_function_of_its_four_arguments(seed: int, choice: int, position: int) -> None:
    """A whole row or a few of its ids: a token's noise is the same."""
    low, high = rng.split_keys([rng.row_key(rng.choice_key(seed, choice), position)])
    ids = torch.arange(VOCAB_SIZE, dtype=torch.int32)
    whole = rng.gumbel(low, high, ids)
    assert whole.isfinite().all()
    assert torch.equal(rng.gumbel(low, high, ids[None, 100:110]), whole[:, 100:110])


def test_noise_is_gumbels_and_its_neighbours_are_strangers() -> None:
    """Mean and variance over seeds, choices, positions and ids; no correlation between neighbours in any of them."""
    ids = torch.arange(VOCAB_SIZE, dtype=torch.int32)

    def noise(keys: list[int]) -> Tensor:
        return rng.gumbel(*rng.split_keys(keys), ids)

    by_position = noise([rng.row_key(rng.choice_key(1, 0), p) for p in range(400)])
    by_choice = noise([rng.row_key(rng.choice_key(1, c), 0) for c in range(400)])
    by_seed = noise([rng.row_key(rng.choice_key(s, 0), 0) for s in range(400)])
    for x in (by_position, by_choice, by_seed):
        assert float(x.mean()) == pytest.approx(0.57722, abs=0.01)
        assert float(x.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
        for shifted, other in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1])):
            pair = torch.stack([shifted.flatten(), other.flatten()])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.01


def test_the_integers_are_these_for_ever() -> None:
    """Workers of other versions and devices must draw the same: these numbers may never change."""
    assert rng.row_key(rng.choice_key(7, 1), 2) == PINNED_KEY
    low, high = rng.split_keys([PINNED_KEY])
    assert rng.hash_bits(low, high, torch.arange(4, dtype=torch.int32)).tolist() == [PINNED_BITS]

