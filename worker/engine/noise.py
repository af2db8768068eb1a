"""Draws for rows without top_k and top_p on a CPU, in one pass over the vocabulary. The noise is that of rng.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from worker.engine.rng import GOLDEN, MAX_V, MULTIPLIERS, wrapped
from worker.engine.sampler import FORBIDDEN
from worker.model.cpu import LANES
from worker.model.cpu.code import FLOAT32, INT32, INTEGER, SIZES, Code, Value, vector
from worker.model.cpu.kernel import ELEMENTS, Kernel, threads_for

WORK = 4                # per token: more computing than reading
EXPONENT_PLACE, EXPONENT_OF_ONE = 23, 127.0     # in a float32
MORE_THAN_LOG_2 = 0.6932        # by more than the logarithm's rounding


class Wishes(NamedTuple):
    """The rows' parameters, each tensor with one element or more per row; None: not requested."""

    temperatures: Tensor | None = None      # float32; 0: greedy, without noise
    keys: tuple[Tensor, Tensor] | None = None       # of the noise: halves, as in rng.py
    allowed: Tensor | None = None           # [rows, words]: one bit per token that may be drawn, in int32 words
    floors: Tensor | None = None            # float32; logits / temperature below it are not drawn


class RunnersUp(NamedTuple):
    """Per lane of a vector, over which the vocabulary is distributed: [rows, LANES] each."""

    largest: Tensor                         # float32, as compared
    token_ids: Tensor                       # their token ids, int64
    seconds: Tensor                         # float32: the second largest

    @classmethod
    def empty(cls, num_rows: int) -> RunnersUp:
        return cls(torch.empty(num_rows, LANES), torch.empty(num_rows, LANES, dtype=torch.long),
                   torch.empty(num_rows, LANES))

    def of(self, row: int) -> Iterator[int]:
        """The tokens that would be drawn if the earlier ones were refused, as far as they are certain: of a lane's
        second largest only the value is known, so the list ends where one of those might be next."""
        largest, token_ids, seconds = (part.numpy()[row] for part in self)
        first, *others = sorted(zip((-largest).tolist(), token_ids.tolist(), seconds.tolist(), strict=True))
        hidden = first[2]
        for negated, token_id, second in others:
            if -negated <= hidden:
                return
            yield token_id
            hidden = max(hidden, second)


def draw(logits: Tensor, wishes: Wishes, runners_up: RunnersUp | None = None) -> Tensor:
    """Draws from [rows, vocab_size]; [2, rows]: the token of each row, and whether its logit is not NaN. It is the
    largest of logits / temperature + noise, the lower id of two equal ones. The next ones are written to `runners_up`.

    NaN counts as infinite, so that it is drawn and detected. Tokens that are not allowed, NaN or not, fall below all
    others.
    """
    num_rows, vocab_size = logits.shape
    temperatures, keys, allowed, floors = wishes
    low, high = (half.contiguous() for half in keys) if keys else (0, 0)
    drawn = torch.empty(2, num_rows, dtype=torch.long)
    num_threads = threads_for(logits.numel() * WORK) if num_rows > 1 else 1
    _draw(logits, 0 if temperatures is None else temperatures, low, high, 0 if allowed is None else allowed,
          0 if floors is None else floors, drawn, *(runners_up or (0, 0, 0)), num_rows, logits.stride(0), vocab_size,
          0 if allowed is None else allowed.stride(0), num_threads=num_threads, dtype=logits.dtype,
          has_temperatures=temperatures is not None, has_noise=keys is not None, has_bits=allowed is not None,
          has_floors=floors is not None, has_runners_up=runners_up is not None)
    return drawn


