"""The Triton kernels of paged attention: keys and values into pages, and queries over them.

A pool of keys, or of values, is [num_pages, num_kv_heads, page_len, head_dim]; row r finds the pages of its sequence in
`table[r]`. Position p of a row is the token's place in its sequence: it sees [0, p]; -1 marks a padding row, which
writes nothing and returns zeros. The keys of a row are cut into splits of fixed length, each reduced by a program of
its own; the last program to end sums all splits in order: a row's bits depend neither on its neighbours nor on their
lengths. Grids depend on shapes only, so that a CUDA graph can replay them. (Flash-decoding, Dao et al. 2023.)

Prompts come in tiles: `TILE_LEN` rows of one sequence that read its keys together and share a row of the table. What a
tile's other rows see is masked, so here too a row's bits are its own.
They know tensors. They know nothing of layers, slots or schedules.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.model.attention import TILE_LEN
from worker.model.chain import chained, follow, lead

SPLIT_LEN = 256             # tokens reduced by one program
BLOCK_LEN = 64              # of them, read at a time
NUM_WARPS, NUM_STAGES = 4, 2
MIN_DOT = 16                # the least rows and columns of a product on tensor cores


Angles = tuple[Tensor, Tensor]          # cosines and sines of [rows, head_dim], to rotate heads


def store(keys: Tensor, values: Tensor, query: Tensor, new_keys: Tensor, new_values: Tensor, table: Tensor,
          positions: Tensor, angles: Angles | None, *, tile_len: int = 1) -> None:
    """Writes new keys and values of [rows, num_kv_heads, head_dim] at their rows' positions; `tile_len` rows share a
    row of the table. With angles, keys are rotated as they are written, and queries of [rows, num_heads, head_dim] in
    place."""
    num_rows, num_kv_heads, head_dim = new_keys.shape
    cos, sin = angles or (new_keys, new_keys)
    if angles and (cos.shape[1] != head_dim or len(cos) < num_rows or head_dim % 2):
        raise RuntimeError(f"angles of {tuple(cos.shape)} do not turn heads of {tuple(query.shape)}")
    assert query.stride(2) == new_keys.stride(2) == new_values.stride(2) == cos.stride(-1) == sin.stride(-1) == 1
    assert table.stride(1) == positions.stride(0) == 1
    num_heads, half = query.shape[1], head_dim // 2
    _store[(num_rows,)](
        keys, values, query, new_keys, new_values, table, positions, cos, sin, *keys.stride()[:3], *query.stride()[:2],
        *new_keys.stride()[:2], *new_values.stride()[:2], table.stride(0), cos.stride(0), sin.stride(0),
        PAGE_LEN=keys.shape[2], TILE_LEN=tile_len, NUM_HEADS=num_kv_heads,
        BLOCK_HEADS=triton.next_power_of_2(num_kv_heads), NUM_QUERY_HEADS=num_heads,
        BLOCK_QUERY_HEADS=triton.next_power_of_2(num_heads), HEAD_DIM=head_dim, BLOCK_DIM=_block(head_dim),
        HALF=half, BLOCK_HALF=triton.next_power_of_2(half), HAS_ANGLES=angles is not None, **chained(keys.device))


def attend(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor, arrived: Tensor, *,
           scaling: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
           ) -> Tensor:
    """Attention of queries [rows, num_heads, head_dim] over their rows' pages; returns the same shape.

    `arrived`: int32 zeros, one per row and key head; zeros again afterwards.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, page_len = keys.shape[1:3]
    assert query.stride(2) == table.stride(1) == positions.stride(0) == 1
    num_splits = triton.cdiv(table.shape[1] * page_len, SPLIT_LEN)
    parts = query.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32)
    peaks = query.new_empty(num_rows, num_heads, num_splits, dtype=torch.float32)
    sums = torch.empty_like(peaks)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    group = num_heads // num_kv_heads
    assert len(arrived) >= num_rows * num_kv_heads
    _attend_split[(num_rows, num_kv_heads, num_splits)](
        query, keys, values, table, positions, parts, peaks, sums, arrived, peaks if sinks is None else sinks, out,
        *query.stride()[:2], *keys.stride()[:3], table.stride(0), scaling, softcap or 0.0, window or 0, num_splits,
        GROUP=group, BLOCK_GROUP=_block(group), PAGE_LEN=page_len, HEAD_DIM=head_dim, BLOCK_DIM=_block(head_dim),
        SPLIT_LEN=SPLIT_LEN, BLOCK_LEN=BLOCK_LEN, HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None, num_warps=NUM_WARPS, num_stages=NUM_STAGES, **chained(keys.device))
    return out


