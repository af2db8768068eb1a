"""The scheduler decides which tokens of which sequences compute in the next step.

It knows token counts alone. It knows nothing of tensors, text or Redis.

A step is bounded: one row for every sequence behind its prompt and at most `MAX_REPLAY_ROWS` more for those that
replay, in forwards of at most `max_rows`; then prefill chunks worth at most `prefill_budget` tokens, of one prompt or
of many. A chunk ends at a multiple of `prefill_chunk`, counted from the prompt's start, so that a prompt is always
computed in the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_CHUNK_COST = 32     # tokens: a shorter chunk costs no less, since all weights are read anyway
SHORT_COST = 4          # times a token of a long chunk
MAX_REPLAY_ROWS = 32    # rows of one sequence read its keys once each
CALM_STEPS = 1000       # a minute or so: memory used by other processes may be free again


class Progress(NamedTuple):
    slot: int
    num_prefill_tokens: int         # computed in chunks; the rest in decode rows
    num_computed_tokens: int
    num_tokens: int
    num_drafted: int = 0            # rows after the last known token; only if one forward has room for all

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed_tokens >= self.num_prefill_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens


class Span(NamedTuple):
    """Tokens [begin, end) of the sequence in a slot."""

    slot: int
    begin: int
    end: int


@dataclass(slots=True)
class BatchLimit:
    """How many sequences may run: halved when a step ran out of memory, one more after every `CALM_STEPS` without."""

    max_num_seqs: int
    num_seqs: int = field(init=False)
    _num_calm_steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.num_seqs = self.max_num_seqs

    def halve(self, num_running: int) -> None:
        self.num_seqs, self._num_calm_steps = max(1, min(self.num_seqs, num_running // 2)), 0

    def note_calm(self) -> None:
        self._num_calm_steps += 1
        if self._num_calm_steps >= CALM_STEPS and self.num_seqs < self.max_num_seqs:
            self.num_seqs, self._num_calm_steps = self.num_seqs + 1, 0

    def num_free(self, num_running: int) -> int:
        """All while nothing runs: a request may have many choices, and an idle engine never raises the limit."""
        return max(0, self.num_seqs - num_running) if num_running else self.max_num_seqs


class Plan(NamedTuple):
    decodes: list[list[Span]]       # one forward each
    prefills: list[Span]            # chunks of prompts


class Forward(NamedTuple):
    """The spans computed together."""

    decodes: list[Span]
    prefills: list[Span]

    @property
    def num_rows(self) -> int:
        return self.num_rows_in(1)

    def num_rows_in(self, unit: int) -> int:
        """The number of rows, each span rounded up to whole units."""
        return sum(_in(unit, span) for span in (*self.decodes, *self.prefills))


def schedule(progress: Sequence[Progress], *, max_rows: int, prefill_chunk: int, prefill_budget: int = 0,
             min_chunk_cost: int = MIN_CHUNK_COST, max_short: int = 0) -> Plan:
    """`progress` comes in order of arrival, which is the order of prefill and of replay.

    The budget is a chunk at least. Chunks of at most `max_short` tokens share forwards of so many rows, where a token
    costs more than in a long one.
    """
    prefilling = [p for p in progress if not p.is_prefilled]
    computing = [p for p in progress if p.is_prefilled]
    decoding = sorted(_next(p, 1 + p.num_drafted) for p in computing if p.num_uncomputed_tokens == 1)
    replaying = _take_replays((p for p in computing if p.num_uncomputed_tokens > 1), min(max_rows, MAX_REPLAY_ROWS))
    return Plan(list(_split([*decoding, *replaying], max_rows)),
                list(_take_prefills(prefilling, prefill_chunk, max(prefill_budget, prefill_chunk), min_chunk_cost,
                                    max_short)))


def share(plan: Plan, *, max_rows: int, min_rows: int = 1) -> list[Forward]:
    """Chunks join the forward before them, up to `max_rows` rows; chunks shorter than `min_rows` stay alone."""
    forwards = [Forward(spans, []) for spans in plan.decodes]
    for span in plan.prefills:
        num_rows = span.end - span.begin
        last = forwards[-1] if forwards else Forward([], [])
        is_alone = num_rows < min_rows or any(end - begin < min_rows for _, begin, end in last.prefills)
        if is_alone or not last.num_rows or last.num_rows + num_rows > max_rows:
            forwards.append(Forward([], [span]))
        else:
            last.prefills.append(span)
    return forwards


def pack(plan: Plan, *, max_rows: int, max_short: int, max_tiled_rows: int, tile_len: int) -> list[Forward]:
    """For forwards of fixed shapes: chunks of up to `max_short` tokens join decode rows, others share tiles."""
    few, many = [Forward(spans, []) for spans in plan.decodes], list[Forward]()
    for span in plan.prefills:
        is_short = span.end - span.begin <= max_short
        forwards, most, unit = (few, max_rows, 1) if is_short else (many, max_tiled_rows, tile_len)
        if forwards and forwards[-1].num_rows_in(unit) + _in(unit, span) <= most:
            forwards[-1].prefills.append(span)
        else:
            forwards.append(Forward([], [span]))
    return few + many


def _in(unit: int, span: Span) -> int:
    """The rows of a span, rounded up to whole units."""
    return -(-(span.end - span.begin) // unit) * unit


def _take_replays(replaying: Iterable[Progress], num_rows: int) -> Iterator[Span]:
    """Each sequence gets one row, and more of its replay while the budget lasts."""
    for p in replaying:
        num_more = min(num_rows, p.num_uncomputed_tokens - 1)
        num_rows -= num_more
        yield _next(p, 1 + num_more)


def _take_prefills(prefilling: Iterable[Progress], prefill_chunk: int, budget: int, min_cost: int, max_short: int
                   ) -> Iterator[Span]:
    """Chunks in order of arrival up to the budget, at least one."""
    cost = 0
    for p in prefilling:
        begin = p.num_computed_tokens
        while begin < p.num_prefill_tokens:
            num_tokens = min(prefill_chunk - begin % prefill_chunk, p.num_prefill_tokens - begin)
            is_first, cost = not cost, cost + max(num_tokens * (SHORT_COST if num_tokens <= max_short else 1), min_cost)
            if cost > budget and not is_first:
                return
            yield Span(p.slot, begin, begin + num_tokens)
            begin += num_tokens
            if max_short:                               # a short chunk is computed before a long one
                break


def _split(spans: Iterable[Span], max_rows: int) -> Iterator[list[Span]]:
    """Forwards of at most `max_rows`; a span may go on in the next."""
    forward: list[Span] = []
    num_rows = 0
    for slot, begin, end in spans:
        while begin < end:
            part = min(end - begin, max_rows - num_rows)
            forward.append(Span(slot, begin, begin + part))
            begin, num_rows = begin + part, num_rows + part
            if num_rows == max_rows:
                yield forward
                forward, num_rows = [], 0
    if forward:
        yield forward


def _next(p: Progress, num_tokens: int) -> Span:
    return Span(p.slot, p.num_computed_tokens, p.num_computed_tokens + num_tokens)
