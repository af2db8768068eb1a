"""What enters and leaves the engine, and the bounds that keep one request from harming a batch.

It knows token ids and numbers. It knows nothing of text, jobs or Redis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from worker.engine.sampler import Logprobs

if TYPE_CHECKING:
    from shared.job import Sampling

NOT_A_NUMBER = "not a number"                       # reasons of failure: its logits were NaN,
OUT_OF_MEMORY = "out of memory"                     # a step had no memory for it alone,
NO_WAY_ON = "its form is too complex"               # or its constraint could not be followed within the limits
FAILURES = (NOT_A_NUMBER, OUT_OF_MEMORY, NO_WAY_ON)

MAX_LOGPROBS = 64
MAX_BIAS = 65_536
MAX_PENALTY = 1e4


class Constraint(Protocol):
    """A constraint on one choice, in its current state."""

    @property
    def is_complete(self) -> bool:
        """No token may follow."""

    @property
    def forced(self) -> list[int]:
        """Tokens that must follow, in order, perhaps only some of the first; empty if more than one may follow."""

    @property
    def is_trusted(self) -> bool:
        """Its draws are mostly allowed: it may draw first, and be checked afterwards."""

    @staticmethod
    def prepare(constraints: Sequence[Any]) -> None:
        """Starts computing which tokens may follow, for each of them, beside whatever runs."""

    def allowed(self) -> npt.NDArray[np.int32]:
        """One bit per token id that may follow, 32 in each element."""

    def accept(self, token_id: int) -> bool:
        """Advances by a token. False: the token is not allowed and nothing has changed, or the constraint cannot be
        followed any further."""


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    n: int = 1
    continued: tuple[tuple[int, ...], ...] = ()     # per choice, tokens already drawn and published: replayed
    finished: frozenset[int] = frozenset()          # choices that already ended
    salt: str = ""                                  # only requests of one salt share computed prefixes
    constraints: tuple[Constraint, ...] = ()        # one per choice, in its current state; or none

    def continued_token_ids(self, index: int) -> tuple[int, ...]:
        return self.continued[index] if self.continued else ()

    @property
    def live_choices(self) -> list[int]:
        return [index for index in range(self.n) if index not in self.finished]


@dataclass(frozen=True, slots=True)
class Output:
    """One choice gained tokens in this step, or ended."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]                  # one per token id, if requested
    finish_reason: str | None                       # "stop" (its token is in token_ids), "length", a failure; not yet
    num_cached_tokens: int = 0                      # prompt tokens found in the cache; on a choice's first output


def validate(request: Request, *, vocab_size: int, max_model_len: int, max_choices: int) -> None:
    """Raises ValueError, with one line for the log, for whatever could break a batch."""
    sampling = request.sampling
    num_prompt_tokens = len(request.prompt_token_ids)
    _require(num_prompt_tokens > 0, "the prompt is empty")
    _require(sampling.max_tokens >= 1, "max_tokens is less than 1")
    _require(num_prompt_tokens + sampling.max_tokens <= max_model_len,
             f"{num_prompt_tokens} prompt tokens and {sampling.max_tokens} more exceed {max_model_len}")
    _require(1 <= request.n <= max_choices, f"n is {request.n}, not within 1 and {max_choices}")
    _require(len(request.continued) in (0, request.n), "continued and n differ")
    _require(len(request.constraints) in (0, request.n), "constraints and n differ")
    _require(request.finished < frozenset(range(request.n)), "finished names no choice, or all of them")
    _require(all(len(ids) <= sampling.max_tokens for ids in request.continued), "continued exceeds max_tokens")
    for name, token_ids in (
            ("prompt", request.prompt_token_ids), ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
            *(("continued", ids) for ids in request.continued)):
        _require_ids(name, token_ids, vocab_size)
    _validate_sampling(sampling, vocab_size)


def _validate_sampling(sampling: Sampling, vocab_size: int) -> None:
    _require(0 <= sampling.seed < 2**64, "seed is not of 64 bits")
    _require(isfinite(sampling.temperature) and sampling.temperature >= 0, "temperature is negative or no number")
    _require(0 <= sampling.top_p <= 1, "top_p is not within 0 and 1")
    _require(0 <= sampling.min_p <= 1, "min_p is not within 0 and 1")
    _require(sampling.top_k >= 0, "top_k is negative")
    _require(0 < sampling.repetition_penalty <= MAX_PENALTY, "repetition_penalty is not positive, or too large")
    _require(all(abs(x) <= MAX_PENALTY for x in (sampling.presence_penalty, sampling.frequency_penalty)),
             "a penalty is too large or no number")
    _require(all(isfinite(value) for _, value in sampling.logit_bias), "a logit_bias is not finite")
    _require(len(sampling.logit_bias) <= MAX_BIAS, "logit_bias is too long")
    _require(0 <= (sampling.num_logprobs or 0) <= min(MAX_LOGPROBS, vocab_size), "num_logprobs is too large")
    _require(sampling.min_tokens >= 0, "min_tokens is negative")


def _require_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    _require(all(0 <= token_id < vocab_size for token_id in token_ids), f"{name}: ids outside the vocabulary")


def _require(is_true: bool, otherwise: str) -> None:
    if not is_true:
        raise ValueError(otherwise)
