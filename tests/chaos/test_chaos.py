"""Streams and faults together: nobody is lost, nothing is doubled. The long form is `make chaos`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.report import figures, recoveries
from tests.chaos.run import play
from tests.chaos.schedule import GAP_S, KINDS, MAX_GAP, schedule
from tests.nursery import Nursery

SEED = 1
DURATION_S = 40.0
MIN_LIVE_HITS = 12                                      # of some 29 faults: only those on live streams count


@pytest.mark.timeout(900)
async def test_no_fault_is_noticed_by_a_client(tmp_path: Path, nursery: Nursery, report: list[str]) -> None:
    """Workers killed, frozen, ended; pods and Redis killed; connections cut, half-open, replies lost: same answers."""
    result = await play(SEED, DURATION_S, tmp_path, nursery)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(figures([result]), recoveries([result]), sep="\n")
    report.append(shown.get())
    assert result.violations == []
    assert result.figures()["on live streams"] >= MIN_LIVE_HITS
    assert result.figures()["resumed"]


def test_a_seed_is_a_schedule() -> None:
    """The same faults again, every kind among them, none absent for long."""
    faults = schedule(7, 60.0, 1.0)
    assert faults == schedule(7, 60.0, 1.0) != schedule(8, 60.0, 1.0)
    assert {fault.kind for fault in faults} == set(KINDS)
    gaps_s = [after.at_s - before.at_s for before, after in itertools.pairwise(faults)]
    assert max(gaps_s) <= GAP_S * MAX_GAP + 1e-6
