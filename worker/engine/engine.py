"""Continuous batching on token ids: requests join and leave at any step, and no answer depends on its neighbours.

One step: admit, plan, decode in forwards of few rows, then prefill a little. It knows token ids and slots. It knows
nothing of text, jobs or Redis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from shared.prefix import prefix_names
from worker.engine.kv import KVSlots
from worker.engine.prefix import PrefixCache
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
    prefix: tuple[str, ...]         # names of the prompt's whole chunks (shared/prefix.py)

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
                 prefill_chunk: int = 256, kv_cache_bytes: int = 4 * GIB, enable_prefix_caching: bool = True,
                 exact_replay_max_tokens: int = 4096):
        self.model = model
        self.max_model_len = min(max_model_len or model.max_model_len, model.max_model_len)
        self.prefill_chunk = prefill_chunk
        self.exact_replay_max_tokens = exact_replay_max_tokens
        slot_bytes = -(-self.max_model_len // PAGE_LEN) * PAGE_LEN * model.kv_bytes_per_token
        num_affordable = kv_cache_bytes // slot_bytes
        num_slots = min(max_num_seqs, num_affordable)
        if num_slots < 1:
            raise ValueError(f"kv_cache_bytes {kv_cache_bytes} is less than the {slot_bytes} of one sequence of "
                             f"{self.max_model_len} tokens: lower max_model_len")
        num_kept = min(num_slots, num_affordable - num_slots) if enable_prefix_caching else 0
        layers = allocate(model.kv_shapes, num_slots + num_kept, self.max_model_len, model.dtype)
        self.kv = KVSlots(layers, num_slots)
        self.prefix_cache = PrefixCache(range(num_slots, num_slots + num_kept))
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
            names = prefix_names(request.salt, request.prompt_token_ids, self.prefill_chunk)
            self._waiting[request.id] = Group(living, names if self.prefix_cache.slots else ())

    def _sequence(self, request: Request, index: int) -> Sequence:
        sampling = request.sampling
        eos = frozenset() if sampling.ignore_eos else self.model.eos_token_ids
        params = Params.of(sampling, index, eos | frozenset(sampling.stop_token_ids))
        drawn = list(request.continued_token_ids(index))
        return Sequence(request.id, index, request.prompt_token_ids, sampling, params, drawn,
                        num_reprefilled_tokens=0 if self.replays_exactly(len(drawn)) else len(drawn))

    def replays_exactly(self, num_tokens: int) -> bool:
        """Whether what others drew of a choice is decoded again, bit for bit; else it is prefilled."""
        return num_tokens <= self.exact_replay_max_tokens

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Frees the slots at once. Unknown requests and choices are no error: they may just have ended."""
        group = self._waiting.get(request_id) or self._running.get(request_id)
        for sequence in list(group.sequences.values()) if group else []:
            if index in (None, sequence.index):
                self._retire(sequence)

    def step(self) -> list[Output]:
        self._admit()
        self._reuse()
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

    def _reuse(self) -> None:
        """Copies what was computed before, also by a neighbour a step ago: chunks on the grid have the same bits."""
        chunk = self.prefill_chunk
        for group in self._running.values():
            leader = group.leader
            for index in range(leader.num_computed_tokens // chunk, len(group.prefix)):
                slot = self.prefix_cache.find(index, group.prefix[index])
                if slot is None:
                    break
                self.kv.copy(slot, leader.slot, index * chunk, (index + 1) * chunk)
                leader.num_computed_tokens += chunk
                leader.num_cached_tokens += chunk

    def _prefill(self, span: Span) -> list[Output]:
        sequence = self._by_slot[span.slot]
        group = self._running[sequence.request_id]
        logits = self.runner.prefill(span, sequence)
        if span.end < sequence.num_prompt_tokens:
            self._keep(span, group.prefix)
            return []
        fresh = self._share_prompt(group) if span.end == sequence.num_prompt_tokens else [sequence]
        fresh = [sequence for sequence in fresh if sequence.num_uncomputed_tokens == 0]
        return self._sample(fresh, logits.expand(len(fresh), -1))

    def _keep(self, span: Span, prefix: tuple[str, ...]) -> None:
        index = span.begin // self.prefill_chunk
        if index < len(prefix) and (slot := self.prefix_cache.place(index, prefix[index])) is not None:
            self.kv.copy(span.slot, slot, span.begin, span.end)

    def _share_prompt(self, group: Group) -> list[Sequence]:
        """What the first choice has computed, all have."""
        leader, *others = sequences = list(group.sequences.values())
        for sequence in others:
            self.kv.copy(leader.slot, sequence.slot, 0, leader.num_prompt_tokens)
            sequence.num_computed_tokens = leader.num_computed_tokens
            sequence.num_cached_tokens = leader.num_cached_tokens
        for sequence in sequences:
            self.sampler.join(sequence.slot, sequence.params, sequence.prompt_token_ids, sequence.output_token_ids)
        return sequences

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[Output]:
        if not sequences:
            return []
        rows = [Row(sequence.slot, len(sequence.output_token_ids)) for sequence in sequences]
        draws = self.sampler.sample(logits, rows)
        return [self._accept(sequence, draw) for sequence, draw in zip(sequences, draws, strict=True)]

    def _accept(self, sequence: Sequence, draw: Draw) -> Output:
        if not draw.is_valid:
            self.kv.wipe(sequence.slot, sequence.num_computed_tokens)
            self.prefix_cache.forget(self._running[sequence.request_id].prefix)
            self._retire(sequence)
            return Output(sequence.request_id, sequence.index, (), (), "error")
        sequence.output_token_ids.append(draw.token_id)
        logprobs = (draw.logprobs,) if draw.logprobs else ()
        if sequence.finish_reason:
            self._retire(sequence)
        is_first = len(sequence.output_token_ids) == 1
        return Output(sequence.request_id, sequence.index, (draw.token_id,), logprobs, sequence.finish_reason,
                      sequence.num_cached_tokens if is_first else 0)

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
        heir.num_computed_tokens, heir.num_cached_tokens = leader.num_computed_tokens, leader.num_cached_tokens
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
    return Progress(sequence.slot, sequence.num_prefill_tokens, sequence.num_computed_tokens, sequence.num_tokens)
