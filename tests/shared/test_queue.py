"""The verbs on a real Redis, on every version that is here: what each promises, also when it is repeated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from shared import connection
from shared.errors import Overloaded, TenantOverloaded
from shared.job import Delta, Finish, Header, Job, Sampling, Usage, encode_deltas
from shared.keys import Shard, new_completion_id
from shared.queue import MAX_ATTENDED, MAX_PODS, MAX_REAPED, Claimed, Found, Queue, Write, parse_push
from shared.settings import Settings

LIKE: dict[str, Any] = {"tokenizer_id": "tok", "weights_id": "w", "numerics_id": "n"}
SHARD = Shard.of("a/{model}")


def make_queue(redis: Redis, **settings: Any) -> Queue:
    quick: dict[str, Any] = {"lease_s": 0.2, "idle_poll_s": 0.05, "patience_s": 0.4}
    return Queue(redis, SHARD, Settings(**quick | settings))


@pytest.fixture
def queue(each_redis: Redis) -> Queue:
    return make_queue(each_redis)


def make_job(**changes: Any) -> Job:
    job = Job(id=new_completion_id(SHARD), tenant="t", pod="pod1", prompt_token_ids=(1, 2, 3),
              sampling=Sampling(max_tokens=8, seed=2**63), tokenizer_id="tok", weights_id="w", retain_s=5)
    return replace(job, **changes)


HEADER = Header(model="m", created_s=1, fingerprint="fp", seed=1, n=1, num_prompt_tokens=3)


async def submit(queue: Queue, job: Job | None = None) -> Job:
    job = job or make_job()
    await queue.submit(job, HEADER)
    return job


async def claim_one(queue: Queue, worker: str = "w1", sequence: int = 1, free: int = 8) -> Claimed:
    (claimed,) = (await queue.claim(worker, sequence, free, **LIKE)).jobs
    return claimed


def delta(claimed: Claimed, k: int, text: str = "x") -> Write:
    data = encode_deltas([Delta(0, (k,), text)])
    return Write(claimed.job.id, claimed.epoch, claimed.position + k, claimed.num_tokens + k, "delta", data)


def end(claimed: Claimed, k: int) -> Write:
    data = Finish(Usage(3, k - 1)).encode()
    return Write(claimed.job.id, claimed.epoch, claimed.position + k, claimed.num_tokens + k - 1, "end", data)


async def lose_lease(queue: Queue) -> None:
    """Waits until Redis holds the lease for expired."""
    await asyncio.sleep(queue.settings.lease_s * 1.2)


async def lose_patience(queue: Queue) -> None:
    """Waits until what is in line has waited long enough for special treatment."""
    await asyncio.sleep(queue.settings.patience_s * 1.2)


async def log_ids(queue: Queue, job: Job) -> list[str]:
    rows: Any = await queue.redis.xrange(SHARD.key(f"out:{job.id}"))
    return [entry_id.decode() for entry_id, _ in rows]


async def leftovers(queue: Queue) -> dict[str, int]:
    """What must be zero when no job lives."""
    redis, key = queue.redis, SHARD.key
    (group,) = await redis.xinfo_groups(key("jobs"))
    return {"jobs": await redis.xlen(key("jobs")), "ready": await redis.zcard(key("ready")),
            "deadlines": await redis.zcard(key("deadlines")), "readers": await redis.zcard(key("readers")),
            "tenants": await redis.hlen(key("tenants")),
            "pending": group["pending"], "lag": group.get("lag") or 0,
            "held": len([k async for k in redis.scan_iter(key("held:*").replace("{", "\\{"))])}


async def test_a_job_goes_through_and_leaves_nothing_behind(queue: Queue) -> None:
    job = await submit(queue)
    claimed = await claim_one(queue)
    assert (claimed.job, claimed.epoch, claimed.position) == (job, 1, 0)
    assert await queue.publish("w1", [delta(claimed, 1), delta(claimed, 2), end(claimed, 3)]) == ["ok"] * 3
    entries = await queue.read(job.id)
    assert [(e.epoch, e.position, e.kind) for e in entries] == [
        (0, 0, "header"), (1, 1, "delta"), (1, 2, "delta"), (1, 3, "end")]
    assert entries[1].deltas == [Delta(0, (1,), "x")]
    assert entries[3].finish == Finish(Usage(3, 2))
    assert await queue.read(job.id, after=entries[2]) == [entries[3]]
    assert not any((await leftovers(queue)).values())
    for name in ("job", "out"):
        assert 0 < await queue.redis.pttl(SHARD.key(f"{name}:{job.id}")) <= 5000
    assert (await queue.describe(job.id))["state"] == "finished"


async def test_a_group_that_somebody_removes_is_made_again(queue: Queue) -> None:
    first = await submit(queue)
    await queue.redis.xgroup_destroy(SHARD.key("jobs"), "workers")
    second = await submit(queue)
    assert await queue.redis.xlen(SHARD.key("jobs")) == (await leftovers(queue))["pending"] == 2
    claims = (await queue.claim("w1", 1, 8, **LIKE)).jobs
    assert {claimed.job.id for claimed in claims} == {first.id, second.id}
    assert await queue.publish("w1", [end(claimed, 1) for claimed in claims]) == ["ok"] * 2
    assert not any((await leftovers(queue)).values())


async def test_the_group_shows_what_is_queued_and_what_runs_where(queue: Queue) -> None:
    """length = queued + running; pending per consumer = queued, or running on that worker; lag stays true."""
    for _ in range(3):
        await submit(queue)
    await claim_one(queue, free=1)
    pending = await queue.redis.xpending(SHARD.key("jobs"), "workers")
    assert {c["name"].decode(): c["pending"] for c in pending["consumers"]} == {"queued": 2, "w1": 1}
    (group,) = await queue.redis.xinfo_groups(SHARD.key("jobs"))
    assert not group.get("lag")
    assert await queue.num_live() == 3


async def test_submitting_the_same_id_twice_makes_one_job(queue: Queue) -> None:
    job = await submit(queue)
    await submit(queue, job)
    assert await queue.num_live() == 1
    assert len(await queue.read(job.id)) == 1


async def test_a_redis_may_forget_its_scripts_at_any_time(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also right after it was told them: one that is killed comes back without."""
    evalsha = queue.redis.evalsha

    async def forgetting(*args: Any) -> Any:
        await queue.redis.script_flush()
        return await evalsha(*args)

    monkeypatch.setattr(queue.redis, "evalsha", forgetting)
    job = await submit(queue)
    assert (await claim_one(queue)).job == job


