"""What fails and when: a pure function of a seed. It knows names of faults, and nothing of processes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["kill worker", "freeze worker", "end worker", "cut", "swallow", "delay", "half-open", "kill redis",
               "kill pod", "end pod"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# How often each kind is in the deck, which is dealt to its end before it is shuffled anew.
DECK: dict[Kind, int] = {"kill worker": 3, "freeze worker": 2, "end worker": 2, "cut": 2, "swallow": 2, "delay": 1,
                         "half-open": 1, "kill redis": 1, "kill pod": 1, "end pod": 1}
GAP_S = 1.1                                             # between faults, on average
MIN_GAP, MAX_GAP = 0.6, 1.4                             # of that
FROZEN_LEASES = (1.2, 3.2)                              # a worker that wakes has lost its jobs
HALF_OPEN_LEASES = (0.2, 2.0)
REDIS_AWAY_S = (0.1, 1.0)
DELAY_S = 0.1                                           # each way
DELAYED_S = 1.5


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float                                         # since the run began
    kind: Kind
    draw: float                                         # in [0, 1): which possible target
    for_s: float = 0.0                                  # duration, if it has one

    def __str__(self) -> str:
        lasts = f" for {self.for_s:.2f} s" if self.for_s else ""
        return f"{self.at_s:.2f} s: {self.kind}{lasts}"


def schedule(seed: int, duration_s: float, lease_s: float, kinds: tuple[Kind, ...] = KINDS,
             gap_s: float = GAP_S) -> list[Fault]:
    """The same seed gives the same faults; none at the very start, when no stream is live."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    deck: list[Kind] = []
    at_s = gap_s * draw.uniform(MIN_GAP, MAX_GAP)
    while at_s < duration_s:
        if not deck:
            deck = [kind for kind in kinds for _ in range(DECK[kind])]
            draw.shuffle(deck)
        kind = deck.pop()
        faults.append(Fault(at_s, kind, draw.random(), _lasts_s(kind, draw, lease_s)))
        at_s += gap_s * draw.uniform(MIN_GAP, MAX_GAP)
    return faults


def _lasts_s(kind: Kind, draw: random.Random, lease_s: float) -> float:
    if kind == "freeze worker":
        return lease_s * draw.uniform(*FROZEN_LEASES)
    if kind == "half-open":
        return lease_s * draw.uniform(*HALF_OPEN_LEASES)
    if kind == "kill redis":
        return draw.uniform(*REDIS_AWAY_S)
    return DELAYED_S if kind == "delay" else 0.0
