"""Computed pieces of prompts in memory that no sequence needs: copied to those that begin alike, evicted when memory is
asked for. prefix.py decides which and where; here keys and values are moved. It knows slots, nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from itertools import groupby, takewhile

from worker.engine.prefix import Place, PrefixCache
from worker.engine.scheduler import Span
from worker.engine.sequence import Sequence
from worker.engine.store import KV


class Chunks:
    def __init__(self, kv: KV, piece_len: int, *, keeps: bool):
        """Keeps pieces of `piece_len` tokens in slots of the store that are never given to sequences."""
        self.cache = PrefixCache(kv.kept_slots if keeps else range(0))
        self.piece_len = piece_len
        self._kv = kv

    @property
    def keeps(self) -> bool:
        return bool(self.cache.slots)

    @property
    def num_available_pages(self) -> int:
        """Pages not owned by sequences; pieces can be evicted."""
        return self._kv.num_pages - self._kv.num_owned_pages

    def make_room(self, num_pages: int) -> bool:
        """Evicts pieces, never running sequences. False: even that would not free enough pages."""
        if self.num_available_pages < num_pages:
            return False
        while self._kv.num_free_pages < num_pages:
            self._evict()
        return True

    def reuse(self, leader: Sequence, prefix: Several[str]) -> None:
        """Copies the pieces that follow what is computed of a prompt, as far as they are kept; all computed on one
        grid, they have the bits that this prompt would get."""
        if leader.num_computed_tokens >= len(prefix) * self.piece_len:
            return
        first, rest = divmod(leader.num_computed_tokens, self.piece_len)
        if rest:
            return
        found = list(takewhile(lambda place: place[1] is not None, (
            (index, self.cache.find(index, prefix[index])) for index in range(first, len(prefix)))))
        for slot, places in groupby(found, key=lambda place: place[1]):
            assert slot is not None
            run = [index for index, _ in places]
            begin, end = self._tokens(run[0], run[-1] + 1)
            self._kv.copy(slot, leader.slot, begin, end)
            leader.num_computed_tokens += end - begin
            leader.num_cached_tokens += end - begin
        if found:
            self.cache.use(prefix[:first + len(found)])

    def keep(self, span: Span, prefix: Several[str]) -> None:
        """Keeps the pieces that were computed in a span, while there is room; those of one page together."""
        index, last = -(-span.begin // self.piece_len), min(span.end // self.piece_len, len(prefix))
        while index < last:
            end = index + 1
            if self.cache.find(index, prefix[index]) is None:
                while end < last and end * self.piece_len % self._kv.page_len and (
                        self.cache.find(end, prefix[end]) is None):
                    end += 1
                if not self._keep(span.slot, index, prefix[:end]):
                    return
            index = end

    def _keep(self, source: int, first: int, names: Several[str]) -> bool:
        begin, end = self._tokens(first, len(names))
        beside = self.cache.find(first - 1, names[first - 1]) if first else None
        slot, in_the_way = self.cache.choose(first, len(names), beside)
        for index in in_the_way:
            self._drop(self.cache.evict((index, slot)))
        if not self.make_room(self._kv.num_pages_to_keep(source, slot, begin, end)):
            return False
        self.cache.place(first, names[first:], slot)
        self.cache.use(names)
        self._kv.keep(source, slot, begin, end)
        return True

    def forget(self, prefix: Several[str]) -> None:
        for place in self.cache.forget(prefix):
            self._drop(place)

    def drop_all(self) -> None:
        while self.cache.num_pieces:
            self._evict()

    def _evict(self) -> None:
        self._drop(self.cache.evict())

    def _drop(self, place: Place) -> None:
        index, slot = place
        self._kv.drop(slot, *self._tokens(index, index + 1))

    def _tokens(self, first: int, last: int) -> tuple[int, int]:
        """Of pieces [first, last)."""
        return first * self.piece_len, last * self.piece_len
