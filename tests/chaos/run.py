"""`make chaos`: streams and faults together, then the judge. On a violation: exit code 1, and how to repeat it."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.chaos import report
from tests.chaos.asks import ASKS, Ask
from tests.chaos.checker import Answer, answer_of, check
from tests.chaos.clients import PATIENCE_S, Clients
from tests.chaos.observer import Observer
from tests.chaos.remains import leftovers, logs
from tests.chaos.report import Result
from tests.chaos.schedule import GAP_S, KINDS, Kind, schedule
from tests.chaos.stage import SETTINGS, Stage
from tests.nursery import Nursery
from tests.system import MODEL

CONCURRENCY = 8                                         # clients
SHOWN = 20                                              # violations of one seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first one (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of faults per seed (%(default)s)")
    parser.add_argument("--clients", type=int, default=CONCURRENCY, help="at a time (%(default)s)")
    parser.add_argument("--gap", type=float, default=GAP_S, help="seconds between faults; from 8 on recoveries do not "
                        "disturb each other (%(default)s)")
    args = parser.parse_args()
    console, results = Console(width=150), []
    with Nursery() as nursery:
        for seed in range(args.seed, args.seed + args.seeds):
            with tempfile.TemporaryDirectory(prefix="baton-") as folder:
                result = asyncio.run(play(seed, args.duration, Path(folder), nursery, num_clients=args.clients,
                                          gap_s=args.gap))
            results.append(result)
            console.print(report.figures([result]), *result.violations[:SHOWN], sep="\n")
    console.print(report.figures(results), report.recoveries(results), sep="\n")
    red = [result.seed for result in results if result.violations]
    for seed in red:
        print(f"seed {seed} is red; again: make chaos ARGS='--seed {seed} --seeds 1 --duration {args.duration:g} "
              f"--clients {args.clients} --gap {args.gap:g}'")
    return int(bool(red))


async def play(seed: int, duration_s: float, folder: Path, nursery: Nursery, *, kinds: tuple[Kind, ...] = KINDS,
               asks: Sequence[Ask] = ASKS, num_clients: int = CONCURRENCY, gap_s: float = GAP_S,
               uninterrupted: dict[str, Answer] | None = None, patience_s: float = PATIENCE_S,
               **stage_options: Any) -> Result:
    """One seed: the uninterrupted answers unless they are known, then faults, then judgement."""
    lease_s = stage_options.get("lease_s", SETTINGS["lease_s"])
    async with Stage(folder, nursery, **stage_options) as stage, \
            Observer(stage.redis.url, stage.system.shard) as observer, \
            Clients(stage.urls, MODEL, patience_s) as clients:
        if uninterrupted is None:
            uninterrupted = await answers(stage.urls, asks)
        begun_s = time.monotonic()
        reading = asyncio.create_task(clients.run(in_turn(asks, seed), num_clients,
                                                  lambda: time.monotonic() < begun_s + duration_s))
        for fault in schedule(seed, duration_s, lease_s, kinds, gap_s):
            await asyncio.sleep(max(0.0, begun_s + fault.at_s - time.monotonic()))
            await stage.hit(fault, clients.on)
        await stage.settle()
        await reading
        system, pids = stage.system, [member.pid for member in stage.members]
        left = await leftovers(system.redis, system.shard, pids)
        result = Result(seed, clients.transcripts, stage.happened,
                        check(clients.transcripts, logs(system.redis, system.shard), uninterrupted, left),
                        sum(member.wire.num_cut for member in stage.members),
                        sum(member.wire.num_swallowed for member in stage.members))
        result.measure(observer)
        return result


async def answers(urls: Sequence[str], asks: Sequence[Ask]) -> dict[str, Answer]:
    """The answers without faults."""
    async with Clients(urls, MODEL) as clients:
        await clients.run(asks, len(asks))
        broken = [f"{transcript}: {transcript.failure}" for transcript in clients.transcripts if not transcript.done]
        assert not broken, broken
        return {transcript.ask.name: answer_of(transcript) for transcript in clients.transcripts}


def in_turn(asks: Sequence[Ask], seed: int) -> Iterator[Ask]:
    """For ever: all of them in one order, then in another."""
    draw = random.Random(seed)
    return itertools.chain.from_iterable(draw.sample(asks, len(asks)) for _ in itertools.count())


if __name__ == "__main__":
    sys.exit(main())
