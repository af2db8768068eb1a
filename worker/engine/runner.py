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
from worker.model.attention import Context
from worker.model.model import Model
from worker.model.transfer import send

if TYPE_CHECKING:
    from worker.engine.graphs import DecodeGraphs
    from worker.engine.store import KV

GRAPH_ROWS = (16, 64)           # and as many as the model's forwards may have


@dataclass(slots=True)
class Runner:
    model: Model
    kv: KV
    last_token_ids: Tensor          # [slots], on the model's device: what each slot has drawn last
    graphs: DecodeGraphs | None

    @classmethod
    def of(cls, model: Model, kv: KV, last_token_ids: Tensor, *, is_exact: bool) -> Runner:
        """With graphs where the device has them: of as many rows as all forwards, or of fewer too."""
        if model.device.type != "cuda":
            return cls(model, kv, last_token_ids, None)
        from worker.engine.graphs import capture  # needs Triton
        from worker.model.paged import PagedMemory

        assert isinstance(kv.memory, PagedMemory)
        sizes = [model.max_rows] if is_exact else [*(size for size in GRAPH_ROWS if size < model.max_rows),
                                                   model.max_rows]
        return cls(model, kv, last_token_ids, capture(model, kv.memory, last_token_ids, sizes))

    def run(self, forward: Forward, sequences: Mapping[int, Sequence]) -> tuple[list[Sequence], Tensor, Tensor]:
        """For each decode row at or behind a sequence's last known token the sequence, and the logits; the logits of
        each chunk's last token. Of [rows, vocab_size] each."""
        decodes, prefills = forward
        if not prefills and forward.num_rows <= self.model.max_rows:
            decoding, logits = self.decode(decodes, sequences)
            return decoding, logits, logits[:0]
        is_filled_up = self.model.has_fixed_rows and forward.num_rows <= self.model.max_shared_rows
        if not decodes and len(prefills) == 1 and not is_filled_up:
            logits = self.prefill(prefills[0], sequences[prefills[0].slot])
            return [], logits[:0], logits
        return self.together(decodes, prefills, sequences)

    def decode(self, spans: list[Span], sequences: Mapping[int, Sequence]) -> tuple[list[Sequence], Tensor]:
        """One forward. For each row at or behind a sequence's last known token: the sequence, and the logits."""
        rows = _Rows.of(spans, sequences)
        if self.graphs:
            logits = self.graphs.run(rows.token_ids, rows.slots, rows.positions)
            if len(rows.ends) < len(logits):
                logits = logits[send(rows.ends, self.model.device)]
        else:
            context = self.kv.memory.rows(rows.slots, rows.positions)
            token_ids = self._known(rows.token_ids, rows.slots)
            logits = self.model.decode(token_ids, context, rows.positions, rows.ends or [0])[:len(rows.ends)]
        _advance(spans, sequences)
        return [sequences[rows.slots[row]] for row in rows.ends], logits

    def prefill(self, span: Span, sequence: Sequence) -> Tensor:
        """One chunk in a forward of its own: the logits of its last token, [1, vocab_size]."""
        context = self.kv.memory.chunk(*span)
        token_ids = sequence.token_ids(span.begin, span.end)
        logits = self.model.prefill(token_ids, context, range(span.begin, span.end))
        sequence.num_computed_tokens = span.end
        return logits

    def together(self, decodes: list[Span], prefills: list[Span], sequences: Mapping[int, Sequence]
                 ) -> tuple[list[Sequence], Tensor, Tensor]:
        """As `decode` and several times `prefill`, in one forward."""
        rows = _Rows.of(decodes, sequences)
        parts: list[tuple[Context, int]] = []
        if decodes:
            parts.append((self.kv.memory.rows(rows.slots, rows.positions), len(rows.slots)))
        token_ids, slots, positions, kept = [*rows.token_ids], [*rows.slots], [*rows.positions], [*rows.ends]
        for span in prefills:
            parts.append((self.kv.memory.chunk(*span), span.end - span.begin))
            token_ids += sequences[span.slot].token_ids(span.begin, span.end)
            slots += [span.slot] * (span.end - span.begin)
            positions += range(span.begin, span.end)
            kept.append(len(token_ids) - 1)
        logits = self.model.together(self._known(token_ids, slots), parts, positions, kept)
        _advance([*decodes, *prefills], sequences)
        return [sequences[rows.slots[row]] for row in rows.ends], *logits.split([len(rows.ends), len(prefills)])

    def _known(self, token_ids: list[int], slots: list[int]) -> list[int] | Tensor:
        """With the pending ones from where they were drawn, without waiting for them."""
        if PENDING not in token_ids:
            return token_ids
        ids, places = (send(values, self.model.device) for values in (token_ids, slots))
        return torch.where(ids == PENDING, self.last_token_ids[places], ids)


class _Rows(NamedTuple):
    """Of decode spans, one for each token."""

    slots: list[int]
    positions: list[int]
    token_ids: list[int]
    ends: list[int]                 # the rows at or behind a sequence's last known token

    @classmethod
    def of(cls, spans: list[Span], sequences: Mapping[int, Sequence]) -> _Rows:
        slots = [span.slot for span in spans for _ in range(span.begin, span.end)]
        positions = [position for span in spans for position in range(span.begin, span.end)]
        token_ids = [sequences[slot].token_id(position) for slot, position in zip(slots, positions, strict=True)]
        ends = [row for row, (slot, position) in enumerate(zip(slots, positions, strict=True))
                if position + 1 >= sequences[slot].num_tokens]
        return cls(slots, positions, token_ids, ends)


def _advance(spans: list[Span], sequences: Mapping[int, Sequence]) -> None:
    for span in spans:
        sequence = sequences[span.slot]
        sequence.num_computed_tokens = min(span.end, sequence.num_tokens)
