"""A loaded model: token ids in rows to logits.

It knows its weights, its limits and its identity. It knows nothing of requests, sampling or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from worker.model import memory
from worker.model.attention import Context, KVShape, passing
from worker.model.slots import InSlots, Together
from worker.model.transfer import send

if TYPE_CHECKING:
    from worker.model.cpu.forward import Forwards

PREFILL_BUDGET, LONG_PREFILL_BUDGET = 256, 512  # tokens of prompts in a forward
DECODE_ROWS = 64                        # room in a forward, beside those of prompts
SHARED_UNIT = 16                        # rows: forwards shared by parts have multiples of it, all of which were checked


@dataclass(slots=True)
class Model:
    module: Any                         # a causal language model of transformers, with our attention
    config: Any                         # of its text half
    folder: Path                        # where weights, config and tokenizer lie
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int                  # prompt and answer together
    eos_token_ids: frozenset[int]
    kv_shapes: tuple[KVShape, ...]      # one per layer
    weights_id: str                     # equal weights and config
    prefill_budget: int = PREFILL_BUDGET        # tokens of prompts in a forward, unless a setting says otherwise
    is_uniform: bool = False            # a token has the same bits in every forward, of rows or of chunks
    min_rows: int = 2                   # a decode forward with fewer rows may round differently
    max_rows: int = 32                  # and so may one with more
    program: Forwards | None = None     # of forwards, on a CPU, if the model allows it
    row_sizes: tuple[int, ...] = ()     # of decode forwards on a GPU that round as the largest one does
    max_shared_rows: int = 0            # of prompts and decode rows that share a forward and round as if apart
    numerics_id: str = ""               # equal ids promise equal bits

    @property
    def most_rows(self) -> int:
        """The most rows of a forward shared by prompts and answers."""
        return self.prefill_budget + DECODE_ROWS

    def forward(self, token_ids: Sequence[int] | Tensor, positions: Sequence[int], context: Context,
                kept: Sequence[int]) -> Tensor:
        """Logits of the `kept` rows, [len(kept), vocab_size]; the head computes no others."""
        if self.program and self.program.fits(len(positions), context):
            logits: Tensor = self.program.run(token_ids, cast(InSlots, context), kept)
            return logits[:, :self.vocab_size]
        padded = [*kept, *[kept[-1]] * (self.min_rows - len(kept))]
        ids = token_ids if isinstance(token_ids, Tensor) else send(token_ids, self.device)
        places, rows = (send(each, self.device) for each in (positions, padded))
        return self.forward_tensors(ids[None], places[None], context, rows)[:len(kept)]

    def forward_tensors(self, token_ids: Tensor, positions: Tensor, context: Context, kept: Tensor) -> Tensor:
        """For tensors of [1, rows] on the model's device, and the numbers of rows whose logits are wanted."""
        with torch.inference_mode(), passing(context):
            out = self.module(input_ids=token_ids, position_ids=positions, logits_to_keep=kept, use_cache=False,
                              context=context)
        logits: Tensor = out.logits[0, :, :self.vocab_size]
        return logits

    def decode(self, token_ids: Sequence[int] | Tensor, context: Context, positions: Sequence[int],
               kept: Sequence[int]) -> Tensor:
        """`forward` for decode rows, padded to `min_rows` by repeating the last one."""
        missing = self.min_rows - len(token_ids)
        if missing > 0:
            token_ids = _extended(token_ids, missing)
            positions = [*positions, *[positions[-1]] * missing]
        return self.forward(token_ids, positions, context, kept)

    def together(self, token_ids: Sequence[int] | Tensor, parts: Sequence[tuple[Context, int]],
                 positions: Sequence[int], kept: Sequence[int]) -> Tensor:
        """`forward` for parts, each with its number of rows; padded to a multiple of `SHARED_UNIT` if needed."""
        missing = 0 if self.is_uniform else -len(positions) % SHARED_UNIT
        if missing:
            token_ids = _extended(token_ids, missing)
            positions = [*positions, *[positions[-1]] * missing]
        return self.forward(token_ids, positions, Together(parts), kept)

    def prefill(self, token_ids: Sequence[int], context: Context, positions: Sequence[int]) -> Tensor:
        """Only the last token's logits, [1, vocab_size]."""
        return self.forward(token_ids, positions, context, [len(token_ids) - 1])

    @property
    def has_fixed_rows(self) -> bool:
        """Whether forwards have fixed shapes (worker/engine/fixed.py)."""
        return memory.is_paged(self.device)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.device
        return device

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(2 * shape.num_kv_heads * shape.head_dim for shape in self.kv_shapes) * self.dtype.itemsize

    def __repr__(self) -> str:
        return (f"<Model {type(self.module).__name__} {str(self.dtype).removeprefix('torch.')}, "
                f"{len(self.kv_shapes)} layers, {self.vocab_size} tokens, length {self.max_model_len}>")


def _extended(token_ids: Sequence[int] | Tensor, count: int) -> Sequence[int] | Tensor:
    """Padded by repeating the last one."""
    if isinstance(token_ids, Tensor):
        return torch.cat([token_ids, token_ids[-1:].expand(count)])
    return [*token_ids, *[token_ids[-1]] * count]
