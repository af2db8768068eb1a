"""x · weightᵀ + bias with weights packed once: as fast as memory for few rows, as fast as arithmetic for many.

Each number of the result is one sum in the order of the columns, whatever else is computed: a row has the same bits
alone and among any others. Packed weights are panels of neighbouring outputs, stored column by column, so that a panel
is read once from start to end; rows are taken a few at a time, as many as registers
hold. In bfloat16 a step multiplies pairs of columns (vdpbf16ps), or 32 of them in matrix registers (amx_linear.py).
Weights that bfloat16 holds exactly are kept so for float32 too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.model.cpu import LANES, WORD_BYTES, amx, amx_linear, pages, pointwise
from worker.model.cpu.code import BFLOAT16, FLOAT32, INT32, SIZES, Code, Value, vector
from worker.model.cpu.kernel import ELEMENTS, MIN_SHARED_PRODUCTS, Kernel, empty, empty_rows, processor, threads_for
from worker.model.cpu.pointwise import silu_times

BLOCK_BYTES = 1 << 18       # of rows that stay in a core's cache while the panels are read
AHEAD_BYTES = 1 << 12       # of weights that are prefetched: the processor itself looks less far ahead


class Tile(NamedTuple):
    """What is computed at once, in registers."""

    rows: int
    vectors: int            # of outputs

    @property
    def width(self) -> int:
        return self.vectors * LANES


def tile() -> Tile:
    """32 registers of 16 numbers, or 16 of 8."""
    return Tile(12, 2) if processor().has("avx512f") else Tile(6, 1)


def holds(weight: Tensor) -> bool:
    """Whether panels can hold a weight: in bfloat16 columns come in pairs."""
    return weight.dtype == torch.float32 or weight.shape[1] % 2 == 0


class PanelLinear(torch.nn.Module):
    """A layer with a weight of [num_outputs, num_columns]: x of [..., num_columns] to [..., num_outputs]."""

    is_uniform = True       # a row has the same bits among any number of others

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_gated: bool = False):
        """`is_gated`: the first half of the outputs are gates of the second half, stored beside them in each panel."""
        super().__init__()
        self.num_outputs, self.num_columns = weight.shape
        self.dtype, self.tile = weight.dtype, tile()
        self.is_gated = is_gated and self.tile.vectors == 2 and self.num_outputs % self.tile.width == 0
        if self.is_gated:
            weight, bias = _beside(weight), None if bias is None else _beside(bias)
        kept = weight.bfloat16() if _is_kept_by_bfloat16(weight) else weight
        self.packed = _packed(kept, self.tile.width, 2 if weight.dtype == torch.bfloat16 else 1)
        self.num_panels, self.num_steps = self.packed.shape[:2]
        self.width = self.num_panels * self.tile.width              # the padding of the last panel counts as outputs
        self.bias = weight.new_zeros(self.width, dtype=torch.float32)
        if bias is not None:
            self.bias[:self.num_outputs] = bias
        self.is_by_matrices = amx.computes(self.dtype, self.num_columns)
        self._multiply: Callable[..., None]
        if self.is_by_matrices:
            self._multiply, self.block = amx_linear.multiply, amx_linear.block_tiles(self.num_columns)
            self.num_steps = self.num_columns // amx.COLUMNS
        else:
            self._multiply = partial(_multiply, dtype=self.dtype, stored=self.packed.dtype, tile=self.tile)
            num_cached_rows = BLOCK_BYTES // (self.num_columns * self.dtype.itemsize)
            self.block = max(1, num_cached_rows // self.tile.rows) * self.tile.rows

    def forward(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        out = empty(len(rows), self.width, self.dtype)
        self.compute(rows, out, is_gated=False)
        if self.is_gated:
            out = out.view(-1, self.num_panels, 2, LANES).transpose(1, 2).flatten(1)
        elif self.width != self.num_outputs:
            out = out[:, :self.num_outputs].contiguous()
        return out.view(*x.shape[:-1], self.num_outputs)

    def silu_and_multiply(self, x: Tensor) -> Tensor:
        """silu(gate) · up of the outputs, gates first."""
        if not self.is_gated:
            return pointwise.silu_and_multiply(self(x))
        rows = self._rows(x)
        out = empty_rows(len(rows), self.num_outputs // 2, self.dtype)
        self.compute(rows, out, is_gated=True)
        return out.view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:
            raise RuntimeError(f"{x.dtype} among {self.dtype}")
        rows = x.reshape(-1, self.num_columns)
        return rows if rows.stride(1) == 1 else rows.contiguous()

    def compute(self, rows: Tensor, out: Tensor, *, is_gated: bool) -> None:
        num_rows = len(rows)
        self._multiply(rows, self.packed, self.bias, out, num_rows, rows.stride(0), out.stride(0), self.num_steps,
                       self.num_panels, self.block, int(is_gated),
                       num_threads=threads_for(num_rows * self.width * self.num_columns, MIN_SHARED_PRODUCTS))


def _beside(outputs: Tensor) -> Tensor:
    """Reorders [2 · n, ...], gates first, to 16 gates, their 16 outputs, and so on."""
    return outputs.view(2, -1, LANES, *outputs.shape[1:]).transpose(0, 1).flatten(0, 2)


def _is_kept_by_bfloat16(weight: Tensor) -> bool:
    return all(torch.equal(part, part.bfloat16().to(part.dtype)) for part in weight.split(1024))


def _packed(weight: Tensor, width: int, per_step: int) -> Tensor:
    """[panels, steps, width, per_step]"""
    num_outputs, num_columns = weight.shape
    num_panels = -(-num_outputs // width)
    padded = weight.new_zeros(num_panels * width, num_columns)
    padded[:num_outputs] = weight
    panels = padded.view(num_panels, width, -1, per_step).transpose(1, 2)
    return pages.empty(panels.shape, weight.dtype).copy_(panels)


@Kernel
def _multiply(code: Code, x: Value, weight: Value, bias: Value, out: Value, num_rows: Value, row_stride: Value,
              out_stride: Value, num_steps: Value, num_panels: Value, block_rows: Value, is_gated: Value, *,
              dtype: torch.dtype, stored: torch.dtype, tile: Tile) -> None:
    """x of [num_rows, columns], weight as `_packed`, bias of [outputs], out of [num_rows, outputs], or half as many, if
    the first half of each panel are gates."""
    panels = Panels(code, x, out, row_stride, out_stride, num_steps, is_gated, dtype, stored, tile)
    num_blocks = (num_rows + block_rows - 1) // block_rows
    with code.shares(num_blocks * num_panels) as unit:
        panel, begin = unit % num_panels, unit // num_panels * block_rows
        panels.compute(panel, begin, code.smaller(begin + block_rows, num_rows), weight, bias)


class Panels:
    """Writes the outputs of one panel for some rows."""

    def __init__(self, code: Code, x: Value, out: Value, row_stride: Value, out_stride: Value, num_steps: Value,
                 is_gated: Value, dtype: torch.dtype, stored: torch.dtype, tile: Tile):
        self._code, self._x, self._out, self._is_gated, self._tile = code, x, out, is_gated, tile
        self._row_stride, self._out_stride, self._num_steps = row_stride, out_stride, num_steps
        self._element, self._kept = ELEMENTS[dtype], ELEMENTS[stored]
        self._num_bytes = num_steps * (tile.width * (WORD_BYTES // dtype.itemsize) * stored.itemsize)
        self._gated = code.scratch(tile.rows * tile.vectors)    # sums with their gates: unrolled products are long

    def compute(self, panel: Value, begin: Value, end: Value, weight: Value, bias: Value) -> None:
        """For rows from `begin` to `end`; the addresses are of all panels' weights and biases."""
        code, tile, element = self._code, self._tile, self._element
        weights, first = weight + panel * self._num_bytes, panel * tile.width
        with code.loop(begin, end, tile.rows) as row:
            num_left = end - row
            ahead = code.select(row.equals(begin), AHEAD_BYTES, self._num_bytes)
            for count in range(1, tile.rows + 1):
                with code.when(num_left.equals(count) if count < tile.rows else num_left > count - 1):
                    rows = [self._x + (row + i) * self._row_stride * SIZES[element] for i in range(count)]
                    starts = [code.load(bias + (first + i * LANES) * SIZES[FLOAT32], FLOAT32)
                              for i in range(tile.vectors)]
                    self._store(_sums(code, rows, weights, ahead, starts, self._num_steps, element, self._kept),
                                row, first)
            with code.when(self._is_gated.equals(1)), code.loop(0, code.smaller(num_left, tile.rows)) as each:
                place = self._gated + each * (tile.vectors * LANES * SIZES[FLOAT32])
                gate, up = (code.load(place + i * (LANES * SIZES[FLOAT32]), FLOAT32) for i in range(2))
                place = self._out + ((row + each) * self._out_stride + panel * LANES) * SIZES[element]
                code.store(silu_times(code, gate, up), place, element)

    def _store(self, totals: list[list[Value]], row: Value, first: Value) -> None:
        code, element = self._code, self._element
        with code.when(self._is_gated.equals(0)):
            for i, sums in enumerate(totals):
                place = self._out + ((row + i) * self._out_stride + first) * SIZES[element]
                for j, total in enumerate(sums):
                    code.store(total, place + j * LANES * SIZES[element], element)
        with code.when(self._is_gated.equals(1)):
            for number, total in enumerate(chain.from_iterable(totals)):
                code.store(total, self._gated + number * (LANES * SIZES[FLOAT32]), FLOAT32)


def _sums(code: Code, rows: list[Value], weights: Value, ahead: Value, starts: list[Value], num_steps: Value,
          element: Any, kept: Any) -> list[list[Value]]:
    """The sums of each row for as many outputs as `starts` has numbers. A step takes 4 bytes of a row."""
    sums = [[code.variable(start) for start in starts] for _ in rows]
    is_paired = element is BFLOAT16
    multiply, length = (code.pairs, 2 * LANES) if is_paired else (code.fused, LANES)
    size = length * SIZES[kept]
    with code.loop(0, num_steps) as step:
        place = weights + step * (size * len(starts))
        code.prefetch(place + ahead, size * len(starts))
        columns = [(code.load if is_paired else code.numbers)(place + i * size, kept, length)
                   for i in range(len(starts))]
        for row, line in zip(rows, sums, strict=True):
            four = code.splat(code.load(row + step * 4, INT32, 1))
            factors = code.cast(four, vector(element, length))
            for total, column in zip(line, columns, strict=True):
                total.value = multiply(factors, column, total.value)
    return [[total.value for total in line] for line in sums]
