"""Linear layers whose weights are whole numbers of eight bits: half the bytes that a step of few rows reads.

Each output has a scale of its own; inputs and sums stay as they were. (Weight-only, per channel: "W8A16".) The product
is cut into splits of the inputs where outputs alone would not fill a GPU, and the splits are summed in their order, so
a row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

MIN_WEIGHTS = 1 << 20       # of a layer that is worth it
MAX_BLOCK_ROWS, BLOCK_OUT = 128, 128
MIN_PROGRAMS = 256          # two for each multiprocessor of a large GPU
MAX_SPLITS = 8
FEW, MANY = (128, 8, 3), (64, 4, 4)         # inputs at a time, warps and stages: of up to MAX_FEW rows, and of more
MAX_FEW = 32


class Int8Linear(nn.Module):
    """x · weightᵀ + bias, for a weight of [num_out, num_in]."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.weight, self.scales = quantize(plain.weight.detach())
        self.bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = multiply(rows, self.weight, self.scales).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[num_out, num_in] as int8, and the float32 scales of [num_out] that they are to be multiplied by."""
    scales = weight.abs().amax(dim=1).float().clamp_min(1e-12) / 127
    return (weight.float() / scales[:, None]).round_().to(torch.int8), scales


def quantize_linears(module: nn.Module, head: nn.Module | None) -> int:
    """Replaces the large linear layers below `module` but its head, which decides between near tokens."""
    num_quantized = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and child.weight.numel() >= MIN_WEIGHTS:
                setattr(parent, name, Int8Linear(child))
                num_quantized += 1
    return num_quantized


def multiply(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """[rows, num_in] by int8 [num_out, num_in]ᵀ, each output times its scale: [rows, num_out]."""
    (num_rows, num_in), num_out = x.shape, len(weight)
    assert x.stride(1) == weight.stride(1) == 1
    block_in, num_warps, num_stages = FEW if num_rows <= MAX_FEW else MANY
    num_blocks, block_rows = triton.cdiv(num_out, BLOCK_OUT), max(16, triton.next_power_of_2(num_rows))
    block_rows = min(block_rows, MAX_BLOCK_ROWS)
    num_splits = max(1, min(MAX_SPLITS, MIN_PROGRAMS // num_blocks, triton.cdiv(num_in, 4 * block_in)))
    split_len = triton.cdiv(triton.cdiv(num_in, num_splits), block_in) * block_in
    parts = torch.empty(num_splits, num_rows, num_out, dtype=torch.float32, device=x.device)
    _multiply[(triton.cdiv(num_rows, block_rows), num_blocks, num_splits)](
        x, weight, scales, parts, x.stride(0), weight.stride(0), num_rows, num_out, num_in, split_len,
        BLOCK_ROWS=block_rows, BLOCK_OUT=BLOCK_OUT, BLOCK_IN=block_in, num_warps=num_warps,
        num_stages=num_stages)
    return (parts[0] if num_splits == 1 else parts.sum(dim=0)).to(x.dtype)


@triton.jit
def _multiply(x, weight, scales, parts, row_stride, out_stride, num_rows, num_out, num_in, split_len,
              BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Weights come first in the product: they are widened in registers, where tensor cores take only that side."""
    split = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_out = rows < num_rows, outs < num_out
    begin = split * split_len
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    weights = weight + outs.to(tl.int64)[:, None] * out_stride
    inputs = x + rows[:, None] * row_stride
    for start in range(begin, tl.minimum(begin + split_len, num_in), BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN)
        w = tl.load(weights + at[None, :], mask=is_out[:, None] & (at < num_in)[None, :], other=0)
        v = tl.load(inputs + at[None, :], mask=is_row[:, None] & (at < num_in)[None, :], other=0.0)
        total = tl.dot(w.to(v.dtype), tl.trans(v), total, input_precision="ieee")
    total *= tl.load(scales + outs, mask=is_out, other=0.0)[:, None]
    places = (split * num_rows + rows[None, :]).to(tl.int64) * num_out + outs[:, None]
    tl.store(parts + places, total, mask=is_out[:, None] & is_row[None, :])
