"""A whole forward as one program, from token ids to the input of the head: for models with no other computations.

Rows of any number of sequences, and runs of prompts, take the same calls; only their numbers, and the addresses of keys
and values, differ. The program is recorded when a model is loaded, and used if it computes what the model does. It
knows a model's parts. It knows nothing of engines.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from worker.model.attention import KVLayer, KVShape, Scores
from worker.model.cpu.attention import Angles, Rows, Runs, most_queries
from worker.model.cpu.kernel import MIN_SHARED_PRODUCTS, empty, threads_for
from worker.model.cpu.linear import PanelLinear
from worker.model.cpu.pointwise import gather
from worker.model.cpu.program import Arena, Program, Recording, Unexplained, recorded
from worker.model.fused import FusedLayer, FusedNorm
from worker.model.linear import packed_linears
from worker.model.slots import DecodeRows, InSlots, PrefillChunk, Together, allocate, attend_by_kernels

log = logging.getLogger(__name__)

ROOM = 2                    # for what a layer writes, as a multiple of what its products read and write
ANGLES_STEP = 1024          # positions whose angles are computed at once
FIXED_ROPES = "default", "linear", "llama3", "yarn"     # whose angles depend on the position only
PART_NAMES = "embed_tokens", "rotary_emb", "layers", "norm"     # as in llama-shaped families
KV_NAMES = "keys", "values"


class Parts(NamedTuple):
    """The parts of a model, in the order in which a forward uses them."""

    embedding: Tensor       # [vocab_size, hidden_size]
    rotary: nn.Module
    layers: list[FusedLayer]
    norm: FusedNorm
    head: PanelLinear

    @classmethod
    def of(cls, module: Any) -> Parts | None:
        """None where a part is missing or of another kind; other computations of a family show in the later check."""
        base = getattr(module, module.base_model_prefix, None)
        parts: list[Any] = [*(getattr(base, name, None) for name in PART_NAMES), getattr(module, "lm_head", None)]
        embed, rotary, layers, norm, head = parts
        is_plain = (type(embed) is nn.Embedding and getattr(rotary, "rope_type", None) in FIXED_ROPES
                    and isinstance(layers, nn.ModuleList) and all(map(_is_by_kernels, layers))
                    and isinstance(norm, FusedNorm) and isinstance(head, PanelLinear))
        return cls(embed.weight, rotary, list(layers), norm, head) if is_plain else None


def _is_by_kernels(layer: nn.Module) -> bool:
    return isinstance(layer, FusedLayer) and all(
        getattr(part, "pointwise", None) for part in (layer, layer.self_attn, layer.mlp))


def _width(layer: FusedLayer) -> int:
    """How many numbers its products read and write per row."""
    return sum(product.num_columns + product.width for product in packed_linears(layer))


class AngleTable:
    """Cosines and sines of all positions, [positions, head_dim] each, computed by the model's own module."""

    def __init__(self, rotary: nn.Module, width: int, max_model_len: int, dtype: torch.dtype):
        self._rotary, num_steps = rotary, -(-max_model_len // ANGLES_STEP)
        self.cos, self.sin = (torch.empty(num_steps * ANGLES_STEP, width, dtype=dtype) for _ in range(2))
        self._num_known = 0

    def reach(self, num_positions: int) -> None:
        while self._num_known < num_positions:
            begin, end = self._num_known, self._num_known + ANGLES_STEP
            self.cos[begin:end], self.sin[begin:end] = (
                angles[0] for angles in self._rotary(self.cos, torch.arange(begin, end)[None]))
            self._num_known = end


@dataclass(slots=True)
class Inputs:
    """The inputs of a run, at the addresses of the recording."""

    token_ids: Tensor
    kept: Tensor
    rows: Rows

    @classmethod
    def of(cls, max_rows: int, group: int) -> Inputs:
        token_ids, kept, slots, positions = torch.zeros(4, max_rows, dtype=torch.int64)
        tiles = torch.zeros(2, max_rows * group, 2, dtype=torch.int64)
        return cls(token_ids, kept, Rows(slots, positions, *tiles))

    def fill(self, token_ids: Sequence[int] | Tensor, kept: Sequence[int], rows: Rows) -> dict[str, int]:
        """Copies the inputs; returns how many there are of each."""
        for place, values in zip((self.token_ids, self.kept, *self.rows), (token_ids, kept, *rows), strict=True):
            place.numpy()[:len(values)] = values        # for so few, torch takes twice as long
        return {"rows": len(token_ids), "kept": len(kept), "single_tiles": len(rows.single_tiles),
                "shared_tiles": len(rows.shared_tiles)}


@dataclass(slots=True)
class Placed:
    """The context while recording."""

    layers: list[KVLayer]
    table: Tensor
    runs: Runs
    turns_heads: ClassVar = True

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores,
               angles: Angles | None = None) -> Tensor:
        return attend_by_kernels(self, layer, query, key, value, scores, angles)