async def test_a_full_line_refuses_and_a_tenant_has_its_share(each_redis: Redis) -> None:
    queue = make_queue(each_redis, max_queued=3, max_tenant_choices=2)
    await submit(queue, make_job(n=2))
    with pytest.raises(TenantOverloaded):
        await submit(queue)
    for tenant in ("u", "v"):
        await submit(queue, make_job(tenant=tenant))
    with pytest.raises(Overloaded):
        await submit(queue, make_job(tenant="x"))


async def test_a_claim_whose_reply_was_lost_gives_the_same_jobs(queue: Queue) -> None:
    jobs = {(await submit(queue)).id for _ in range(2)}
    first = await queue.claim("w1", 1, 8, **LIKE)
    again = await queue.claim("w1", 1, 8, **LIKE)
    assert first.jobs == again.jobs
    assert {claimed.job.id for claimed in again.jobs} == jobs
    assert (await queue.claim("w1", 2, 8, **LIKE)).jobs == ()


async def test_a_claim_may_be_repeated_however_late(queue: Queue) -> None:
    """What a worker says of itself has expired then."""
    job = await submit(queue)
    await claim_one(queue)
    await queue.redis.delete(SHARD.key("worker:w1"))
    assert (await claim_one(queue)).job == job


async def test_what_a_worker_does_not_know_that_it_holds_goes_back_in_line(queue: Queue) -> None:
    """It has put it down, or the reply that gave it was lost with the memory of it."""
    kept, lost = [await submit(queue) for _ in range(2)]
    claimed = {c.job.id: c for c in (await queue.claim("w1", 1, 8, **LIKE)).jobs}
    await queue.publish("w1", [delta(claimed[lost.id], 1)])
    assert (await queue.claim("w1", 2, 8, **LIKE, held=[kept.id, lost.id])).jobs == ()
    (again,) = (await queue.claim("w1", 3, 8, **LIKE, held=[kept.id])).jobs
    assert (again.job, again.position, again.alone) == (lost, 1, False)
    assert again.epoch > claimed[lost.id].epoch
    await queue.redis.delete(SHARD.key("sequence:w1"))
    assert {c.job.id for c in (await queue.claim("w1", 3, 8, **LIKE, held=[])).jobs} == {kept.id, lost.id}


async def test_a_publish_whose_reply_was_lost_says_nothing_twice(queue: Queue) -> None:
    job = await submit(queue)
    claimed = await claim_one(queue)
    writes = [delta(claimed, 1), end(claimed, 2)]
    assert await queue.publish("w1", writes) == await queue.publish("w1", writes) == ["ok", "ok"]
    assert [e.position for e in await queue.read(job.id)] == [0, 1, 2]
    assert (await queue.counters())["finished"] == 1


async def test_the_fence_silences_a_worker_that_lost_its_lease(queue: Queue) -> None:
    """Woken after its jobs went to another, a worker is refused whatever it says, even the terminal."""
    job = await submit(queue)
    zombie = await claim_one(queue, "zombie")
    await queue.publish("zombie", [delta(zombie, 1)])
    await lose_lease(queue)
    assert (await queue.reap()).num_requeued == 1
    assert await queue.publish("zombie", [delta(zombie, 2), end(zombie, 3)]) == ["refused", "refused"]
    heir = await claim_one(queue, "heir")
    assert (heir.epoch, heir.position, heir.num_tokens) == (3, 1, 1)
    assert await queue.publish("zombie", [delta(zombie, 2)]) == ["refused"]
    assert await queue.publish("heir", [delta(heir, 1), end(heir, 2)]) == ["ok", "ok"]
    assert await log_ids(queue, job) == ["0-1", "1-0", "1-1", "2-0", "3-0", "3-2", "3-3"]
    assert not any((await leftovers(queue)).values())


async def test_a_lease_that_is_renewed_is_not_reaped(each_redis: Redis) -> None:
    queue = make_queue(each_redis, lease_s=1.0)
    await submit(queue)
    claimed = await claim_one(queue)
    for k in range(1, 6):
        await asyncio.sleep(queue.settings.lease_s * 0.4)
        assert await queue.publish("w1", [delta(claimed, k)] if k % 2 else []) == (["ok"] if k % 2 else [])
        assert (await queue.reap()).num_requeued == 0
        claimed = replace(claimed, position=claimed.position - 1) if k % 2 == 0 else claimed


