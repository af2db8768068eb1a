"""Slots are held once, come back, and hold one sequence's numbers at a time."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.worker.families import computing_by
from worker.engine.kv import KVSlots
from worker.model.attention import PAGE_LEN, KVShape, Scores
from worker.model.slots import allocate

SHAPES = [KVShape(num_kv_heads=2, head_dim=4, num_query_heads=4),
          KVShape(num_kv_heads=1, head_dim=8, num_query_heads=4)]


@pytest.fixture
def kv() -> KVSlots:
    return KVSlots(allocate(SHAPES, 4, 2 * PAGE_LEN + 1, torch.bfloat16), 4, 6)


def test_the_lowest_free_slot_is_taken_and_sums_stay_true(kv: KVSlots) -> None:
    """Neighbouring slots are computed in one kernel call, so holes are filled first."""
    assert [kv.reserve() for _ in range(4)] == [0, 1, 2, 3]
    kv.release(2)
    kv.release(1)
    kv.check()
    assert (kv.num_free, kv.num_held) == (2, 2)
    assert kv.reserve() == 1
    kv.check()


def test_a_slot_is_not_released_twice_and_a_leak_is_seen(kv: KVSlots) -> None:
    slot = kv.reserve()
    kv.release(slot)
    with pytest.raises(KeyError):
        kv.release(slot)
    kv.num_slots = 5
    with pytest.raises(AssertionError, match="leaks"):
        kv.check()


def test_fresh_memory_is_zero_and_rounded_up_to_pages(kv: KVSlots) -> None:
    """Padding is read with weight zero, which is only harmless when it is a number."""
    assert [tuple(layer.keys.shape) for layer in kv.layers] == [(3, 4, 2, PAGE_LEN, 4), (3, 4, 1, PAGE_LEN, 8)]
    assert not any(cache.any() for layer in kv.layers for cache in layer)


def test_a_copy_is_equal_and_a_wiped_slot_is_zero(kv: KVSlots) -> None:
    for layer in kv.layers:
        for cache in layer:
            cache.normal_()
    before = [cache.clone() for layer in kv.layers for cache in layer]
    kv.copy(1, 3, 5, PAGE_LEN + 1)
    kv.wipe(0, 1)
    for old, new in zip(before, (cache for layer in kv.layers for cache in layer), strict=True):
        assert torch.equal(new[0, 3, :, 5:], old[0, 1, :, 5:]), "these tokens, over pages"
        assert torch.equal(new[1, 3, :, :1], old[1, 1, :, :1])
        assert torch.equal(new[0, 3, :, :5], old[0, 3, :, :5]), "and no others"
        assert torch.equal(new[1, 3, :, 1:], old[1, 3, :, 1:])
        assert torch.equal(new[2, 3], old[2, 3])
        assert torch.equal(new[:, 1:3], old[:, 1:3])
        assert not new[0, 0].any()


@pytest.mark.parametrize("kernels", ["ours", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_some_tokens_of_a_slot_are_copied_and_no_others(dtype: torch.dtype, kernels: Literal["ours", "torch"]) -> None:
    """In whatever order keys lie: who reads the copy reads what was written there."""
    torch.manual_seed(1)
    num_tokens = PAGE_LEN + 40
    query, key, value, *others = torch.randn(5, 1, 2, num_tokens, 32).to(dtype)
    scores = Scores(0.2, None, None, None)
    with computing_by(kernels):
        kv = KVSlots(allocate([KVShape(2, 32, 2)], 3, num_tokens + 1, dtype), 3, 6)

        def fill(slot: int, key: Tensor, value: Tensor) -> None:
            kv.memory.chunk(slot, 0, num_tokens).attend(0, query, key, value, scores)

        def read(slot: int) -> Tensor:
            row = kv.memory.rows([slot], [num_tokens])
            return row.attend(0, query[:, :, :1], key[:, :, :1], value[:, :, :1], scores)

        fill(0, key, value)
        for begin, end in ((0, num_tokens), (5, 9), (16, 17), (20, 32), (3, 60), (PAGE_LEN - 1, PAGE_LEN + 1)):
            fill(1, *others)
            kv.copy(0, 1, begin, end)
            fill(2, *(torch.cat([mine[:, :, :begin], copied[:, :, begin:end], mine[:, :, end:]], dim=2)
                      for mine, copied in zip(others, (key, value), strict=True)))
            assert torch.equal(read(1), read(2)), (begin, end)


def test_pages_are_counted_and_what_is_idle_is_given_back_when_others_need_it(kv: KVSlots) -> None:
    """Memory for six pages. Of what was filled and left, as much as is needed reads as fresh again."""
    slots = [kv.reserve() for _ in range(4)]
    for slot in slots[:2]:
        kv.grow(slot, 2 * PAGE_LEN + 1)
    assert (kv.num_free_pages, kv.num_owned_tokens(0)) == (0, 3 * PAGE_LEN)
    with pytest.raises(AssertionError, match="full"):
        kv.grow(slots[2], 1)
    for layer in kv.layers:
        for cache in layer:
            cache[:, :2] = 7
    kv.release(0)
    kv.check()
    assert (kv.num_free_pages, kv.num_missing_pages(2, PAGE_LEN + 1)) == (3, 2)
    kv.grow(2, PAGE_LEN + 1)
    kv.hold(3, 0, PAGE_LEN)
    kv.check()
    for cache in (cache for layer in kv.layers for cache in layer):
        assert not cache[:, 0].any()
        assert bool((cache[:, 1] == 7).all())
    kv.drop(3, 0, PAGE_LEN)
    assert kv.num_free_pages == 1


def test_two_chunks_of_one_page_hold_it_together(kv: KVSlots) -> None:
    kv.hold(3, 0, PAGE_LEN // 2)
    kv.hold(3, PAGE_LEN // 2, PAGE_LEN)
    assert kv.num_free_pages == 5
    kv.drop(3, 0, PAGE_LEN // 2)
    assert kv.num_free_pages == 5
    kv.drop(3, PAGE_LEN // 2, PAGE_LEN)
    assert kv.num_free_pages == 6
    kv.check()


def test_a_chunk_over_two_pages_needs_room_for_both(kv: KVSlots) -> None:
    assert kv.num_pages_to_keep(0, 3, PAGE_LEN - 8, PAGE_LEN + 8) == 2
    assert kv.num_pages_to_keep(0, 3, 0, PAGE_LEN) == 1
