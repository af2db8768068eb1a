"""Which sequence owns which slot of keys and values, and how much memory all of them fill.

A slot has room for one sequence up to the longest allowed, but costs memory only as far as it is filled. A block, one
page of one slot, is touched when it is first held; when others need its memory, one that is held no more is given back
to the system. So slots are address space, and `num_pages` bounds what they fill. Slots from `num_slots` on are not
given out: what they hold, others know (prefix.py). It knows slots and lengths, nothing of tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from worker.model.attention import PAGE_LEN, KVLayer, SlotMemory, give_back, places

Block = tuple[int, int]                                 # page, slot


def pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_LEN)


@dataclass(slots=True)
class KVSlots:
    layers: list[KVLayer]
    num_slots: int                                      # that sequences may own
    num_pages: int                                      # of memory, that all slots together may fill
    memory: SlotMemory = field(init=False)
    page_len: int = field(init=False, default=PAGE_LEN)
    _free: list[int] = field(init=False)
    _owned: dict[int, int] = field(init=False, default_factory=dict)                # slot → its pages
    _holders: Counter[Block] = field(init=False, default_factory=Counter)
    _idle: dict[Block, None] = field(init=False, default_factory=dict)              # touched, and held no more

    def __post_init__(self) -> None:
        self.memory = SlotMemory(self.layers)
        self._free = list(range(self.num_slots))
        heapify(self._free)

    def reserve(self) -> int:
        """The lowest free slot: neighbours are computed in one kernel call."""
        slot = heappop(self._free)
        self._owned[slot] = 0
        return slot

    def num_missing_pages(self, slot: int, num_tokens: int) -> int:
        """What an owned slot needs before it can hold so many tokens."""
        return max(0, pages(num_tokens) - self._owned[slot])

    def num_owned_tokens(self, slot: int) -> int:
        """That an owned slot can hold."""
        return self._owned[slot] * PAGE_LEN

    def grow(self, slot: int, num_tokens: int) -> None:
        """The pages must be free."""
        num_missing = self.num_missing_pages(slot, num_tokens)
        assert num_missing <= self.num_free_pages, f"{self!r} is full"
        for _ in range(num_missing):
            self._hold((self._owned[slot], slot))
            self._owned[slot] += 1

    def release(self, slot: int) -> None:
        for page in range(self._owned.pop(slot)):
            self._drop((page, slot))
        heappush(self._free, slot)

    def hold(self, slot: int, begin: int, end: int) -> None:
        """Tokens [begin, end) of a slot that nobody owns; until `drop`."""
        for page, _ in places(begin, end):
            self._hold((page, slot))

    def drop(self, slot: int, begin: int, end: int) -> None:
        for page, _ in places(begin, end):
            self._drop((page, slot))

    def _hold(self, block: Block) -> None:
        if not self._holders[block]:
            self._idle.pop(block, None)
            if len(self._idle) >= self.num_free_pages:
                self._give_back(next(iter(self._idle)))
        self._holders[block] += 1

    def _drop(self, block: Block) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            del self._holders[block]
            self._idle[block] = None

    def give_back_idle(self) -> None:
        for block in list(self._idle):
            self._give_back(block)

    def _give_back(self, block: Block) -> None:
        del self._idle[block]
        for cache in (cache for layer in self.layers for cache in layer):
            give_back(cache[block])

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Tokens [begin, end) of one slot to the same place in another."""
        for page, place in places(begin, end):
            for cache in (cache for layer in self.layers for cache in layer):
                cache[page, target, :, place] = cache[page, source, :, place]

    def wipe(self, slot: int, num_tokens: int) -> None:
        """Of what is no number: padding is read with weight zero, and zero times NaN is NaN."""
        for cache in (cache for layer in self.layers for cache in layer):
            cache[:pages(num_tokens), slot] = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._owned)

    @property
    def num_free_pages(self) -> int:
        return self.num_pages - len(self._holders)

    @property
    def num_owned_pages(self) -> int:
        return sum(self._owned.values())

    def check(self) -> None:
        assert self.num_free + self.num_held == self.num_slots, f"{self!r} leaks"
        assert self._owned.keys().isdisjoint(self._free) and len(set(self._free)) == self.num_free, f"{self!r} doubles"
        assert all((page, slot) in self._holders for slot, num in self._owned.items() for page in range(num))
        assert len(self._holders) + len(self._idle) <= self.num_pages, f"{self!r} fills more than it may"
        assert self._idle.keys().isdisjoint(self._holders)

    def __repr__(self) -> str:
        return f"<KVSlots {self.num_held}/{self.num_slots} owned, {len(self._holders)}/{self.num_pages} pages held>"
