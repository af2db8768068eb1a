"""The kernel that draws on a CPU: the noise of rng.py, and the token that torch would find."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worker.engine import rng
from worker.model import cpu

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from worker.engine import noise
from worker.engine.sampler import FORBIDDEN


def keys_of(num_rows: int) -> tuple[Tensor, Tensor]:
    return rng.split_keys([rng.row_key(rng.choice_key(2**64 - row, row), row) for row in range(num_rows)])


def noisy(logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return logits + rng.gumbel(low, high, torch.arange(logits.shape[1], dtype=torch.int32))


def draw(logits: Tensor, keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
    return noise.draw(logits, noise.Wishes(keys=keys))[0]


@pytest.mark.parametrize("vocab_size", [16, 17, 199, 32_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_it_draws_what_torch_draws(vocab_size: int, spread: float) -> None:
    """But where two come within the rounding of a logarithm."""
    torch.manual_seed(0)
    low, high = keys_of(300)
    logits = torch.randn(300, vocab_size) * spread
    expected, drawn = noisy(logits, low, high), draw(logits, (low, high))
    missing = expected.amax(dim=1) - expected.gather(1, drawn[:, None])[:, 0]
    assert missing.max() <= 1e-5
    assert (drawn == expected.argmax(dim=1)).float().mean() > 0.99
    assert torch.equal(draw(logits[7:9], (low[7:9], high[7:9])), drawn[7:9])


@pytest.mark.parametrize("vocab_size", [16, 17, 199, 32_000])
def test_without_noise_it_is_the_first_of_the_largest(vocab_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(-9, 9, (50, vocab_size)).float()
    logits[7] = -math.inf
    drawn = draw(logits)
    for row, token_id in zip(logits.tolist(), drawn.tolist(), strict=True):
        assert token_id == row.index(max(row))
    assert torch.equal(draw(logits[3:5]), drawn[3:5])


def test_what_is_forbidden_is_not_drawn_and_what_is_no_number_is() -> None:
    low, high = keys_of(3)
    logits = torch.full((3, 40), -math.inf)
    logits[0, 33] = -1e30
    logits[1] = 0.0
    logits[1, 39] = math.nan
    for keys in (low, high), None:
        assert noise.draw(logits, noise.Wishes(keys=keys)).tolist() == [[33, 39, 0], [True, False, False]]


@pytest.mark.parametrize("has_noise", [True, False])
def test_runners_up_are_who_is_drawn_where_those_before_may_not_be(has_noise: bool) -> None:
    """As far as they come, which is far enough, as a rule; without noise many are alike."""
    torch.manual_seed(0)
    num_rows, vocab_size = 200, 1024
    logits = torch.randn(num_rows, vocab_size) if has_noise else torch.randint(-9, 9, (num_rows, vocab_size)).float()
    keys, runners_up = keys_of(num_rows) if has_noise else None, noise.RunnersUp.empty(num_rows)
    drawn = noise.draw(logits, noise.Wishes(keys=keys), runners_up)
    assert torch.equal(drawn, noise.draw(logits, noise.Wishes(keys=keys)))
    named = [list(runners_up.of(row)) for row in range(num_rows)]
    allowed = torch.full((num_rows, vocab_size // 32), -1, dtype=torch.int32)
    last = drawn[0]
    for place in range(max(map(len, named))):
        allowed.scatter_add_(1, last[:, None] // 32, -(1 << last % 32).int()[:, None])
        last = noise.draw(logits, noise.Wishes(keys=keys, allowed=allowed))[0]
        assert all(ids[place] == expected for ids, expected in zip(named, last.tolist(), strict=True)
                   if place < len(ids))
    if has_noise:
        assert sum(map(len, named)) > 3 * num_rows


def test_what_bits_do_not_name_falls_below_the_rest() -> None:
    torch.manual_seed(0)
    logits, allowed = torch.randn(5, 208), torch.randint(-2**31, 2**31, (5, 9), dtype=torch.int32)
    out = noise.forbid(logits, allowed[:, :7])
    for row in range(5):
        for token_id in range(208):
            is_allowed = int(allowed[row, token_id // 32]) >> token_id % 32 & 1
            assert out[row, token_id] == logits[row, token_id] + (0 if is_allowed else FORBIDDEN)
    assert noise.takes_bits(logits) and not noise.takes_bits(logits[:, :200])


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if cpu.computes(dtype)], ids=str)
def test_rows_draw_as_each_of_them_wishes(dtype: torch.dtype) -> None:
    """At a temperature or none, among all tokens or some: what the steps of it draw one after the other."""
    torch.manual_seed(0)
    logits = (torch.randn(60, 208) * 5).to(dtype)
    temperatures = torch.tensor([0.0, 0.3, 1.7]).repeat(20)
    allowed = torch.randint(-2**31, 2**31, (60, 7), dtype=torch.int32)
    allowed[::4] = -1
    low, high = keys_of(60)
    drawn, are_numbers = noise.draw(logits, noise.Wishes(temperatures, (low, high), allowed))
    assert are_numbers.all()
    for row, temperature in enumerate(temperatures.tolist()):
        one = slice(row, row + 1)
        numbers = noise.forbid(logits[one].float(), allowed[one])
        keys = (low[one], high[one]) if temperature else None
        assert drawn[row] == draw(numbers / temperature if temperature else numbers, keys)
        wishes = noise.Wishes(temperatures[one], (low[one], high[one]), allowed[one])
        assert torch.equal(drawn[one], noise.draw(logits[one], wishes)[0])
