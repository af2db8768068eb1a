"""Forwards of fixed shapes, as a GPU wants them: each is recorded once as a CUDA graph, hundreds of kernels that the
processor launches with one call.

Forwards are padded to their shape. For decode rows there are a few sizes (if answers are exact, only sizes that give
equal bits), each for a few maximal numbers of pages: programs for missing pages end at once, but not for free. Long
chunks of prompts share one forward of many rows, in tiles. A graph whose output differs from the plain forward's is not
used: that forward is then launched kernel by kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.sequence import PENDING
from worker.model.attention import NOBODY, TILE_LEN
from worker.model.check import FEW_ROWS, random_token_ids
from worker.model.model import Model
from worker.model.paged import PAGE_LEN, PagedMemory, PagedRows, PagedTiles, pages, tiled
from worker.model.transfer import send_into

log = logging.getLogger(__name__)

WARM_UPS = 3                                            # forwards before a capture, as torch asks for
MIN_WIDTH = 1024 // PAGE_LEN                            # pages that a row of the smallest graph can have
MAX_SHORT = 64                                          # tokens of a chunk that is computed as decode rows
WIDTH_FACTOR = 4                                        # between the widths of successive graphs


def widths(num_pages: int) -> list[int]:
    """The widths of graphs, in pages, up to the longest sequence."""
    found = [min(MIN_WIDTH, num_pages)]
    while found[-1] < num_pages:
        found.append(min(WIDTH_FACTOR * found[-1], num_pages))
    return found


def record(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that recomputes it, and its output tensor. What it reads must stay allocated."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    return graph.replay, out


class Inputs(NamedTuple):
    """Views of one array of integers, on the host or on the device."""

    token_ids: Any              # [rows]
    slots: Any                  # [rows]
    positions: Any              # [rows], NOBODY: padding
    kept: Any                   # [tables], the rows whose logits are wanted
    table: Any                  # [tables, pages], one per row or per tile

    @classmethod
    def of(cls, piece: Any, num_rows: int, num_tables: int) -> Inputs:
        singles = piece[:3 * num_rows].reshape(3, num_rows)
        rest = piece[3 * num_rows:].reshape(-1, num_tables)
        return cls(singles[0], singles[1], singles[2], rest[0], rest[1:].reshape(num_tables, -1))

    def fill(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], kept: Sequence[int],
             table: npt.NDArray[np.int32]) -> None:
        """Writes the given rows; the rows after them are padding."""
        self.token_ids[:len(token_ids)], self.slots[:len(slots)], self.kept[:len(kept)] = token_ids, slots, kept
        self.positions[:] = NOBODY
        self.positions[:len(positions)] = positions
        self.table[:len(table), :table.shape[1]] = table


class FixedForward:
    """Its inputs are where its graph reads them, and arrive in one copy."""

    def __init__(self, model: Model, memory: PagedMemory, last_token_ids: Tensor, num_rows: int, num_pages: int,
                 tile_len: int = 1):
        self.model = model
        self.num_rows, self.num_pages, self.num_tables = num_rows, num_pages, num_rows // tile_len
        self._last_token_ids = last_token_ids
        num_inputs = 3 * num_rows + self.num_tables * (1 + num_pages)
        self._piece = torch.zeros(num_inputs, dtype=torch.int32, device=model.device)
        self._inputs = Inputs.of(self._piece, num_rows, self.num_tables)
        self._inputs.positions.fill_(NOBODY)
        context = PagedRows if tile_len == 1 else PagedTiles
        self._context = context(memory.layers, self._inputs.table, self._inputs.positions)
        self._replay: Callable[[], None] | None = None
        self._logits = torch.empty(0)

    def compute(self) -> Tensor:
        inputs = self._inputs
        last = self._last_token_ids[inputs.slots.long()]
        token_ids = torch.where(inputs.token_ids == PENDING, last, inputs.token_ids)
        positions = inputs.positions.clamp(min=0).long()
        return self.model.forward_tensors(token_ids[None], positions[None], self._context, inputs.kept.long())

    def record(self) -> None:
        self._replay, self._logits = record(self.compute)

    def forget(self) -> None:
        self._replay, self._logits = None, torch.empty(0)

    def run(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], kept: Sequence[int],
            table: npt.NDArray[np.int32]) -> Tensor:
        """Logits of the rows `kept`, [len(kept), vocab_size], to be read before the next run."""
        piece = np.zeros(len(self._piece), dtype=np.int32)
        Inputs.of(piece, self.num_rows, self.num_tables).fill(token_ids, slots, positions, kept, table)
        send_into(piece, self._piece)
        if self._replay is None:
            return self.compute()[:len(kept)]
        self._replay()
        return self._logits[:len(kept)]

    def is_replayed_alike(self, memory: PagedMemory) -> bool:
        """Whether graph and forward agree, on rows of one sequence, each of which reads what those before it wrote."""
        num_tokens = min(self.num_rows, memory.table.shape[1] * PAGE_LEN)
        memory.table[0] = range(memory.table.shape[1])
        table = memory.table[[0] * self.num_tables, :self.num_pages]
        kept = range(num_tokens - min(num_tokens, self.num_tables), num_tokens)
        token_ids = random_token_ids(self.model.vocab_size, num_tokens)
        found = self.run(token_ids, (0,) * num_tokens, range(num_tokens), kept, table)
        return torch.equal(found, self.compute()[:len(kept)])


class FixedForwards:
    """One forward per number of decode rows and of pages; one for the chunks of prompts."""

    def __init__(self, model: Model, memory: PagedMemory, last_token_ids: Tensor, *, prefill_chunk: int,
                 is_exact: bool):
        self.memory = memory
        self.max_rows = model.max_rows
        self.max_short = min(self.max_rows, MAX_SHORT)
        few = [size for size in FEW_ROWS if size < self.max_rows]
        sizes = model.row_sizes if is_exact else [*few, self.max_rows]
        num_pages = memory.table.shape[1]
        self.rows = [FixedForward(model, memory, last_token_ids, size, width)
                     for size in sizes for width in widths(num_pages)]
        self.tiles = FixedForward(model, memory, last_token_ids, tiled(prefill_chunk), num_pages, TILE_LEN)
        self.has_graphs = model.device.type == "cuda" and self.record(model)

    def record(self, model: Model) -> bool:
        """Records the graphs; False if one differs from its forward. Writes into the memory, which must be free."""
        forwards = [*self.rows, self.tiles]
        try:
            for forward in forwards:
                forward.record()
            if all(forward.is_replayed_alike(self.memory) for forward in forwards):
                return True
            log.warning("computing without CUDA graphs: those of %r differ from its forwards", model)
        except RuntimeError as error:                   # a family's forward may do what a graph cannot record
            log.warning("computing without CUDA graphs: %s", str(error).partition("\n")[0])
        for forward in forwards:
            forward.forget()
        return False

    def run_rows(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], kept: Sequence[int]
                 ) -> Tensor:
        """Logits of the rows `kept`, to be read before the next run."""
        num_pages = pages(max(positions) + 1)
        forward = next(forward for forward in self.rows
                       if forward.num_rows >= len(token_ids) and forward.num_pages >= num_pages)
        return forward.run(token_ids, slots, positions, kept, self.memory.table[list(slots), :forward.num_pages])

    def run_tiles(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], kept: Sequence[int]
                  ) -> Tensor:
        """As `run_rows`, for whole tiles."""
        return self.tiles.run(token_ids, slots, positions, kept, self.memory.table[list(slots[::TILE_LEN])])
