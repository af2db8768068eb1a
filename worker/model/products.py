"""Products of few rows on a GPU, where the time of a decode step is the time to read the weights.

Weights are the first operand, so that a few rows fill the other side of a tensor core. Where outputs alone would not
fill a GPU, the inputs are cut into splits, and the last program to finish a tile sums them all, in order. The number of
splits depends on the layer only, up to `MAX_ROWS`, so a row's bits depend neither on other rows nor on their number;
this is checked at every start (check.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import linear

from worker.model import pointwise
from worker.model.chain import chained, follow, lead

MAX_ROWS = 256              # above: cuBLAS, which is faster where memory is no longer the limit
MAX_SPLITS = 8
MIN_SPLIT_LEN = 512         # inputs
UNIT = 128                  # inputs: tiles are multiples of it; within it a packed word holds four
DTYPES = (torch.bfloat16, torch.float16)                # float32 has no tensor cores that keep its precision


class Tile(NamedTuple):
    """What a program multiplies at a time."""

    num_out: int
    num_in: int
    num_warps: int
    num_stages: int

    def within(self, num_bytes: int, stage_bytes: int) -> Tile:
        """With as many stages as fit into a multiprocessor's shared memory."""
        return self._replace(num_stages=max(1, min(self.num_stages, num_bytes // stage_bytes)))


Tiles = dict[int, Tile]                                 # by the most rows they are for
PLAIN: Tiles = {16: Tile(64, 128, 4, 5), 64: Tile(64, 128, 4, 4), 256: Tile(64, 64, 4, 5)}
WIDE: Tiles = PLAIN | {128: Tile(128, 64, 4, 3), 256: Tile(128, 64, 8, 4)}      # for layers with enough outputs
GATED: Tiles = {16: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 5), 128: Tile(64, 64, 4, 3)}
INT8: Tiles = {16: Tile(128, 128, 4, 4), 64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 4)}    # of one UNIT each


class RowLinear(nn.Module):
    """x · weightᵀ + bias, for a weight of [num_out, num_in]; `scales` of [num_out] where weights are `pack`ed int8."""

    min_tile_len = 64           # outputs
    num_programs = 128          # to be reached by splits: one per multiprocessor of a large GPU

    def __init__(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None):
        super().__init__()
        is_whole = isinstance(weight, nn.Parameter) and weight.is_contiguous()          # and may be an embedding's too
        self.weight = weight if is_whole else nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias, self.scales = None if bias is None else bias.detach(), scales
        num_tiles = triton.cdiv(len(weight), self.min_tile_len)
        self.num_splits = num_splits(num_tiles, weight.shape[1], self.num_programs)
        self.tiles = INT8 if scales is not None else WIDE if num_tiles >= 2 * self.num_programs else PLAIN
        num_row_tiles = MAX_ROWS // max(self.tiles)
        self.arrived = torch.zeros(num_row_tiles * num_tiles, dtype=torch.int32, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.scales is None and len(rows) > MAX_ROWS:
            return linear(x, self.weight, self.bias)
        out = multiply(rows, self.weight, self.tiles, bias=self.bias, scales=self.scales, arrived=self.arrived,
                       num_splits=self.num_splits)
        return out.view(*x.shape[:-1], -1)

    def silu_and_multiply(self, x: Tensor) -> Tensor:
        """silu(gate) · up of the outputs, gates first."""
        rows = x.reshape(-1, x.shape[-1])
        if self.scales is not None or self.bias is not None or len(rows) > MAX_ROWS:
            return pointwise.silu_and_multiply(self(x))
        if len(rows) > max(GATED):
            out = pointwise.silu_and_multiply(multiply(rows, self.weight, self.tiles))      # summed as below
        else:
            out = multiply(rows, self.weight, GATED, is_gated=True)
        return out.view(*x.shape[:-1], -1)


def takes(weight: Tensor) -> bool:
    """Whether it can be computed here: Triton's interpreter has float32 only."""
    return weight.dtype in DTYPES if weight.is_cuda else weight.dtype == torch.float32


def num_splits(num_tiles: int, num_in: int, num_programs: int) -> int:
    """As many as fit into `num_programs` programs, at least one."""
    return max(1, min(MAX_SPLITS, num_programs // num_tiles, num_in // MIN_SPLIT_LEN))


def multiply(x: Tensor, weight: Tensor, tiles: Tiles, *, bias: Tensor | None = None, scales: Tensor | None = None,
             arrived: Tensor | None = None, num_splits: int = 1, is_gated: bool = False) -> Tensor:
    """[rows, num_in] by [num_out, num_in]ᵀ: [rows, num_out], or half as many where gates are multiplied.

    `weight`: int8 must be `pack`ed. `arrived`: int32 zeros, one per tile of rows and outputs; zeros again afterwards.
    More than `MAX_ROWS` rows give enough programs without splits.
    """
    (num_rows, num_in), num_out = x.shape, len(weight) // 2 if is_gated else len(weight)
    num_parts = 4 if weight.dtype == torch.int8 else 1
    assert x.stride(1) == 1 and weight.is_contiguous() and not (num_parts > 1 and is_gated)
    block_rows = min(max(tiles), max(16, triton.next_power_of_2(num_rows)))
    num_splits = num_splits if num_rows <= MAX_ROWS else 1
    tile = next(tile for most, tile in tiles.items() if most >= block_rows)
    stage_bytes = tile.num_in * (x.itemsize * block_rows + (1 + is_gated) * weight.itemsize * tile.num_out)
    tile = tile.within(_shared_bytes(x.device), stage_bytes)
    split_len = triton.cdiv(triton.cdiv(num_in, num_splits), UNIT) * UNIT
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_splits, num_rows, num_out, dtype=torch.float32, device=x.device) if num_splits > 1 else out
    assert num_splits == 1 or arrived is not None
    _multiply[(triton.cdiv(num_rows, block_rows), triton.cdiv(num_out, tile.num_out), num_splits)](
        x, weight.view(torch.int32) if num_parts > 1 else weight, out if scales is None else scales,
        out if bias is None else bias, out, parts, out if arrived is None else arrived, x.stride(0),
        weight.shape[1] // num_parts, num_rows, num_out, num_in, split_len, BLOCK_ROWS=block_rows,
        BLOCK_OUT=tile.num_out, BLOCK_IN=tile.num_in, NUM_SPLITS=num_splits, NUM_PARTS=num_parts, IS_GATED=is_gated,
        IS_EVEN=num_in == split_len * num_splits, HAS_SCALES=scales is not None, HAS_BIAS=bias is not None,
        IS_QUICK=num_parts > 1 and x.is_cuda and x.dtype == torch.bfloat16,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **chained(x.device))
    return out


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    gpu: Any = torch.cuda.get_device_properties(device)
    return int(gpu.shared_memory_per_block_optin)


def pack(weight: Tensor) -> Tensor:
    """Reorders the bytes of int8 [num_out, num_in], padded to whole units: word i of 128 inputs holds i, i + 32, i + 64
    and i + 96. A kernel thus reads words, and the bytes at one place of many words are neighbours in a product."""
    num_out, num_in = weight.shape
    units = nn.functional.pad(weight, (0, -num_in % UNIT)).view(num_out, -1, 4, UNIT // 4)
    return units.transpose(2, 3).reshape(num_out, -1)


# The bytes at each place of two words, as two numbers in bfloat16. With b for the byte and s for its sign, 128 or 0, it
# is 128 + (b & 127) minus 128 + s: both are bfloat16 whose lower half comes from the byte. A conversion takes longer.
_WIDENED = tl.constexpr("{ .reg .b32 both, high, low, minus; mov.b32 minus, 0xbf80bf80;" + "".join(f"""
    prmt.b32 both, $4, $5, {places}; lop3.b32 high, both, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 low, both, 0x00800080, 0x43004300, 0xea; fma.rn.bf16x2 ${part}, low, minus, high;"""
    for part, places in enumerate(("0x4400", "0x5511", "0x6622", "0x7733"))) + "}")


@triton.jit
def _unpack(words, dtype: tl.constexpr, IS_QUICK: tl.constexpr):
    """The four bytes of each word, the lowest first."""
    if IS_QUICK:
        return tl.inline_asm_elementwise(_WIDENED, "=r,=r,=r,=r,r,r", [words], is_pure=True, pack=2, dtype=(
            tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16))
    return ((words << 24 >> 24).to(dtype), (words << 16 >> 24).to(dtype), (words << 8 >> 24).to(dtype),
            (words >> 24).to(dtype))


@triton.jit
def _read(places, at, num_in, IS_EVEN: tl.constexpr, EVICTION: tl.constexpr):
    if IS_EVEN:
        return tl.load(places + at[None, :], eviction_policy=EVICTION)
    return tl.load(places + at[None, :], mask=(at < num_in)[None, :], other=0, eviction_policy=EVICTION)


@triton.jit
def _multiply(x, weight, scales, bias, out, parts, arrived, row_stride, weight_stride, num_rows, num_out, num_in,
              split_len, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
              NUM_SPLITS: tl.constexpr, NUM_PARTS: tl.constexpr, IS_GATED: tl.constexpr, IS_EVEN: tl.constexpr,
              HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_QUICK: tl.constexpr, IS_CHAINED: tl.constexpr):
    """After the last row or output valid ones are computed again, and not stored."""
    tile, split = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    weights = weight + (outs % num_out).to(tl.int64)[:, None] * weight_stride
    inputs = x + (rows % num_rows)[:, None] * row_stride
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    ups = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    follow(IS_CHAINED)
    for start in range(split * split_len, tl.minimum((split + 1) * split_len, num_in), BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN // NUM_PARTS)
        if NUM_PARTS > 1:
            words = tl.load(weights + (start // NUM_PARTS + tl.arange(0, BLOCK_IN // NUM_PARTS))[None, :],
                            eviction_policy="evict_first")
            ws = _unpack(words, x.dtype.element_ty, IS_QUICK)
            for part in tl.static_range(NUM_PARTS):
                v = tl.trans(_read(inputs, at + part * (BLOCK_IN // NUM_PARTS), num_in, IS_EVEN, "evict_last"))
                total = tl.dot(ws[part], v, total, input_precision="ieee")
        else:
            v = tl.trans(_read(inputs, at, num_in, IS_EVEN, "evict_last"))
            w = _read(weights, at, num_in, IS_EVEN, "evict_first")
            total = tl.dot(w, v, total, input_precision="ieee")
        if IS_GATED:
            w = _read(weights + num_out.to(tl.int64) * weight_stride, at, num_in, IS_EVEN, "evict_first")
            ups = tl.dot(w, v, ups, input_precision="ieee")
    lead(IS_CHAINED)
    places = rows.to(tl.int64)[None, :] * num_out + outs[:, None]
    is_there = (rows < num_rows)[None, :] & (outs < num_out)[:, None]
    is_last = True
    if NUM_SPLITS > 1:
        tl.store(parts + split * num_rows * num_out + places, total, mask=is_there)
        tl.debug_barrier()
        arrived += tl.program_id(0) * tl.num_programs(1) + tile
        is_last = tl.atomic_add(arrived, 1, sem="acq_rel") == NUM_SPLITS - 1
        if is_last:
            tl.store(arrived, 0)
            total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
            for each in tl.static_range(NUM_SPLITS):
                total += tl.load(parts + each * num_rows * num_out + places, mask=is_there, other=0.0,
                                 cache_modifier=".cg")
    if is_last:
        if HAS_SCALES:
            total *= tl.load(scales + outs, mask=outs < num_out, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + outs, mask=outs < num_out, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:                                    # each product is rounded, as if separate
            gate, up = total.to(out.dtype.element_ty).to(tl.float32), ups.to(out.dtype.element_ty).to(tl.float32)
            total = gate * tl.sigmoid(gate) * up
        tl.store(out + places, total.to(out.dtype.element_ty), mask=is_there)
