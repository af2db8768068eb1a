"""Linear layers with weights in int8: half the bytes that a step of few rows reads.

Each output has a scale of its own; inputs and sums are unchanged. (Weight-only, per channel: "W8A16".)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from worker.model.products import RowLinear, pack

MIN_WEIGHTS = 1 << 20       # of a layer worth quantizing


class Int8Linear(RowLinear):
    min_tile_len = 128

    def __init__(self, plain: Any):
        weight, scales = quantize(plain.weight.detach())
        super().__init__(pack(weight), plain.bias, scales)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[num_out, num_in] as int8, and the float32 scales of [num_out] to multiply with."""
    scales = weight.abs().amax(dim=1).float().clamp_min(1e-12) / 127
    return (weight.float() / scales[:, None]).round_().to(torch.int8), scales


def quantize_linears(module: nn.Module, head: nn.Module | None) -> int:
    """Replaces the large linear layers below `module` except its head, which decides between close logits."""
    num_quantized = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | RowLinear) and child is not head and child.weight.numel() >= MIN_WEIGHTS:
                setattr(parent, name, Int8Linear(child))
                num_quantized += 1
    return num_quantized
