"""The kernel that draws says what the sampler says on a CPU; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.job import Sampling
from tests.tools import require_package
from worker.engine import rng
from worker.engine.drawing import _likeliest_by_keys
from worker.engine.params import Params
from worker.engine.sampler import Row, Sampler
from worker.model.transfer import send

require_package("triton")
from worker.engine import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, VOCAB_SIZE = 10, 300
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {}, {"temperature": 0.3}, {"temperature": 1.9}, {"top_k": 1}, {"top_k": 9},
    {"top_k": VOCAB_SIZE + 5}, {"top_p": 0.0}, {"top_p": 0.41}, {"top_p": 0.99}, {"min_p": 0.2}, {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.61}, {"top_k": 100, "top_p": 0.91, "min_p": 0.01, "temperature": 1.4}]


def drawn(logits: torch.Tensor, sampling: list[Sampling], has_kernel: bool) -> list[tuple[int, bool]]:
    sampler = Sampler(len(sampling), logits.shape[1], logits.device)
    sampler.has_kernel = has_kernel
    for slot, each in enumerate(sampling):
        sampler.join(slot, Params.of(each, slot, frozenset()), [2], [])
    rows = [Row(slot, 5) for slot in range(len(sampling))]
    return [(draw.token_id, draw.is_valid) for draw in sampler.sample(logits, rows).read()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_it_draws_what_the_processor_draws(kind: dict[str, Any], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat rows and steep ones, rounded as bfloat16 rounds them, so that many tokens are equally likely."""
    monkeypatch.setattr(kernels, "BLOCK_TOKENS", 128)   # several blocks, the last one not full
    logits = scale * torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    logits = logits.bfloat16().float()
    sampling = [Sampling(max_tokens=9, seed=row, **kind) for row in range(NUM_ROWS)]
    assert drawn(logits.to(DEVICE), sampling, True) == drawn(logits, sampling, False)


def test_rows_of_every_kind_share_a_call() -> None:
    logits = 3 * torch.randn(len(KINDS), VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    sampling = [Sampling(max_tokens=9, seed=7, **kind) for kind in KINDS]
    together = drawn(logits.to(DEVICE), sampling, True)
    assert together == drawn(logits, sampling, False)


@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {}, {"top_p": 0.5, "top_k": 9}], ids=str)
def test_what_is_no_number_is_found(kind: dict[str, Any]) -> None:
    logits = torch.zeros(2, VOCAB_SIZE, device=DEVICE)
    logits[1, 200] = float("nan")
    assert [is_valid for _, is_valid in drawn(logits, [Sampling(max_tokens=9, **kind)] * 2, True)] == [True, False]


def test_noise_is_that_of_the_processor() -> None:
    """Greedy by noise alone: the same token in every row, so the same order to the last bits that matter."""
    logits = torch.zeros(64, 2000)
    low, high = (half.contiguous() for half in rng.split_keys([rng.row_key(key, 3) for key in range(64)]))
    noise = rng.gumbel(low, high, torch.arange(2000, dtype=torch.int32))
    wishes = kernels.Wishes(low[:, 0].numpy(), high[:, 0].numpy(), [0] * 64, range(63, -1, -1), [1] * 64, [1] * 64,
                            [float("-inf")] * 64)
    last, there = torch.zeros(64, dtype=torch.long, device=DEVICE), logits.to(DEVICE)
    found = kernels.draw(there, there, send(wishes.packed(), DEVICE, torch.int32), last)
    assert found.tolist() == [noise.argmax(dim=-1).tolist(), [1] * 64]
    assert torch.equal(last.flip(0), found[0])


def test_log_totals_are_those_of_torch() -> None:
    logits = 5 * torch.randn(7, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    logits[2, :200] = float("-inf")
    torch.testing.assert_close(kernels.log_totals(logits), torch.logsumexp(logits, dim=-1), rtol=1e-6, atol=1e-6)


def test_the_likeliest_by_keys_are_the_likeliest() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(3)).mul(8).round().div(8)
    logits[0], logits[1, 5] = -0.5, float("-inf")
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    found = _likeliest_by_keys(logits.to(DEVICE), 20)
    assert torch.equal(found[0].cpu(), values[:, :20]) and torch.equal(found[1].cpu(), ids[:, :20])
