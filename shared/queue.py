"""The verbs of the protocol, each one round trip, each idempotent. Beside them only workers write: what they announce.

The atomic steps are the Lua files beside this one; here their arguments are packed and their replies unpacked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from redis.asyncio import Redis, RedisCluster
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

from shared.connection import refusals
from shared.errors import Overloaded, StreamLost, TenantOverloaded
from shared.job import Entry, Finish, Header, Job, Kind
from shared.keys import Shard
from shared.settings import Settings

LUA = Path(__file__).parent / "lua"
VERBS = ("submit", "claim", "publish", "release", "reap", "cancel", "attend", "leave", "restore", "erase")
MAX_REAPED = 64                                         # jobs put back by one reap
MAX_PODS = 8                                            # that relay one answer: entries are pushed to the newest
MAX_ATTENDED = 1024                                     # jobs per `attend`, during which Redis does nothing else
UNLIMITED = 1 << 30                                     # a limit of a worker that is unknown
ANY_JOB = ("*",)                                        # in place of the held jobs: unspecified
STALLED_REAPS = 4                                       # that were due and did not run: Redis itself stood still
ERASED_S = 60.0                                         # until erased data expires; meanwhile it cannot be found
MIN_DEADLINE_S = 1.0                                    # of a restored job: even a late one must still be ended
PREFIX_TTL_S = 600.0                                    # how long a worker is assumed to have a prefix cached

Outcome = Literal["ok", "refused", "gone"]
Left = Literal["read", "waits", "cancelled", "none"]


class Write(NamedTuple):
    """An entry that a worker appends: `data` is JSON text, passed on as it is. A hold appends nothing: it asks whether
    the job is still this worker's."""

    job_id: str
    epoch: int
    position: int
    num_tokens: int
    kind: Kind | Literal["hold"]
    data: str

    @property
    def entry(self) -> Entry:
        assert self.kind != "hold", "no entry"
        return Entry(self.epoch, self.position, self.num_tokens, self.kind, self.data)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that is now this worker's, and how far earlier workers came with it."""

    job: Job
    epoch: int
    position: int
    num_tokens: int
    alone: bool                                         # it has cost a worker before: nothing else may run beside it
    is_like: bool = True                                # the answer was begun with equal numerics
    header: str = ""                                    # the log's first entry


@dataclass(frozen=True, slots=True)
class Claims:
    jobs: tuple[Claimed, ...]
    malformed: tuple[str, ...]                          # ids of jobs that do not decode
    look_again_s: float | None                          # until we may take a job that was left to another worker


