"""Copies of memory by all threads: one alone moves half of what memory gives. It knows addresses alone."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from worker.model import cpu

PART_BYTES = 1 << 15        # that a thread copies at once


def copy(blocks: npt.NDArray[np.int64]) -> None:
    """Of [blocks, 3]: from which address, to which one, and how many bytes, in whole lines of a cache."""
    if not cpu.computes(torch.float32):
        for source, target, num_bytes in blocks.tolist():
            ctypes.memmove(target, source, num_bytes)
    elif len(blocks):
        from worker.model.cpu.kernel import threads_for
        from worker.model.cpu.pointwise import copy_blocks

        num_parts = -(-int(blocks[:, 2].max()) // PART_BYTES)
        copy_blocks(torch.from_numpy(blocks), len(blocks), num_parts,
                    num_threads=threads_for(int(blocks[:, 2].sum()) // cpu.WORD_BYTES), part_bytes=PART_BYTES)
