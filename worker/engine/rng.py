"""Noise that is a pure function of (seed, choice, position, token id): the same integers on every device.

    key  = mix64(mix64(mix64(seed) + choice) + position)        64 bits, one per row, of Python integers
    x    = token_id * 0x9E3779B1 + low half of key              32 bits, wrapping, from here on
    x   ^= x >>> 16;  x *= 0x21F0AAAD;  x ^= x >>> 15
    x   ^= high half of key
    x   *= 0x735A2D97;  x ^= x >>> 15                           >>> shifts in zeros
    v    = ((x & 0x7FFFFFFF) + 0.5) / 2**31                     in (0, 1), finest where it matters: near 0
    noise = -log(-log(1 - v))                                   Gumbel

mix64 is splitmix64's. The largest of logits/T + noise is a draw from softmax(logits/T). It knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B1
MULTIPLIERS = 0x21F0AAAD, 0x735A2D97
MAX_V = 1.0 - 2.0**-24      # the largest float32 below 1: the noise stays finite


def mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def choice_key(seed: int, choice: int) -> int:
    """What stays the same for all positions of one choice."""
    return mix64((mix64(seed) + choice) & MASK64)


def row_key(choice_key: int, position: int) -> int:
    return mix64((choice_key + position) & MASK64)


def split_keys(keys: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The low and the high halves, as wrapped 32-bit integers of [rows, 1]."""
    wide = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys], dtype=torch.int64)
    halves = wide.view(torch.int32).view(-1, 2)         # little endian on every machine torch runs on
    return halves[:, :1], halves[:, 1:]


def hash_bits(low: Tensor, high: Tensor, token_ids: Tensor) -> Tensor:
    """31 uniform bits for each row and token, as int32; `token_ids` is int32, [tokens] or [rows, tokens]."""
    first, second = MULTIPLIERS
    x = token_ids * wrapped(GOLDEN) + low
    x ^= (x >> 16) & 0xFFFF
    x *= first
    x ^= (x >> 15) & 0x1FFFF
    x ^= high
    x *= second
    x ^= (x >> 15) & 0x1FFFF
    x &= 0x7FFFFFFF
    return x


def gumbel(low: Tensor, high: Tensor, token_ids: Tensor) -> Tensor:
    noise = hash_bits(low, high, token_ids).to(torch.float32)
    noise.add_(0.5).mul_(2.0**-31).clamp_(max=MAX_V)
    return noise.neg_().log1p_().neg_().log_().neg_()


def wrapped(constant: int) -> int:
    """As a signed 32-bit integer."""
    return constant - 2**32 if constant >= 2**31 else constant
