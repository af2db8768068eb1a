"""Keys and values in pages of one pool, as a GPU wants them: a slot is a row of a table of pages.

The kernels of kernels.py compute decode rows, and prompts in tiles. Nothing here needs a GPU: Triton's interpreter runs
the kernels on CPU tensors, very slowly. It knows slots, pages and tensors. It knows nothing of requests, sampling or
schedules, nor of who owns a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from worker.model import kernels
from worker.model.attention import NOBODY, TILE_LEN, KVLayer, KVShape, Scores
from worker.model.kernels import Angles
from worker.model.transfer import send

PAGE_LEN = 16               # tokens: bounds the waste at a sequence's end, and the unit of sharing


def pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_LEN)


@dataclass(slots=True)
class PagedMemory:
    layers: list[KVLayer]                               # each [num_pages, num_kv_heads, PAGE_LEN, head_dim]
    table: npt.NDArray[np.int32]                        # [num_slots, pages of the longest sequence]
    page_len: ClassVar = PAGE_LEN

    @classmethod
    def allocate(cls, shapes: Sequence[KVShape], num_pages: int, num_slots: int, num_tokens: int, dtype: torch.dtype,
                 device: torch.device) -> PagedMemory:
        """Nothing is zeroed, since nothing is read before it is written."""
        layers = [KVLayer(*(torch.empty(num_pages, shape.num_kv_heads, PAGE_LEN, shape.head_dim, dtype=dtype,
                                        device=device) for _ in "kv")) for shape in shapes]
        return cls(layers, np.zeros((num_slots, pages(num_tokens)), dtype=np.int32))

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> PagedRows:
        """Decode rows: one token of a sequence each, several of one sequence in order."""
        table = self.table[list(slots), :pages(max(positions) + 1)]
        return PagedRows(self.layers, self._on_device(table), self._on_device(np.array(positions, dtype=np.int32)))

    def chunk(self, slot: int, begin: int, end: int) -> PagedTiles:
        """Consecutive tokens of one prompt, in a forward of their own."""
        num_rows = tiled(end - begin)
        table = np.repeat(self.table[slot:slot + 1, :pages(end)], num_rows // TILE_LEN, axis=0)
        return PagedTiles(self.layers, self._on_device(table), self._on_device(padded(range(begin, end), num_rows)))

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        """Tokens [first, last) of a page, counted from its first, to the same place in another."""
        for cache in (cache for layer in self.layers for cache in layer):
            cache[target, :, first:last] = cache[source, :, first:last]

    def give_back(self, page: int) -> None:
        """Nothing to do: the pool belongs to this process alone."""

    def _on_device(self, array: npt.NDArray[np.int32]) -> Tensor:
        return send(array, self.layers[0].keys.device, torch.int32)


@dataclass(slots=True)
class PagedRows:
    turns_heads: ClassVar = True
    layers: list[KVLayer]
    table: Tensor                                       # int32, [rows, pages]
    positions: Tensor                                   # int32, [rows]
    _arrived: Tensor = field(init=False)                # of the splits of each row and head of keys

    def __post_init__(self) -> None:
        num_kv_heads = max(keys.shape[1] for keys, _ in self.layers)
        self._arrived = torch.zeros(len(self.positions) * num_kv_heads, dtype=torch.int32, device=self.table.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores,
               angles: Angles | None = None) -> Tensor:
        num_rows = len(self.positions)
        rows, new_keys, new_values = (x[0, :, :num_rows].transpose(0, 1) for x in (query, key, value))
        kernels.store(*self.layers[layer], rows, new_keys, new_values, self.table, self.positions, angles)
        out = kernels.attend(rows, *self.layers[layer], self.table, self.positions, self._arrived,
                             scaling=scores.scaling, window=scores.sliding_window, softcap=scores.softcap,
                             sinks=scores.sinks)
        num_filling = query.shape[2] - num_rows
        return torch.cat([out, out.new_zeros(num_filling, *out.shape[1:])])[None] if num_filling else out[None]


@dataclass(slots=True)
class PagedTiles:
    """Tokens of prompts: tiles of `TILE_LEN` rows, each of one sequence. The last tile may be incomplete."""

    turns_heads: ClassVar = True
    layers: list[KVLayer]
    table: Tensor                                       # int32, [tiles, pages]
    positions: Tensor                                   # int32, [tiles · TILE_LEN]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores,
               angles: Angles | None = None) -> Tensor:
        num_rows = query.shape[2]
        rows, new_keys, new_values = (x[0].transpose(0, 1) for x in (query, key, value))
        kernels.store(*self.layers[layer], rows, new_keys, new_values, self.table, self.positions, angles,
                      tile_len=TILE_LEN)
        rows = pad(rows, (0, 0, 0, 0, 0, len(self.positions) - num_rows))
        out = kernels.attend_tiles(rows, *self.layers[layer], self.table, self.positions, scaling=scores.scaling,
                                   window=scores.sliding_window, softcap=scores.softcap, sinks=scores.sinks)
        return out[None, :num_rows]


def padded(positions: Sequence[int], num_rows: int) -> npt.NDArray[np.int32]:
    out = np.full(num_rows, NOBODY, dtype=np.int32)
    out[:len(positions)] = positions
    return out


def tiled(num_rows: int) -> int:
    """Rounded up to whole tiles."""
    return -(-num_rows // TILE_LEN) * TILE_LEN