async def test_a_released_job_is_the_next_and_loses_no_attempt(queue: Queue) -> None:
    job = await submit(queue)
    await claim_one(queue)
    await submit(queue)
    assert await queue.release("w1") == 1
    assert (await queue.describe(job.id))["attempts"] == "0"
    assert (await claim_one(queue, "w2", free=1)).job == job
    assert await queue.redis.zscore(SHARD.key("leases"), "w1") is None


async def die(queue: Queue, _: str, __: Job) -> None:
    await lose_lease(queue)
    await queue.reap()


async def give_up(queue: Queue, worker: str, job: Job) -> None:
    await queue.release(worker, [job.id], has_failed=True)
    await queue.release(worker)


@pytest.mark.parametrize("fail", [die, give_up])
async def test_a_poison_job_runs_alone_and_is_given_up_after_three_workers(
        queue: Queue, fail: Callable[[Queue, str, Job], Awaitable[None]]) -> None:
    poison = await submit(queue)
    for attempt in range(3):
        other = await submit(queue)
        claims = (await queue.claim(f"w{attempt}", 1, 8, **LIKE)).jobs
        assert claims[0].job == poison
        assert claims[0].alone is (attempt > 0)
        if attempt:
            assert len(claims) == 1
        await queue.cancel(other.id)
        await fail(queue, f"w{attempt}", poison)
    last = (await queue.read(poison.id))[-1]
    assert (last.kind, last.finish.error) == ("end", "job_failed")
    letters: Any = await queue.redis.xrange(SHARD.key("dead"))
    ((_, dead),) = letters
    assert dead[b"job"].decode() == poison.id
    assert not any((await leftovers(queue)).values())


async def test_progress_resets_the_attempts(queue: Queue) -> None:
    """A healthy long stream outlives any number of workers."""
    job = await submit(queue)
    for attempt in range(5):
        claimed = await claim_one(queue, f"w{attempt}")
        assert await queue.publish(f"w{attempt}", [delta(claimed, 1)]) == ["ok"]
        await lose_lease(queue)
        await queue.reap()
    assert (await queue.describe(job.id))["attempts"] == "0"


async def test_a_busy_worker_drains_for_a_job_that_must_run_alone(queue: Queue) -> None:
    """One of the busy workers is reserved and claims nothing more until it is empty; the others go on."""
    poison = await submit(queue)
    await claim_one(queue, "w0")
    for _ in range(3):
        await submit(queue)
    busy = make_queue(queue.redis, lease_s=60.0)
    healthy = (await busy.claim("w1", 1, 1, **LIKE)).jobs[0]
    await busy.claim("w2", 1, 1, **LIKE)
    await lose_lease(queue)
    assert (await queue.reap()).num_requeued == 1
    await lose_patience(queue)
    assert (await busy.claim("w1", 2, 8, **LIKE)).jobs == ()
    assert len((await busy.claim("w2", 2, 8, **LIKE)).jobs) == 1
    await busy.publish("w1", [end(healthy, 1)])
    assert [claimed.job for claimed in (await busy.claim("w1", 3, 8, **LIKE)).jobs] == [poison]


