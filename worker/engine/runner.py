"""From planned spans to logits: it gathers ids and positions, builds the attention's context and runs the model.

It knows sequences, slots and the model. It knows nothing of sampling or of why these spans were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from worker.engine.kv import KVSlots
from worker.engine.scheduler import Span
from worker.engine.sequence import Sequence
from worker.model.attention import DecodeRows, PrefillChunk
from worker.model.model import Model


@dataclass(slots=True)
class Runner:
    model: Model
    kv: KVSlots

    def decode(self, spans: list[Span], sequences: Mapping[int, Sequence]) -> tuple[list[Sequence], Tensor]:
        """One forward. The sequences whose last known token it computed, and their logits."""
        slots = [span.slot for span in spans for _ in range(span.begin, span.end)]
        positions = [position for span in spans for position in range(span.begin, span.end)]
        token_ids = [sequences[slot].token_id(position) for slot, position in zip(slots, positions, strict=True)]
        ends = [row for row, (slot, position) in enumerate(zip(slots, positions, strict=True))
                if position + 1 == sequences[slot].num_tokens]
        context = DecodeRows(self.kv.layers, slots, positions)
        logits = self.model.decode(token_ids, context, positions, ends or [0])
        for span in spans:
            sequences[span.slot].num_computed_tokens = span.end
        return [sequences[slots[row]] for row in ends], logits[:len(ends)]

    def prefill(self, span: Span, sequence: Sequence) -> Tensor:
        """One chunk in a forward of its own: the logits of its last token, [1, vocab_size]."""
        context = PrefillChunk(self.kv.layers, span.slot, span.begin, span.end)
        token_ids = sequence.token_ids(span.begin, span.end)
        logits = self.model.prefill(token_ids, context, range(span.begin, span.end))
        sequence.num_computed_tokens = span.end
        return logits
