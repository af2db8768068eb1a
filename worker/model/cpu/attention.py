"""Attention over the pages of slots, for a CPU.

A query takes its keys 16 at a time, one in each lane, whatever other queries there are: its bits depend on it alone,
and are the same in a chunk of a prompt and in a decode row. Its sums are kept relative to the largest logit so far
(Milakov and Gimelshein, arXiv:1805.02867). In bfloat16 weights are rounded as values are, and multiplied in pairs. Keys
and values are read in place, by one core for some queries at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.model.cpu import LANES, LOWEST, WORD_BYTES, amx, amx_attention
from worker.model.cpu.code import BFLOAT16, FLOAT32, INT32, INTEGER, LINE_BYTES, SIZES, Code, Value, vector
from worker.model.cpu.kernel import ELEMENTS, Kernel, empty, threads_for
from worker.model.cpu.pointwise import angles_at, require_like, turn

NO_WINDOW = 1 << 40         # tokens: longer than any context
NUM_SUMS = 24               # vectors in registers: the sums of a tile's queries, over all dimensions
MAX_TILINGS = 128           # of a forward's runs, to be cached
MAX_CHAINS = 4              # of additions to one product, in parallel: each addition waits for the one before

Angles = tuple[Tensor, Tensor]      # cosines and sines, [rows, head_dim] each


class Rows(NamedTuple):
    """The slots and positions of a forward's rows, and which of their queries share a tile.

    Tiles are [tiles, 2]: the first row of each, and the first query, counted within that row's run. Runs of consecutive
    tokens of one slot share tiles, which read a key once for many queries; other rows have tiles of their own.
    """

    slots: Tensor           # [rows]
    positions: Tensor       # [rows]
    single_tiles: Tensor
    shared_tiles: Tensor


@dataclass(slots=True)
class Runs:
    """Rows as runs of consecutive tokens of one slot each, in order."""

    slots: Tensor
    positions: Tensor
    lens: Sequence[int]
    _rows: dict[tuple[int, int], Rows] = field(init=False, default_factory=dict)

    @classmethod
    def placed(cls, rows: Rows, group: int, most: int) -> Runs:
        """Wraps rows whose tiles are already known."""
        runs = cls(rows.slots, rows.positions, [])
        runs._rows[group, most] = rows
        return runs

    def rows(self, group: int, most: int) -> Rows:
        """Rows for layers where `group` query heads share a key head, and a tile has room for `most` queries."""
        if (group, most) not in self._rows:
            self._rows[group, most] = Rows(self.slots, self.positions, *in_tiles(tuple(self.lens), group, most))
        return self._rows[group, most]


def most_queries(dtype: torch.dtype, head_dim: int) -> int:
    """The queries that a tile has room for."""
    return amx_attention.MOST_QUERIES if amx.computes(dtype, head_dim) else max(1, NUM_SUMS * LANES // head_dim)


def queries_of_single(group: int, most: int) -> int:
    """The queries in a tile of one row: a group of heads in as few equal parts as fit."""
    return -(-group // -(-group // most))


@lru_cache(maxsize=MAX_TILINGS)
def in_tiles(lens: tuple[int, ...], group: int, most: int) -> tuple[Tensor, Tensor]:
    """Tiles of single rows, and of runs that fill a tile, as in `Rows`; `group` query heads share a key head.

    Cached, since most steps have the same runs as the step before.
    """
    single = queries_of_single(group, most)
    of_singles, of_runs, row = [], [], 0
    for run_len in lens:
        if run_len > 1 and run_len * group >= most:     # the last tile may overlap
            of_runs += [(row, min(begin, run_len * group - most)) for begin in range(0, run_len * group, most)]
        else:
            of_singles += [(each, min(begin, group - single)) for each in range(row, row + run_len)
                           for begin in range(0, group, single)]
        row += run_len
    return _table(of_singles), _table(of_runs)


def _table(tiles: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(tiles, dtype=torch.int64).view(-1, 2)


def attend(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows: Rows, *, scaling: float,
           window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of queries [rows, heads, head_dim] over pages as in `KVLayer`, with keys in lanes; a table of [slots,
    any] lists the pages of each slot.

    Each row sees the keys up to its position, which must be in the pages already.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, page_len = values.shape[2:4]
    group = num_heads // num_kv_heads
    out = empty(num_rows, num_heads * head_dim, query.dtype).view(num_rows, num_heads, head_dim)
    most = most_queries(query.dtype, head_dim)
    kernel = amx_attention.attend if amx.computes(query.dtype, head_dim) else partial(_attend, dtype=query.dtype)
    for begins, tile, is_single in ((rows.single_tiles, queries_of_single(group, most), True),
                                    (rows.shared_tiles, most, False)):
        if len(begins):
            kernel(query, keys, values, table, rows.slots, rows.positions, begins, out,
                    0 if sinks is None else sinks.float(), len(begins), table.stride(0), num_kv_heads, group,
                    query.stride(0), query.stride(1), window or NO_WINDOW, float(scaling), float(softcap or 1),
                    num_threads=threads_for(query.numel() * LANES), head_dim=head_dim,
                    page_len=page_len, tile=tile, is_single=is_single, has_softcap=softcap is not None,
                    has_sinks=sinks is not None)
    return out


def write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, table: Tensor, slots: Tensor, positions: Tensor,
          query: Tensor, angles: Angles | None = None) -> None:
    """Writes one token of each row, [rows, num_kv_heads, head_dim] each, into pages as above.

    With angles of [rows, head_dim] keys are rotated as they are written, and queries in place.
    """
    num_rows, num_kv_heads, head_dim = key.shape
    if angles and any(each.shape != (num_rows, head_dim) for each in angles):
        raise RuntimeError(f"angles of {tuple(angles[0].shape)} do not turn heads of {tuple(key.shape)}")
    cos, sin = angles or (key, key)
    require_like(keys, key, value, query, cos, sin)
    _write(keys, values, key, value, query, cos, sin, table, slots, positions, num_rows, table.stride(0), num_kv_heads,
           query.shape[1] // num_kv_heads, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
           query.stride(0), query.stride(1), cos.stride(0), sin.stride(0),
           num_threads=threads_for(2 * key.numel() + (query.numel() if angles else 0)), dtype=key.dtype,
           head_dim=head_dim, page_len=values.shape[3], has_angles=angles is not None)


@Kernel
def _write(code: Code, keys: Value, values: Value, key: Value, value: Value, query: Value, cos: Value, sin: Value,
           table: Value, slots: Value, positions: Value, num_rows: Value, width: Value, num_kv_heads: Value,
           group: Value, key_row_stride: Value, key_head_stride: Value, value_row_stride: Value,
           value_head_stride: Value, query_row_stride: Value, query_head_stride: Value, cos_stride: Value,
           sin_stride: Value, *, dtype: torch.dtype, head_dim: int, page_len: int, has_angles: bool) -> None:
    element = ELEMENTS[dtype]
    size, num_bytes = SIZES[element], head_dim * SIZES[element]
    turned = code.scratch(-(-num_bytes // LINE_BYTES))
    with code.shares(num_rows) as row:
        slot, position = (code.load(each + row * SIZES[INTEGER], INTEGER, 1) for each in (slots, positions))
        angles = angles_at(code, cos + row * cos_stride * size, sin + row * sin_stride * size, element, head_dim
                           ) if has_angles else []
        with code.loop(0, num_kv_heads) as head:
            place = table + (slot * width + position // page_len) * SIZES[INTEGER]
            page = code.load(place, INTEGER, 1) * num_kv_heads + head
            token, lane = page * page_len + position % page_len, position % LANES
            source = value + (row * value_row_stride + head * value_head_stride) * size
            place = values + token * num_bytes
            for i in range(0, num_bytes, LANES * size):
                code.store(code.load(source + i, element), place + i, element)
            source = key + (row * key_row_stride + head * key_head_stride) * size
            if has_angles:
                turn(code, source, turned, angles, element)
                source = turned
            place = keys + (token - lane) * num_bytes + lane * WORD_BYTES
            for i in range(0, num_bytes, WORD_BYTES):
                code.store(code.load(source + i, INT32, 1), place + i * LANES, INT32)
        if has_angles:
            with code.loop(0, num_kv_heads * group) as head:
                place = query + (row * query_row_stride + head * query_head_stride) * size
                turn(code, place, place, angles, element)


@Kernel
def _attend(code: Code, query: Value, keys: Value, values: Value, table: Value, slots: Value, positions: Value,
            begins: Value, out: Value, sinks: Value, num_tiles: Value, width: Value, num_kv_heads: Value, group: Value,
            row_stride: Value, head_stride: Value, window: Value, scaling: Value, softcap: Value, *,
            dtype: torch.dtype, head_dim: int, page_len: int, tile: int, is_single: bool, has_softcap: bool,
            has_sinks: bool) -> None:
    element = ELEMENTS[dtype]
    size = SIZES[element]
    with code.shares(num_tiles * num_kv_heads) as unit:
        kv_head, index = (unit % num_kv_heads, unit // num_kv_heads) if is_single else (
            unit // num_tiles, unit % num_tiles)        # heads of a row are neighbours; tiles of a run share their keys
        place = begins + index * (2 * SIZES[INTEGER])
        first_row, begin = code.load(place, INTEGER, 1), code.load(place + SIZES[INTEGER], INTEGER, 1)
        slot = code.load(slots + first_row * SIZES[INTEGER], INTEGER, 1)
        queries, places = [], []
        for i in range(tile):
            row, head = first_row + (begin + i) // group, kv_head * group + (begin + i) % group
            position = code.load(positions + row * SIZES[INTEGER], INTEGER, 1)
            sink = code.load(sinks + head * SIZES[FLOAT32], FLOAT32, 1) if has_sinks else None
            queries.append(_Query(code, query + (row * row_stride + head * head_stride) * size, element, head_dim,
                                  position, window, sink))
            places.append(out + (row * num_kv_heads * group + head) * (head_dim * size))
        end = queries[-1].position + 1
        with code.loop(queries[0].first // LANES * LANES, end, LANES) as token:
            place = table + (slot * width + token // page_len) * SIZES[INTEGER]
            page = code.load(place, INTEGER, 1) * num_kv_heads + kv_head
            offset = (page * page_len + token % page_len) * (head_dim * size)
            logits = [code.variable(scaling * product) for product in _products(queries, keys + offset)]
            if has_softcap:
                for some in logits:
                    some.value = softcap * code.tanh(some.value / softcap)
            is_inside = (token > queries[-1].first - 1) & (token + LANES <= queries[0].position + 1)
            with code.when(is_inside.equals(0)):
                for each, some in zip(queries, logits, strict=True):
                    some.value = each.seen(some.value, token)
            for each, some in zip(queries, logits, strict=True):
                each.weigh(some.value)
            _add(queries, values + offset, code.smaller(end - token, LANES))
        for each, place in zip(queries, places, strict=True):
            each.store(place)


class _Query:
    """One query, and its sums over the keys so far."""

    def __init__(self, code: Code, place: Value, element: Any, head_dim: int, position: Value, window: Value,
                 sink: Value | None):
        self.code, self.place, self.element, self.head_dim = code, place, element, head_dim
        self.position, self.first = position, code.larger(position - window + 1, code.integer(0))
        self.is_paired = element is BFLOAT16 and head_dim % (2 * LANES) == 0       # whole vectors of pairs
        is_first = code.indices().equals(0)
        self.largest = code.variable(code.number(LOWEST) if sink is None else sink)
        self.weight = code.variable(code.zeros() if sink is None else code.select(is_first, 1.0, code.zeros()))
        self.sums = [code.variable(code.zeros()) for _ in range(0, head_dim, LANES)]
        self.weights = code.scratch()                   # of the present keys

    def word(self, i: Value) -> Value:
        """One word of the query, broadcast to all lanes."""
        code, place = self.code, self.place + i * WORD_BYTES
        if self.element is FLOAT32:
            return code.splat(code.load(place, FLOAT32, 1))
        return code.cast(code.splat(code.load(place, INT32, 1)), vector(BFLOAT16, 2 * LANES))

    def seen(self, logits: Value, token: Value) -> Value:
        """Logits of keys from `token` on: -inf for those that the query does not see."""
        code, tokens = self.code, self.code.indices() + token
        is_seen = (tokens <= self.position) & (tokens > self.first - 1)
        return code.select(is_seen, logits, code.splat(code.number(-math.inf)))

    def weigh(self, logits: Value) -> None:
        code, before = self.code, self.largest.value
        with code.when(code.some(logits > before)):
            largest = code.larger(code.largest(logits), before)
            self.largest.value = largest
            shrunk = code.exp(code.splat(before - largest))
            for each in (self.weight, *self.sums):
                each.value = each.value * shrunk
        weights = code.exp(logits - self.largest.value)
        self.weight.value = self.weight.value + weights
        code.store(weights, self.weights, self.element if self.is_paired else FLOAT32)

    def weight_of(self, token: Value) -> Value:
        """The weight of one of the present keys, or of a pair of them, broadcast to a vector."""
        code = self.code
        if not self.is_paired:
            return code.splat(code.load(self.weights + token * SIZES[FLOAT32], FLOAT32, 1))
        pair = code.load(self.weights + token * SIZES[self.element], INT32, 1)
        return code.cast(code.splat(pair), vector(self.element, 2 * LANES))

    def store(self, place: Value) -> None:
        weight = self.code.total(self.weight.value)
        for i, total in enumerate(self.sums):
            self.code.store(total.value / weight, place + i * LANES * SIZES[self.element], self.element)


def _products(queries: list[_Query], keys: Value) -> list[Value]:
    """The products of each query with 16 keys, one in each lane."""
    code, element, head_dim = queries[0].code, queries[0].element, queries[0].head_dim
    together = WORD_BYTES // SIZES[element]
    multiply = code.pairs if together > 1 else code.fused
    num_chains = min(MAX_CHAINS, head_dim // LANES)
    sums = [[code.variable(code.zeros()) for _ in range(num_chains)] for _ in queries]
    with code.loop(0, head_dim // together, num_chains) as first:
        for i in range(num_chains):
            word = first + i
            key = code.load(keys + word * (LANES * WORD_BYTES), element, LANES * together)
            for query, chains in zip(queries, sums, strict=True):
                chains[i].value = multiply(query.word(word), key, chains[i].value)
    return [sum((each.value for each in chains[1:]), chains[0].value) for chains in sums]


def _add(queries: list[_Query], values: Value, count: Value) -> None:
    """Adds `count` values by every query's weights."""
    code, element, head_dim = queries[0].code, queries[0].element, queries[0].head_dim
    is_paired = queries[0].is_paired
    multiply, width = (code.pairs, 2 * LANES) if is_paired else (code.fused, LANES)
    with code.loop(0, count, 2 if is_paired else 1) as i:
        # after the last value memory may hold NaN: the last value, with weight zero, is read in its place
        tokens = [i, code.smaller(i + 1, count - 1)] if is_paired else [i]
        rows = [values + token * (head_dim * SIZES[element]) for token in tokens]
        columns: list[Value] = []
        for j in range(0, head_dim, width):
            parts = [(code.load if is_paired else code.numbers)(row + j * SIZES[element], element, width)
                     for row in rows]
            columns += code.interleaved(*parts) if is_paired else parts
        for query in queries:
            weight = query.weight_of(i)
            for total, each in zip(query.sums, columns, strict=True):
                total.value = multiply(weight, each, total.value)
