"""The largest logit of each row, or the largest of logits + noise, for a CPU: in one pass over a vocabulary.

The noise is that of rng.py. And what may not be drawn, put below the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.engine.rng import GOLDEN, MAX_V, MULTIPLIERS, wrapped
from worker.engine.sampler import FORBIDDEN
from worker.model.cpu import LANES
from worker.model.cpu.code import FLOAT32, INT32, INTEGER, SIZES, Code, Value
from worker.model.cpu.kernel import Kernel, threads_for

WORK = 16               # numbers gone through for each token: there is more to do than to read it


def largest(logits: Tensor) -> Tensor:
    """The token of each row of float32, [rows, vocab_size]; the lower id of two alike.

    What is no number counts as infinite, so that it is drawn and found.
    """
    return _drawn(logits, 0, 0)


def draw(logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same with noise, by halves of each row's key, [rows, 1]."""
    return _drawn(logits, low.contiguous(), high.contiguous())


def _drawn(logits: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.long)
    _draw(logits, low, high, token_ids, num_rows, logits.stride(0), vocab_size,
          num_threads=threads_for(logits.numel() * WORK), has_noise=isinstance(low, Tensor))
    return token_ids


def forbid(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits of [rows, vocab_size], those far below all others that a row's bits, in int32 words, do not name."""
    out = torch.empty_like(logits)
    _forbid(logits, allowed, out, len(logits), logits.shape[1], allowed.stride(0),
            num_threads=threads_for(logits.numel()))
    return out


def takes_bits(logits: Tensor) -> bool:
    """Whether bits of a vocabulary come in whole vectors."""
    return logits.shape[-1] % LANES == 0 and logits.is_contiguous()


def fits(logits: Tensor) -> bool:
    """Whether a vocabulary is a vector at least, and lies in one piece."""
    return logits.shape[-1] >= LANES and logits.stride(-1) == 1


@Kernel
def _forbid(code: Code, logits: Value, allowed: Value, out: Value, num_rows: Value, vocab_size: Value,
            word_stride: Value) -> None:
    with code.shares(num_rows) as row, code.loop(0, vocab_size, LANES) as token:
        place = (row * vocab_size + token) * SIZES[FLOAT32]
        numbers = code.numbers(logits + place, FLOAT32)
        is_allowed = code.bits(allowed + row * word_stride * SIZES[INT32] + token // 8)
        code.store(code.select(is_allowed, numbers, numbers + FORBIDDEN), out + place, FLOAT32)


@Kernel
def _draw(code: Code, logits: Value, low: Value, high: Value, token_ids: Value, num_rows: Value, row_stride: Value,
          vocab_size: Value, *, has_noise: bool) -> None:
    with code.shares(num_rows) as row:
        keys = [code.splat(code.load(half + row * SIZES[INT32], INT32, 1)) for half in (low, high) if has_noise]
        most = code.variable(code.splat(code.number(-math.inf)))
        best = code.variable(code.indices())
        with code.loop(0, vocab_size, LANES) as begin:
            first = code.smaller(begin, vocab_size - LANES)             # the last vector may say some twice
            numbers = code.numbers(logits + (row * row_stride + first) * SIZES[FLOAT32], FLOAT32)
            numbers = code.select(numbers.equals(numbers), numbers, code.splat(code.number(math.inf)))
            tokens = code.indices() + first
            if has_noise:
                numbers += _gumbel(code, keys, code.narrowed(tokens))
            is_larger = numbers > most.value
            most.value = code.select(is_larger, numbers, most.value)
            best.value = code.select(is_larger, tokens, best.value)
        is_most = most.value.equals(code.largest(most.value))
        beyond = code.splat(code.integer(1 << 40))
        code.store(code.least(code.select(is_most, best.value, beyond)), token_ids + row * SIZES[INTEGER], INTEGER)


def _gumbel(code: Code, keys: list[Value], tokens: Value) -> Value:
    """Of int32 tokens. log(1 - v) by Kahan's formula, whose quotient takes the rounding of 1 - v back."""
    low, high = keys
    first, second = map(wrapped, MULTIPLIERS)
    x = tokens * wrapped(GOLDEN) + low
    x = (x ^ (x >> 16)) * first
    x = ((x ^ (x >> 15)) ^ high) * second
    x = (x ^ (x >> 15)) & 0x7FFFFFFF
    v = (code.as_number(x) + 0.5) * 2.0**-31
    v = code.select(v < MAX_V, v, code.splat(code.number(MAX_V)))
    one = code.splat(code.number(1.0))
    u = one - v
    rounded = one - u
    is_nothing = rounded.equals(0.0)
    surprise = code.zeros() - code.log(u) * v / code.select(is_nothing, 1.0, rounded)
    return code.zeros() - code.log(code.select(is_nothing, v, surprise))