async def test_what_began_together_on_a_lost_worker_begins_anew_one_by_one(queue: Queue) -> None:
    """Each until it has a token: who takes down its next worker is known then, and nobody waits for whole answers."""
    jobs = [await submit(queue) for _ in range(3)]
    await queue.claim("w0", 1, 8, **LIKE)
    await lose_lease(queue)
    await queue.reap()
    healthy = make_queue(queue.redis, lease_s=60.0)
    begun = list[Job]()
    for sequence in range(1, 7):
        claims = await healthy.claim("w1", sequence, 8, **LIKE)
        if sequence % 2:
            (claimed,) = claims.jobs
            assert claimed.alone
            begun.append(claimed.job)
        else:
            assert claims.jobs == () and (claims.look_again_s or sequence == 6)
            await healthy.publish("w1", [delta(claimed, 1)], sequence // 2)
    assert sorted(job.id for job in begun) == sorted(job.id for job in jobs)


async def test_cancel_ends_a_job_in_every_state(queue: Queue) -> None:
    queued, running, done = [await submit(queue) for _ in range(3)]
    assert await queue.cancel(queued.id)
    claims = {c.job.id: c for c in (await queue.claim("w1", 1, 8, **LIKE)).jobs}
    await queue.publish("w1", [delta(claims[running.id], 1), end(claims[done.id], 1)])
    assert await queue.cancel(running.id)
    assert not await queue.cancel(done.id)
    assert not await queue.cancel("chatcmpl-unknown")
    assert await queue.publish("w1", [delta(claims[running.id], 2)]) == ["refused"]
    for job, num_tokens in ((queued, 0), (running, 1)):
        last = (await queue.read(job.id))[-1]
        assert last.finish == Finish(Usage(3, num_tokens), error="cancelled")
        assert 0 <= time.time() - last.finish.ended_s < 60
    assert not any((await leftovers(queue)).values())


async def test_a_worker_cancels_only_what_it_holds(queue: Queue) -> None:
    job = await submit(queue)
    assert not await queue.cancel(job.id, "form_too_complex", worker="w1"), "it is in line"
    await claim_one(queue, "w1")
    await lose_lease(queue)
    await queue.reap()
    await claim_one(queue, "w2")
    assert not await queue.cancel(job.id, "form_too_complex", worker="w1"), "it has lost it"
    assert await queue.cancel(job.id, "form_too_complex", worker="w2")
    assert (await queue.read(job.id))[-1].finish == Finish(Usage(3, 0), error="form_too_complex")


async def test_a_deadline_ends_a_job(queue: Queue) -> None:
    job = await submit(queue, make_job(deadline_s=0.05))
    await asyncio.sleep(0.1)
    assert (await queue.reap()).num_late == 1
    assert (await queue.read(job.id))[-1].finish.error == "deadline_exceeded"
    assert not any((await leftovers(queue)).values())


# ── readers ──


async def reader_left_ms(queue: Queue, job: Job) -> float | None:
    """How long a job goes on with nobody reading; None when it does not depend on readers."""
    until_ms = await queue.redis.zscore(SHARD.key("readers"), job.id)
    seconds, micros = await queue.redis.time()
    return None if until_ms is None else float(until_ms) - seconds * 1000 - micros // 1000


async def pods_of(queue: Queue, job: Job) -> list[str]:
    return (await queue.describe(job.id))["pods"].split()


async def pass_time(queue: Queue, job: Job) -> None:
    """Makes now the time until which the job may go on unread."""
    await queue.redis.zadd(SHARD.key("readers"), {job.id: 1}, xx=True)


@contextlib.asynccontextmanager
async def listening(redis_url: str, *names: str) -> AsyncIterator[AsyncIterator[tuple[str, bytes | None]]]:
    """Who lives is heard on its channel: what comes there."""
    heard = connection.listen(redis_url, [SHARD.key(name) for name in names])
    async with asyncio.timeout(10), contextlib.aclosing(heard):
        for _ in names:
            assert (await anext(heard))[1] is None
        yield heard


async def test_a_job_that_nobody_reads_any_more_is_cancelled(queue: Queue) -> None:
    """Queued or running, when its reader's time is over; one that is attended goes on."""
    queued, running, attended = [await submit(queue) for _ in range(3)]
    assert 29_000 < (await reader_left_ms(queue, queued) or 0) <= 30_000
    claimed = {c.job.id: c for c in (await queue.claim("w1", 1, 8, **LIKE)).jobs}[running.id]
    await queue.release("w1", [queued.id])
    for job in (queued, running, attended):
        await pass_time(queue, job)
    assert await queue.attend("pod1", [attended.id, "chatcmpl-unknown"]) == 1
    assert (await queue.reap()).num_unread == 2
    assert await queue.publish("w1", [delta(claimed, 1)]) == ["refused"]
    for job in (queued, running):
        assert (await queue.read(job.id))[-1].finish.error == "cancelled"
    await queue.cancel(attended.id)
    assert not any((await leftovers(queue)).values())


async def test_who_says_nothing_learns_too_that_a_job_is_not_theirs(queue: Queue) -> None:
    jobs = [await submit(queue) for _ in range(3)]
    claims = (await queue.claim("w1", 1, 8, **LIKE)).jobs
    holds = [Write(claimed.job.id, claimed.epoch, 0, 0, "hold", "") for claimed in claims]
    before = [await queue.read(job.id) for job in jobs]
    assert await queue.publish("w1", holds) == ["ok"] * 3
    assert [await queue.read(job.id) for job in jobs] == before, "it writes nothing"
    await queue.cancel(holds[0].job_id)
    await queue.redis.delete(queue.shard.key(f"out:{holds[1].job_id}"))
    assert await queue.publish("w1", holds) == ["refused", "gone", "ok"]
    await queue.release("w1", [holds[2].job_id])
    heir = (await queue.claim("w2", 1, 8, **LIKE)).jobs[-1]
    assert await queue.publish("w1", [holds[2]]) == ["refused"]
    assert await queue.publish("w2", [holds[2]._replace(epoch=heir.epoch)]) == ["ok"]


async def test_many_unread_jobs_are_ended_a_bounded_number_at_a_time(queue: Queue) -> None:
    jobs = [await submit(queue) for _ in range(MAX_REAPED + 3)]
    for job in jobs:
        await pass_time(queue, job)
    assert [(await queue.reap()).num_unread for _ in range(3)] == [MAX_REAPED, 3, 0]


async def test_a_job_that_needs_no_reader_gets_no_time(queue: Queue) -> None:
    """It is attended and left as any other, and goes on."""
    job = await submit(queue)
    await queue.redis.zrem(SHARD.key("readers"), job.id)
    assert await queue.attend("pod2", [job.id]) == 1
    assert await pods_of(queue, job) == ["pod1", "pod2"]
    assert await queue.leave("pod2", job.id, 0) == "none"
    assert await reader_left_ms(queue, job) is None
    assert await queue.num_live() == 1


async def test_who_attends_is_pushed_to(queue: Queue, each_redis_url: str) -> None:
    async with listening(each_redis_url, "push:pod1", "push:pod2") as heard:
        job = await submit(queue)
        await queue.attend("pod2", [job.id])
        await queue.attend("pod2", [job.id])
        claimed = await claim_one(queue)
        await queue.publish("w1", [delta(claimed, 1)])
        messages = dict([await anext(heard) for _ in range(2)])
    pushed = [(job.id, (await queue.read(job.id))[1])]
    assert {channel: parse_push(message or b"") for channel, message in messages.items()} == {
        SHARD.key("push:pod1"): pushed, SHARD.key("push:pod2"): pushed}


async def test_the_pods_of_a_job_are_bounded(queue: Queue) -> None:
    """The newest are kept."""
    job = await submit(queue)
    for number in range(2, MAX_PODS + 4):
        await queue.attend(f"pod{number}", [job.id])
    assert await pods_of(queue, job) == [f"pod{number}" for number in range(4, MAX_PODS + 4)]


async def test_more_jobs_than_one_call_takes_are_all_attended(queue: Queue) -> None:
    job = await submit(queue)
    assert await queue.attend("pod2", ["chatcmpl-unknown"] * MAX_ATTENDED + [job.id]) == 1


async def test_who_leaves_last_starts_the_grace(queue: Queue, each_redis_url: str) -> None:
    """Others that read keep a job; a pod that nobody hears on its channel has died, and reads nothing."""
    async with listening(each_redis_url, "push:pod1"):
        job = await submit(queue)
        await queue.attend("pod2", [job.id])
        assert await queue.leave("pod2", job.id, 0) == "read"
        assert await pods_of(queue, job) == ["pod1"]
        assert (await reader_left_ms(queue, job) or 0) > 29_000
        await queue.attend("pod2", [job.id])
        assert await queue.leave("pod1", job.id, 0) == "cancelled", "pod2 is not heard: it is dead"
    assert not any((await leftovers(queue)).values())


async def test_a_reader_that_comes_back_within_the_grace_finds_its_job(queue: Queue) -> None:
    job = await submit(queue)
    assert await queue.leave("pod1", job.id, 2.0) == "waits"
    assert 1_000 < (await reader_left_ms(queue, job) or 0) <= 2_000
    assert await queue.attend("pod2", [job.id]) == 1
    assert (await reader_left_ms(queue, job) or 0) > 29_000
    assert (await queue.reap()).num_unread == 0
    assert await queue.leave("pod2", job.id, 0.01) == "waits"
    await asyncio.sleep(0.02)
    assert (await queue.reap()).num_unread == 1
    assert await queue.leave("pod2", job.id, 0.0) == "none"


async def test_without_grace_who_leaves_last_cancels_at_once(queue: Queue) -> None:
    """And the worker that has the job learns it with its next word."""
    job = await submit(queue)
    claimed = await claim_one(queue)
    assert await queue.leave("pod1", job.id, 0) == "cancelled"
    assert await queue.publish("w1", [delta(claimed, 1)]) == ["refused"]
    assert await queue.attend("pod1", [job.id]) == 0
    assert not any((await leftovers(queue)).values())


async def test_a_job_is_found_by_its_id(queue: Queue) -> None:
    """Whose it is, how it began and whether it has ended; nothing when it is unknown, or its log is gone."""
    job = await submit(queue)
    assert await queue.find(job.id) == Found(job.id, "t", HEADER, None, job)
    claimed = await claim_one(queue)
    await queue.publish("w1", [delta(claimed, 1), end(claimed, 2)])
    assert await queue.find(job.id) == Found(job.id, "t", HEADER, Finish(Usage(3, 1)), None)
    assert await queue.find("chatcmpl-unknown") is None
    await queue.redis.delete(SHARD.key(f"out:{job.id}"))
    assert await queue.find(job.id) is None


# ── what is lost, and who comes first ──


async def test_a_started_answer_goes_to_like_workers_only(queue: Queue) -> None:
    """Other tokenizers never, other weights never once it has begun, other numerics after some patience."""
    job = await submit(queue)
    assert (await queue.claim("other", 1, 8, **LIKE | {"tokenizer_id": "x"})).jobs == ()
    claimed = (await queue.claim("w1", 1, 8, **LIKE | {"weights_id": "w2"})).jobs[0]
    await queue.publish("w1", [delta(claimed, 1)])
    await queue.release("w1")
    assert (await queue.claim("w2", 1, 8, **LIKE)).jobs == ()
    assert (await queue.claim("w3", 1, 8, **LIKE | {"weights_id": "w2", "numerics_id": "m"})).jobs == ()
    await lose_patience(queue)
    (late,) = (await queue.claim("w3", 2, 8, **LIKE | {"weights_id": "w2", "numerics_id": "m"})).jobs
    assert late.job == job
    assert claimed.is_like and not late.is_like


async def test_a_worker_that_holds_a_job_again_is_not_hurt_by_its_own_late_entry(queue: Queue) -> None:
    """Its lease ran out, it claimed the same job anew, and only then an entry of before arrives: refused, no more."""
    job = await submit(queue)
    old = await claim_one(queue)
    await lose_lease(queue)
    assert (await queue.reap()).num_requeued == 1
    new = await claim_one(queue, sequence=2)
    assert await queue.publish("w1", [delta(old, 1)]) == ["refused"]
    await lose_lease(queue)
    assert (await queue.reap()).num_requeued == 1, "the job is still known to be held"
    assert (await claim_one(queue, "w2")).epoch > new.epoch
    assert [entry.position for entry in await queue.read(job.id)] == [0]


async def test_other_weights_continue_only_where_a_setting_says_so(each_redis: Redis) -> None:
    """And then as late as other numerics, and marked as unlike."""
    queue = make_queue(each_redis, allow_other_weights=True)
    await submit(queue)
    claimed = await claim_one(queue)
    await queue.publish("w1", [delta(claimed, 1)])
    await queue.release("w1")
    other = LIKE | {"weights_id": "w2", "numerics_id": "m"}
    claims = await queue.claim("w2", 1, 8, **other)
    assert claims.jobs == ()
    assert claims.look_again_s is not None and 0 < claims.look_again_s <= queue.settings.patience_s
    await lose_patience(queue)
    (late,) = (await queue.claim("w2", 2, 8, **other)).jobs
    assert (late.job, late.is_like) == (claimed.job, False)


async def test_those_who_live_share_the_line(queue: Queue) -> None:
    """The first to ask leaves half to the other, and asks again soon; whoever is gone has no share."""
    assert (await queue.claim("w2", 1, 8, **LIKE)).jobs == ()
    jobs = [await submit(queue) for _ in range(6)]
    first = await queue.claim("w1", 1, 8, **LIKE)
    assert [claimed.job for claimed in first.jobs] == jobs[:3]
    assert first.look_again_s is not None and 0 < first.look_again_s < queue.settings.idle_poll_s
    assert [claimed.job for claimed in (await queue.claim("w2", 2, 8, **LIKE)).jobs] == jobs[3:5]
    await queue.release("w2")
    last = await queue.claim("w1", 2, 8, **LIKE)
    assert ({claimed.job for claimed in last.jobs}, last.look_again_s) == ({*jobs[3:]}, None)


async def test_a_prompt_goes_to_the_worker_that_holds_its_beginning(queue: Queue) -> None:
    """First what this worker has begun for others; what another live one has is left to it, for a while."""
    first = await submit(queue, make_job(prefix=("a", "b")))
    assert (await claim_one(queue, "warm")).job == first
    plain, deeper = await submit(queue), await submit(queue, make_job(prefix=("a", "b", "c")))
    cold = await queue.claim("cold", 1, 8, **LIKE)
    assert [c.job for c in cold.jobs] == [plain]
    assert cold.look_again_s is not None and 0 < cold.look_again_s <= queue.settings.prefix_patience_s
    assert (await claim_one(queue, "warm", 2)).job == deeper
    behind = [await submit(queue), await submit(queue, make_job(prefix=("a",)))]
    assert [c.job for c in (await queue.claim("warm", 3, 1, **LIKE)).jobs] == behind[1:], "it may overtake"


async def test_a_prefix_is_waited_for_with_patience_and_not_behind_the_dead(each_redis: Redis) -> None:
    queue = make_queue(each_redis, prefix_patience_s=0.3, lease_s=2.0, idle_poll_s=0.05)
    await submit(queue, make_job(prefix=("a",)))
    await claim_one(queue, "warm")
    waiting = await submit(queue, make_job(prefix=("a",)))
    assert (await queue.claim("cold", 1, 8, **LIKE)).jobs == ()
    await asyncio.sleep(0.35)
    assert [c.job for c in (await queue.claim("cold", 2, 8, **LIKE)).jobs] == [waiting]
    dead = await submit(queue, make_job(prefix=("b",)))
    assert (await claim_one(queue, "short", 1)).job == dead
    await queue.release("short")
    heir = await queue.claim("cold", 3, 8, **LIKE)
    assert [c.job for c in heir.jobs] == [dead], "nobody waits for a worker without a lease"


async def test_a_worker_claims_what_its_context_has_room_for(queue: Queue) -> None:
    """Prompt and answer; workers of one model may differ in what they hold."""
    long = await submit(queue, make_job(n=2, sampling=Sampling(max_tokens=98)))
    short = await submit(queue, make_job(sampling=Sampling(max_tokens=97)))
    await lose_patience(queue)
    assert [c.job for c in (await queue.claim("w1", 1, 4, **LIKE, max_model_len=100)).jobs] == [short]
    assert [c.job for c in (await queue.claim("w2", 1, 4, **LIKE, max_model_len=101)).jobs] == [long]


async def test_thousands_of_jobs_that_it_could_never_compute_hide_no_others(each_redis: Redis) -> None:
    """A claim looks at a part of the line, and the next one goes on there."""
    queue = make_queue(each_redis, max_scan=2)
    for _ in range(40):
        await submit(queue, make_job(tokenizer_id="old"))
    new = await submit(queue)
    assert not (first := await queue.claim("w1", 1, 2, **LIKE)).jobs
    assert first.look_again_s is not None and first.look_again_s < 0.1
    assert [claimed.job for claimed in (await queue.claim("w1", 2, 2, **LIKE)).jobs] == [new]
    urgent = await submit(queue, make_job(priority=-1))
    assert [claimed.job for claimed in (await queue.claim("w1", 3, 2, **LIKE)).jobs] == [urgent]


async def test_what_is_warm_does_not_overtake_for_ever(each_redis: Redis) -> None:
    queue = make_queue(each_redis, prefix_patience_s=0.05)
    await submit(queue, make_job(prefix=("a",)))
    await claim_one(queue, "warm")
    old = await submit(queue)
    await asyncio.sleep(0.1)
    await submit(queue, make_job(prefix=("a",)))
    assert [c.job for c in (await queue.claim("warm", 2, 1, **LIKE)).jobs] == [old]


async def test_an_idle_worker_takes_what_is_wider_than_its_room(each_redis: Redis) -> None:
    """Short of memory it computes choices one after the other; a busy one waits until it is idle."""
    queue = make_queue(each_redis, patience_s=0.05)
    first = await submit(queue, make_job(n=2))
    assert [c.job for c in (await queue.claim("w1", 1, 5, **LIKE)).jobs] == [first]
    wide, behind = await submit(queue, make_job(n=8)), await submit(queue)
    await lose_patience(queue)
    assert not (await queue.claim("w1", 2, 3, **LIKE, most_choices=8, held=[first.id])).jobs
    await queue.cancel(first.id)
    assert [c.job for c in (await queue.claim("w1", 3, 5, **LIKE, most_choices=8, held=[])).jobs] == [wide]
    assert [c.job for c in (await queue.claim("w2", 1, 5, **LIKE, most_choices=7)).jobs] == [behind]


async def test_jobs_that_it_could_never_compute_hide_no_others(each_redis: Redis) -> None:
    """Of other weights, begun, or wider than it is: a change of weights leaves many of them at the head of the line."""
    queue = make_queue(each_redis)
    for _ in range(3):
        await submit(queue)
    begun = (await queue.claim("old", 1, 8, **LIKE)).jobs
    await queue.publish("old", [delta(claimed, 1) for claimed in begun])
    assert await queue.release("old") == 3
    await submit(queue, make_job(n=4, priority=-1))
    new = await submit(queue)
    await lose_patience(queue)
    scanning = make_queue(each_redis, max_scan=2)
    claims = await scanning.claim("w1", 1, 2, **LIKE | {"weights_id": "new", "most_choices": 2})
    assert [claimed.job for claimed in claims.jobs] == [new]


async def test_what_is_warm_does_not_overtake_what_is_more_urgent(queue: Queue) -> None:
    await submit(queue, make_job(prefix=("a",)))
    await claim_one(queue, "warm")
    await submit(queue, make_job(prefix=("a",), priority=1))
    urgent = await submit(queue)
    assert [c.job for c in (await queue.claim("warm", 2, 1, **LIKE)).jobs] == [urgent]


async def test_a_flood_of_one_tenant_does_not_hide_another(queue: Queue) -> None:
    for _ in range(10):
        await submit(queue, make_job(tenant="loud"))
    quiet = await submit(queue, make_job(tenant="quiet"))
    first_two = [c.job for c in (await queue.claim("w1", 1, 2, **LIKE)).jobs]
    assert quiet in first_two


async def test_a_job_of_an_earlier_rush_that_comes_back_does_not_hide_another_tenant(queue: Queue) -> None:
    """Tenants take turns by what they have had since the line was empty; its own turn was before that."""
    for _ in range(10):
        await submit(queue, make_job(tenant="early"))
    claims = (await queue.claim("w1", 1, 10, **LIKE)).jobs
    await queue.publish("w1", [end(claimed, 1) for claimed in claims[:-1]])
    for _ in range(5):
        await submit(queue, make_job(tenant="loud"))
    assert await queue.release("w1") == 1
    assert (await claim_one(queue, "w2", free=1)).job == claims[-1].job
    quiet = await submit(queue, make_job(tenant="quiet"))
    first_two = [c.job for c in (await queue.claim("w3", 1, 2, **LIKE)).jobs]
    assert quiet in first_two


async def test_priority_comes_before_fairness(queue: Queue) -> None:
    await submit(queue, make_job(priority=1))
    urgent = await submit(queue, make_job(tenant="u"))
    assert (await claim_one(queue, free=1)).job == urgent


async def test_a_wide_job_is_not_starved_by_narrow_ones(queue: Queue) -> None:
    busy = await keep_busy(queue, "w1", "w2")
    wide = await submit(queue, make_job(n=4))
    await submit(queue, make_job(tenant="u"))
    assert (await claim_one(queue, "w1", 2, free=2)).job != wide
    await submit(queue, make_job(tenant="v"))
    await lose_patience(queue)
    assert (await queue.claim("w2", 2, 2, **LIKE)).jobs == ()
    await queue.publish("w2", [end(busy["w2"], 1)])
    assert (await claim_one(queue, "w2", 3, free=4)).job == wide


async def test_a_wide_job_that_waits_for_room_keeps_one_worker_alone(queue: Queue) -> None:
    busy = await keep_busy(queue, "w1", "w2")
    wide = await submit(queue, make_job(n=4))
    await lose_patience(queue)
    narrow = await submit(queue, make_job(tenant="u"))
    assert (await queue.claim("w1", 2, 3, **LIKE)).jobs == ()
    assert (await claim_one(queue, "w2", 2, free=3)).job == narrow
    await queue.publish("w1", [end(busy["w1"], 1)])
    assert (await claim_one(queue, "w1", 3, free=4)).job == wide


async def keep_busy(queue: Queue, *workers: str) -> dict[str, Claimed]:
    """Each with one job."""
    for _ in workers:
        await submit(queue)
    return {worker: await claim_one(queue, worker, free=1) for worker in workers}


async def test_an_answer_that_was_shorter_than_it_might_have_been_is_charged_as_it_was(queue: Queue) -> None:
    """A key whose clients limit nothing has the same share as one whose clients do."""
    unlimited = Sampling(max_tokens=100_000)
    await submit(queue, make_job(tenant="open", sampling=unlimited))
    first = await claim_one(queue)
    await submit(queue, make_job(tenant="other"))       # the line does not become empty
    await queue.publish("w1", [delta(first, 1), end(first, 2)])
    for _ in range(3):
        await submit(queue, make_job(tenant="busy", sampling=Sampling(max_tokens=64)))
    again = await submit(queue, make_job(tenant="open", sampling=unlimited))
    first_three = [c.job for c in (await queue.claim("w2", 1, 3, **LIKE)).jobs]
    assert again in first_three


async def test_jobs_are_lost_as_soon_if_the_clock_was_set_back(queue: Queue) -> None:
    """As if it had been an hour ahead when all this was written."""
    job, step_ms = await submit(queue), 3_600_000
    await claim_one(queue)
    await queue.reap()
    for name in ("leases", "readers", "deadlines"):
        members: Any = await queue.redis.zrange(SHARD.key(name), 0, -1)
        for member in members:
            await queue.redis.zincrby(SHARD.key(name), step_ms, member)
    await queue.redis.incrby(SHARD.key("looked"), step_ms)
    deadline_ms: Any = await queue.redis.zscore(SHARD.key("deadlines"), job.id)
    assert (await queue.reap()).num_requeued == 0
    moved_ms: Any = await queue.redis.zscore(SHARD.key("deadlines"), job.id)
    assert abs(deadline_ms - moved_ms - step_ms) < 1000
    await lose_lease(queue)
    assert (await queue.reap()).num_requeued == 1


async def test_a_log_is_read_beyond_any_number_of_fences(each_redis: Redis) -> None:
    """A page may hold nothing else, where workers come and go without a token."""
    queue = make_queue(each_redis, max_claims=1000)
    job = await submit(queue)
    for number in range(1, 6):
        claimed = await claim_one(queue, sequence=number)
        await queue.release("w1")
    claimed = await claim_one(queue, "w2")
    await queue.publish("w2", [delta(claimed, 1), end(claimed, 2)])
    (header,) = await queue.read(job.id, limit=1)
    (first,) = await queue.read(job.id, after=header, limit=3)
    assert first.position == 1
    assert [entry.position for entry in await queue.read(job.id, after=first, limit=3)] == [2]


async def test_a_log_takes_no_entry_twice_and_leaves_no_gap(queue: Queue) -> None:
    """A promoted replica may lack entries, and a restored log the claims of workers that have not published yet."""
    await submit(queue)
    claimed = await claim_one(queue)
    assert await queue.publish("w1", [delta(claimed, 1)]) == ["ok"]
    assert await queue.publish("w1", [delta(claimed, 3)]) == ["gone"], "2 is missing"
    unknown = replace(claimed, epoch=5)
    assert await queue.publish("w2", [delta(unknown, 1, "y")]) == ["refused"], "another worker has said it"
    assert await queue.publish("w2", [delta(unknown, 3)]) == ["gone"]
    assert await queue.publish("w1", [delta(claimed, 1), delta(claimed, 2)]) == ["ok", "ok"], "repeated, and the next"


async def test_a_line_that_is_longer_than_a_worker_has_room_is_looked_at_again_at_once(queue: Queue) -> None:
    """Not at the next poll: nothing wakes a worker when an answer of its own ends."""
    for _ in range(3):
        await submit(queue)
    claims = await queue.claim("w1", 1, 2, **LIKE)
    assert len(claims.jobs) == 2 and claims.look_again_s is not None and claims.look_again_s < 0.1
    assert len((last := await queue.claim("w1", 2, 2, **LIKE)).jobs) == 1 and last.look_again_s is None


async def test_what_is_appended_is_pushed_to_the_pod_and_a_waiting_worker_is_woken(
        queue: Queue, each_redis_url: str) -> None:
    async with listening(each_redis_url, "wake", "push:pod1") as heard:
        job = await submit(queue)
        assert (await anext(heard))[0] == SHARD.key("wake")
        claimed = await claim_one(queue)
        await queue.publish("w1", [delta(claimed, 1, 'é"\n\u2028'), end(claimed, 2)])
        channel, message = await anext(heard)
    assert channel == SHARD.key("push:pod1") and message
    pushed = parse_push(message)
    assert [(job_id, entry) for job_id, entry in pushed] == [(job.id, e) for e in (await queue.read(job.id))[1:]]
    assert pushed[0][1].deltas[0].text == 'é"\n\u2028'


async def test_a_malformed_job_is_named_not_raised(queue: Queue) -> None:
    job = await submit(queue)
    await queue.redis.hset(SHARD.key(f"job:{job.id}"), "request", json.dumps({"version": 99}))
    claims = await queue.claim("w1", 1, 8, **LIKE)
    assert claims.jobs == ()
    assert claims.malformed == (job.id,)


async def test_a_claim_that_arrives_too_late_undoes_nothing(queue: Queue) -> None:
    jobs = [await submit(queue) for _ in range(2)]
    first = (await queue.claim("w1", 1, 1, **LIKE, held=[])).jobs
    await queue.claim("w1", 2, 1, **LIKE, held=[first[0].job.id])
    assert (await queue.claim("w1", 1, 1, **LIKE, held=[])).jobs == ()
    for job in jobs:
        assert (await queue.describe(job.id))["worker"] == "w1"


async def test_a_job_that_a_claim_gives_up_is_told_to_its_readers(each_redis: Redis, each_redis_url: str) -> None:
    queue = make_queue(each_redis, max_claims=1)
    job = await submit(queue)
    await claim_one(queue)
    async with listening(each_redis_url, "push:pod1") as heard:
        await queue.claim("w1", 2, 8, **LIKE, held=[])
        _, message = await anext(heard)
    assert message
    assert [(job_id, entry.finish.error) for job_id, entry in parse_push(message)] == [(job.id, "job_failed")]
