"""Which computed chunks of prompts are kept, and where, so that nobody computes them twice.

Chunk i of any prompt lies at the same tokens of a slot, so a slot of the cache is a row of places: place i of one
slot may hold another prompt's chunk than place i + 1. Of each column the least recently used goes first. It knows
names and slots, nothing of tokens or tensors.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

FORGOTTEN = "!"                                         # no name begins so


@dataclass(slots=True)
class PrefixCache:
    slots: range                                        # of the KV store; none: nothing is kept
    _columns: defaultdict[int, OrderedDict[str, int]] = field(
        init=False, default_factory=lambda: defaultdict(OrderedDict))

    def find(self, index: int, name: str) -> int | None:
        """The slot that holds chunk `index` under this name, and will be the last one to go."""
        column = self._columns[index]
        if name in column:
            column.move_to_end(name)
        return column.get(name)

    def place(self, index: int, name: str) -> int | None:
        """The slot where chunk `index` is to be kept under this name: a free one, else the least recently used."""
        column = self._columns[index]
        if not self.slots or name in column:
            return None
        slot = self.slots[len(column)] if len(column) < len(self.slots) else column.popitem(last=False)[1]
        column[name] = slot
        return slot

    def forget(self, names: Iterable[str]) -> None:
        """These chunks are never found again, and their places go first."""
        for index, name in enumerate(names):
            column = self._columns[index]
            if name in column:
                column[FORGOTTEN + name] = column.pop(name)
                column.move_to_end(FORGOTTEN + name, last=False)
