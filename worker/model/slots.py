"""Keys and values in slots, as a CPU wants them: one for each sequence, cut into pages of `PAGE_LEN` tokens.

Keys, and values, of one layer are [num_pages, num_slots, num_kv_heads, PAGE_LEN, head_dim]: the same page of
neighbouring slots is dense, so a batched product reads it without a copy. Our own kernel (cpu/attention.py) computes a
row of a decode forward, with keys in another order (`KVLayer`) and pages found by a table, so that slots may share
them; otherwise it is computed page by page (weighing.py), always in the same shape: its bits depend neither on its
neighbours nor on their lengths. It knows slots, positions and tensors. It knows nothing of requests, sampling or
schedules.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.model import cpu
from worker.model.attention import PAGE_LEN, Context, KVLayer, KVShape, Scores
from worker.model.weighing import Reach, causal_mask, reaches, weigh_chunk, weigh_pages

if TYPE_CHECKING:
    from worker.model.cpu.attention import Angles, Runs

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}    # of the same size
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0       # MAP_NORESERVE; mmap names it from Python 3.13 on
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class InSlots(Protocol):
    """A context that our kernels can compute: rows in slots, as runs of tokens."""

    @property
    def layers(self) -> list[KVLayer]: ...

    @property
    def table(self) -> Tensor: ...

    @property
    def runs(self) -> Runs: ...


def allocate(shapes: Sequence[KVShape], num_slots: int, num_tokens: int, dtype: torch.dtype) -> list[KVLayer]:
    """Zeroed, page aligned, and lazy: memory beyond the longest sequence is not touched."""
    layers = []
    for shape in shapes:
        pages = -(-num_tokens // PAGE_LEN), num_slots, shape.num_kv_heads
        plain, together = (PAGE_LEN, shape.head_dim), cpu.WORD_BYTES // dtype.itemsize
        in_lanes = PAGE_LEN // cpu.LANES, shape.head_dim // together, cpu.LANES, together
        keys = in_lanes if cpu.attends(dtype, shape.head_dim) else plain
        layers.append(KVLayer(_zeros((*pages, *keys), dtype), _zeros((*pages, *plain), dtype)))
    return layers


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        raise ValueError(f"no address space for {num_bytes} bytes: lower max_num_seqs or max_model_len") from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def give_back(block: npt.NDArray[Any]) -> None:
    """Returns the memory of a dense block to the system. It then reads as zeros and uses no memory."""
    begin, end = block.ctypes.data, block.ctypes.data + block.nbytes
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _madvise(begin, end - begin, mmap.MADV_DONTNEED)


def tokens(block: npt.NDArray[Any], place: slice) -> Iterator[npt.NDArray[Any]]:
    """Views of tokens of one page of one slot; `block` is its keys or its values."""
    if block.ndim == 3:
        yield block[:, place]
        return
    first, head = divmod(place.start, cpu.LANES)
    last, tail = divmod(place.stop, cpu.LANES)
    if first == last:
        yield block[:, first, :, head:tail]
        return
    if head:
        yield block[:, first, :, head:]
        first += 1
    yield block[:, first:last]
    if tail:
        yield block[:, last, :, :tail]


def places(begin: int, end: int) -> Iterator[tuple[int, slice]]:
    """The pages that contain tokens [begin, end) of a slot, and the range within each."""
    for page in range(begin // PAGE_LEN, -(-end // PAGE_LEN)):
        start = page * PAGE_LEN
        yield page, slice(max(begin - start, 0), min(end - start, PAGE_LEN))


@dataclass(slots=True)
class DecodeRows:
    """Rows of many sequences, one token each; several rows may be consecutive tokens of one sequence.

    Rows beyond the given ones are padding to the forward's least size: they write nothing and attend to nothing.
    """

    layers: list[KVLayer]
    table: Tensor
    slots: Sequence[int]
    positions: Sequence[int]
    _slots: Tensor = field(init=False)
    _positions: Tensor = field(init=False)
    _masks: dict[int | None, Tensor] = field(init=False, default_factory=dict)
    _places: dict[int, Tensor] = field(init=False, default_factory=dict)
    _reached: list[Reach] | None = field(init=False, default=None)
    _runs: Runs | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._slots, self._positions = torch.tensor(self.slots), torch.tensor(self.positions)

    @property
    def runs(self) -> Runs:
        if self._runs is None:
            self._runs = make_runs(self._slots, self._positions, [1] * len(self.slots))
        return self._runs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if self.layers[layer].is_in_lanes:
            return attend_by_kernels(self, layer, query, key, value, scores)
        num_rows, num_padded_rows = len(self.slots), query.shape[2]
        query, key, value = (tensor[0, :, :num_rows].transpose(0, 1) for tensor in (query, key, value))
        out = self._weigh(self.layers[layer], query, key, value, scores)
        return filled(out, num_padded_rows)[None]

    def _weigh(self, layer: KVLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Takes [rows, heads, head_dim] each; returns [rows, query heads, head_dim]."""
        keys, values = layer
        self._write(keys, key)
        self._write(values, value)
        rows = query.reshape(len(query), keys.shape[2], -1, keys.shape[4])
        out = weigh_pages(rows, keys, values, self._reaches, self._mask(scores.sliding_window), scores)
        return out.reshape(query.shape)

    @property
    def _reaches(self) -> list[Reach]:
        if self._reached is None:
            self._reached = reaches(self.slots, [position + 1 for position in self.positions])
        return self._reached

    def _write(self, cache: Tensor, new: Tensor) -> None:
        _, num_slots, num_kv_heads, _, head_dim = cache.shape
        if num_kv_heads not in self._places:
            slots = (self._positions // PAGE_LEN) * num_slots + self._slots
            heads = slots[:, None] * num_kv_heads + torch.arange(num_kv_heads)
            self._places[num_kv_heads] = (heads * PAGE_LEN + (self._positions % PAGE_LEN)[:, None]).flatten()
        cache.view(-1, head_dim).index_copy_(0, self._places[num_kv_heads], new.reshape(-1, head_dim))

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            mask = causal_mask(self._positions, len(self._reaches) * PAGE_LEN, window, torch.float32)
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


@dataclass(slots=True)
class PrefillChunk:
    """Consecutive tokens of one prompt, in a forward of their own."""

    layers: list[KVLayer]
    table: Tensor
    slot: int
    begin: int
    end: int
    _slots: Tensor = field(init=False)
    _positions: Tensor = field(init=False)
    _masks: dict[tuple[int | None, int], Tensor] = field(init=False, default_factory=dict)
    _runs: Runs | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._slots = torch.full((self.end - self.begin,), self.slot)
        self._positions = torch.arange(self.begin, self.end)

    @property
    def runs(self) -> Runs:
        if self._runs is None:
            self._runs = make_runs(self._slots, self._positions, [self.end - self.begin])
        return self._runs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if self.layers[layer].is_in_lanes:
            return attend_by_kernels(self, layer, query, key, value, scores)
        _, num_heads, num_rows, head_dim = query.shape
        num_kv_heads = key.shape[1]
        group = num_heads // num_kv_heads
        keys, values = (self._write_and_read(cache, new[0])
                        for cache, new in zip(self.layers[layer], (key, value), strict=True))
        # the query heads that share keys become rows, so that no key is repeated
        out = weigh_chunk(query.reshape(1, num_kv_heads, group * num_rows, head_dim), keys, values,
                          self._mask(scores.sliding_window, group, query.dtype), scores)
        return out.reshape(1, num_heads, num_rows, head_dim).transpose(1, 2)

    def _write_and_read(self, cache: Tensor, new: Tensor) -> Tensor:
        """[1, num_kv_heads, tokens up to the chunk's end, head_dim]"""
        done = 0
        for page, place in places(self.begin, self.end):
            num_tokens = place.stop - place.start
            cache[page, self.slot, :, place] = new[:, done:done + num_tokens]
            done += num_tokens
        return cache[:page + 1, self.slot].transpose(0, 1).flatten(1, 2)[None, :, :self.end]

    def _mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        if (window, group) not in self._masks:
            mask = causal_mask(self._positions, self.end, window, dtype)
            self._masks[window, group] = mask.repeat(group, 1)[None, None]
        return self._masks[window, group]


def in_turn(layers: Sequence[KVLayer]) -> npt.NDArray[np.int64]:
    """The table in which each slot has the pages of its own number."""
    num_pages, num_slots = layers[0].values.shape[:2]
    return np.arange(num_pages * num_slots).reshape(num_pages, num_slots).T.copy()


class SlotMemory:
    """Makes contexts for forwards over memory from `allocate`."""

    page_len = PAGE_LEN

    def __init__(self, layers: list[KVLayer], table: npt.NDArray[np.int64] | None = None):
        """Our kernels find the pages of slots by a table of [slots, any], which may change; others by position."""
        self.layers = layers
        self.table = in_turn(layers) if table is None else table
        self._table = torch.from_numpy(self.table)
        # numbers as integers, since numpy has no bfloat16: for so few of them, torch takes several times as long
        self._caches = [cache.flatten(0, 1).view(INTEGERS[cache.dtype]).numpy() for layer in layers for cache in layer]

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> DecodeRows:
        return DecodeRows(self.layers, self._table, slots, positions)

    def chunk(self, slot: int, begin: int, end: int) -> PrefillChunk:
        return PrefillChunk(self.layers, self._table, slot, begin, end)

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        """Tokens [first, last) of a page, counted from its first, to the same place in another."""
        place = slice(first, last)
        for cache in self._caches:
            for mine, theirs in zip(tokens(cache[target], place), tokens(cache[source], place), strict=True):
                mine[...] = theirs

    def give_back(self, page: int) -> None:
        for cache in self._caches:
            give_back(cache[page])


@dataclass(slots=True)
class Together:
    """One forward of several parts, each with its rows, in order. Further rows are padding."""

    parts: Sequence[tuple[Context, int]]
    _runs: Runs | None = field(init=False, default=None)

    @property
    def layers(self) -> list[KVLayer]:
        return self._in_slots[0].layers

    @property
    def table(self) -> Tensor:
        return self._in_slots[0].table

    @property
    def _in_slots(self) -> list[InSlots]:
        return [cast(InSlots, part) for part, _ in self.parts]

    @property
    def runs(self) -> Runs:
        if self._runs is None:
            parts = [part.runs for part in self._in_slots]
            self._runs = make_runs(torch.cat([part.slots for part in parts]),
                                   torch.cat([part.positions for part in parts]),
                                   [run_len for part in parts for run_len in part.lens])
        return self._runs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if self.layers[layer].is_in_lanes:
            return attend_by_kernels(self, layer, query, key, value, scores)
        sizes = [num_rows for _, num_rows in self.parts]
        sizes.append(query.shape[2] - sum(sizes))
        split = [tensor.split(sizes, dim=2) for tensor in (query, key, value)]
        outs = [context.attend(layer, q, k, v, scores)
                for (context, _), q, k, v in zip(self.parts, *split, strict=False)]
        return torch.cat([*outs, torch.zeros_like(split[0][-1]).transpose(1, 2)], dim=1)


def make_runs(slots: Tensor, positions: Tensor, lens: list[int]) -> Runs:
    from worker.model.cpu.attention import Runs  # needs llvmlite

    return Runs(slots, positions, lens)


def attend_by_kernels(context: InSlots, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores,
                      angles: Angles | None = None) -> Tensor:
    """As `Context.attend`; with angles, queries and keys are not rotated yet."""
    from worker.model.cpu.attention import attend, most_queries, write

    keys, values = context.layers[layer]
    num_kv_heads, head_dim = key.shape[1], key.shape[3]
    rows = context.runs.rows(query.shape[1] // num_kv_heads, most_queries(query.dtype, head_dim))
    num_rows, num_padded_rows = len(rows.slots), query.shape[2]
    query, key, value = (_dense(tensor[0, :, :num_rows].transpose(0, 1)) for tensor in (query, key, value))
    write(keys, values, key, value, context.table, rows.slots, rows.positions, query, angles)
    out = attend(query, keys, values, context.table, rows, scaling=scores.scaling, window=scores.sliding_window,
                 softcap=scores.softcap, sinks=scores.sinks)
    return filled(out, num_padded_rows)[None]


def _dense(heads: Tensor) -> Tensor:
    """Makes the numbers of a head contiguous."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def filled(out: Tensor, num_rows: int) -> Tensor:
    """[num_rows, …]: padded with zeros."""
    num_missing = num_rows - len(out)
    return torch.cat([out, out.new_zeros(num_missing, *out.shape[1:])]) if num_missing else out