def forbid(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits [rows, vocab_size] in float32, where tokens without a bit in `allowed` are far below all others."""
    out = torch.empty_like(logits)
    _forbid(logits, allowed, out, len(logits), logits.shape[1], allowed.stride(0),
            num_threads=threads_for(logits.numel()))
    return out


def takes_bits(logits: Tensor) -> bool:
    """Whether the bits of a vocabulary fill whole vectors."""
    return logits.shape[-1] % LANES == 0 and logits.is_contiguous()


def fits(logits: Tensor) -> bool:
    """Whether a vocabulary is at least one vector, and contiguous."""
    return logits.shape[-1] >= LANES and logits.stride(-1) == 1


@Kernel
def _forbid(code: Code, logits: Value, allowed: Value, out: Value, num_rows: Value, vocab_size: Value,
            word_stride: Value) -> None:
    with code.shares(num_rows) as row, code.loop(0, vocab_size, LANES) as token:
        place = (row * vocab_size + token) * SIZES[FLOAT32]
        numbers = code.numbers(logits + place, FLOAT32)
        is_allowed = code.bits(allowed + row * word_stride * SIZES[INT32] + token // 8)
        code.store(code.select(is_allowed, numbers, code.splat(code.number(FORBIDDEN))), out + place, FLOAT32)


@Kernel
def _draw(code: Code, logits: Value, temperatures: Value, low: Value, high: Value, allowed: Value, floors: Value,
          drawn: Value, lane_largest: Value, lane_token_ids: Value, lane_seconds: Value, num_rows: Value,
          row_stride: Value, vocab_size: Value, word_stride: Value, *, dtype: torch.dtype, has_temperatures: bool,
          has_noise: bool, has_bits: bool, has_floors: bool, has_runners_up: bool) -> None:
    element = ELEMENTS[dtype]
    with code.shares(num_rows) as row:
        line, bits = logits + row * row_stride * SIZES[element], allowed + row * word_stride * SIZES[INT32]
        keys = [code.splat(code.load(half + row * SIZES[INT32], INT32, 1)) for half in (low, high) if has_noise]
        floor = code.load(floors + row * SIZES[FLOAT32], FLOAT32, 1) if has_floors else None
        most = code.variable(code.splat(code.number(-math.inf)))
        best = code.variable(code.indices())
        second = code.variable(most.value)

        def go_through(temperature: Value | None, keys: list[Value]) -> None:
            with code.loop(0, vocab_size, LANES) as begin:
                first = code.smaller(begin, vocab_size - LANES)         # the last vector may overlap the one before
                if not has_bits:
                    look_at(first, None, temperature, keys)
                    return
                is_allowed = code.bits(bits + first // 8)
                with code.when(code.some(is_allowed)):
                    look_at(first, is_allowed, temperature, keys)

        def look_at(first: Value, is_allowed: Value | None, temperature: Value | None, keys: list[Value]) -> None:
            numbers, tokens = code.numbers(line + first * SIZES[element], element), code.indices() + first
            if is_allowed:
                numbers = code.select(is_allowed, numbers, code.splat(code.number(FORBIDDEN)))
            if temperature:
                numbers = numbers / temperature
            if floor:
                numbers = code.select(numbers < floor, FORBIDDEN, numbers)
            numbers = code.select(numbers.equals(numbers), numbers, code.splat(code.number(math.inf)))
            if not keys:
                keep(numbers, tokens)
                return
            v = _uniform(code, keys, code.narrowed(tokens))
            with code.when(code.some(numbers + _most_gumbel(code, v) > (second if has_runners_up else most).value)):
                keep(numbers + _gumbel(code, v), tokens)

        def keep(numbers: Value, tokens: Value) -> None:
            if has_runners_up:
                second.value = code.larger(second.value, code.smaller(numbers, most.value))
            is_larger = numbers > most.value
            most.value = code.select(is_larger, numbers, most.value)
            best.value = code.select(is_larger, tokens, best.value)

        if has_temperatures:
            temperature = code.load(temperatures + row * SIZES[FLOAT32], FLOAT32, 1)
            with code.when(temperature > 0.0):
                go_through(temperature, keys)
            with code.when(temperature <= 0.0):
                go_through(None, [])
        else:
            go_through(None, keys)
        if has_runners_up:
            lane = row * LANES
            code.store(most.value, lane_largest + lane * SIZES[FLOAT32], FLOAT32)
            code.store(best.value, lane_token_ids + lane * SIZES[INTEGER], INTEGER)
            code.store(second.value, lane_seconds + lane * SIZES[FLOAT32], FLOAT32)
        largest, place = code.largest(most.value), drawn + row * SIZES[INTEGER]
        beyond = code.splat(code.integer(1 << 40))
        code.store(code.least(code.select(most.value.equals(largest), best.value, beyond)), place, INTEGER)
        is_valid = (largest > -math.inf) & (largest < math.inf)
        code.store(code.select(is_valid, code.integer(1), code.integer(0)), place + num_rows * SIZES[INTEGER], INTEGER)


def _uniform(code: Code, keys: list[Value], tokens: Value) -> Value:
    """v of rng.py, for int32 tokens."""
    low, high = keys
    first, second = map(wrapped, MULTIPLIERS)
    x = tokens * wrapped(GOLDEN) + low
    x = (x ^ (x >> 16)) * first
    x = ((x ^ (x >> 15)) ^ high) * second
    x = (x ^ (x >> 15)) & 0x7FFFFFFF
    v = (code.as_number(x) + 0.5) * 2.0**-31
    return code.select(v < MAX_V, v, code.splat(code.number(MAX_V)))


def _most_gumbel(code: Code, v: Value) -> Value:
    """A bound of the noise that takes no logarithm: it is below -log(v), and v at least two to its exponent."""
    exponent = code.as_number(code.cast(v, vector(INT32)) >> EXPONENT_PLACE)
    return (exponent - EXPONENT_OF_ONE) * -MORE_THAN_LOG_2


def _gumbel(code: Code, v: Value) -> Value:
    """-log(-log(1 - v)), the inner logarithm by Kahan's formula, whose quotient cancels the rounding of 1 - v."""
    one = code.splat(code.number(1.0))
    u = one - v
    rounded = one - u
    is_nothing = rounded.equals(0.0)
    surprise = code.zeros() - code.log(u) * v / code.select(is_nothing, 1.0, rounded)
    return code.zeros() - code.log(code.select(is_nothing, v, surprise))
