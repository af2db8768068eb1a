"""The Triton kernels that draw tokens: one program per row of logits, with no synchronisation.

The token drawn is the first in the order of logits / temperature + noise that passes top_k, top_p and min_p: the argmax
among the tokens that pass, without computing the border. A token that fails excludes all less likely ones, so few are
tried. Of equally likely tokens the lower id comes first. (Rejection as in FlashInfer's sampling, Ye et al. 2025; noise
as in rng.py.) It knows rows and numbers, nothing of slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 8192         # of the vocabulary at a time
NUM_WARPS = 32


class Wishes(NamedTuple):
    """Parameters of the rows: [rows] each, int32 or float32."""

    low: npt.ArrayLike              # low halves of the rows' keys
    high: npt.ArrayLike
    top_k: npt.ArrayLike            # 0: off
    slots: npt.ArrayLike
    temperatures: npt.ArrayLike     # 0: greedy, no noise
    top_p: npt.ArrayLike            # 1: off
    log_min_p: npt.ArrayLike        # -inf: off

    def packed(self) -> npt.NDArray[np.int32]:
        """[7, rows], to be copied at once."""
        return np.stack([*(np.asarray(x, dtype=np.int32) for x in self[:4]),
                         *(np.asarray(x, dtype=np.float32).view(np.int32) for x in self[4:])])


def draw(logits: Tensor, raw: Tensor, wishes: Tensor, last_token_ids: Tensor) -> Tensor:
    """Token ids of logits [rows, vocab_size], and whether they are numbers in the `raw` ones: int64 [2, rows].

    `wishes`: packed, on the device. The drawn token is written to the slot's place in `last_token_ids`, int64 [slots];
    if several rows have one slot, any of theirs. If logits are NaN, a NaN or infinite one is drawn.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == raw.stride(1) == 1 and wishes.is_contiguous() and wishes.shape == (7, num_rows)
    out = torch.empty(2, num_rows, dtype=torch.long, device=logits.device)
    _draw[(num_rows,)](logits, raw, out, *wishes[:4], *wishes[4:].view(torch.float32), last_token_ids, logits.stride(0),
                       raw.stride(0), vocab_size, BLOCK=min(BLOCK_TOKENS, triton.next_power_of_2(vocab_size)),
                       num_warps=NUM_WARPS)
    return out


