"""Slots that sequences own, and the number of pages of each: shared by both stores of keys and values."""

from __future__ import annotations

from heapq import heapify, heappop, heappush


class Slots:
    def __init__(self, num_slots: int, page_len: int, num_kept_slots: int):
        self.num_slots = num_slots
        self.kept_slots = range(num_slots, num_slots + num_kept_slots)      # never given to sequences
        self.page_len = page_len                        # tokens
        self._free = list(range(num_slots))
        heapify(self._free)
        self._owned: dict[int, int] = {}                # slot → its pages

    def reserve(self) -> int:
        """The lowest free slot: neighbouring slots can be computed in one kernel call."""
        slot = heappop(self._free)
        self._owned[slot] = 0
        return slot

    def _give_up(self, slot: int) -> None:
        del self._owned[slot]
        heappush(self._free, slot)

    def pages(self, num_tokens: int) -> int:
        """The pages needed for so many tokens."""
        return -(-num_tokens // self.page_len)

    def num_missing_pages(self, slot: int, num_tokens: int) -> int:
        """The pages that an owned slot needs before it can hold so many tokens."""
        return max(0, self.pages(num_tokens) - self._owned[slot])

    def num_owned_tokens(self, slot: int) -> int:
        """The tokens that an owned slot has room for."""
        return self._owned[slot] * self.page_len

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._owned)

    def check(self) -> None:
        assert self.num_free + self.num_held == self.num_slots, f"{self!r} leaks"
        assert self._owned.keys().isdisjoint(self._free) and len(set(self._free)) == self.num_free, f"{self!r} doubles"
