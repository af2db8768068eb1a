"""Rows of many sequences against a plain attention over one, and the bits of a row in any company."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.worker.families import computing_by, kinds_of_ours
from worker.model import cpu
from worker.model.attention import PAGE_LEN, Context, KVLayer, KVShape, Scores
from worker.model.slots import SlotMemory, allocate, in_turn
from worker.model.weighing import MAX_SPREAD, reaches

NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 16
SHAPE = KVShape(NUM_KV_HEADS, HEAD_DIM, NUM_KV_HEADS * GROUP)
NUM_TOKENS = 2 * PAGE_LEN + 20
KINDS = {
    "plain": Scores(0.25, None, None, None),
    "window": Scores(0.25, 40, None, None),
    "wide window": Scores(0.25, PAGE_LEN + 7, None, None),
    "softcap, in whole numbers": Scores(1, None, 5, None),
    "sinks": Scores(0.25, 40, None, torch.linspace(-1, 3, NUM_KV_HEADS * GROUP)),
}


def plain(query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """The last query of one sequence: [heads, head_dim] over [kv heads, tokens, head_dim], in float64."""
    keys, values = (x.double().repeat_interleave(GROUP, dim=0) for x in (keys, values))
    logits = torch.einsum("hd,htd->ht", query.double(), keys) * scores.scaling
    if scores.softcap:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    if scores.sliding_window:
        logits[:, :-scores.sliding_window] = -math.inf
    if scores.sinks is not None:
        logits = torch.cat([logits, scores.sinks.double()[:, None]], dim=-1)
    return torch.einsum("ht,htd->hd", logits.softmax(-1)[:, :keys.shape[1]], values)


def memory_of(layers: list[KVLayer]) -> SlotMemory:
    """Kernels of ours find pages wherever a table says."""
    table = in_turn(layers)
    if layers[0].is_in_lanes:
        table = np.random.default_rng(0).permutation(table.ravel()).reshape(table.shape)
    return SlotMemory(layers, table)


@pytest.fixture(params=[*kinds_of_ours(), "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with computing_by(request.param):
        yield request.param


@pytest.mark.parametrize(("dtype", "head_dim", "error"), [(torch.float32, HEAD_DIM, 1e-5), (torch.bfloat16, 64, 0.04)],
                         ids=str)
@pytest.mark.parametrize("scores", KINDS.values(), ids=KINDS)
def test_chunks_and_rows_are_plain_attention(scores: Scores, dtype: torch.dtype, head_dim: int, error: float) -> None:
    """A prompt in uneven chunks, then rows one by one and several at once, over three pages."""
    torch.manual_seed(1)
    query = torch.randn(1, NUM_KV_HEADS * GROUP, NUM_TOKENS, head_dim).to(dtype)
    key, value = (torch.randn(1, NUM_KV_HEADS, NUM_TOKENS, head_dim).to(dtype) for _ in "kv")
    layers = allocate([KVShape(NUM_KV_HEADS, head_dim, NUM_KV_HEADS * GROUP)], 3, NUM_TOKENS, dtype)
    outs = []
    for begin, end in ((0, 200), (200, PAGE_LEN + 30), (PAGE_LEN + 30, NUM_TOKENS - 8)):
        at = slice(begin, end)
        chunk = memory_of(layers).chunk(2, begin, end)
        outs.append(chunk.attend(0, query[:, :, at], key[:, :, at], value[:, :, at], scores))
    for begin, end in ((NUM_TOKENS - 8, NUM_TOKENS - 7), (NUM_TOKENS - 7, NUM_TOKENS)):
        at = slice(begin, end)
        rows = memory_of(layers).rows([2] * (end - begin), range(begin, end))
        outs.append(rows.attend(0, query[:, :, at], key[:, :, at], value[:, :, at], scores))
    got = torch.cat(outs, dim=1)[0]
    for position in (0, 1, 39, 41, 199, 200, PAGE_LEN, NUM_TOKENS - 9, NUM_TOKENS - 8, NUM_TOKENS - 1):
        seen = slice(0, position + 1)
        expected = plain(query[0, :, position], key[0, :, seen], value[0, :, seen], scores)
        assert torch.allclose(got[position].double(), expected, atol=error), position


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scores", KINDS.values(), ids=KINDS)
def test_a_row_has_the_same_bits_in_any_company(scores: Scores, dtype: torch.dtype) -> None:
    """Alone, or beside rows that reach one page or three, with holes between the slots, or filled up."""
    torch.manual_seed(2)
    positions = [7, NUM_TOKENS - 1, PAGE_LEN - 1, PAGE_LEN, 300, 40]
    slots = [0, 1, 2, 4, 5, 7]
    layers = allocate([SHAPE], 8, NUM_TOKENS, dtype)
    for cache in layers[0]:
        cache.copy_(torch.randn(cache.shape))
    query = torch.randn(1, NUM_KV_HEADS * GROUP, 8, HEAD_DIM).to(dtype)
    key, value = (torch.randn(1, NUM_KV_HEADS, 8, HEAD_DIM).to(dtype) for _ in "kv")

    def attend(rows: list[int], num_padded: int) -> Tensor:
        context = memory_of(layers).rows([slots[row] for row in rows], [positions[row] for row in rows])
        at = [*rows, *[rows[-1]] * num_padded]
        return context.attend(0, query[:, :, at], key[:, :, at], value[:, :, at], scores)[0]

    together = attend(list(range(6)), 0)
    for row in range(6):
        assert torch.equal(attend([row], 0)[0], together[row])
        assert torch.equal(attend([row], 3)[0], together[row])
    assert torch.equal(attend([1, 3, 5], 1)[:3], together[[1, 3, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize("scores", KINDS.values(), ids=KINDS)
def test_by_our_kernels_a_chunk_has_the_bits_of_rows(scores: Scores, head_dim: int, dtype: torch.dtype, kernels: str
                                                     ) -> None:
    """However a prompt is cut, and whatever its slot has held; where somebody's keys are no numbers, others' are."""
    if kernels == "torch" or not cpu.computes(dtype):
        pytest.skip("not by kernels of ours")
    torch.manual_seed(3)
    query = torch.randn(1, NUM_KV_HEADS * GROUP, NUM_TOKENS, head_dim).to(dtype)
    key, value = (torch.randn(1, NUM_KV_HEADS, NUM_TOKENS, head_dim).to(dtype) for _ in "kv")
    key[:, :, -1] = math.nan
    outs = []
    for cuts in ([0, NUM_TOKENS], [0, 1, 3, 40, 300, NUM_TOKENS - 1, NUM_TOKENS], range(0, NUM_TOKENS + 1, 4)):
        layers = allocate([KVShape(NUM_KV_HEADS, head_dim, NUM_KV_HEADS * GROUP)], 3, NUM_TOKENS, dtype)
        for cache in layers[0]:
            cache.fill_(math.nan)
        parts = []
        for begin, end in pairwise(cuts):
            context: Context = (memory_of(layers).rows([1] * 4, range(begin, end)) if isinstance(cuts, range)
                                else memory_of(layers).chunk(1, begin, end))
            at = slice(begin, end)
            parts.append(context.attend(0, query[:, :, at], key[:, :, at], value[:, :, at], scores))
        outs.append(torch.cat(parts, dim=1)[0])
    assert torch.equal(outs[0][:-1], outs[1][:-1])
    assert torch.equal(outs[0][:-1], outs[2][:-1])
    assert all(out[:-1].isfinite().all() and out[-1].isnan().all() for out in outs)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 1200)), min_size=1, max_size=32), st.booleans())
def test_every_page_is_read_by_the_rows_that_reach_it(rows: list[tuple[int, int]], in_order: bool) -> None:
    """Of their own slots; and what is read beside them is bounded."""
    slots, num_tokens = zip(*(sorted(rows) if in_order else rows), strict=True)
    found = reaches(slots, num_tokens)
    assert len(found) == -(-max(num_tokens) // PAGE_LEN)
    numbers = torch.arange(31)
    for page, reach in enumerate(found):
        here = list(range(len(slots))) if reach.rows is None else reach.rows.tolist()
        assert here == [row for row, length in enumerate(num_tokens) if length > page * PAGE_LEN]
        read = numbers[reach.slots]
        assert len(read) <= MAX_SPREAD * len(here)
        assert (read if reach.places is None else read[reach.places]).tolist() == [slots[row] for row in here]