def log_totals(logits: Tensor) -> Tensor:
    """log Σ exp of logits [rows, vocab_size], float32 [rows]: torch's bits depend on the number of rows."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _log_totals[(num_rows,)](logits, out, logits.stride(0), vocab_size,
                             BLOCK=min(BLOCK_TOKENS, triton.next_power_of_2(vocab_size)), num_warps=NUM_WARPS)
    return out


@triton.jit
def _log_totals(logits, out, row_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        best = tl.maximum(best, _scaled(logits, start + tl.arange(0, BLOCK), vocab_size, 1.0))
    peak = tl.max(best)
    masses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        masses += tl.exp(_scaled(logits, start + tl.arange(0, BLOCK), vocab_size, 1.0) - peak)
    tl.store(out + row, peak + tl.log(tl.sum(masses)))


@triton.jit
def _noise(token_ids, low, high):
    """rng.gumbel; log1p(-v) by Kahan's formula, whose quotient cancels the rounding of 1 - v."""
    x = token_ids.to(tl.uint32) * 0x9E3779B1 + low
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x ^= high
    x *= 0x735A2D97
    x ^= x >> 15
    v = ((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10        # 2**-31
    v = tl.minimum(v, 0.999999940395355224609375)                              # rng.MAX_V
    u = 1.0 - v
    rounded = 1.0 - u
    return -tl.log(tl.where(rounded == 0.0, v, -tl.log(u) * v / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def _scaled(logits, tokens, vocab_size, temperature):
    """NaN counts as infinite, so that it is drawn and detected."""
    x = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32) / temperature
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _kth(logits, vocab_size, temperature, k, peak, BLOCK: tl.constexpr):
    """The k-th largest: bisects between two logits, until they meet or k logits are at least as large."""
    most = peak                                         # the upper bound,
    least = tl.full([], float("-inf"), tl.float32)      # and the lower bound
    reach = tl.full([], 4.0, tl.float32)                # how far below `most` to search while there is no lower bound
    while most > least:
        middle = tl.where(least == float("-inf"), most - reach, least + (most - least) / 2)
        middle = tl.where(middle > least, middle, most)
        count = tl.zeros([BLOCK], tl.int32)
        above = tl.full([BLOCK], float("inf"), tl.float32)
        below = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = _scaled(logits, tokens, vocab_size, temperature)
            is_above = (tokens < vocab_size) & (x >= middle)
            count += is_above.to(tl.int32)
            above = tl.minimum(above, tl.where(is_above, x, float("inf")))
            below = tl.maximum(below, tl.where(is_above, float("-inf"), x))
        num_above, next_above, next_below = tl.sum(count), tl.min(above), tl.max(below)
        least = tl.where(num_above >= k, next_above, least)
        most = tl.where(num_above >= k, tl.where(num_above == k, next_above, most), next_below)
        reach *= 2
    return least


@triton.jit
def _draw(logits, raw, out, lows, highs, top_ks, slots, temperatures, top_ps, log_min_ps, last_token_ids, row_stride,
          raw_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    raw += row.to(tl.int64) * raw_stride
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    low, high = tl.load(lows + row).to(tl.uint32), tl.load(highs + row).to(tl.uint32)
    log_min_p = tl.load(log_min_ps + row)
    is_random = temperature > 0.0
    temperature = tl.where(is_random, temperature, 1.0)
    needs_mass = is_random & (top_p < 1.0)

    floor = tl.full([], float("-inf"), tl.float32)      # only likelier tokens are drawn
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    is_cut = is_random & (top_k > 0) & (top_k < vocab_size)
    if needs_mass | is_cut | (is_random & (log_min_p > float("-inf"))):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            best = tl.maximum(best, _scaled(logits, start + tl.arange(0, BLOCK), vocab_size, temperature))
        peak = tl.max(best)
        if log_min_p > float("-inf"):                  # infinity minus infinity would be NaN
            floor = peak + log_min_p
    border = tl.full([], float("-inf"), tl.float32)
    if is_cut:
        border = _kth(logits, vocab_size, temperature, top_k, peak, BLOCK)
        floor = tl.maximum(floor, border)
    if needs_mass:                                      # top_p is a share of what top_k lets pass
        masses = tl.zeros([BLOCK], tl.float32)
        num_above = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            x = _scaled(logits, start + tl.arange(0, BLOCK), vocab_size, temperature)
            masses += tl.where(x > border, tl.exp(x - peak), 0.0)
            num_above += (x > border).to(tl.int32)
        total = tl.sum(masses)
        if border > float("-inf"):                      # ties at the border count as far as they are among the k
            total += tl.exp(border - peak) * (top_k - tl.sum(num_above)).to(tl.float32)

    bound = tl.full([], float("inf"), tl.float32)       # the last token refused: the one drawn is likelier
    bound_id = tl.full([], -1, tl.int32)
    is_bound = tl.full([], False, tl.int1)
    drawn = tl.full([], 0, tl.int32)
    pending = tl.full([], True, tl.int1)
    while pending:
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_ids = tl.full([BLOCK], 2147483647, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = _scaled(logits, tokens, vocab_size, temperature)
            may = (tokens < vocab_size) & (x >= floor)
            may &= (not is_bound) | (x > bound) | ((x == bound) & (tokens < bound_id))
            noisy = x
            if is_random:
                noisy += _noise(tokens, low, high)
            is_better = may & ((noisy > best) | (best_ids == 2147483647))
            best = tl.where(is_better, noisy, best)
            best_ids = tl.where(is_better, tokens, best_ids)
        largest = tl.max(best)
        drawn = tl.minimum(tl.min(tl.where(best == largest, best_ids, 2147483647)), vocab_size - 1)
        pending = tl.full([], False, tl.int1)
        if is_random & ((top_k > 0) | (top_p < 1.0)):
            value = tl.load(logits + drawn).to(tl.float32) / temperature
            masses = tl.zeros([BLOCK], tl.float32)
            num_likelier = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab_size, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                x = _scaled(logits, tokens, vocab_size, temperature)
                is_likelier = (x > value) | ((x == value) & (tokens < drawn))
                masses += tl.where(is_likelier, tl.exp(x - peak), 0.0)
                num_likelier += is_likelier.to(tl.int32)
            rank = tl.sum(num_likelier)
            is_inside = (top_k == 0) | (rank < top_k)
            is_inside &= (top_p >= 1.0) | (rank == 0) | (tl.sum(masses) < top_p * total)
            pending = not is_inside
            bound, bound_id, is_bound = value, drawn, tl.full([], True, tl.int1)
    tl.store(out + row, drawn.to(tl.int64))
    tl.store(last_token_ids + tl.load(slots + row), drawn.to(tl.int64))
    chosen = tl.load(raw + drawn).to(tl.float32)
    tl.store(out + tl.num_programs(0) + row, (tl.abs(chosen) < float("inf")).to(tl.int64))
