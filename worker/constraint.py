"""What one choice must be, for the engine: which tokens may follow.

Of all choices of a step at once, without the interpreter lock; what takes long, in a thread beside the forward. It
knows grammars and token ids, nothing of jobs or tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from shared.grammar import Grammars

BRIEF_S = 0.0005                                        # of a step's masks: below, a thread costs more than it saves


class Masks:
    """Makes those of a step."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._last_s = 0.0

    def fill(self, matchers: list[tuple[LLMatcher, int]], bits: npt.NDArray[np.int32]) -> Future[None] | None:
        """Row by row, at once if the last ones were made in a moment; None: they are there."""
        if self._last_s > BRIEF_S:
            return self._thread.submit(self._fill, fill_next_token_bitmask_par, _executor(), matchers, bits)
        self._fill(_fill_in_turn, matchers, bits)
        return None

    def _fill(self, fill: Callable[..., None], *args: Any) -> None:
        began_s = time.perf_counter()
        fill(*args)
        self._last_s = time.perf_counter() - began_s


def _fill_in_turn(matchers: list[tuple[LLMatcher, int]], bits: npt.NDArray[np.int32]) -> None:
    address, num_bytes = bits.ctypes.data, bits.strides[0]
    for matcher, row in matchers:
        matcher.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)


MASKS = Masks()


@cache
def _executor() -> LLExecutor:
    """Made when it is first needed, since a fork would not have its thread."""
    return LLExecutor(1)


class GrammarConstraint:
    def __init__(self, matcher: LLMatcher, num_words: int, after: int | None = None, eos_token_ids: Sequence[int] = ()):
        self._matcher = matcher
        self._num_words = num_words                     # of 32 token ids each
        self._after = after                             # the token that has to come before it begins
        self._eos_token_ids = eos_token_ids
        self.is_broken = False                          # nothing can follow that it allows
        self._bits: npt.NDArray[np.int32] | None = None         # of what may follow, once `_future` is done
        self._future: Future[None] | None = None

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
        todo = [constraint for constraint in constraints if constraint._bits is None and constraint._after is None]
        if not todo:
            return
        bits = np.zeros((len(todo), todo[0]._num_words), dtype=np.int32)
        future = MASKS.fill([(constraint._matcher, row) for row, constraint in enumerate(todo)], bits)
        for row, constraint in enumerate(todo):
            constraint._bits, constraint._future = bits[row], future

    def allowed(self) -> npt.NDArray[np.int32]:
        if self._after is not None:
            return self._anything()
        if self._bits is None:
            self.prepare([self])
        self._wait()
        assert self._bits is not None
        return self._bits

    def _wait(self) -> None:
        if self._future is not None:
            self._future.result()
            self._future = None

    def _anything(self) -> npt.NDArray[np.int32]:
        bits = np.full(self._num_words, 2**32 - 1, dtype=np.uint32)
        for token_id in self._eos_token_ids:
            bits[token_id // 32] &= np.uint32(2**32 - 1 - (1 << token_id % 32))
        return bits.view(np.int32)

    def accept(self, token_id: int) -> None:
        if self._after is not None:
            self._after = None if token_id == self._after else self._after
            return
        self._wait()                                    # one thread at a time
        self._bits = None
        self.is_broken = not self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        return self._after is None and not self.is_broken and self._matcher.is_stopped()
