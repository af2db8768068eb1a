"""Kernels of one forward that begin while the one before them ends, as newer GPUs allow: a launch costs about what a
small kernel takes. ("Programmatic dependent launch".) Each waits before it reads what others wrote, or writes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

MIN_CAPABILITY = 9


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """Options of a launch."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= MIN_CAPABILITY:
        return {"IS_CHAINED": True, "launch_pdl": True}
    return {"IS_CHAINED": False}


@triton.jit
def follow(IS_CHAINED: tl.constexpr):
    """Waits until all earlier launches have ended, and their results can be read."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def lead(IS_CHAINED: tl.constexpr):
    """Lets the next kernel start, once all programs have come this far."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
