"""Work that threads share is done once, all of it; weights lie in pages of their own."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from worker.model import cpu

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from worker.model.cpu import pages
from worker.model.cpu.code import FLOAT32, Code, Value
from worker.model.cpu.kernel import Kernel

ROW_BYTES = 64


@Kernel
def count(code: Code, times: Value, num_rows: Value, num_turns: Value) -> None:
    """One more in every row of [rows, 16]; the first rows take long."""
    with code.shares(num_rows) as row, code.loop(0, num_turns * code.select(row < 3, 100, code.integer(1))):
        numbers = code.numbers(times + row * ROW_BYTES, FLOAT32)
        code.store(numbers + 1.0, times + row * ROW_BYTES, FLOAT32)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 1000])
def test_each_share_is_done_once(num_rows: int, num_threads: int) -> None:
    """Also where there are fewer than threads, and where one has more to do than the others."""
    for num_turns in (1, 50):
        times = torch.zeros(num_rows + 1, 16)
        count(times, num_rows, num_turns, num_threads=num_threads)
        expected = torch.full((num_rows + 1, 16), float(num_turns))
        expected[:3] *= 100
        expected[num_rows:] = 0
        assert torch.equal(times, expected)


def test_weights_are_neighbours_in_pages_that_go_with_the_last_of_them() -> None:
    first, second = pages.empty([3, 5], torch.bfloat16), pages.empty([7], torch.float32)
    assert second.data_ptr() - first.data_ptr() == pages.ALIGNMENT
    first.fill_(1.0)
    assert not second.any() and first.shape == (3, 5) and second.dtype == torch.float32
    large = pages.empty([pages.BLOCK_BYTES + 1], torch.uint8)
    assert large.data_ptr() % pages.PAGE_BYTES == 0
    large[-1] = 1

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    before = mapped()
    del large
    pages._free = torch.empty(0, dtype=torch.uint8)
    assert before - mapped() >= pages.BLOCK_BYTES
