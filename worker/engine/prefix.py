"""Which computed chunks of prompts are kept, and where, so that none is computed twice.

Chunk i of any prompt is at the same tokens of a slot, so a slot of the cache is a row of places: place i of a slot may
hold a chunk of another prompt than place i + 1. The least recently used chunk is evicted first, and of one prompt the
last, which is useless without its predecessors. It knows names and slots, nothing of tokens, tensors or memory.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class PrefixCache:
    slots: range                                        # of the KV store; empty: nothing is kept
    _columns: defaultdict[int, OrderedDict[str, int]] = field(
        init=False, default_factory=lambda: defaultdict(OrderedDict))
    _order: OrderedDict[tuple[int, str], None] = field(init=False, default_factory=OrderedDict)

    def find(self, index: int, name: str) -> int | None:
        """The slot that holds chunk `index` under this name."""
        return self._columns[index].get(name)

    def use(self, names: Sequence[str]) -> None:
        """Marks the chunks of a prompt as used: they are evicted last, the first chunk after the others."""
        for index in reversed(range(len(names))):
            name = names[index]
            if name in self._columns[index]:
                self._columns[index].move_to_end(name)
                self._order.move_to_end((index, name))

    def is_full(self, index: int) -> bool:
        return len(self._columns[index]) >= len(self.slots)

    def place(self, index: int, name: str) -> int:
        """The slot in which to keep chunk `index` under this name, which must be new; there must be a free one."""
        column = self._columns[index]
        taken = set(column.values())
        slot = column[name] = next(slot for slot in self.slots if slot not in taken)
        self._order[index, name] = None
        return slot

    def evict(self, index: int | None = None) -> tuple[int, int]:
        """Forgets the least recently used chunk, at place `index` if given. Returns its index, and its slot."""
        oldest = next(iter(self._order)) if index is None else (index, next(iter(self._columns[index])))
        del self._order[oldest]
        index, name = oldest
        return index, self._columns[index].pop(name)

    def forget(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Forgets the chunks of a prompt, from its first on. Returns the index and the slot of each that was kept."""
        kept = [(index, name) for index, name in enumerate(names) if name in self._columns[index]]
        for place in kept:
            del self._order[place]
        return [(index, self._columns[index].pop(name)) for index, name in kept]

    @property
    def num_chunks(self) -> int:
        return len(self._order)
