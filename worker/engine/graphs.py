"""Decode forwards as CUDA graphs: hundreds of kernels that the processor launches with one call.

A graph has a fixed number of rows, filled up with rows that are none; where answers are exact there is one such number,
so a row's bits cannot depend on how many there are. And it is made for a number of pages that a row may reach: programs
for pages that no row has end at once, but not for nothing. Graphs that do not say at once what the plain forward says
are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.sequence import PENDING
from worker.model.check import random_token_ids
from worker.model.model import Model
from worker.model.paged import NOBODY, PAGE_LEN, PagedMemory, PagedRows, pages
from worker.model.transfer import send

log = logging.getLogger(__name__)

WARM_UPS = 3                                            # forwards before a capture, as torch asks for
MIN_WIDTH = 1024 // PAGE_LEN                            # pages that rows of the smallest graph may reach
WIDTH_FACTOR = 4                                        # from one graph to the next


def widths(num_pages: int) -> list[int]:
    """Up to the longest sequence, in pages."""
    found = [min(MIN_WIDTH, num_pages)]
    while found[-1] < num_pages:
        found.append(min(WIDTH_FACTOR * found[-1], num_pages))
    return found


def padded(positions: Sequence[int], num_rows: int) -> npt.NDArray[np.int32]:
    out = np.full(num_rows, NOBODY, dtype=np.int32)
    out[:len(positions)] = positions
    return out


def record(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What computes it again, and where its result stands then."""
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


class DecodeGraph:
    """One forward of `num_rows` rows. Its inputs lie side by side where the graph reads them, and come in one piece."""

    def __init__(self, model: Model, memory: PagedMemory, last_token_ids: Tensor, num_rows: int, num_pages: int):
        self.num_rows, self.num_pages = num_rows, num_pages
        self._last_token_ids = last_token_ids
        self._inputs = torch.zeros(num_rows * (3 + num_pages), dtype=torch.int32, device=model.device)
        self._token_ids, self._slots, positions, table = _views(self._inputs, num_rows)
        positions.fill_(NOBODY)
        self._rows = PagedRows(memory.layers, table, positions)
        self._kept = torch.arange(num_rows, device=model.device)            # as long as the graph, which reads it too
        self._replay, self._logits = record(lambda: model.forward_tensors(
            self._known()[None], positions.clamp(min=0).long()[None], self._rows, self._kept))

    def _known(self) -> Tensor:
        """The pending ones from where they were drawn."""
        return torch.where(self._token_ids == PENDING, self._last_token_ids[self._slots.long()], self._token_ids)

    def run(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int],
            table: npt.NDArray[np.int32]) -> Tensor:
        """Logits of the rows given, [rows, vocab_size], to be read before the next run."""
        inputs = np.zeros(len(self._inputs), dtype=np.int32)
        ids, places, all_positions, pages_of = _views(inputs, self.num_rows)
        num_rows = len(token_ids)
        ids[:num_rows], places[:num_rows], pages_of[:num_rows] = token_ids, slots, table
        all_positions[:] = padded(positions, self.num_rows)
        self._inputs.copy_(send(inputs, self._inputs.device, torch.int32))
        self._replay()
        return self._logits[:len(token_ids)]


def _views(inputs: Any, num_rows: int) -> tuple[Any, Any, Any, Any]:
    """Token ids, slots and positions of [rows] each, and a table of [rows, pages]."""
    singles = inputs[:3 * num_rows].reshape(3, num_rows)
    return singles[0], singles[1], singles[2], inputs[3 * num_rows:].reshape(num_rows, -1)


class DecodeGraphs:
    """One for each number of rows, and of pages that a row may reach."""

    def __init__(self, model: Model, memory: PagedMemory, last_token_ids: Tensor, sizes: Sequence[int]):
        self.memory = memory
        self._graphs = [DecodeGraph(model, memory, last_token_ids, num_rows, num_pages)
                        for num_rows in sizes for num_pages in widths(memory.table.shape[1])]

    def run(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits of the rows given, [rows, vocab_size], to be read before the next run."""
        num_pages = pages(max(positions) + 1)
        graph = next(graph for graph in self._graphs
                     if graph.num_rows >= len(token_ids) and graph.num_pages >= num_pages)
        return graph.run(token_ids, slots, positions, self.memory.table[list(slots), :graph.num_pages])


def capture(model: Model, memory: PagedMemory, last_token_ids: Tensor, sizes: Sequence[int]) -> DecodeGraphs | None:
    """None where this model's forward is no graph. Writes into the memory, which must be free."""
    try:
        graphs = DecodeGraphs(model, memory, last_token_ids, sizes)
        if _says_the_same(graphs, model, memory):
            return graphs
        log.warning("decoding without CUDA graphs: those of %r differ from its forward", model)
    except RuntimeError as error:                       # what a family does in its forward, a graph cannot always hold
        log.warning("decoding without CUDA graphs: %s", str(error).partition("\n")[0])
    return None


def _says_the_same(graphs: DecodeGraphs, model: Model, memory: PagedMemory) -> bool:
    """On rows of one sequence, each of which reads what those before it wrote."""
    positions = range(min(model.max_rows, memory.table.shape[1] * PAGE_LEN))
    slots = (0,) * len(positions)
    memory.table[0] = range(memory.table.shape[1])
    token_ids = random_token_ids(model.vocab_size, len(positions))
    expected = model.decode(token_ids, memory.rows(slots, positions), positions, positions)
    return torch.equal(graphs.run(token_ids, slots, positions), expected)
