"""Continuous batching on token ids: requests join and leave at any step, and no answer depends on its neighbours.

One step: admit, secure memory, draft, plan, decode in forwards of few rows, then prefill a little. When pages run out
the youngest sequence gives way, and goes on later as one of a dead worker does; when a step itself finds no memory, all
do, and fewer run from then on. Where a device computes by itself, a step is launched before the outcome of the one
before it is read: what that one drew is known to the device alone then, and a sequence that turns out to have ended
has computed one row in vain. It knows token ids and slots. It knows nothing of text, jobs or Redis.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import deque
from collections.abc import Iterable
from itertools import groupby, islice
from typing import Literal

import torch
from torch import Tensor

from shared.prefix import prefix_names
from worker.engine.batch import Batch
from worker.engine.chunks import Chunks
from worker.engine.draft import Drafter
from worker.engine.flight import Flight
from worker.engine.paged import KVPages
from worker.engine.params import Params
from worker.engine.request import NO_WAY_ON, NOT_A_NUMBER, OUT_OF_MEMORY, Constraint, Output, Request, validate
from worker.engine.runner import Runner
from worker.engine.sampler import Draw, Row, Sampler
from worker.engine.scheduler import MIN_CHUNK_COST, Forward, Progress, Span, pack, schedule, share
from worker.engine.sequence import WAITING, Group, Sequence
from worker.engine.store import make_store
from worker.model.attention import TILE_LEN
from worker.model.model import Model

__all__ = ["Engine", "Output", "Request"]

log = logging.getLogger(__name__)

GIB = 2**30
PIECE_TOKENS = 32       # of a prompt that is kept, where any number may be: smaller ones cost more to keep and to find
SEARCH_STEPS = 16       # of an engine that runs ahead, between searches of those that found no draft
MAX_DRAFT_ROWS = 12     # of a forward with drafts: so many cost little more than one
MANY_ROWS = 128         # of a forward, most of them of prompts: all threads are worth waiting for
MAX_FORCED_TOKENS = 32  # forced tokens taken at once after a drawn one


class Engine:
    def __init__(self, model: Model, *, max_num_seqs: int = 64, max_model_len: int | None = None,
                 prefill_chunk: int = 256, prefill_budget: int = 0, kv_cache_bytes: int = 4 * GIB,
                 enable_prefix_caching: bool = True, exact_replay_max_tokens: int = 4096,
                 num_speculative_tokens: int = 8, numerics: Literal["exact", "fast"] = "exact",
                 runs_ahead: bool | None = None, few_threads: int = 0):
        """`few_threads`: of forwards that streams wait for, of up to `MANY_ROWS` rows; 0: as many as torch has."""
        self.model = model
        self.few_threads, self.most_threads = few_threads, torch.get_num_threads()
        self.runs_ahead = model.device.type == "cuda" if runs_ahead is None else runs_ahead
        self.max_model_len = min(max_model_len or model.max_model_len, model.max_model_len)
        self.prefill_chunk = prefill_chunk
        self.prefill_budget = max(prefill_budget, prefill_chunk) if model.is_uniform else prefill_chunk
        self.is_exact = numerics == "exact"         # otherwise one forward for all, where answers depend on neighbours
        self.max_shared_rows = model.max_shared_rows if self.is_exact else sys.maxsize
        self.max_rows = model.max_rows if model.has_fixed_rows else max(model.max_rows, self.max_shared_rows)
        self.exact_replay_max_tokens = exact_replay_max_tokens if self.is_exact else 0
        self.num_speculative_tokens = num_speculative_tokens
        self.kv = make_store(model, max_num_seqs=max_num_seqs, max_model_len=self.max_model_len,
                             num_bytes=kv_cache_bytes)
        self.chunks = Chunks(self.kv, self._prefix_grid(), keeps=enable_prefix_caching)
        self.sampler = Sampler(max_num_seqs, model.vocab_size, model.device)
        self.runner = Runner.of(model, self.kv, self.sampler.last_token_ids, prefill_chunk=prefill_chunk,
                                is_exact=self.is_exact)
        self.batch = Batch(self.kv, self.chunks, max_num_seqs)
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self._num_draft_steps = 0
        self._flights: deque[Flight] = deque()      # in order of launch
        self._outputs: list[Output] = []            # returned by the next step, even if it runs out of memory

    def limit_prefill(self, num_tokens: int) -> None:
        """Of prompts, per step. A smaller grid has other prefixes: those that are kept are dropped."""
        self.chunks.drop_all()
        self.prefill_budget = min(self.prefill_budget, num_tokens)
        self.prefill_chunk = min(self.prefill_chunk, num_tokens)
        self.chunks.piece_len = self._prefix_grid()

    def _prefix_grid(self) -> int:
        """Tokens of a kept piece: what is chunked otherwise has other bits, unless the model is uniform."""
        is_finer = self.model.is_uniform and isinstance(self.kv, KVPages) and self.prefill_chunk % PIECE_TOKENS == 0
        return PIECE_TOKENS if is_finer else self.prefill_chunk

    def add(self, request: Request) -> None:
        """Raises ValueError when the request could break a batch."""
        if any((request.id, index) in self.batch for index in request.live_choices):
            raise ValueError(f"request {request.id} is here already")
        validate(request, vocab_size=self.model.vocab_size, max_model_len=self.max_model_len,
                 max_choices=self.kv.num_slots)
        sequences = [self._sequence(request, index) for index in request.live_choices]
        for sequence in sequences:
            if sequence.finish_reason:
                self._outputs.append(Output(request.id, sequence.index, (), (), sequence.finish_reason))
        living = {sequence.index: sequence for sequence in sequences if not sequence.finish_reason}
        names = (prefix_names(request.salt, request.prompt_token_ids, self.chunks.piece_len)
                 if living and self.chunks.keeps else ())
        side_by_side = self.kv.num_pages // self.kv.pages(max((s.num_tokens + 1 for s in living.values()), default=1))
        while living:
            some = {index: living.pop(index) for index in list(islice(living, side_by_side))}
            self.batch.add(some, names, request.salt)

    def _sequence(self, request: Request, index: int) -> Sequence:
        sampling = request.sampling
        eos = frozenset() if sampling.ignore_eos else self.model.eos_token_ids
        params = Params.of(sampling, index, eos | frozenset(sampling.stop_token_ids))
        drawn = list(request.continued_token_ids(index))
        constraint = request.constraints[index] if request.constraints else None
        drafts = self.num_speculative_tokens and sampling.speculative and not (
            params.is_penalized or (constraint and self.runs_ahead))
        return Sequence(request.id, index, request.prompt_token_ids, sampling, params, drawn, constraint=constraint,
                        num_reprefilled_tokens=0 if self._replays(len(drawn)) else len(drawn),
                        drafter=Drafter(self.num_speculative_tokens) if drafts else None)

    def replays_exactly(self, num_tokens: int) -> bool:
        """Whether an answer with so many tokens from another worker continues bit for bit."""
        return self.model.is_uniform or self._replays(num_tokens)

    def _replays(self, num_tokens: int) -> bool:
        """Whether drawn tokens are decoded again; otherwise they are prefilled, which is faster."""
        return not self.model.is_uniform and num_tokens <= self.exact_replay_max_tokens

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Frees the slots at once. Unknown requests and choices are ignored: they may just have ended."""
        for sequence in self.batch.find(request_id, index):
            self._keep_answer(sequence)
            self._retire(sequence)

    def step(self) -> list[Output]:
        try:
            self._compute()
            self.batch.limit.note_calm()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._shrink()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _compute(self) -> None:
        self.batch.admit()
        for group in self.batch.running:                # even what a neighbour computed one step ago
            self.chunks.reuse(group.leader, group.prefix)
        self._constrain()
        self._secure_memory()
        progress = self._draft(self.batch.progress())
        num_before = len(self._flights)
        for forward in self._plan(progress):
            if self.few_threads:                        # a setting of torch, at the cost of a tenth of a microsecond
                takes_all = forward.num_rows > MANY_ROWS or not forward.decodes
                torch.set_num_threads(self.most_threads if takes_all else self.few_threads)
            sequences, logits, of_prompts = self.runner.run(forward, self.batch.by_slot)
            self._sample(sequences, logits)
            for row, span in enumerate(forward.prefills):
                self._prefilled(span, of_prompts[row:row + 1])
        may_fly = self.runs_ahead and not any(s.draft_token_ids for flight in self._flights for s in flight.sequences)
        self._land(num_before if may_fly else len(self._flights))

    def _plan(self, progress: list[Progress]) -> list[Forward]:
        if fixed := self.runner.fixed:
            plan = schedule(progress, max_rows=self.max_rows, prefill_chunk=self.prefill_chunk, min_chunk_cost=0,
                            max_short=fixed.max_short)
            return pack(plan, max_rows=self.max_rows, max_short=fixed.max_short, max_tiled_rows=fixed.tiles.num_rows,
                        tile_len=TILE_LEN)
        plan = schedule(progress, max_rows=self.max_rows, prefill_chunk=self.prefill_chunk,
                        prefill_budget=self.prefill_budget,
                        min_chunk_cost=0 if self.max_shared_rows else MIN_CHUNK_COST)
        return share(plan, max_rows=self.max_shared_rows, min_rows=self.model.min_rows if self.is_exact else 1)

    def _shrink(self) -> None:
        """Out of memory: preempts all sequences, halves how many may run, and empties the prefix cache. Unread draws
        are repeated, with the same result."""
        in_flight = {sequence for flight in self._flights for sequence in flight.sequences}
        for sequence in in_flight:
            sequence.num_pending_tokens = 0
        self._flights.clear()
        running = self.batch.youngest_first()
        num_tried = max(len(running), len(in_flight))
        if running and num_tried == 1:
            self._outputs.append(self._fail(running[0], OUT_OF_MEMORY))
        elif running:
            self.batch.limit.halve(num_tried)
            log.warning("no memory for a step of %d sequences: %d at a time", len(running), self.batch.limit.num_seqs)
            for sequence in running:
                self._preempt(sequence)
        self.chunks.drop_all()
        self.kv.give_back_idle()

    def _secure_memory(self) -> None:
        """Pending draws are read before any preemption."""
        while youngest := self.batch.secure_memory():
            if self._flights:
                self._land(len(self._flights))
            else:
                self._preempt(youngest)

    def _preempt(self, sequence: Sequence) -> None:
        """The sequence prefills its prompt and replays its tokens, once there is room."""
        self._leave_sampler(sequence)
        self.batch.preempt(sequence)
        if self.model.is_uniform or not self.is_exact:
            sequence.num_reprefilled_tokens = len(sequence.output_token_ids)

    def _constrain(self) -> None:
        """Starts making masks, beside the forward; first reads the pending draws on which they depend."""
        constrained = [sequence for sequence in self.batch.computing() if sequence.constraint]
        if any(sequence.num_pending_tokens for sequence in constrained):
            self._land(len(self._flights))
            constrained = [sequence for sequence in self.batch.computing() if sequence.constraint]
        _prepare(sequence.constraint for sequence in constrained
                 if sequence.constraint and self._asks_first(sequence))

    def _asks_first(self, sequence: Sequence) -> bool:
        """Whether the mask is made before the draw: always on a GPU, which computes meanwhile."""
        return sequence.asks_first or (self.runs_ahead and sequence.constraint is not None)

    def _draft(self, progress: list[Progress]) -> list[Progress]:
        """Drafts where one small forward has room for all rows: more rows cost time, and drafts are often wrong."""
        if not self.num_speculative_tokens:
            return progress
        self._num_draft_steps += 1
        num_rows = sum(p.num_uncomputed_tokens for p in progress if p.is_prefilled)
        num_spare = min(self.max_rows, MAX_DRAFT_ROWS) - num_rows
        if num_spare > 0 and self._flights and self._waits_for_drafts(progress):
            self._land(len(self._flights))              # a draft extends known tokens only
            progress = self.batch.progress()
        for place, p in enumerate(progress):
            if num_spare <= 0:
                break
            sequence = self.batch.by_slot[p.slot]
            if p.is_prefilled and p.num_uncomputed_tokens == 1 and sequence.searches_draft():
                num_drafted = sequence.draft(min(num_spare, self.kv.num_owned_tokens(p.slot) - p.num_tokens))
                num_spare -= num_drafted
                progress[place] = p._replace(num_drafted=num_drafted)
        return progress

    def _waits_for_drafts(self, progress: list[Progress]) -> bool:
        """Whether drafts are worth a step that is not launched ahead: where the last search found one, and now and then
        for all at once."""
        searches_all = self._num_draft_steps % SEARCH_STEPS == 0
        decoding = (self.batch.by_slot[p.slot] for p in progress if p.is_prefilled)
        return any(sequence.num_pending_tokens and sequence.may_draft and (searches_all or sequence.finds_drafts)
                   for sequence in decoding)

    def _prefilled(self, span: Span, logits: Tensor) -> None:
        """Handles a computed chunk: keeps it for others, and draws each choice's first token after the last one."""
        sequence = self.batch.by_slot[span.slot]
        group = self.batch.group_of(sequence)
        self.chunks.keep(span, group.prefix)
        if span.end < sequence.num_prompt_tokens:
            return
        if span.end < sequence.num_computed_tokens:     # a later part of it is in the same forward
            return
        fresh = self._share_prompt(group) if span.end == sequence.num_prompt_tokens else [sequence]
        fresh = [sequence for sequence in fresh if sequence.num_uncomputed_tokens == 0]
        self._sample(fresh, logits.expand(len(fresh), -1))

    def _share_prompt(self, group: Group) -> list[Sequence]:
        """Copies the prompt computed by the first choice to all others."""
        leader, *others = sequences = list(group.sequences.values())
        for sequence in others:
            self.kv.copy(leader.slot, sequence.slot, 0, leader.num_prompt_tokens)
            sequence.num_computed_tokens = leader.num_computed_tokens
            sequence.num_cached_tokens = leader.num_cached_tokens
        for sequence in sequences:
            self.sampler.join(sequence.slot, sequence.params, sequence.prompt_token_ids, sequence.output_token_ids)
        return sequences

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Draws for each row. Consecutive rows of one sequence are its next token, then its draft."""
        if not sequences:
            return
        rows, draws_first = list[Row](), False
        for sequence, same in groupby(sequences):
            allowed = None
            if sequence.constraint and self._asks_first(sequence):
                allowed = sequence.allowed()
            elif sequence.constraint:
                draws_first = True
            rows += [Row(sequence.slot, sequence.num_output_tokens + offset, allowed) for offset, _ in enumerate(same)]
        draws = self.sampler.sample(logits, rows, wants_runners_up=draws_first)
        self._flights.append(Flight(sequences, rows, logits if draws_first else None, draws))
        for sequence, _ in groupby(sequences):
            sequence.num_pending_tokens += 1            # plus the draft tokens that will be accepted

    def _land(self, num_flights: int) -> None:
        """Reads the draws of the oldest `num_flights` forwards."""
        for _ in range(num_flights):
            flight = self._flights[0]
            refused = {place: draws for place, draws in flight.read() if not self._take(flight, place, draws)}
            if refused:
                self._draw_again(flight, refused)
            self._flights.popleft()                     # from here on no memory is allocated

    def _take(self, flight: Flight, place: int, draws: list[Draw]) -> bool:
        """Takes the draws of a sequence, unless it has left. False: its constraint accepts none of them."""
        sequence = flight.sequences[place]
        if self.batch.by_slot.get(sequence.slot) is not sequence:
            return True
        if first := flight.first_to_follow(place, draws[0]):
            self._outputs.append(self._accept(sequence, [first, *draws[1:]]))
        elif flight.rows[place].allowed is None:
            return False
        else:
            self._outputs.append(self._fail(sequence, NO_WAY_ON))
        return True

    def _draw_again(self, flight: Flight, refused: dict[int, list[Draw]]) -> None:
        """Repeats the draw, with masks, for sequences whose first draw was refused."""
        assert flight.logits is not None
        sequences = [flight.sequences[place] for place in refused]
        _prepare(sequence.constraint for sequence in sequences if sequence.constraint)
        rows = [flight.rows[place]._replace(allowed=sequence.allowed())
                for place, sequence in zip(refused, sequences, strict=True)]
        logits = flight.logits.index_select(0, torch.tensor(list(refused)))
        again = Flight(sequences, rows, None, self.sampler.sample(logits, rows))
        for place, (draw, (_, *behind)) in enumerate(zip(again.draws.read(), refused.values(), strict=True)):
            self._take(again, place, [draw, *behind])

    def _accept(self, sequence: Sequence, draws: list[Draw]) -> Output:
        """Accepts the first draw, which the constraint allows, and the draft tokens confirmed by the draws."""
        num_before, num_drafted = len(sequence.output_token_ids), len(sequence.draft_token_ids)
        taken = sequence.accept(draws)
        if taken is None:
            return self._fail(sequence, NOT_A_NUMBER)
        if num_drafted:
            self.num_draft_tokens += num_drafted
            self.num_accepted_tokens += len(taken) - 1
        if sequence.constraint:
            taken += sequence.take_forced(MAX_FORCED_TOKENS)
        reason = sequence.finish_reason
        if reason:
            self._keep_answer(sequence)
            self._retire(sequence)
        return Output(sequence.request_id, sequence.index, tuple(draw.token_id for draw in taken),
                      tuple(draw.logprobs for draw in taken if draw.logprobs), reason,
                      0 if num_before else sequence.num_cached_tokens)

    def _keep_answer(self, sequence: Sequence) -> None:
        """Keeps what is computed of it for the next turn of its conversation, where rows have the bits of chunks."""
        if not self.model.is_uniform or not self.chunks.keeps or sequence.slot == WAITING:
            return
        group, piece_len = self.batch.group_of(sequence), self.chunks.piece_len
        known, begin = (*sequence.prompt_token_ids, *sequence.output_token_ids), len(group.prefix) * piece_len
        names = prefix_names(group.salt, known, piece_len, group.prefix)
        self.chunks.keep(Span(sequence.slot, begin, max(begin, sequence.num_computed_tokens)), names)

    def _fail(self, sequence: Sequence, why: str) -> Output:
        if why == NOT_A_NUMBER:                         # its keys and values may be NaN too
            self.kv.wipe(sequence.slot, self.kv.num_owned_tokens(sequence.slot))
            self.chunks.forget(self.batch.group_of(sequence).prefix)
        self._retire(sequence)
        return Output(sequence.request_id, sequence.index, (), (), why)

    def _retire(self, sequence: Sequence) -> None:
        self._leave_sampler(sequence)
        self.batch.remove(sequence)

    def _leave_sampler(self, sequence: Sequence) -> None:
        if sequence.slot != WAITING:
            self.sampler.leave(sequence.slot)

    @property
    def num_running(self) -> int:
        return self.batch.num_running

    @property
    def num_waiting(self) -> int:
        return self.batch.num_waiting

    @property
    def num_preempted(self) -> int:
        return self.batch.num_preempted

    @property
    def num_free_seqs(self) -> int:
        """Choices that can be admitted at once; 0 while any wait for a slot or for memory."""
        return self.batch.num_free_seqs

    @property
    def has_work(self) -> bool:
        return bool(self.batch or self._outputs)

    @property
    def numerics_id(self) -> str:
        """Identifies the model, the mode of batching, and the grid on which prompts are cut, if bits depend on it."""
        parts = self.model.numerics_id, 0 if self.model.is_uniform else self.prefill_chunk, self.is_exact
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def check(self) -> None:
        """Every slot is free or held by one running choice; an idle engine holds none."""
        self.batch.check()
        assert all(params is None or slot in self.batch.by_slot for slot, params in enumerate(self.sampler.params))
        assert self.has_work or not self.kv.num_held, f"{self!r} is idle and holds slots"

    def __repr__(self) -> str:
        return f"<Engine {self.batch!r}>"


def _is_out_of_memory(error: Exception) -> bool:
    """torch has its own exception only for devices; its CPU allocator raises a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _prepare(constraints: Iterable[Constraint]) -> None:
    """Prepares all at once."""
    if some := list(constraints):
        some[0].prepare(some)
