"""What a CPU computes by kernels of ours: products, attention of decode rows, and what stands between them.

They are compiled for the processor at hand by LLVM, which `llvmlite` brings; where it is missing, torch's own
operators compute the same.
"""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

LANES = 16                  # numbers of a vector; a processor with shorter ones takes several


@cache
def computes(dtype: torch.dtype) -> bool:
    """Whether kernels of ours do: an x86 with vectors, and none that has matrix registers for oneDNN to use."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or find_spec("llvmlite") is None:
        return False
    from worker.model.cpu.kernel import has_threads, processor

    has = processor().has
    if dtype == torch.bfloat16:
        return has_threads() and has("avx512bf16") and not has("amx-bf16")
    return has_threads() and dtype == torch.float32 and has("fma")


def attends(query: Tensor) -> bool:
    """Whether heads of [..., head_dim] are whole vectors."""
    return computes(query.dtype) and query.shape[-1] % LANES == 0 and query.stride(-1) == 1


def arithmetic(dtype: torch.dtype) -> list[str]:
    """What its results depend on, beside the processor."""
    if not computes(dtype):
        return []
    from worker.model.cpu.kernel import COMPILER

    return [COMPILER]