def attend_tiles(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor, *, scaling: float,
                 window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """As `attend`, for tiles: queries of [tiles · TILE_LEN, num_heads, head_dim], a table of [tiles, pages]."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, page_len = keys.shape[1:3]
    assert num_rows == TILE_LEN * len(table)
    assert query.stride(2) == table.stride(1) == positions.stride(0) == 1
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _attend_tile[(len(table), num_heads)](
        query, keys, values, table, positions, positions if sinks is None else sinks, out, *query.stride()[:2],
        *keys.stride()[:3], table.stride(0), scaling, softcap or 0.0, window or 0, GROUP=num_heads // num_kv_heads,
        PAGE_LEN=page_len, HEAD_DIM=head_dim, BLOCK_DIM=_block(head_dim), TILE_LEN=TILE_LEN, BLOCK_LEN=BLOCK_LEN,
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None, HAS_SINKS=sinks is not None)
    return out


def _block(size: int) -> int:
    return max(MIN_DOT, int(triton.next_power_of_2(size)))


@triton.jit
def _turn(source, target, cos, sin, is_there, is_dim, dims, HALF: tl.constexpr):
    """Rotates heads whose halves begin at `source`."""
    first = tl.load(source + dims, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + dims, mask=is_there, other=0.0).to(tl.float32)
    first_cos = tl.load(cos + dims, mask=is_dim, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + dims, mask=is_dim, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + dims, (first * first_cos - second * first_sin).to(kind), mask=is_there)
    tl.store(target + HALF + dims, (second * second_cos + first * second_sin).to(kind), mask=is_there)


@triton.jit
def _store(keys, values, query, new_keys, new_values, table, positions, cos, sin, page_stride, head_stride,
           token_stride, query_row_stride, query_head_stride, key_row_stride, key_head_stride, value_row_stride,
           value_head_stride, table_stride, cos_stride, sin_stride, PAGE_LEN: tl.constexpr, TILE_LEN: tl.constexpr,
           NUM_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, NUM_QUERY_HEADS: tl.constexpr,
           BLOCK_QUERY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HALF: tl.constexpr,
           BLOCK_HALF: tl.constexpr, HAS_ANGLES: tl.constexpr, IS_CHAINED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    follow(IS_CHAINED)
    lead(IS_CHAINED)
    position = tl.load(positions + row)
    if position >= 0:
        page = tl.load(table + row // TILE_LEN * table_stride + position // PAGE_LEN).to(tl.int64)
        heads, dims = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
        is_there = (heads < NUM_HEADS) & (dims < HEAD_DIM)
        places = page * page_stride + heads * head_stride + position % PAGE_LEN * token_stride
        sources = new_keys + row * key_row_stride + heads * key_head_stride
        value = tl.load(new_values + row * value_row_stride + heads * value_head_stride + dims, mask=is_there)
        tl.store(values + places + dims, value, mask=is_there)
        if HAS_ANGLES:
            halves = tl.arange(0, BLOCK_HALF)[None, :]
            is_half = halves < HALF
            cos += row * cos_stride
            sin += row * sin_stride
            _turn(sources, keys + places, cos, sin, (heads < NUM_HEADS) & is_half, is_half, halves, HALF)
            query_heads = tl.arange(0, BLOCK_QUERY_HEADS)[:, None]
            queries = query + row * query_row_stride + query_heads * query_head_stride
            _turn(queries, queries, cos, sin, (query_heads < NUM_QUERY_HEADS) & is_half, is_half, halves, HALF)
        else:
            tl.store(keys + places + dims, tl.load(sources + dims, mask=is_there), mask=is_there)


@triton.jit
def _add_block(part, total, peak, q, k, v, is_seen, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Adds one block of keys to the queries' running sums: weighted values, weights, and the largest logit."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)       # tanh of the quotient
    logits = tl.where(is_seen, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)               # nothing seen yet: avoids -inf minus -inf
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(peak - base)
    part = part * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return part, total * shrink + tl.sum(weights, axis=1), new_peak


@triton.jit
def _join(part, total, peak, other, other_total, other_peak):
    """Merges two results of `_add_block`."""
    new_peak = tl.maximum(peak, other_peak)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink, grow = tl.exp(peak - base), tl.exp(other_peak - base)
    return part * shrink[:, None] + other * grow[:, None], total * shrink + other_total * grow, new_peak


@triton.jit
def _attend_split(query, keys, values, table, positions, parts, peaks, sums, arrived, sinks, out, row_stride,
                  query_head_stride, page_stride, head_stride, token_stride, table_stride, scaling, softcap, window,
                  num_splits, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, PAGE_LEN: tl.constexpr,
                  HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLIT_LEN: tl.constexpr, BLOCK_LEN: tl.constexpr,
                  HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
                  IS_CHAINED: tl.constexpr):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    follow(IS_CHAINED)
    lead(IS_CHAINED)
    position = tl.load(positions + row)
    begin, end = split * SPLIT_LEN, tl.minimum(split * SPLIT_LEN + SPLIT_LEN, position + 1)
    heads, dims = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    is_head, is_dim = heads < GROUP, dims < HEAD_DIM
    is_number = is_head[:, None] & is_dim[None, :]
    query_heads = kv_head * GROUP + heads
    at_head = row * tl.num_programs(1) * GROUP + query_heads
    outs = out + at_head[:, None] * HEAD_DIM + dims[None, :]
    if (split == 0) & (position < 0):
        tl.store(outs, tl.zeros([BLOCK_GROUP, BLOCK_DIM], out.dtype.element_ty), mask=is_number)
    if begin < end:
        q = tl.load(query + row * row_stride + query_heads[:, None] * query_head_stride + dims[None, :],
                    mask=is_number, other=0.0)
        peak = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_GROUP], tl.float32)
        part = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        for start in range(begin, end, BLOCK_LEN):
            tokens = start + tl.arange(0, BLOCK_LEN)
            is_token = tokens < end
            if HAS_WINDOW:
                is_token &= position - tokens < window
            pages = tl.load(table + row * table_stride + tokens // PAGE_LEN, mask=is_token, other=0).to(tl.int64)
            places = pages * page_stride + kv_head * head_stride + tokens % PAGE_LEN * token_stride
            is_there = is_token[:, None] & is_dim[None, :]
            k = tl.load(keys + places[:, None] + dims[None, :], mask=is_there, other=0.0)
            v = tl.load(values + places[:, None] + dims[None, :], mask=is_there, other=0.0)
            part, total, peak = _add_block(part, total, peak, q, k, v, is_token[None, :], scaling, softcap, HAS_SOFTCAP)
        num_reached = tl.cdiv(position + 1, SPLIT_LEN)
        is_last = num_reached == 1
        if num_reached > 1:
            at = at_head * num_splits + split
            tl.store(parts + at[:, None] * HEAD_DIM + dims[None, :], part, mask=is_number)
            tl.store(peaks + at, peak, mask=is_head)
            tl.store(sums + at, total, mask=is_head)
            tl.debug_barrier()
            place = arrived + row * tl.num_programs(1) + kv_head
            is_last = tl.atomic_add(place, 1, sem="acq_rel") == num_reached - 1
            if is_last:
                tl.store(place, 0)
                part = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
                total = tl.zeros([BLOCK_GROUP], tl.float32)
                peak = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
                for each in range(num_reached):
                    at = at_head * num_splits + each
                    other = tl.load(parts + at[:, None] * HEAD_DIM + dims[None, :], mask=is_number, other=0.0,
                                    cache_modifier=".cg")
                    other_total = tl.load(sums + at, mask=is_head, other=0.0, cache_modifier=".cg")
                    other_peak = tl.load(peaks + at, mask=is_head, other=float("-inf"), cache_modifier=".cg")
                    part, total, peak = _join(part, total, peak, other, other_total, other_peak)
        if is_last:
            if HAS_SINKS:                               # one more key, without a value
                sink = tl.load(sinks + query_heads, mask=is_head, other=0.0).to(tl.float32)
                part, total, peak = _join(part, total, peak, tl.zeros_like(part), tl.zeros_like(total) + 1.0, sink)
            result = part / tl.where(total == 0, 1.0, total)[:, None]
            tl.store(outs, result.to(out.dtype.element_ty), mask=is_number)


@triton.jit
def _attend_tile(query, keys, values, table, positions, sinks, out, row_stride, query_head_stride, page_stride,
                 head_stride, token_stride, table_stride, scaling, softcap, window, GROUP: tl.constexpr,
                 PAGE_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE_LEN: tl.constexpr,
                 BLOCK_LEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
                 HAS_SINKS: tl.constexpr):
    tile, head = tl.program_id(0), tl.program_id(1)
    rows, dims = tile * TILE_LEN + tl.arange(0, TILE_LEN), tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    at = tl.load(positions + rows)
    begin, end = 0, tl.max(at) + 1
    if HAS_WINDOW:                                      # no row here sees what precedes the first row's window
        first = tl.min(tl.where(at < 0, end, at))
        begin = tl.maximum(0, first - window + 1) // BLOCK_LEN * BLOCK_LEN
    q = tl.load(query + rows[:, None] * row_stride + head * query_head_stride + dims[None, :], mask=is_dim[None, :],
                other=0.0)
    peak = tl.full([TILE_LEN], float("-inf"), tl.float32)
    total = tl.zeros([TILE_LEN], tl.float32)
    if HAS_SINKS:                                       # one more key, without a value
        peak = tl.full([TILE_LEN], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32)
        total += 1.0
    part = tl.zeros([TILE_LEN, BLOCK_DIM], tl.float32)
    for start in range(begin, end, BLOCK_LEN):
        tokens = start + tl.arange(0, BLOCK_LEN)
        pages = tl.load(table + tile * table_stride + tokens // PAGE_LEN, mask=tokens < end, other=0).to(tl.int64)
        places = pages * page_stride + head // GROUP * head_stride + tokens % PAGE_LEN * token_stride
        is_there = (tokens < end)[:, None] & is_dim[None, :]
        k = tl.load(keys + places[:, None] + dims[None, :], mask=is_there, other=0.0)
        v = tl.load(values + places[:, None] + dims[None, :], mask=is_there, other=0.0)
        is_seen = tokens[None, :] <= at[:, None]
        if HAS_WINDOW:
            is_seen &= at[:, None] - tokens[None, :] < window
        part, total, peak = _add_block(part, total, peak, q, k, v, is_seen, scaling, softcap, HAS_SOFTCAP)
    result = tl.where((at >= 0)[:, None], part / tl.where(total == 0, 1.0, total)[:, None], 0.0)
    places = (rows[:, None] * tl.num_programs(1) + head) * HEAD_DIM + dims[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=is_dim[None, :])
