"""Kernel calls that were made once and are made again as one: what a CUDA graph is on a GPU.

To call a kernel from Python takes microseconds, and a small model's step is some hundred calls. A program runs them in
one, with nothing but a barrier from each to the next; what they read and write lies where it lay when they were
recorded. It knows calls and memory. It knows nothing of models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from worker.model.cpu import kernel

ALIGNMENT = 64              # bytes: what two threads write never shares a line

# The argument is the address of: how many calls, then of each the function and its arguments.
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


@dataclass(slots=True)
class Arena:
    """Memory for what kernels write while they are recorded, and nobody needs after the next turn."""

    turn_bytes: int
    _halves: list[Tensor] = field(init=False)
    _turn: int = field(init=False, default=0)
    _used: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._halves = [torch.empty(self.turn_bytes, dtype=torch.uint8) for _ in range(2)]

    def turn(self) -> None:
        """What the turn before the last one wrote may be written over."""
        self._turn, self._used = 1 - self._turn, 0

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, width]. Raises MemoryError."""
        begin, num_bytes = self._used, num_rows * width * dtype.itemsize
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if self._used > self.turn_bytes:
            raise MemoryError(f"more than {self.turn_bytes} bytes in a turn")
        return self._halves[self._turn][begin:begin + num_bytes].view(dtype).view(num_rows, width)


class Program:
    def __init__(self, calls: list[kernel.Call]):
        width = max(len(call.values) for call in calls)
        self._calls = calls                             # and with them the tensors
        self._arguments = torch.zeros(len(calls), width, dtype=torch.int64)
        self._table = torch.empty(1 + 2 * len(calls), dtype=torch.int64)
        self._table[0] = len(calls)
        for index, call in enumerate(calls):
            self._arguments[index, :len(call.values)] = torch.tensor(call.values)
            self._table[1 + 2 * index] = call.address
            self._table[2 + 2 * index] = self._arguments[index].data_ptr()
        self._counters = self._arguments[:, 0]
        self._num_threads = max(call.num_threads for call in calls)
        self._run = _runner()

    def run(self) -> None:
        self._counters.zero_()
        self._run(ctypes.c_void_p(self._table.data_ptr()), self._num_threads)


@contextmanager
def recorded(arena: Arena) -> Iterator[list[kernel.Call]]:
    """The calls of kernels in it, which are made as well."""
    calls: list[kernel.Call] = []
    kernel.recorder = kernel.Recorder(calls, arena.take)
    try:
        yield calls
    finally:
        kernel.recorder = None


@cache
def _runner() -> Any:
    return kernel.runner(kernel.machine_code(RUN, "run"))
