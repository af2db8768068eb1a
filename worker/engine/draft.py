"""Drafts of the next tokens: what followed the same few tokens before, in the prompt or in the answer.

A draft token is computed as one more row of a forward, and accepted if it equals the token drawn: it never changes an
answer. A sequence whose drafts fail drafts fewer tokens, and pauses. This is prompt lookup decoding, as in vLLM's
n-gram method. It knows token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NGRAM_TOKENS = 3
FIRST_TOKENS = 2                                        # of the first draft
PAUSE_FACTOR = 4                                        # between successive pauses, while every draft fails
MAX_PAUSE_STEPS = 64


@dataclass(slots=True)
class Drafter:
    """Drafts for one sequence."""

    max_tokens: int                                     # per draft
    _history: list[int] = field(init=False, default_factory=list)
    _behind: dict[tuple[int, ...], int] = field(init=False, default_factory=dict)   # n-gram → where it ended last
    _ngram: tuple[int, ...] = field(init=False, default=())         # the last one
    _num_tokens: int = field(init=False, default=FIRST_TOKENS)
    has_found: bool = field(init=False, default=False)  # what the last n-gram had been followed by
    _pause_steps: int = field(init=False, default=0)
    _next_pause_steps: int = field(init=False, default=1)           # after one more miss in a row

    @property
    def is_pausing(self) -> bool:
        """The next call proposes nothing, without a search."""
        return self._pause_steps > 0

    def propose(self, prompt: Sequence[int], drawn: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens; none when the n-gram has not occurred before."""
        if self._pause_steps:
            self._pause_steps -= 1
            return []
        self._learn_history(prompt, drawn)
        history = self._history
        begin = self._behind.get(self._ngram)
        self.has_found = begin is not None
        if begin is None:
            return []
        period = len(history) - begin                   # a repetition is assumed to continue
        return [history[begin + i % period] for i in range(min(most, self._num_tokens, self.max_tokens))]

    def skip(self) -> None:
        """Lets a step go by without a draft."""
        self._pause_steps = max(0, self._pause_steps - 1)

    def _learn_history(self, prompt: Sequence[int], drawn: Sequence[int]) -> None:
        history = self._history
        if not history:
            history += prompt
            ngrams = zip(*(history[begin:] for begin in range(NGRAM_TOKENS)), strict=False)
            self._behind = dict(zip(ngrams, range(NGRAM_TOKENS, len(history)), strict=False))
            self._ngram = tuple(history[-NGRAM_TOKENS:])
        for token_id in drawn[len(history) - len(prompt):]:
            self._behind[self._ngram] = len(history)
            history.append(token_id)
            self._ngram = (*self._ngram[1 - NGRAM_TOKENS:], token_id)

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Records the outcome of the last draft."""
        self._num_tokens = 2 * num_drafted if num_accepted == num_drafted else max(1, num_accepted)
        if num_accepted:
            self._next_pause_steps = 1
        else:
            self._pause_steps = self._next_pause_steps
            self._next_pause_steps = min(PAUSE_FACTOR * self._next_pause_steps, MAX_PAUSE_STEPS)
