"""From planned spans to logits: it gathers ids and positions, builds the attention's context and runs the model.

It knows sequences, slots and the model. It knows nothing of sampling or of why these spans were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from worker.engine.scheduler import Forward, Span
from worker.engine.sequence import PENDING, Sequence
from worker.model.attention import NOBODY, TILE_LEN, Context
from worker.model.model import Model
from worker.model.transfer import send

if TYPE_CHECKING:
    from worker.engine.fixed import FixedForwards
    from worker.engine.store import KV


@dataclass(slots=True)
class Runner:
    model: Model
    kv: KV
    last_token_ids: Tensor          # [slots], on the model's device: what each slot has drawn last
    fixed: FixedForwards | None     # where shapes are fixed

    @classmethod
    def of(cls, model: Model, kv: KV, last_token_ids: Tensor, *, prefill_chunk: int, is_exact: bool) -> Runner:
        if not model.has_fixed_rows:
            return cls(model, kv, last_token_ids, None)
        from worker.engine.fixed import FixedForwards  # needs Triton
        from worker.model.paged import PagedMemory

        assert isinstance(kv.memory, PagedMemory)
        return cls(model, kv, last_token_ids, FixedForwards(model, kv.memory, last_token_ids, is_exact=is_exact,
                                                            prefill_chunk=prefill_chunk))

    def run(self, forward: Forward, sequences: Mapping[int, Sequence]) -> tuple[list[Sequence], Tensor, Tensor]:
        """The sequence of each decode row at or after that sequence's last known token, and its logits; the logits of
        each chunk's last token. Logits are [rows, vocab_size]."""
        decodes, prefills = forward
        if self.fixed:
            return self.in_shape(self.fixed, forward, sequences)
        if not prefills and forward.num_rows <= self.model.max_rows:
            decoding, logits = self.decode(decodes, sequences)
            return decoding, logits, logits[:0]
        if not decodes and len(prefills) == 1:
            logits = self.prefill(prefills[0], sequences[prefills[0].slot])
            return [], logits[:0], logits
        return self.together(decodes, prefills, sequences)

    def in_shape(self, fixed: FixedForwards, forward: Forward, sequences: Mapping[int, Sequence]
                 ) -> tuple[list[Sequence], Tensor, Tensor]:
        """Short chunks are computed as decode rows; long ones in tiles."""
        decodes, prefills = forward
        if all(end - begin <= fixed.max_short for _, begin, end in prefills):
            rows = _Rows.of(decodes, prefills, sequences)
            logits = fixed.run_rows(rows.token_ids, rows.slots, rows.positions, rows.kept)
        else:
            rows = _Rows.of([], prefills, sequences, tile_len=TILE_LEN)
            logits = fixed.run_tiles(rows.token_ids, rows.slots, rows.positions, rows.kept)
        return self._done(forward, rows, sequences, logits)

    def decode(self, spans: list[Span], sequences: Mapping[int, Sequence]) -> tuple[list[Sequence], Tensor]:
        """One forward. For each row at or behind a sequence's last known token: the sequence, and the logits."""
        rows = _Rows.of(spans, [], sequences)
        context = self.kv.memory.rows(rows.slots, rows.positions)
        token_ids = self._known(rows.token_ids, rows.slots)
        logits = self.model.decode(token_ids, context, rows.positions, rows.kept or [0])[:len(rows.kept)]
        _advance(spans, sequences)
        return rows.decoding(sequences), logits

    def prefill(self, span: Span, sequence: Sequence) -> Tensor:
        """One chunk in a forward of its own: the logits of its last token, [1, vocab_size]."""
        context = self.kv.memory.chunk(*span)
        token_ids = sequence.token_ids(span.begin, span.end)
        logits = self.model.prefill(token_ids, context, range(span.begin, span.end))
        sequence.num_computed_tokens = span.end
        return logits

    def together(self, decodes: list[Span], prefills: list[Span], sequences: Mapping[int, Sequence]
                 ) -> tuple[list[Sequence], Tensor, Tensor]:
        """One forward of decode rows and of chunks, which attend as chunks do."""
        rows = _Rows.of(decodes, prefills, sequences)
        num_rows = sum(span.end - span.begin for span in decodes)
        parts: list[tuple[Context, int]] = []
        if decodes:
            parts.append((self.kv.memory.rows(rows.slots[:num_rows], rows.positions[:num_rows]), num_rows))
        parts += [(self.kv.memory.chunk(*span), span.end - span.begin) for span in prefills]
        kept = rows.kept or [0]                         # none, where all are replayed tokens
        logits = self.model.together(self._known(rows.token_ids, rows.slots), parts, rows.positions, kept)
        return self._done(Forward(decodes, prefills), rows, sequences, logits[:len(rows.kept)])

    def _done(self, forward: Forward, rows: _Rows, sequences: Mapping[int, Sequence], logits: Tensor
              ) -> tuple[list[Sequence], Tensor, Tensor]:
        _advance([*forward.decodes, *forward.prefills], sequences)
        return rows.decoding(sequences), *logits.split([rows.num_decoding, len(forward.prefills)])

    def _known(self, token_ids: list[int], slots: list[int]) -> list[int] | Tensor:
        """Token ids; pending ones are read where the device has drawn them, without waiting."""
        if PENDING not in token_ids:
            return token_ids
        ids, places = (send(values, self.model.device) for values in (token_ids, slots))
        return torch.where(ids == PENDING, self.last_token_ids[places], ids)


class _Rows(NamedTuple):
    """One for each token: first of decode spans, then of chunks, each filled up to whole tiles."""

    slots: list[int]
    positions: list[int]
    token_ids: list[int]
    kept: list[int]                 # rows whose logits are needed: at or after a last known token, or a chunk's last
    num_decoding: int               # of them

    @classmethod
    def of(cls, decodes: list[Span], prefills: list[Span], sequences: Mapping[int, Sequence], tile_len: int = 1
           ) -> _Rows:
        slots = [span.slot for span in decodes for _ in range(span.begin, span.end)]
        positions = [position for span in decodes for position in range(span.begin, span.end)]
        token_ids = [sequences[slot].token_id(position) for slot, position in zip(slots, positions, strict=True)]
        kept = [row for row, (slot, position) in enumerate(zip(slots, positions, strict=True))
                if position + 1 >= sequences[slot].num_tokens]
        num_decoding = len(kept)
        for slot, begin, end in prefills:
            num_filling = -(end - begin) % tile_len
            kept.append(len(slots) + end - begin - 1)
            slots += [slot] * (end - begin + num_filling)
            positions += [*range(begin, end), *[NOBODY] * num_filling]
            token_ids += [*sequences[slot].token_ids(begin, end), *[0] * num_filling]
        return cls(slots, positions, token_ids, kept, num_decoding)

    def decoding(self, sequences: Mapping[int, Sequence]) -> list[Sequence]:
        return [sequences[self.slots[row]] for row in self.kept[:self.num_decoding]]


def _advance(spans: list[Span], sequences: Mapping[int, Sequence]) -> None:
    for span in spans:
        sequence = sequences[span.slot]
        sequence.num_computed_tokens = min(span.end, sequence.num_tokens)
