"""What our own kernels compute on a CPU: products, attention of decode rows, and what is between them.

They are compiled for the processor at hand by LLVM, which `llvmlite` brings; where it is missing, torch's own
operators compute the same.
"""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.util import find_spec

import torch

LANES = 16                  # numbers per vector; a processor with shorter vectors uses several
WORD_BYTES = 4              # of a lane: one number, or two that are multiplied together
LOWEST = -1e30              # below all logits, and finite: the initial maximum


@cache
def computes(dtype: torch.dtype) -> bool:
    """Whether our kernels run: an x86 with vector instructions."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or find_spec("llvmlite") is None:
        return False
    from worker.model.cpu.kernel import has_threads, processor

    has = processor().has
    if dtype == torch.bfloat16:
        return has_threads() and has("avx512bf16")
    return has_threads() and dtype == torch.float32 and has("fma")


def has_matrices(dtype: torch.dtype) -> bool:
    """Whether they multiply in matrix registers."""
    if dtype != torch.bfloat16 or not computes(dtype):
        return False
    from worker.model.cpu import amx

    return amx.is_there()


def attends(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether heads are whole vectors."""
    return computes(dtype) and head_dim % LANES == 0


def arithmetic(dtype: torch.dtype) -> list[str]:
    """What its results depend on, besides the processor."""
    if not computes(dtype):
        return []
    from worker.model.cpu.kernel import COMPILER

    return [COMPILER, "AMX"] if has_matrices(dtype) else [COMPILER]
