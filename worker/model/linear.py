"""Linear layers as their device computes them best: on a CPU with weights packed once instead of at every call.

There our own kernels compute, where they run (worker/model/cpu), else oneDNN's operators. Those are private to torch: a
layer whose packed product differs from the plain one is left unchanged. So is a small one in float32, where oneDNN's
call costs more than packing saves. On a GPU weights are unchanged, and products of few rows are ours (products.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.model import cpu, memory

MIN_FLOAT32_WEIGHTS = 1 << 18           # 1 MiB, which stays in a core's cache: a plain call is up to 3 × faster
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class PackedLinear(nn.Module):
    """x · weightᵀ + bias, for a weight of [num_out, num_in]."""

    is_uniform = False

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return out


def pack_linears(module: nn.Module) -> int:
    """Replaces the linear layers below `module`, where that works; returns how many."""
    num_packed = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            packed = _pack(child)
            if packed is not None:
                setattr(parent, name, packed)
                num_packed += 1
    return num_packed


def packed_linears(module: nn.Module) -> list[Any]:
    """The layers that replaced others."""
    return [child for child in module.modules() if hasattr(child, "packed")]


def _pack(layer: Any) -> nn.Module | None:
    if type(layer) is nn.Linear:
        weight = layer.weight
    elif type(layer) is Conv1D:
        weight = layer.weight.T
    else:
        return None
    if weight.dtype not in MAX_RELATIVE_ERROR:
        return None
    try:
        packed = _packed(weight, layer.bias, getattr(layer, "is_gated", False))
        if packed is None or not _agree(layer, packed, weight):
            return None
        if not hasattr(packed, "weight"):
            packed.weight = stand_in(layer.weight)
        return packed
    except (RuntimeError, AttributeError, TypeError):       # no such operator in this build of torch, or another shape
        return None


def stand_in(weight: Tensor) -> Tensor:
    """Of a weight that lies packed, for blocks that ask for its type, shape or device; it takes no memory.

    It is not a number: a block that computes with it is found out by the first comparison with the plain model.
    """
    return weight.new_full((), torch.nan).expand(weight.shape)


def _packed(weight: Tensor, bias: Tensor | None, is_gated: bool) -> nn.Module | None:
    if memory.is_paged(weight.device):
        from worker.model.products import RowLinear, takes  # needs Triton

        return RowLinear(weight, bias) if takes(weight) else None
    if cpu.computes(weight.dtype):
        from worker.model.cpu.linear import PanelLinear, holds

        if holds(weight):
            return PanelLinear(weight, bias, is_gated=is_gated)
    is_small = weight.dtype == torch.float32 and weight.numel() < MIN_FLOAT32_WEIGHTS
    return None if is_small else PackedLinear(weight, bias)


def _agree(plain: nn.Module, packed: nn.Module, weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
    return agree(packed(x), plain(x))


def agree(got: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal up to the rounding of their type."""
    if got.shape != expected.shape:
        return False
    error, size = (got.float() - expected.float()).abs().max(), expected.float().abs().max()
    return bool(error <= MAX_RELATIVE_ERROR[expected.dtype] * (size + 1e-6))
