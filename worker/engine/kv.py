"""Which sequence owns which slot of keys and values, if torch attends, and how much memory the slots use.

A slot has room for the longest sequence, but uses memory only as far as it is filled. A block, one page of one slot, is
touched when it is first held; when its memory is needed elsewhere, a block that is not held is returned to the system.
Slots are thus address space, and `num_pages` bounds the memory. Slots from `num_slots` on are not given to sequences:
prefix.py knows their contents. It knows slots and lengths, nothing of tokens.
"""

from __future__ import annotations

from collections import Counter

from worker.engine.slots import Slots
from worker.model.attention import PAGE_LEN, KVLayer
from worker.model.slots import SlotMemory, places

Block = tuple[int, int]                                 # page, slot


class KVSlots(Slots):
    def __init__(self, layers: list[KVLayer], num_slots: int, num_pages: int):
        """`num_pages` bounds the memory of all slots together."""
        super().__init__(num_slots, PAGE_LEN, num_kept_slots=layers[0].values.shape[1] - num_slots)
        self.layers = layers
        self.memory = SlotMemory(layers)
        self.num_pages = num_pages
        self._holders: Counter[Block] = Counter()
        self._idle: dict[Block, None] = {}              # touched, but no longer held

    def grow(self, slot: int, num_tokens: int) -> None:
        """Enough pages must be free."""
        num_missing = self.num_missing_pages(slot, num_tokens)
        assert num_missing <= self.num_free_pages, f"{self!r} is full"
        for _ in range(num_missing):
            self._hold((self._owned[slot], slot))
            self._owned[slot] += 1

    def release(self, slot: int) -> None:
        for page in range(self._owned[slot]):
            self._drop((page, slot))
        self._give_up(slot)

    def num_pages_to_keep(self, _source: int, _target: int, begin: int, end: int) -> int:
        """An upper bound of the free pages that `keep` needs; of two chunks in one page, the second needs none."""
        return len(list(places(begin, end)))

    def keep(self, source: int, target: int, begin: int, end: int) -> None:
        """Keeps tokens [begin, end) of a slot in another, which no sequence owns, until `drop`, all or in parts."""
        self.hold(target, begin, end)
        self.copy(source, target, begin, end)

    def hold(self, slot: int, begin: int, end: int) -> None:
        """Holds tokens [begin, end) of a slot that no sequence owns, until `drop`, all or in parts."""
        for page, place in places(begin, end):
            self._hold((page, slot), place.stop - place.start)

    def drop(self, slot: int, begin: int, end: int) -> None:
        for page, place in places(begin, end):
            self._drop((page, slot), place.stop - place.start)

    def _hold(self, block: Block, count: int = 1) -> None:
        if not self._holders[block]:
            self._idle.pop(block, None)
            if len(self._idle) >= self.num_free_pages:
                self._give_back(next(iter(self._idle)))
        self._holders[block] += count

    def _drop(self, block: Block, count: int = 1) -> None:
        self._holders[block] -= count
        if not self._holders[block]:
            del self._holders[block]
            self._idle[block] = None

    def give_back_idle(self) -> None:
        for block in list(self._idle):
            self._give_back(block)

    def _give_back(self, block: Block) -> None:
        del self._idle[block]
        self.memory.give_back(self._number(block))

    def _number(self, block: Block) -> int:
        """The block's number in memory."""
        page, slot = block
        return int(self.memory.table[slot, page])

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Copies tokens [begin, end) of one slot to the same place in another."""
        for page, place in places(begin, end):
            self.memory.copy(self._number((page, source)), self._number((page, target)), place.start, place.stop)

    def wipe(self, slot: int, num_tokens: int) -> None:
        """Zeroes a slot that may hold NaN: padding is read with weight zero, and zero times NaN is NaN."""
        for cache in (cache for layer in self.layers for cache in layer):
            cache[:self.pages(num_tokens), slot] = 0

    @property
    def num_free_pages(self) -> int:
        return self.num_pages - len(self._holders)

    @property
    def num_owned_pages(self) -> int:
        return sum(self._owned.values())

    def check(self) -> None:
        super().check()
        assert all((page, slot) in self._holders for slot, num in self._owned.items() for page in range(num))
        assert len(self._holders) + len(self._idle) <= self.num_pages, f"{self!r} fills more than it may"
        assert self._idle.keys().isdisjoint(self._holders)

    def __repr__(self) -> str:
        return f"<KVSlots {self.num_held}/{self.num_slots} owned, {len(self._holders)}/{self.num_pages} pages held>"
