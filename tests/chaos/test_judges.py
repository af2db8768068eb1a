"""A judge that never condemns proves nothing: builds with a part of the protocol taken out must be found guilty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.asks import RAMBLE, Ask, count
from tests.chaos.checker import Answer
from tests.chaos.report import Result
from tests.chaos.run import play
from tests.chaos.schedule import Kind
from tests.nursery import Nursery

SEED = 5
DURATION_S = 7.0
MAX_TRIALS = 8                                          # a short run may hit nothing that matters
PATIENCE_S = 12.0                                       # what was taken out may leave a client without an end
WHOLE_PATIENCE_S = 120.0                                # the whole build does not: only a slow machine takes long
FAULTS: tuple[Kind, ...] = ("freeze worker", "swallow")
FREEZES: tuple[Kind, ...] = ("freeze worker",)
FREEZE_GAP_S = 2.0                                      # another is awake to take over
ASKS = (count(1, 60), count(20, 79), Ask("sampled", "Count from 1 to 60.", RAMBLE | {"seed": 11}))
LONG_ASKS = tuple(Ask(f"sampled {seed}", "Count from 1 to 60.", RAMBLE | {"seed": seed, "max_tokens": 500})
                  for seed in (11, 12, 13))
SABOTAGES: dict[str, Callable[[list[str]], bool]] = {
    # sabotage → what must be found
    "fence": lambda found: any("P5 position" in violation for violation in found),
    "position": lambda found: any("does not count right" in violation for violation in found),
    "tokenizer": lambda found: any("does not count right" in violation for violation in found),
}


async def run(folder: Path, nursery: Nursery, uninterrupted: dict[str, Answer] | None, sabotage: str = "",
              patience_s: float = PATIENCE_S, seed: int = SEED) -> Result:
    """Three workers, one of which has another tokenizer and must not touch jobs begun by the others. But only a worker
    frozen while it writes returns behind the fence: there all are alike and slow, and answers long."""
    options: dict[str, Any] = {"kinds": FAULTS, "asks": ASKS, "test_sabotage": sabotage,
                               "odd": {"test_sabotage": f"{sabotage},other digits"}}
    if sabotage == "fence":
        options = {"kinds": FREEZES, "gap_s": FREEZE_GAP_S, "asks": LONG_ASKS, "test_sabotage": "fence,slow", "odd": {}}
    return await play(seed, DURATION_S, folder, nursery, pods=1, workers=3, num_clients=3, uninterrupted=uninterrupted,
                      patience_s=patience_s, **options)


async def test_the_whole_build_is_acquitted(tmp_path: Path, nursery: Nursery) -> None:
    """The control: the same faults on the same system, with nothing removed."""
    result = await run(tmp_path, nursery, None, patience_s=WHOLE_PATIENCE_S)
    assert result.violations == []
    assert result.num("freeze worker") and result.num_swallowed


@pytest.mark.timeout(600)                               # of all trials
@pytest.mark.parametrize("sabotage", SABOTAGES)
async def test_a_build_without_it_is_condemned(sabotage: str, tmp_path: Path, nursery: Nursery) -> None:
    found: list[str] = []
    for seed in range(SEED, SEED + MAX_TRIALS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found += (await run(folder, nursery, {}, sabotage, seed=seed)).violations
        if SABOTAGES[sabotage](found):
            return
    pytest.fail(f"not condemned for want of the {sabotage}: {found}")
