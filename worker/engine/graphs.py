"""Decode forwards as CUDA graphs: hundreds of kernels that the processor launches with one call.

Every forward has the same number of rows, filled up with rows that are none, so a row's bits cannot depend on how many
there are. A graph is made for a number of pages that a row may reach: programs for pages that no row has end at once,
but not for nothing. Graphs that do not say at once what the plain forward says are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.model.check import random_token_ids
from worker.model.model import Model
from worker.model.paged import NOBODY, PAGE_LEN, PagedMemory, PagedRows, pages

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
    """One forward of `model.max_rows` rows; its inputs lie where the graph reads them."""

    def __init__(self, model: Model, memory: PagedMemory, num_pages: int):
        self.num_pages = num_pages
        num_rows, device = model.max_rows, model.device
        self._token_ids, self._positions = (torch.zeros(1, num_rows, dtype=torch.long, device=device) for _ in "ip")
        self._kept = torch.arange(num_rows, device=device)
        self._rows = PagedRows(memory.layers, torch.zeros(num_rows, num_pages, dtype=torch.int32, device=device),
                               torch.full((num_rows,), NOBODY, dtype=torch.int32, device=device))
        self._replay, self._logits = record(
            lambda: model.forward_tensors(self._token_ids, self._positions, self._rows, self._kept))

    def run(self, token_ids: Sequence[int] | Tensor, positions: Sequence[int], table: npt.NDArray[np.int32]) -> Tensor:
        """Logits of the rows given, [rows, vocab_size], to be read before the next run."""
        num_rows = len(token_ids)
        self._token_ids[0, :num_rows].copy_(torch.as_tensor(token_ids))
        self._positions[0, :num_rows].copy_(torch.tensor(positions))
        self._rows.table[:num_rows].copy_(torch.from_numpy(table))
        self._rows.positions.copy_(torch.from_numpy(padded(positions, len(self._kept))))
        self._replay()
        return self._logits[:num_rows]


class DecodeGraphs:
    def __init__(self, model: Model, memory: PagedMemory):
        self.memory = memory
        self._graphs = [DecodeGraph(model, memory, num_pages) for num_pages in widths(memory.table.shape[1])]

    def run(self, token_ids: Sequence[int] | Tensor, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits of the rows given, [rows, vocab_size], to be read before the next run."""
        graph = next(graph for graph in self._graphs if graph.num_pages >= pages(max(positions) + 1))
        return graph.run(token_ids, positions, self.memory.table[list(slots), :graph.num_pages])


def capture(model: Model, memory: PagedMemory) -> DecodeGraphs | None:
    """None where this model's forward is no graph. Writes into the memory, which must be free."""
    try:
        graphs = DecodeGraphs(model, memory)
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