@dataclass(frozen=True, slots=True)
class Reaped:
    num_requeued: int
    num_dead: int
    num_late: int
    num_unread: int


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a job found by its id."""

    job_id: str
    tenant: str
    header: Header
    finish: Finish | None                               # None: it still runs
    job: Job | None                                     # None: it has ended, or has another schema version


class Behind(Exception):
    """Redis lacks what it has acknowledged: it lost its data, or a replica that lagged behind was promoted."""


class Queue:
    """One shard of the queue."""

    def __init__(self, redis: Redis, shard: Shard, settings: Settings) -> None:
        self.redis = redis
        self.shard = shard
        self.settings = settings
        publish = "SPUBLISH" if isinstance(redis, RedisCluster) else "PUBLISH"
        self._scripts = {verb: redis.register_script(_script(verb, publish)) for verb in VERBS}
        self._lease_ms = round(settings.lease_s * 1000)

    def __repr__(self) -> str:
        return f"<Queue {self.shard.id}>"

    async def submit(self, job: Job, header: Header) -> int:
        """Queues a job; returns how many are queued. Raises Overloaded or TenantOverloaded."""
        limits = self.settings
        outcome, num_queued = await self._run(
            "submit", *self._acceptance(job, header.encode(), job.deadline_s), limits.max_queued,
            limits.max_tenant_choices)
        if outcome == b"full":
            raise Overloaded
        if outcome == b"tenant_full":
            raise TenantOverloaded
        return int(num_queued)

    async def claim(self, worker: str, sequence: int, num_free: int, *, tokenizer_id: str, weights_id: str,
                    numerics_id: str, most_choices: int = UNLIMITED, max_model_len: int = UNLIMITED,
                    held: Iterable[str] | None = None, begun_only: bool = False) -> Claims:
        """Takes jobs of at most `num_free` choices. Repeat a call whose reply was lost with the same `sequence`.

        `most_choices`, `max_model_len`: the most that the worker ever has room for. `held`: all jobs that it computes;
        others that Redis has assigned to it go back to the queue. None: unspecified. `begun_only`: only answers that
        have begun.
        """
        settings = self.settings
        look_again_ms, *rows = await self._run(
            "claim", worker, self._lease_ms, sequence, num_free, tokenizer_id, weights_id, numerics_id,
            round(settings.patience_s * 1000), settings.max_scan, round(settings.prefix_patience_s * 1000),
            round(PREFIX_TTL_S * 1000), int(settings.allow_other_weights), most_choices, max_model_len,
            settings.max_attempts, settings.max_claims, int(begun_only), *(ANY_JOB if held is None else held))
        jobs, malformed = [], []
        for job_id, epoch, position, num_tokens, alone, is_like, request, header in rows:
            try:
                jobs.append(Claimed(Job.decode(request), epoch, position, num_tokens, bool(alone), bool(is_like),
                                    header.decode()))
            except ValueError:
                malformed.append(job_id.decode())
        return Claims(tuple(jobs), tuple(malformed), look_again_ms / 1000 if look_again_ms >= 0 else None)

    async def publish(self, worker: str, writes: Sequence[Write], sequence: int = 1) -> list[Outcome]:
        """Appends one step's entries and renews the lease; returns the outcome of each.

        `sequence` counts the publishes of a worker; 1 starts a new count. Redis must know the one before, or this one.
        If not, raises Behind, and nothing was written.
        """
        args: list[Any] = []
        for w in writes:
            args += (w.job_id, w.epoch, w.position, w.num_tokens, w.kind, w.data)
        outcomes = [outcome.decode() for outcome in await self._run("publish", worker, self._lease_ms, sequence, *args)]
        if outcomes == ["behind"]:
            raise Behind
        return outcomes

    async def restore(self, job: Job, header: str, entries: Sequence[Entry], *, epoch: int, worker: str = "",
                      weights_id: str = "", numerics_id: str = "") -> int | None:
        """Restores what Redis has lost of a job: `entries` are all that is known, from position 1 on.

        A worker that still computes it gets its new epoch; 0 when others compute it, None when it has ended.
        `weights_id`, `numerics_id`: of the worker that began it, if they are known; else the job's weights.
        """
        rest_s = max(job.created_s + job.deadline_s - time.time(), MIN_DEADLINE_S)
        args: list[Any] = []
        for entry in entries:
            args += (entry.position, entry.num_tokens, entry.kind, entry.data)
        found: int | None = await self._run(
            "restore", *self._acceptance(replace(job, weights_id=weights_id or job.weights_id), header, rest_s), worker,
            self._lease_ms, numerics_id, epoch, *args)
        return found

    async def read(self, job_id: str, after: Entry | None = None, limit: int | None = None) -> list[Entry]:
        """The entries of a log after `after`, in order and without fences.

        Raises StreamLost when there is no log, Behind when `after` is not in it.
        """
        found = await self._range(job_id, after.id if after else "-", limit + 1 if limit and after else limit)
        if after and not (found and found[0] == after):
            found = await self._range(job_id, "-", None)    # restored under another epoch, or gone
            at = next((i for i, entry in enumerate(found) if entry.says_the_same(after)), None)
            if at is None:
                raise Behind if found else StreamLost
            found = found[at:]
        if not found:
            raise StreamLost
        said = [entry for entry in (found[1:] if after else found) if entry.kind != "fence"]
        while limit and not said and len(found) >= limit:           # a page of fences hides what follows
            found = await self._range(job_id, f"({found[-1].epoch}-{found[-1].position}", limit)
            said = [entry for entry in found if entry.kind != "fence"]
        return said

    async def _range(self, job_id: str, begin: str, limit: int | None) -> list[Entry]:
        with refusals():
            rows: Any = await self.redis.xrange(self.shard.key(f"out:{job_id}"), begin, "+", count=limit)
        return [_entry(entry_id, fields) for entry_id, fields in rows]

    async def release(self, worker: str, job_ids: Sequence[str] = (), *, has_failed: bool = False) -> int:
        """Hands jobs back to the head of the queue; without ids all that the worker holds, and its lease ends.

        With `has_failed` it counts as a lost lease: after `max_attempts` in a row without progress a job is given up.
        """
        return int(await self._run("release", worker, self.settings.max_attempts, self.settings.max_claims,
                                   int(has_failed), *job_ids))

    async def reap(self) -> Reaped:
        """Requeues the jobs of expired leases, and ends those past their deadline or without readers."""
        settings = self.settings
        stall_s = max(settings.lease_s, STALLED_REAPS * settings.reap_s)
        return Reaped(*await self._run("reap", settings.max_attempts, settings.max_claims, MAX_REAPED, self._lease_ms,
                                       round(stall_s * 1000)))

    async def cancel(self, job_id: str, code: str = "cancelled", *, worker: str = "") -> bool:
        """Ends a job, with `worker` only if that holds it. False when it has ended, is unknown or not held so."""
        return await self._run("cancel", job_id, code, worker) is not None

    async def erase(self, job_id: str) -> bool:
        """Ends a job if it runs; it can no longer be found. False when it is unknown."""
        return await self._run("erase", job_id, round(ERASED_S * 1000)) is not None

    async def is_erased(self, job_id: str) -> bool:
        """Whether it was erased less than `ERASED_S` ago; after that it is unknown."""
        return bool(await self.redis.hexists(self.shard.key(f"job:{job_id}"), "erased"))

    async def attend(self, pod: str, job_ids: Sequence[str]) -> int:
        """This pod relays these jobs: they have a reader for `reader_ttl_s` more. Returns how many of them are live."""
        num_live = 0
        for begin in range(0, len(job_ids), MAX_ATTENDED):
            num_live += await self._run("attend", pod, round(self.settings.reader_ttl_s * 1000), MAX_PODS,
                                        *job_ids[begin:begin + MAX_ATTENDED])
        return num_live

    async def leave(self, pod: str, job_id: str, grace_s: float) -> Left:
        """This pod no longer relays a job. Without other readers it is cancelled, `grace_s` later."""
        outcome: Left = (await self._run("leave", pod, round(grace_s * 1000), job_id)).decode()
        return outcome

    async def find(self, job_id: str) -> Found | None:
        """The owner and the state of a job; None when it is unknown, expired or erased."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hmget(self.shard.key(f"job:{job_id}"), "tenant", "request", "erased")
            pipe.xrange(self.shard.key(f"out:{job_id}"), count=1)
            pipe.xrevrange(self.shard.key(f"out:{job_id}"), count=1)
            (tenant, request, erased), oldest, newest = await pipe.execute()
        if tenant is None or erased or not oldest or not newest:
            return None
        first, last = _entry(*oldest[0]), _entry(*newest[0])
        return Found(job_id, tenant.decode(), first.header,
                     last.finish if last.kind == "end" else None, _readable(request) if request else None)

    async def describe(self, job_id: str) -> dict[str, str]:
        """The job's hash without the request, and the `tokens` of its log; empty when it is unknown or expired."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.shard.key(f"job:{job_id}"))
            pipe.xrevrange(self.shard.key(f"out:{job_id}"), count=1)
            fields, tail = await pipe.execute()
        if not fields:
            return {}
        fields |= {b"tokens": tail[0][1][b"tokens"] if tail else b"0"}
        return {name.decode(): value.decode() for name, value in fields.items() if name != b"request"}

    async def live(self, limit: int) -> list[dict[str, str]]:
        """`describe` for queued and running jobs, oldest first, each with its `id`."""
        rows: Any = await self.redis.xrange(self.shard.key("jobs"), count=limit)
        ids = [fields[b"job"].decode() for _, fields in rows]
        return [{"id": job_id, **await self.describe(job_id)} for job_id in ids]

    async def dead(self, limit: int) -> list[dict[str, str]]:
        """The newest dead letters, each with the ms of its end in `at_ms`; `request` and `header` unchanged."""
        rows: Any = await self.redis.xrevrange(self.shard.key("dead"), count=limit)
        return [{"at_ms": entry_id.partition(b"-")[0].decode(),
                 **{name.decode(): value.decode() for name, value in fields.items()}} for entry_id, fields in rows]

    async def num_live(self) -> int:
        """The number of queued and running jobs."""
        return int(await self.redis.xlen(self.shard.key("jobs")))

    async def counters(self) -> Mapping[str, int]:
        """Totals since the shard began, and the present `queued` and `live`."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.shard.key("counters"))
            pipe.zcard(self.shard.key("ready"))
            pipe.xlen(self.shard.key("jobs"))
            totals, num_queued, num_live = await pipe.execute()
        return {**{name.decode(): int(value) for name, value in totals.items()}, "queued": num_queued, "live": num_live}

    async def workers(self) -> list[dict[str, str]]:
        """What the workers with a lease report about themselves."""
        names: Any = await self.redis.zrange(self.shard.key("leases"), 0, -1)
        async with self.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self.shard.key(f"worker:{name.decode()}"))
            rows = await pipe.execute()
        return [{key.decode(): value.decode() for key, value in row.items()} for row in rows]

    def _acceptance(self, job: Job, header: str, deadline_s: float) -> tuple[Any, ...]:
        """The arguments of accept() in lua/prelude.lua."""
        num_prompt_tokens, retain_s = len(job.prompt_token_ids), job.retain_s or self.settings.retain_s
        reader_ttl_s = self.settings.reader_ttl_s if job.pod else 0
        return (job.id, job.encode(), header, job.tenant, job.n, job.pod, job.priority, round(deadline_s * 1000),
                round(retain_s * 1000), num_prompt_tokens, job.sampling.max_tokens, job.tokenizer_id, job.weights_id,
                " ".join(job.prefix), round(reader_ttl_s * 1000))

    async def _run(self, verb: str, *args: Any) -> Any:
        script: AsyncScript = self._scripts[verb]
        redis: Any = self.redis
        with refusals():
            try:
                return await redis.evalsha(script.sha, 1, self.shard.tag, *args)
            except NoScriptError:                       # EVAL, no SCRIPT LOAD before: Redis may forget it in between
                return await redis.eval(script.script, 1, self.shard.tag, *args)


def _readable(request: bytes) -> Job | None:
    try:
        return Job.decode(request)
    except ValueError:
        return None


def _entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    return Entry(int(entry_id.partition(b"-")[0]), int(fields[b"position"]), int(fields[b"tokens"]),
                 fields[b"kind"].decode(), fields[b"data"].decode())  # type: ignore[arg-type]


def parse_push(message: bytes) -> list[tuple[str, Entry]]:
    """The entries of a packed push: (job id, entry), in the order in which they were appended."""
    rows = (line.split(" ", 1) for line in message.decode().split("\n"))
    return [(job_id, Entry.parse(line)) for job_id, line in rows]


@cache
def _script(verb: str, publish: str) -> str:
    prelude = (LUA / "prelude.lua").read_text().replace("PUBLISH = 'PUBLISH'", f"PUBLISH = '{publish}'")
    return prelude + (LUA / f"{verb}.lua").read_text()
