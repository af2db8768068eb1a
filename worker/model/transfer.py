"""Numbers on their way between the host and the device, without waiting for what the device computes.

Only pinned memory travels so: any other is copied after all that was launched before. It knows tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def send(values: Sequence[int] | Sequence[float] | npt.NDArray[Any], device: torch.device,
         dtype: torch.dtype = torch.long) -> Tensor:
    here = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return here
    return torch.empty_like(here, pin_memory=True).copy_(here).to(device, non_blocking=True)


class Transfer:
    """Results for the host."""

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
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
