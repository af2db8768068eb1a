"""Where a model keeps keys and values: in slots on a CPU, in pages on any other device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from shared import container
from worker.model.attention import Context, KVLayer, KVShape
from worker.model.slots import SlotMemory, allocate

FREE_SHARE = 0.85           # the rest is for activations and graphs


class Memory(Protocol):
    """The keys and values of a forward, by slots and positions."""

    layers: list[KVLayer]

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> Context:
        """Decode rows: one token of a sequence each; those of one sequence are in order."""

    def chunk(self, slot: int, begin: int, end: int) -> Context:
        """Consecutive tokens of one prompt, in a forward of their own."""


def is_paged(device: torch.device) -> bool:
    return device.type != "cpu"


def num_free_bytes(device: torch.device) -> int:
    """The bytes of a device for keys and values: what its weights leave free, without what forwards need."""
    if device.type != "cuda":
        return int(FREE_SHARE * min(container.num_free_bytes(), sys.maxsize))
    torch.cuda.empty_cache()                            # of weights that were packed anew
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * FREE_SHARE)


def scratch(shapes: Sequence[KVShape], num_slots: int, num_tokens: int, dtype: torch.dtype, device: torch.device
            ) -> Memory:
    """Memory for trials, in which all slots can be used at once."""
    if not is_paged(device):
        return SlotMemory(allocate(shapes, num_slots, num_tokens, dtype))
    from worker.model.paged import PagedMemory, pages  # its kernels need Triton, which a machine without a GPU may lack

    memory = PagedMemory.allocate(shapes, num_slots * pages(num_tokens), num_slots, num_tokens, dtype, device)
    memory.table[:] = np.arange(memory.table.size).reshape(memory.table.shape)
    return memory
