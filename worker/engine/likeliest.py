"""Top k and log-sum-exp of rows on a CPU, each in two passes over the vocabulary.

For the top k a row is cut into `NUM_PARTS` parts. The k largest of the parts' maxima are elements of the row, so the
least of them is a lower bound for its top k: only elements that reach it have to be sorted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.model.cpu import LANES
from worker.model.cpu.code import FLOAT32, INT32, INTEGER, SIZES, Code, Value
from worker.model.cpu.kernel import ELEMENTS, Kernel, threads_for

NUM_SPANS = 32              # per row; every lane of a span is a part
NUM_PARTS = NUM_SPANS * LANES
MAX_COUNT = NUM_PARTS // 4  # above it, too many elements reach the bound
ROOM = 1024                 # for elements that reach the bound; without room for one more vector, torch computes


def fits(logits: Tensor) -> bool:
    """Whether each row is many whole vectors and contiguous."""
    return logits.shape[1] % LANES == 0 and logits.shape[1] >= 2 * NUM_PARTS and logits.stride(1) == 1


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The `count` largest of each row of [rows, vocab_size], descending, equal ones by ascending id: values and ids.
    None where torch is as fast, or where a row has NaN or too many ties."""
    num_rows, vocab_size = logits.shape
    if count > MAX_COUNT or not fits(logits):
        return None
    maxima, ids = torch.empty(num_rows, NUM_PARTS), torch.zeros(num_rows, ROOM, dtype=torch.int32)
    counts = torch.empty(num_rows, dtype=torch.long)
    threads, dtype = threads_for(logits.numel()), logits.dtype
    _survey(logits, maxima, num_rows, logits.stride(0), vocab_size, num_threads=threads, dtype=dtype)
    least = maxima.topk(count, dim=-1).values[:, -1].contiguous()
    _collect(logits, least, ids, counts, num_rows, logits.stride(0), vocab_size, num_threads=threads, dtype=dtype)
    most = int(counts.max())
    if most > ROOM - LANES or int(counts.min()) < count:
        return None
    found = ids[:, :most].long()
    values = logits.gather(1, found).masked_fill_(torch.arange(most) >= counts[:, None], -math.inf)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], found.gather(1, order[:, :count])


def log_totals(logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """log Σ exp of each row of [rows, vocab_size], [rows]; of logits divided by a temperature per row, where these are
    given."""
    num_rows, vocab_size = logits.shape
    largest, totals = torch.empty(num_rows), torch.empty(num_rows)
    _weigh(logits, 0 if temperatures is None else temperatures, largest, totals, num_rows, logits.stride(0), vocab_size,
           num_threads=threads_for(logits.numel()), dtype=logits.dtype, has_temperatures=temperatures is not None)
    return totals.log() + largest


@Kernel
def _survey(code: Code, logits: Value, maxima: Value, num_rows: Value, row_stride: Value, vocab_size: Value, *,
            dtype: torch.dtype) -> None:
    """The maximum of every part."""
    with code.shares(num_rows) as row, code.loop(0, NUM_SPANS) as span:
        most = code.variable(code.splat(code.number(-math.inf)))
        vectors = vocab_size // LANES
        begin, end = (each * vectors // NUM_SPANS * LANES for each in (span, span + 1))
        with code.loop(begin, end, LANES) as token:
            most.value = code.larger(most.value, _numbers(code, logits, row * row_stride + token, dtype))
        code.store(most.value, maxima + (row * NUM_PARTS + span * LANES) * SIZES[FLOAT32], FLOAT32)


@Kernel
def _collect(code: Code, logits: Value, least: Value, ids: Value, counts: Value, num_rows: Value, row_stride: Value,
             vocab_size: Value, *, dtype: torch.dtype) -> None:
    """The elements that reach a row's bound, and their number, even if there is no room."""
    with code.shares(num_rows) as row:
        border = code.splat(code.load(least + row * SIZES[FLOAT32], FLOAT32, 1))
        count = code.variable(code.integer(0))
        with code.loop(0, vocab_size, LANES) as token:
            is_large = (_numbers(code, logits, row * row_stride + token, dtype) < border) ^ 1   # or NaN
            with code.when(code.some(is_large)):
                with code.when(count.value <= ROOM - LANES):
                    place = ids + (row * ROOM + count.value) * SIZES[INT32]
                    code.pack(code.narrowed(code.indices() + token), is_large, place)
                count.value = count.value + code.how_many(is_large)
        code.store(count.value, counts + row * SIZES[INTEGER], INTEGER)


@Kernel
def _weigh(code: Code, logits: Value, temperatures: Value, largest: Value, totals: Value, num_rows: Value,
           row_stride: Value, vocab_size: Value, *, dtype: torch.dtype, has_temperatures: bool) -> None:
    with code.shares(num_rows) as row:
        temperature = code.load(temperatures + row * SIZES[FLOAT32], FLOAT32, 1) if has_temperatures else None

        def scaled(token: Value) -> Value:
            numbers = _numbers(code, logits, row * row_stride + token, dtype)
            return numbers / temperature if temperature else numbers

        most, total = code.variable(code.splat(code.number(-math.inf))), code.variable(code.zeros())
        with code.loop(0, vocab_size, LANES) as token:
            most.value = code.larger(most.value, scaled(token))
        peak = code.largest(most.value)
        with code.loop(0, vocab_size, LANES) as token:
            total.value = total.value + code.exp(scaled(token) - peak)
        code.store(peak, largest + row * SIZES[FLOAT32], FLOAT32)
        code.store(code.total(total.value), totals + row * SIZES[FLOAT32], FLOAT32)


def _numbers(code: Code, logits: Value, place: Value, dtype: torch.dtype) -> Value:
    element = ELEMENTS[dtype]
    return code.numbers(logits + place * SIZES[element], element)
