"""Attention in matrix registers (AMX), for keys and values in bfloat16, laid out as in attention.py.

Up to 32 queries take 32 keys at a time, those of a page from a multiple of 32 on: a key that a query does not see has
weight zero and adds nothing, so a query's bits depend on it alone, in a chunk as in a decode row.
"""

from __future__ import annotations

import math

from worker.model.cpu import LANES, LOWEST, WORD_BYTES
from worker.model.cpu.amx import COLUMNS, ROW_BYTES, ROWS, Rows, add_up, registers
from worker.model.cpu.code import BFLOAT16, FLOAT32, INTEGER, LINE_BYTES, SIZES, Code, Value
from worker.model.cpu.kernel import Kernel

MOST_QUERIES = 2 * ROWS
KEYS = COLUMNS              # processed at a time: as many weights as a register's rows hold
LOG2_E = 1 / math.log(2)    # logits are exponents of two
SIZE, WIDE = SIZES[BFLOAT16], SIZES[FLOAT32]
FACT_BYTES, POSITION, PLACE, LARGEST = 128, 64, 72, 80  # of a query: a vector of its weight, then the offsets of these


@Kernel
def attend(code: Code, query: Value, keys: Value, values: Value, table: Value, slots: Value, positions: Value,
           begins: Value, out: Value, sinks: Value, num_tiles: Value, width: Value, num_kv_heads: Value, group: Value,
           row_stride: Value, head_stride: Value, window: Value, scaling: Value, softcap: Value, *, head_dim: int,
           page_len: int, tile: int, is_single: bool, has_softcap: bool, has_sinks: bool) -> None:
    """As attention.py's, with the same arguments."""
    met = _Queries(code, tile, head_dim)
    if has_softcap:
        scaling, softcap = scaling / softcap, softcap * LOG2_E
    else:
        scaling = scaling * LOG2_E
    num_units = num_tiles * num_kv_heads

    def start_of(unit: Value) -> tuple[Value, Value, Value, Value]:
        """Its key head, and its tile's first row, first query and slot."""
        kv_head, index = (unit % num_kv_heads, unit // num_kv_heads) if is_single else (
            unit // num_tiles, unit % num_tiles)        # heads of a row are neighbours; tiles of a run share their keys
        place = begins + index * (2 * SIZES[INTEGER])
        first_row, begin = code.load(place, INTEGER, 1), code.load(place + SIZES[INTEGER], INTEGER, 1)
        return kv_head, first_row, begin, code.load(slots + first_row * SIZES[INTEGER], INTEGER, 1)

    def first_token(position: Value) -> Value:
        return code.larger(position - window + 1, code.integer(0)) // KEYS * KEYS

    def offset_of(slot: Value, kv_head: Value, token: Value) -> Value:
        place = table + (slot * width + token // page_len) * SIZES[INTEGER]
        page = code.load(place, INTEGER, 1) * num_kv_heads + kv_head
        return (page * page_len + token % page_len) * (head_dim * SIZE)

    def begin_of(unit: Value) -> Value:
        """The address of its first keys, if the tile is a single row."""
        kv_head, row, _, slot = start_of(code.smaller(unit, num_units - 1))
        return offset_of(slot, kv_head, first_token(code.load(positions + row * SIZES[INTEGER], INTEGER, 1)))

    with registers(code, code.integer(tile)), code.shares(num_units) as unit:
        kv_head, first_row, begin, slot = start_of(unit)
        with code.loop(0, tile) as i:
            each = begin + i
            row, head = (first_row, kv_head * group + each) if is_single else (
                first_row + each // group, kv_head * group + each % group)
            position = code.load(positions + row * SIZES[INTEGER], INTEGER, 1)
            sink = code.load(sinks + head * WIDE, FLOAT32, 1) if has_sinks else None
            met.begin(i, query + (row * row_stride + head * head_stride) * SIZE, position,
                      out + (row * num_kv_heads * group + head) * (head_dim * SIZE), sink)
        first, last = met.position(code.integer(0)), met.position(code.integer(tile - 1))
        lowest = code.larger(last - window + 1, code.integer(0))        # the first key that all of them see
        after = begin_of(unit + 1) if is_single else None
        with code.loop(first_token(first), last + 1, KEYS) as token:
            offset = offset_of(slot, kv_head, token)
            met.multiply(keys + offset)
            ahead = offset_of(slot, kv_head, code.smaller(token + KEYS, last))
            if after is not None:                       # prefetched while the present keys are computed
                ahead = code.select(token + KEYS <= last, ahead, after)
                code.prefetch(keys + ahead, KEYS * head_dim * SIZE)
            else:                                       # later tiles of a run find it in a cache
                with code.when(begin.equals(0)):
                    for cache in (keys, values):
                        code.prefetch(cache + ahead, KEYS * head_dim * SIZE)
            is_inside = (token > lowest - 1) & (token + KEYS <= first + 1)
            with code.loop(0, tile) as i:
                met.weigh(i, token, window, scaling, softcap if has_softcap else None, is_inside)
            met.add(values + offset, code.smaller(last + 1 - token, KEYS), values + ahead if is_single else None)
        with code.loop(0, tile) as i:
            met.store(i)


class _Queries:
    """The queries of a tile, and their sums over the keys so far, in memory: registers are loaded for each product."""

    def __init__(self, code: Code, count: int, head_dim: int):
        self.code, self.head_dim, self.num_halves = code, head_dim, -(-count // ROWS)
        self.facts = self._room(count, FACT_BYTES)
        self.queries, self.weights = self._room(count, head_dim * SIZE), self._room(count, KEYS * SIZE)
        self.logits, self.sums = self._room(count, KEYS * WIDE), self._room(count, head_dim * WIDE)
        self.pairs = self._room(KEYS // 2, 2 * head_dim * SIZE)         # of values, element by element

    def _room(self, num_rows: int, row_bytes: int) -> Rows:
        return Rows(self.code.scratch(num_rows * row_bytes // LINE_BYTES), self.code.integer(row_bytes))

    def begin(self, i: Value, query: Value, position: Value, place: Value, sink: Value | None) -> None:
        """Initial state: only the sink counts. `place` is the output's address."""
        code, facts = self.code, self.facts.row(i)
        for j in range(0, self.head_dim, COLUMNS):
            code.store(code.load(query + j * SIZE, BFLOAT16, COLUMNS), self.queries.row(i) + j * SIZE, BFLOAT16)
        for j in range(0, self.head_dim, LANES):
            code.store(code.zeros(), self.sums.row(i) + j * WIDE, FLOAT32)
        weight = code.zeros() if sink is None else code.select(code.indices().equals(0), 1.0, code.zeros())
        code.store(weight, facts, FLOAT32)
        code.store(code.number(LOWEST) if sink is None else sink * LOG2_E, facts + LARGEST, FLOAT32)
        code.store(position, facts + POSITION, INTEGER)
        code.store(place, facts + PLACE, INTEGER)

    def position(self, i: Value) -> Value:
        return self.code.load(self.facts.row(i) + POSITION, INTEGER, 1)

    def multiply(self, keys: Value) -> None:
        """Multiplies with keys, into logits."""
        lanes = Rows(keys, self.code.integer(LANES * WORD_BYTES))
        add_up(self.code, None, self.queries, lanes, self.logits, self.head_dim // COLUMNS, self.num_halves,
               next_outputs=LANES * self.head_dim * SIZE, next_step=ROWS * ROW_BYTES)

    def weigh(self, i: Value, token: Value, window: Value, scaling: Value, softcap: Value | None, is_inside: Value
              ) -> None:
        """Weighs the keys from `token` on for query i; `softcap` scales tanh, where there is one."""
        code, facts, position = self.code, self.facts.row(i), self.position(i)
        logits = []
        for j in range(2):
            products = code.load(self.logits.row(i) + j * ROW_BYTES, FLOAT32) * scaling
            some = code.variable(products if softcap is None else softcap * code.tanh(products))
            with code.when(is_inside.equals(0)):
                tokens = code.indices() + (token + j * LANES)
                is_seen = (tokens <= position) & (tokens > position - window)
                some.value = code.select(is_seen, some.value, code.splat(code.number(-math.inf)))
            logits.append(some)
        before = code.load(facts + LARGEST, FLOAT32, 1)
        highest = code.larger(*(some.value for some in logits))
        with code.when(code.some(highest > before)):
            largest = code.larger(code.largest(highest), before)
            code.store(largest, facts + LARGEST, FLOAT32)
            shrunk = code.exp2(code.splat(before - largest))
            for place in (facts, *(self.sums.row(i) + j * WIDE for j in range(0, self.head_dim, LANES))):
                code.store(code.load(place, FLOAT32) * shrunk, place, FLOAT32)
        largest, weight = code.load(facts + LARGEST, FLOAT32, 1), code.load(facts, FLOAT32)
        for j, some in enumerate(logits):
            weights = code.exp2(some.value - largest)
            weight = weight + weights
            code.store(weights, self.weights.row(i) + j * (LANES * SIZE), BFLOAT16)
        code.store(weight, facts, FLOAT32)

    def add(self, values: Value, count: Value, ahead: Value | None) -> None:
        """Adds `count` values by every query's weights, and prefetches those at `ahead`."""
        code, pair_bytes = self.code, 2 * self.head_dim * SIZE
        with code.loop(0, KEYS // 2) as pair:
            # after the last value memory may hold NaN: the last value, with weight zero, is read in its place
            rows = [values + code.smaller(pair * 2 + i, count - 1) * (self.head_dim * SIZE) for i in range(2)]
            if ahead is not None:
                code.prefetch(ahead + pair * pair_bytes, pair_bytes)
            for j in range(0, self.head_dim, COLUMNS):
                parts = code.interleaved(*(code.load(row + j * SIZE, BFLOAT16, COLUMNS) for row in rows))
                for i, part in enumerate(parts):
                    code.store(part, self.pairs.row(pair) + (j * (2 * SIZE) + i * ROW_BYTES), BFLOAT16)
        with code.loop(0, self.head_dim * WIDE, 2 * LANES * WIDE) as offset:
            add_up(code, self.sums + offset, self.weights, self.pairs + offset, self.sums + offset, 1, self.num_halves,
                   next_outputs=ROW_BYTES, next_step=pair_bytes)

    def store(self, i: Value) -> None:
        code, facts = self.code, self.facts.row(i)
        weight, place = code.total(code.load(facts, FLOAT32)), code.load(facts + PLACE, INTEGER, 1)
        for j in range(0, self.head_dim, LANES):
            total = code.load(self.sums.row(i) + j * WIDE, FLOAT32)
            code.store(total / weight, place + j * SIZE, BFLOAT16)
