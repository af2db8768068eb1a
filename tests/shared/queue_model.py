"""The queue's verbs in any order, by any worker, said twice, said late: a real Redis against a model of a few lines.

What the model knows of a job is what rule and reason say; whatever Redis holds must be the same after every step.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shared import connection
from shared.job import Delta, Entry, Finish, Header, Job, Sampling, Usage, encode_deltas
from shared.keys import Shard, completion_id
from shared.queue import Claimed, Queue, Write
from shared.settings import Settings
from tests.chaos.checker import check_log

HEADER = Header(model="m", created_s=1, fingerprint="fp", seed=1, n=1, num_prompt_tokens=3)
LIKE: dict[str, Any] = {"tokenizer_id": "tok", "weights_id": "w", "numerics_id": "n"}
MAX_ATTEMPTS, MAX_CLAIMS = 3, 7
NEVER_S = 600.0                                         # no clock decides anything here: leases are taken away by hand
WORKERS = st.sampled_from(["w1", "w2", "w3"])
TWICE = st.booleans()                                   # the reply was lost, so the verb is said again

T = TypeVar("T")


@dataclass
class Known:
    """What must be true of one job."""

    tenant: str
    state: str = "queued"
    epoch: int = 0
    position: int = 0
    num_tokens: int = 0
    worker: str = ""
    attempts: int = 0
    claims: int = 0
    claim_position: int = 0

    @property
    def lives(self) -> bool:
        return self.state in ("queued", "running")

    def claim(self, worker: str) -> None:
        self.state, self.worker, self.claim_position = "running", worker, self.position
        self.epoch, self.claims = self.epoch + 1, self.claims + 1

    def requeue(self, *, lost_lease: bool) -> None:
        if self.position > self.claim_position:
            self.attempts = 0
        elif lost_lease:
            self.attempts += 1
        self.epoch += 1
        if self.attempts >= MAX_ATTEMPTS or self.claims >= MAX_CLAIMS:
            self.position += 1
            self.state = "dead"
        else:
            self.state = "queued"

    def terminate(self, state: str) -> None:
        self.epoch, self.position, self.state = self.epoch + 1, self.position + 1, state


@dataclass
class Holding:
    """What a worker believes it holds; it may be wrong."""

    worker: str
    claimed: Claimed
    entries: list[Entry] = field(default_factory=list)      # all it knows of the answer, from position 1 on
    is_behind: bool = False                             # Redis has lost data: it says nothing before it has restored


class Verbs(RuleBasedStateMachine):
    redis_url = ""                                      # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis: Any = connection.connect(self.redis_url)
        self.queue = Queue(self.redis, Shard.of(secrets.token_hex(8)), Settings(
            lease_s=NEVER_S, patience_s=NEVER_S, step_timeout_s=NEVER_S, max_attempts=MAX_ATTEMPTS,
            max_claims=MAX_CLAIMS))
        self.key = self.queue.shard.key
        self.asked: dict[str, Job] = {}
        self.jobs: dict[str, Known] = {}
        self.holdings: list[Holding] = []
        self.leases: set[str] = set()
        self.count = itertools.count(1)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.redis.aclose())
        self.runner.close()

    # ── verbs ──

    @initialize()
    def reap_nothing(self) -> None:
        """From here on nobody has stood still."""
        self.run(self.queue.reap())

    @rule(tenant=st.sampled_from(["t", "u"]), twice=TWICE)
    def submit(self, tenant: str, twice: bool) -> None:
        digits = f"{next(self.count):032x}"             # the same in every run: Redis sorts by them what is alike
        job = Job(id=completion_id(self.queue.shard, digits), tenant=tenant, pod="p", prompt_token_ids=(1, 2, 3),
                  sampling=Sampling(max_tokens=8), tokenizer_id="tok", weights_id="w", deadline_s=NEVER_S,
                  retain_s=NEVER_S, created_s=int(time.time()))
        for _ in range(1 + twice):
            self.run(self.queue.submit(job, HEADER))
        self.asked[job.id], self.jobs[job.id] = job, Known(tenant)

    @rule(worker=WORKERS, free=st.integers(1, 4), twice=TWICE)
    def claim(self, worker: str, free: int, twice: bool) -> None:
        sequence = next(self.count)
        line = [known for known in self.jobs.values() if known.state == "queued"]
        holds = any(known.worker == worker and known.state == "running" for known in self.jobs.values())
        claims = self.run(self.queue.claim(worker, sequence, free, **LIKE))
        if twice:
            assert self.run(self.queue.claim(worker, sequence, free, **LIKE)).jobs == claims.jobs
        self.leases.add(worker)
        alone = [claimed for claimed in claims.jobs if claimed.alone]
        assert len(claims.jobs) <= free
        assert not alone or (len(claims.jobs) == 1 and not holds)
        if not any(known.attempts for known in line):
            share = math.ceil(len(line) / len(self.leases))
            assert len(claims.jobs) == min(free, share), "what could run was left in line"
            assert (claims.look_again_s is not None) == (0 < len(claims.jobs) < len(line))
        for claimed in claims.jobs:
            known = self.jobs[claimed.job.id]
            assert known.state == "queued"
            known.claim(worker)
            assert (claimed.epoch, claimed.position, claimed.num_tokens, claimed.alone) == (
                known.epoch, known.position, known.num_tokens, known.attempts > 0)
            self.drop(worker, claimed.job.id)
            self.holdings.append(Holding(worker, claimed, self.entries(claimed.job.id)))

    @precondition(lambda self: self.may_publish())
    @rule(data=st.data(), ends=st.sampled_from([False, False, True]), twice=TWICE)
    def publish(self, data: st.DataObject, ends: bool, twice: bool) -> None:
        """By who holds a job, or only believes so: then all it says is refused."""
        self.say(data.draw(st.sampled_from(self.may_publish())), ends, twice)

    def say(self, holding: Holding, ends: bool = False, twice: bool = False) -> None:
        claimed, known = holding.claimed, self.jobs[holding.claimed.job.id]
        is_mine = known.state == "running" and known.epoch == claimed.epoch
        num_tokens = claimed.num_tokens + (not ends)
        said = Finish(Usage(3, num_tokens)).encode() if ends else encode_deltas([Delta(0, (next(self.count),), "x")])
        write = Write(claimed.job.id, claimed.epoch, claimed.position + 1, num_tokens, "end" if ends else "delta", said)
        for _ in range(1 + twice):
            assert self.run(self.queue.publish(holding.worker, [write])) == ["ok" if is_mine else "refused"]
        self.leases.add(holding.worker)
        if is_mine:
            known.position, known.num_tokens = known.position + 1, num_tokens
            holding.claimed = replace(claimed, position=known.position, num_tokens=num_tokens)
            holding.entries.append(write.entry)
        if is_mine and ends:
            known.state = "finished"
            self.holdings.remove(holding)               # who has said the end says nothing more

    @rule(worker=WORKERS, twice=TWICE)
    def lose_lease(self, worker: str, twice: bool) -> None:
        if worker not in self.leases:
            return
        self.run(self.redis.zadd(self.key("leases"), {worker: 0}))
        for _ in range(1 + twice):
            self.run(self.queue.reap())
        self.leases.discard(worker)
        for known in self.held(worker):
            known.requeue(lost_lease=True)

    @rule(worker=WORKERS, twice=TWICE)
    def leave(self, worker: str, twice: bool) -> None:
        for _ in range(1 + twice):
            self.run(self.queue.release(worker))
        self.leases.discard(worker)
        for known in self.held(worker):
            known.requeue(lost_lease=False)

    @precondition(lambda self: self.may_publish())
    @rule(data=st.data(), twice=TWICE)
    def hand_back(self, data: st.DataObject, twice: bool) -> None:
        """One job, by who holds it or believes so."""
        holding = data.draw(st.sampled_from(self.may_publish()))
        known = self.jobs[holding.claimed.job.id]
        for _ in range(1 + twice):
            self.run(self.queue.release(holding.worker, [holding.claimed.job.id]))
        if known.state == "running" and known.worker == holding.worker:
            known.requeue(lost_lease=False)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), twice=TWICE)
    def cancel(self, data: st.DataObject, twice: bool) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        lived = self.jobs[job_id].lives
        assert self.run(self.queue.cancel(job_id)) is lived
        if twice:
            assert self.run(self.queue.cancel(job_id)) is False
        if lived:
            self.jobs[job_id].terminate("cancelled")

    @precondition(lambda self: any(known.lives for known in self.jobs.values()))
    @rule(data=st.data())
    def pass_a_deadline(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from([job_id for job_id, known in self.jobs.items() if known.lives]))
        self.run(self.redis.zadd(self.key("deadlines"), {job_id: 0}))
        assert self.run(self.queue.reap()).num_late == 1
        self.jobs[job_id].terminate("expired")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), pod=st.sampled_from(["p", "q"]), waits=st.booleans(), comes_back=st.booleans(), twice=TWICE)
    def leave_unread(self, data: st.DataObject, pod: str, waits: bool, comes_back: bool, twice: bool) -> None:
        """A pod no longer relays a job, whose readers nobody has seen; perhaps another one does, in time."""
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        known = self.jobs[job_id]
        counts = known.lives
        expected = ["waits" if waits else "cancelled" if nth == 0 else "none" for nth in range(1 + twice)]
        found = [self.run(self.queue.leave(pod, job_id, NEVER_S * waits)) for _ in range(1 + twice)]
        assert found == (expected if counts else ["none"] * (1 + twice))
        if counts and not waits:
            known.terminate("cancelled")
        elif counts:
            self.run(self.redis.zadd(self.key("readers"), {job_id: 0}))
            if comes_back:
                assert self.run(self.queue.attend("q", [job_id])) == 1
            assert self.run(self.queue.reap()).num_unread == (not comes_back)
            if not comes_back:
                known.terminate("cancelled")

    def drop(self, worker: str, job_id: str) -> None:
        """A worker believes one thing of a job."""
        self.holdings = [holding for holding in self.holdings
                         if (holding.worker, holding.claimed.job.id) != (worker, job_id)]

    def may_publish(self) -> list[Holding]:
        return [holding for holding in self.holdings if not holding.is_behind]

    def entries(self, job_id: str) -> list[Entry]:
        """What its log says, from position 1 on."""
        return self.run(self.queue.read(job_id))[1:]

    def held(self, worker: str) -> list[Known]:
        return [known for known in self.jobs.values() if known.state == "running" and known.worker == worker]

    # ── what must be true ──

    @invariant()
    def logs_are_whole(self) -> None:
        """Positions dense, epochs never back, one terminal, tokens that add up; as far as the model is, no farther."""
        for job_id, known in self.jobs.items():
            rows: Any = self.run(self.redis.xrange(self.key(f"out:{job_id}")))
            entries = [(i.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for i, fields in rows]
            assert [violation for violation in check_log(entries) if not violation.startswith("P1")] == []
            assert int(entries[-1][0].partition("-")[0]) == known.epoch
            assert int(entries[-1][1]["position"]) == known.position
            assert sum(fields["kind"] == "end" for _, fields in entries) == (not known.lives)

    @invariant()
    def accounts_are_right(self) -> None:
        live = {job_id: known for job_id, known in self.jobs.items() if known.lives}
        self.run(self._accounts(live))

    async def _accounts(self, live: dict[str, Known]) -> None:
        redis: Any = self.redis
        assert await redis.xlen(self.key("jobs")) == len(live)
        pending = (await redis.xpending(self.key("jobs"), "workers"))["consumers"] if self.jobs else []
        at = Counter(known.worker if known.state == "running" else "queued" for known in live.values())
        assert {consumer["name"].decode(): consumer["pending"] for consumer in pending} == dict(at)
        queued = {job_id for job_id, known in live.items() if known.state == "queued"}
        assert set(await redis.zrange(self.key("ready"), 0, -1)) == {job_id.encode() for job_id in queued}
        assert {name.decode() for name in await redis.zrange(self.key("leases"), 0, -1)} == self.leases
        assert set(await redis.zrange(self.key("deadlines"), 0, -1)) == {job_id.encode() for job_id in live}
        assert set(await redis.zrange(self.key("readers"), 0, -1)) == {job_id.encode() for job_id in live}
        tenants = Counter(known.tenant for known in live.values())
        assert {k.decode(): int(v) for k, v in (await redis.hgetall(self.key("tenants"))).items()} == dict(tenants)
        for worker in ("w1", "w2", "w3"):
            held = {job_id.encode() for job_id, known in live.items()
                    if known.state == "running" and known.worker == worker}
            assert await redis.smembers(self.key(f"held:{worker}")) == held
        for job_id, known in self.jobs.items():
            described = await self.queue.describe(job_id)
            assert (described["state"], int(described["claims"])) == (known.state, known.claims)
            assert known.state == "dead" or int(described["attempts"]) == known.attempts
        assert await redis.xlen(self.key("dead")) == sum(known.state == "dead" for known in self.jobs.values())
