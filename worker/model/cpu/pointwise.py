"""The operations between a layer's products, on a CPU: each kernel reads and writes its rows once, in one call.

The counterpart of worker/model/pointwise.py on a GPU. Sums and products are float32 and rounded once; a row's bits
depend on that row alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from worker.model.cpu import LANES
from worker.model.cpu.code import INTEGER, SIZES, Code, Value
from worker.model.cpu.kernel import ELEMENTS, Kernel, empty, empty_rows, threads_for

GELU_CUBIC = 0.044715       # Hendrycks and Gimpel, arXiv:1606.08415


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [rows, heads, head_dim] in place, by the angles of [rows, head_dim]: each half with the other."""
    num_rows, num_heads, head_dim = x.shape
    if cos.shape != (num_rows, head_dim) or cos.dtype != x.dtype:
        raise RuntimeError(f"angles of {tuple(cos.shape)} do not turn heads of {tuple(x.shape)}")
    _rotate(x, cos, sin, num_rows, num_heads, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            num_threads=threads_for(x.numel()), dtype=x.dtype, head_dim=head_dim)
    return x


def gather(table: Tensor, places: Tensor, out: Tensor) -> Tensor:
    """Copies rows of a dense table of [any, n] into `out` of [rows, n]."""
    _gather(table, places, out, len(places), table.shape[1], num_threads=threads_for(out.numel()), dtype=table.dtype)
    return out


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2 · n], gates first: [..., n]."""
    return _gated(gate_up, is_gelu=False)


def gelu_and_multiply(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up of the same, gelu as tanh approximates it."""
    return _gated(gate_up, is_gelu=True)


def _gated(gate_up: Tensor, *, is_gelu: bool) -> Tensor:
    width = gate_up.shape[-1] // 2
    rows = gate_up.view(-1, 2 * width)
    out = empty_rows(rows.shape[0], width, gate_up.dtype)
    _activate_and_multiply(rows, out, rows.shape[0], width, rows.stride(0), out.stride(0),
                           num_threads=threads_for(rows.numel()), dtype=gate_up.dtype, is_gelu=is_gelu)
    return out.view(*gate_up.shape[:-1], width)


def add(x: Tensor, added: Tensor) -> Tensor:
    """Of [..., n] each."""
    width = x.shape[-1]
    require_like(x, added)
    rows, others = x.view(-1, width), added.view(-1, width)
    out = empty(rows.shape[0], width, x.dtype)
    _add(rows, others, out, rows.shape[0], width, rows.stride(0), others.stride(0),
         num_threads=threads_for(rows.numel()), dtype=x.dtype)
    return out.view(x.shape)


def add_and_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its root mean square norm, of [..., n] each."""
    width = x.shape[-1]
    require_like(x, weight, *(() if added is None else (added,)))
    rows = x.view(-1, width)
    others = rows if added is None else added.view(-1, width)
    total = rows if added is None else empty(rows.shape[0], width, x.dtype)
    out = empty_rows(rows.shape[0], width, x.dtype)
    _add_and_norm(rows, others, weight, total, out, rows.shape[0], width, rows.stride(0), others.stride(0),
                  out.stride(0), float(eps), num_threads=threads_for(rows.numel()), dtype=x.dtype,
                  has_added=added is not None)
    return total.view(x.shape), out.view(x.shape)


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root mean square norm of each head of [rows, heads, head_dim], in place."""
    num_rows, num_heads, head_dim = x.shape
    require_like(x, weight)
    _norm_heads(x, weight, num_rows, num_heads, x.stride(0), x.stride(1), float(eps),
                num_threads=threads_for(x.numel()), dtype=x.dtype, head_dim=head_dim)
    return x


def require_like(x: Tensor, *others: Tensor) -> None:
    """Kernels take addresses, and read all numbers as of one type."""
    for other in others:
        if other.dtype != x.dtype:
            raise RuntimeError(f"{other.dtype} among {x.dtype}")


@Kernel
def _rotate(code: Code, x: Value, cos: Value, sin: Value, num_rows: Value, num_heads: Value, row_stride: Value,
            head_stride: Value, cos_stride: Value, sin_stride: Value, *, dtype: torch.dtype, head_dim: int) -> None:
    element = ELEMENTS[dtype]
    size = SIZES[element]
    with code.shares(num_rows) as row:
        angles = angles_at(code, cos + row * cos_stride * size, sin + row * sin_stride * size, element, head_dim)
        with code.loop(0, num_heads) as head:
            place = x + (row * row_stride + head * head_stride) * size
            turn(code, place, place, angles, element)


def angles_at(code: Code, cos: Value, sin: Value, element: Any, head_dim: int) -> list[list[Value]]:
    """For one row: cosines and sines for each 16 numbers of a half, and for their counterparts in the other half."""
    half = head_dim // 2 * SIZES[element]
    return [[code.numbers(table + (begin + offset), element) for offset in (0, half) for table in (cos, sin)]
            for begin in range(0, half, LANES * SIZES[element])]


