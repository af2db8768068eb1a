"""Which sequence owns which slot of keys and values, for its whole life.

A slot holds one sequence up to the longest allowed. Their number is bounded by bytes, but memory is touched only as
far as sequences have reached. Slots from `num_slots` on are not given out: what they hold, others know (prefix.py). It
knows slots and lengths, nothing of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from worker.model.attention import PAGE_LEN, KVLayer, places


@dataclass(slots=True)
class KVSlots:
    layers: list[KVLayer]
    num_slots: int                                      # that sequences may own
    _free: list[int] = field(init=False)
    _held: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_slots))
        heapify(self._free)

    def reserve(self) -> int:
        """The lowest free slot: neighbours are computed in one kernel call."""
        slot = heappop(self._free)
        self._held.add(slot)
        return slot

    def release(self, slot: int) -> None:
        self._held.remove(slot)
        heappush(self._free, slot)

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Tokens [begin, end) of one slot to the same place in another."""
        for page, place in places(begin, end):
            for cache in (cache for layer in self.layers for cache in layer):
                cache[page, target, :, place] = cache[page, source, :, place]

    def wipe(self, slot: int, num_tokens: int) -> None:
        """Of what is no number: padding is read with weight zero, and zero times NaN is NaN."""
        for cache in (cache for layer in self.layers for cache in layer):
            cache[:-(-num_tokens // PAGE_LEN), slot] = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def check(self) -> None:
        assert self.num_free + self.num_held == self.num_slots, f"{self!r} leaks"
        assert self._held.isdisjoint(self._free) and len(set(self._free)) == self.num_free, f"{self!r} doubles"

    def __repr__(self) -> str:
        return f"<KVSlots {self.num_held}/{self.num_slots} held>"
