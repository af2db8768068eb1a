"""Who waits and who runs: choices get slots and pages in order of arrival, and the youngest gives way when pages run
out.

A sequence that gives way goes on later, as one of a dead worker does. It knows groups, slots and counts of pages. It
knows nothing of logits, draws or constraints.
"""

from __future__ import annotations

from collections import deque

from worker.engine.chunks import Chunks
from worker.engine.scheduler import BatchLimit, Progress
from worker.engine.sequence import WAITING, Group, Sequence
from worker.engine.store import KV


class Batch:
    def __init__(self, kv: KV, chunks: Chunks, max_num_seqs: int):
        self.kv, self.chunks = kv, chunks
        self.limit = BatchLimit(max_num_seqs)
        self.running: list[Group] = []                  # every sequence has a slot
        self.by_slot: dict[int, Sequence] = {}
        self.num_preempted = 0
        self._waiting: deque[Group] = deque()           # in order of arrival
        self._group_of: dict[tuple[str, int], Group] = {}
        self._num_arrived = 0

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._group_of

    def __bool__(self) -> bool:
        return bool(self._waiting or self.running)

    def group_of(self, sequence: Sequence) -> Group:
        return self._group_of[sequence.key]

    def find(self, request_id: str, index: int | None) -> list[Sequence]:
        """A choice of a request, or all of them."""
        return [group.sequences[key[1]] for key, group in self._group_of.items()
                if key[0] == request_id and index in (None, key[1])]

    def add(self, sequences: dict[int, Sequence], prefix: tuple[str, ...], salt: str) -> None:
        self._waiting.append(self._group(self._num_arrived, sequences, prefix, salt))
        self._num_arrived += 1

    def _group(self, number: int, sequences: dict[int, Sequence], prefix: tuple[str, ...], salt: str) -> Group:
        group = Group(number, sequences, prefix, salt)
        self._group_of |= {sequence.key: group for sequence in sequences.values()}
        return group

    def admit(self) -> None:
        """First come, first served: a request with many choices is not overtaken."""
        while self._waiting:
            group = self._waiting[0]
            num_pages = sum(self.kv.pages(sequence.num_tokens + 1) for sequence in group.sequences.values())
            num_free = min(self.kv.num_free, self.limit.num_free(self.num_running))
            if len(group.sequences) > num_free or not self.chunks.make_room(num_pages):
                return
            self.running.append(self._waiting.popleft())
            for sequence in group.sequences.values():
                sequence.slot = self.kv.reserve()
                self.kv.grow(sequence.slot, sequence.num_tokens + 1)
                self.by_slot[sequence.slot] = sequence

    def secure_memory(self) -> Sequence | None:
        """Allocates pages for all drawn tokens, oldest sequence first. Returns the sequence that must give way before
        there are enough."""
        for group in self._by_age():
            for sequence in group.sequences.values():
                if num_missing := self.kv.num_missing_pages(sequence.slot, sequence.num_tokens):
                    if not self.chunks.make_room(num_missing):
                        return self.youngest_first()[0]
                    self.kv.grow(sequence.slot, sequence.num_tokens)
        return None

    def _by_age(self) -> list[Group]:
        """The oldest first."""
        return sorted(self.running, key=lambda group: group.number)

    def preempt(self, sequence: Sequence) -> None:
        """Puts it back in line, before any younger one."""
        group = self._group_of[sequence.key]
        self._leave(sequence)
        sequence.restart()
        self._waiting.appendleft(self._group(group.number, {sequence.index: sequence}, group.prefix, group.salt))
        self.num_preempted += 1

    def youngest_first(self) -> list[Sequence]:
        """All that have slots."""
        return [sequence for group in reversed(self._by_age()) for sequence in reversed(group.sequences.values())]

    def remove(self, sequence: Sequence) -> None:
        self._leave(sequence)
        del self._group_of[sequence.key]

    def _leave(self, sequence: Sequence) -> None:
        group = self._group_of[sequence.key]
        if sequence is group.leader and not group.is_prefilled and len(group.sequences) > 1:
            self._hand_over(sequence, list(group.sequences.values())[1])
        del group.sequences[sequence.index]
        if not group.sequences:
            (self._waiting if sequence.slot == WAITING else self.running).remove(group)
        if sequence.slot != WAITING:
            del self.by_slot[sequence.slot]
            self.kv.release(sequence.slot)

    def _hand_over(self, leader: Sequence, heir: Sequence) -> None:
        """A partly computed prompt survives the choice that computed it."""
        leader.slot, heir.slot = heir.slot, leader.slot
        heir.num_computed_tokens, heir.num_cached_tokens = leader.num_computed_tokens, leader.num_cached_tokens
        for sequence in (leader, heir):
            if sequence.slot != WAITING:
                self.by_slot[sequence.slot] = sequence

    def computing(self) -> list[Sequence]:
        """Those with something to compute: not siblings that wait for their prompt, nor what is complete."""
        return [sequence for group in self.running for sequence in group.computing if not sequence.is_complete]

    def progress(self) -> list[Progress]:
        return [Progress(sequence.slot, sequence.num_prefill_tokens, sequence.num_computed_tokens, sequence.num_tokens)
                for sequence in self.computing()]

    @property
    def num_running(self) -> int:
        return len(self.by_slot)

    @property
    def num_waiting(self) -> int:
        return sum(len(group.sequences) for group in self._waiting)

    @property
    def num_free_seqs(self) -> int:
        """Choices that can be admitted at once; 0 while any wait for a slot or for memory."""
        num_free = self.limit.num_free(self.num_running)
        return 0 if self._waiting else min(self.kv.num_free, self.chunks.num_available_pages, num_free)

    def check(self) -> None:
        """Every slot is free or held by one running choice."""
        self.kv.check()
        held = {sequence.slot for group in self.running for sequence in group.sequences.values()}
        assert held == set(self.by_slot) and len(held) == self.kv.num_held, f"{self!r} lost count of its slots"
        known = {sequence.key for group in (*self.running, *self._waiting) for sequence in group.sequences.values()}
        assert known == set(self._group_of), f"{self!r} lost count of its choices"

    def __repr__(self) -> str:
        return (f"<Batch {self.num_running} running, {self.num_waiting} waiting, "
                f"slots {self.kv.num_held}/{self.kv.num_slots}>")
