"""One choice of a request, from its slot to its last token, and the choices of a request that run together.

They know their counts; what to do next is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from worker.engine.draft import Drafter
from worker.engine.params import Params
from worker.engine.sampler import Draw

if TYPE_CHECKING:
    from shared.job import Sampling
    from worker.engine.request import Constraint

WAITING = -1    # for a slot
PENDING = -1    # in place of a token id that only the device knows yet

# [0, num_computed_tokens)            keys and values are in the slot
# [num_computed_tokens, num_tokens)   to be computed: the prompt's chunks, replayed tokens, or the one just drawn, which
#                                     may be pending: drawn by a step whose outcome is still on its way from the device


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    params: Params
    output_token_ids: list[int] = field(default_factory=list)
    num_pending_tokens: int = 0                         # after the output
    slot: int = WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0                          # prompt tokens that were copied, not computed
    num_reprefilled_tokens: int = 0                     # tokens of an earlier run, prefilled and not replayed
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    draft_token_ids: list[int] = field(default_factory=list)        # to be verified by the next step

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.index

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.num_output_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def is_complete(self) -> bool:
        """Its last token is drawn, as far as its length tells; while that is pending, an earlier end is possible."""
        return self.num_output_tokens >= self.sampling.max_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens computed in chunks: the prompt, which siblings copy, then tokens that are not replayed."""
        num_prompt = self.num_prompt_tokens
        return num_prompt if self.num_computed_tokens < num_prompt else num_prompt + self.num_reprefilled_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    def token_ids(self, begin: int, end: int) -> list[int]:
        num_prompt = self.num_prompt_tokens
        drawn = self.output_token_ids[max(begin - num_prompt, 0):max(end - num_prompt, 0)]
        return [*self.prompt_token_ids[begin:end], *drawn]

    def token_id(self, position: int) -> int:
        """The token at a position, drafts after the known tokens included, or `PENDING`."""
        if (beyond := position - len(self.prompt_token_ids)) < 0:
            return self.prompt_token_ids[position]
        if (place := beyond - len(self.output_token_ids)) >= 0:
            return PENDING if self.num_pending_tokens else self.draft_token_ids[place]
        return self.output_token_ids[beyond]

    @property
    def asks_first(self) -> bool:
        """Whether its mask is made before the draw. Others draw without a mask and are checked afterwards, since the
        likeliest token is mostly an allowed one."""
        return self.constraint is not None and not (
            self.params.is_plain and not self.sampling.min_tokens and self.constraint.is_trusted)

    @property
    def may_draft(self) -> bool:
        return self.drafter is not None and not self.drafter.is_pausing and not self.asks_first

    @property
    def finds_drafts(self) -> bool:
        return self.drafter is not None and self.drafter.has_found

    def searches_draft(self) -> bool:
        """Whether there is something to draft. Only known tokens can be extended."""
        drafter = self.drafter
        if drafter is None or (self.constraint and self.asks_first):
            return False
        if self.num_pending_tokens:
            drafter.skip()
            return False
        return drafter.search(self.prompt_token_ids, self.output_token_ids)

    def draft(self, most: int) -> int:
        """Drafts at most `most` tokens, none after the last possible one; returns how many."""
        assert self.drafter
        num_left = self.sampling.max_tokens - len(self.output_token_ids) - 1
        self.draft_token_ids = self.drafter.propose(self.prompt_token_ids, self.output_token_ids, min(most, num_left))
        return len(self.draft_token_ids)

    def accept(self, draws: list[Draw]) -> list[Draw] | None:
        """Accepts the draft as far as it equals the draws, and one more token; later rows were computed in vain. The
        constraint has accepted the first draw. None: the logits were NaN."""
        draft, self.draft_token_ids = self.draft_token_ids, []
        self.num_pending_tokens -= 1
        taken = list[Draw]()
        for draw, expected in zip_longest(draws, draft):
            if not draw.is_valid:
                return None
            if taken and self.constraint and not self.constraint.accept(draw.token_id):
                self.num_computed_tokens -= 1           # the last one is computed again, to draw what may follow
                break
            taken.append(draw)
            self.output_token_ids.append(draw.token_id)
            if draw.token_id != expected or self.finish_reason:
                break
            self.num_computed_tokens += 1
        if self.drafter and draft:
            self.drafter.learn(len(draft), len(taken) - 1)
        return taken

    def allowed(self) -> npt.NDArray[np.int32] | None:
        """The tokens that its constraint allows; below min_tokens without those that end it, if others may follow."""
        allowed = self.constraint.allowed() if self.constraint else None
        if allowed is None or self.num_output_tokens >= self.sampling.min_tokens:
            return allowed
        longer = allowed.view(np.uint32).copy()
        for token_id in self.params.stop_token_ids:
            longer[token_id // 32] &= np.uint32(2**32 - 1 - (1 << token_id % 32))
        return longer.view(np.int32) if longer.any() else allowed

    @property
    def forced(self) -> list[int]:
        """The tokens that must follow in any case. With penalties, which count the sampler's draws, or log
        probabilities, which come from logits, they are drawn like all others."""
        if self.constraint is None or self.params.is_penalized or self.sampling.num_logprobs is not None:
            return []
        return self.constraint.forced

    def take_forced(self, most: int) -> list[Draw]:
        """Takes forced tokens without a forward; the next one computes them as if they were replayed."""
        taken = list[Draw]()
        while (forced := self.forced) and self.constraint and len(taken) < most:
            if self.finish_reason or not self.constraint.accept(forced[0]):
                break
            taken.append(Draw(forced[0], None, True))
            self.output_token_ids.append(forced[0])
        return taken

    def restart(self) -> None:
        """Back to waiting, without a slot; the tokens drawn so far are kept, and replayed."""
        assert not self.num_pending_tokens, f"{self!r} gives way, and what it has drawn is not known"
        self.slot, self.num_computed_tokens, self.num_cached_tokens = WAITING, 0, 0
        self.draft_token_ids = []

    @property
    def finish_reason(self) -> str | None:
        if not self.output_token_ids:
            return None
        is_stopped = self.output_token_ids[-1] in self.params.stop_token_ids and (
            len(self.output_token_ids) > self.sampling.min_tokens)
        if is_stopped or (self.constraint and self.constraint.is_complete):
            return "stop"
        return "length" if len(self.output_token_ids) >= self.sampling.max_tokens else None

    def __repr__(self) -> str:
        return (f"<Sequence {self.request_id}/{self.index} slot {self.slot}, "
                f"{self.num_computed_tokens}/{self.num_tokens} computed>")


@dataclass(slots=True, eq=False)
class Group:
    """Choices of one request; the first of them computes the prompt for all."""

    number: int                                         # in order of arrival: the youngest is preempted first
    sequences: dict[int, Sequence]
    prefix: tuple[str, ...]                             # names of the prompt's whole pieces (shared/prefix.py)
    salt: str                                           # of those names

    @property
    def leader(self) -> Sequence:
        return next(iter(self.sequences.values()))

    @property
    def is_prefilled(self) -> bool:
        leader = self.leader
        return leader.num_computed_tokens >= len(leader.prompt_token_ids)

    @property
    def computing(self) -> Iterable[Sequence]:
        return self.sequences.values() if len(self.sequences) == 1 or self.is_prefilled else [self.leader]
