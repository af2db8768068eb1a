"""The figures of a chaos run: faults, their effect, and recovery times. It knows no process."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from tests.chaos.checker import answer_of
from tests.chaos.clients import Transcript
from tests.chaos.observer import Observer
from tests.chaos.schedule import Kind
from tests.chaos.stage import Happened

RECOVERIES: dict[Kind, tuple[str, str]] = {
    "kill worker": ("a worker's SIGKILL", "its streams' next token, by another"),
    "end worker": ("a worker's SIGTERM", "its streams' next token, by another"),
    "kill redis": ("Redis answers again", "the next token of what ran"),
    "kill pod": ("a pod's SIGKILL", "its clients' next event, at another"),
    "end pod": ("a pod's SIGTERM", "its clients' next event, at another")}


@dataclass
class Result:
    """The result of one seed."""

    seed: int
    transcripts: list[Transcript]
    happened: list[Happened]
    violations: list[str]
    num_cut: int                                        # connections to Redis
    num_swallowed: int                                  # replies of Redis
    recovery_s: dict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))

    def num(self, *kinds: Kind) -> int:
        return sum(happened.fault.kind in kinds for happened in self.happened)

    def figures(self) -> dict[str, int]:
        return {"streams": len(self.transcripts),
                "tokens": sum(answer_of(transcript).num_completion_tokens for transcript in self.transcripts
                              if transcript.done),
                "kills": self.num("kill worker"), "zombies": self.num("freeze worker"), "terms": self.num("end worker"),
                "cut": self.num_cut, "swallowed": self.num_swallowed, "Redis kills": self.num("kill redis"),
                "pods": self.num("kill pod", "end pod"), "faults": len(self.happened),
                "on live streams": sum(bool(happened.live) for happened in self.happened),    # only these count
                "resumed": sum(transcript.resumed for transcript in self.transcripts),
                "violations": len(self.violations)}

    def measure(self, observer: Observer) -> None:
        """The times from each fault to the next event of the streams that it hit."""
        by_id = {transcript.id: transcript for transcript in self.transcripts}
        for happened in self.happened:
            kind = happened.fault.kind
            for completion_id in happened.live & by_id.keys() if kind in RECOVERIES else ():
                if kind in ("kill pod", "end pod"):
                    took_s = next((connection.first_s - happened.at_s for connection in by_id[completion_id].connections
                                   if connection.first_s and connection.opened_s > happened.at_s), None)
                else:
                    took_s = observer.next_s(completion_id, happened.at_s, by_another=kind != "kill redis")
                if took_s is not None:                  # None: it was complete by then
                    self.recovery_s[kind].append(took_s)


def figures(results: Sequence[Result]) -> Table:
    """A line per seed and one for all."""
    rows = [(str(result.seed), result.figures()) for result in results]
    if len(rows) > 1:
        rows.append(("all", {name: sum(row[name] for _, row in rows) for name in rows[0][1]}))
    table = Table()
    for column in ("seed", *rows[0][1]):
        table.add_column(column, justify="right")
    for name, row in rows:
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    return table


def recoveries(results: Sequence[Result]) -> Table:
    table = Table()
    for column in ("from", "to", "streams", "p50", "p99", "worst"):
        table.add_column(column, justify="left" if column in ("from", "to") else "right")
    for kind, (begin, end) in RECOVERIES.items():
        took_s = list(itertools.chain.from_iterable(result.recovery_s[kind] for result in results))
        if len(took_s) > 1:
            cuts = statistics.quantiles(took_s, n=100, method="inclusive")
            shown = (f"{value:.2f} s" for value in (cuts[49], cuts[98], max(took_s)))
            table.add_row(begin, end, str(len(took_s)), *shown)
    return table
