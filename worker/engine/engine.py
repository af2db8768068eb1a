"""Continuous batching on token ids: requests join and leave at any step, and no answer depends on its neighbours.

One step: admit, plan, decode in forwards of few rows, then prefill a little. It knows token ids and slots. It knows
nothing of text, jobs or Redis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from worker.engine.kv import KVSlots
from worker.engine.request import Output, Request, validate
from worker.engine.runner import Runner
from worker.engine.sampler import Draw, Params, Row, Sampler
from worker.engine.scheduler import Progress, Span, schedule
from worker.engine.sequence import WAITING, Sequence
from worker.model.attention import PAGE_LEN, allocate
from worker.model.model import Model

__all__ = ["Engine", "Output", "Request"]

GIB = 2**30


@dataclass(slots=True)
class Group:
    """The living choices of one request. The first one computes the prompt for all."""

    sequences: dict[int, Sequence]

    @property
    def leader(self) -> Sequence:
        return next(iter(self.sequences.values()))

    @property
    def is_prefilled(self) -> bool:
        return self.leader.num_computed_tokens >= self.leader.num_prompt_tokens

    @property
    def computing(self) -> Iterator[Sequence]:
        return iter(self.sequences.values() if self.is_prefilled else [self.leader])


class Engine:
    def __init__(self, model: Model, *, max_num_seqs: int = 32, max_model_len: int | None = None,
                 prefill_chunk: int = 256, kv_cache_bytes: int = 4 * GIB):
        self.model = model
        self.max_model_len = min(max_model_len or model.max_model_len, model.max_model_len)
        self.prefill_chunk = prefill_chunk
        slot_bytes = -(-self.max_model_len // PAGE_LEN) * PAGE_LEN * model.kv_bytes_per_token
        num_slots = min(max_num_seqs, kv_cache_bytes // slot_bytes)
        if num_slots < 1:
            raise ValueError(f"kv_cache_bytes {kv_cache_bytes} is less than the {slot_bytes} of one sequence of "
                             f"{self.max_model_len} tokens: lower max_model_len")
        self.kv = KVSlots(allocate(model.kv_shapes, num_slots, self.max_model_len, model.dtype), num_slots)
        self.runner = Runner(model, self.kv)
        self.sampler = Sampler(num_slots, model.vocab_size)
        self._waiting: dict[str, Group] = {}        # by request id, in order of arrival
        self._running: dict[str, Group] = {}        # every sequence has a slot
        self._by_slot: dict[int, Sequence] = {}
        self._ended: list[Output] = []              # continued choices that had nothing left to draw

    def add(self, request: Request) -> None:
        """Raises ValueError when the request could harm a batch."""
        if request.id in self._waiting or request.id in self._running:
            raise ValueError(f"request {request.id} is here already")
        validate(request, vocab_size=self.model.vocab_size, max_model_len=self.max_model_len,
                 max_choices=self.kv.num_slots)
        sequences = [self._sequence(request, index) for index in request.live_choices]
        for sequence in sequences:
            if sequence.finish_reason:
                self._ended.append(Output(request.id, sequence.index, (), (), sequence.finish_reason))
        living = {sequence.index: sequence for sequence in sequences if not sequence.finish_reason}
        if living:
            self._waiting[request.id] = Group(living)

    def _sequence(self, request: Request, index: int) -> Sequence:
        sampling = request.sampling
        eos = frozenset() if sampling.ignore_eos else self.model.eos_token_ids
        params = Params.of(sampling, index, eos | frozenset(sampling.stop_token_ids))
        return Sequence(request.id, index, request.prompt_token_ids, sampling, params,
                        list(request.continued_token_ids(index)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Frees the slots at once. Unknown requests and choices are no error: they may just have ended."""
        group = self._waiting.get(request_id) or self._running.get(request_id)
        for sequence in list(group.sequences.values()) if group else []:
            if index in (None, sequence.index):
                self._retire(sequence)

    def step(self) -> list[Output]:
        self._admit()
        plan = schedule([_progress(sequence) for group in self._running.values() for sequence in group.computing],
                        max_rows=self.model.max_rows, prefill_chunk=self.prefill_chunk)
        outputs, self._ended = self._ended, []
        for spans in plan.decodes:
            outputs += self._sample(*self.runner.decode(spans, self._by_slot))
        for span in plan.prefills:
            outputs += self._prefill(span)
        return outputs

    def _admit(self) -> None:
        """First come, first served: a request of many choices is not overtaken."""
        while self._waiting:
            request_id, group = next(iter(self._waiting.items()))
            if len(group.sequences) > self.kv.num_free:
                return
            self._running[request_id] = self._waiting.pop(request_id)
            for sequence in group.sequences.values():
                sequence.slot = self.kv.reserve()
                self._by_slot[sequence.slot] = sequence

    def _prefill(self, span: Span) -> list[Output]:
        leader = self._by_slot[span.slot]
        logits = self.runner.prefill(span, leader)
        if leader.num_computed_tokens < leader.num_prompt_tokens:
            return []
        sequences = list(self._running[leader.request_id].sequences.values())
        for sequence in sequences:
            if sequence is not leader:
                self.kv.copy(leader.slot, sequence.slot, leader.num_prompt_tokens)
                sequence.num_computed_tokens = leader.num_prompt_tokens
            self.sampler.join(sequence.slot, sequence.params, sequence.prompt_token_ids, sequence.output_token_ids)
        fresh = [sequence for sequence in sequences if not sequence.output_token_ids]
        return self._sample(fresh, logits.expand(len(fresh), -1))

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[Output]:
        if not sequences:
            return []
        rows = [Row(sequence.slot, len(sequence.output_token_ids)) for sequence in sequences]
        draws = self.sampler.sample(logits, rows)
        return [self._accept(sequence, draw) for sequence, draw in zip(sequences, draws, strict=True)]

    def _accept(self, sequence: Sequence, draw: Draw) -> Output:
        if not draw.is_valid:
            self.kv.wipe(sequence.slot, sequence.num_computed_tokens)
            self._retire(sequence)
            return Output(sequence.request_id, sequence.index, (), (), "error")
        sequence.output_token_ids.append(draw.token_id)
        logprobs = (draw.logprobs,) if draw.logprobs else ()
        if sequence.finish_reason:
            self._retire(sequence)
        return Output(sequence.request_id, sequence.index, (draw.token_id,), logprobs, sequence.finish_reason)

    def _retire(self, sequence: Sequence) -> None:
        groups = self._waiting if sequence.slot == WAITING else self._running
        group = groups[sequence.request_id]
        if sequence is group.leader and not group.is_prefilled and len(group.sequences) > 1:
            self._hand_over(sequence, list(group.sequences.values())[1])
        del group.sequences[sequence.index]
        if not group.sequences:
            del groups[sequence.request_id]
        if sequence.slot != WAITING:
            self.sampler.leave(sequence.slot)
            del self._by_slot[sequence.slot]
            self.kv.release(sequence.slot)

    def _hand_over(self, leader: Sequence, heir: Sequence) -> None:
        """A half computed prompt outlives the choice that computed it."""
        leader.slot, heir.slot = heir.slot, leader.slot
        heir.num_computed_tokens = leader.num_computed_tokens
        for sequence in (leader, heir):
            if sequence.slot != WAITING:
                self._by_slot[sequence.slot] = sequence

    @property
    def num_running(self) -> int:
        return len(self._by_slot)

    @property
    def num_waiting(self) -> int:
        return sum(len(group.sequences) for group in self._waiting.values())

    @property
    def num_free_seqs(self) -> int:
        """Choices that could be admitted at once."""
        return max(0, self.kv.num_free - self.num_waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ended)

    @property
    def numerics_id(self) -> str:
        """Of the model and of the grid on which prompts are cut."""
        return hashlib.sha256(f"{self.model.numerics_id} {self.prefill_chunk}".encode()).hexdigest()[:32]

    def check(self) -> None:
        """Every slot is free or held by one running choice; an idle engine holds none."""
        self.kv.check()
        held = {sequence.slot for group in self._running.values() for sequence in group.sequences.values()}
        assert held == set(self._by_slot) and len(held) == self.kv.num_held, f"{self!r} lost count of its slots"
        assert all(self.sampler.params[slot] is None or slot in held for slot in range(self.kv.num_slots))
        assert self.has_work or self.kv.num_held == 0, f"{self!r} is idle and holds slots"

    def __repr__(self) -> str:
        return (f"<Engine {self.num_running} running, {self.num_waiting} waiting, "
                f"slots {self.kv.num_held}/{self.kv.num_slots}>")


def _progress(sequence: Sequence) -> Progress:
    return Progress(sequence.slot, sequence.num_prompt_tokens, sequence.num_computed_tokens, sequence.num_tokens)
