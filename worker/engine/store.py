"""The store of keys and values that fits the model's device, and how much memory it may fill."""

from __future__ import annotations

import numpy as np

from worker.engine.kv import KVSlots
from worker.engine.paged import KVPages
from worker.model import cpu, memory
from worker.model.attention import PAGE_LEN
from worker.model.model import Model
from worker.model.slots import SlotMemory, allocate

KV = KVSlots | KVPages

KEPT_PROMPTS, GPU_KEPT_PROMPTS = 256, 1024      # the most that end differently: a GPU computes, and holds, many more


def make_store(model: Model, *, max_num_seqs: int, max_model_len: int, num_bytes: int) -> KV:
    """Slots for `max_num_seqs` sequences, and others for prefixes that are kept. Raises ValueError if it is too small.
    """
    if not memory.is_paged(model.device):
        num_pages = _num_pages(model, PAGE_LEN, max_model_len, num_bytes)
        if not all(cpu.attends(model.dtype, shape.head_dim) for shape in model.kv_shapes):
            layers = allocate(model.kv_shapes, 2 * max_num_seqs, max_model_len, model.dtype)
            return KVSlots(layers, max_num_seqs, num_pages)
        num_slots, num_places = max_num_seqs + min(num_pages, KEPT_PROMPTS), -(-max_model_len // PAGE_LEN)
        num_pages = min(num_pages, num_slots * num_places)
        pool = allocate(model.kv_shapes, 1, num_pages * PAGE_LEN, model.dtype)
        return KVPages(SlotMemory(pool, np.zeros((num_slots, num_places), dtype=np.int64)), max_num_seqs, num_pages)
    from worker.model import paged  # needs Triton

    num_pages = _num_pages(model, paged.PAGE_LEN, max_model_len, min(num_bytes, memory.num_free_bytes(model.device)))
    num_slots = max_num_seqs + min(num_pages, GPU_KEPT_PROMPTS)
    return KVPages(paged.PagedMemory.allocate(model.kv_shapes, num_pages, num_slots, max_model_len, model.dtype,
                                              model.device), max_num_seqs, num_pages)


def _num_pages(model: Model, page_len: int, max_model_len: int, num_bytes: int) -> int:
    page_bytes = page_len * model.kv_bytes_per_token
    num_pages, num_needed = num_bytes // page_bytes, -(-max_model_len // page_len)
    if num_pages < num_needed:
        raise ValueError(f"kv_cache_bytes {num_bytes} is less than the {num_needed * page_bytes} of one "
                         f"sequence of {max_model_len} tokens: lower max_model_len")
    return num_pages
