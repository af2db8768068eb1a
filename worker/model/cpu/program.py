"""Recorded kernel calls that are replayed as one: the counterpart of a CUDA graph.

Calling a kernel from Python takes microseconds, and a small model's step has some hundred calls. A program makes them
in one call, with only a barrier between them. What differs between two recordings of the same calls, numbers of rows
and addresses, is given a name and can be set before each run; all else is fixed. It knows calls and memory. It knows
nothing of models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.model.cpu import kernel
from worker.model.cpu.code import LINE_BYTES

ALIGNMENT = 64              # bytes: two threads never write to the same cache line

# The argument points to: the number of calls, then the function and the arguments of each.
RUN = """
declare void @GOMP_barrier()
define void @run(ptr %program) {
begin:
  %count = load i64, ptr %program
  br label %loop
loop:
  %index = phi i64 [ 0, %begin ], [ %next, %loop ]
  %twice = shl i64 %index, 1
  %call = getelementptr i64, ptr %program, i64 %twice
  %function.place = getelementptr i64, ptr %call, i64 1
  %arguments.place = getelementptr i64, ptr %call, i64 2
  %function = load ptr, ptr %function.place
  %arguments = load ptr, ptr %arguments.place
  call void %function(ptr %arguments)
  call void @GOMP_barrier()
  %next = add i64 %index, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %end
end:
  ret void
}
"""


class Unexplained(Exception):
    """Two recordings differ where no name explains it, or two do."""


@dataclass(slots=True)
class Arena:
    """Memory for what kernels write while they are recorded; it is reused after the next turn.

    Everything is allocated for `max_rows`, so that addresses do not depend on the number of rows.
    """

    max_rows: int
    row_bytes: int              # per turn
    _halves: list[Tensor] = field(init=False)
    _turn: int = field(init=False, default=0)
    _used: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._halves = [torch.empty(self.max_rows * self.row_bytes, dtype=torch.uint8) for _ in range(2)]

    def restart(self) -> None:
        self._turn, self._used = 0, 0

    def turn(self) -> None:
        """Starts a turn: what the turn before the last one wrote may be overwritten."""
        self._turn, self._used = 1 - self._turn, 0

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, width]. Raises MemoryError."""
        begin, num_bytes = self._used, self.max_rows * width * dtype.itemsize
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if self._used > self.max_rows * self.row_bytes or num_rows > self.max_rows:
            raise MemoryError(f"more than {self.max_rows} rows, or than {self.row_bytes} bytes of a row in a turn")
        return self._halves[self._turn][begin:begin + num_bytes].view(dtype).view(-1, width)[:num_rows]


class Recording(NamedTuple):
    calls: list[kernel.Call]
    numbers: Mapping[str, int]      # by name, the values in this recording


class Program:
    """Made from two recordings in which every named number differs. Raises Unexplained.

    The caller must keep what it reads and writes.
    """

    def __init__(self, first: Recording, second: Recording):
        numbers = [(number, second.numbers[name]) for name, number in first.numbers.items()]
        if len(set(numbers)) < len(numbers) or any(one == other for one, other in numbers):
            raise Unexplained("a name is told from another, or from what stays, by nothing")
        functions = [call.address for call in first.calls]
        if functions != [call.address for call in second.calls]:
            raise Unexplained("they call other kernels")
        self._arguments, others = _table(first.calls), _table(second.calls)
        differing = self._arguments != others
        self._places: dict[str, npt.NDArray[np.intp]] = {}
        for name, (one, other) in zip(first.numbers, numbers, strict=True):
            is_it = differing & (self._arguments == one) & (others == other)
            self._places[name] = np.flatnonzero(is_it)
            differing &= ~is_it
        if differing.any():
            raise Unexplained("they differ in what has no name")
        self._flat = self._arguments.reshape(-1)
        self._counters = np.empty((len(functions), 0, LINE_BYTES), dtype=np.uint8)      # one cache line per thread
        functions_and_arguments = np.stack([functions, _addresses(self._arguments)], axis=1)
        self._code = np.concatenate([[len(functions)], functions_and_arguments.flatten()])
        self._run = _runner()

    def set(self, name: str, number: int) -> None:
        self._flat[self._places[name]] = number

    def run(self, num_threads: int) -> None:
        if num_threads != self._counters.shape[1]:
            self._counters = np.empty((len(self._counters), num_threads, LINE_BYTES), dtype=np.uint8)
            self._arguments[:, 0] = _addresses(self._counters)
        self._counters[:] = 0
        self._run(ctypes.c_void_p(self._code.ctypes.data), num_threads)


def _table(calls: list[kernel.Call]) -> npt.NDArray[np.int64]:
    """[calls, 1 + arguments], padded with zeros; column 0 is for the address of the threads' counters."""
    width = max(len(call.values) for call in calls)
    return np.array([[0, *call.values] + [0] * (width - len(call.values)) for call in calls], dtype=np.int64)


def _addresses(table: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The addresses of its rows."""
    return table.ctypes.data + np.arange(len(table)) * table.strides[0]


@contextmanager
def recorded(arena: Arena) -> Iterator[list[kernel.Call]]:
    """The kernel calls made in its context, which are executed too."""
    calls: list[kernel.Call] = []
    kernel.recorder = kernel.Recorder(calls, arena.take)
    try:
        yield calls
    finally:
        kernel.recorder = None


@cache
def _runner() -> Any:
    return kernel.runner(kernel.machine_code(RUN, "run"))