class Forwards:
    """Programs for up to `max_rows` rows."""

    def __init__(self, parts: Parts, shape: KVShape, max_rows: int, max_model_len: int):
        self._parts, self._shape, self.max_rows = parts, shape, max_rows
        hidden_size, dtype = parts.embedding.shape[1], parts.embedding.dtype
        self._group, self._most = shape.num_query_heads // shape.num_kv_heads, most_queries(dtype, shape.head_dim)
        self._angles = AngleTable(parts.rotary, shape.head_dim, max_model_len, dtype)
        self._inputs = Inputs.of(max_rows, self._group)
        self._arena = Arena(max_rows, round(ROOM * dtype.itemsize * max(map(_width, parts.layers))))
        self._embedded = torch.empty(max_rows, hidden_size, dtype=dtype)
        self._turned = torch.empty(2, max_rows, shape.head_dim, dtype=dtype)
        self._most_weights = max(layer.packed.numel() for part in parts.layers for layer in packed_linears(part))
        self._layers: list[KVLayer] | None = None
        self._table: Tensor | None = None
        first, second = (self._record(*sizes) for sizes in self._trial_sizes())
        self._program = Program(first, second)

    @classmethod
    def of(cls, module: Any, shapes: Sequence[KVShape], max_rows: int, max_model_len: int) -> Forwards | None:
        """None where a model is more than its parts."""
        parts = Parts.of(module)
        if parts is None or len(set(shapes)) > 1:
            return None
        try:
            with torch.inference_mode():
                return cls(parts, shapes[0], max_rows, max_model_len)
        except (Unexplained, MemoryError) as why:
            log.info("a forward is computed call by call: %s", why)
            return None

    def _trial_sizes(self) -> tuple[tuple[list[int], int, int], ...]:
        """Runs, kept rows and pages per slot: no two counts are equal in both, whatever heads a model has."""
        run_len = 2 * self._most
        return ([1] * 3 + [run_len], 2, 4), ([1] * 7 + [run_len + 1], 9, 11)

    def _record(self, lens: list[int], num_kept: int, num_pages: int) -> Recording:
        """Records with rows that all repeat the first token of a slot: the calls are the same."""
        group, num_rows = self._group, sum(lens)
        layers = allocate([self._shape] * len(self._parts.layers), 1, 1, self._parts.embedding.dtype)
        table = torch.zeros(1, num_pages, dtype=torch.int64)
        nowhere = torch.zeros(num_rows, dtype=torch.int64)
        rows = Runs(nowhere, nowhere, lens).rows(group, self._most)
        numbers = self._inputs.fill(nowhere, range(num_kept), rows) | _places(layers, table)
        placed = Rows(*(place[:len(values)] for place, values in zip(self._inputs.rows, rows, strict=True)))
        self._angles.reach(1)
        self._arena.restart()
        with recorded(self._arena) as calls:
            out = self._computed(num_rows, num_kept, Placed(layers, table, Runs.placed(placed, group, self._most)))
        self._out = out.as_strided((self.max_rows, out.shape[1]), out.stride())
        return Recording(calls, numbers)

    def _computed(self, num_rows: int, num_kept: int, context: Placed) -> Tensor:
        """The head's input for the kept rows, [num_kept, hidden_size]."""
        parts, inputs = self._parts, self._inputs
        x = gather(parts.embedding, inputs.token_ids[:num_rows], self._embedded[:num_rows])
        cos, sin = (gather(table, context.runs.positions, place[:num_rows])[None] for table, place in zip(
            (self._angles.cos, self._angles.sin), self._turned, strict=True))

        def keep(x: Tensor) -> Tensor:
            return gather(x[0], inputs.kept[:num_kept], empty(num_kept, x.shape[-1], x.dtype))[None]

        x, added = x[None], None
        for layer in parts.layers:
            self._arena.turn()
            x, added = layer.apart(x, added, keep if layer is parts.layers[-1] else None,
                                   position_embeddings=(cos, sin), context=context)
        out: Tensor = parts.norm(x, added)[0]
        return out

    def fits(self, num_rows: int, context: Any) -> bool:
        """Whether it can run: padding rows are not computed here."""
        return (isinstance(context, DecodeRows | PrefillChunk | Together) and num_rows <= self.max_rows
                and num_rows == len(context.runs.slots))

    @torch.inference_mode()
    def run(self, token_ids: Sequence[int] | Tensor, context: InSlots, kept: Sequence[int]) -> Tensor:
        """Logits of the kept rows."""
        rows = context.runs.rows(self._group, self._most)
        numbers = self._inputs.fill(token_ids, kept, rows)
        if context.layers is not self._layers or context.table is not self._table:
            numbers |= _places(context.layers, context.table)
            self._layers, self._table = context.layers, context.table
        self._angles.reach(1 + int(rows.positions.numpy().max()))
        for name, number in numbers.items():
            self._program.set(name, number)
        self._program.run(threads_for(len(token_ids) * self._most_weights, MIN_SHARED_PRODUCTS))
        logits: Tensor = self._parts.head(self._out[:len(kept)])
        return logits


def _places(layers: Sequence[KVLayer], table: Tensor) -> dict[str, int]:
    """Addresses of keys and values and of the table of their pages, by name."""
    places = {f"{name} {layer}": cache.data_ptr()
              for layer, caches in enumerate(layers) for name, cache in zip(KV_NAMES, caches, strict=True)}
    return places | {"table": table.data_ptr(), "width": table.stride(0)}
