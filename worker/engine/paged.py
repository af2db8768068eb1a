"""Which sequence owns which pages of keys and values, where they are in one pool and our own kernels attend.

What several share of a page, a prompt's prefix, is never written again; a page becomes free when the last owner leaves.
Slots from `num_slots` on are not given to sequences: prefix.py knows their contents. It knows slots and lengths,
nothing of tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from worker.engine.slots import Slots
from worker.model.memory import Memory


class Pool(Memory, Protocol):
    @property
    def page_len(self) -> int: ...

    @property
    def table(self) -> npt.NDArray[np.integer]:
        """[slots, pages of the longest sequence]: the page of the pool at each place of each slot."""

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        """Copies tokens [first, last) of a page, counted from its start, to the same place in another."""

    def give_back(self, page: int) -> None:
        """Returns the memory of a free page to the system, if it can be allocated again."""


class KVPages(Slots):
    def __init__(self, memory: Pool, num_slots: int, num_pages: int):
        super().__init__(num_slots, memory.page_len, num_kept_slots=len(memory.table) - num_slots)
        self.memory = memory
        self.num_pages = num_pages
        self._free_pages = list(reversed(range(num_pages)))
        self._holders: Counter[int] = Counter()         # page → slots that have it
        self._owners: Counter[int] = Counter()          # page → sequences among them
        self._holds: defaultdict[int, Counter[int]] = defaultdict(Counter)      # kept slot → place → kept tokens

    def grow(self, slot: int, num_tokens: int) -> None:
        """Enough pages must be free."""
        for place in range(self._owned[slot], self.pages(num_tokens)):
            self._put(slot, place, self._take())
            self._owned[slot] += 1

    def release(self, slot: int) -> None:
        for place in range(self._owned[slot]):
            self._leave(slot, place)
        self._give_up(slot)

    def num_pages_to_keep(self, source: int, target: int, begin: int, end: int) -> int:
        """The free pages that `keep` needs, or fewer once others were dropped: to write into a page that is shared."""
        written = [int(self.memory.table[target, place]) for place, _, _ in self._places(begin, end)
                   if self._is_written_into(source, target, place)]
        return sum(self._holders[page] > 1 for page in written)

    def keep(self, source: int, target: int, begin: int, end: int) -> None:
        """Keeps tokens [begin, end) of a slot in another, which no sequence owns, until `drop`, all or in parts.

        Both share the pages: the source may go on writing behind these tokens.
        """
        for place, first, last in self._places(begin, end):
            if self._is_written_into(source, target, place):
                self._make_own(target, place)
                self._copy_tokens(source, target, place, first, last)
            elif not self._holds[target][place]:
                self._put(target, place, int(self.memory.table[source, place]))
            self._holds[target][place] += last - first

    def _is_written_into(self, source: int, target: int, place: int) -> bool:
        """Whether the target keeps other tokens there, in another page."""
        return bool(self._holds[target][place]) and self.memory.table[source, place] != self.memory.table[target, place]

    def _make_own(self, slot: int, place: int) -> None:
        """A page that is shared becomes one of this slot alone."""
        shared = int(self.memory.table[slot, place])
        if self._holders[shared] > 1:
            self._leave(slot, place)
            self._put(slot, place, self._take())
            self.memory.copy(shared, int(self.memory.table[slot, place]), 0, self.page_len)

    def drop(self, slot: int, begin: int, end: int) -> None:
        for place, first, last in self._places(begin, end):
            self._holds[slot][place] -= last - first
            if not self._holds[slot][place]:
                self._leave(slot, place)

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Copies tokens [begin, end) of one slot to the same place in another: whole pages are shared."""
        for place, first, last in self._places(begin, end):
            if last - first == self.page_len:
                self._leave(target, place)
                self._put(target, place, int(self.memory.table[source, place]))
            self._copy_tokens(source, target, place, first, last)

    def _places(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """The places in a table that contain tokens [begin, end), with the first and the last token in each."""
        return [(place, max(begin - place * self.page_len, 0), min(end - place * self.page_len, self.page_len))
                for place in range(begin // self.page_len, self.pages(end))]

    def _copy_tokens(self, source: int, target: int, place: int, first: int, last: int) -> None:
        """Copies tokens within a page, unless both slots have the same page there."""
        old, new = (int(self.memory.table[slot, place]) for slot in (source, target))
        if old != new:
            self.memory.copy(old, new, first, last)

    def _take(self) -> int:
        assert self._free_pages, f"{self!r} is full"
        return self._free_pages.pop()

    def _put(self, slot: int, place: int, page: int) -> None:
        self.memory.table[slot, place] = page
        self._holders[page] += 1
        if slot in self._owned:
            self._owners[page] += 1

    def _leave(self, slot: int, place: int) -> None:
        page = int(self.memory.table[slot, place])
        for counts in (self._holders, self._owners) if slot in self._owned else (self._holders,):
            counts[page] -= 1
            if not counts[page]:
                del counts[page]
        if page not in self._holders:
            self._free_pages.append(page)

    def wipe(self, slot: int, num_tokens: int) -> None:
        """Nothing to do: what is after a sequence's end is never read."""

    def give_back_idle(self) -> None:
        for page in self._free_pages:
            self.memory.give_back(page)

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def num_owned_pages(self) -> int:
        """A page shared by several sequences counts once."""
        return len(self._owners)

    def check(self) -> None:
        super().check()
        table = self.memory.table
        owners = Counter(int(table[slot, place]) for slot, num in self._owned.items() for place in range(num))
        keepers = Counter(int(table[slot, place]) for slot, holds in self._holds.items() for place in +holds)
        assert owners == self._owners and owners + keepers == self._holders, f"{self!r} lost count of its pages"
        assert sorted([*self._free_pages, *self._holders]) == list(range(self.num_pages)), f"{self!r} loses pages"

    def __repr__(self) -> str:
        return f"<KVPages {self.num_held}/{self.num_slots} owned, {len(self._holders)}/{self.num_pages} pages held>"
