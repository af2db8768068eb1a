"""The draws of one forward, from its launch until the host reads them, and which of them a constraint accepts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from worker.engine.sampler import Draw, Draws, Row
from worker.engine.sequence import Sequence


class Flight(NamedTuple):
    sequences: list[Sequence]       # one for each row
    rows: list[Row]
    logits: Tensor | None           # for another draw; None if no constraint checks the draws
    draws: Draws

    def read(self) -> Iterator[tuple[int, list[Draw]]]:
        """Yields the first row of each sequence, and the draws of all its rows."""
        draws, place = iter(self.draws.read()), 0
        for _, same in groupby(self.sequences):
            drawn = [next(draws) for _ in same]
            yield place, drawn
            place += len(drawn)

    def first_to_follow(self, place: int, draw: Draw) -> Draw | None:
        """The forced token; else the first of the drawn token and its runners-up that the constraint accepts, or None.
        Without a constraint, or if logits were NaN, the draw itself."""
        sequence = self.sequences[place]
        constraint = sequence.constraint
        if constraint is None or not draw.is_valid:
            return draw
        if forced := sequence.forced:
            draw = Draw(forced[0], None, True)
        if constraint.accept(draw.token_id):
            return draw
        others = self.draws.next_of(place) if self.rows[place].allowed is None and not forced else ()
        return next((Draw(token_id, None, True) for token_id in others if constraint.accept(token_id)), None)
