"""The Triton kernel of a mixture's experts: each reads its weights once, for the rows routed to it only.

A pair is a row and one of its experts. Pairs are sorted by expert on the device, and grids depend on shapes only, so
that a CUDA graph can record them; experts without rows end at once. A pair's bits depend on its row only, however many
rows share the expert. It knows rows, experts and weights as transformers lays them out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PAIRS, BLOCK_OUT, BLOCK_IN = 32, 64, 64


class Pairs(NamedTuple):
    order: Tensor               # [pairs], sorted by expert
    bounds: Tensor              # [experts + 1]: where each expert's pairs begin
    num_chosen: int             # experts of each row

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> Pairs:
        """From [rows, experts of each]."""
        chosen, order = top_k_index.flatten().sort(stable=True)
        experts = torch.arange(num_experts + 1, device=chosen.device)
        return cls(order, torch.searchsorted(chosen, experts), top_k_index.shape[1])

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, is_by_row: bool) -> Tensor:
        """The product of each pair with its expert's weight, [experts, num_out, num_in] of any strides: [pairs,
        num_out]. `x` has a row for each row, or for each pair."""
        num_experts, num_out, num_in = weight.shape
        out = torch.empty(len(self.order), num_out, dtype=x.dtype, device=x.device)
        assert x.stride(1) == 1 and (bias is None or bias.stride(1) == 1)
        _project[(triton.cdiv(num_out, BLOCK_OUT), num_experts)](
            x, weight, weight if bias is None else bias, self.order, self.bounds, out, x.stride(0), *weight.stride(),
            0 if bias is None else bias.stride(0), num_out, num_in, self.num_chosen if is_by_row else 1,
            BLOCK_PAIRS=BLOCK_PAIRS, BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN, HAS_BIAS=bias is not None)
        return out


@triton.jit
def _project(x, weight, bias, order, bounds, out, row_stride, expert_stride, out_stride, in_stride, bias_stride,
             num_out, num_in, pairs_per_row, BLOCK_PAIRS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
             HAS_BIAS: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = outs < num_out
    weights = weight + expert * expert_stride + outs[None, :] * out_stride
    end = tl.load(bounds + expert + 1)
    for first in range(tl.load(bounds + expert), end, BLOCK_PAIRS):
        places = first + tl.arange(0, BLOCK_PAIRS)
        is_pair = places < end
        pairs = tl.load(order + places, mask=is_pair, other=0)
        rows = x + (pairs // pairs_per_row)[:, None] * row_stride
        total = tl.zeros([BLOCK_PAIRS, BLOCK_OUT], tl.float32)
        for start in range(0, num_in, BLOCK_IN):
            at = start + tl.arange(0, BLOCK_IN)
            v = tl.load(rows + at[None, :], mask=is_pair[:, None] & (at < num_in)[None, :], other=0.0)
            w = tl.load(weights + at[:, None] * in_stride, mask=(at < num_in)[:, None] & is_out[None, :], other=0.0)
            total = tl.dot(v, w, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + expert * bias_stride + outs, mask=is_out, other=0.0).to(tl.float32)[None, :]
        tl.store(out + pairs[:, None] * num_out + outs[None, :], total.to(out.dtype.element_ty),
                 mask=is_pair[:, None] & is_out[None, :])
