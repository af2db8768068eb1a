"""Results on their way from the device to the host. It knows tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    def __init__(self, *tensors: Tensor):
        self._tensors = tensors
        self._has_arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._tensors = tuple(_begin_copy(tensor) for tensor in tensors)
            self._has_arrived = torch.cuda.Event()
            self._has_arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """For these, and not for what was launched behind them."""
        if self._has_arrived:
            self._has_arrived.synchronize()
        return self._tensors


def _begin_copy(tensor: Tensor) -> Tensor:
    """Into pinned memory: any other would be waited for at once."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
