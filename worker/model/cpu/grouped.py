"""The products of a mixture's experts in one call: each reads its weights once, for the rows routed to it only.

The counterpart of worker/model/grouped.py on a GPU. A pair is a row and one of its experts; pairs are sorted by expert.
A pair's bits depend on its row only, as in linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from worker.model.cpu.code import INTEGER, SIZES, Code, Value
from worker.model.cpu.kernel import MIN_SHARED_PRODUCTS, Kernel, threads_for
from worker.model.cpu.linear import PanelLinear, Panels, Tile

FIELDS = 4                  # of a share: its first row, the row behind its last, addresses of weights and of biases


class Pairs(NamedTuple):
    order: Tensor                       # [pairs], sorted by expert
    rows: Tensor                        # [pairs]: the row of each, in this order
    shares: list[tuple[int, int, int]]  # an expert, its first pair, and the one behind its last

    @classmethod
    def of(cls, top_k_index: Tensor) -> Pairs:
        """From [rows, experts of each]."""
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        experts, counts = (each.tolist() for each in torch.unique_consecutive(chosen[order], return_counts=True))
        ends = np.cumsum(counts).tolist()
        return cls(order, order // top_k_index.shape[1], list(zip(experts, [0, *ends[:-1]], ends, strict=True)))


class PanelExperts(nn.Module):
    """A layer for each expert, of weights of [experts, num_outputs, num_columns]."""

    def __init__(self, weights: Tensor, biases: Tensor | None, *, is_gated: bool):
        super().__init__()
        self.layers = cast(Sequence[PanelLinear], nn.ModuleList(
            PanelLinear(weight, None if biases is None else biases[expert], is_gated=is_gated)
            for expert, weight in enumerate(weights)))
        first = self.layers[0]
        self.is_gated = first.is_gated
        self.is_one_call = not first.is_by_matrices and len({layer.packed.dtype for layer in self.layers}) == 1
        self._addresses = np.array([[layer.packed.data_ptr(), layer.bias.data_ptr()] for layer in self.layers])

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """[pairs, num_columns] in their order, to [pairs, num_outputs], or half as many if outputs have gates."""
        first = self.layers[0]
        out = x.new_empty(len(x), first.width // 2 if self.is_gated else first.width)
        if self.is_one_call:
            self._compute(x, out, pairs)
        else:
            for expert, begin, end in pairs.shares:
                self.layers[expert].compute(x[begin:end], out[begin:end], is_gated=self.is_gated)
        return out if self.is_gated else out[:, :first.num_outputs]

    def _compute(self, x: Tensor, out: Tensor, pairs: Pairs) -> None:
        first = self.layers[0]
        shares = torch.from_numpy(self._shares(pairs, first.block))
        _multiply(x, shares, out, len(shares), x.stride(0), out.stride(0), first.num_steps, first.num_panels,
                  int(self.is_gated), dtype=first.dtype, stored=first.packed.dtype, tile=first.tile,
                  num_threads=threads_for(len(x) * first.width * first.num_columns, MIN_SHARED_PRODUCTS))

    def _shares(self, pairs: Pairs, most_rows: int) -> npt.NDArray[np.int64]:
        """[shares, FIELDS], each with as many rows as stay in a core's cache."""
        parts = [(expert, start, min(start + most_rows, end))
                 for expert, begin, end in pairs.shares for start in range(begin, end, most_rows)]
        experts, *bounds = np.array(parts, dtype=np.int64).T
        return np.column_stack([*bounds, self._addresses[experts]])


@Kernel
def _multiply(code: Code, x: Value, shares: Value, out: Value, num_shares: Value, row_stride: Value, out_stride: Value,
              num_steps: Value, num_panels: Value, is_gated: Value, *, dtype: torch.dtype, stored: torch.dtype,
              tile: Tile) -> None:
    """x of [pairs, columns], out of [pairs, outputs], or half as many; shares of [num_shares, FIELDS]."""
    size = SIZES[INTEGER]
    panels = Panels(code, x, out, row_stride, out_stride, num_steps, is_gated, dtype, stored, tile)
    with code.shares(num_shares * num_panels) as unit:
        panel, share = unit % num_panels, shares + unit // num_panels * (FIELDS * size)
        begin, end, weight, bias = (code.load(share + i * size, INTEGER, 1) for i in range(FIELDS))
        panels.compute(panel, begin, end, weight, bias)
