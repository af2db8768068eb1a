"""Matrix registers (AMX): 16 rows of 64 bytes; two pairs of them are multiplied into four of sums.

One instruction adds products of 32 columns to a sum, and of one row only, so no row's bits depend on another's. It
knows registers and addresses. It knows nothing of what is multiplied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from llvmlite import ir

from worker.model.cpu.code import BFLOAT16, FLOAT32, INT8, INTEGER, SIZES, Code, Operand, Value
from worker.model.cpu.kernel import processor

ROWS, ROW_BYTES = 16, 64                # of a register
COLUMNS = ROW_BYTES // SIZES[BFLOAT16]  # of the numbers that are multiplied
FOR_ONCE = "tileloaddt164"              # a load that does not evict the first-level cache
SUMS, OF_ROWS, OF_WEIGHTS = ((0, 1), (2, 3)), (4, 5), (6, 7)            # registers; of sums by rows and outputs

# The register configuration: its palette, then the row bytes and the rows of each register.
PALETTE, PALETTE_PLACE, BYTES_PLACE, ROWS_PLACE = 1, 0, 16, 48
ROW_BYTES_OF_FOUR = ROW_BYTES * 0x0001_0001_0001_0001
ROWS_OF_FIRST, ROWS_OF_SECOND, ROWS_OF_WEIGHTS = 0x01_00_00_01_01, 0x01_00_01_01_00_00, ROWS * 0x0101 << 48

# Of Linux on x86-64, see its Documentation/arch/x86/xstate.rst.
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


def computes(dtype: torch.dtype, num_columns: int) -> bool:
    """Whether matrix registers compute sums over so many columns."""
    return dtype == torch.bfloat16 and num_columns % COLUMNS == 0 and is_there()


@cache
def is_there() -> bool:
    """Whether the processor has such registers, and the system lets this process use them."""
    return processor().has("amx-bf16") and ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in memory: the address of the first one, and the bytes from each to the next."""

    at: Value
    stride: Value

    def __add__(self, num_bytes: Operand) -> Rows:
        return Rows(self.at + num_bytes, self.stride)

    def row(self, i: Value | int) -> Value:
        return self.at + self.stride * i

    def half(self, half: int) -> Rows:
        return Rows(self.row(half * ROWS), self.stride)


def add_up(code: Code, start: Rows | None, x: Rows, weights: Rows, sums: Rows, num_steps: Value | int, num_halves: int,
           *, next_outputs: int, next_step: int, ahead: Operand | None = None, num_shares: int = 1,
           load: str = "tileloadd64") -> None:
    """Stores start + x · weights into `sums`: for up to 16 rows, or more in two halves, and for 32 outputs.

    A step takes 32 columns of x. A row of weights is two of them, for 16 outputs; `next_outputs` and `next_step` are
    the bytes to the next 16 outputs and to the next step. Meanwhile weights at `ahead` are prefetched, one of
    `num_shares` parts of each step. `load` is the instruction that loads weights.
    """
    halves = range(num_halves)
    for half in halves:
        for j in range(2):
            if start is None:
                _call(code, "tilezero", INT8(SUMS[half][j]))
            else:
                _move(code, "tileloadd64", SUMS[half][j], start.half(half) + j * ROW_BYTES)
    with code.loop(0, num_steps) as step:
        columns, panel = x + step * ROW_BYTES, weights + step * next_step
        if ahead is not None:
            code.prefetch(panel.at + ahead, next_step // num_shares)
        for half in halves:                             # operands are loaded in the order of use: loads take as long
            _move(code, "tileloadd64", OF_ROWS[half], columns.half(half))
            for j in (range(2) if half == 0 else reversed(range(2))):
                if half == 0:
                    _move(code, load, OF_WEIGHTS[j], panel + j * next_outputs)
                _call(code, "tdpbf16ps", *map(INT8, (SUMS[half][j], OF_ROWS[half], OF_WEIGHTS[j])))
    for half in halves:
        for j in range(2):
            _move(code, "tilestored64", SUMS[half][j], sums.half(half) + j * ROW_BYTES)


@contextmanager
def registers(code: Code, tile_rows: Value) -> Iterator[None]:
    """Configures the registers for so many rows of x, and restores them: oneDNN uses them on the same threads."""
    before, shape = code.scratch(), code.scratch()
    _call(code, "sttilecfg", code.pointer(before))
    code.store(code.zeros(), shape, FLOAT32)
    code.store(code.integer(PALETTE), shape + PALETTE_PLACE, INTEGER)
    for four in range(2):
        code.store(code.integer(ROW_BYTES_OF_FOUR), shape + BYTES_PLACE + four * SIZES[INTEGER], INTEGER)
    first = code.smaller(tile_rows, ROWS)
    second = code.select(tile_rows > ROWS, tile_rows - ROWS, first)
    code.store(first * ROWS_OF_FIRST + second * ROWS_OF_SECOND + ROWS_OF_WEIGHTS, shape + ROWS_PLACE, INTEGER)
    _call(code, "ldtilecfg", code.pointer(shape))
    yield
    _call(code, "ldtilecfg", code.pointer(before))


def _move(code: Code, how: str, register: int, rows: Rows) -> None:
    _call(code, how, INT8(register), code.pointer(rows.at), rows.stride.ir)


def _call(code: Code, instruction: str, *args: Any) -> None:
    code.call(f"llvm.x86.{instruction}", ir.VoidType(), *args)
