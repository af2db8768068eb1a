"""Computed chunks of prompts in memory that no sequence needs: copied to those that begin alike, evicted when memory is
asked for. prefix.py decides which and where; here keys and values are moved. It knows slots, nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from worker.engine.prefix import PrefixCache
from worker.engine.scheduler import Span
from worker.engine.sequence import Sequence
from worker.engine.store import KV


class Chunks:
    def __init__(self, kv: KV, slots: range, chunk_len: int):
        """Keeps chunks of `chunk_len` tokens in `slots` of the store, which are never given to sequences."""
        self.cache = PrefixCache(slots)
        self._kv, self.chunk_len = kv, chunk_len

    @property
    def num_available_pages(self) -> int:
        """Pages not owned by sequences; chunks can be evicted."""
        return self._kv.num_pages - self._kv.num_owned_pages

    def make_room(self, num_pages: int) -> bool:
        """Evicts chunks, never running sequences. False: even that would not free enough pages."""
        if self.num_available_pages < num_pages:
            return False
        while self._kv.num_free_pages < num_pages:
            self._evict()
        return True

    def reuse(self, leader: Sequence, prefix: Several[str]) -> None:
        """Copies the chunks that follow what is computed of a prompt, as far as they are kept; all computed on one
        grid, they have the bits that this prompt would get."""
        for index in range(leader.num_computed_tokens // self.chunk_len, len(prefix)):
            slot = self.cache.find(index, prefix[index])
            if slot is None:
                break
            self._kv.copy(slot, leader.slot, *self._tokens(index))
            leader.num_computed_tokens += self.chunk_len
            leader.num_cached_tokens += self.chunk_len
            self.cache.use(prefix[:index + 1])

    def keep(self, span: Span, prefix: Several[str]) -> None:
        """Keeps a chunk that was just computed, if it is whole and there is room."""
        index = span.begin // self.chunk_len
        if index >= len(prefix) or self.cache.find(index, prefix[index]) is not None:
            return
        if self.cache.is_full(index):
            self._evict(index)
        if self.make_room(self._kv.num_pages_to_keep(span.begin, span.end)):
            slot = self.cache.place(index, prefix[index])
            self.cache.use(prefix[:index + 1])
            self._kv.keep(span.slot, slot, span.begin, span.end)

    def forget(self, prefix: Several[str]) -> None:
        for place in self.cache.forget(prefix):
            self._drop(*place)

    def drop_all(self) -> None:
        while self.cache.num_chunks:
            self._evict()

    def _evict(self, index: int | None = None) -> None:
        self._drop(*self.cache.evict(index))

    def _drop(self, index: int, slot: int) -> None:
        self._kv.drop(slot, *self._tokens(index))

    def _tokens(self, index: int) -> tuple[int, int]:
        return index * self.chunk_len, (index + 1) * self.chunk_len
