"""Which computed chunks of prompts are kept, and where, so that nobody computes them twice.

Chunk i of any prompt lies at the same tokens of a slot, so a slot of the cache is a row of places: place i of one
slot may hold another prompt's chunk than place i + 1. The least recently used goes first, and of one prompt the last,
without whose predecessors it is worth nothing. It knows names and slots, nothing of tokens, tensors or memory.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class PrefixCache:
    slots: range                                        # of the KV store; none: nothing is kept
    _columns: defaultdict[int, OrderedDict[str, int]] = field(
        init=False, default_factory=lambda: defaultdict(OrderedDict))
    _order: OrderedDict[tuple[int, str], None] = field(init=False, default_factory=OrderedDict)

    def find(self, index: int, name: str) -> int | None:
        """The slot that holds chunk `index` under this name."""
        return self._columns[index].get(name)

    def use(self, names: Sequence[str]) -> None:
        """A prompt's chunks from its first on are the last to go."""
        for index in reversed(range(len(names))):
            name = names[index]
            if name in self._columns[index]:
                self._columns[index].move_to_end(name)
                self._order.move_to_end((index, name))

    def is_full(self, index: int) -> bool:
        return len(self._columns[index]) >= len(self.slots)

    def place(self, index: int, name: str) -> int:
        """The slot where chunk `index` is to be kept under this name, which it has not yet; it must not be full."""
        column = self._columns[index]
        taken = set(column.values())
        slot = column[name] = next(slot for slot in self.slots if slot not in taken)
        self._order[index, name] = None
        return slot

    def evict(self, index: int | None = None) -> tuple[int, int]:
        """Forgets the least recently used chunk, of that place if one is named. Its index, and the slot it leaves."""
        oldest = next(iter(self._order)) if index is None else (index, next(iter(self._columns[index])))
        del self._order[oldest]
        index, name = oldest
        return index, self._columns[index].pop(name)

    def forget(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Forgets a prompt's chunks, from its first on. The index of each that was kept, and the slot it leaves."""
        kept = [(index, name) for index, name in enumerate(names) if name in self._columns[index]]
        for place in kept:
            del self._order[place]
        return [(index, self._columns[index].pop(name)) for index, name in kept]

    @property
    def num_chunks(self) -> int:
        return len(self._order)
