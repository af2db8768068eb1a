"""Which computed pieces of prompts are kept, and where, so that none is computed twice.

Piece i of any prompt is at the same tokens of a slot, so a slot of the cache is a row of places: place i of a slot may
hold a piece of another prompt than place i + 1. The least recently used piece is evicted first, and of one prompt the
last, which is useless without its predecessors. It knows names and slots, nothing of tokens, tensors or memory.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

Place = tuple[int, int]                                 # a piece's index, and its slot


@dataclass(slots=True)
class PrefixCache:
    slots: range                                        # of the KV store; empty: nothing is kept
    _slots: dict[tuple[int, str], int] = field(init=False, default_factory=dict)
    _names: defaultdict[int, dict[int, str]] = field(       # slot → index → name, of slots that hold any
        init=False, default_factory=lambda: defaultdict(dict))
    _order: OrderedDict[tuple[int, str], None] = field(init=False, default_factory=OrderedDict)
    _empty: dict[int, None] = field(init=False)

    def __post_init__(self) -> None:
        self._empty = dict.fromkeys(reversed(self.slots))

    def find(self, index: int, name: str) -> int | None:
        """The slot that holds piece `index` under this name."""
        return self._slots.get((index, name))

    def use(self, names: Sequence[str]) -> None:
        """Marks the pieces of a prompt as used: they are evicted last, the first piece after the others."""
        for piece in reversed(list(enumerate(names))):
            if piece in self._slots:
                self._order.move_to_end(piece)

    def choose(self, first: int, last: int, beside: int | None) -> tuple[int, list[int]]:
        """The slot for pieces [first, last) of a prompt: that of the piece before, an empty one, or the one that loses
        what was used the least recently; and which pieces in it must be evicted first, with those behind them."""
        if beside is not None and self._names[beside].keys().isdisjoint(range(first, last)):
            return beside, []
        if self._empty:
            return next(reversed(self._empty)), []
        slot = self._least_used(first)
        return slot, sorted(index for index in self._names[slot] if index >= first)

    def _least_used(self, first: int) -> int:
        """The slot whose pieces from `first` on were all used before some of every other."""
        num_used: dict[int, int] = {}                   # pieces from `first` on, after those seen here
        for piece in self._order:
            slot = self._slots[piece]
            if slot not in num_used:
                num_used[slot] = sum(index >= first for index in self._names[slot])
            num_used[slot] -= piece[0] >= first
            if not num_used[slot]:
                break
        return slot

    def place(self, first: int, names: Sequence[str], slot: int) -> None:
        """Places pieces from `first` on, whose names must be new and whose places in the slot must be free."""
        self._empty.pop(slot, None)
        for index, name in enumerate(names, first):
            self._slots[index, name] = slot
            self._names[slot][index] = name
            self._order[index, name] = None

    def evict(self, place: Place | None = None) -> Place:
        """Forgets a piece: the least recently used one, unless given."""
        if place is None:
            index, name = next(iter(self._order))
            place = index, self._slots[index, name]
        index, slot = place
        name = self._names[slot].pop(index)
        del self._slots[index, name], self._order[index, name]
        if not self._names[slot]:
            del self._names[slot]
            self._empty[slot] = None
        return place

    def forget(self, names: Sequence[str]) -> list[Place]:
        """Forgets the pieces of a prompt, from its first on. Returns where they were kept."""
        return [self.evict((piece[0], self._slots[piece])) for piece in enumerate(names) if piece in self._slots]

    @property
    def num_pieces(self) -> int:
        return len(self._order)
