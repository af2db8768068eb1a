"""Penalties for tokens that occurred before, on a CPU: one pass, which does work only where a token occurred."""

from __future__ import annotations

from torch import Tensor

from worker.model.cpu import LANES
from worker.model.cpu.code import FLOAT32, INT8, INTEGER, SIZES, Code, Value
from worker.model.cpu.kernel import Kernel, threads_for


def fits(logits: Tensor) -> bool:
    return logits.shape[1] % LANES == 0


def penalize(logits: Tensor, places: Tensor, slots: Tensor, seen: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """Penalizes some rows of logits, [rows, vocab_size] in float32, in place: `places` are the rows, `slots` their
    slots in `seen` (has occurred) and `counts` (how often drawn), [slots, vocab_size] both. Penalties are [3, places]:
    repetition, frequency, presence, as in transformers and vLLM."""
    _penalize(logits, places, slots, seen, counts, penalties, len(places), logits.shape[1],
              num_threads=threads_for(len(places) * logits.shape[1]))


@Kernel
def _penalize(code: Code, logits: Value, places: Value, slots: Value, seen: Value, counts: Value, penalties: Value,
              num_places: Value, vocab_size: Value) -> None:
    with code.shares(num_places) as index:
        row, slot = (code.load(each + index * SIZES[INTEGER], INTEGER, 1) for each in (places, slots))
        repetition, frequency, presence = (
            code.splat(code.load(penalties + (index + num_places * i) * SIZES[FLOAT32], FLOAT32, 1)) for i in range(3))
        with code.loop(0, vocab_size, LANES) as token:
            is_seen = code.load(seen + slot * vocab_size + token, INT8).equals(0) ^ 1
            with code.when(code.some(is_seen)):
                place = logits + (row * vocab_size + token) * SIZES[FLOAT32]
                x = code.numbers(place, FLOAT32)
                count = code.numbers(counts + (slot * vocab_size + token) * SIZES[FLOAT32], FLOAT32)
                x = code.select(is_seen, code.select(x > 0.0, x / repetition, x * repetition), x)
                once = code.select(count > 1.0, 1.0, count)
                code.store(x - count * frequency - once * presence, place, FLOAT32)
