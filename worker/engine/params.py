"""The sampling parameters of one choice, prepared for the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.engine import rng

if TYPE_CHECKING:
    from shared.job import Sampling

MIN_TEMPERATURE = 1e-5      # below: greedy


@dataclass(slots=True)
class Params:
    """The parameters of one choice, as the sampler reads them at every step."""

    sampling: Sampling
    key: int
    stop_token_ids: list[int]       # not drawn before min_tokens
    bias: tuple[tuple[int, float], ...]
    is_greedy: bool
    is_truncated: bool
    is_penalized: bool
    is_plain: bool                  # one pass over the logits finds its token: the largest of logit plus noise

    @classmethod
    def of(cls, sampling: Sampling, choice: int, stop_token_ids: frozenset[int]) -> Params:
        bias = tuple(dict(sampling.logit_bias).items())
        is_truncated = sampling.top_p < 1 or sampling.top_k > 0
        is_penalized = (bool(sampling.presence_penalty or sampling.frequency_penalty)
                        or sampling.repetition_penalty != 1)
        return cls(sampling, rng.choice_key(sampling.seed, choice), sorted(stop_token_ids), bias,
                   is_greedy=sampling.temperature < MIN_TEMPERATURE, is_truncated=is_truncated,
                   is_penalized=is_penalized,
                   is_plain=not (is_truncated or is_penalized or bias or sampling.min_p > 0))