def turn(code: Code, head: Value, out: Value, angles: list[list[Value]], element: Any) -> None:
    """Rotates one head, each half with the other, from one address to another."""
    num_bytes = LANES * SIZES[element]
    half = len(angles) * num_bytes
    for begin, (cos, sin, other_cos, other_sin) in zip(range(0, half, num_bytes), angles, strict=True):
        first, second = (code.numbers(head + (begin + offset), element) for offset in (0, half))
        code.store(first * cos - second * sin, out + begin, element)
        code.store(second * other_cos + first * other_sin, out + (begin + half), element)


@Kernel
def _gather(code: Code, table: Value, places: Value, out: Value, num_rows: Value, width: Value, *, dtype: torch.dtype
            ) -> None:
    element = ELEMENTS[dtype]
    size = SIZES[element]
    with code.shares(num_rows) as row:
        source = table + code.load(places + row * SIZES[INTEGER], INTEGER, 1) * width * size
        with code.loop(0, width, LANES) as column:
            numbers = code.load(source + column * size, element)
            code.store(numbers, out + (row * width + column) * size, element)


@Kernel
def _activate_and_multiply(code: Code, gate_up: Value, out: Value, num_rows: Value, width: Value, row_stride: Value,
                           out_stride: Value, *, dtype: torch.dtype, is_gelu: bool) -> None:
    element = ELEMENTS[dtype]
    size = SIZES[element]
    with code.shares(num_rows) as row, code.loop(0, width, LANES) as column:
        place = gate_up + (row * row_stride + column) * size
        gate, up = code.numbers(place, element), code.numbers(place + width * size, element)
        times = gelu_times if is_gelu else silu_times
        code.store(times(code, gate, up), out + (row * out_stride + column) * size, element)


def gelu_times(code: Code, gate: Value, up: Value) -> Value:
    """gelu(gate) · up for two vectors: 1 + tanh(z) is 2 / (1 + exp(-2 z))."""
    z = gate * math.sqrt(2 / math.pi) * (gate * gate * GELU_CUBIC + 1.0)
    return gate / (code.exp(z * -2.0) + 1.0) * up


def silu_times(code: Code, gate: Value, up: Value) -> Value:
    """silu(gate) · up for two vectors."""
    return gate / (code.exp(code.zeros() - gate) + 1.0) * up


@Kernel
def _add(code: Code, x: Value, added: Value, out: Value, num_rows: Value, width: Value, row_stride: Value,
         added_stride: Value, *, dtype: torch.dtype) -> None:
    element = ELEMENTS[dtype]
    size = SIZES[element]
    with code.shares(num_rows) as row, code.loop(0, width, LANES) as column:
        total = (code.numbers(x + (row * row_stride + column) * size, element)
                 + code.numbers(added + (row * added_stride + column) * size, element))
        code.store(total, out + (row * width + column) * size, element)


@Kernel
def _add_and_norm(code: Code, x: Value, added: Value, weight: Value, total: Value, out: Value, num_rows: Value,
                  width: Value, row_stride: Value, added_stride: Value, out_stride: Value, eps: Value, *,
                  dtype: torch.dtype, has_added: bool) -> None:
    """`total` is dense; it is x itself if nothing is added."""
    element = ELEMENTS[dtype]
    size = SIZES[element]
    with code.shares(num_rows) as row:
        source, squares = x + row * row_stride * size, code.variable(code.zeros())
        if has_added:
            place = total + row * width * size
            with code.loop(0, width, LANES) as column:
                other = code.numbers(added + (row * added_stride + column) * size, element)
                code.store(code.numbers(source + column * size, element) + other, place + column * size, element)
            source = place
        with code.loop(0, width, LANES) as column:
            numbers = code.numbers(source + column * size, element)
            squares.value = code.fused(numbers, numbers, squares.value)
        mean = code.total(squares.value) / code.as_number(width)
        scale = code.number(1.0) / code.square_root(mean + eps)
        with code.loop(0, width, LANES) as column:
            numbers = code.numbers(source + column * size, element) * scale
            code.store(numbers * code.numbers(weight + column * size, element),
                       out + (row * out_stride + column) * size, element)


@Kernel
def _norm_heads(code: Code, x: Value, weight: Value, num_rows: Value, num_heads: Value, row_stride: Value,
                head_stride: Value, eps: Value, *, dtype: torch.dtype, head_dim: int) -> None:
    element = ELEMENTS[dtype]
    size = SIZES[element]
    weights = [code.numbers(weight + i * size, element) for i in range(0, head_dim, LANES)]
    with code.shares(num_rows) as row, code.loop(0, num_heads) as head:
        place, squares = x + (row * row_stride + head * head_stride) * size, code.zeros()
        parts = [code.numbers(place + i * size, element) for i in range(0, head_dim, LANES)]
        for part in parts:
            squares = code.fused(part, part, squares)
        scale = code.number(1.0) / code.square_root(code.total(squares) / float(head_dim) + eps)
        for i, (part, each) in enumerate(zip(parts, weights, strict=True)):
            code.store(part * scale * each, place + i * LANES * size, element)
