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
    _num_known: int = field(init=False, default=0)      # tokens, prompt and drawn ones
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

    def search(self, prompt: Sequence[int], drawn: Sequence[int]) -> bool:
        """Whether the last n-gram has occurred before, so that there is something to propose. Not while it pauses."""
        if self._pause_steps:
            self._pause_steps -= 1
            return False
        if not self._num_known:
            self._learn_prompt(prompt)
        behind, ngram, num_prompt = self._behind, self._ngram, len(prompt)
        for place in range(self._num_known, num_prompt + len(drawn)):
            behind[ngram] = place
            ngram = (*ngram[1 - NGRAM_TOKENS:], drawn[place - num_prompt])
        self._ngram, self._num_known = ngram, num_prompt + len(drawn)
        self.has_found = ngram in behind
        return self.has_found

    def _learn_prompt(self, prompt: Sequence[int]) -> None:
        ngrams = zip(*(prompt[begin:] for begin in range(NGRAM_TOKENS)), strict=False)
        self._behind = dict(zip(ngrams, range(NGRAM_TOKENS, len(prompt)), strict=False))
        self._ngram, self._num_known = tuple(prompt[-NGRAM_TOKENS:]), len(prompt)

    def propose(self, prompt: Sequence[int], drawn: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens, after a search that found some."""
        behind = range(self._behind[self._ngram], self._num_known)
        places = [behind[i % len(behind)]               # a repetition is assumed to continue
                  for i in range(min(most, self._num_tokens, self.max_tokens))]
        return [prompt[place] if place < len(prompt) else drawn[place - len(prompt)] for place in places]

    def skip(self) -> None:
        """Lets a step go by without a draft."""
        self._pause_steps = max(0, self._pause_steps - 1)

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Records the outcome of the last draft."""
        self._num_tokens = 2 * num_drafted if num_accepted == num_drafted else max(1, num_accepted)
        if num_accepted:
            self._next_pause_steps = 1
        else:
            self._pause_steps = self._next_pause_steps
            self._next_pause_steps = min(PAUSE_FACTOR * self._next_pause_steps, MAX_PAUSE_STEPS)
