"""Copies numbers between host and device, without waiting for what the device computes.

This takes pinned memory: other memory is copied only after all earlier launches. It knows tensors alone.
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
    return _pinned(here).to(device, non_blocking=True) if device.type == "cuda" else here


def send_into(values: npt.NDArray[Any], target: Tensor) -> None:
    here = torch.as_tensor(values, dtype=target.dtype)
    target.copy_(_pinned(here) if target.is_cuda else here, non_blocking=True)


def _pinned(here: Tensor) -> Tensor:
    return torch.empty_like(here, pin_memory=True).copy_(here)


class Transfer:
    """Results on their way to the host."""

    def __init__(self, *tensors: Tensor):
        self._tensors = tensors
        self._has_arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._tensors = tuple(_begin_copy(tensor) for tensor in tensors)
            self._has_arrived = torch.cuda.Event()
            self._has_arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """Waits for these results, not for later launches."""
        if self._has_arrived:
            self._has_arrived.synchronize()
        return self._tensors


def _begin_copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
