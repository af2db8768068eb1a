"""Kernels for a CPU, written in Python: loops over vectors of numbers, compiled by LLVM.

A kernel is a function that generates code: Python's own loops are unrolled, `Code.loop` loops at run time. Numbers are
computed in float32 however they are stored, and operations are never reordered. It knows vectors and addresses. It
knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from worker.model.cpu import LANES

NUM_TERMS = 8               # of the series of exp2; further ones are below float32's precision
NUM_EXP2_TERMS = 6          # the same for bfloat16: an error of 4e-6
NUM_LOG_TERMS = 6           # of the series of log, likewise
HALF_ROOT = 0x3F3504F3 - (127 << 23)        # bits of √½, counted from those of the smallest number
ROUNDING = 1.5 * 2.0**23    # added to a number, rounds it to an integer, which is then in its lowest bits
LINE_BYTES = 64             # of a cache
EXPONENTS = -126.0, 127.0   # of two, in float32's range


class _BFloat(ir.Type):
    """LLVM has it, llvmlite has not."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


INTEGER, FLOAT32, BFLOAT16 = ir.IntType(64), ir.FloatType(), _BFloat()
INT32, INT8, POINTER = ir.IntType(32), ir.IntType(8), ir.PointerType()
SIZES = {INTEGER: 8, INT32: 4, INT8: 1, FLOAT32: 4, BFLOAT16: 2}        # bytes


def vector(element: Any, length: int = LANES) -> Any:
    return ir.VectorType(element, length)


