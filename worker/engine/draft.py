"""Guesses of what comes next: what followed the same few tokens before, in the prompt or in the answer.

A guess is computed as one more row of a forward, and kept where it is what would have been drawn anyway: it never
changes an answer. Whoever guesses wrong guesses less, and pauses. Prompt lookup decoding, as vLLM's n-gram method has
it. It knows token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NGRAM_TOKENS = 3
FIRST_TOKENS = 2                                        # of a guess by who has not guessed yet
MAX_PAUSE_STEPS = 64


@dataclass(slots=True)
class Drafter:
    """For one sequence."""

    max_tokens: int                                     # of one guess
    _history: list[int] = field(init=False, default_factory=list)
    _behind: dict[tuple[int, ...], int] = field(init=False, default_factory=dict)   # n-gram → where it ended last
    _num_tokens: int = field(init=False, default=FIRST_TOKENS)
    _pause_steps: int = field(init=False, default=0)
    _next_pause_steps: int = field(init=False, default=1)           # after one more miss in a row

    def propose(self, prompt: Sequence[int], drawn: Sequence[int], most: int) -> list[int]:
        """At most so many tokens, none when nothing like this was seen."""
        if self._pause_steps:
            self._pause_steps -= 1
            return []
        self._learn_history(prompt, drawn)
        history = self._history
        begin = self._behind.get(tuple(history[-NGRAM_TOKENS:]))
        if begin is None:
            return []
        period = len(history) - begin                   # what repeats once is taken to repeat again
        return [history[begin + i % period] for i in range(min(most, self._num_tokens, self.max_tokens))]

    def _learn_history(self, prompt: Sequence[int], drawn: Sequence[int]) -> None:
        history = self._history
        if not history:
            history += prompt
            ends = range(NGRAM_TOKENS, len(history))
            self._behind = {tuple(history[end - NGRAM_TOKENS:end]): end for end in ends}
        for token_id in drawn[len(history) - len(prompt):]:
            if len(history) >= NGRAM_TOKENS:
                self._behind[tuple(history[-NGRAM_TOKENS:])] = len(history)
            history.append(token_id)

    def learn(self, num_guessed: int, num_right: int) -> None:
        """What became of the last guess."""
        self._num_tokens = 2 * num_guessed if num_right == num_guessed else max(1, num_right)
        if num_right:
            self._next_pause_steps = 1
        else:
            self._pause_steps = self._next_pause_steps
            self._next_pause_steps = min(2 * self._next_pause_steps, MAX_PAUSE_STEPS)
