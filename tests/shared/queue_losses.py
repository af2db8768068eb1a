"""A Redis that loses data beside the verbs in any order: what pods have delivered, and workers published, is restored.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from shared.job import Entry
from tests.shared.queue_model import HEADER, TWICE, Holding, Known, Verbs


@dataclass
class Snapshot:
    """All that Redis holds, and what is true of it."""

    keys: dict[bytes, tuple[int, bytes]]                # name → milliseconds left, 0 for ever; the value
    jobs: dict[str, Known]
    leases: set[str]


class Losses(Verbs):
    """The same beside a Redis that goes back to what it held earlier: what was delivered stays."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = self.nothing = Snapshot({}, {}, set())
        self.delivered: dict[str, list[Entry]] = {}     # to pods
        self.suspects: set[str] = set()                 # whose pods have not looked into Redis since it went back

    @initialize()
    def begin(self) -> None:
        """Three answers, two of which go on after Redis was kept, so that it has something to lose."""
        self.run(self.queue.reap())
        for _ in range(3):
            self.submit("t", twice=False)
        self.claim("w1", 2, twice=False)
        for nth in range(4):
            for holding in self.holdings:
                self.say(holding)
            if nth == 1:
                self.keep()
        for job_id in self.jobs:
            self.deliver(job_id)

    @precondition(lambda self: self.jobs.keys() - self.suspects)
    @rule(data=st.data())
    def relay(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.sampled_from([job_id for job_id in self.jobs if job_id not in self.suspects])))

    def deliver(self, job_id: str) -> None:
        """What was delivered is followed by what is new."""
        before, now = self.delivered.get(job_id, []), self.entries(job_id)
        assert all(one.says_the_same(other) for one, other in zip(now[:len(before)], before, strict=True))
        self.delivered[job_id] = now

    @rule()
    def keep(self) -> None:
        self.snapshot = Snapshot(self.run(self._dumped()), copy.deepcopy(self.jobs), set(self.leases))

    async def _dumped(self) -> dict[bytes, tuple[int, bytes]]:
        redis: Any = self.redis
        return {name: (max(await redis.pttl(name), 0), await redis.dump(name)) async for name in self._names()}

    def _names(self) -> AsyncIterator[bytes]:
        redis: Any = self.redis
        names: AsyncIterator[bytes] = redis.scan_iter(f"{self.queue.shard.tag}:*")
        return names

    @rule(loses_all=st.sampled_from([False, False, True]))
    def go_back(self, loses_all: bool) -> None:
        snapshot = self.nothing if loses_all else self.snapshot
        self.run(self._go_back(snapshot))
        self.jobs, self.leases = copy.deepcopy(snapshot.jobs), set(snapshot.leases)
        self.suspects = set(self.delivered)
        for holding in self.holdings:
            holding.is_behind = True

    async def _go_back(self, snapshot: Snapshot) -> None:
        redis: Any = self.redis
        async for name in self._names():
            await redis.delete(name)
        for name, (rest_ms, value) in snapshot.keys.items():
            await redis.restore(name, rest_ms, value)
        await self.queue.reap()                         # from here on nobody has stood still

    @precondition(lambda self: self.suspects)
    @rule(data=st.data(), twice=TWICE)
    def restore_as_a_pod(self, data: st.DataObject, twice: bool) -> None:
        job_id = data.draw(st.sampled_from([job_id for job_id in self.asked if job_id in self.suspects]))
        entries = self.delivered[job_id]
        self.suspects.discard(job_id)
        if entries and entries[-1].kind == "end":       # delivered to the end: its pod asks no more
            del self.delivered[job_id]
            return
        epoch = max((entry.epoch for entry in entries), default=0)
        known, stands = self.jobs.get(job_id), self.stands(job_id, entries)
        for _ in range(1 + twice):
            found = self.run(self.queue.restore(self.asked[job_id], HEADER.encode(), entries, epoch=epoch))
            assert found == (None if known and stands and not known.lives else 0)
        if not stands:
            self.jobs[job_id] = self.restored(job_id, entries, epoch)

    @precondition(lambda self: any(holding.is_behind for holding in self.holdings))
    @rule(data=st.data(), twice=TWICE)
    def restore_as_a_worker(self, data: st.DataObject, twice: bool) -> None:
        holding = data.draw(st.sampled_from([holding for holding in self.holdings if holding.is_behind]))
        job_id, worker, entries = holding.claimed.job.id, holding.worker, holding.entries
        self.drop(worker, job_id)
        known, stands = self.jobs.get(job_id), self.stands(job_id, entries)
        if not stands:
            self.jobs[job_id] = known = self.restored(job_id, entries, holding.claimed.epoch)
            known.claim_position = len(entries)
            known.state, known.worker, known.claims = "running", worker, 1
            if job_id in self.delivered:                # in which there may be more, or something else
                self.suspects.add(job_id)
        assert known
        is_mine = known.state == "running" and known.worker == worker and known.position == len(entries)
        expected = known.epoch if is_mine else 0 if known.lives else None
        for _ in range(1 + twice):
            assert self.run(self.queue.restore(
                self.asked[job_id], HEADER.encode(), entries, epoch=holding.claimed.epoch, worker=worker,
                weights_id="w", numerics_id="n")) == expected
        if expected:
            self.leases.add(worker)
            self.holdings.append(Holding(worker, replace(holding.claimed, epoch=expected), entries))

    def stands(self, job_id: str, entries: list[Entry]) -> bool:
        """Whether Redis has the last of the entries, unchanged."""
        if job_id not in self.jobs:
            return False
        log = self.entries(job_id)
        return not entries or (len(log) >= len(entries) and log[len(entries) - 1].says_the_same(entries[-1]))

    def restored(self, job_id: str, entries: list[Entry], epoch: int) -> Known:
        known = self.jobs.get(job_id)
        return Known(self.asked[job_id].tenant, epoch=max(known.epoch if known else 0, epoch) + 1,
                     position=len(entries), num_tokens=entries[-1].num_tokens if entries else 0)
