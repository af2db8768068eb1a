"""All layers of a model as one, in which decode rows are computed by a program and not call by call.

A program is recorded when so many rows come for the first time, and tried on them: where it says something else than
the layers themselves, because they do what no kernel of ours does, it is not used.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from worker.model.attention import DecodeRows
from worker.model.cpu.program import Arena, Program, recorded
from worker.model.linear import packed_linears

log = logging.getLogger(__name__)

MAX_ROWS = 64               # of a program: with more, calling is little beside what is computed
MAX_WEIGHTS = 1 << 30       # of the layers, and so with more of them
MAX_WIDTHS = 48             # times hidden_size that a layer writes for each row: room for gates eight times as wide


@dataclass(slots=True, frozen=True)
class Recorded:
    """For one number of rows, and for one memory of keys and values."""

    program: Program
    hidden_states: Tensor
    angles: tuple[Tensor, Tensor]
    context: DecodeRows
    out: Tensor

    def run(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], context: DecodeRows) -> Tensor:
        """What it returns is overwritten by the next run."""
        self.hidden_states.copy_(hidden_states)
        for place, angle in zip(self.angles, angles, strict=True):
            place.copy_(angle)
        self.context.move_to(context)
        self.program.run()
        return self.out


class Stack(nn.Module):
    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers
        if hasattr(layers[0], "attention_type"):        # some models choose a mask by it
            self.attention_type = layers[0].attention_type
        self.is_recordable = True
        self._arena: Arena | None = None

    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], context: Any, **_: Any
                ) -> Tensor:
        num_rows = hidden_states.shape[1]
        if not (self.is_recordable and isinstance(context, DecodeRows) and num_rows == len(context.slots) <= MAX_ROWS):
            return self._plain(hidden_states, position_embeddings, context)
        program = cast(Recorded | None, context.programs.get(num_rows))
        if program is None:
            return self._tried(hidden_states, position_embeddings, context)
        return program.run(hidden_states, position_embeddings, context)

    def _tried(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], context: DecodeRows) -> Tensor:
        """Records a program, and keeps it if it says the same."""
        program = self._record(hidden_states, angles, context)
        got = program.run(hidden_states, angles, context) if program else None
        expected = self._plain(hidden_states, angles, context)
        if got is not None and torch.equal(got, expected):
            context.programs[hidden_states.shape[1]] = program
        else:
            self.is_recordable = False
            log.info("layers are computed call by call: their program says something else, or is too large")
        return expected

    def _plain(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], context: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=angles, context=context)
        return hidden_states

    def _record(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], context: DecodeRows) -> Recorded | None:
        """On other numbers than these, so that what is not recorded will differ."""
        if self._arena is None:
            self._arena = Arena(MAX_ROWS * MAX_WIDTHS * hidden_states.shape[-1] * hidden_states.dtype.itemsize)
        first = x = torch.randn(hidden_states.shape).to(hidden_states.dtype)
        turned = torch.randn(angles[0].shape).to(angles[0].dtype), torch.randn(angles[1].shape).to(angles[1].dtype)
        own = DecodeRows(context.layers, context.slots, context.positions)
        try:
            with recorded(self._arena) as calls:
                for layer in self.layers:
                    self._arena.turn()
                    x = layer(x, position_embeddings=turned, context=own)
        except MemoryError:
            return None
        return Recorded(Program(calls), first, turned, own, x)


def stack(module: nn.Module, layer_kind: type[nn.Module]) -> None:
    """Puts one in the place of a model's layers, where all are of that kind and are told the same."""
    for parent in list(module.modules()):
        for name, layers in list(parent.named_children()):
            if isinstance(layers, nn.ModuleList) and _is_stackable(layers, layer_kind):
                setattr(parent, name, nn.ModuleList([Stack(layers)]))


def _is_stackable(layers: nn.ModuleList, layer_kind: type[nn.Module]) -> bool:
    num_weights: int = sum(layer.packed.numel() for layer in packed_linears(layers))
    is_alike = len({getattr(layer, "attention_type", None) for layer in layers}) == 1
    return is_alike and num_weights <= MAX_WEIGHTS and all(
        type(layer) is layer_kind and all(getattr(part, "pointwise", None) for part in (
            layer, layer.self_attn, layer.mlp)) for layer in layers)
