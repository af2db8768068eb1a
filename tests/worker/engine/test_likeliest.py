"""The largest of rows without a sort, against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worker.model import cpu

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from worker.engine import drawing, likeliest
from worker.engine.likeliest import MAX_COUNT, NUM_PARTS, ROOM
from worker.model.cpu import LANES

MIN_VOCAB_SIZE = 2 * NUM_PARTS


def reference(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def check(logits: Tensor, count: int) -> None:
    found = likeliest.likeliest(logits, count)
    assert found is not None
    for mine, expected in zip(found, reference(logits, count), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 16, 32_000, 151_936])
@pytest.mark.parametrize("count", [1, 5, 64, MAX_COUNT])
def test_they_are_those_of_a_sort(vocab_size: int, count: int) -> None:
    """Also where rows lie apart, where many are alike, and where most are nothing."""
    torch.manual_seed(0)
    check(torch.randn(7, vocab_size) * 3, count)
    check(torch.randn(7, vocab_size + 64)[:, :vocab_size], count)
    check((torch.randn(7, vocab_size) * 40).round(), count)
    if cpu.computes(torch.bfloat16):
        check(torch.randn(7, vocab_size).bfloat16(), min(count, 64))
    rare = torch.full((3, vocab_size), -math.inf)
    rare[:, ::vocab_size // 800] = torch.randn(3, len(range(0, vocab_size, vocab_size // 800)))
    check(rare, min(count, 64))


def test_what_it_leaves_to_others() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4096)
    assert likeliest.likeliest(logits, MAX_COUNT + 1) is None
    assert likeliest.likeliest(logits[:, :-1], 5) is None, "no whole vectors"
    assert likeliest.likeliest(logits[:, :MIN_VOCAB_SIZE - 16], 5) is None, "too few to gain anything"
    assert likeliest.likeliest(logits.T.contiguous().T, 5) is None
    logits[1, :ROOM + 1] = 7.0
    assert likeliest.likeliest(logits, 5) is None, "more are alike than there is room for"
    logits[1] = math.nan
    assert likeliest.likeliest(logits, 5) is None


@pytest.mark.parametrize("num_alike", range(ROOM - 2 * LANES, ROOM + 3, 3))
def test_none_is_forgotten_where_room_ends(num_alike: int) -> None:
    """The largest are the last that are found: behind so many alike, in vectors that all have some."""
    logits = torch.full((1, LANES * (ROOM + 8)), -9.0)
    places = torch.arange(num_alike)
    logits[0, places * LANES + places % LANES] = 1.0
    logits[0, -3:] = torch.tensor([4.0, 6.0, 5.0])
    found = likeliest.likeliest(logits, 64)
    assert found is None or torch.equal(found[1], reference(logits, 64)[1])
    assert (found is None) == (num_alike + 3 > ROOM - LANES)


def test_what_is_no_number_comes_first() -> None:
    """So that it is drawn, and found."""
    logits = torch.randn(2, MIN_VOCAB_SIZE)
    logits[1, 600] = math.nan
    found = likeliest.likeliest(logits, 5)
    assert found is not None
    assert found[0][1].isnan().tolist() == [True] + 4 * [False] and found[1][1, 0] == 600
    assert torch.equal(found[1][0], reference(logits, 5)[1][0])


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_totals_are_those_of_float64(spread: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 32_000) * spread
    logits[3, 100:] = -1e30
    totals = likeliest.log_totals(logits)
    assert torch.allclose(totals.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert torch.equal(likeliest.log_totals(logits[2:5]), totals[2:5])
    temperatures = torch.linspace(0.2, 3, 9)
    by_temperature = likeliest.log_totals(logits, temperatures)
    assert torch.equal(by_temperature, likeliest.log_totals(logits / temperatures[:, None]))
    logits[4, 77] = math.nan
    assert likeliest.log_totals(logits).isnan().tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, 50_257])
def test_alone_a_row_is_as_beside_others_and_for_more_as_for_fewer(vocab_size: int) -> None:
    """By our kernels, and where only torch computes: many are alike, and several threads sum."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(3)).bfloat16()
        totals = drawing.log_totals(logits)
        assert all(torch.equal(drawing.log_totals(logits[row:row + 1])[0], totals[row]) for row in range(20))
        values, ids = drawing.likeliest(logits, 64)
        order = logits.float().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids, order.indices[:, :64]) and torch.equal(values.float(), order.values[:, :64])
        assert all(torch.equal(drawing.likeliest(logits, count)[1], ids[:, :count]) for count in (1, 2, 5, 20))
    finally:
        torch.set_num_threads(num_threads)
