"""What one choice must be, for the engine: which tokens may follow, found out in a thread beside the forward.

Of all choices of a step at once, and without the interpreter lock. It knows grammars and token ids, nothing of jobs or
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from shared.grammar import Grammars

THREADS = ThreadPoolExecutor(1, thread_name_prefix="grammar")       # a mask takes some 50 µs


@cache
def executor() -> LLExecutor:
    """Made when it is first needed, since a fork would not have its thread."""
    return LLExecutor(1)


class GrammarConstraint:
    def __init__(self, matcher: LLMatcher, num_words: int, after: int | None = None, eos_token_ids: Sequence[int] = ()):
        self._matcher = matcher
        self._num_words = num_words                     # of 32 token ids each
        self._after = after                             # the token that has to come before it begins
        self._eos_token_ids = eos_token_ids
        self._found: tuple[Future[None], npt.NDArray[np.int32]] | None = None

    @classmethod
    def of(cls, grammars: Grammars, grammar: str, token_ids: Sequence[int], after: int | None = None
           ) -> GrammarConstraint:
        """Of a choice that has drawn these; until the token `after` it may say anything, but not end. Raises
        InvalidGrammar."""
        constraint = cls(grammars.matcher(grammar), -(-grammars.vocab_size // 32), after, grammars.eos_token_ids)
        for token_id in token_ids:
            constraint.accept(token_id)
        return constraint

    @staticmethod
    def prepare(constraints: Sequence[GrammarConstraint]) -> None:
        todo = [constraint for constraint in constraints if constraint._found is None and constraint._after is None]
        if not todo:
            return
        bits = np.zeros((len(todo), todo[0]._num_words), dtype=np.int32)
        matchers = [(constraint._matcher, row) for row, constraint in enumerate(todo)]
        future = THREADS.submit(fill_next_token_bitmask_par, executor(), matchers, bits)
        for row, constraint in enumerate(todo):
            constraint._found = future, bits[row]

    def allowed(self) -> npt.NDArray[np.int32]:
        if self._after is not None:
            return self._anything()
        self.prepare([self])
        assert self._found
        future, bits = self._found
        future.result()
        return bits

    def _anything(self) -> npt.NDArray[np.int32]:
        bits = np.full(self._num_words, 2**32 - 1, dtype=np.uint32)
        for token_id in self._eos_token_ids:
            bits[token_id // 32] &= np.uint32(2**32 - 1 - (1 << token_id % 32))
        return bits.view(np.int32)

    def accept(self, token_id: int) -> None:
        if self._after is not None:
            self._after = None if token_id == self._after else self._after
            return
        if self._found:
            self._found[0].result()                     # one thread at a time
            self._found = None
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        return self._after is None and self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_broken(self) -> bool:
        return self._matcher.is_error()