class Value:
    """An integer (or address), a number, a boolean, or a vector of these. Operators generate code."""

    __slots__ = "code", "ir"

    def __init__(self, code: Code, value: Any):
        self.code, self.ir = code, value

    def __add__(self, other: Operand) -> Value:
        return self.code.combine("add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.code.combine("sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self.code.combine("mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self.code.combine("div", self, other)

    def __floordiv__(self, other: Operand) -> Value:
        return self.code.combine("sdiv", self, other)

    def __mod__(self, other: Operand) -> Value:
        return self.code.combine("srem", self, other)

    def __rshift__(self, other: Operand) -> Value:
        """Logical shift: zeros shift in."""
        return self.code.combine("lshr", self, other)

    def __xor__(self, other: Operand) -> Value:
        return self.code.combine("xor", self, other)

    def __and__(self, other: Operand) -> Value:
        return self.code.combine("and_", self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.code.compare("<", self, other)

    def __le__(self, other: Operand) -> Value:
        return self.code.compare("<=", self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.code.compare(">", self, other)

    def equals(self, other: Operand) -> Value:
        return self.code.compare("==", self, other)

    @property
    def element(self) -> Any:
        return getattr(self.ir.type, "element", self.ir.type)


Operand = Value | int | float


class Variable:
    """A variable that a kernel's loop changes."""

    __slots__ = "_code", "_place", "_type"

    def __init__(self, code: Code, initial: Value):
        self._code, self._type, self._place = code, initial.ir.type, code.reserve(initial.ir.type)
        self.value = initial

    @property
    def value(self) -> Value:
        return Value(self._code, self._code.builder.load(self._place, typ=self._type))

    @value.setter
    def value(self, value: Value) -> None:
        self._code.builder.store(value.ir, self._place)


class Code:
    """The code of one function, whose argument is the address of all others: the threads' counters, then `kinds`."""

    def __init__(self, module: Any, name: str, kinds: Sequence[Any]):
        self._module = module
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        self.builder: Any = ir.IRBuilder(function.append_basic_block())
        self._all = function.args[0]
        self._counters, *self.arguments = (self._argument(*each) for each in enumerate([INTEGER, *kinds]))

    def _argument(self, place: int, kind: Any) -> Value:
        address = self.builder.gep(self._all, [INTEGER(place)], source_etype=INTEGER)
        return Value(self, self.builder.load(address, typ=kind))

    # known when the code is generated

    def integer(self, value: int) -> Value:
        return Value(self, INTEGER(value))

    def number(self, value: float) -> Value:
        return Value(self, FLOAT32(value))

    def zeros(self) -> Value:
        return Value(self, ir.Constant(vector(FLOAT32), None))

    def indices(self) -> Value:
        """0, 1, 2 …"""
        return Value(self, ir.Constant(vector(INTEGER), list(range(LANES))))

    # control flow

    @contextmanager
    def loop(self, begin: Operand, end: Operand, step: Operand = 1) -> Iterator[Value]:
        b, start, stop = self.builder, self._lifted(begin), self._lifted(end)
        before, body, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.cbranch((start < stop).ir, body, after)
        b.position_at_end(body)
        index = b.phi(INTEGER)
        yield Value(self, index)
        following = Value(self, index) + step
        index.add_incoming(start.ir, before)
        index.add_incoming(following.ir, b.block)
        b.cbranch((following < stop).ir, body, after)
        b.position_at_end(after)

    @contextmanager
    def shares(self, count: Operand) -> Iterator[Value]:
        """Loops over each of `count` units once. A thread has neighbouring units, so that it reads consecutive memory,
        and then takes units left of other threads. `count` may be 0."""
        b, stop = self.builder, self._lifted(count)
        me, num_threads = (Value(self, b.sext(self.call(f"omp_get_{what}", INT32), INTEGER))
                           for what in ("thread_num", "num_threads"))
        with self.loop(0, num_threads) as others:
            whose = (me + others) % num_threads
            begin, end = (stop * each // num_threads for each in (whose, whose + 1))
            counter = self.pointer(self._counters + whose * LINE_BYTES)
            take, body, after = (b.append_basic_block() for _ in range(3))
            b.branch(take)
            b.position_at_end(take)
            unit = begin + Value(self, b.atomic_rmw("add", counter, INTEGER(1), "monotonic"))
            b.cbranch((unit < end).ir, body, after)
            b.position_at_end(body)
            yield unit
            b.branch(take)
            b.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    def reserve(self, kind: Any) -> Any:
        """Stack memory for one `kind`."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    def scratch(self, num_vectors: int = 1) -> Value:
        """The address of stack memory for vectors."""
        return Value(self, self.builder.ptrtoint(self.reserve(ir.ArrayType(vector(FLOAT32), num_vectors)), INTEGER))

    # memory

    def load(self, address: Value, stored: Any, length: int = LANES) -> Value:
        """The stored values as a vector; a scalar if the length is 1."""
        kind = stored if length == 1 else vector(stored, length)
        return Value(self, self.builder.load(self.pointer(address), typ=kind, align=SIZES[stored]))

    def bits(self, address: Value) -> Value:
        """One boolean per bit, the lowest first."""
        loaded = self.builder.load(self.pointer(address), typ=ir.IntType(LANES), align=1)
        return Value(self, self.builder.bitcast(loaded, vector(ir.IntType(1))))

    def numbers(self, address: Value, stored: Any, length: int = LANES) -> Value:
        loaded = self.load(address, stored, length)
        if stored is FLOAT32:
            return loaded
        return Value(self, self.builder.fpext(loaded.ir, FLOAT32 if length == 1 else vector(FLOAT32, length)))

    def store(self, value: Value, address: Value, stored: Any) -> None:
        """Stores numbers, rounded to the stored type."""
        kept = value.ir
        if stored is not value.element:
            kept = self.builder.fptrunc(kept, vector(stored) if isinstance(kept.type, ir.VectorType) else stored)
        self.builder.store(kept, self.pointer(address), align=SIZES[stored])

    def pack(self, value: Value, condition: Value, address: Value) -> None:
        """Stores the elements of a vector of 32 bits each for which the condition holds, side by side."""
        self.call(f"llvm.masked.compressstore.v{LANES}i32", ir.VoidType(), value.ir, self.pointer(address),
                  condition.ir)

    def prefetch(self, address: Value, num_bytes: int, *, is_written: bool = False) -> None:
        """Prefetches memory to be read, or written; addresses that are not mapped do no harm."""
        how = [INT32(1), INT32(3), INT32(1)] if is_written else [INT32(0), INT32(2), INT32(1)]
        for begin in range(0, num_bytes, LINE_BYTES):
            self.call("llvm.prefetch.p0", ir.VoidType(), self.pointer(address + begin), *how)

    def pointer(self, address: Value) -> Any:
        return self.builder.inttoptr(address.ir, POINTER)

    # arithmetic

    def splat(self, value: Value, length: int = LANES) -> Value:
        """A vector with the value in every lane."""
        kind = vector(value.ir.type, length)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value.ir, INT32(0))
        return Value(self, self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined),
                                                       ir.Constant(vector(INT32, length), [0] * length)))

    def cast(self, value: Value, kind: Any) -> Value:
        """Reinterprets the bits as another type."""
        return Value(self, self.builder.bitcast(value.ir, kind))

    def select(self, condition: Value, value: Operand, other: Value) -> Value:
        """`value` where the condition holds, else `other`."""
        lifted, other = self._alike(self._lifted(value, other), other)
        return Value(self, self.builder.select(condition.ir, lifted.ir, other.ir))

    def fused(self, left: Value, right: Value, added: Value) -> Value:
        """left · right + added, rounded once."""
        return Value(self, self.call(f"llvm.fma.v{LANES}f32", vector(FLOAT32), left.ir, right.ir, added.ir))

    def pairs(self, left: Value, right: Value, added: Value) -> Value:
        """added + left · right for twice as many numbers in bfloat16, two products to each (vdpbf16ps)."""
        return Value(self, self.call("llvm.x86.avx512bf16.dpbf16ps.512", vector(FLOAT32), added.ir, left.ir, right.ir))

    def as_number(self, value: Value) -> Value:
        is_vector = isinstance(value.ir.type, ir.VectorType)
        return Value(self, self.builder.sitofp(value.ir, vector(FLOAT32) if is_vector else FLOAT32))

    def log(self, value: Value) -> Value:
        """The logarithm of positive normal numbers: 2 · atanh of (m - 1) / (m + 1), for a mantissa m near one."""
        bits = self.cast(value, vector(INT32))
        exponent = (bits - HALF_ROOT) >> 23             # counted from -127, for mantissas from √½ to √2
        number = self.as_number(exponent) - 127.0
        mantissa = self.cast(bits - self.shifted(exponent - 127, 23), vector(FLOAT32))
        ratio = (mantissa - 1.0) / (mantissa + 1.0)
        square, series = ratio * ratio, self.splat(self.number(0.0))
        for term in reversed(range(1, 2 * NUM_LOG_TERMS, 2)):
            series = self.fused(series, square, self.splat(self.number(2 / term)))
        return self.fused(number, self.splat(self.number(math.log(2))), series * ratio)

    def shifted(self, value: Value, num_bits: int) -> Value:
        """Shifted to the left."""
        kind = value.ir.type
        return Value(self, self.builder.shl(value.ir, ir.Constant(kind, [num_bits] * LANES)))

    def square_root(self, value: Value) -> Value:
        return Value(self, self.call("llvm.sqrt.f32", FLOAT32, value.ir))

    def smaller(self, left: Value, right: Operand) -> Value:
        other = self._lifted(right, left)
        return self.select(left < other, left, other)

    def larger(self, left: Value, right: Value) -> Value:
        """The larger one; NaN if `left` is NaN."""
        return self.select(left < right, right, left)

    def exp(self, value: Value) -> Value:
        """exp of a vector; NaN stays NaN."""
        lowest, highest = (self.splat(self.number(exponent)) for exponent in EXPONENTS)
        x = value * (1 / math.log(2))
        is_nothing, x = x < lowest, self.select(x > highest, highest, x)
        rounded = x + ROUNDING
        rest = x - (rounded - ROUNDING)
        series = self.splat(self.number(0.0))
        for term in reversed(range(NUM_TERMS)):
            factor = self.splat(self.number(math.log(2)**term / math.factorial(term)))
            series = self.fused(series, rest, factor)
        exponent = self.shifted(self.cast(rounded, vector(INT32)), 23)
        power = self.cast(exponent + self.cast(self.splat(self.number(1.0)), vector(INT32)), vector(FLOAT32))
        return self.select(is_nothing, self.zeros(), series * power)

    def exp2(self, value: Value) -> Value:
        """2 to the power of a vector, in bfloat16's precision; with AVX512."""
        no, all_lanes, as_usual = self.zeros().ir, ir.IntType(LANES)(-1), INT32(4)
        rest = self._masked("reduce", value.ir, INT32(0), no, all_lanes, as_usual)
        series = self.splat(self.number(0.0))
        for term in reversed(range(NUM_EXP2_TERMS)):
            series = self.fused(series, rest, self.splat(self.number(math.log(2)**term / math.factorial(term))))
        return self._masked("scalef", series.ir, (value - rest).ir, no, all_lanes, as_usual)

    def _masked(self, what: str, *args: Any) -> Value:
        return Value(self, self.call(f"llvm.x86.avx512.mask.{what}.ps.512", vector(FLOAT32), *args))

    def tanh(self, value: Value) -> Value:
        """tanh of a vector."""
        return self.splat(self.number(1.0)) - self.splat(self.number(2.0)) / (self.exp(value * 2.0) + 1.0)

    def total(self, value: Value) -> Value:
        """The sum of a vector's numbers, halves added to each other."""
        return self._folded(value, lambda left, right: left + right)

    def largest(self, value: Value) -> Value:
        return self._folded(value, self.larger)

    def least(self, value: Value) -> Value:
        return self._folded(value, self.smaller)

    def some(self, condition: Value) -> Value:
        """Whether any of a vector of booleans is true."""
        return self.cast(condition, ir.IntType(LANES)).equals(0) ^ 1

    def how_many(self, condition: Value) -> Value:
        """How many of a vector of booleans are true."""
        bits = self.cast(condition, ir.IntType(LANES)).ir
        return Value(self, self.builder.zext(self.call(f"llvm.ctpop.i{LANES}", bits.type, bits), INTEGER))

    def narrowed(self, value: Value) -> Value:
        """Truncates integers to 32 bits."""
        return Value(self, self.builder.trunc(value.ir, vector(INT32)))

    def interleaved(self, left: Value, right: Value) -> list[Value]:
        """The numbers of two vectors alternating, as two vectors."""
        length = left.ir.type.count
        places = [place for lane in range(length) for place in (lane, length + lane)]
        return [Value(self, self.builder.shuffle_vector(left.ir, right.ir, ir.Constant(vector(INT32, length), half)))
                for half in (places[:length], places[length:])]

    def _folded(self, value: Value, fold: Callable[[Value, Value], Value]) -> Value:
        width = LANES
        while width > 1:
            width //= 2
            places = ir.Constant(vector(INT32), [*range(width, 2 * width), *[0] * (LANES - width)])
            value = fold(value, Value(self, self.builder.shuffle_vector(value.ir, value.ir, places)))
        return Value(self, self.builder.extract_element(value.ir, INT32(0)))

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """Calls a function of LLVM's own."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        function = self._module.globals.get(name) or ir.Function(self._module, kind, name)
        return self.builder.call(function, args)

    def combine(self, operator: str, left: Value, right: Operand) -> Value:
        left, other = self._alike(left, self._lifted(right, left))
        prefix = "f" if left.element is FLOAT32 else ""
        return Value(self, getattr(self.builder, prefix + operator)(left.ir, other.ir))

    def compare(self, operator: str, left: Value, right: Operand) -> Value:
        left, other = self._alike(left, self._lifted(right, left))
        build = self.builder.fcmp_ordered if left.element is FLOAT32 else self.builder.icmp_signed
        return Value(self, build(operator, left.ir, other.ir))

    def _lifted(self, operand: Operand, like: Value | None = None) -> Value:
        """A Python constant, as a value of the kernel."""
        if isinstance(operand, Value):
            return operand
        return Value(self, (INTEGER if like is None else like.element)(operand))

    def _alike(self, *values: Value) -> tuple[Value, ...]:
        """Broadcasts all to vectors, if one is a vector."""
        if not any(isinstance(value.ir.type, ir.VectorType) for value in values):
            return values
        return tuple(value if isinstance(value.ir.type, ir.VectorType) else self.splat(value) for value in values)
