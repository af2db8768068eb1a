"""What a forward has drawn, from its launch until it is read, and which of that may follow."""

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
    logits: Tensor | None           # from which to draw again; None where everybody has asked before
    draws: Draws

    def read(self) -> Iterator[tuple[int, list[Draw]]]:
        """Of each sequence its first row, and what its rows have drawn."""
        draws, place = iter(self.draws.read()), 0
        for _, same in groupby(self.sequences):
            drawn = [next(draws) for _ in same]
            yield place, drawn
            place += len(drawn)

    def first_to_follow(self, place: int, draw: Draw) -> Draw | None:
        """What must follow; or of what a row has drawn, and would draw next, what its constraint accepts. What is no
        number as well."""
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
