"""Grammar constraints for the engine: which tokens may follow in each choice.

The masks of a step are made for all choices at once, without the interpreter lock, and beside the forward in a thread
if that takes long. A choice that mostly keeps its grammar unaided needs no mask. It knows grammars and token ids,
nothing of jobs or tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from shared.grammar import UNFORCED, Grammars

BRIEF_S = 0.0005                                        # for a step's masks: below, a thread costs more than it saves
MAY_TAKE_S = 0.002                                      # per token; the excess adds up to lateness,
MAX_LATE_S = 0.5                                        # which faster tokens reduce; the grammar is given up above this
MIN_WARY_TOKENS, MAX_WARY_TOKENS = 1, 128               # tokens drawn with a mask, after a refused token


class Masks:
    """Fills the token masks of a step."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._last_s = 0.0

    def fill(self, matchers: list[tuple[LLMatcher, int]], bits: npt.NDArray[np.int32]) -> Future[None] | None:
        """Fills one row per matcher. At once (None) if the last masks were quick, else in a thread."""
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
    """Created on first use, since its thread would not survive a fork."""
    return LLExecutor(1)


@dataclass(slots=True)
class Trust:
    """Whether a choice may draw before its mask is made. Trust is lost at a token that is not allowed, for longer the
    sooner that happens again; it returns after some tokens, whatever they would have been without masks."""

    _num_wary: int = 0                                  # tokens drawn with a mask until trust returns
    _num_lost: int = 0                                  # those at the last loss, minus one for each allowed token since

    @property
    def is_given(self) -> bool:
        return not self._num_wary

    def gain(self) -> None:
        """The choice drew an allowed token."""
        if self._num_wary:
            self._num_wary -= 1
        else:
            self._num_lost = max(0, self._num_lost - 1)

    def lose(self) -> None:
        """The choice drew a token that is not allowed. Without effect while it is not trusted: then masks decide."""
        if self.is_given:
            self._num_wary = self._num_lost = min(max(2 * self._num_lost, MIN_WARY_TOKENS), MAX_WARY_TOKENS)


class GrammarConstraint:
    def __init__(self, grammars: Grammars, grammar: str, after: int | None = None):
        """Raises InvalidGrammar."""
        self.is_complete, self.forced = False, list[int]()
        self._grammars, self._matcher = grammars, grammars.matcher(grammar)
        self._may_force = UNFORCED not in grammar
        self._last: list[int] = []                      # the last token accepted
        self._after = after                             # the token that must come before the grammar begins
        self._is_lost = False                           # the grammar was given up, or refuses a token drawn elsewhere
        self._late_s, self._clock = 0.0, time.perf_counter
        self._trust = Trust()
        self._bits: npt.NDArray[np.int32] | None = None         # of the allowed tokens, once `_future` is done
        self._future: Future[None] | None = None

    @classmethod
    def of(cls, grammars: Grammars, grammar: str, token_ids: Sequence[int], after: int | None = None
           ) -> Self:
        """The constraint of a choice that has drawn `token_ids`. Until the token `after` everything but an end is
        allowed. Raises InvalidGrammar."""
        constraint = cls(grammars, grammar, after)
        constraint._is_lost |= not all(map(constraint._goes_on, token_ids))
        constraint._look_ahead()
        return constraint

    @property
    def is_trusted(self) -> bool:
        return self._trust.is_given

    @staticmethod
    def prepare(constraints: Sequence[GrammarConstraint]) -> None:
        todo = [each for each in constraints if each._bits is None and each._after is None and not each.forced]
        if not todo:
            return
        bits = np.zeros((len(todo), todo[0]._grammars.num_words), dtype=np.int32)
        future = MASKS.fill([(constraint._matcher, row) for row, constraint in enumerate(todo)], bits)
        for row, constraint in enumerate(todo):
            constraint._bits, constraint._future = bits[row, :constraint._num_words], future
            constraint._trust.lose()

    def allowed(self) -> npt.NDArray[np.int32]:
        if self._after is not None:
            return ~self._only(self._grammars.eos_token_ids)
        return self._only(self.forced[:1]) if self.forced else self._mask()

    def _mask(self) -> npt.NDArray[np.int32]:
        if self._bits is None:
            self.prepare([self])
        if self._future is not None:
            self._future.result()
            self._future = None
        assert self._bits is not None
        return self._bits

    def _only(self, token_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        bits = np.zeros(self._num_words, dtype=np.uint32)
        for token_id in token_ids:
            bits[token_id // 32] |= np.uint32(1 << token_id % 32)
        return bits.view(np.int32)

    @property
    def _num_words(self) -> int:
        """32 token ids per word."""
        return -(-self._grammars.vocab_size // 32)

    def accept(self, token_id: int) -> bool:
        if self._after is not None:
            if token_id in self._grammars.eos_token_ids:
                return False
        elif self._is_lost or not self._is_named(token_id):
            return False
        began_s = self._clock()
        if has_taken := self._goes_on(token_id):
            self._look_ahead()
            self._trust.gain()
        self._note(self._clock() - began_s)
        return has_taken

    def _is_named(self, token_id: int) -> bool:
        """Whether the mask allows a token. Without a mask: forced text must come in the tokenizer's own tokens, though
        the grammar would accept others; an end needs the mask; the rest is left to the grammar."""
        if self.forced:
            return token_id == self.forced[0]
        if self._bits is None and token_id not in self._grammars.eos_token_ids:
            return True
        return bool(int(self._mask()[token_id // 32]) >> token_id % 32 & 1)

    def _goes_on(self, token_id: int) -> bool:
        """Advances by a token. False: it is not allowed, or the grammar was given up."""
        if self._is_lost:
            return False
        if self._after is not None:
            self._after = None if token_id == self._after else self._after
            return True
        if token_id in self._grammars.eos_token_ids:    # which a part of the grammar may use as its terminator
            has_taken = not self._matcher.is_error() and self._matcher.consume_token(token_id)
        else:
            has_taken = self._matcher.try_consume_tokens([token_id]) == 1
        if has_taken:
            self._last, self._bits = [token_id], None
        return has_taken

    def _note(self, took_s: float) -> None:
        """Gives up a grammar that is slow at every token: the rest of the batch would wait for it. What counts is CPU
        time, without other processes' time; its clock takes longer than most tokens, so it is read from the first
        slow token on."""
        if self._clock is time.thread_time:
            self._late_s = max(0.0, self._late_s + took_s - MAY_TAKE_S)
            self._is_lost |= self._late_s > MAX_LATE_S
        elif took_s > MAY_TAKE_S:
            self._clock = time.thread_time

    def _look_ahead(self) -> None:
        """Finds the forced tokens, as the tokenizer would split the text, none if special tokens would be needed; and
        whether the answer is complete. A failed matcher is stopped too, but not complete."""
        if self._after is not None or self._is_lost:
            return
        self.forced = []
        if self._may_force and (text := self._matcher.compute_ff_bytes()):
            token_ids = self._grammars.token_ids(text, self._last)
            can_follow = all(token_id < self._grammars.vocab_size for token_id in token_ids)
            self.forced = token_ids if can_follow and self._matcher.validate_tokens(token_ids[:1]) else []
        self.is_complete = self._matcher.is_stopped() and not self._matcher.is_error()
