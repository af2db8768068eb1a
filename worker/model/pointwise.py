"""The Triton kernels of the operations between a layer's products: each reads and writes its rows once.

torch computes the same in three to seven kernels; where a step has few rows, each costs more to launch than to run.
Sums and products are float32, and rounded once. A row's bits depend on that row alone. They know rows, nothing of
layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.model.chain import chained, follow, lead

BLOCK_GATE = 1024           # elements of a gate that one program computes


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2 · n], gates first: [..., n]."""
    *shape, width = gate_up.shape
    rows = gate_up.reshape(-1, width)
    out = torch.empty(len(rows), width // 2, dtype=gate_up.dtype, device=gate_up.device)
    _silu_and_multiply[(len(rows), triton.cdiv(width // 2, BLOCK_GATE))](
        rows, out, rows.stride(0), WIDTH=width // 2, BLOCK=BLOCK_GATE)
    return out.view(*shape, width // 2)


def add(x: Tensor, added: Tensor) -> Tensor:
    """One kernel of torch, which suffices."""
    return x + added


def add_and_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its root mean square norm, of [..., n] each."""
    shape, rows = x.shape, x.reshape(-1, x.shape[-1])
    others = rows if added is None else added.reshape(rows.shape)
    total = rows if added is None else torch.empty_like(rows)
    out = torch.empty_like(rows)
    assert rows.is_contiguous() and others.is_contiguous()
    _add_and_norm[(len(rows),)](rows, others, weight, total, out, eps, WIDTH=rows.shape[1],
                                BLOCK=triton.next_power_of_2(rows.shape[1]), HAS_ADDED=added is not None, num_warps=8,
                                **chained(x.device))
    return total.view(shape), out.view(shape)


@triton.jit
def _silu_and_multiply(gate_up, out, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < WIDTH
    gate = tl.load(gate_up + row * row_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _add_and_norm(x, added, weight, total, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  HAS_ADDED: tl.constexpr, IS_CHAINED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    follow(IS_CHAINED)
    lead(IS_CHAINED)
    columns = tl.arange(0, BLOCK)
    is_there = columns < WIDTH
    places = row * WIDTH + columns
    values = tl.load(x + places, mask=is_there, other=0.0).to(tl.float32)
    if HAS_ADDED:
        values += tl.load(added + places, mask=is_there, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=is_there)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / WIDTH + eps)
    weights = tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + places, (values * scale * weights).to(out.dtype.element_ty), mask=is_there)
