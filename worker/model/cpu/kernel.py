"""Kernels as functions of tensors: compiled for this processor when first called, run by torch's threads.

A second thread pool would compete with torch's for the cores, so its OpenMP runs ours too. It knows functions and
threads. It knows nothing of models.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from worker.model.cpu.code import BFLOAT16, FLOAT32, INTEGER, LINE_BYTES, Code

ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
MIN_SHARED_WORK = 1 << 15   # numbers processed: fewer are done before another thread wakes up
MIN_SHARED_PRODUCTS = 1 << 20       # numbers multiplied and added: ten microseconds
ALIASED_BYTES = 2048        # rows at multiples of this distance compete for the same few cache lines
OPENMP = "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"      # what compiled functions call
OPTIMIZATION = 2            # of 3: level 3 takes longer and gains nothing

COMPILER = f"LLVM {'.'.join(map(str, llvm.llvm_version_info))}"

Argument = Tensor | int | float


class Call(NamedTuple):
    address: int                # of the function
    values: list[int]           # its arguments, after the address of the threads' counters
    args: tuple[Argument, ...]  # the tensors behind them: keeps their addresses in use


class Recorder(NamedTuple):
    """The list to which calls are recorded, and the function that allocates their outputs."""

    calls: list[Call]
    take: Callable[[int, int, torch.dtype], Tensor]


recorder: Recorder | None = None


class Kernel:
    """Called with tensors and numbers; keyword arguments are constants that are compiled in."""

    def __init__(self, write: Callable[..., None]):
        self._write = write
        self._compiled: dict[Any, tuple[int, Callable[..., None]]] = {}

    def __call__(self, *args: Argument, num_threads: int, **constants: Any) -> None:
        key = tuple(constants.values())
        address, run = self._compiled.get(key) or self._compile(key, args, constants)
        values = [arg.data_ptr() if isinstance(arg, Tensor) else _bits(arg) if isinstance(arg, float) else arg
                  for arg in args]
        if recorder:
            recorder.calls.append(Call(address, values, args))
        counters = (ctypes.c_char * (num_threads * LINE_BYTES))()
        run((ctypes.c_int64 * (1 + len(values)))(ctypes.addressof(counters), *values), num_threads)

    def _compile(self, key: Any, args: tuple[Argument, ...], constants: Mapping[str, Any]
                 ) -> tuple[int, Callable[..., None]]:
        module, name = ir.Module(), self._write.__name__
        module.triple = llvm.get_process_triple()
        code = Code(module, name, [FLOAT32 if isinstance(arg, float) else INTEGER for arg in args])
        self._write(code, *code.arguments, **constants)
        code.builder.ret_void()
        address = machine_code(str(module), name)
        self._compiled[key] = address, runner(address)
        return self._compiled[key]


def _bits(number: float) -> int:
    found: int = struct.unpack("<q", struct.pack("<fxxxx", number))[0]
    return found


def runner(address: int) -> Callable[..., None]:
    """A function that runs a kernel on a number of threads."""
    run, parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), _openmp().GOMP_parallel

    def start(args: Any, num_threads: int) -> None:
        if num_threads > 1:
            parallel(address, args, num_threads, 0)
        else:
            run(args)

    return start


def has_threads() -> bool:
    return _openmp() is not None


@cache
def _openmp() -> Any:
    """The OpenMP library that torch has loaded; None if it is of another kind."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}      # a path may have spaces
    found = [path for path in mapped if "/torch" in path]
    if len(found) != 1:
        return None
    library = ctypes.CDLL(found[0])
    library.GOMP_parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    library.GOMP_parallel.restype = None
    return library


_engines: list[Any] = []                                # own the compiled code


def machine_code(text: str, name: str) -> int:
    """The address of a function, in memory that is never freed."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for function in OPENMP:
        llvm.add_symbol(function, ctypes.cast(getattr(_openmp(), function), ctypes.c_void_p).value)
    module = llvm.parse_assembly(text)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor().name, features=processor().flags, opt=OPTIMIZATION)
    tuning = llvm.create_pipeline_tuning_options(speed_level=OPTIMIZATION)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address


class Processor(NamedTuple):
    """As LLVM names it."""

    name: str
    features: Mapping[str, bool]

    def has(self, feature: str) -> bool:
        return self.features.get(feature, False)

    @property
    def flags(self) -> str:
        return ",".join(f"{'+' if is_there else '-'}{feature}" for feature, is_there in self.features.items())


@cache
def processor() -> Processor:
    return Processor(llvm.get_host_cpu_name(), llvm.get_host_cpu_features())


def threads_for(num_numbers: int, least: int = MIN_SHARED_WORK) -> int:
    """The number of threads for so much work."""
    return torch.get_num_threads() if num_numbers >= least else 1


def empty(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor [num_rows, width], for a kernel to write."""
    return recorder.take(num_rows, width, dtype) if recorder else torch.empty(num_rows, width, dtype=dtype)


def empty_rows(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The same, for a product that reads one number of each row at a time."""
    padding = 64 // dtype.itemsize if width * dtype.itemsize % ALIASED_BYTES == 0 else 0
    return empty(num_rows, width + padding, dtype)[:, :width]
