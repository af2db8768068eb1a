"""A Baton whose every process has its own proxy to Redis, and which is hit by faults.

It acts, and records what it did to which process. It neither decides when (schedule.py) nor judges (checker.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from deploy.redis import RedisServer
from tests.chaos.proxy import Proxy
from tests.chaos.schedule import DELAY_S, Fault
from tests.nursery import Nursery
from tests.system import System, free_port

ODD = MappingProxyType({"test_sabotage": "slow"})       # what a zombie may write into must last
DRAIN_S = 0.3                                           # of a pod that is stopped: its clients continue on another
SETTINGS: dict[str, Any] = {
    "lease_s": 1.0, "idle_poll_s": 0.2, "reap_s": 0.2, "patience_s": 0.5, "threads": 1, "heartbeat_s": 1.0,
    "sweep_s": 0.2, "drain_s": DRAIN_S, "disconnect_grace_s": 20.0, "kv_cache_bytes": 1 << 28,
    # Faults come faster here than a stream can be replayed: giving up has a test of its own.
    "max_attempts": 20, "max_claims": 1000}


@dataclass(eq=False)
class Member:
    """One process, and its proxy to Redis."""

    room: str
    wire: Proxy
    pid: int = 0
    url: str = ""                                       # of a pod
    busy: bool = False                                  # a fault is in progress on it
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.room} {self.url or self.pid}"


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault, and the completions that were live on its target."""

    fault: Fault
    whom: str
    at_s: float                                         # time.monotonic: of the hit, or when Redis answers again
    live: frozenset[str]


class Stage:
    """As an async context it is running."""

    def __init__(self, folder: Path, nursery: Nursery, *, pods: int = 2, workers: int = 3,
                 odd: Mapping[str, Any] = ODD, **settings: Any) -> None:
        self.redis = RedisServer(folder / "redis")
        self.happened: list[Happened] = []
        self.num_cut = self.num_swallowed = 0
        self.members: list[Member] = []
        self._folder = folder
        self._nursery = nursery
        self._num = {"api": pods, "worker": workers}
        self._odd = dict(odd)                           # settings of the last worker
        self._settings = SETTINGS | settings
        self._lasting: set[asyncio.Task[None]] = set()
        self._wires = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Stage:
        await asyncio.to_thread(self.redis.start)
        self.system = System(self._folder, self.redis.url, start=self._nursery.start, **self._settings)
        self._look = Redis.from_url(self.redis.url, retry=None, decode_responses=True)
        try:
            for room, number in self._num.items():
                for i in range(number):
                    is_odd = (room, i) == ("worker", number - 1)
                    self._begin(await self._enlist(room, self._odd if is_odd else {}))
            await asyncio.to_thread(self.system.await_workers, self._num["worker"])
        except BaseException:                           # then nobody leaves it
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.settle()
        await asyncio.to_thread(self.system.stop)
        await self._wires.aclose()
        self._look.close()
        self.redis.kill()

    @property
    def urls(self) -> list[str]:
        return [member.url for member in self.members if member.url]

    async def settle(self) -> None:
        """Waits until every lasting fault is over."""
        while self._lasting:
            await asyncio.gather(*self._lasting)

    async def hit(self, fault: Fault, clients_of: Callable[[str], frozenset[str]]) -> None:
        """Applies a fault now, if possible to a target that serves streams. Lasting faults go on in the background."""
        if fault.kind == "kill redis":
            self._last(self._kill_redis(fault))
            return
        room = {"worker": "worker", "pod": "api"}.get(fault.kind.rpartition(" ")[2])
        live = {member: self._live(member, clients_of) for member in self.members
                if not member.busy and member.room in (room or member.room)}
        serving = [member for member in live if live[member]] or list(live)
        if not serving:
            return
        victim = serving[int(fault.draw * len(serving))]
        acts = {"kill worker": self._kill, "kill pod": self._kill, "end worker": self._end, "end pod": self._end,
                "freeze worker": self._freeze, "cut": self._cut, "swallow": self._swallow, "delay": self._delay,
                "half-open": self._half_open}
        self.happened.append(Happened(fault, str(victim), time.monotonic(), live[victim]))
        victim.busy = True
        self._last(self._finally_free(victim, acts[fault.kind](victim, fault)))

    # ── faults ──

    async def _kill(self, member: Member, _: Fault) -> None:
        self._send(member, signal.SIGKILL)
        self._begin(member)

    async def _end(self, member: Member, _: Fault) -> None:
        """A worker's successor starts beside it; a pod's needs its port."""
        leaving = self._process(member)
        leaving.send(signal.SIGTERM)
        if member.room == "worker":
            self._begin(member)
        await asyncio.to_thread(leaving.popen.wait, 30.0)
        if member.room == "api":
            self._begin(member)

    async def _freeze(self, member: Member, fault: Fault) -> None:
        self._send(member, signal.SIGSTOP)
        await asyncio.sleep(fault.for_s)
        self._send(member, signal.SIGCONT)

    async def _cut(self, member: Member, _: Fault) -> None:
        member.wire.cut()

    async def _swallow(self, member: Member, _: Fault) -> None:
        member.wire.swallow()

    async def _delay(self, member: Member, fault: Fault) -> None:
        member.wire.delay(DELAY_S)
        await asyncio.sleep(fault.for_s)
        member.wire.delay(0.0)

    async def _half_open(self, member: Member, fault: Fault) -> None:
        member.wire.freeze()
        await asyncio.sleep(fault.for_s)
        member.wire.thaw()
        member.wire.cut()

    async def _kill_redis(self, fault: Fault) -> None:
        running = frozenset(job for member in self.members if member.room == "worker" for job in self._held(member))
        self.redis.kill()
        await asyncio.sleep(fault.for_s)
        await asyncio.to_thread(self.redis.start)
        self.happened.append(Happened(fault, "redis", time.monotonic(), running))

    # ── who is who ──

    async def _enlist(self, room: str, settings: dict[str, Any]) -> Member:
        wire = await self._wires.enter_async_context(Proxy(self.redis.url))
        url = f"http://127.0.0.1:{free_port()}" if room == "api" else ""
        member = Member(room, wire, url=url, settings=settings)
        self.members.append(member)
        return member

    def _begin(self, member: Member) -> None:
        settings = member.settings | {"redis_url": member.wire.url}
        if member.room == "api":
            process = self.system.begin_pod(member.url, **settings)
        else:
            process = self.system.start_worker(**settings)
        member.pid = process.popen.pid

    def _process(self, member: Member) -> Any:
        processes = [*self.system.pods.values(), *self.system.workers]
        return next(process for process in processes if process.popen.pid == member.pid)

    def _send(self, member: Member, number: signal.Signals) -> None:
        process = self._process(member)
        process.send(number)
        if number == signal.SIGKILL and process in self.system.workers:
            self.system.workers.remove(process)

    def _live(self, member: Member, clients_of: Callable[[str], frozenset[str]]) -> frozenset[str]:
        return clients_of(member.url) if member.url else self._held(member)

    def _held(self, member: Member) -> frozenset[str]:
        """The jobs of a worker, as Redis knows them."""
        look: Any = self._look
        key = self.system.shard.key
        try:
            mine = [name for name in look.zrange(key("leases"), 0, -1) if f"-{member.pid}-" in name]
            return frozenset(job for name in mine for job in look.smembers(key(f"held:{name}")))
        except RedisError:
            return frozenset()                          # Redis is away

    def _last(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _finally_free(self, member: Member, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            member.busy = False
