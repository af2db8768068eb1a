"""Keys and values in pages of one pool, as a GPU wants them: a slot is a row of a table of pages.

Decode rows are computed by the kernels of kernels.py; a prompt's chunk gathers the pages of its slot, and attends as
torch does. Nothing here needs a GPU: Triton's interpreter runs the kernels on tensors of the CPU, very slowly. It knows
slots, pages and tensors. It knows nothing of requests, sampling or schedules, nor of who owns a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import varlen

from worker.model import kernels
from worker.model.attention import Context, KVLayer, KVShape, Scores, causal_mask, weigh_chunk
from worker.model.transfer import send

PAGE_LEN = 16               # tokens: what a sequence wastes at its end, and what sequences may share
NOBODY = -1                 # position of a row that fills a forward up
FLASH_MAX_HEAD_DIM, FLASH_HEAD_DIM_UNIT = 256, 8
FLASH_OPTIONS: dict[str, Any] = {name: value for name, value in (("enable_gqa", True), ("num_splits", 1))
                                 if name in signature(varlen.varlen_attn).parameters}   # torch 2.11 knows neither


def pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_LEN)


@dataclass(slots=True)
class PagedMemory:
    layers: list[KVLayer]                               # each [num_pages, num_kv_heads, PAGE_LEN, head_dim]
    table: npt.NDArray[np.int32]                        # [num_slots, pages of the longest sequence]

    @classmethod
    def allocate(cls, shapes: Sequence[KVShape], num_pages: int, num_slots: int, num_tokens: int, dtype: torch.dtype,
                 device: torch.device) -> PagedMemory:
        """Nothing in it is read before it is written, so nothing is zeroed."""
        layers = [KVLayer(*(torch.empty(num_pages, shape.num_kv_heads, PAGE_LEN, shape.head_dim, dtype=dtype,
                                        device=device) for _ in "kv")) for shape in shapes]
        return cls(layers, np.zeros((num_slots, pages(num_tokens)), dtype=np.int32))

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> PagedRows:
        """Decode rows: one token of a sequence each, several of one sequence in order."""
        table = self.table[list(slots), :pages(max(positions) + 1)]
        return PagedRows(self.layers, self._on_device(table), self._on_device(np.array(positions, dtype=np.int32)))

    def chunk(self, slot: int, begin: int, end: int) -> Context:
        """Consecutive tokens of one prompt, in a forward of their own."""
        rows = PagedRows(self.layers, self._on_device(self.table[slot, :pages(end)])[None].expand(end - begin, -1),
                         self._on_device(np.arange(begin, end, dtype=np.int32)))
        return PagedChunk(rows, begin, end)

    def _on_device(self, array: npt.NDArray[np.int32]) -> Tensor:
        return send(array, self.layers[0].keys.device, torch.int32)


@dataclass(slots=True)
class PagedRows:
    layers: list[KVLayer]
    table: Tensor                                       # int32, [rows, pages]
    positions: Tensor                                   # int32, [rows]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        num_rows = len(self.positions)
        self.write(layer, key[:, :, :num_rows], value[:, :, :num_rows])
        out = kernels.attend(query[0, :, :num_rows].transpose(0, 1), *self.layers[layer], self.table, self.positions,
                             scaling=scores.scaling, window=scores.sliding_window, softcap=scores.softcap,
                             sinks=scores.sinks)
        num_filling = query.shape[2] - num_rows
        return torch.cat([out, out.new_zeros(num_filling, *out.shape[1:])])[None] if num_filling else out[None]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        kernels.store(*self.layers[layer], key[0].transpose(0, 1), value[0].transpose(0, 1), self.table, self.positions)


@dataclass(slots=True)
class PagedChunk:
    """Attends by torch's flash kernel for sequences of varying lengths where that can, else under a mask."""

    rows: PagedRows
    begin: int
    end: int
    _masks: dict[tuple[int | None, int], Tensor] = field(init=False, default_factory=dict)
    _bounds: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        self.rows.write(layer, key, value)
        keys, values = (self._gather(cache) for cache in self.rows.layers[layer])
        if is_flash(query, scores):
            return self._flash(query, keys, values, scores)
        return self._weigh(query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scores).transpose(1, 2)

    def _gather(self, cache: Tensor) -> Tensor:
        """[tokens up to the chunk's end, num_kv_heads, head_dim]"""
        return cache[self.rows.table[0]].transpose(1, 2).flatten(0, 1)[:self.end]

    def _flash(self, query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        """In one split, so that the bits depend on this prompt alone; the last query sees the last key."""
        num_rows = self.end - self.begin
        if self._bounds is None:
            queries, tokens = (send([0, count], query.device, torch.int32) for count in (num_rows, self.end))
            self._bounds = queries, tokens
        window = -1 if scores.sliding_window is None else scores.sliding_window - 1
        out = varlen.varlen_attn(query[0].transpose(0, 1).contiguous(), keys, values, *self._bounds, num_rows, self.end,
                                 scale=scores.scaling, window_size=(window, 0), **FLASH_OPTIONS)
        assert isinstance(out, Tensor)
        return out[None]

    def _weigh(self, query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        """The query heads that share keys become rows, so that no key is repeated."""
        num_kv_heads, group = keys.shape[1], query.shape[1] // keys.shape[1]
        rows = query.reshape(1, num_kv_heads, -1, query.shape[-1])
        out = weigh_chunk(rows, keys, values, self._mask(scores.sliding_window, group, query), scores)
        return out.reshape(query.shape)

    def _mask(self, window: int | None, group: int, query: Tensor) -> Tensor:
        if (window, group) not in self._masks:
            mask = causal_mask(self.rows.positions, self.end, window, query.dtype)
            self._masks[window, group] = mask.repeat(group, 1)[None, None]
        return self._masks[window, group]


def is_flash(query: Tensor, scores: Scores) -> bool:
    """Whether the flash kernel computes such heads and scores."""
    is_simple = scores.softcap is None and scores.sinks is None
    has_heads = query.shape[-1] <= FLASH_MAX_HEAD_DIM and query.shape[-1] % FLASH_HEAD_DIM_UNIT == 0
    return query.is_cuda and query.dtype == torch.bfloat16 and is_simple and has_heads
